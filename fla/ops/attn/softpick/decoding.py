"""Public decoding operators, for the step of a model that generates: argument checks and registration.

The kernels are in `decoding_kernels.py`. There is no gradient.
"""

import math

import torch

from fla.ops.attn.softpick.checks import check_decode_bounds, check_decode_inputs
from fla.ops.attn.softpick.decoding_kernels import normalized_attn_decode_launch
from fla.ops.attn.softpick.named_operators import bind_normalizer
from fla.ops.attn.softpick.normalizers import KERNEL_NORMALIZERS
from fla.ops.attn.softpick.parallel import check_kernel_inputs
from fla.ops.attn.softpick.tiles import empty_rows

# Most query rows of a key head: query tokens times query heads of the group.
MAX_ROWS = 128

_LIBRARY = torch.library.Library("softpick", "FRAGMENT")
_NAME = "normalized_attn_decode"
_LIBRARY.define(
    _NAME + torch.library.infer_schema(normalized_attn_decode_launch, mutates_args=()),
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in ("CUDA", "CPU"):
    _LIBRARY.impl(_NAME, normalized_attn_decode_launch, _key)


@torch.library.register_fake(f"softpick::{_NAME}", lib=_LIBRARY)
def _(
    q,
    k,
    v,
    lengths,
    starts,
    block_table,
    sink_bias,
    scale,
    window_size,
    head_first,
    has_stats,
    normalizer,
):
    B, T, HQ = (q.shape[i] for i in ((0, 2, 1) if head_first else (0, 1, 2)))
    H = k.shape[1 if head_first else 2]
    o = empty_rows(q, T, HQ, v.shape[-1], head_first)
    lse = q.new_empty((B, HQ, T), dtype=torch.float32)
    return o, lse, lse.new_empty(B, H if has_stats else 0)


_decode = torch.ops.softpick.normalized_attn_decode.default


def normalized_attn_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
    head_first: bool = False,
    *,
    normalizer: str = "softpick",
    starts: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    window_size: int | None = None,
    sink_bias: torch.Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    check_bounds: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    r"""Attention of the last tokens of sequences to their cache, with any normaliser of the family.

    Equals `parallel_normalized_attn` on the first ``lengths`` keys of each sequence, for ``T * HQ / H <= 128`` query
    rows. The keys of a sequence are split over the GPU, and the heads of a group share one read of the cache. With
    at most 16 query rows, rows of ``v`` that get no weight are not read. Nothing synchronises with the host, so a call
    can be captured in a CUDA graph, after a first call outside it. Equal inputs give bitwise equal outputs.

    Args:
        q: Queries ``[B, T, HQ, K]``, float32, float16 or bfloat16, the last ``T`` tokens of each sequence;
            ``T * HQ / H <= 128``.
        k: Cache of keys, dtype and device of ``q``, last dimension contiguous: ``[B, S, H, K]``, or with
            ``block_table`` pages ``[num_pages, page_size, H, K]`` of any size. ``HQ`` is a multiple of ``H``.
        v: Cache of values, like ``k`` with a last dimension ``V``; ``K``, ``V <= 256``.
        lengths: One past the last key of each sequence in the cache ``[B]``, int32 or int64; the keys of the queries
            count. A length beyond the capacity ``S`` (or of the block table) counts as the capacity, one below 0
            as 0. A query before the start of its sequence gives 0.
        scale: Factor on ``q @ k.T``. Default: ``K ** -0.5``.
        head_first: ``q``, ``k``, ``v`` and the output are ``[B, H, T, D]`` instead, pages ``[num_pages, H,
            page_size, D]``.
        normalizer: A name of `NORMALIZERS`.
        starts: First key of each sequence in the cache ``[B]``, int32 or int64, for rows that are padded on the
            left. Default: 0.
        block_table: Pages of each sequence in order ``[B, max_pages]``, int32 or int64. Entries beyond its length
            are not read; the keys of a page that is not in the cache have no weight and no denominator.
        window_size: A query sees itself and the ``window_size - 1`` keys before it, with 0 no key. Default: all.
        sink_bias: A score of each query head ``[HQ]`` that takes weight and has no value.
        return_lse: Also return the natural logarithm of the denominator ``[B, HQ, T]``, float32.
        return_stats: Also return the share of the rows of ``v`` of a sequence that were read ``[B, H]``, float32.
        check_bounds: Also refuse lengths, starts and pages that are not in the cache. It waits for the GPU, so it
            cannot be used in a CUDA graph or a compiled model.

    Returns:
        Outputs ``[B, T, HQ, V]`` in the dtype of ``q``, then what was asked for.

    Raises:
        ValueError: An argument breaks a condition, or needs a gradient; the message names it and shows the value.

    Numerics:
        As `parallel_softpick_attn` with ``safe=True``: exact for every finite input. The sums of splits, each with a
        shift of its own, merge in float32.
    """
    check_decode_inputs(
        q,
        k,
        v,
        lengths,
        head_first,
        starts,
        block_table,
        window_size,
        sink_bias,
        normalizer,
        KERNEL_NORMALIZERS,
        MAX_ROWS,
    )
    check_kernel_inputs(q, k, v, head_first)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "q, k and v must not require gradients, since decoding has none: call it under torch.no_grad(), "
            f"or call parallel_{normalizer}_attn"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {x.stride()}"
            )
    time = 2 if head_first else 1
    capacity = k.shape[time] * (1 if block_table is None else block_table.shape[1])
    if check_bounds:
        check_decode_bounds(lengths, starts, block_table, capacity, k.shape[0], k.shape[time])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lengths = lengths.contiguous()
    if starts is not None:
        starts = starts.contiguous()
    if sink_bias is not None:
        sink_bias = sink_bias.float().contiguous()
    o, lse, rows_read = _decode(
        q, k, v, lengths, starts, block_table, sink_bias, scale, window_size, head_first, return_stats, normalizer
    )  # fmt: skip
    extra = (lse * math.log(2),) * return_lse
    if return_stats:
        num_keys = lengths.clamp(max=capacity)
        if starts is not None:
            num_keys = num_keys - starts.clamp(min=0)
        extra += (rows_read / num_keys.clamp(min=1)[:, None],)
    return (o, *extra) if extra else o


softpick_attn_decode = bind_normalizer(normalized_attn_decode, "softpick")
relu_softpick_attn_decode = bind_normalizer(normalized_attn_decode, "relu_softpick")
abs_softpick_attn_decode = bind_normalizer(normalized_attn_decode, "abs_softpick")
softmax_attn_decode = bind_normalizer(normalized_attn_decode, "softmax")
softmax_plus_one_attn_decode = bind_normalizer(normalized_attn_decode, "softmax_plus_one")
rectified_attn_decode = bind_normalizer(normalized_attn_decode, "rectified")
