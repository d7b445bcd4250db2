"""All that knows transformers: checkpoints on disk, loading, anatomy, replay of decoder layers."""
