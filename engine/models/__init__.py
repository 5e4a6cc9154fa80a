"""What sets the supported model families apart; the decoder that runs them all is ``decoder.py``."""
