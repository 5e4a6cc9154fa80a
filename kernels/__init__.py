"""One folder an operator: the declaration in ``__init__.py``, ``reference.py`` that reads like the formula,
and fast versions beside it, all tested against it at odd sizes: ``eager.py`` by torch's operators;
``triton.py`` for GPUs, which only tests import so far."""
