"""From text to batches: tokenizer, documents, one token stream, exact-resume loader.

The path is ``load_tokenizer`` and ``load_documents``, then ``tokenize``, ``split_tokens``, then
``TokenLoader`` for training and ``validation_batches`` for the held-out share. Nothing here imports
torchtitan or touches a GPU.
"""

from flame.data.loader import IGNORE_INDEX, TokenLoader, validation_batches
from flame.data.text import load_documents
from flame.data.tokenizer import load_tokenizer
from flame.data.tokens import split_tokens, tokenize

__all__ = [
    "IGNORE_INDEX",
    "TokenLoader",
    "load_documents",
    "load_tokenizer",
    "split_tokens",
    "tokenize",
    "validation_batches",
]
