"""Runs of recipes: planning, making step by step, reports, comparisons, bundles."""
