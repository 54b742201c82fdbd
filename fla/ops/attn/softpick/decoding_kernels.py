"""Decoding kernels and their launcher: attention of a few query tokens per sequence to a cache of keys and values.

Reading the cache takes most of the time. The keys of a sequence are split over programs; a second, small kernel
merges their sums exactly. The query heads of a group share a tile, so the cache is read once. Queries that fill
several tiles run in neighbouring programs, which find the keys of the first in L2. With few query rows, a row of V
is loaded only if some query gives it weight; after softpick that is a few rows in a hundred.

Legend: as in `parallel_fwd.py`, and
    R                  query rows of a key head: T query tokens times G heads
    BT                 rows of a tile, a power of two, at least 16
    NR                 tiles of rows
    NS                 splits of a sequence
    S                  capacity of the cache: the most tokens of a sequence
    P NP               tokens in a page of a paged cache, number of pages
    b_p                [BT, BS] n(s) * 2**-b_m in the dtype of v
    o_part             [B, H, NS, R, V] fp32 sums, times 2**-m_part; m_part, z_part [B, H, NS, R]
"""

import functools

# Triton's annotations refuse what its compiler accepts, in kernels and in their launches: an int for a
# constexpr, num_warps, a loop over tl.range.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl

from fla.ops.attn.softpick.launch_shapes import launch_options, num_processors
from fla.ops.attn.softpick.naive import EPS
from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    denominator_constant,
    numerator_and_denominator_terms,
    scores_and_sign,
    smallest_shift,
)
from fla.ops.attn.softpick.tiles import (
    empty_rows,
    feature_tile,
    round_for_dot,
    strides_bth,
    visible,
)

# With at most this many query rows per key head, values without weight are not read. In a larger tile some row gives
# weight to nearly every key, and loads that do not depend on the weights can be issued early.
MAX_SKIPPING_ROWS = 16
# Keys of a split at least: a smaller one costs more to start and to merge than it saves.
MIN_SPLIT_KEYS = 256
# Splitting may take at most this many rounds (waves) of resident programs.
MAX_ROUNDS = 4
# Splits that the merging kernel loads at a time.
MERGED_SPLITS = 16


@triton.jit
def _load_cache_rows(p, page, o_p, m_s, s_b, s_t, D: tl.constexpr, BD: tl.constexpr):
    """[BS, BD] rows o_p of the pages (page 0 in a contiguous cache); 0 and not read where m_s is False."""
    o_d = tl.arange(0, BD)
    at = page * s_b + o_p.to(tl.int64) * s_t
    return tl.load(
        p + at[:, None] + o_d[None, :], mask=m_s[:, None] & (o_d < D)[None, :], other=0.0
    )


