"""From text to batches, with exact resume.

`open_data` makes the data of a run from its flags: a `TokenSource` for each source, in memory or in the
memory-mapped files of ``python -m flame.data.prepare``, read by `TokenLoader` in a global order of
permutations; or with streaming `Shards` of documents, which `StreamLoader` tokenizes while training. Nothing here
imports torchtitan or touches a GPU. This file imports nothing: `python -m flame.data.prepare` would do so before
it can handle Ctrl-C.
"""
