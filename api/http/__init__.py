"""What every HTTP server here has, whatever it serves: bodies, bounds, errors, keys, drains."""
