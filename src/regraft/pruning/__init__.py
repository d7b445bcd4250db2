"""Which weights go: masks and the layer-by-layer pruner."""
