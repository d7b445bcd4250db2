"""Generation, judging and the numbers: ASR, over-refusal, utility, RSR, each with its interval."""
