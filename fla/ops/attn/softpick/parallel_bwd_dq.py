"""Backward kernel for dq: streams the keys past a tile of queries. Its launcher is in `parallel_bwd.py`.

It also computes delta, and leaves it with lse for the dkv kernel.

Legend: as in `parallel_fwd.py`, and
    do dq dk dv        gradients, named like the tensors
    rows               [B, HQ, T, 2] fp32, from dq to dkv, in one piece so that one load fetches a row: b_nm,
                       minus the base-2 log of the denominator; b_delta, <o, do> less the gradient of lse
    b_r                products <q, k> before the scale
    b_dp b_ds          <do, v>, gradient of the scores
"""

import triton
import triton.language as tl

from fla.ops.attn.softpick.normalizers import RCP_LN2, denominator_log, lift, score_grad, scores
from fla.ops.attn.softpick.tiles import (
    keys_of,
    load_rows,
    own_tile,
    store_rows,
    stream_rows,
    visible,
)


@triton.jit
def _accumulate_dq(
    b_q,
    b_do,
    b_nm,
    b_delta,
    b_dq,
    k,
    v,
    k_desc,
    v_desc,
    i_b,
    i_h,
    bos,
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
        b_k = stream_rows(k, k_desc, i_b, i_h, bos, i_s, sk_t, S, K, BS, BK, IS_MASKED)
        b_v = stream_rows(v, v_desc, i_b, i_h, bos, i_s, sv_t, S, V, BS, BV, IS_MASKED)
        b_r = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        # as early as may be, so that the tensor cores have work while the weights are computed
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        m_s = visible(o_q[:, None], (i_s + tl.arange(0, BS))[None, :], W, HAS_WINDOW)
        b_s, b_r = scores(b_r, m_s, scale, NORMALIZER, IS_MASKED, IS_NEGATED)
        b_ds = score_grad(b_s, b_r, b_nm[:, None], b_dp, b_delta[:, None], NORMALIZER)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["T", "S", "NT", "HQ", "G", "W"])
def parallel_normalized_attn_bwd_kernel_dq(
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
    """One program a tile of BT queries of a query head: dq, and the two numbers a query that dk and dv need."""
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
    b_nm = -denominator_log(b_lse, NORMALIZER)
    p_row = rows + (row + o_t) * 2
    tl.store(p_row, b_nm, mask=o_t < T)
    tl.store(p_row + 1, b_delta, mask=o_t < T)

    b_q = load_rows(q, i_t, sq_t, T, K, BT, BK, True)
    # NOTE(numerics): ds, rounded to the input dtype, is kept near 1 where all scores of a row are tiny
    b_lift = lift(b_nm, 20, NORMALIZER)
    b_nm -= b_lift
    b_dq = tl.zeros([BT, BK], tl.float32)
    # [BT] position of each query among the keys
    o_q = o_t + (S - T)
    first, first_full, end_full, end = keys_of(i_t, T, S, W, BT, BS, HAS_WINDOW)
    b_dq = _accumulate_dq(
        b_q, b_do, b_nm, b_delta, b_dq, k, v, k_desc, v_desc, i_b, i_h, bos, sk_t, sv_t, o_q,
        scale * RCP_LN2,
        first_full, end_full, 0, 0, S, W,
        K, V, BS, BK, BV, NORMALIZER, False, IS_NEGATED, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    b_dq = _accumulate_dq(
        b_q, b_do, b_nm, b_delta, b_dq, k, v, k_desc, v_desc, i_b, i_h, bos, sk_t, sv_t, o_q,
        scale * RCP_LN2,
        first, end, first_full, end_full - first_full, S, W,
        K, V, BS, BK, BV, NORMALIZER, True, IS_NEGATED, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    b_dq = b_dq * (scale * tl.exp2(b_lift))[:, None]
    store_rows(dq, b_dq, i_t, sdq_t, o_t < T, K, BT, BK)
