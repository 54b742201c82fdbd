"""Forward kernel of normalised attention and its launcher: o and the base-2 lse, in one pass over the keys.

Computes causal attention for every name in `normalizers.KERNEL_NORMALIZERS`; queries are the last T of
S positions. Trusts its caller: `parallel.py` checks the arguments.

Legend
    B T S HQ H G K V   batch, queries, keys, query heads, key heads, HQ // H, key and value dimension
    BT, BS             queries of the program's tile, keys of a tile that it streams
    BK, BV             K and V rounded up to a power of two
    T_max S_max        T and S of a batch row, in which sequences may be packed; T, S those of one sequence
    i_t i_s            first query of the tile, first key of a streamed tile
    i_b i_h i_hq       batch, key head, query head
    bos                first token of the sequence in the packed row
    o_t o_q            [BT] indices of the queries, and their positions among the keys
    m_t m_s            masks of rows and of scores
    b_c                base-2 score of the sink, -inf without one
    b_q b_s b_m        tiles: queries, base-2 scores, running maximum (base 2)
    b_z b_o            denominator and output, both times 2**-b_m
    sq sk sv so        strides (batch, time, head) of q, k, v and o, in elements
"""

# Triton's annotations refuse what its compiler accepts, in kernels and in their launches: an int for a
# constexpr, num_warps, a loop over tl.range.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from fla.ops.attn.softpick.launch_shapes import launch_options
from fla.ops.attn.softpick.naive import EPS
from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    denominator_constant,
    in_range,
    numerator_and_denominator_terms,
    scores_and_sign,
    smallest_shift,
)
from fla.ops.attn.softpick.tiles import (
    empty_rows,
    feature_tile,
    key_tile_bounds,
    load_rows,
    program_tile,
    round_for_dot,
    store_rows,
    stream_rows,
    streamed_descriptors,
    strides_bth,
    tiles_of,
    visible,
)


@triton.jit
def _accumulate_keys(
    b_q,
    b_m,
    b_z,
    b_o,
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
    IS_SHIFTED: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_PIPELINED: tl.constexpr,
):
    """Accumulates the keys [first, end) excluding [skip_start, skip_start + skip_len) into b_z and b_o.

    IS_MASKED: some query may not see all of these keys. IS_SHIFTED: keeps a running maximum in b_m.
    """
    for i_s in tl.range(first, end - skip_len, BS, num_stages=None if IS_PIPELINED else 1):
        if IS_MASKED:
            i_s = tl.where(i_s < skip_start, i_s, i_s + skip_len)
        b_k = stream_rows(k, k_desc, i_b, i_h, bos, i_s, sk_t, S, K, BS, BK, IS_MASKED)
        b_v = stream_rows(v, v_desc, i_b, i_h, bos, i_s, sv_t, S, V, BS, BV, IS_MASKED)
        # NOTE(numerics): scale after the dot, in fp32; scaling q rounds twice
        b_r = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        m_s = visible(o_q[:, None], (i_s + tl.arange(0, BS))[None, :], W, HAS_WINDOW)
        b_s, _ = scores_and_sign(b_r, m_s, scale, NORMALIZER, IS_MASKED, False)
        if IS_SHIFTED:
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1), propagate_nan=tl.PropagateNan.ALL)
            b_f = tl.exp2(b_m - b_m_new)
            b_z = b_z * b_f
            b_o = b_o * b_f[:, None]
            b_m = b_m_new
        b_n, b_d = numerator_and_denominator_terms(
            b_s, -b_m[:, None], tl.exp2(-b_m)[:, None], NORMALIZER, ROUNDS_BY_BITS
        )
        b_z += tl.sum(b_d, 1)
        b_p = round_for_dot(b_n, b_v.dtype, ROUNDS_BY_BITS)
        b_o = tl.dot(b_p, b_v, b_o, input_precision=PRECISION)
    return b_m, b_z, b_o


