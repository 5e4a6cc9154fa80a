"""Writes the keys and values of new tokens into their pages.

    layer[page[t], :, 0, offset[t]] = k[t];   layer[page[t], :, 1, offset[t]] = v[t]

Shapes: ``kv [T, 2, Hkv, D]`` (strided is fine); ``layer [num_pages, Hkv, 2, page_size, D]``, a strided view
of the pool, written in place; ``page, offset [T]`` int64. No slot may be named twice.
"""

from .eager import store_kv_

__all__ = ["store_kv_"]
