"""What attention needs of a fused projection, in one pass: norms of queries and keys, where a model has them,
rotation, and keys and values written into their pages.

    q[t] = rotary(norm?(q[t]))                                      in place
    layer[page[t], :, 0, offset[t]] = rotary(norm?(k[t]));   layer[page[t], :, 1, offset[t]] = v[t]

Shapes: ``heads [T, Hq + 2·Hkv, D]``, queries, then keys, then values, of which the queries are changed;
``cos, sin [T, D/2]`` as in ``rotary``; ``layer``, ``page`` and ``offset`` as in ``store_kv``; ``q_norm,
k_norm [D]``, the weights of ``rms_norm`` over each head, or both None.
"""
