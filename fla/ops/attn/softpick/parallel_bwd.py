"""Backward kernels of normalised attention and their launcher: dq and delta, then dk and dv.

Two passes over the scores and no atomics, so gradients are bitwise reproducible; dk and dv are summed
over the query heads of a group inside the kernel.

Legend: as in `parallel_fwd.py`, and
    BT, BS             tile owned (queries in dq, keys in dkv), tile streamed
    do dq dk dv        gradients, named like the tensors
    rows               [B, HQ, T, 4] fp32, from dq to dkv, in one piece so that one load fetches a row: b_lse,
                       the base-2 log of the denominator; b_u = 2**-b_lse; b_delta, <o, do> less the gradient
                       of lse; 0
    b_r                products <q, k> before the scale
    b_p b_dp b_ds      weights n(s) / Z, <do, v>, gradient of the scores
"""

import torch
import triton
import triton.language as tl

from fla.ops.attn.softpick.launch_shapes import launch_options
from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    denominator_log,
    lift,
    score_grad,
    scores,
    weights,
)
from fla.ops.attn.softpick.tiles import (
    feature_tile,
    keys_of,
    load_rows,
    own_tile,
    queries_of,
    store_rows,
    strides_bth,
    tiles_of,
    visible,
)


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
    o_q,
    scale,
    first,
    end,
    hole_at,
    hole,
    S,
    W,
    K: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_NEGATED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys [first, end), without `hole` of them from hole_at on, to b_dq.

    IS_MASKED where some row may not see all of them.
    """
    for i_s in tl.range(first, end - hole, BS, num_stages=1 if IS_MASKED and HAS_WINDOW else None):
        if IS_MASKED:
            i_s = tl.where(i_s < hole_at, i_s, i_s + hole)
        b_k = load_rows(k, i_s, sk_t, S, K, BS, BK, IS_MASKED)
        b_v = load_rows(v, i_s, sv_t, S, V, BS, BV, IS_MASKED)
        b_r = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_s = visible(o_q[:, None], (i_s + tl.arange(0, BS))[None, :], W, HAS_WINDOW)
        b_s, b_r = scores(b_r, m_s, scale, NORMALIZER, IS_MASKED, IS_NEGATED)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = score_grad(b_s, b_r, b_lse[:, None], b_dp, b_delta[:, None], NORMALIZER)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["T", "S", "NT", "HQ", "G", "W"])
def parallel_normalized_attn_bwd_kernel_dq(
    q,
    k,
    v,
    o,
    do,
    lse,
    dlse,
    dq,
    rows,
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
    so_b,
    so_t,
    so_h,
    sdo_b,
    sdo_t,
    sdo_h,
    sdq_b,
    sdq_t,
    sdq_h,
    tiles,
    T,
    S,
    NT,
    HQ,
    G,
    W,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    IS_NEGATED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_bh, i_t, bos, T_own, S = own_tile(tiles, T, S, NT, BT, IS_VARLEN, True)
    row = i_bh * T + bos
    T = T_own
    i_b = i_bh // HQ
    i_hq = i_bh % HQ
    i_h = i_hq // G
    q += i_b * sq_b + i_hq * sq_h + bos * sq_t
    k += i_b * sk_b + i_h * sk_h + bos * sk_t
    v += i_b * sv_b + i_h * sv_h + bos * sv_t
    o += i_b * so_b + i_hq * so_h + bos * so_t
    do += i_b * sdo_b + i_hq * sdo_h + bos * sdo_t
    dq += i_b * sdq_b + i_hq * sdq_h + bos * sdq_t

    o_t = i_t + tl.arange(0, BT)
    b_o = load_rows(o, i_t, so_t, T, V, BT, BV, True)
    b_do = load_rows(do, i_t, sdo_t, T, V, BT, BV, True)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if HAS_DLSE:
        # a gradient of the base-2 lse enters the scores' gradient by the same factor
        b_delta -= RCP_LN2 * tl.load(dlse + row + o_t, mask=o_t < T, other=0.0)
    b_lse = tl.load(lse + row + o_t, mask=o_t < T, other=0.0)
    b_lse = denominator_log(b_lse, NORMALIZER)
    p_row = rows + (row + o_t) * 4
    tl.store(p_row, b_lse, mask=o_t < T)
    tl.store(p_row + 1, tl.exp2(-b_lse), mask=o_t < T)
    tl.store(p_row + 2, b_delta, mask=o_t < T)
    tl.store(p_row + 3, tl.zeros_like(b_delta), mask=o_t < T)

    b_q = load_rows(q, i_t, sq_t, T, K, BT, BK, True)
    # NOTE(numerics): ds, rounded to the input dtype, is kept near 1 where all scores of a row are tiny
    b_lift = lift(b_lse, 20, NORMALIZER)
    b_lse += b_lift
    b_dq = tl.zeros([BT, BK], tl.float32)
    # [BT] position of each query among the keys
    o_q = o_t + (S - T)
    first, first_full, end_full, end = keys_of(i_t, T, S, W, BT, BS, HAS_WINDOW)
    b_dq = _accumulate_dq(
        b_q, b_do, b_lse, b_delta, b_dq, k, v, sk_t, sv_t, o_q, scale * RCP_LN2,
        first_full, end_full, 0, 0, S, W,
        K, V, BS, BK, BV, NORMALIZER, False, IS_NEGATED, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    b_dq = _accumulate_dq(
        b_q, b_do, b_lse, b_delta, b_dq, k, v, sk_t, sv_t, o_q, scale * RCP_LN2,
        first, end, first_full, end_full - first_full, S, W,
        K, V, BS, BK, BV, NORMALIZER, True, IS_NEGATED, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    b_dq = b_dq * (scale * tl.exp2(b_lift))[:, None]
    store_rows(dq, b_dq, i_t, sdq_t, o_t < T, K, BT, BK)


@triton.jit
def _accumulate_queries(
    b_k,
    b_v,
    b_dk,
    b_dv,
    q,
    do,
    rows,
    sq_t,
    sq_h,
    sdo_t,
    sdo_h,
    rows_h,
    o_k,
    scale,
    first,
    end,
    hole_at,
    hole,
    T,
    off,
    G,
    W,
    K: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_NEGATED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the queries [first, end) of G heads, without `hole` of them from hole_at on, to b_dk and b_dv.

    IS_MASKED where some key may not be seen by all of them, or some do not exist; off is S - T.
    """
    # one loop over heads and tiles: nested ones keep twice the registers alive
    n = tl.cdiv(tl.maximum(end - hole - first, 0), BS)
    for i in tl.range(0, n * G, num_stages=1 if IS_MASKED else None):
        i_g = i // n
        i_s = first + (i % n) * BS
        if IS_MASKED:
            i_s = tl.where(i_s < hole_at, i_s, i_s + hole)
        o_s = i_s + tl.arange(0, BS)
        b_q = load_rows(q + tl.cast(i_g, tl.int64) * sq_h, i_s, sq_t, T, K, BS, BK, IS_MASKED)
        b_do = load_rows(do + tl.cast(i_g, tl.int64) * sdo_h, i_s, sdo_t, T, V, BS, BV, IS_MASKED)
        p_row = rows + (tl.cast(i_g, tl.int64) * rows_h + i_s) * 4
        p_row = p_row + tl.arange(0, BS)[:, None] * 4 + tl.arange(0, 4)[None, :]
        # past T an infinite denominator, and b_u and b_delta of 0: no weight and no gradient
        b_row = tl.load(p_row, mask=(o_s < T)[:, None], other=0.0) if IS_MASKED else tl.load(p_row)
        b_even, b_odd = tl.split(tl.reshape(b_row, [BS, 2, 2]))
        b_lse, b_delta = tl.split(b_even)
        b_u, _ = tl.split(b_odd)
        if IS_MASKED:
            b_lse = tl.where(o_s < T, b_lse, float("inf"))
        # [BT, BS] transposed: keys down, queries across
        b_r = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        m_s = visible((o_s + off)[None, :], o_k[:, None], W, HAS_WINDOW)
        b_s, b_r = scores(b_r, m_s, scale, NORMALIZER, IS_MASKED, IS_NEGATED)
        b_p, _ = weights(b_s, b_lse[None, :], b_u[None, :], NORMALIZER)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        if q.dtype.element_ty == tl.float16:
            # NOTE(numerics): as in dq, but the factor goes to q, as far as q has room for it
            b_room = 15.0 - tl.log2(tl.maximum(tl.max(tl.abs(b_q.to(tl.float32)), 1), 1.0))
            b_lift = tl.minimum(lift(b_lse, 20, NORMALIZER), tl.maximum(b_room, 0.0))
            b_lse += b_lift
            b_q = (b_q * tl.exp2(b_lift)[:, None]).to(b_q.dtype)
        b_ds = score_grad(b_s, b_r, b_lse[None, :], b_dp, b_delta[None, :], NORMALIZER)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "S", "NT", "H", "G", "W"])
