"""`python -m pdserve` is `pdserve`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
