"""Backward kernel for Hopper: dq, dk and dv of one pass over the scores. Its launcher is in `backward.py`.

A program takes units of 128 keys of one key head and streams the queries that see them. Two consumers of a warpgroup
each compute 64 of the keys; products are transposed, keys in rows. Weights go from registers into dv, score gradients
into dk. Score gradients also go to shared memory, since dq needs those of all keys. At head dimension 64 a warpgroup of
its own computes dq. At 128 the consumers need its registers and compute a half each. One warp loads, two add dq in
global memory, a fourth one traps if nothing moves: `backward_streams.py`.

Products that read both operands in shared memory are bound by its bandwidth. So keys and values stay in registers at
head dimension 64, where there is room; with Triton 3.9 values alone.

The scores of the next queries are computed beside dk, or beside the end of the tile. A consumer waits for what it needs
in the order in which products were issued, which the comments list.

Legend: as in `backward_streams.py`, `backward_terms.py` and `parallel_bwd_dkv.py`, and
    *_s                shared memory
    *_full *_empty     mbarriers: data has come; it may be overwritten
    rows_s             [2, 4, BQ] numbers of the queries: -lse2, 2**-lse2, -delta, 2**-rescale
    C                  number of the consumer, or of the half of a tile of dq
    D                  head dimension in shared memory, K and V padded with zeros
    HALVES             BQ // 64: blocks of 64 queries in a tile; 2 at head dimension 64, 1 at 128
"""

import triton.language as tl

from fla.ops.attn.softpick.hopper.backward_dq import (
    dq_group,
    dq_product,
    hand_over_dq,
    store_dq,
)
from fla.ops.attn.softpick.hopper.backward_streams import (
    NUM_UNITS,
    UNIT_WORDS,
    loader,
    word,
    writer,
)
from fla.ops.attn.softpick.hopper.backward_terms import grad_from_exponential, signed_exponential
from fla.ops.attn.softpick.hopper.gluon_api import (
    KEYS_IN_REGISTERS,
    allocate_barriers,
    fence_async_shared,
    gl,
    gluon,
    load_scalar,
    mbarrier,
    named_sync,
    opaque,
    positive_part,
    store_scalar,
    tma_store,
    tma_store_wait,
    trap_without_progress,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    scores_and_sign,
    signed_terms,
)
from fla.ops.attn.softpick.tiles import visible

# hardware barrier at which the two consumers meet; Triton uses the low numbers
DS_BARRIER = gl.constexpr(9)


@gluon.jit
def _transposed_product(keys, queries_s, i, D: gl.constexpr):
    """[64, 64] products of 64 rows of keys with the 64 rows of block i, as a running product."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    queries = queries_s.index(i).reshape([64, D]).permute((1, 0))
    zeros = gl.zeros([64, 64], gl.float32, layout)
    return warpgroup_mma(keys, queries, zeros, use_acc=False, is_async=True)


@gluon.jit
def _row(rows, number, half):
    """[1, 64] of a tile's row numbers."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    return rows.slice(number, 1, 0).slice(half * 64, 64, 1).load(layout)


