"""Gain: objective.py the formulas, step.py a step, method.py the loop, path.py its log."""

from regraft.restoration.methods.gain.method import PLUGIN

__all__ = ["PLUGIN"]
