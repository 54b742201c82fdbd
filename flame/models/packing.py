"""Bounds of the documents in packed rows, from the arguments that transformers passes to attention.

`DataCollatorWithFlattening` and its like give bounds (``cu_seq_lens_q``, ``cu_seq_lens_k``), or positions that restart
with each document. transformers reads positions if it has no cache; its flash attention always does.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils.import_utils import is_tracing

from flame.models.key_ranges import MAYBE_PACKED, KeyRanges

_RESTART = "got positions that restart within a row"
_PASS_BOUNDS = (
    "pass cu_seq_lens_q and cu_seq_lens_k too, as "
    "DataCollatorWithFlattening(return_flash_attn_kwargs=True) does"
)

# bounds found in a tensor of positions: every layer of a forward pass gets the same tensor
_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def document_bounds(
    name: str,
    mask: object,
    *,
    B: int,
    T: int,
    S: int,
    position_ids: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> torch.Tensor | None:
    """Bounds ``[N + 1]`` of the documents in ``B`` rows of ``T`` tokens laid end to end; None where each row is one.

    Positions are read once per forward pass, which synchronises with the GPU, as in transformers itself.

    Args:
        name: The operator, for messages.
        mask: What `causal_key_ranges` returned.
        B: Rows of the batch.
        T: Tokens of a row.
        S: Columns of the key tensor, more than ``T`` where there is a cache.
        position_ids: ``[1 or B, T]``; a document ends where they do not go on by one.
        cu_seq_lens_q: Bounds that are known, for ``B == 1``; they win over positions.
        cu_seq_lens_k: The same bounds.
        seq_idx: Numbers of the documents; accepted only together with bounds.

    Raises:
        NotImplementedError: Documents in padded rows or behind keys of a cache, or bounds that cannot be known.
        RuntimeError: Positions restart when a traced graph runs; tracing cannot read them.
    """
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        _require_equal(name, cu_seq_lens_q, cu_seq_lens_k)
        if isinstance(mask, KeyRanges):
            raise NotImplementedError(f"{name} takes packed sequences or padded rows, not both")
        return cu_seq_lens_q
    if seq_idx is not None:
        raise NotImplementedError(f"{name} got seq_idx without bounds: {_PASS_BOUNDS}")
    if position_ids is None:
        if mask is MAYBE_PACKED:
            raise NotImplementedError(f"{name} {_RESTART}: {_PASS_BOUNDS}")
        return None
    # positions of several axes, as in models of images, do not tell documents
    if T == 1 or position_ids.dim() != 2 or position_ids.is_meta:
        return None
    if is_tracing(position_ids):
        if not isinstance(mask, KeyRanges):
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]  # torch has no public asynchronous assertion
                (position_ids.diff() == 1).all(), f"{name} {_RESTART}: {_PASS_BOUNDS}"
            )
        return None
    bounds, restarts = _look(position_ids, B)
    if isinstance(mask, KeyRanges):
        # positions of padding mean nothing
        queries = [(0, T)] * B if mask.bounds is None else mask.queries(T)
        restarts = [(b, t) for b, t in restarts if queries[b][0] < t < queries[b][1]]
    if restarts and (S != T or isinstance(mask, KeyRanges)):
        raise NotImplementedError(
            f"{name} {_RESTART}, with padding or a cache: packed sequences take neither"
        )
    return bounds if restarts else None


def _require_equal(name: str, q: torch.Tensor | None, k: torch.Tensor | None) -> None:
    if q is k:
        return
    message = f"{name} packs queries and keys alike: cu_seq_lens_q and cu_seq_lens_k must be equal"
    if q is None or k is None or q.shape != k.shape:
        raise NotImplementedError(message)
    if q.device.type == "cpu" and not is_tracing(q):
        if not torch.equal(q, k):
            raise NotImplementedError(message)
    else:
        # an asynchronous check: reading back would synchronise in every layer
        torch._assert_async((q == k).all(), message)  # pyright: ignore[reportPrivateImportUsage]  # torch has no public asynchronous assertion


def _look(position_ids: torch.Tensor, B: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Bounds as in `document_bounds`, and row and column of each restart."""
    # a tensor of inference mode has no version counter, so a write would go unnoticed
    version = None if position_ids.is_inference() else (position_ids._version, B)
    found = _found.get(position_ids)
    if found is not None and version is not None and found[0] == version:
        return found[1]
    T = position_ids.shape[1]
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff() != 1
    starts = begins.expand(B, T).flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(starts, (0, 1), value=B * T).int()
    result = bounds, [divmod(start, T) for start in starts.tolist() if start % T]
    _found[position_ids] = version, result
    return result
