"""Launcher of the backward kernels: delta of rows with a small denominator, dq with the other deltas, then dk and dv.

Two passes over the scores and no atomics, so gradients are bitwise reproducible.
"""

# Triton's annotations refuse what its compiler accepts: an int for a constexpr.
# pyright: reportArgumentType=false

from typing import Any

import torch

from fla.ops.attn.softpick.launch_shapes import launch_options
from fla.ops.attn.softpick.naive import EPS
from fla.ops.attn.softpick.normalizers import WITH_SMALL_DENOMINATORS
from fla.ops.attn.softpick.parallel_bwd_delta import parallel_normalized_attn_bwd_kernel_delta
from fla.ops.attn.softpick.parallel_bwd_dkv import parallel_normalized_attn_bwd_kernel_dkv
from fla.ops.attn.softpick.parallel_bwd_dq import parallel_normalized_attn_bwd_kernel_dq
from fla.ops.attn.softpick.tiles import feature_tile, streamed_descriptors, strides_bth, tiles_of


def shared_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    window_size: int | None,
    head_first: bool,
    normalizer: str,
) -> dict[str, Any]:
    """Keyword arguments that all three kernels take: strides, sizes and kinds of the inputs."""
    time, head = (2, 1) if head_first else (1, 2)
    S, K, V = k.shape[time], q.shape[-1], v.shape[-1]
    return {
        "sq": strides_bth(q, head_first),
        "sk": strides_bth(k, head_first),
        "sv": strides_bth(v, head_first),
        "sdo": strides_bth(do, head_first),
        "T_max": q.shape[time],
        "S_max": S,
        "G": q.shape[head] // k.shape[head],
        "W": 0 if window_size is None else min(window_size, S),
        "K": K,
        "V": V,
        "BK": feature_tile(K),
        "BV": feature_tile(V),
        "NORMALIZER": normalizer,
        "IS_VARLEN": cu_seqlens is not None,
        "HAS_WINDOW": window_size is not None,
    }


def launch_delta_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    row_stats: torch.Tensor,
    scale: float,
    shared: dict[str, Any],
) -> None:
    """Stores delta in ``row_stats`` for rows with a small denominator, if there can be any.

    Args as of `parallel_normalized_attn_bwd`, on the device of ``q``, and what `shared_arguments` makes of them.
    """
    if shared["NORMALIZER"] not in WITH_SMALL_DENOMINATORS:
        return
    B, HQ, T = lse.shape
    options = launch_options("delta", q, v.shape[-1])
    del options["HAS_DESCRIPTORS"], options["ROUNDS_BY_BITS"]
    NT, tiles = tiles_of(cu_seqlens, T, int(options["BT"]), is_last_first=True)
    parallel_normalized_attn_bwd_kernel_delta[(NT * B * HQ,)](
        q,
        k,
        v,
        sink_bias,
        do,
        lse,
        dlse,
        row_stats,
        scale,
        tiles=tiles,
        NT=NT,
        HQ=HQ,
        EPS=EPS,
        HAS_SINK=sink_bias is not None,
        HAS_DLSE=dlse is not None,
        **shared,
        **options,
    )


def parallel_normalized_attn_bwd(
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
    """Launches the backward kernels on the inputs and outputs of `parallel_normalized_attn_fwd`.

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
        ``Z`` is 0) and ``delta = <o, do> - dlse / ln(2)``, which is minus the gradient of ``log Z``.
    """
    time, head = (2, 1) if head_first else (1, 2)
    B, T, S, HQ, H = q.shape[0], q.shape[time], k.shape[time], q.shape[head], k.shape[head]
    V = v.shape[-1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    row_stats = lse.new_empty((*lse.shape, 2))
    shared = shared_arguments(q, k, v, do, cu_seqlens, window_size, head_first, normalizer)
    with torch.cuda.device_of(q):
        launch_delta_kernel(q, k, v, sink_bias, cu_seqlens, lse, do, dlse, row_stats, scale, shared)
        options = launch_options("dq", q, V)
        NT, tiles = tiles_of(cu_seqlens, T, int(options["BT"]), is_last_first=True)
        k_desc, v_desc = streamed_descriptors(options, head_first, k, v)
        parallel_normalized_attn_bwd_kernel_dq[(NT * B * HQ,)](
            q,
            k,
            v,
            k_desc,
            v_desc,
            o,
            do,
            lse,
            dlse,
            dq,
            row_stats,
            scale,
            so=strides_bth(o, head_first),
            sdq=strides_bth(dq, head_first),
            tiles=tiles,
            NT=NT,
            HQ=HQ,
            HAS_DLSE=dlse is not None,
            IS_NEGATED=scale < 0,
            **shared,
            **options,
        )
        options = launch_options("dkv", q, V)
        NT, tiles = tiles_of(cu_seqlens, S, int(options["BT"]), is_last_first=False)
        q_desc, do_desc = streamed_descriptors(options, head_first, q, do)
        parallel_normalized_attn_bwd_kernel_dkv[(NT * B * H,)](
            q,
            k,
            v,
            do,
            q_desc,
            do_desc,
            row_stats,
            dk,
            dv,
            scale,
            sdk=strides_bth(dk, head_first),
            sdv=strides_bth(dv, head_first),
            tiles=tiles,
            NT=NT,
            H=H,
            IS_NEGATED=scale < 0,
            **shared,
            **options,
        )
    return dq, dk, dv, row_stats
