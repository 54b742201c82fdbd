"""Backward kernels of normalised attention and their launcher: delta, then dk and dv, then dq.

Two passes over the scores and no atomics, so gradients are bitwise reproducible; dk and dv are summed
over the query heads of a group inside the kernel.

Legend: as in `parallel_fwd.py`, and
    BT, BS             tile owned (queries in dq, keys in dkv), tile streamed
    do dq dk dv        gradients, named like the tensors
    lse delta          [B, HQ, T] fp32: base-2 log of the denominator; <o, do> less the gradient of lse
    b_p b_dp b_ds      weights n(s) / Z, <do, v>, gradient of the scores
"""

import torch
import triton
import triton.language as tl

from fla.ops.attn.softpick.normalizers import RCP_LN2, masked_score, score_grad, weights
from fla.ops.attn.softpick.parallel_fwd import (
    dot_precision,
    feature_tile,
    load_rows,
    store_rows,
    strides_bth,
)


@triton.jit(do_not_specialize=["T"])
def parallel_normalized_attn_bwd_kernel_preprocess(
    o,
    do,
    dlse,
    delta,
    so_b,
    so_t,
    so_h,
    sdo_b,
    sdo_t,
    sdo_h,
    T,
    HQ,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """delta = <o, do>; a gradient of the base-2 lse enters the scores' gradient by the same factor."""
    NT = tl.cdiv(T, BT)
    i_t = tl.program_id(0) % NT * BT
    i_bh = (tl.program_id(0) // NT).to(tl.int64)
    i_b, i_hq = i_bh // HQ, i_bh % HQ
    o_t = i_t + tl.arange(0, BT)
    b_o = load_rows(o + i_b * so_b + i_hq * so_h, i_t, so_t, T, V, BT, BV, True)
    b_do = load_rows(do + i_b * sdo_b + i_hq * sdo_h, i_t, sdo_t, T, V, BT, BV, True)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if HAS_DLSE:
        b_delta -= RCP_LN2 * tl.load(dlse + i_bh * T + o_t, mask=o_t < T, other=0.0)
    tl.store(delta + i_bh * T + o_t, b_delta, mask=o_t < T)


@triton.jit
def _load_lse(lse, o_t, T):
    """[BT] base-2 lse; +inf, which gives weight and gradient 0, past T and where the denominator is 0."""
    b_lse = tl.load(lse + o_t, mask=o_t < T, other=float("inf"))
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse)


@triton.jit
def _accumulate_queries(
    b_k,
    b_v,
    b_dk,
    b_dv,
    q,
    do,
    lse,
    delta,
    sq_t,
    sdo_t,
    o_first,
    scale,
    first,
    end,
    T,
    K: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the queries [first, end) to b_dk and b_dv; IS_MASKED where some key may not be seen."""
    for i_s in range(first, end, BS):
        o_s = i_s + tl.arange(0, BS)
        b_q = load_rows(q, i_s, sq_t, T, K, BS, BK, True)
        b_do = load_rows(do, i_s, sdo_t, T, V, BS, BV, True)
        b_lse = _load_lse(lse, o_s, T)
        b_delta = tl.load(delta + o_s, mask=o_s < T, other=0.0)
        # [BT, BS] transposed: keys down, queries across
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        if IS_MASKED:
            b_s = tl.where(o_first[:, None] <= o_s[None, :], b_s, masked_score(NORMALIZER))
        b_p, _ = weights(b_s, b_lse[None, :], NORMALIZER)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = score_grad(b_s, b_lse[None, :], b_dp, b_delta[None, :], NORMALIZER)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "S"])
def parallel_normalized_attn_bwd_kernel_dkv(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    scale,
    sq_b,
    sq_t,
    sq_h,
    sk_b,
    sk_t,
    sk_h,
    sv_b,
    sv_t,
    sv_h,
    sdo_b,
    sdo_t,
    sdo_h,
    sdk_b,
    sdk_t,
    sdk_h,
    sdv_b,
    sdv_t,
    sdv_h,
    T,
    S,
    H,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # the tiles with the most queries start first
    NT = tl.cdiv(S, BT)
    i_t = tl.program_id(0) % NT * BT
    i_bh = (tl.program_id(0) // NT).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    b_k = load_rows(k + i_b * sk_b + i_h * sk_h, i_t, sk_t, S, K, BT, BK, True)
    b_v = load_rows(v + i_b * sv_b + i_h * sv_h, i_t, sv_t, S, V, BT, BV, True)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_dv = tl.zeros([BT, BV], tl.float32)
    # [BT] first query that sees each key
    o_first = i_t + tl.arange(0, BT) - (S - T)
    first = tl.maximum(i_t - (S - T), 0) // BS * BS
    first_full = tl.cdiv(tl.maximum(i_t + BT - 1 - (S - T), 0), BS) * BS
    for i_g in range(G):
        i_hq = i_h * G + i_g
        p_q = q + i_b * sq_b + i_hq * sq_h
        p_do = do + i_b * sdo_b + i_hq * sdo_h
        p_lse = lse + (i_b * H * G + i_hq) * T
        p_delta = delta + (i_b * H * G + i_hq) * T
        b_dk, b_dv = _accumulate_queries(
            b_k, b_v, b_dk, b_dv, p_q, p_do, p_lse, p_delta, sq_t, sdo_t, o_first, scale * RCP_LN2,
            first, tl.minimum(first_full, T), T,
            K, V, BS, BK, BV, NORMALIZER, True, PRECISION,
        )  # fmt: skip
        b_dk, b_dv = _accumulate_queries(
            b_k, b_v, b_dk, b_dv, p_q, p_do, p_lse, p_delta, sq_t, sdo_t, o_first, scale * RCP_LN2,
            first_full, T, T,
            K, V, BS, BK, BV, NORMALIZER, False, PRECISION,
        )  # fmt: skip
    store_rows(dk + i_b * sdk_b + i_h * sdk_h, b_dk * scale, i_t, sdk_t, S, K, BT, BK)
    store_rows(dv + i_b * sdv_b + i_h * sdv_h, b_dv, i_t, sdv_t, S, V, BT, BV)


@triton.jit
def _accumulate_dq(
    b_q,
    b_do,
    b_lse,
    b_delta,
    b_dq,
    k,
    v,
    sk_t,
    sv_t,
    o_last,
    scale,
    first,
    end,
    S,
    K: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys [first, end) to b_dq; IS_MASKED where some row may not see all of them."""
    for i_s in range(first, end, BS):
        b_k = load_rows(k, i_s, sk_t, S, K, BS, BK, IS_MASKED)
        b_v = load_rows(v, i_s, sv_t, S, V, BS, BV, IS_MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if IS_MASKED:
            o_s = i_s + tl.arange(0, BS)
            b_s = tl.where(o_s[None, :] <= o_last[:, None], b_s, masked_score(NORMALIZER))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = score_grad(b_s, b_lse[:, None], b_dp, b_delta[:, None], NORMALIZER)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["T", "S"])
def parallel_normalized_attn_bwd_kernel_dq(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dq,
    scale,
    sq_b,
    sq_t,
    sq_h,
    sk_b,
    sk_t,
    sk_h,
    sv_b,
    sv_t,
    sv_h,
    sdo_b,
    sdo_t,
    sdo_h,
    sdq_b,
    sdq_t,
    sdq_h,
    T,
    S,
    HQ,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NT = tl.cdiv(T, BT)
    # the tiles with the most keys start first
    i_t = (NT - 1 - tl.program_id(0) % NT) * BT
    i_bh = (tl.program_id(0) // NT).to(tl.int64)
    i_b, i_hq = i_bh // HQ, i_bh % HQ
    i_h = i_hq // G
    k += i_b * sk_b + i_h * sk_h
    v += i_b * sv_b + i_h * sv_h
    o_t = i_t + tl.arange(0, BT)
    # [BT] last key that each row sees
    o_last = o_t + (S - T)
    b_q = load_rows(q + i_b * sq_b + i_hq * sq_h, i_t, sq_t, T, K, BT, BK, True)
    b_do = load_rows(do + i_b * sdo_b + i_hq * sdo_h, i_t, sdo_t, T, V, BT, BV, True)
    b_lse = _load_lse(lse + i_bh * T, o_t, T)
    b_delta = tl.load(delta + i_bh * T + o_t, mask=o_t < T, other=0.0)
    b_dq = tl.zeros([BT, BK], tl.float32)
    end = tl.minimum(i_t + BT + S - T, S)
    end_full = (i_t + S - T + 1) // BS * BS
    b_dq = _accumulate_dq(
        b_q, b_do, b_lse, b_delta, b_dq, k, v, sk_t, sv_t, o_last, scale * RCP_LN2, 0, end_full, S,
        K, V, BS, BK, BV, NORMALIZER, False, PRECISION,
    )  # fmt: skip
    b_dq = _accumulate_dq(
        b_q, b_do, b_lse, b_delta, b_dq, k, v, sk_t, sv_t, o_last, scale * RCP_LN2, end_full, end, S,
        K, V, BS, BK, BV, NORMALIZER, True, PRECISION,
    )  # fmt: skip
    store_rows(dq + i_b * sdq_b + i_hq * sdq_h, b_dq * scale, i_t, sdq_t, T, K, BT, BK)


def _tile_config(q: torch.Tensor, V: int) -> tuple[dict[str, int], dict[str, int]]:
    """Launch shapes of dkv and dq by head dimension and element size."""
    D = max(feature_tile(q.shape[-1]), feature_tile(V))
    if q.dtype == torch.float32:
        # as in forward
        tiles = {64: {"BT": 32, "BS": 32}, 128: {"BT": 32, "BS": 16}, 256: {"BT": 16, "BS": 16}}
        both = tiles[max(D, 64)] | {"num_warps": 8, "num_stages": 1}
        return both, both
    if D <= 64:
        both = {"BT": 64, "BS": 64, "num_warps": 4, "num_stages": 3}
        return both, both
    if D <= 128:
        dkv = {"BT": 64, "BS": 64, "num_warps": 4, "num_stages": 2}
        return dkv, {"BT": 128, "BS": 64, "num_warps": 8, "num_stages": 2}
    both = {"BT": 32, "BS": 32, "num_warps": 4, "num_stages": 1}
    return both, both


def parallel_normalized_attn_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    scale: float,
    head_first: bool,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the kernels on what `parallel_normalized_attn_fwd` took and gave.

    Args:
        do: Gradient of ``o``, last dimension contiguous.
        dlse: Gradient of the base-2 ``lse`` ``[B, HQ, T]``, contiguous float32, or None.

    Returns:
        Gradients of ``q``, ``k`` and ``v``.
    """
    time, head = (2, 1) if head_first else (1, 2)
    B, T, S, HQ, H = q.shape[0], q.shape[time], k.shape[time], q.shape[head], k.shape[head]
    K, V = q.shape[-1], v.shape[-1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    BT = 64
    parallel_normalized_attn_bwd_kernel_preprocess[(triton.cdiv(T, BT) * B * HQ,)](
        o,
        do,
        dlse,
        delta,
        *strides_bth(o, head_first),
        *strides_bth(do, head_first),
        T=T,
        HQ=HQ,
        V=V,
        BT=BT,
        BV=feature_tile(V),
        HAS_DLSE=dlse is not None,
    )
    sizes = {
        "T": T,
        "S": S,
        "G": HQ // H,
        "K": K,
        "V": V,
        "BK": feature_tile(K),
        "BV": feature_tile(V),
    }
    flags = {"NORMALIZER": normalizer, "PRECISION": dot_precision(q.dtype)}
    strides = [s for x in (q, k, v, do) for s in strides_bth(x, head_first)]
    config_dkv, config_dq = _tile_config(q, V)
    parallel_normalized_attn_bwd_kernel_dkv[(triton.cdiv(S, config_dkv["BT"]) * B * H,)](
        q,
        k,
        v,
        do,
        lse,
        delta,
        dk,
        dv,
        scale,
        *strides,
        *strides_bth(dk, head_first),
        *strides_bth(dv, head_first),
        H=H,
        **sizes,
        **flags,
        **config_dkv,
    )
    parallel_normalized_attn_bwd_kernel_dq[(triton.cdiv(T, config_dq["BT"]) * B * HQ,)](
        q,
        k,
        v,
        do,
        lse,
        delta,
        dq,
        scale,
        *strides,
        *strides_bth(dq, head_first),
        HQ=HQ,
        **sizes,
        **flags,
        **config_dq,
    )
    return dq, dk, dv
