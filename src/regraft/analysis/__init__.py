"""The paper's analyses: sweeps, total Ships against lost safety, and what two tasks share."""
