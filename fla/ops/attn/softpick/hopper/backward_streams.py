"""The one-warp partitions of the backward kernel: a loader of tiles, and two writers of dq.

Legend: as in `tiles.py`, and
    i                  number of a unit of work: 128 keys of one key head, with all queries that see them
    i_bh               batch row * H + key head
    i_j                tile of queries, counted from the start of its sequence
    NT, NQ             tiles of keys and tiles of queries of a head, of all its sequences
    units              [NT, 4] int32 with IS_VARLEN: as in `tiles.py`, and tiles of queries of all sequences before
    w, n               units, and tiles of queries, that the partition has taken; they give stages and phases
    HALVES             BQ // 64: blocks of 64 queries in a tile
"""

from fla.ops.attn.softpick.hopper.gluon_api import (
    fence_async_shared,
    gl,
    gluon,
    group_barrier,
    load_scalar,
    mbarrier,
    pass_turn,
    store_scalar,
    take_number,
    tma_add,
    tma_load,
    tma_store,
    tma_store_wait,
    wait_turn,
    zero_rows,
)

# keys of a unit: 64 for each of two consumers
BT = gl.constexpr(128)
# units that have room in shared memory, and words of each, which the loader writes for the others
NUM_UNITS = gl.constexpr(4)
UNIT_WORDS = gl.constexpr(16)


@gluon.constexpr_function
def _place(name):
    """Number of a word; no gl.constexpr for each, since at every launch Triton compares these to what was compiled."""
    return {
        "num_tiles": 0,  # of queries of a head; 0 where no unit is left
        "num_steps": 1,  # tiles of all G heads
        "distance": 2,  # positions from the first key to the first query of the last tile
        "batch": 3,
        "head": 4,
        "row": 5,  # of the first key, in the tensor
        "num_keys": 6,  # from the first one to the end of its sequence
        "tile": 7,  # number of the last tile of the first head in the accumulator
        "position": 8,  # of the first key in its sequence
    }[name]


