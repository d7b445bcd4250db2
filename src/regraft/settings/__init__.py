"""Settings of every stage: typed, validated and described once, one module per subject.

The same models define command-line flags and recipe blocks and are written into artifacts.
"""
