"""Replaces a registered attention operator by another function while a measurement runs."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextlib.contextmanager
def replaced_operator(attn_impl: str, function: Callable[..., object]) -> Iterator[None]:
    """Runs ``function`` where models ask transformers' table for ``attn_impl``, eagerly and without TF32."""
    precision = torch.get_float32_matmul_precision()
    # a local entry of this table hides the registered one
    ALL_ATTENTION_FUNCTIONS[attn_impl] = function
    try:
        # NOTE(numerics): TF32 would round float32 scores and blur which of them are zero
        torch.set_float32_matmul_precision("highest")
        # compiled layers are bypassed, not compiled again
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        del ALL_ATTENTION_FUNCTIONS[attn_impl]
