"""What the warps of the forward kernel for Hopper do: one loads tiles, groups of four compute 64 queries each.

README.md has the roles, the barriers and why nothing waits for ever. Legend: `forward_parts.py`.

    memory             (q_s, k_s, v_s, o_s, unit_s): NUM_WG tiles of 64 queries, KST of BN keys, VST of BN values, NUM_WG
                       outputs; the unit, see `announce_unit`, and from word 8 on whether each warpgroup has flagged one
    barriers           (q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, done)
    n w n_tails        tiles of keys, units and ends of sequences so far: they give the buffer and phase of each wait
    C                  index of the warpgroup
"""

# Triton's annotations refuse what its compiler accepts: an int for a constexpr, a loop over gl.static_range.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import triton.language as tl

from fla.ops.attn.softpick.hopper.forward_parts import (
    announce_unit,
    announced_unit,
    any_failed,
    group_tiles,
    query_unit,
    tile_terms,
    unit_tiles,
)
from fla.ops.attn.softpick.hopper.gluon_api import (
    fence_async_shared,
    gl,
    gluon,
    group_barrier,
    load_scalar,
    mbarrier,
    positive_part,
    store_scalar,
    take_number,
    tma_load,
    tma_store,
    tma_store_done,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    denominator_constant,
    in_range,
    smallest_shift,
)


