"""The paper's analyses: sweeps, total Ships against lost safety, and what two tasks share.

Each is a module: what is computed, its figure, and a function that writes both into a folder.
"""
