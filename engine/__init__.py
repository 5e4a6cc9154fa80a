"""Tensors: model, KV pool, sampler, forward batches and the engine thread.

A step: the loop builds a `ForwardBatch` from a `ScheduleBatch`, `EngineThread.submit`s it and goes on; the
thread runs `ModelRunner.forward`; `EngineThread.poll` gives the `ForwardOutput`. What takes long
and is no forward is a `Job`.
"""