@gluon.jit
def _weights(
    b_r, rows, half, scale, distance, W, dtype: gl.constexpr,
    NORMALIZER: gl.constexpr, IS_MASKED: gl.constexpr, IS_NEGATED: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_RESCALE: gl.constexpr,
):  # fmt: skip
    """Weights, and `signed_exponential`, of the products b_r; the first query is `distance` positions after the first key."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_neg_lse2 = _row(rows, 0, half)
    m_s = True
    if IS_MASKED:
        o_k = gl.arange(0, 64, gl.SliceLayout(1, layout))
        o_q = distance + gl.arange(0, 64, gl.SliceLayout(0, layout))
        m_s = visible(o_q[None, :], o_k[:, None], W, HAS_WINDOW)
    if HAS_RESCALE:
        # q holds q * 2**rescale
        b_shrink = _row(rows, 3, half)
        b_r = b_r * b_shrink
    b_s, b_r = scores_and_sign(b_r, m_s, scale, NORMALIZER, IS_MASKED, IS_NEGATED)
    b_p, _ = signed_terms(b_s, b_neg_lse2, _row(rows, 1, half), NORMALIZER)
    b_e = signed_exponential(b_s, b_r, b_neg_lse2, NORMALIZER)
    if HAS_RESCALE:
        b_e = b_e * b_shrink
    return positive_part(b_p, dtype), b_e


@gluon.jit
def _keys(b_x, keys_s, C: gl.constexpr, D: gl.constexpr, IN_REGISTERS: gl.constexpr):
    """The consumer's 64 keys or values as a product's first operand: b_x, or in shared memory."""
    if IN_REGISTERS:
        return b_x
    else:
        return keys_s.index(opaque(0) + C).reshape([64, D])


@gluon.jit
def _scores_of_tile(k, q_s, tile_full, n, D: gl.constexpr, HALVES: gl.constexpr):
    """Products of keys with the first 64 queries of tile n, once it is there; running."""
    mbarrier.wait(tile_full.index(n & 1), (n // 2) & 1)
    return _transposed_product(k, q_s, (n & 1) * HALVES, D)


@gluon.jit
def _tile_of_queries(
    b_r, b_dk, b_dv, b_k, b_v, k_s, v_s, q_s, do_s, ds_s, dq_s, rows_s,
    tile_full, tile_empty, dq_full, dq_empty, ds_full, ds_empty,
    n, distance, limit, has_dq, scale, W, HAS_NEXT: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr,
    NORMALIZER: gl.constexpr, IS_NEGATED: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_RESCALE: gl.constexpr,
):  # fmt: skip
    """Weights, dv, ds and dk of tile n, of which b_r are the first scores; with HAS_NEXT also those of tile n + 1.

    Where consumers compute dq: with HAS_NEXT also dq of tile n; has_dq says that dq of tile n - 1 is to be handed over.
    The first query of the tile is `distance` positions after the first key. Queries `limit` positions after it and later
    are past the sequence, or see none of these keys. Comments list the products that run, in their order.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    HALVES: gl.constexpr = BQ // 64
    stage = n & 1
    rows = rows_s.index(stage)
    k = _keys(b_k, k_s, C, D, D == 64 and KEYS_IN_REGISTERS)
    v = _keys(b_v, v_s, C, D, D == 64)
    for h in gl.static_range(HALVES):
        # dv and dk of the half before, scores
        if h == 0:
            b_r = warpgroup_mma_wait(0, [b_r])
        else:
            b_dv, b_dk, b_r = warpgroup_mma_wait(0, [b_dv, b_dk, b_r])
        d = distance + h * 64
        is_full = d >= 63
        if HAS_WINDOW:
            is_full = is_full & (d + 63 < W)
        is_seen = True
        if D == 64:
            # at 128 the third case takes more registers than there are
            is_seen = (d > -64) & (d < limit)
            is_full = is_full & is_seen
        if is_full:
            b_p, b_e = _weights(b_r, rows, h, scale, d, W, q_s.dtype, NORMALIZER, False, IS_NEGATED, HAS_WINDOW, HAS_RESCALE)  # fmt: skip
        else:
            b_e = gl.zeros([64, 64], gl.float32, scores_layout)
            b_p = b_e.to(q_s.dtype)
            if is_seen:
                b_p, b_e = _weights(b_r, rows, h, scale, d, W, q_s.dtype, NORMALIZER, True, IS_NEGATED, HAS_WINDOW, HAS_RESCALE)  # fmt: skip
        do = do_s.index(stage * HALVES + h).reshape([64, D])
        b_dp = _transposed_product(v, do_s, stage * HALVES + h, D)
        b_dv = warpgroup_mma(gl.convert_layout(b_p, weights_layout), do, b_dv, is_async=True)
        if D == 128:  # noqa: SIM102
            if has_dq:
                hand_over_dq(dq_full, n - 1, C)
        # dp, dv: ds is computed beside dv
        b_dp = warpgroup_mma_wait(1, [b_dp])
        b_ds = grad_from_exponential(b_e, b_dp, _row(rows, 2, h), NORMALIZER).to(q_s.dtype)
        if D == 128:
            # the other consumer's dq of the tile before reads it; this one's is done
            mbarrier.wait(ds_empty.index(1 - C), (n & 1) ^ 1)
        else:
            mbarrier.wait(ds_empty.index(h), (n & 1) ^ 1)
        ds_s.index(C * HALVES + h).store(b_ds)
        q = q_s.index(stage * HALVES + h).reshape([64, D])
        b_dk = warpgroup_mma(gl.convert_layout(b_ds, weights_layout), q, b_dk, is_async=True)
        if h + 1 < HALVES:
            b_r = _transposed_product(k, q_s, stage * HALVES + h + 1, D)
        elif HAS_NEXT:
            b_r = _scores_of_tile(k, q_s, tile_full, n + 1, D, HALVES)
        # others need these ds for dq; after products that need not wait for the fence
        fence_async_shared()
        if D == 128:
            named_sync(DS_BARRIER, 256)
        else:
            mbarrier.arrive(ds_full.index(h), count=1)
    # dv, dk, scores of the next tile
    b_dk, b_dv = warpgroup_mma_wait(1 if HAS_NEXT else 0, [b_dk, b_dv])
    mbarrier.arrive(tile_empty.index(stage), count=1)
    if D == 128 and HAS_NEXT:
        # not before dk is done: ptxas has no registers for its ds beside those of dq, and would serialise all products
        b_dq = dq_product(ds_s, k_s, C, D, HALVES)
        b_dq = warpgroup_mma_wait(0, [b_dq])
        mbarrier.arrive(ds_empty.index(C), count=1)
        store_dq(b_dq, dq_s, dq_empty, n, C)
    return b_r, b_dk, b_dv


