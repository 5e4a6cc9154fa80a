"""A whole cluster in one process on a logical clock: the real schedulers, rooms, parts and router.

Faked are the edges only: the clock, the sockets, the engine, the transfer backend and the checkpoint on disk.

    tokens.py    what the fake engine samples, and the KV that it keeps
    engine.py    the fake engine: every forward verifies what it reads and where it writes
    nodes.py     a prefill and a decode node, composed of their real parts
    clock.py     the queue of events, and an asyncio loop that runs on it
    situations.py  how often each fault and each rare situation came about
    network.py   control connections: in order within one, late, cut, silent
    wire.py      one-sided writes: late, partly, after a reported failure, after a freeze
    plan.py      what happens in a seed: nodes, requests, faults
    router.py    a router: its real state, without a loop or a socket
    client.py    one client: its request, and what it got
    cluster.py   the processes of a seed, the faults that befall them, and what is checked
    runner.py    runs seeds, shrinks those that fail, plants mutants
    mutants.py   known bugs, planted one by one
"""
