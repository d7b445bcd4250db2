"""Restoration methods, a file or folder each, named after it, with the object PLUGIN."""
