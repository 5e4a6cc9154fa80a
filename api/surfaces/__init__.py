"""One file an endpoint that clients generate with: its bodies parsed, its answers rendered."""