@triton.jit(do_not_specialize=["T", "S", "H", "G", "W", "P", "NP", "NR", "NS"])
def normalized_attn_decode_kernel(
    q,
    k,
    v,
    lengths,
    starts,
    table,
    o_part,
    m_part,
    z_part,
    rows_read,
    scale,
    sq,
    sk,
    sv,
    st_b,
    T,
    S,
    H,
    G,
    W,
    P,
    NP,
    NR,
    NS,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_PAGED: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_STATS: tl.constexpr,
    SKIPS_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDS_BY_BITS: tl.constexpr,
):
    """One program computes the partial outputs of BT query rows over one split of the keys of one key head."""
    sq_b, sq_t, sq_h = sq
    sk_b, sk_t, sk_h = sk
    sv_b, sv_t, sv_h = sv
    # tiles of rows that read the same keys are neighbours in the grid
    i_part = tl.program_id(0).to(tl.int64) // NR
    i_split = i_part % NS
    i_bh = i_part // NS
    i_b = i_bh // H
    i_h = i_bh % H
    # clamp before the cast, which would wrap
    length = tl.minimum(tl.load(lengths + i_b), S).to(tl.int32)
    q += i_b * sq_b + i_h * G * sq_h
    k += i_h * sk_h
    v += i_h * sv_h
    if IS_PAGED:
        table += i_b * st_b
    else:
        k += i_b * sk_b
        v += i_b * sv_b

    # row r is token r // G and head r % G of the group
    o_r = tl.program_id(0) % NR * BT + tl.arange(0, BT)
    R = T * G
    m_r = o_r < R
    o_d = tl.arange(0, BK)
    p_q = q + ((o_r // G) * sq_t + (o_r % G) * sq_h)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & (o_d < K)[None, :], other=0.0)
    # [BT] position of each query among the keys
    o_q = length - T + o_r // G
    scale = scale * RCP_LN2

    start = 0
    if HAS_STARTS:
        start = tl.maximum(tl.minimum(tl.load(starts + i_b), S), 0).to(tl.int32)
    first = start // BS * BS
    if HAS_WINDOW:
        first = tl.maximum(length - T - W + 1, start) // BS * BS
    size = tl.cdiv(tl.cdiv(length - first, NS), BS) * BS
    first += i_split.to(tl.int32) * size
    end = tl.minimum(first + size, length)

    b_m = tl.full([BT], smallest_shift(NORMALIZER), tl.float32)
    b_z = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, BV], tl.float32)
    num_read = tl.zeros([BS], tl.int32)
    for i_s in tl.range(first, end, BS):
        o_s = i_s + tl.arange(0, BS)
        m_k = o_s < end
        if HAS_STARTS:
            m_k = m_k & (o_s >= start)
        page = 0
        o_p = o_s
        if IS_PAGED:
            page = tl.load(table + o_s // P, mask=m_k, other=0).to(tl.int64)
            # no weight for a page that the cache does not have
            m_k = m_k & (page >= 0) & (page < NP)
            o_p = o_s % P
        b_k = _load_cache_rows(k, page, o_p, m_k, sk_b, sk_t, K, BK)
        # NOTE(numerics): scale after the dot, in fp32; scaling q rounds twice
        b_r = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_s = visible(o_q[:, None], o_s[None, :], W, HAS_WINDOW) & m_k[None, :] & m_r[:, None]
        b_s, _ = scores_and_sign(b_r, m_s, scale, NORMALIZER, True, False)
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1), propagate_nan=tl.PropagateNan.ALL)
        b_f = tl.exp2(b_m - b_m_new)
        b_m = b_m_new
        b_n, b_d = numerator_and_denominator_terms(
            b_s, -b_m[:, None], tl.exp2(-b_m)[:, None], NORMALIZER, ROUNDS_BY_BITS
        )
        b_z = b_z * b_f + tl.sum(b_d, 1)
        b_p = round_for_dot(b_n, v.dtype.element_ty, ROUNDS_BY_BITS)
        m_v = m_k
        if SKIPS_VALUES:
            m_v = m_v & (tl.max(tl.where(b_p == 0, 0, 1), 0) > 0)
        b_v = _load_cache_rows(v, page, o_p, m_v, sv_b, sv_t, V, BV)
        b_o = tl.dot(b_p, b_v, b_o * b_f[:, None], input_precision=PRECISION)
        if HAS_STATS:
            num_read += m_v.to(tl.int32)

    o_v = tl.arange(0, BV)
    row = i_part * R + o_r
    tl.store(m_part + row, b_m, mask=m_r)
    tl.store(z_part + row, b_z, mask=m_r)
    p_o = o_part + row[:, None] * V + o_v[None, :]
    tl.store(p_o, b_o, mask=m_r[:, None] & (o_v < V)[None, :])
    if HAS_STATS:
        tl.store(rows_read + tl.program_id(0), tl.sum(num_read, 0))


