"""regraft gives a pruned vision-language model its safety back."""

__version__ = "0.1.0"
