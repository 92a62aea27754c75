"""compressm in other people's training loops and models: one module per host, imported only on use.

These modules do not decide about cuts. Each calls a `Compressor` at the right points of its host's loop.
"""
