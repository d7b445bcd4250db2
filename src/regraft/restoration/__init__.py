"""Restoration: which pruned weights get their dense values back, ranked by each method."""
