"""Restoration methods, an object each, and the ranking of pruned weights that every method gives.

`base` says what a method is and knows them all by name.
"""
