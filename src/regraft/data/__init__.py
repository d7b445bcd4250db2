"""Data sets: from files on disk to `Example`, and from examples to model inputs."""
