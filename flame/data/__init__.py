"""From text to batches, with exact resume.

`open_data` makes the data of a run from its flags: a `TokenSource` for each source, in memory or in the
memory-mapped files of ``python -m flame.data.prepare``, read by `TokenLoader` in a global order of
permutations; or with streaming `Shards` of documents, which `StreamLoader` tokenizes while training. Nothing here
imports torchtitan or touches a GPU.
"""

from flame.data.batches import IGNORE_INDEX
from flame.data.loader import TokenLoader, validation_batches
from flame.data.run_data import RunData, open_data
from flame.data.source import TokenSource
from flame.data.stream import StreamLoader
from flame.data.text import load_documents
from flame.data.tokenizer import load_tokenizer
from flame.data.tokens import Encoder, split_tokens, tokenize

__all__ = [
    "IGNORE_INDEX",
    "Encoder",
    "RunData",
    "StreamLoader",
    "TokenLoader",
    "TokenSource",
    "load_documents",
    "load_tokenizer",
    "open_data",
    "split_tokens",
    "tokenize",
    "validation_batches",
]
