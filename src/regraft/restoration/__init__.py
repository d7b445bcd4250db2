"""Which pruned weights are restored, the patch that holds them, and putting it on and off."""
