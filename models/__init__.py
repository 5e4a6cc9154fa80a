"""Which models there are, as config.json and its family say. No torch here."""
