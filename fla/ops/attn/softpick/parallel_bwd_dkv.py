"""Backward kernel for dk and dv: streams the queries past a tile of keys. Its launcher is in `parallel_bwd.py`.

dk and dv are summed over the query heads of a group in registers, so gradients need no atomics.

Legend: as in `parallel_fwd.py` and `parallel_bwd_dq.py`, and
    BT, BS             keys of the program's tile, queries of a tile that it streams
    b_exp_neg_lse2     2**b_neg_lse2
    b_p                weights n(s) / Z
    b_headroom         exponent by which b_q may grow without overflowing fp16
"""

import triton
import triton.language as tl

from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    fp16_rescale_exponent,
    numerator_and_denominator_terms,
    score_grad,
    scores_and_sign,
)
from fla.ops.attn.softpick.tiles import (
    load_rows,
    program_tile,
    query_tile_bounds,
    round_for_dot,
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
    row_stats,
    i_b,
    i_hq,
    bos,
    sq_t,
    sq_h,
    sdo_t,
    sdo_h,
    T_max,
    o_k,
    scale,
    T,
    q_offset,
    G,
    W,
    K: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDS_BY_BITS: tl.constexpr,
    first,
    end,
    skip_start,
    skip_len,
    IS_MASKED: tl.constexpr,
    IS_NEGATED: tl.constexpr,
):
    """Accumulates the queries [first, end) of G heads, excluding [skip_start, skip_start + skip_len), into b_dk and b_dv.

    IS_MASKED: some of these queries may not see all keys of the tile, or lie past T. q_offset is S - T.
    """
    # one loop over heads and tiles: nested ones keep twice the registers alive
    n = tl.cdiv(tl.maximum(end - skip_len - first, 0), BS)
    i_n = first
    m_nan = tl.zeros([BS], tl.int1)
    for _ in tl.range(0, n * G, num_stages=1 if IS_MASKED else None):
        i_s = i_n
        if IS_MASKED:
            i_s = tl.where(i_s < skip_start, i_s, i_s + skip_len)
        o_s = i_s + tl.arange(0, BS)
        b_q = stream_rows(q, q_desc, i_b, i_hq, bos, i_s, sq_t, T, K, BS, BK, IS_MASKED)
        b_do = stream_rows(do, do_desc, i_b, i_hq, bos, i_s, sdo_t, T, V, BS, BV, IS_MASKED)
        p_stats = row_stats + tl.cast(i_s, tl.int64) * 2
        p_stats = p_stats + tl.arange(0, BS)[:, None] * 2 + tl.arange(0, 2)[None, :]
        # queries past T get an infinite denominator and b_delta = 0: no weight and no gradient
        b_stats = (
            tl.load(p_stats, mask=(o_s < T)[:, None], other=0.0) if IS_MASKED else tl.load(p_stats)
        )
        b_neg_lse2, b_delta = tl.split(b_stats)
        if ROUNDS_BY_BITS:
            m_nan = m_nan | (b_delta != b_delta)
        if IS_MASKED:
            b_neg_lse2 = tl.where(o_s < T, b_neg_lse2, -float("inf"))
        b_exp_neg_lse2 = tl.exp2(b_neg_lse2)
        # [BT, BS] products, keys in rows and queries in columns
        b_r = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        # as early as possible, so that the tensor cores are busy while the weights are computed
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        m_s = visible((o_s + q_offset)[None, :], o_k[:, None], W, HAS_WINDOW)
        b_s, b_r = scores_and_sign(b_r, m_s, scale, NORMALIZER, IS_MASKED, IS_NEGATED)
        b_p, _ = numerator_and_denominator_terms(
            b_s, b_neg_lse2[None, :], b_exp_neg_lse2[None, :], NORMALIZER, ROUNDS_BY_BITS
        )
        b_p = round_for_dot(b_p, b_do.dtype, ROUNDS_BY_BITS)
        b_dv = tl.dot(b_p, b_do, b_dv, input_precision=PRECISION)
        if q.dtype.element_ty == tl.float16:
            # NOTE(numerics): as in dq, but q takes the factor 2**b_rescale, as far as q does not overflow
            b_headroom = 15.0 - tl.log2(tl.maximum(tl.max(tl.abs(b_q.to(tl.float32)), 1), 1.0))
            b_rescale = tl.minimum(
                fp16_rescale_exponent(b_neg_lse2, 20, NORMALIZER), tl.maximum(b_headroom, 0.0)
            )
            b_neg_lse2 -= b_rescale
            b_q = (b_q * tl.exp2(b_rescale)[:, None]).to(b_q.dtype)
        b_ds = score_grad(b_s, b_r, b_neg_lse2[None, :], b_dp, b_delta[None, :], NORMALIZER)
        b_ds = round_for_dot(b_ds, b_q.dtype, ROUNDS_BY_BITS)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        i_n += BS
        is_next = i_n >= end - skip_len
        i_n = tl.where(is_next, first, i_n)
        i_hq += tl.where(is_next, 1, 0)
        q += tl.where(is_next, sq_h, 0)
        do += tl.where(is_next, sdo_h, 0)
        row_stats += tl.where(is_next, tl.cast(T_max, tl.int64) * 2, 0)
    if ROUNDS_BY_BITS:
        # `round_for_dot` may drop the NaN of p and ds; delta is NaN in their rows, see the dq kernel
        b_nan = tl.where(tl.max(m_nan.to(tl.int32), 0) > 0, float("nan"), 0.0)
        b_dk += b_nan
        b_dv += b_nan
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T_max", "S_max", "NT", "H", "G", "W"])
def parallel_normalized_attn_bwd_kernel_dkv(
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
    sq,
    sk,
    sv,
    sdo,
    sdk,
    sdv,
    tiles,
    T_max,
    S_max,
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
    ROUNDS_BY_BITS: tl.constexpr,
):
    """One program computes dk and dv of BT keys of one key head, over the queries of all query heads that read it."""
    # with a larger tile the registers of the mask would spill
    MASKED_BS: tl.constexpr = min(BS, 32)
    sq_b, sq_t, sq_h = sq
    sk_b, sk_t, sk_h = sk
    sv_b, sv_t, sv_h = sv
    sdo_b, sdo_t, sdo_h = sdo
    sdk_b, sdk_t, sdk_h = sdk
    sdv_b, sdv_t, sdv_h = sdv
    i_bh, i_t, bos, T, S = program_tile(tiles, T_max, S_max, NT, BT, IS_VARLEN, False)
    i_b = i_bh // H
    i_h = i_bh % H
    i_hq = i_h * G
    q += i_b * sq_b + i_hq * sq_h + bos * sq_t
    k += i_b * sk_b + i_h * sk_h + bos * sk_t
    v += i_b * sv_b + i_h * sv_h + bos * sv_t
    do += i_b * sdo_b + i_hq * sdo_h + bos * sdo_t
    dk += i_b * sdk_b + i_h * sdk_h + bos * sdk_t
    dv += i_b * sdv_b + i_h * sdv_h + bos * sdv_t
    row_stats += (i_bh * G * T_max + bos) * 2

    b_k = load_rows(k, i_t, sk_t, S, K, BT, BK, True)
    b_v = load_rows(v, i_t, sv_t, S, V, BT, BV, True)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_dv = tl.zeros([BT, BV], tl.float32)
    o_k = i_t + tl.arange(0, BT)
    q_offset = S - T
    queries = query_tile_bounds(i_t, T, S, W, BT, BS, HAS_WINDOW)
    # the pipelined loop comes first: after the masked one, ptxas serialises its wgmma (warning C7515)
    b_dk, b_dv = _accumulate_queries(
        b_k, b_v, b_dk, b_dv, q, do, q_desc, do_desc, row_stats, i_b, i_hq, bos, sq_t, sq_h, sdo_t, sdo_h, T_max,
        o_k, scale * RCP_LN2, T, q_offset, G, W, K, V, BS, BK, BV, NORMALIZER, HAS_WINDOW, PRECISION, ROUNDS_BY_BITS,
        first=queries.first_full, end=queries.end_full, skip_start=0, skip_len=0,
        IS_MASKED=False, IS_NEGATED=IS_NEGATED,
    )  # fmt: skip
    b_dk, b_dv = _accumulate_queries(
        b_k, b_v, b_dk, b_dv, q, do, q_desc, do_desc, row_stats, i_b, i_hq, bos, sq_t, sq_h, sdo_t, sdo_h, T_max,
        o_k, scale * RCP_LN2, T, q_offset, G, W, K, V, MASKED_BS, BK, BV, NORMALIZER, HAS_WINDOW, PRECISION, ROUNDS_BY_BITS,
        first=queries.first, end=queries.end, skip_start=queries.first_full, skip_len=queries.end_full - queries.first_full,
        IS_MASKED=True, IS_NEGATED=IS_NEGATED,
    )  # fmt: skip
    store_rows(dk, b_dk * scale, i_t, sdk_t, o_k < S, K, BT, BK)
    store_rows(dv, b_dv, i_t, sdv_t, o_k < S, V, BT, BV)
