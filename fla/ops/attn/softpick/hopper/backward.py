"""Launcher of the backward kernel for Hopper: row numbers, dq, dk and dv in one pass, and dq in the inputs' dtype.

dq is added to a float32 accumulator in an order that does not depend on the number of programs, so gradients are
bitwise reproducible: BACKWARD.md.
"""

# Triton's annotations refuse what its compiler accepts: an int for a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch

from fla.ops.attn.softpick.hopper.backward_kernel import normalized_attn_bwd_kernel_hopper
from fla.ops.attn.softpick.hopper.backward_passes import dq_kernel, row_numbers_kernel
from fla.ops.attn.softpick.hopper.gluon_api import TensorDescriptor
from fla.ops.attn.softpick.hopper.launch import (
    block_descriptor,
    padded_head_dim,
    shared_layout,
)
from fla.ops.attn.softpick.launch_shapes import num_processors
from fla.ops.attn.softpick.normalizers import WITH_SMALL_DENOMINATORS
from fla.ops.attn.softpick.parallel_bwd import launch_delta_kernel, shared_arguments
from fla.ops.attn.softpick.tiles import feature_tile, packed_sequences, strides_bth

# keys of a unit of work
BT = 128
# bytes of queries and their gradients that heads at work at the same time may stream, to find them in L2 again
STREAMED_BYTES = 2**25


def hopper_normalized_attn_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    scale: float,
    window_size: int | None,
    head_first: bool,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the kernels on the inputs and outputs of forward; `parallel_normalized_attn_bwd` for sm_90.

    `hopper_refusal` is None for the inputs.

    Args:
        q: As given to forward, like ``k``, ``v`` and the arguments from ``scale`` on.
        k: Keys.
        v: Values.
        sink_bias: ``[HQ]`` float32, contiguous, or None.
        cu_seqlens: Boundaries of packed sequences, or None.
        o: Output of forward.
        lse: Base-2 log of the denominator ``[B, HQ, T]``, float32, from forward.
        do: Gradient of ``o``, last dimension contiguous.
        dlse: Gradient of the base-2 ``lse`` ``[B, HQ, T]``, contiguous float32, or None.
        scale: Factor on ``q @ k.T``.
        window_size: Keys that a query sees, itself included, or None for all.
        head_first: Layout ``[B, H, T, D]`` instead of ``[B, T, H, D]``.
        normalizer: A name in `normalizers.KERNEL_NORMALIZERS`.

    Returns:
        Gradients of ``q``, ``k`` and ``v``, then ``row_stats`` ``[B, HQ, T, 2]`` float32: ``-log2 Z`` (-inf where
        ``Z`` is 0) and ``delta = <o, do> - dlse / ln(2)``.
    """
    time, head = (2, 1) if head_first else (1, 2)
    B, T, S, HQ, H = q.shape[0], q.shape[time], k.shape[time], q.shape[head], k.shape[head]
    K, V, G = q.shape[-1], v.shape[-1], HQ // H
    D = padded_head_dim(max(K, V))
    BQ = 64 if D == 128 else 128
    # tiles of keys that lie before the window of every query
    FIRST = 0 if window_size is None else max(S - T - window_size + 1, 0) // BT
    if cu_seqlens is None:
        units = tiles = None
        NT, NQ = -(-S // BT) - FIRST, -(-T // BQ)
    else:
        packed = packed_sequences(cu_seqlens, T)
        units, tiles = packed.numbered_tiles(BT, BQ), packed.numbered_tiles(BQ, BQ)
        NT, NQ = len(units), len(tiles)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    if FIRST:
        for x in dk, dv:
            x.narrow(time, 0, FIRST * BT).zero_()
    num_tiles = B * HQ * NQ
    row_stats = lse.new_empty((*lse.shape, 2))
    row_numbers = lse.new_empty(num_tiles * 4, BQ)
    # nothing is read that has not been stored: the first to add to a tile stores it
    accumulator = lse.new_empty(num_tiles * 2, 16, 256)
    # the next unit, and the turn of each tile of queries; the row numbers' kernel zeroes them
    counters = torch.empty(num_tiles + 1, dtype=torch.int32, device=q.device)
    has_rescale = q.dtype == torch.float16 and normalizer in WITH_SMALL_DENOMINATORS
    rescaled_q = torch.empty_like(q) if has_rescale else q
    with torch.cuda.device_of(q):
        shared = shared_arguments(q, k, v, do, cu_seqlens, window_size, head_first, normalizer)
        launch_delta_kernel(q, k, v, sink_bias, cu_seqlens, lse, do, dlse, row_stats, scale, shared)
        row_numbers_kernel[(num_tiles,)](
            q,
            o,
            do,
            lse,
            dlse,
            row_stats,
            row_numbers,
            counters,
            rescaled_q,
            sq=strides_bth(q, head_first),
            so=strides_bth(o, head_first),
            sdo=strides_bth(do, head_first),
            srescaled=strides_bth(rescaled_q, head_first),
            tiles=tiles,
            T_max=T,
            NQ=NQ,
            HQ=HQ,
            K=K,
            V=V,
            BQ=BQ,
            BK=feature_tile(K),
            BV=feature_tile(V),
            NORMALIZER=normalizer,
            IS_VARLEN=cu_seqlens is not None,
            HAS_DLSE=dlse is not None,
            HAS_RESCALE=has_rescale,
        )
        n_units = NT * B * H
        _, sdk_t, sdk_h = strides_bth(dk, head_first)
        _, sdv_t, sdv_h = strides_bth(dv, head_first)
        normalized_attn_bwd_kernel_hopper[(min(num_processors(q.device.index), n_units),)](
            *(block_descriptor(x, head_first, 64, D) for x in (rescaled_q, do, k, v)),
            _row_descriptor(row_numbers, [4, BQ]),
            _row_descriptor(accumulator, [1, 16, 256]),
            *(block_descriptor(x, head_first, 64, D) for x in (dk, dv)),
            dk if cu_seqlens is not None else None,
            dv if cu_seqlens is not None else None,
            counters,
            units,
            scale,
            sdk_t=sdk_t,
            sdk_h=sdk_h,
            sdv_t=sdv_t,
            sdv_h=sdv_h,
            n_units=n_units,
            NT=NT,
            BH=B * H,
            H=H,
            G=G,
            FIRST=FIRST,
            HEADS_AT_A_TIME=max(1, min(B * H, STREAMED_BYTES // (T * D * 4 * G))),
            T=T,
            S=S,
            W=None if window_size is None else min(window_size, S),
            NQ=NQ,
            K=K,
            V=V,
            BQ=BQ,
            NORMALIZER=normalizer,
            IS_NEGATED=scale < 0,
            HAS_RESCALE=has_rescale,
        )
        if not has_rescale:
            # not beside dq, at the peak of memory
            row_numbers = None
        dq = torch.empty_like(q)
        dq_kernel[(num_tiles, D * BQ // 4096)](
            accumulator,
            row_numbers,
            dq,
            scale,
            sdq=strides_bth(dq, head_first),
            tiles=tiles,
            T_max=T,
            NQ=NQ,
            HQ=HQ,
            K=K,
            BQ=BQ,
            IS_VARLEN=cu_seqlens is not None,
            HAS_RESCALE=has_rescale,
        )
    return dq, dk, dv, row_stats


def _row_descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Of blocks of a contiguous float32 tensor, not swizzled."""
    layout = shared_layout(32, len(block))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
