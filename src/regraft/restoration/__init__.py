"""Which pruned weights are restored: what a method is, the ranking that every method gives."""