@gluon.jit
def producer(
    inputs,
    BD: gl.constexpr, BN: gl.constexpr, NUM_WG: gl.constexpr, KST: gl.constexpr, VST: gl.constexpr,
    IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CHECK: gl.constexpr,
):  # fmt: skip
    """The loading warp: the queries, keys and values of each unit that it draws, then again of the flagged ones."""
    q_desc, k_desc, v_desc, numbers, memory, barriers, work = inputs
    q_s, k_s, v_s, _, unit_s = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, done = barriers
    _, n_units, _, _, _, G, _, _, _, W = work
    flags = numbers + 1
    n = 0
    w = 0
    n_tails = 0
    i = take_number(numbers)
    i_last = n_units
    # one loop for both rounds, as the warp has few registers
    for i_round in range(2 if HAS_CHECK else 1):
        if HAS_CHECK:  # noqa: SIM102
            if i_round == 1:
                mbarrier.wait(done.index(0), 0)
                i = i_last
                if not any_failed(unit_s, NUM_WG):
                    i = n_units
        while i < n_units:
            is_due = True
            if HAS_CHECK:  # noqa: SIM102
                if i_round == 1:
                    is_due = gl.load(flags + 2 * i) > 0
            if is_due:
                unit = query_unit(i, work, 64 * NUM_WG, IS_VARLEN)
                i_b, i_hq, bos, T, S, i_t = unit
                i_h = i_hq // G
                for c in gl.static_range(NUM_WG):
                    mbarrier.wait(q_empty.index(c), (w & 1) ^ 1)
                announce_unit(unit_s, i, unit, IS_VARLEN)
                # before a thread of the warp arrives for all
                group_barrier()
                for c in gl.static_range(NUM_WG):
                    mbarrier.expect(q_full.index(c), 64 * BD * 2)
                    at = [i_b, bos + i_t + c * 64, i_hq, 0]
                    tma_load(q_desc, at, q_full.index(c), q_s.index(c))
                first, end = unit_tiles(i_t, T, S, W, 64 * NUM_WG, BN, HAS_WINDOW)
                for j in range(end - first):
                    i_k = (end - 1 - j) * BN
                    at = [i_b, bos + i_k, i_h, 0]
                    st = n % KST
                    mbarrier.wait(k_empty.index(st), ((n // KST) & 1) ^ 1)
                    mbarrier.expect(k_full.index(st), BN * BD * 2)
                    tma_load(k_desc, at, k_full.index(st), k_s.index(st))
                    st = n % VST
                    mbarrier.wait(v_empty.index(st), ((n // VST) & 1) ^ 1)
                    is_tail = False
                    if IS_VARLEN:
                        is_tail = i_k + BN > S
                    if is_tail:
                        # the last warpgroup makes it full, see `clear_tail`
                        mbarrier.wait(tail_empty.index(0), (n_tails & 1) ^ 1)
                        mbarrier.expect(tail_full.index(0), BN * BD * 2)
                        tma_load(v_desc, at, tail_full.index(0), v_s.index(st))
                        n_tails += 1
                    else:
                        mbarrier.expect(v_full.index(st), BN * BD * 2)
                        tma_load(v_desc, at, v_full.index(st), v_s.index(st))
                    n += 1
                w += 1
            if HAS_CHECK:
                i_before = flags + 2 * i + 1
                if i_round == 0:
                    gl.store(i_before, i_last)
                    i_last = i
                    i = take_number(numbers)
                else:
                    i = gl.load(i_before)
            else:
                i = take_number(numbers)
        for c in gl.static_range(NUM_WG):
            mbarrier.wait(q_empty.index(c), (w & 1) ^ 1)
        store_scalar(unit_s.index(0), n_units)
        group_barrier()
        for c in gl.static_range(NUM_WG):
            mbarrier.arrive(q_full.index(c), count=1)
        w += 1


@gluon.jit
def clear_tail(
    memory, barriers, n, n_tails, S, end,
    C: gl.constexpr, BD: gl.constexpr, BN: gl.constexpr, NUM_WG: gl.constexpr, VST: gl.constexpr, IS_VARLEN: gl.constexpr,
):  # fmt: skip
    """The last warpgroup zeroes the values of the tile end - 1 that follow the sequence, and makes it full; returns n_tails.

    TMA is bounded by the tensor, not by the sequence: a NaN in those rows would spoil results, though their weight is 0.
    """
    _, _, _, _, v_full, _, tail_full, tail_empty, _ = barriers
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [4, 1], [1, 0])
    if IS_VARLEN and C == NUM_WG - 1:  # noqa: SIM102  # decided at compile time, the next one is not
        if end * BN > S:
            v = memory[2].index(n % VST).reshape([BN, BD])
            mbarrier.wait(tail_full.index(0), n_tails & 1)
            x = v.load(LAYOUT)
            is_inside = (end - 1) * BN + gl.arange(0, BN, gl.SliceLayout(1, LAYOUT)) < S
            v.store(gl.where(is_inside[:, None], x, gl.zeros_like(x)))
            fence_async_shared()
            group_barrier()
            mbarrier.arrive(v_full.index(n % VST), count=1)
            mbarrier.arrive(tail_empty.index(0), count=1)
            n_tails += 1
    return n_tails


@gluon.jit
def skip_tiles(count, barriers, n, KST: gl.constexpr, VST: gl.constexpr):
    """Releases tiles that only other warpgroups of the unit see."""
    _, _, k_full, k_empty, v_full, v_empty, _, _, _ = barriers
    for _ in range(count):
        # before it is full, the barrier may still be in the phase of the buffer's last use
        mbarrier.wait(k_full.index(n % KST), (n // KST) & 1)
        mbarrier.arrive(k_empty.index(n % KST), count=1)
        mbarrier.wait(v_full.index(n % VST), (n // VST) & 1)
        mbarrier.arrive(v_empty.index(n % VST), count=1)
        n += 1
    return n


@gluon.jit
def skip_unit(
    memory, barriers, work, n, n_tails, T, S, i_t,
    C: gl.constexpr, BD: gl.constexpr, BN: gl.constexpr, NUM_WG: gl.constexpr, KST: gl.constexpr, VST: gl.constexpr,
    IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """(n, n_tails) after a unit that has no queries for this warpgroup: releases their buffer and all tiles."""
    first, end = unit_tiles(i_t, T, S, work[9], 64 * NUM_WG, BN, HAS_WINDOW)
    mbarrier.arrive(barriers[1].index(C), count=1)
    n_tails = clear_tail(memory, barriers, n, n_tails, S, end, C, BD, BN, NUM_WG, VST, IS_VARLEN)
    return skip_tiles(end - first, barriers, n, KST, VST), n_tails


@gluon.jit
def attend(
    sink_bias, memory, barriers, work, scale, n, n_tails, T, S, i_t, i_hq,
    C: gl.constexpr, BD: gl.constexpr, BN: gl.constexpr, NUM_WG: gl.constexpr,
    KST: gl.constexpr, VST: gl.constexpr,
    NORMALIZER: gl.constexpr, IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SINK: gl.constexpr, IS_SHIFTED: gl.constexpr,
    EPS: gl.constexpr,
):  # fmt: skip
    """(shift, denominator, output times the denominator, n, n_tails) of 64 queries: [64], [64], [64, BD]."""
    q_s, k_s, v_s, _, _ = memory
    _, q_empty, k_full, k_empty, v_full, v_empty, _, _, _ = barriers
    W = work[9]
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    # queries from T on are computed as others and never stored
    i_r = i_t + C * 64
    o_q = i_r + (S - T) + gl.arange(0, 64, gl.SliceLayout(1, S_L))
    unit_first, unit_end = unit_tiles(i_t, T, S, W, 64 * NUM_WG, BN, HAS_WINDOW)
    first, first_full, end_full, end = group_tiles(i_r, T, S, W, BN, HAS_WINDOW)
    b_c = -float("inf")
    if HAS_SINK:
        b_c = gl.load(sink_bias + i_hq) * RCP_LN2
    b_m = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_L))
    if IS_SHIFTED:
        b_m = gl.maximum(b_m + smallest_shift(NORMALIZER), b_c)

    # in registers: products that read both operands in shared memory are bound by its bandwidth
    q = q_s.index(C).reshape([64, BD]).load(gl.DotOperandLayout(0, S_L, 2))
    mbarrier.arrive(q_empty.index(C), count=1)
    n = skip_tiles(unit_end - end, barriers, n, KST, VST)
    mbarrier.wait(k_full.index(n % KST), (n // KST) & 1)
    zeros = gl.zeros([64, BN], gl.float32, S_L)
    k_t = k_s.index(n % KST).reshape([BN, BD]).permute((1, 0))
    b_r = warpgroup_mma(q, k_t, zeros, use_acc=False, is_async=True)
    n_tails = clear_tail(memory, barriers, n, n_tails, S, end, C, BD, BN, NUM_WG, VST, IS_VARLEN)
    b_r = warpgroup_mma_wait(0, [b_r])
    mbarrier.arrive(k_empty.index(n % KST), count=1)
    b_n, b_z, b_m, _ = tile_terms(
        b_r, b_m, o_q, (end - 1) * BN, scale, W, NORMALIZER, HAS_WINDOW, True, IS_SHIFTED, S_L
    )
    b_p = gl.convert_layout(positive_part(b_n, q.dtype), P_L)
    b_o = gl.zeros([64, BD], gl.float32, O_L)
    n += 1
    # tiles at the diagonal, tiles that all 64 queries see, tiles at the edge of the window
    for PHASE in gl.static_range(3 if HAS_WINDOW else 2):
        if PHASE == 0:
            low, high = end_full, end - 1
        elif PHASE == 1:
            low, high = first_full, end_full
        else:
            low, high = first, first_full
        for j in range(high - low):
            i_k = (high - 1 - j) * BN
            mbarrier.wait(k_full.index(n % KST), (n // KST) & 1)
            k_t = k_s.index(n % KST).reshape([BN, BD]).permute((1, 0))
            b_r = warpgroup_mma(q, k_t, zeros, use_acc=False, is_async=True)
            # the scores of this tile and the output of the last one run together
            last = (n - 1) % VST
            mbarrier.wait(v_full.index(last), ((n - 1) // VST) & 1)
            b_o = warpgroup_mma(b_p, v_s.index(last).reshape([BN, BD]), b_o, is_async=True)
            b_r = warpgroup_mma_wait(1, [b_r])
            mbarrier.arrive(k_empty.index(n % KST), count=1)
            b_n, b_d, b_m, b_f = tile_terms(
                b_r, b_m, o_q, i_k, scale, W, NORMALIZER, HAS_WINDOW, PHASE != 1, IS_SHIFTED, S_L
            )
            # before new weights: the product reads the last ones from the registers that these take
            b_o = warpgroup_mma_wait(0, [b_o])
            mbarrier.arrive(v_empty.index(last), count=1)
            if IS_SHIFTED:
                b_z = b_z * b_f
                b_o = b_o * gl.convert_layout(b_f, gl.SliceLayout(1, O_L))[:, None]
            b_z += b_d
            b_p = gl.convert_layout(positive_part(b_n, q.dtype), P_L)
            n += 1
    last = (n - 1) % VST
    mbarrier.wait(v_full.index(last), ((n - 1) // VST) & 1)
    b_o = warpgroup_mma(b_p, v_s.index(last).reshape([BN, BD]), b_o, is_async=True)
    if not IS_SHIFTED:
        b_z = gl.sum(b_z, 1)
    b_m = gl.convert_layout(b_m, gl.SliceLayout(1, O_L))
    b_z = gl.convert_layout(b_z, gl.SliceLayout(1, O_L))
    b_z += denominator_constant(b_m, b_c, NORMALIZER, EPS)
    b_o = warpgroup_mma_wait(0, [b_o])
    mbarrier.arrive(v_empty.index(last), count=1)
    n = skip_tiles(first - unit_first, barriers, n, KST, VST)
    return b_m, b_z, b_o, n, n_tails


@gluon.jit
def store_masked_rows(p, stride, x_s, m_t, D: gl.constexpr, BD: gl.constexpr):
    """Copies the rows of x_s [64, BD] in shared memory, where m_t [64] is True, to p without TMA."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [4, 1], [1, 0])
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BD, gl.SliceLayout(0, LAYOUT))
    m_t = gl.convert_layout(m_t, gl.SliceLayout(1, LAYOUT))
    p += rows[:, None] * stride + columns[None, :]
    gl.store(p, x_s.load(LAYOUT), mask=m_t[:, None] & (columns < D)[None, :])


@gluon.jit
def compute_units(
    o_desc, o, so, lse, sink_bias, numbers, memory, barriers, work, scale, n, w, n_tails,
    C: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, BN: gl.constexpr, NUM_WG: gl.constexpr,
    KST: gl.constexpr, VST: gl.constexpr,
    NORMALIZER: gl.constexpr, IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SINK: gl.constexpr,
    IS_SHIFTED: gl.constexpr, HAS_CHECK: gl.constexpr, IS_REDO: gl.constexpr, EPS: gl.constexpr,
):  # fmt: skip
    """Computes and stores up to 64 queries of each unit that is announced; returns n, w, n_tails and [64], 1 where a row failed.

    HAS_CHECK: rows whose sums left float32's range keep a lse of NaN, and their unit is flagged. IS_REDO: the units are
    the flagged ones; stores the rows with a lse of NaN.
    """
    _, n_units, _, _, HQ, _, _, T_max, _, _ = work
    so_b, so_t, so_h = so
    o_s = memory[3].index(C)
    unit_s = memory[4]
    q_full = barriers[0].index(C)
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    rows = gl.arange(0, 64, gl.SliceLayout(1, O_L))
    b_failed = gl.zeros([64], gl.int32, gl.SliceLayout(1, O_L))
    mbarrier.wait(q_full, w & 1)
    i = load_scalar(unit_s.index(0))
    while i < n_units:
        i_b, i_hq, bos, T, S, i_t = announced_unit(unit_s, work, IS_VARLEN)
        # the last unit of a sequence may have no queries for the last warpgroups
        if i_t + C * 64 < T:
            b_m, b_z, b_o, n, n_tails = attend(
                sink_bias, memory, barriers, work, scale, n, n_tails, T, S, i_t, i_hq,
                C, BD, BN, NUM_WG, KST, VST,
                NORMALIZER, IS_VARLEN, HAS_WINDOW, HAS_SINK, IS_SHIFTED, EPS,
            )  # fmt: skip
            o_t = i_t + C * 64 + rows
            m_t = o_t < T
            p_lse = lse + tl.cast(i_b * HQ + i_hq, tl.int64) * T_max + bos + o_t
            b_lse = b_m + gl.log2(b_z)
            # TMA drops rows beyond the tensor, so it may store all rows, unless another sequence follows
            is_whole = True
            if IS_VARLEN:
                is_whole = i_t + C * 64 + 64 <= T
            if HAS_CHECK:
                # a sum in range proves its terms in range, and 0 times anything else is NaN
                b_nan = gl.sum(b_o * 0.0, 1)
                m_failed = m_t & ((b_nan != b_nan) | (in_range(b_z, NORMALIZER) == 0))
                gl.store(numbers + 1 + 2 * i + rows * 0, 1, mask=m_failed)
                b_failed = gl.where(m_failed, 1, b_failed)
                b_lse = gl.where(m_failed, float("nan"), b_lse)
            if IS_REDO:
                b_old = gl.load(p_lse, mask=m_t, other=0.0)
                m_t = m_t & (b_old != b_old)
                is_whole = False
            gl.store(p_lse, b_lse, mask=m_t)
            # n <= d, so where the denominator is 0 the numerators are too
            b_o = b_o * (1.0 / gl.where(b_z == 0, 1.0, b_z))[:, None]
            tma_store_wait(0)
            o_s.reshape([64, BD]).store(b_o.to(o_s.dtype))
            if is_whole:
                fence_async_shared()
                tma_store(o_desc, [i_b, bos + i_t + C * 64, i_hq, 0], o_s)
            # left out by hand where it is never taken: Triton 3.6 does not compile that
            if IS_VARLEN or IS_REDO:  # noqa: SIM102
                if not is_whole:
                    i_o = tl.cast(i_b, tl.int64) * so_b + tl.cast(i_hq, tl.int64) * so_h
                    i_o += tl.cast(bos + i_t + C * 64, tl.int64) * so_t
                    store_masked_rows(o + i_o, so_t, o_s.reshape([64, BD]), m_t, D, BD)
        else:
            n, n_tails = skip_unit(memory, barriers, work, n, n_tails, T, S, i_t, C, BD, BN, NUM_WG, KST, VST, IS_VARLEN, HAS_WINDOW)  # fmt: skip
        w += 1
        mbarrier.wait(q_full, w & 1)
        i = load_scalar(unit_s.index(0))
    mbarrier.arrive(barriers[1].index(C), count=1)
    return n, w + 1, n_tails, b_failed


@gluon.jit
def consumer(
    inputs,
    C: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, BN: gl.constexpr, NUM_WG: gl.constexpr,
    KST: gl.constexpr, VST: gl.constexpr,
    NORMALIZER: gl.constexpr, IS_VARLEN: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SINK: gl.constexpr,
    IS_SHIFTED: gl.constexpr, HAS_CHECK: gl.constexpr, EPS: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: all units of its program, then again the flagged ones, with the running maximum."""
    o_desc, o, so, lse, sink_bias, numbers, memory, barriers, work, scale = inputs
    n = 0
    w = 0
    n_tails = 0
    n, w, n_tails, b_failed = compute_units(
        o_desc, o, so, lse, sink_bias, numbers, memory, barriers, work, scale, n, w, n_tails,
        C, D, BD, BN, NUM_WG, KST, VST,
        NORMALIZER, IS_VARLEN, HAS_WINDOW, HAS_SINK, IS_SHIFTED, HAS_CHECK, False, EPS,
    )  # fmt: skip
    if HAS_CHECK:
        store_scalar(memory[4].index(8 + C), gl.max(b_failed, 0))
        # rows that failed are stored again, without TMA
        tma_store_done()
        group_barrier()
        mbarrier.arrive(barriers[8].index(0), count=1)
        compute_units(
            o_desc, o, so, lse, sink_bias, numbers, memory, barriers, work, scale, n, w, n_tails,
            C, D, BD, BN, NUM_WG, KST, VST,
            NORMALIZER, IS_VARLEN, HAS_WINDOW, HAS_SINK, True, False, True, EPS,
        )  # fmt: skip
    tma_store_wait(0)
