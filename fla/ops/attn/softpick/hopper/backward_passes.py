"""The Triton kernels before and after the Hopper backward kernel: row numbers, and dq in the dtype of the inputs.

Legend: as in `tiles.py` and `parallel_bwd_dq.py`, and
    BQ                 queries of a tile
    NQ                 tiles of queries of a head, of all its sequences
    tiles              [NQ, 4] int32 with IS_VARLEN: as in `tiles.py`, and tiles of all sequences before
    row_numbers        [B * HQ * NQ, 4, BQ] fp32: -lse2, 2**-lse2, -delta, 2**-rescale; past T they give no weight
    accumulator        [B * HQ * NQ * 2, 16 * 256] fp32: halves of tiles of dq, in the order in which threads hold them
    b_rescale          whole exponent that keeps ds in the range of fp16; q takes the factor 2**b_rescale
"""

import triton
import triton.language as tl

from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    denominator_log,
    fp16_rescale_exponent,
    has_small_denominator,
)
from fla.ops.attn.softpick.tiles import load_rows, store_rows


@triton.jit
def _query_tile(tiles, T, NQ, BQ: tl.constexpr, IS_VARLEN: tl.constexpr):
    """(batch row * HQ + head, offset of the sequence, i_t, T, number of the tile) of the program."""
    i_tile = tl.program_id(0) % NQ
    i_bh = (tl.program_id(0) // NQ).to(tl.int64)
    if IS_VARLEN:
        bos = tl.load(tiles + i_tile * 4).to(tl.int64)
        T = tl.load(tiles + i_tile * 4 + 1)
        i_t = tl.load(tiles + i_tile * 4 + 2)
        i_tile = tl.load(tiles + i_tile * 4 + 3) + i_t // BQ
        return i_bh, bos, i_t, T, i_bh * NQ + i_tile
    else:
        return i_bh, tl.full([], 0, tl.int64), i_tile * BQ, T, i_bh * NQ + i_tile


@triton.jit(do_not_specialize=["T_max", "NQ", "HQ"])
def row_numbers_kernel(
    q,
    o,
    do,
    lse,
    dlse,
    row_stats,
    row_numbers,
    counters,
    rescaled_q,
    sq,
    so,
    sdo,
    srescaled,
    tiles,
    T_max,
    NQ,
    HQ,
    K: tl.constexpr,
    V: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_RESCALE: tl.constexpr,
):
    """Computes row_stats [B, HQ, T, 2] and row_numbers of a tile of queries; with HAS_RESCALE also rescaled_q.

    Zeroes the counters [B * HQ * NQ + 1] int32 of the backward kernel.
    """
    i_bh, bos, i_t, T, tile = _query_tile(tiles, T_max, NQ, BQ, IS_VARLEN)
    tl.store(counters + tl.program_id(0), 0)
    tl.store(counters + tl.num_programs(0), 0)
    sq_b, sq_t, sq_h = sq
    so_b, so_t, so_h = so
    sdo_b, sdo_t, sdo_h = sdo
    i_b = i_bh // HQ
    i_h = i_bh % HQ
    o += i_b * so_b + i_h * so_h + bos * so_t
    do += i_b * sdo_b + i_h * sdo_h + bos * sdo_t
    o_t = i_t + tl.arange(0, BQ)
    m_t = o_t < T
    b_o = load_rows(o, i_t, so_t, T, V, BQ, BV, True)
    b_do = load_rows(do, i_t, sdo_t, T, V, BQ, BV, True)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    row = i_bh * T_max + bos + o_t
    b_lse = tl.load(lse + row, mask=m_t, other=0.0)
    if HAS_DLSE:
        # delta and dlse / ln(2) have the same factor in ds, d'(s) / Z, with opposite signs
        b_delta -= RCP_LN2 * tl.load(dlse + row, mask=m_t, other=0.0)
    # from the delta kernel; what is stored there below is the same
    m_small = has_small_denominator(b_lse, NORMALIZER)
    b_small = tl.load(row_stats + row * 2 + 1, mask=m_small, other=0.0)
    b_delta = tl.where(m_small, b_small, b_delta)
    b_neg_lse2 = -denominator_log(b_lse, NORMALIZER)
    tl.store(row_stats + row * 2, b_neg_lse2, mask=m_t)
    tl.store(row_stats + row * 2 + 1, b_delta, mask=m_t)
    b_neg_lse2 = tl.where(m_t, b_neg_lse2, -float("inf"))
    row_numbers += tile * (4 * BQ) + tl.arange(0, BQ)
    tl.store(row_numbers, b_neg_lse2)
    tl.store(row_numbers + BQ, tl.exp2(b_neg_lse2))
    tl.store(row_numbers + 2 * BQ, -b_delta)
    if HAS_RESCALE:
        srescaled_b, srescaled_t, srescaled_h = srescaled
        q += i_b * sq_b + i_h * sq_h + bos * sq_t
        rescaled_q += i_b * srescaled_b + i_h * srescaled_h + bos * srescaled_t
        b_q = load_rows(q, i_t, sq_t, T, K, BQ, BK, True)
        # NOTE(numerics): ds stays near 1 where all scores of a row are tiny. dq takes the factor at its end, dk from q,
        # so it is a power of 2, which changes no digit, and as large as does not overflow q
        b_headroom = 15.0 - tl.log2(tl.maximum(tl.max(tl.abs(b_q.to(tl.float32)), 1), 1.0))
        b_rescale = tl.floor(
            tl.minimum(
                fp16_rescale_exponent(b_neg_lse2, 20, NORMALIZER), tl.maximum(b_headroom, 0.0)
            )
        )
        tl.store(row_numbers + 3 * BQ, tl.exp2(-b_rescale))
        b_q = b_q.to(tl.float32) * tl.exp2(b_rescale)[:, None]
        store_rows(rescaled_q, b_q, i_t, srescaled_t, m_t, K, BQ, BK)
    else:
        tl.store(row_numbers + 3 * BQ, tl.full([BQ], 1.0, tl.float32))


@triton.jit(do_not_specialize=["T_max", "NQ", "HQ"])
def dq_kernel(
    accumulator,
    row_numbers,
    dq,
    scale,
    sdq,
    tiles,
    T_max,
    NQ,
    HQ,
    K: tl.constexpr,
    BQ: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_RESCALE: tl.constexpr,
):
    """Writes a half of a tile of dq: 64 of its columns where BQ is 64, else 64 of its 128 rows."""
    half = tl.program_id(1)
    i_bh, bos, i_t, T, tile = _query_tile(tiles, T_max, NQ, BQ, IS_VARLEN)
    sdq_b, sdq_t, sdq_h = sdq
    b_x = tl.load(accumulator + (tile * 2 + half) * 4096 + tl.arange(0, 4096))
    b_x = tl.permute(tl.reshape(b_x, (8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    b_x = tl.reshape(b_x, (64, 64)) * scale
    o_t = tl.arange(0, 64)
    o_d = tl.arange(0, 64)
    if BQ == 64:
        o_d += half * 64
    else:
        o_t += half * 64
    if HAS_RESCALE:
        b_x /= tl.load(row_numbers + tile * (4 * BQ) + 3 * BQ + o_t)[:, None]
    dq += (i_bh // HQ) * sdq_b + (i_bh % HQ) * sdq_h + (bos + i_t) * sdq_t
    m = (i_t + o_t < T)[:, None] & (o_d < K)[None, :]
    p_x = dq + o_t[:, None] * sdq_t + o_d[None, :]
    tl.store(p_x, b_x.to(dq.dtype.element_ty), mask=m)
