"""The one-warp partitions of the backward kernel: a loader of tiles, a writer of dq, and the units of work.

Legend: as in `tiles.py`, and
    i                  number of a unit of work: 128 keys of one key head, with all queries that see them
    i_bh               batch row * H + key head
    i_j                tile of queries, counted from the start of its sequence
    q_offset           S - T
    NT, NQ             tiles of keys and tiles of queries of a head, of all its sequences
    n                  tiles of queries that the partition has taken, over all of its units; gives stages and phases
    HALVES             BQ // 64: blocks of 64 queries in a tile
"""

import triton.language as tl

from fla.ops.attn.softpick.hopper.gluon_api import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    pass_turn,
    report_progress,
    tma_add,
    tma_load,
    tma_store,
    tma_store_wait,
    wait_turn,
    zero_rows,
)

# keys of a unit: 64 for each of two consumers
BT = gl.constexpr(128)


@gluon.jit
def unit(i, units, NT, BH, FIRST, HEADS_AT_A_TIME, T, S, W, BQ: gl.constexpr, IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr):  # fmt: skip
    """(i_bh, bos, i_t, T, S, first tile of queries in the accumulator, first and count of the tiles that see the keys).

    Units of one head rise with i from the first tile of keys, which most queries see. FIRST tiles are seen by none.
    """
    group = i // (HEADS_AT_A_TIME * NT)
    rest = i - group * HEADS_AT_A_TIME * NT
    size = gl.minimum(HEADS_AT_A_TIME, BH - group * HEADS_AT_A_TIME)
    i_bh = group * HEADS_AT_A_TIME + rest % size
    i_tile = rest // size
    bos = 0
    i_t = (i_tile + FIRST) * BT
    before = 0
    if IS_VARLEN:
        bos = gl.load(units + i_tile * 4)
        T = gl.load(units + i_tile * 4 + 1)
        S = T
        i_t = gl.load(units + i_tile * 4 + 2)
        before = gl.load(units + i_tile * 4 + 3)
    first = gl.maximum(i_t - (S - T), 0) // BQ
    end = T
    if HAS_WINDOW:
        end = gl.minimum(i_t - (S - T) + BT - 1 + W, T)
    return i_bh, bos, i_t, T, S, before, first, gl.cdiv(end, BQ) - first


@gluon.jit
def _is_cut(end, T, IS_VARLEN: gl.constexpr):
    """1 if the sequence ends before the row end and another may follow it, else 0: descriptors know only where the tensor ends."""
    is_cut = 0
    if IS_VARLEN:
        is_cut = gl.minimum(gl.maximum(end - T, 0), 1)
    return is_cut


@gluon.jit
def _load_rows(desc, i_b, at, i_h, barrier, blocks, first, N: gl.constexpr):
    """Loads the rows at, at + 1, ... of one head into N blocks of 64 rows."""
    for c in gl.static_range(N):
        tma_load(desc, [i_b, at + c * 64, i_h, 0], barrier, blocks.index(first + c))


@gluon.jit
def _zero_past(blocks, first, num_rows, N: gl.constexpr):
    """Zeroes the rows from num_rows on of N blocks of 64 rows."""
    for c in gl.static_range(N):
        zero_rows(blocks.index(first + c), gl.maximum(num_rows - c * 64, 0))


