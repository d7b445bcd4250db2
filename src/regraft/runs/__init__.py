"""A recipe's run: planned, made step by step, reported, compared, packed to be sent."""
