"""Jitted parts of the forward kernel for Hopper: units of work, and what a group of warps computes of one tile of keys.

Legend, besides that of `parallel_fwd.py`
    unit               one query tile of BM queries of one head; each of NUM_WG warpgroups computes 64 of them
    BM BN              queries of a unit, keys of a tile
    D BD               head dimension, and the 64 or 128 columns that it takes in shared memory
    tile               of keys; counted from 0, the tile j has the keys [j * BN, (j + 1) * BN)
    work               (tiles, n_units, NT, BH, HQ, G, GROUP, T_max, S_max, W), see `query_unit`
"""

# Triton's annotations refuse what its compiler accepts: an int for a constexpr, a loop over gl.static_range.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton.language as tl

from fla.ops.attn.softpick.hopper.gluon_api import gl, gluon, load_scalar, store_scalar
from fla.ops.attn.softpick.normalizers import (
    scores_and_sign,
    signed_terms,
)
from fla.ops.attn.softpick.tiles import key_tile_bounds, visible


@gluon.jit
def query_unit(i, work, BM: gl.constexpr, IS_VARLEN: gl.constexpr):
    """(i_b, i_hq, offset of the sequence, T, S, i_t) of the i-th unit.

    GROUP heads at a time, whose keys and values stay in L2; within a group the units that see most keys first.
    """
    tiles, _, NT, BH, HQ, _, GROUP, T_max, S_max, _ = work
    group = i // (GROUP * NT)
    rest = i - group * (GROUP * NT)
    size = gl.minimum(GROUP, BH - group * GROUP)
    i_bh = group * GROUP + rest % size
    i_tile = rest // size
    if IS_VARLEN:
        bos = gl.load(tiles + i_tile * 3)
        T = gl.load(tiles + i_tile * 3 + 1)
        i_t = gl.load(tiles + i_tile * 3 + 2)
        return i_bh // HQ, i_bh % HQ, bos, T, T, i_t
    else:
        return i_bh // HQ, i_bh % HQ, 0, T_max, S_max, (NT - 1 - i_tile) * BM


@gluon.jit
def announce_unit(unit_s, i, unit, IS_VARLEN: gl.constexpr):
    """Stores the i-th unit for `announced_unit`: the computing warpgroups need not divide."""
    i_b, i_hq, bos, T, _, i_t = unit
    store_scalar(unit_s.index(0), i)
    store_scalar(unit_s.index(1), i_b)
    store_scalar(unit_s.index(2), i_hq)
    store_scalar(unit_s.index(3), i_t)
    if IS_VARLEN:
        store_scalar(unit_s.index(4), bos)
        store_scalar(unit_s.index(5), T)


@gluon.jit
def announced_unit(unit_s, work, IS_VARLEN: gl.constexpr):
    """As `query_unit`."""
    i_b = load_scalar(unit_s.index(1))
    i_hq = load_scalar(unit_s.index(2))
    i_t = load_scalar(unit_s.index(3))
    if IS_VARLEN:
        bos = load_scalar(unit_s.index(4))
        T = load_scalar(unit_s.index(5))
        return i_b, i_hq, bos, T, T, i_t
    else:
        return i_b, i_hq, 0, work[7], work[8], i_t


@gluon.jit
def unit_tiles(i_t, T, S, W, BM: gl.constexpr, BN: gl.constexpr, HAS_WINDOW: gl.constexpr):
    """First and one past the last tile that some query of the unit sees."""
    keys = key_tile_bounds(i_t, T, S, W, BM, BN, HAS_WINDOW)
    return keys.first // BN, (keys.end + BN - 1) // BN


@gluon.jit
def group_tiles(i_r, T, S, W, BN: gl.constexpr, HAS_WINDOW: gl.constexpr):
    """(first, first_full, end_full, end) in tiles, of the queries [i_r, i_r + 64).

    A warpgroup takes the tile end - 1 first, with a mask, then the other tiles down to first. Those in
    [first_full, end_full) need no mask.
    """
    keys = key_tile_bounds(i_r, T, S, W, 64, BN, HAS_WINDOW)
    end = (keys.end + BN - 1) // BN
    first_full = gl.minimum(keys.first_full // BN, end - 1)
    end_full = gl.minimum(keys.end_full // BN, end - 1)
    return keys.first // BN, first_full, end_full, end


@gluon.jit
def any_failed(unit_s, NUM_WG: gl.constexpr):
    """True if a warpgroup of the program has flagged a unit."""
    total = load_scalar(unit_s.index(8))
    for c in gl.static_range(1, NUM_WG):
        total += load_scalar(unit_s.index(8 + c))
    return total > 0


@gluon.jit
def row_sums(b_d, IS_SHIFTED: gl.constexpr):
    """Sums of rows: [64], or without a shift the sums of each of the four threads that hold a row, [64, 4].

    A rescale needs one number a row. Without it four numbers are added over all tiles, which saves the exchange.
    """
    if IS_SHIFTED:
        return gl.sum(b_d, 1)
    else:
        parts = gl.reshape(b_d, [b_d.shape[0], b_d.shape[1] // 8, 4, 2])
        return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def tile_terms(
    b_r, b_m, o_q, i_k, scale, W,
    NORMALIZER: gl.constexpr, HAS_WINDOW: gl.constexpr, IS_MASKED: gl.constexpr, IS_SHIFTED: gl.constexpr,
    S_L: gl.constexpr,
):  # fmt: skip
    """(a number whose positive part is n, sums of d, new shift, factor for what was summed before) of the products b_r [64, BN] with the keys from i_k."""
    o_k = i_k + gl.arange(0, b_r.shape[1], gl.SliceLayout(0, S_L))
    m_s = visible(o_q[:, None], o_k[None, :], W, HAS_WINDOW)
    # NOTE(numerics): scale after the dot, in fp32; scaling q rounds twice
    b_s, _ = scores_and_sign(b_r, m_s, scale, NORMALIZER, IS_MASKED, False)
    if IS_SHIFTED:
        b_m_new = gl.maximum(b_m, gl.max(b_s, 1), propagate_nan=tl.PropagateNan.ALL)
        b_f = gl.exp2(b_m - b_m_new)
        b_n, b_d = signed_terms(b_s, -b_m_new[:, None], gl.exp2(-b_m_new)[:, None], NORMALIZER)
        return b_n, row_sums(b_d, True), b_m_new, b_f
    else:
        # adding -0.0 changes nothing, so the compiler leaves it out
        b_n, b_d = signed_terms(b_s, -0.0, 1.0, NORMALIZER)
        return b_n, row_sums(b_d, False), b_m, b_m
