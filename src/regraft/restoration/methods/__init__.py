"""The built-in restoration methods: a module or package each, with the object `PLUGIN`."""
