"""Backward kernel for dq: streams the keys past a tile of queries. Its launcher is in `parallel_bwd.py`.

It also computes delta, or reads it from row_stats where the delta kernel has put it, and stores it with the base-2 lse
in row_stats for the dkv kernel.

Legend: as in `parallel_fwd.py`, and
    do dq dk dv        gradients, named like the tensors
    row_stats          [B, HQ, T, 2] fp32, from dq to dkv; the pair lies together, so that one load fetches it:
                       b_neg_lse2, minus the base-2 lse (-inf where the denominator is 0), and b_delta,
                       <o, do> - dlse / ln(2) for the gradient dlse of the base-2 lse
    b_r                products <q, k> before the scale
    b_dp b_ds          <do, v>; gradient of the scores
    b_rescale          exponent that keeps b_ds in the range of fp16: `fp16_rescale_exponent`
"""

import triton
import triton.language as tl

from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    denominator_log,
    fp16_rescale_exponent,
    has_small_denominator,
    score_grad,
    scores_and_sign,
)
from fla.ops.attn.softpick.tiles import (
    key_tile_bounds,
    load_rows,
    program_tile,
    round_for_dot,
    store_rows,
    stream_rows,
    visible,
)


@triton.jit
def _accumulate_dq(
    b_q,
    b_do,
    b_neg_lse2,
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
    S,
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
    """Accumulates the keys [first, end) excluding [skip_start, skip_start + skip_len) into b_dq.

    IS_MASKED: some query may not see all of these keys.
    """
    for i_s in tl.range(
        first, end - skip_len, BS, num_stages=1 if IS_MASKED and HAS_WINDOW else None
    ):
        if IS_MASKED:
            i_s = tl.where(i_s < skip_start, i_s, i_s + skip_len)
        b_k = stream_rows(k, k_desc, i_b, i_h, bos, i_s, sk_t, S, K, BS, BK, IS_MASKED)
        b_v = stream_rows(v, v_desc, i_b, i_h, bos, i_s, sv_t, S, V, BS, BV, IS_MASKED)
        b_r = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        # as early as possible, so that the tensor cores are busy while the weights are computed
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        m_s = visible(o_q[:, None], (i_s + tl.arange(0, BS))[None, :], W, HAS_WINDOW)
        b_s, b_r = scores_and_sign(b_r, m_s, scale, NORMALIZER, IS_MASKED, IS_NEGATED)
        b_ds = score_grad(b_s, b_r, b_neg_lse2[:, None], b_dp, b_delta[:, None], NORMALIZER)
        b_ds = round_for_dot(b_ds, b_k.dtype, ROUNDS_BY_BITS)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["T_max", "S_max", "NT", "HQ", "G", "W"])
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
    row_stats,
    scale,
    sq,
    sk,
    sv,
    so,
    sdo,
    sdq,
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
    IS_VARLEN: tl.constexpr,
    IS_NEGATED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDS_BY_BITS: tl.constexpr,
):
    """One program computes dq of BT queries of one query head, and the row_stats that dk and dv need."""
    sq_b, sq_t, sq_h = sq
    sk_b, sk_t, sk_h = sk
    sv_b, sv_t, sv_h = sv
    so_b, so_t, so_h = so
    sdo_b, sdo_t, sdo_h = sdo
    sdq_b, sdq_t, sdq_h = sdq
    i_bh, i_t, bos, T, S = program_tile(tiles, T_max, S_max, NT, BT, IS_VARLEN, True)
    row = i_bh * T_max + bos
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
    b_lse = tl.load(lse + row + o_t, mask=o_t < T, other=0.0)
    p_stats = row_stats + (row + o_t) * 2
    # from the delta kernel; first, or AMD's compiler takes scratch. What is stored there below is the same
    m_small = has_small_denominator(b_lse, NORMALIZER)
    b_small = tl.load(p_stats + 1, mask=m_small, other=0.0)
    b_o = load_rows(o, i_t, so_t, T, V, BT, BV, True)
    b_do = load_rows(do, i_t, sdo_t, T, V, BT, BV, True)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if HAS_DLSE:
        # delta and dlse / ln(2) have the same factor in ds, d'(s) / Z, with opposite signs
        b_delta -= RCP_LN2 * tl.load(dlse + row + o_t, mask=o_t < T, other=0.0)
    b_delta = tl.where(m_small, b_small, b_delta)
    b_neg_lse2 = -denominator_log(b_lse, NORMALIZER)
    if ROUNDS_BY_BITS:
        # `round_for_dot` may drop the NaN of ds. A row that has one from its operands has NaN in delta or lse: gather
        # both in delta, which makes dq NaN below, and dk and dv in the dkv kernel.
        b_delta = tl.where(b_neg_lse2 == b_neg_lse2, b_delta, float("nan"))
    tl.store(p_stats, b_neg_lse2, mask=o_t < T)
    tl.store(p_stats + 1, b_delta, mask=o_t < T)

    b_q = load_rows(q, i_t, sq_t, T, K, BT, BK, True)
    # NOTE(numerics): ds, rounded to the input dtype, is kept near 1 where all scores of a row are tiny
    b_rescale = fp16_rescale_exponent(b_neg_lse2, 20, NORMALIZER)
    b_neg_lse2 -= b_rescale
    b_dq = tl.zeros([BT, BK], tl.float32)
    # [BT] position of each query among the keys
    o_q = o_t + (S - T)
    keys = key_tile_bounds(i_t, T, S, W, BT, BS, HAS_WINDOW)
    b_dq = _accumulate_dq(
        b_q, b_do, b_neg_lse2, b_delta, b_dq, k, v, k_desc, v_desc, i_b, i_h, bos, sk_t, sv_t, o_q,
        scale * RCP_LN2, S, W, K, V, BS, BK, BV, NORMALIZER, HAS_WINDOW, PRECISION, ROUNDS_BY_BITS,
        first=keys.first_full, end=keys.end_full, skip_start=0, skip_len=0,
        IS_MASKED=False, IS_NEGATED=IS_NEGATED,
    )  # fmt: skip
    b_dq = _accumulate_dq(
        b_q, b_do, b_neg_lse2, b_delta, b_dq, k, v, k_desc, v_desc, i_b, i_h, bos, sk_t, sv_t, o_q,
        scale * RCP_LN2, S, W, K, V, BS, BK, BV, NORMALIZER, HAS_WINDOW, PRECISION, ROUNDS_BY_BITS,
        first=keys.first, end=keys.end, skip_start=keys.first_full, skip_len=keys.end_full - keys.first_full,
        IS_MASKED=True, IS_NEGATED=IS_NEGATED,
    )  # fmt: skip
    b_dq = b_dq * (scale * tl.exp2(b_rescale))[:, None]
    if ROUNDS_BY_BITS:
        b_dq = tl.where((b_delta == b_delta)[:, None], b_dq, float("nan"))
    store_rows(dq, b_dq, i_t, sdq_t, o_t < T, K, BT, BK)