@gluon.jit
def word(unit_s, w, NAME: gl.constexpr):
    """The word of this name of the w-th unit of the program. NUM_UNITS are enough by BACKWARD.md, section 2."""
    return unit_s.index(w % NUM_UNITS * UNIT_WORDS + _place(NAME))


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
    arguments, D: gl.constexpr, BQ: gl.constexpr, IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr
):
    """Loads keys and values of each unit, then its queries, their gradients and row numbers.

    The last tile of queries comes first, and of each tile all G heads.
    Units of one head rise with i from the first tile of keys, which most queries see; FIRST tiles are seen by none.
    Rows of a following sequence are zeroed, so that not even a NaN of it counts. Such tiles land at the last barrier
    of *_full, and the loader itself arrives at their stage's afterwards.
    """
    (
        q_desc, do_desc, k_desc, v_desc, rows_desc, units, next_unit, q_s, do_s, k_s, v_s, rows_s, unit_s,
        unit_full, keys_full, keys_empty, tile_full, tile_empty,
        n_units, NT, BH, H, G, FIRST, HEADS_AT_A_TIME, T, S, W, NQ,
    ) = arguments  # fmt: skip
    HALVES: gl.constexpr = BQ // 64
    n = 0
    w = 0
    cut_keys = 0
    cut_queries = 0
    i = take_number(next_unit)
    while i < n_units:
        group = i // (HEADS_AT_A_TIME * NT) * HEADS_AT_A_TIME
        heads = gl.minimum(HEADS_AT_A_TIME, BH - group)
        i_tile = (i - group * NT) // heads
        i_bh = group + (i - group * NT) % heads
        if IS_VARLEN:
            row = gl.load(units + i_tile * 4)
            T = gl.load(units + i_tile * 4 + 1)
            S = T
            i_t = gl.load(units + i_tile * 4 + 2)
            tile = gl.load(units + i_tile * 4 + 3)
        else:
            row = 0
            i_t = (i_tile + FIRST) * BT
            tile = 0
        i_j = gl.maximum(i_t - (S - T), 0) // BQ
        end = T
        if HAS_WINDOW:
            end = gl.minimum(i_t - (S - T) + BT - 1 + W, T)
        num_tiles = gl.cdiv(end, BQ) - i_j
        i_j += num_tiles - 1
        tile += i_bh * G * NQ + i_j
        i_b = i_bh // H
        i_hq = i_bh % H
        mbarrier.wait(keys_empty.index(0), (w & 1) ^ 1)
        store_scalar(word(unit_s, w, "num_tiles"), num_tiles)
        store_scalar(word(unit_s, w, "num_steps"), num_tiles * G)
        store_scalar(word(unit_s, w, "distance"), i_j * BQ + S - T - i_t)
        store_scalar(word(unit_s, w, "batch"), i_b)
        store_scalar(word(unit_s, w, "head"), i_hq)
        store_scalar(word(unit_s, w, "row"), row + i_t)
        store_scalar(word(unit_s, w, "num_keys"), S - i_t)
        store_scalar(word(unit_s, w, "tile"), tile)
        store_scalar(word(unit_s, w, "position"), i_t)
        # before a thread of the warp arrives for all
        group_barrier()
        mbarrier.arrive(unit_full.index(w % NUM_UNITS), count=1)
        is_cut = _is_cut(i_t + BT, S, IS_VARLEN)
        full = keys_full.index(is_cut)
        mbarrier.expect(full, BT * D * 4)
        _load_rows(k_desc, i_b, row + i_t, i_hq, full, k_s, 0, 2)
        _load_rows(v_desc, i_b, row + i_t, i_hq, full, v_s, 0, 2)
        if IS_VARLEN:  # noqa: SIM102
            if is_cut == 1:
                mbarrier.wait(full, cut_keys & 1)
                cut_keys += 1
                _zero_past(k_s, 0, S - i_t, 2)
                _zero_past(v_s, 0, S - i_t, 2)
                fence_async_shared()
                mbarrier.arrive(keys_full.index(0), count=1)
        i_hq *= G
        g = 0
        for _ in range(num_tiles * G):
            num_rows = T - i_j * BQ
            is_cut = _is_cut(BQ, num_rows, IS_VARLEN)
            stage = n & 1
            # of the tile two before
            mbarrier.wait(tile_empty.index(stage), ((n // 2) & 1) ^ 1)
            full = tile_full.index(stage + is_cut * (2 - stage))
            mbarrier.expect(full, BQ * D * 4 + BQ * 16)
            _load_rows(q_desc, i_b, row + i_j * BQ, i_hq, full, q_s, stage * HALVES, HALVES)
            tma_load(rows_desc, [tile * 4, 0], full, rows_s.index(stage))
            _load_rows(do_desc, i_b, row + i_j * BQ, i_hq, full, do_s, stage * HALVES, HALVES)
            if IS_VARLEN:  # noqa: SIM102
                if is_cut == 1:
                    mbarrier.wait(full, cut_queries & 1)
                    cut_queries += 1
                    _zero_past(q_s, stage * HALVES, num_rows, HALVES)
                    _zero_past(do_s, stage * HALVES, num_rows, HALVES)
                    fence_async_shared()
                    mbarrier.arrive(tile_full.index(stage), count=1)
            n += 1
            g += 1
            i_hq += 1
            tile += NQ
            if g == G:
                g = 0
                i_hq -= G
                tile -= G * NQ + 1
                i_j -= 1
        w += 1
        i = take_number(next_unit)
    # no unit is left
    mbarrier.wait(keys_empty.index(0), (w & 1) ^ 1)
    store_scalar(word(unit_s, w, "num_tiles"), 0)
    group_barrier()
    mbarrier.arrive(unit_full.index(w % NUM_UNITS), count=1)
    mbarrier.arrive(keys_full.index(0), count=1)


@gluon.jit
def writer(arguments, PARITY: gl.constexpr, BQ: gl.constexpr, HAS_WINDOW: gl.constexpr):
    """Adds the two halves of each tile of dq to the accumulator [tiles * 2, 16, 256] when its turn has come.

    One of two warps, which take every second tile: while one waits until its tile has arrived in global memory, the
    other one adds the next tile. The counter of a tile says how many tiles of keys have been added; the first one is
    stored. BACKWARD.md proves that the turn comes.
    """
    dq_desc, turns, dq_s, unit_s, unit_full, dq_full, dq_empty, progress, G, W, NQ = arguments
    n = 0
    w = 0
    mbarrier.wait(unit_full.index(0), 0)
    num_tiles = load_scalar(word(unit_s, w, "num_tiles"))
    while num_tiles > 0:
        num_steps = load_scalar(word(unit_s, w, "num_steps"))
        tile = load_scalar(word(unit_s, w, "tile"))
        i_t = load_scalar(word(unit_s, w, "position"))
        turn = i_t // BT
        if HAS_WINDOW:
            # first key that the first query of the last tile sees
            first_key = load_scalar(word(unit_s, w, "distance")) + i_t - W + 1
        g = 0
        for _ in range(num_steps):
            if (n & 1) == PARITY:
                if HAS_WINDOW:
                    # tiles of keys before that one add nothing to this tile
                    turn = i_t // BT - gl.maximum(first_key, 0) // BT
                wait_turn(turns + tile, turn)
                for c in gl.static_range(2):
                    mbarrier.wait(dq_full.index(PARITY * 2 + c), (n // 2) & 1)
                    if turn == 0:
                        tma_store(dq_desc, [tile * 2 + c, 0, 0], dq_s.index(PARITY * 2 + c))
                    else:
                        tma_add(dq_desc, [tile * 2 + c, 0, 0], dq_s.index(PARITY * 2 + c))
                store_scalar(progress, n + 1)
                tma_store_wait(0)
                for c in gl.static_range(2):
                    mbarrier.arrive(dq_empty.index(PARITY * 2 + c), count=1)
                pass_turn(turns + tile)
            n += 1
            g += 1
            tile += NQ
            if g == G:
                g = 0
                tile -= G * NQ + 1
                if HAS_WINDOW:
                    first_key -= BQ
        w += 1
        mbarrier.wait(unit_full.index(w % NUM_UNITS), (w // NUM_UNITS) & 1)
        num_tiles = load_scalar(word(unit_s, w, "num_tiles"))
    # both writers, so that -1 is what is stored last
    store_scalar(progress, -1)
