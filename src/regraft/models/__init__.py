"""Everything that knows transformers: checkpoints, loading, architecture, replay of layers."""
