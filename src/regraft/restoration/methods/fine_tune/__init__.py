"""Sparse fine-tuning, a baseline: adam.py the training, method.py the method."""

from regraft.restoration.methods.fine_tune.method import PLUGIN

__all__ = ["PLUGIN"]
