"""A cluster as a Python object: `from pdserve import Engine`."""
