"""compressm in other people's training loops and models: one module per host, imported only by those who use it.

Nothing here decides about cuts: each module calls a `Compressor` at the right moments of its host's loop.
"""
