"""A whole run as a YAML file: what it lists, how it is read, what its settings mean."""