@gluon.jit
def _store_keys(block_s, desc, p, b_x, i_b, i_h, row, num_keys, stride_t, stride_h, C: gl.constexpr, F: gl.constexpr, D: gl.constexpr, IS_VARLEN: gl.constexpr):  # fmt: skip
    """Stores the gradients of the C-th 64 keys of a unit, [64, D], by way of block_s; row is the unit's first one."""
    block_s.reshape([64, D]).store(b_x)
    # for the store from it, or the next load into it
    fence_async_shared()
    if IS_VARLEN:
        # rows past the end belong to the next sequence; few at a time, from offsets that are not known before the loop
        # over units, for the sake of registers
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        zero = opaque(0)
        o_d = zero + gl.arange(0, D, gl.SliceLayout(0, layout))
        p += tl.cast(row, tl.int64) * stride_t + tl.cast(i_h, tl.int64) * stride_h
        for i in gl.static_range(4):
            o_t = zero + C * 64 + i * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
            x = block_s.reshape([64, D]).slice(i * 16, 16, 0).load(layout)
            m = (o_t < num_keys)[:, None] & (o_d < F)[None, :]
            gl.store(p + o_t[:, None] * stride_t + o_d[None, :], x, mask=m)
    else:
        tma_store(desc, [i_b, row + C * 64, i_h, 0], block_s)


