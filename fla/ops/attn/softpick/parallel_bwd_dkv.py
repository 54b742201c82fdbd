"""Backward kernel for dk and dv: streams the queries past a tile of keys. Its launcher is in `parallel_bwd.py`.

dk and dv are summed over the query heads of a group in registers, so gradients need no atomics.

Legend: as in `parallel_fwd.py`, and
    BT, BS             tile of keys the program owns, tile of queries it streams
    do dq dk dv        gradients, named like the tensors
    rows               [B, HQ, T, 2] fp32, from dq to dkv, in one piece so that one load fetches a row: b_nm,
                       minus the base-2 log of the denominator; b_delta, <o, do> less the gradient of lse
    b_u                2**b_nm
    b_r                products <q, k> before the scale
    b_p b_dp b_ds      weights n(s) / Z, <do, v>, gradient of the scores
"""

import triton
import triton.language as tl

from fla.ops.attn.softpick.normalizers import RCP_LN2, lift, score_grad, scores, weights
from fla.ops.attn.softpick.tiles import (
    load_rows,
    own_tile,
    queries_of,
    store_rows,
    stream_rows,
    visible,
)


@triton.jit
def _accumulate_queries(
    b_k,
    b_v,
    b_dk,
    b_dv,
    q,
    do,
    q_desc,
    do_desc,
    rows,
    i_b,
    i_hq,
    bos,
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
    i_n = first
    for _ in tl.range(0, n * G, num_stages=1 if IS_MASKED else None):
        i_s = i_n
        if IS_MASKED:
            i_s = tl.where(i_s < hole_at, i_s, i_s + hole)
        o_s = i_s + tl.arange(0, BS)
        b_q = stream_rows(q, q_desc, i_b, i_hq, bos, i_s, sq_t, T, K, BS, BK, IS_MASKED)
        b_do = stream_rows(do, do_desc, i_b, i_hq, bos, i_s, sdo_t, T, V, BS, BV, IS_MASKED)
        p_row = rows + tl.cast(i_s, tl.int64) * 2
        p_row = p_row + tl.arange(0, BS)[:, None] * 2 + tl.arange(0, 2)[None, :]
        # past T an infinite denominator, and b_delta of 0: no weight and no gradient
        b_row = tl.load(p_row, mask=(o_s < T)[:, None], other=0.0) if IS_MASKED else tl.load(p_row)
        b_nm, b_delta = tl.split(b_row)
        if IS_MASKED:
            b_nm = tl.where(o_s < T, b_nm, -float("inf"))
        b_u = tl.exp2(b_nm)
        # [BT, BS] transposed: keys down, queries across
        b_r = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        # as early as may be, so that the tensor cores have work while the weights are computed
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        m_s = visible((o_s + off)[None, :], o_k[:, None], W, HAS_WINDOW)
        b_s, b_r = scores(b_r, m_s, scale, NORMALIZER, IS_MASKED, IS_NEGATED)
        b_p, _ = weights(b_s, b_nm[None, :], b_u[None, :], NORMALIZER)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        if q.dtype.element_ty == tl.float16:
            # NOTE(numerics): as in dq, but the factor goes to q, as far as q has room for it
            b_room = 15.0 - tl.log2(tl.maximum(tl.max(tl.abs(b_q.to(tl.float32)), 1), 1.0))
            b_lift = tl.minimum(lift(b_nm, 20, NORMALIZER), tl.maximum(b_room, 0.0))
            b_nm -= b_lift
            b_q = (b_q * tl.exp2(b_lift)[:, None]).to(b_q.dtype)
        b_ds = score_grad(b_s, b_r, b_nm[None, :], b_dp, b_delta[None, :], NORMALIZER)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        i_n += BS
        is_next = i_n >= end - hole
        i_n = tl.where(is_next, first, i_n)
        i_hq += tl.where(is_next, 1, 0)
        q += tl.where(is_next, sq_h, 0)
        do += tl.where(is_next, sdo_h, 0)
        rows += tl.where(is_next, tl.cast(rows_h, tl.int64) * 2, 0)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "S", "NT", "H", "G", "W"])
def parallel_normalized_attn_bwd_kernel_dkv(
    q,
    k,
    v,
    do,
    q_desc,
    do_desc,
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
    """One program a tile of BT keys of a key head: dk and dv, over the queries of all query heads that read it."""
    # the mask takes registers that a larger tile would spill
    MASKED_BS: tl.constexpr = min(BS, 32)
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
    rows += (i_bh * G * T + bos) * 2
    T_all = T
    T = T_own

    b_k = load_rows(k, i_t, sk_t, S, K, BT, BK, True)
    b_v = load_rows(v, i_t, sv_t, S, V, BT, BV, True)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_dv = tl.zeros([BT, BV], tl.float32)
    o_k = i_t + tl.arange(0, BT)
    off = S - T
    first, first_full, end_full, end = queries_of(i_t, T, S, W, BT, BS, HAS_WINDOW)
    # the pipelined loop first: behind the other one ptxas makes its wgmma wait for each other (C7515)
    b_dk, b_dv = _accumulate_queries(
        b_k, b_v, b_dk, b_dv, q, do, q_desc, do_desc, rows, i_b, i_hq, bos, sq_t, sq_h, sdo_t, sdo_h, T_all,
        o_k, scale * RCP_LN2, first_full, end_full, 0, 0, T, off, G, W,
        K, V, BS, BK, BV, NORMALIZER, False, IS_NEGATED, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    b_dk, b_dv = _accumulate_queries(
        b_k, b_v, b_dk, b_dv, q, do, q_desc, do_desc, rows, i_b, i_hq, bos, sq_t, sq_h, sdo_t, sdo_h, T_all,
        o_k, scale * RCP_LN2, first, end, first_full, end_full - first_full, T, off, G, W,
        K, V, MASKED_BS, BK, BV, NORMALIZER, True, IS_NEGATED, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    store_rows(dk, b_dk * scale, i_t, sdk_t, o_k < S, K, BT, BK)
    store_rows(dv, b_dv, i_t, sdv_t, o_k < S, V, BT, BV)