@gluon.jit
def loader(
    q_desc, do_desc, k_desc, v_desc, rows_desc, units,
    q_s, do_s, k_s, v_s, rows_s, keys_full, keys_empty, q_full, q_empty, do_full, do_empty,
    n_units, NT, BH, H, G, FIRST, HEADS_AT_A_TIME, T_max, S_max, W, NQ,
    D: gl.constexpr, BQ: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Loads keys and values of each unit, then its queries, their gradients and row numbers, the last tile first.

    Rows of a following sequence are zeroed, so that not even a NaN of it counts. Such tiles land at the last barrier
    of *_full, and the loader itself arrives at their stage's afterwards.
    """
    HALVES: gl.constexpr = BQ // 64
    n = 0
    w = 0
    cut_keys = 0
    cut_queries = 0
    for i in range(gl.program_id(0), n_units, gl.num_programs(0)):
        i_bh, bos, i_t, T, S, before, first, count = unit(
            i, units, NT, BH, FIRST, HEADS_AT_A_TIME, T_max, S_max, W, BQ, IS_VARLEN, HAS_WINDOW
        )
        i_b = i_bh // H
        i_h = i_bh % H
        mbarrier.wait(keys_empty.index(0), (w & 1) ^ 1)
        is_cut = _is_cut(i_t + BT, S, IS_VARLEN)
        full = keys_full.index(is_cut)
        mbarrier.expect(full, BT * D * 4)
        _load_rows(k_desc, i_b, bos + i_t, i_h, full, k_s, 0, 2)
        _load_rows(v_desc, i_b, bos + i_t, i_h, full, v_s, 0, 2)
        if IS_VARLEN:
            if is_cut == 1:
                mbarrier.wait(full, cut_keys & 1)
                cut_keys += 1
                _zero_past(k_s, 0, S - i_t, 2)
                _zero_past(v_s, 0, S - i_t, 2)
                fence_async_shared()
                mbarrier.arrive(keys_full.index(0), count=1)
        i_g = 0
        i_j = first + count - 1
        for _ in range(count * G):
            i_hq = i_h * G + i_g
            is_cut = _is_cut(i_j * BQ + BQ, T, IS_VARLEN)
            q_stage = n % Q_STAGES
            do_stage = n % DO_STAGES
            mbarrier.wait(q_empty.index(q_stage), ((n // Q_STAGES) & 1) ^ 1)
            full = q_full.index(q_stage + is_cut * (Q_STAGES - q_stage))
            mbarrier.expect(full, BQ * D * 2 + BQ * 16)
            _load_rows(q_desc, i_b, bos + i_j * BQ, i_hq, full, q_s, q_stage * HALVES, HALVES)
            tile = (i_bh * G + i_g) * NQ + before + i_j
            tma_load(rows_desc, [tile * 4, 0], full, rows_s.index(q_stage))
            mbarrier.wait(do_empty.index(do_stage), ((n // DO_STAGES) & 1) ^ 1)
            full = do_full.index(do_stage + is_cut * (DO_STAGES - do_stage))
            mbarrier.expect(full, BQ * D * 2)
            _load_rows(do_desc, i_b, bos + i_j * BQ, i_hq, full, do_s, do_stage * HALVES, HALVES)
            if IS_VARLEN:
                if is_cut == 1:
                    num_rows = T - i_j * BQ
                    mbarrier.wait(q_full.index(Q_STAGES), cut_queries & 1)
                    mbarrier.wait(do_full.index(DO_STAGES), cut_queries & 1)
                    cut_queries += 1
                    _zero_past(q_s, q_stage * HALVES, num_rows, HALVES)
                    _zero_past(do_s, do_stage * HALVES, num_rows, HALVES)
                    fence_async_shared()
                    mbarrier.arrive(q_full.index(q_stage), count=1)
                    mbarrier.arrive(do_full.index(do_stage), count=1)
            n += 1
            i_j -= 1
            if i_j < first:
                i_j = first + count - 1
                i_g += 1
        w += 1


@gluon.jit
def writer(
    dq_desc, turns, units, dq_s, dq_full, dq_empty, progress,
    n_units, NT, BH, G, FIRST, HEADS_AT_A_TIME, T_max, S_max, W, NQ,
    BQ: gl.constexpr, IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Adds the two halves of each tile of dq to the accumulator [tiles * 2, 16, 256] when its turn has come.

    The counter of a tile says how many tiles of keys have been added; the first one is stored. README.md proves that
    the turn comes.
    """
    n = 0
    for i in range(gl.program_id(0), n_units, gl.num_programs(0)):
        i_bh, bos, i_t, T, S, before, first, count = unit(
            i, units, NT, BH, FIRST, HEADS_AT_A_TIME, T_max, S_max, W, BQ, IS_VARLEN, HAS_WINDOW
        )
        i_g = 0
        i_j = first + count - 1
        for _ in range(count * G):
            tile = (i_bh * G + i_g) * NQ + before + i_j
            turn = i_t // BT
            if HAS_WINDOW:
                # earlier tiles of keys lie before the window of all of these queries
                turn -= gl.maximum(i_j * BQ + (S - T) - W + 1, 0) // BT
            wait_turn(turns + tile, turn)
            for c in gl.static_range(2):
                mbarrier.wait(dq_full.index(c), n & 1)
                if turn == 0:
                    tma_store(dq_desc, [tile * 2 + c, 0, 0], dq_s.index(c))
                else:
                    tma_add(dq_desc, [tile * 2 + c, 0, 0], dq_s.index(c))
            tma_store_wait(0)
            for c in gl.static_range(2):
                mbarrier.arrive(dq_empty.index(c), count=1)
            pass_turn(turns + tile)
            n += 1
            report_progress(progress, n)
            i_j -= 1
            if i_j < first:
                i_j = first + count - 1
                i_g += 1
    report_progress(progress, -1)