@gluon.jit
def _consumer(
    arguments, C: gl.constexpr, K: gl.constexpr, V: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr,
    NORMALIZER: gl.constexpr, IS_VARLEN: gl.constexpr,
    IS_NEGATED: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_RESCALE: gl.constexpr,
):  # fmt: skip
    """Computes dk and dv of the C-th 64 keys of each unit, and at head dimension 128 half of each tile of dq."""
    (
        dk_desc, dv_desc, dk, dv, q_s, do_s, k_s, v_s, rows_s, ds_s, dq_s, unit_s,
        keys_full, keys_empty, tile_full, tile_empty, dq_full, dq_empty, ds_full, ds_empty,
        scale, sdk_t, sdk_h, sdv_t, sdv_h, G, W,
    ) = arguments  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    HALVES: gl.constexpr = BQ // 64
    base2_scale = scale * RCP_LN2
    n = 0
    w = 0
    mbarrier.wait(keys_full.index(0), w & 1)
    num_tiles = load_scalar(word(unit_s, w, "num_tiles"))
    while num_tiles > 0:
        b_dk = gl.zeros([64, D], gl.float32, layout)
        b_dv = gl.zeros([64, D], gl.float32, layout)
        b_k = 0
        b_v = 0
        if D == 64:
            operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
            if KEYS_IN_REGISTERS:
                b_k = k_s.index(C).reshape([64, D]).load(operand)
            b_v = v_s.index(C).reshape([64, D]).load(operand)
        distance = load_scalar(word(unit_s, w, "distance")) - C * 64
        limit = load_scalar(word(unit_s, w, "num_keys")) - C * 64
        if HAS_WINDOW:
            limit = gl.minimum(limit, W + 63)
        num_steps = load_scalar(word(unit_s, w, "num_steps"))
        g = 0
        k = _keys(b_k, k_s, C, D, D == 64 and KEYS_IN_REGISTERS)
        b_r = _scores_of_tile(k, q_s, tile_full, n, D, HALVES)
        for step in range(num_steps - 1):
            b_r, b_dk, b_dv = _tile_of_queries(
                b_r, b_dk, b_dv, b_k, b_v, k_s, v_s, q_s, do_s, ds_s, dq_s, rows_s,
                tile_full, tile_empty, dq_full, dq_empty, ds_full, ds_empty,
                n, distance, limit, step > 0, base2_scale, W, True,
                C, D, BQ, NORMALIZER, IS_NEGATED, HAS_WINDOW, HAS_RESCALE,
            )  # fmt: skip
            n += 1
            g += 1
            if g == G:
                g = 0
                distance -= BQ
        _, b_dk, b_dv = _tile_of_queries(
            b_r, b_dk, b_dv, b_k, b_v, k_s, v_s, q_s, do_s, ds_s, dq_s, rows_s,
            tile_full, tile_empty, dq_full, dq_empty, ds_full, ds_empty,
            n, distance, limit, num_steps > 1, base2_scale, W, False,
            C, D, BQ, NORMALIZER, IS_NEGATED, HAS_WINDOW, HAS_RESCALE,
        )  # fmt: skip
        # the gradients take the memory of keys and values, so all must be done with them
        if D == 128:
            b_dq = dq_product(ds_s, k_s, C, D, HALVES)
            b_dq = warpgroup_mma_wait(0, [b_dq])
            mbarrier.arrive(ds_empty.index(C), count=1)
            store_dq(b_dq, dq_s, dq_empty, n, C)
            hand_over_dq(dq_full, n, C)
            named_sync(DS_BARRIER, 256)
        else:
            mbarrier.wait(ds_empty.index(HALVES - 1), n & 1)
        i_b = load_scalar(word(unit_s, w, "batch"))
        i_h = load_scalar(word(unit_s, w, "head"))
        row = load_scalar(word(unit_s, w, "row"))
        num_keys = load_scalar(word(unit_s, w, "num_keys"))
        _store_keys(k_s.index(C), dk_desc, dk, (b_dk * scale).to(q_s.dtype), i_b, i_h, row, num_keys, sdk_t, sdk_h, C, K, D, IS_VARLEN)  # fmt: skip
        _store_keys(v_s.index(C), dv_desc, dv, b_dv.to(q_s.dtype), i_b, i_h, row, num_keys, sdv_t, sdv_h, C, V, D, IS_VARLEN)  # fmt: skip
        tma_store_wait(0)
        mbarrier.arrive(keys_empty.index(0), count=1)
        n += 1
        w += 1
        mbarrier.wait(keys_full.index(0), w & 1)
        num_tiles = load_scalar(word(unit_s, w, "num_tiles"))


