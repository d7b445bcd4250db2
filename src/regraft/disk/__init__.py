"""Files: what others wrote, read and checked; what is ours, written whole or not at all."""
