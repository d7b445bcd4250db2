"""Defences at inference, the baselines beside restoration: a prompt, or a direction added."""