@gluon.jit(do_not_specialize=["n_units", "NT", "BH", "H", "G", "FIRST", "HEADS_AT_A_TIME", "T", "S", "W", "NQ"])  # fmt: skip
def normalized_attn_bwd_kernel_hopper(
    q_desc, do_desc, k_desc, v_desc, rows_desc, dq_desc, dk_desc, dv_desc, dk, dv,
    counters, units, scale, sdk_t, sdk_h, sdv_t, sdv_h, n_units, NT, BH, H, G, FIRST, HEADS_AT_A_TIME, T, S, W, NQ,
    K: gl.constexpr, V: gl.constexpr, BQ: gl.constexpr,
    NORMALIZER: gl.constexpr, IS_NEGATED: gl.constexpr, HAS_RESCALE: gl.constexpr,
):  # fmt: skip
    """Takes units until none is left; two consumers, at head dimension 64 a dq group, a loader, two writers, a watchdog."""
    HALVES: gl.constexpr = BQ // 64
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = q_desc.block_shape[3]
    IS_VARLEN: gl.constexpr = units is not None
    HAS_WINDOW: gl.constexpr = W is not None
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [2 * HALVES, 1, 64, 1, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [2 * HALVES, 1, 64, 1, D], do_desc.layout)
    rows_s = gl.allocate_shared_memory(gl.float32, [2, 4, BQ], rows_desc.layout)
    # of one tile and both consumers
    ds_s = gl.allocate_shared_memory(dtype, [2 * HALVES, 64, 64], gl.NVMMASharedLayout(128, 16, 2))
    # of two tiles, one for each writer
    dq_s = gl.allocate_shared_memory(gl.float32, [4, 1, 16, 256], dq_desc.layout)
    unit_s = gl.allocate_shared_memory(gl.int32, [NUM_UNITS * UNIT_WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))  # fmt: skip
    progress = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    unit_full = allocate_barriers(NUM_UNITS, 1)
    # the last barrier of keys_full and tile_full is for tiles of which the loader zeroes a part
    keys_full = allocate_barriers(2, 1)
    keys_empty = allocate_barriers(1, 2)
    tile_full = allocate_barriers(3, 1)
    tile_empty = allocate_barriers(2, 2)
    # two of tiles with an even number, and two of the others
    dq_full = allocate_barriers(4, 1)
    dq_empty = allocate_barriers(4, 1)
    # of halves of a tile at head dimension 64, of the consumers' dq at 128
    ds_full = allocate_barriers(2, 2)
    ds_empty = allocate_barriers(2, 1)
    store_scalar(progress, 0)
    fence_async_shared()
    consumer = (
        dk_desc, dv_desc, dk, dv, q_s, do_s, k_s, v_s, rows_s, ds_s, dq_s, unit_s,
        keys_full, keys_empty, tile_full, tile_empty, dq_full, dq_empty, ds_full, ds_empty,
        scale, sdk_t, sdk_h, sdv_t, sdv_h, G, W,
    )  # fmt: skip
    load = (
        q_desc, do_desc, k_desc, v_desc, rows_desc, units, counters, q_s, do_s, k_s, v_s, rows_s, unit_s,
        unit_full, keys_full, keys_empty, tile_full, tile_empty,
        n_units, NT, BH, H, G, FIRST, HEADS_AT_A_TIME, T, S, W, NQ,
    )  # fmt: skip
    write = (dq_desc, counters + 1, dq_s, unit_s, unit_full, dq_full, dq_empty, progress, G, W, NQ)
    if D == 128:
        gl.warp_specialize([
            (_consumer, (consumer, 0, K, V, D, BQ, NORMALIZER, IS_VARLEN, IS_NEGATED, HAS_WINDOW, HAS_RESCALE)),
            (_consumer, (consumer, 1, K, V, D, BQ, NORMALIZER, IS_VARLEN, IS_NEGATED, HAS_WINDOW, HAS_RESCALE)),
            (loader, (load, D, BQ, IS_VARLEN, HAS_WINDOW)),
            (writer, (write, 0, BQ, HAS_WINDOW)),
            (writer, (write, 1, BQ, HAS_WINDOW)),
            (trap_without_progress, (progress,)),
        ], [4, 1, 1, 1, 1], [240, 24, 24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (consumer, 0, K, V, D, BQ, NORMALIZER, IS_VARLEN, IS_NEGATED, HAS_WINDOW, HAS_RESCALE)),
            (_consumer, (consumer, 1, K, V, D, BQ, NORMALIZER, IS_VARLEN, IS_NEGATED, HAS_WINDOW, HAS_RESCALE)),
            (dq_group, (ds_s, k_s, dq_s, unit_s, keys_full, dq_full, dq_empty, ds_full, ds_empty, D, HALVES)),
            (loader, (load, D, BQ, IS_VARLEN, HAS_WINDOW)),
            (writer, (write, 0, BQ, HAS_WINDOW)),
            (writer, (write, 1, BQ, HAS_WINDOW)),
            (trap_without_progress, (progress,)),
        ], [4, 4, 1, 1, 1, 1], [208, 72, 24, 24, 24, 24])  # fmt: skip
