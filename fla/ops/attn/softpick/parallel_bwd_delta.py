"""Backward kernel for delta of rows with a small denominator. Its launcher is in `parallel_bwd.py`.

The dq kernel computes delta from the rounded output, and the gradient divides the rounding by the denominator. Where a
softpick's denominator is below 1, README.md section 3 shows that the error then has no bound. This kernel sums delta of
those rows in float32 from weights that are not rounded.

Legend: as in `parallel_bwd_dq.py`.
"""

# Triton's annotations refuse what its compiler accepts: a bool for a constexpr, a loop over
# tl.range, a maximum of a tensor in a condition.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    denominator_constant,
    has_small_denominator,
    numerator_and_denominator_terms,
    scores_and_sign,
)
from fla.ops.attn.softpick.tiles import key_tile_bounds, load_rows, program_tile, visible


@triton.jit(do_not_specialize=["T_max", "S_max", "NT", "HQ", "G", "W"])
def parallel_normalized_attn_bwd_kernel_delta(
    q,
    k,
    v,
    sink_bias,
    do,
    lse,
    dlse,
    row_stats,
    scale,
    sq,
    sk,
    sv,
    sdo,
    tiles,
    T_max,
    S_max,
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
    EPS: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program stores delta = sum_j p_ij <do_i, v_j> - dlse / ln(2) of those of its BT queries that have a small denominator."""
    i_bh, i_t, bos, T, S = program_tile(tiles, T_max, S_max, NT, BT, IS_VARLEN, True)
    row = i_bh * T_max + bos
    o_t = i_t + tl.arange(0, BT)
    b_lse = tl.load(lse + row + o_t, mask=o_t < T, other=0.0)
    m_small = has_small_denominator(b_lse, NORMALIZER)
    # reshaped as in the forward kernel
    if tl.max(tl.reshape(m_small.to(tl.int32), [2, BT // 2])) > 0:
        sq_b, sq_t, sq_h = sq
        sk_b, sk_t, sk_h = sk
        sv_b, sv_t, sv_h = sv
        sdo_b, sdo_t, sdo_h = sdo
        i_b = i_bh // HQ
        i_hq = i_bh % HQ
        i_h = i_hq // G
        q += i_b * sq_b + i_hq * sq_h + bos * sq_t
        k += i_b * sk_b + i_h * sk_h + bos * sk_t
        v += i_b * sv_b + i_h * sv_h + bos * sv_t
        do += i_b * sdo_b + i_hq * sdo_h + bos * sdo_t
        b_q = load_rows(q, i_t, sq_t, T, K, BT, BK, True)
        b_do = load_rows(do, i_t, sdo_t, T, V, BT, BV, True)
        # [BT] position of each query among the keys
        o_q = o_t + (S - T)
        keys = key_tile_bounds(i_t, T, S, W, BT, BS, HAS_WINDOW)
        b_delta = tl.zeros([BT], tl.float32)
        b_c = tl.load(sink_bias + i_hq) * RCP_LN2 if HAS_SINK else -float("inf")
        # NOTE(numerics): summed again, since dp - delta keeps what numerators and denominator differ by, and rounds
        # otherwise if the forward kernel has shifted them
        b_z = tl.zeros([BT], tl.float32) + denominator_constant(0.0, b_c, NORMALIZER, EPS)
        for i_s in tl.range(keys.first, keys.end, BS, num_stages=1):
            b_k = load_rows(k, i_s, sk_t, S, K, BS, BK, True)
            b_v = load_rows(v, i_s, sv_t, S, V, BS, BV, True)
            b_r = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            m_s = visible(o_q[:, None], (i_s + tl.arange(0, BS))[None, :], W, HAS_WINDOW)
            b_s, _ = scores_and_sign(b_r, m_s, scale * RCP_LN2, NORMALIZER, True, False)
            # no shift: a term of a small denominator is small
            b_n, b_d = numerator_and_denominator_terms(b_s, 0.0, 1.0, NORMALIZER, False)
            b_z += tl.sum(b_d, 1)
            b_delta += tl.sum(b_n * b_dp, 1)
        b_delta /= b_z
        if HAS_DLSE:
            b_delta -= RCP_LN2 * tl.load(dlse + row + o_t, mask=m_small, other=0.0)
        tl.store(row_stats + (row + o_t) * 2 + 1, b_delta, mask=m_small)