@triton.jit(do_not_specialize=["T", "H", "G", "NS"])
def normalized_attn_merge_kernel(
    o_part,
    m_part,
    z_part,
    sink_bias,
    o,
    lse,
    so,
    T,
    H,
    G,
    NS,
    V: tl.constexpr,
    BS: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    EPS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """One program per query row. It adds the sums of its splits in order, then divides by the denominator."""
    so_b, so_t, so_h = so
    R = T * G
    i_r = tl.program_id(0) % R
    i_bh = (tl.program_id(0) // R).to(tl.int64)
    i_b = i_bh // H
    i_hq = i_bh % H * G + i_r % G
    i_t = i_r // G
    b_c = tl.load(sink_bias + i_hq) * RCP_LN2 if HAS_SINK else -float("inf")
    b_m = tl.maximum(tl.full([1], smallest_shift(NORMALIZER), tl.float32), b_c)
    b_z = tl.zeros([1], tl.float32)
    o_v = tl.arange(0, BV)
    b_o = tl.zeros([BV], tl.float32)
    for i_s in range(0, NS, BS):
        o_s = i_s + tl.arange(0, BS)
        at = (i_bh * NS + o_s) * R + i_r
        b_m_part = tl.load(m_part + at, mask=o_s < NS, other=smallest_shift(NORMALIZER))
        b_z_part = tl.load(z_part + at, mask=o_s < NS, other=0.0)
        b_o_part = tl.load(
            o_part + at[:, None] * V + o_v[None, :],
            mask=(o_s < NS)[:, None] & (o_v < V)[None, :],
            other=0.0,
        )
        b_m_new = tl.maximum(b_m, tl.max(b_m_part, 0), propagate_nan=tl.PropagateNan.ALL)
        b_f = tl.exp2(b_m - b_m_new)
        b_f_part = tl.exp2(b_m_part - b_m_new)
        b_z = b_z * b_f + tl.sum(b_z_part * b_f_part, 0)
        b_o = b_o * b_f + tl.sum(b_o_part * b_f_part[:, None], 0)
        b_m = b_m_new
    b_z += denominator_constant(b_m, b_c, NORMALIZER, EPS)
    # n <= d, so where the denominator is 0 the numerators are too
    b_o = b_o / tl.where(b_z == 0, 1.0, b_z)
    p_o = o + i_b * so_b + i_t * so_t + i_hq * so_h + o_v
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=o_v < V)
    p_lse = lse + (i_b * H * G + i_hq) * T + i_t
    tl.store(p_lse + tl.arange(0, 1), b_m + tl.log2(b_z))


@functools.lru_cache(maxsize=4096)
def num_splits(heads: int, S: int, programs: int) -> int:
    """Number of splits per sequence, from the capacity S only: lengths may change under a captured CUDA graph.

    Returns the smallest count that reaches 95 % of the best occupancy. ``heads * splits`` programs run in rounds of
    ``programs``, and a last round that is not full takes as long as a full one.

    Args:
        heads: Programs of one split: key heads of all sequences times tiles of rows.
        S: Capacity of the cache, in tokens per sequence.
        programs: Resident programs of the whole GPU.
    """
    max_splits = max(1, min(MAX_ROUNDS * programs // heads, triton.cdiv(S, MIN_SPLIT_KEYS)))
    occupancies = [
        heads * n / (triton.cdiv(heads * n, programs) * programs) for n in range(1, max_splits + 1)
    ]
    return 1 + next(i for i, x in enumerate(occupancies) if x >= 0.95 * max(occupancies))


def normalized_attn_decode_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sink_bias: torch.Tensor | None,
    scale: float,
    window_size: int | None,
    head_first: bool,
    has_stats: bool,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the kernels on checked inputs.

    Returns:
        Outputs like ``q`` with the last dimension of ``v``, the base-2 lse ``[B, HQ, T]`` float32, and the rows of V
        that a tile of query rows reads, averaged over tiles, ``[B, H]`` float32; ``[B, 0]`` without ``has_stats``.
    """
    time, head = (2, 1) if head_first else (1, 2)
    B, T, HQ, H = q.shape[0], q.shape[time], q.shape[head], k.shape[head]
    K, V, G = q.shape[-1], v.shape[-1], HQ // H
    is_paged = block_table is not None
    P = k.shape[time]
    S = block_table.shape[1] * P if is_paged else P
    o = empty_rows(q, T, HQ, V, head_first)
    lse = torch.empty(B, HQ, T, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse, lse.new_zeros(B, H if has_stats else 0)
    with torch.cuda.device_of(q):
        options = launch_options("decode" if T * G <= MAX_SKIPPING_ROWS else "chunk", q, V)
    NR = triton.cdiv(T * G, options["BT"])
    programs = options.pop("programs") * num_processors(q.device.index)
    NS = num_splits(B * H * NR, S, programs)
    o_part = torch.empty(B, H, NS, T * G, V, dtype=torch.float32, device=q.device)
    # two allocations: the second half of one may start off the 16 bytes that Triton compiles for, and compile anew
    m_part = torch.empty(B, H, NS, T * G, dtype=torch.float32, device=q.device)
    z_part = torch.empty_like(m_part)
    rows_read = torch.empty(B, H if has_stats else 0, NS, NR, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        normalized_attn_decode_kernel[(B * H * NS * NR,)](
            q,
            k,
            v,
            lengths,
            starts,
            block_table,
            o_part,
            m_part,
            z_part,
            rows_read,
            scale,
            sq=strides_bth(q, head_first),
            sk=strides_bth(k, head_first),
            sv=strides_bth(v, head_first),
            st_b=block_table.stride(0) if is_paged else 0,
            T=T,
            S=S,
            H=H,
            G=G,
            W=0 if window_size is None else min(window_size, S),
            P=P,
            NP=k.shape[0],
            NR=NR,
            NS=NS,
            K=K,
            V=V,
            BK=feature_tile(K),
            BV=feature_tile(V),
            NORMALIZER=normalizer,
            IS_PAGED=is_paged,
            HAS_STARTS=starts is not None,
            HAS_WINDOW=window_size is not None,
            HAS_STATS=has_stats,
            SKIPS_VALUES=T * G <= MAX_SKIPPING_ROWS,
            **options,
        )
        normalized_attn_merge_kernel[(B * HQ * T,)](
            o_part,
            m_part,
            z_part,
            sink_bias,
            o,
            lse,
            so=strides_bth(o, head_first),
            T=T,
            H=H,
            G=G,
            NS=NS,
            V=V,
            BS=MERGED_SPLITS,
            BV=feature_tile(V),
            NORMALIZER=normalizer,
            EPS=EPS,
            HAS_SINK=sink_bias is not None,
            num_warps=4,
        )
    if not has_stats:
        # saves the launch of a sum over nothing
        return o, lse, lse.new_empty(B, 0)
    return o, lse, rows_read.sum((-1, -2)) / NR
