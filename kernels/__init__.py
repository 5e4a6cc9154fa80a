"""One folder an operator: the declaration in ``__init__.py``, ``reference.py`` that reads like the formula,
and fast versions beside it. Every fast version is tested against the reference at odd sizes."""
