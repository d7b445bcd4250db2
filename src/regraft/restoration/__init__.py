"""Which pruned weights come back, the patch that holds them, and putting it on and off."""
