"""From a prompt to token ids, and from the tokens of a running request to its text."""
