"""Gain: objective.py has the formulas, step.py one step, method.py the loop, path.py its record."""

from regraft.restoration.methods.gain.method import PLUGIN

__all__ = ["PLUGIN"]
