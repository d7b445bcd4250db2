"""All that knows transformers: checkpoints on disk, loading, architecture, replay of layers."""