def parallel_normalized_attn_bwd_kernel_dkv(
    q,
    k,
    v,
    do,
    rows,
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
    tiles,
    T,
    S,
    NT,
    H,
    G,
    W,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    IS_NEGATED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_bh, i_t, bos, T_own, S = own_tile(tiles, T, S, NT, BT, IS_VARLEN, False)
    i_b = i_bh // H
    i_h = i_bh % H
    i_hq = i_h * G
    q += i_b * sq_b + i_hq * sq_h + bos * sq_t
    k += i_b * sk_b + i_h * sk_h + bos * sk_t
    v += i_b * sv_b + i_h * sv_h + bos * sv_t
    do += i_b * sdo_b + i_hq * sdo_h + bos * sdo_t
    dk += i_b * sdk_b + i_h * sdk_h + bos * sdk_t
    dv += i_b * sdv_b + i_h * sdv_h + bos * sdv_t
    rows += (i_bh * G * T + bos) * 4
    T_all = T
    T = T_own

    b_k = load_rows(k, i_t, sk_t, S, K, BT, BK, True)
    b_v = load_rows(v, i_t, sv_t, S, V, BT, BV, True)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_dv = tl.zeros([BT, BV], tl.float32)
    o_k = i_t + tl.arange(0, BT)
    off = S - T
    first, first_full, end_full, end = queries_of(i_t, T, S, W, BT, BS, HAS_WINDOW)
    b_dk, b_dv = _accumulate_queries(
        b_k, b_v, b_dk, b_dv, q, do, rows, sq_t, sq_h, sdo_t, sdo_h, T_all, o_k,
        scale * RCP_LN2, first, end, first_full, end_full - first_full, T, off, G, W,
        K, V, BS, BK, BV, NORMALIZER, True, IS_NEGATED, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    b_dk, b_dv = _accumulate_queries(
        b_k, b_v, b_dk, b_dv, q, do, rows, sq_t, sq_h, sdo_t, sdo_h, T_all, o_k,
        scale * RCP_LN2, first_full, end_full, 0, 0, T, off, G, W,
        K, V, BS, BK, BV, NORMALIZER, False, IS_NEGATED, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    store_rows(dk, b_dk * scale, i_t, sdk_t, o_k < S, K, BT, BK)
    store_rows(dv, b_dv, i_t, sdv_t, o_k < S, V, BT, BV)


def parallel_normalized_attn_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    """Launches the kernels on what `parallel_normalized_attn_fwd` took and gave.

    Args:
        do: Gradient of ``o``, last dimension contiguous.
        dlse: Gradient of the base-2 ``lse`` ``[B, HQ, T]``, contiguous float32, or None.

    Returns:
        Gradients of ``q``, ``k`` and ``v``, and ``[B, HQ, T, 4]`` in float32: the base-2 lse, +inf where the
        denominator is 0; 1 / Z; delta, which is minus the gradient of log Z; 0.
    """
    time, head = (2, 1) if head_first else (1, 2)
    B, T, S, HQ, H = q.shape[0], q.shape[time], k.shape[time], q.shape[head], k.shape[head]
    K, V = q.shape[-1], v.shape[-1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows = lse.new_empty((*lse.shape, 4))
    strides = [s for x in (q, k, v) for s in strides_bth(x, head_first)]
    common = {
        "T": T,
        "S": S,
        "G": HQ // H,
        "W": 0 if window_size is None else min(window_size, S),
        "K": K,
        "V": V,
        "BK": feature_tile(K),
        "BV": feature_tile(V),
        "NORMALIZER": normalizer,
        "IS_VARLEN": cu_seqlens is not None,
        "IS_NEGATED": scale < 0,
        "HAS_WINDOW": window_size is not None,
    }
    with torch.cuda.device_of(q):
        options = launch_options("dq", q, V)
        NT, tiles = tiles_of(cu_seqlens, T, options["BT"], is_last_first=True)
        parallel_normalized_attn_bwd_kernel_dq[(NT * B * HQ,)](
            q,
            k,
            v,
            o,
            do,
            lse,
            dlse,
            dq,
            rows,
            scale,
            *strides,
            *strides_bth(o, head_first),
            *strides_bth(do, head_first),
            *strides_bth(dq, head_first),
            tiles=tiles,
            NT=NT,
            HQ=HQ,
            HAS_DLSE=dlse is not None,
            **common,
            **options,
        )
        options = launch_options("dkv", q, V)
        NT, tiles = tiles_of(cu_seqlens, S, options["BT"], is_last_first=False)
        parallel_normalized_attn_bwd_kernel_dkv[(NT * B * H,)](
            q,
            k,
            v,
            do,
            rows,
            dk,
            dv,
            scale,
            *strides,
            *strides_bth(do, head_first),
            *strides_bth(dk, head_first),
            *strides_bth(dv, head_first),
            tiles=tiles,
            NT=NT,
            H=H,
            **common,
            **options,
        )
    return dq, dk, dv, rows