@triton.jit
def _store_row_results(
    o,
    lse,
    b_m,
    b_z,
    b_o,
    i_t,
    so_t,
    m_t,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """Stores the output and the base-2 lse of the rows where m_t is True."""
    # n <= d, so where the denominator is 0 the numerators are too
    b_o = b_o / tl.where(b_z == 0, 1.0, b_z)[:, None]
    store_rows(o, b_o, i_t, so_t, m_t, V, BT, BV)
    tl.store(lse + i_t + tl.arange(0, BT), b_m + tl.log2(b_z), mask=m_t)


@triton.jit(do_not_specialize=["T_max", "S_max", "NT", "HQ", "G", "W"])
def parallel_normalized_attn_fwd_kernel(
    q,
    k,
    v,
    k_desc,
    v_desc,
    sink_bias,
    o,
    lse,
    scale,
    sq,
    sk,
    sv,
    so,
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
    IS_SAFE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDS_BY_BITS: tl.constexpr,
):
    """One program computes the outputs and base-2 lse of BT queries of one query head."""
    # NOTE(numerics): fp16 weights overflow above s = 11, so safe fp16 always shifts; safe fp32 and bf16 first
    # try without a shift and redo the rows that overflow
    IS_SHIFTED: tl.constexpr = IS_SAFE and q.dtype.element_ty == tl.float16
    sq_b, sq_t, sq_h = sq
    sk_b, sk_t, sk_h = sk
    sv_b, sv_t, sv_h = sv
    so_b, so_t, so_h = so
    i_bh, i_t, bos, T, S = program_tile(tiles, T_max, S_max, NT, BT, IS_VARLEN, True)
    lse += i_bh * T_max + bos
    i_b = i_bh // HQ
    i_hq = i_bh % HQ
    i_h = i_hq // G
    q += i_b * sq_b + i_hq * sq_h + bos * sq_t
    k += i_b * sk_b + i_h * sk_h + bos * sk_t
    v += i_b * sv_b + i_h * sv_h + bos * sv_t
    o += i_b * so_b + i_hq * so_h + bos * so_t

    o_t = i_t + tl.arange(0, BT)
    # [BT] position of each query among the keys
    o_q = o_t + (S - T)
    scale = scale * RCP_LN2
    b_c = tl.load(sink_bias + i_hq) * RCP_LN2 if HAS_SINK else -float("inf")
    keys = key_tile_bounds(i_t, T, S, W, BT, BS, HAS_WINDOW)

    b_m = tl.zeros([BT], tl.float32)
    if IS_SHIFTED:
        b_m = tl.maximum(tl.full([BT], smallest_shift(NORMALIZER), tl.float32), b_c)
    b_z = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, BV], tl.float32)
    b_q = load_rows(q, i_t, sq_t, T, K, BT, BK, True)
    b_m, b_z, b_o = _accumulate_keys(
        b_q, b_m, b_z, b_o, k, v, k_desc, v_desc, i_b, i_h, bos, sk_t, sv_t, o_q, scale, S, W,
        K, V, BS, BK, BV, NORMALIZER, HAS_WINDOW, PRECISION, ROUNDS_BY_BITS,
        first=keys.first_full, end=keys.end_full, skip_start=0, skip_len=0,
        IS_SHIFTED=IS_SHIFTED, IS_MASKED=False, IS_PIPELINED=True,
    )  # fmt: skip
    b_m, b_z, b_o = _accumulate_keys(
        b_q, b_m, b_z, b_o, k, v, k_desc, v_desc, i_b, i_h, bos, sk_t, sv_t, o_q, scale, S, W,
        K, V, BS, BK, BV, NORMALIZER, HAS_WINDOW, PRECISION, ROUNDS_BY_BITS,
        first=keys.first, end=keys.end, skip_start=keys.first_full, skip_len=keys.end_full - keys.first_full,
        IS_SHIFTED=IS_SHIFTED, IS_MASKED=True, IS_PIPELINED=True,
    )  # fmt: skip
    b_z += denominator_constant(b_m, b_c, NORMALIZER, EPS)

    m_t = o_t < T
    if IS_SAFE and not IS_SHIFTED:
        # a sum in range proves its terms in range; redo the remaining rows with the running maximum
        m_in_range = tl.max(tl.where(tl.abs(b_o) < float("inf"), 0, 1), 1) == 0
        m_in_range = m_in_range & in_range(b_z, NORMALIZER)
        _store_row_results(o, lse, b_m, b_z, b_o, i_t, so_t, m_t & m_in_range, V, BT, BV)
        m_t = m_t & ~m_in_range
        # reshaped to two dimensions: Triton 3.6 and 3.7 do not compile another reduction of a row for sm_100
        if tl.max(tl.reshape(m_t.to(tl.int32), [2, BT // 2])) > 0:
            b_m = tl.maximum(tl.full([BT], smallest_shift(NORMALIZER), tl.float32), b_c)
            b_z = tl.zeros([BT], tl.float32)
            b_o = tl.zeros([BT, BV], tl.float32)
            b_q = load_rows(q, i_t, sq_t, T, K, BT, BK, True)
            b_m, b_z, b_o = _accumulate_keys(
                b_q, b_m, b_z, b_o, k, v, k_desc, v_desc, i_b, i_h, bos, sk_t, sv_t, o_q, scale, S, W,
                K, V, BS, BK, BV, NORMALIZER, HAS_WINDOW, PRECISION, ROUNDS_BY_BITS,
                first=keys.first, end=keys.end, skip_start=keys.end, skip_len=0,
                IS_SHIFTED=True, IS_MASKED=True, IS_PIPELINED=False,
            )  # fmt: skip
            b_z += denominator_constant(b_m, b_c, NORMALIZER, EPS)
            _store_row_results(o, lse, b_m, b_z, b_o, i_t, so_t, m_t, V, BT, BV)
    else:
        _store_row_results(o, lse, b_m, b_z, b_o, i_t, so_t, m_t, V, BT, BV)


def parallel_normalized_attn_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    window_size: int | None,
    head_first: bool,
    safe: bool,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel.

    Args:
        q: ``[B, T, HQ, K]`` (``head_first``: ``[B, HQ, T, K]``), last dimension contiguous.
        k: ``[B, S, H, K]``, likewise.
        v: ``[B, S, H, V]``, likewise.
        sink_bias: ``[HQ]`` float32, contiguous, or None.
        cu_seqlens: Boundaries ``[N + 1]`` of packed sequences, int32 or int64, or None.
        scale: Factor on ``q @ k.T``.
        window_size: Keys that a query sees, itself included, or None for all.
        head_first: Layout ``[B, H, T, D]`` instead of ``[B, T, H, D]``.
        safe: Computes rows again, with a shift, whose unshifted sums leave float32's range.
        normalizer: A name in `normalizers.KERNEL_NORMALIZERS`.

    Returns:
        Outputs ``[B, T, HQ, V]`` in the dtype of ``q``, contiguous in the layout given, and the base-2
        lse ``[B, HQ, T]`` in float32: log2 of the denominator, -inf where that is 0.
    """
    time, head = (2, 1) if head_first else (1, 2)
    B, T, S, HQ, H = q.shape[0], q.shape[time], k.shape[time], q.shape[head], k.shape[head]
    K, V = q.shape[-1], v.shape[-1]
    o = empty_rows(q, T, HQ, V, head_first)
    lse = torch.empty(B, HQ, T, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        options = launch_options("fwd", q, V)
        NT, tiles = tiles_of(cu_seqlens, T, options["BT"], is_last_first=True)
        k_desc, v_desc = streamed_descriptors(options, head_first, k, v)
        parallel_normalized_attn_fwd_kernel[(NT * B * HQ,)](
            q,
            k,
            v,
            k_desc,
            v_desc,
            sink_bias,
            o,
            lse,
            scale,
            sq=strides_bth(q, head_first),
            sk=strides_bth(k, head_first),
            sv=strides_bth(v, head_first),
            so=strides_bth(o, head_first),
            tiles=tiles,
            T_max=T,
            S_max=S,
            NT=NT,
            HQ=HQ,
            G=HQ // H,
            W=0 if window_size is None else min(window_size, S),
            K=K,
            V=V,
            BK=feature_tile(K),
            BV=feature_tile(V),
            NORMALIZER=normalizer,
            EPS=EPS,
            IS_SAFE=safe,
            IS_VARLEN=tiles is not None,
            HAS_WINDOW=window_size is not None,
            HAS_SINK=sink_bias is not None,
            **options,
        )
    return o, lse
