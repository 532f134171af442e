"""SGLang's runtime as a backend: it batches, caches and draws by itself; this is how we ask it.

    engine -> SglangBackend (answers, books) -> Bridge (a thread with SGLang's event loop)
           -> sglang.Engine -> its processes

`fields.py` and `arguments.py` say what our fields and flags are in its words, and what it lacks.
Nothing here imports sglang before `runtime.load_sglang` is called, in the bridge's thread.
"""
