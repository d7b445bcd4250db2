"""Every setting of every stage, typed, validated and explained once, a module a subject.

The same models make the command line's flags, are a recipe's blocks and are written into artifacts.
"""
