"""Autocast and argument checks, shared by references and kernels."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch

# Other devices, such as "meta", have no autocast. torch.amp.is_autocast_available would break torch.compile's graph.
_AUTOCAST_DEVICES = ("cpu", "cuda")


def autocast_inputs(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inputs in autocast's dtype where autocast is on, as torch's own attention takes them."""
    device = inputs[0].device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    # float64 stays, as in torch
    narrow = torch.float32, torch.float16, torch.bfloat16
    return tuple(x.to(dtype) if x.dtype in narrow else x for x in inputs)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context in which operations run in the dtype of their inputs."""
    if device.type not in _AUTOCAST_DEVICES:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    head_first: bool,
    window_size: int | None,
    sink_bias: torch.Tensor | None,
    normalizer: str,
    normalizers: Collection[str],
) -> None:
    """Raises ValueError, naming the argument and the value seen, unless the call is well-formed.

    Reads no values: those of cu_seqlens may be on a GPU and are checked by `check_bounds`.
    """
    if normalizer not in normalizers:
        raise ValueError(f"normalizer must be one of {', '.join(normalizers)}; got {normalizer!r}")
    layout = "[B, H, T, D]" if head_first else "[B, T, H, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions {layout}, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have the dtype and device of q ({q.dtype}, {q.device}), "
                f"got {x.dtype}, {x.device}"
            )
    time, head = (2, 1) if head_first else (1, 2)
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k must have the last dimension of q, {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v must have the shape of k but for the last dimension, got {tuple(v.shape)} "
            f"and {tuple(k.shape)} in layout {layout}"
        )
    T, S, HQ, H = q.shape[time], k.shape[time], q.shape[head], k.shape[head]
    if 0 in (HQ, H, q.shape[-1], v.shape[-1]):
        raise ValueError(
            "q, k and v must have at least one head and one feature, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} in layout {layout}"
        )
    if HQ % H:
        raise ValueError(
            f"the heads of q must be a multiple of those of k, got {HQ} and {H} in layout {layout}"
        )
    if window_size is not None and window_size < 0:
        raise ValueError(
            f"window_size must be at least 0 (1 is the query itself), got {window_size}"
        )
    if sink_bias is not None and (
        sink_bias.shape != (HQ,)
        or not sink_bias.is_floating_point()
        or sink_bias.device != q.device
    ):
        raise ValueError(
            f"sink_bias must be a floating point vector of one score for each of the {HQ} query heads on "
            f"{q.device}, got {sink_bias.dtype} of shape {tuple(sink_bias.shape)} on {sink_bias.device}"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, B=q.shape[0], T=T, S=S)


def _check_cu_seqlens(cu_seqlens: torch.Tensor, B: int, T: int, S: int) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1:
        raise ValueError(
            f"cu_seqlens must be a vector of int32 or int64, got {cu_seqlens.dtype} "
            f"of shape {tuple(cu_seqlens.shape)}"
        )
    if B != 1 or T != S:
        raise ValueError(
            f"cu_seqlens requires one batch row and as many keys as queries, got B={B}, "
            f"{T} queries, {S} keys"
        )


def check_bounds(bounds: list[int], T: int) -> None:
    """Raises ValueError unless cu_seqlens, as a list, rises from 0 to T."""
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {bounds[:8]}")


def check_decode_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    head_first: bool,
    starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    window_size: int | None,
    sink_bias: torch.Tensor | None,
    normalizer: str,
    normalizers: Collection[str],
    max_rows: int,
) -> None:
    """Raises ValueError, naming the argument and the value seen, unless the call of a decoder is well-formed.

    Reads no values: those of lengths, starts and block_table may be on a GPU and are checked by `check_decode_bounds`.
    """
    time, head = (2, 1) if head_first else (1, 2)
    is_paged = block_table is not None
    if is_paged and q.dim() == k.dim() == v.dim() == 4:
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"v must have the pages of k, {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}"
            )
        if k.shape[time] == 0:
            raise ValueError(f"k must have pages of at least one token, got {tuple(k.shape)}")
        # check_inputs takes a page as a batch row, but there may be more or fewer pages than sequences
        rows = min(q.shape[0], k.shape[0])
        inputs = q[:rows], k[:rows], v[:rows]
    else:
        inputs = q, k, v
    check_inputs(*inputs, None, head_first, window_size, sink_bias, normalizer, normalizers)
    B, T, HQ, H = q.shape[0], q.shape[time], q.shape[head], k.shape[head]
    num_rows = T * (HQ // H)
    if num_rows > max_rows:
        raise ValueError(
            f"q must have at most {max_rows} query rows (query tokens times query heads per key head), got {T} x {HQ // H}; "
            "for more, call parallel_..._attn with q shorter than k"
        )
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is not None and (x.dtype not in (torch.int32, torch.int64) or x.shape != (B,)):
            raise ValueError(
                f"{name} must be int32 or int64 [{B}], a number for each sequence, got {x.dtype} "
                f"of shape {tuple(x.shape)}"
            )
    if is_paged and (
        block_table.dtype not in (torch.int32, torch.int64)
        or block_table.dim() != 2
        or block_table.shape[0] != B
        or block_table.stride(1) != 1
    ):
        raise ValueError(
            f"block_table must be int32 or int64 [{B}, pages per sequence], rows contiguous, got {block_table.dtype} "
            f"of shape {tuple(block_table.shape)}"
        )
    for name, x in (("lengths", lengths), ("starts", starts), ("block_table", block_table)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def check_decode_bounds(
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    capacity: int,
    num_pages: int,
    page_size: int,
) -> None:
    """Raises ValueError, naming the sequence and the value, unless lengths, starts and pages lie in the cache.

    Args:
        lengths: One past the last key of each sequence ``[B]``.
        starts: First key of each sequence ``[B]``, or None for 0.
        block_table: Pages of each sequence ``[B, max_pages]``, or None for a contiguous cache.
        capacity: The most tokens of a sequence.
        num_pages: Pages of the cache.
        page_size: Tokens in a page.
    """
    firsts = [0] * len(lengths) if starts is None else starts.tolist()
    for b, (first, length) in enumerate(zip(firsts, lengths.tolist(), strict=True)):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"lengths must be between 0 and the capacity of the cache, {capacity}, got {length} "
                f"for sequence {b}"
            )
        if not 0 <= first <= length:
            raise ValueError(
                f"starts must be between 0 and the length of the sequence, {length}, got {first} "
                f"for sequence {b}"
            )
        if block_table is None:
            continue
        for page in block_table[b, first // page_size : -(-length // page_size)].tolist():
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"block_table must name pages from 0 to {num_pages - 1}, got {page} "
                    f"for sequence {b}"
                )
