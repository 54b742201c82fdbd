"""Forward kernel of normalised attention and its launcher: o and the base-2 lse, in one pass over the keys.

Computes causal attention for every name in `normalizers.KERNEL_NORMALIZERS`; queries are the last T of
S positions. Trusts its caller: `parallel.py` checks the arguments.

Legend
    B T S HQ H G K V   batch, queries, keys, query heads, key heads, HQ // H, key and value dimension
    BT, BS             tile of queries the program owns, tile of keys it streams
    BK, BV             K and V rounded up to a power of two
    i_t i_s i_b i_h    tile, key, batch and head indices; i_hq query head
    o_t o_s            index vectors
    b_q b_s b_m        tiles: queries, base-2 scores, running maximum (base 2)
    b_z b_o            denominator and output, both times 2**-b_m
    s*_b s*_t s*_h     strides of batch, time and head, in elements
"""

import torch
import triton
import triton.language as tl

from fla.ops.attn.softpick.naive import EPS
from fla.ops.attn.softpick.normalizers import (
    RCP_LN2,
    denominator_constant,
    masked_score,
    smallest_shift,
    weights,
)


@triton.jit
def load_rows(
    p,
    i_t,
    stride,
    T,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """[BT, BD] rows i_t, i_t + 1, ...; with IS_MASKED rows from T on read as 0, columns from D on always."""
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    # the start is 64-bit, offsets within a tile fit 32 bits (`parallel.py` refuses wider strides)
    p_x = p + tl.cast(i_t, tl.int64) * stride + o_t[:, None] * stride + o_d[None, :]
    if IS_MASKED:
        if D == BD:
            return tl.load(p_x, mask=(i_t + o_t < T)[:, None], other=0.0)
        else:
            return tl.load(p_x, mask=(i_t + o_t < T)[:, None] & (o_d < D)[None, :], other=0.0)
    else:
        if D == BD:
            return tl.load(p_x)
        else:
            return tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(p, b_x, i_t, stride, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Stores the rows of b_x [BT, BD] below T and its columns below D."""
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    p_x = p + tl.cast(i_t, tl.int64) * stride + o_t[:, None] * stride + o_d[None, :]
    mask = (i_t + o_t < T)[:, None] & (o_d < D)[None, :]
    tl.store(p_x, b_x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate_keys(
    b_q,
    b_m,
    b_z,
    b_o,
    k,
    v,
    sk_t,
    sv_t,
    o_last,
    scale,
    first,
    end,
    S,
    K: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    IS_SAFE: tl.constexpr,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys [first, end) to b_z and b_o; IS_MASKED where some row may not see all of them."""
    for i_s in range(first, end, BS):
        b_k = load_rows(k, i_s, sk_t, S, K, BS, BK, IS_MASKED)
        b_v = load_rows(v, i_s, sv_t, S, V, BS, BV, IS_MASKED)
        # NOTE(numerics): scale after the dot, in fp32; scaling q rounds twice
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if IS_MASKED:
            o_s = i_s + tl.arange(0, BS)
            b_s = tl.where(o_s[None, :] <= o_last[:, None], b_s, masked_score(NORMALIZER))
        if IS_SAFE:
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1), propagate_nan=tl.PropagateNan.ALL)
            b_r = tl.exp2(b_m - b_m_new)
            b_z = b_z * b_r
            b_o = b_o * b_r[:, None]
            b_m = b_m_new
        b_n, b_d = weights(b_s, b_m[:, None], NORMALIZER)
        b_z += tl.sum(b_d, 1)
        b_o = tl.dot(b_n.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
    return b_m, b_z, b_o


@triton.jit(do_not_specialize=["T", "S"])
def parallel_normalized_attn_fwd_kernel(
    q,
    k,
    v,
    o,
    lse,
    scale,
    sq_b,
    sq_t,
    sq_h,
    sk_b,
    sk_t,
    sk_h,
    sv_b,
    sv_t,
    sv_h,
    so_b,
    so_t,
    so_h,
    T,
    S,
    HQ,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
    EPS: tl.constexpr,
    IS_SAFE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NT = tl.cdiv(T, BT)
    # the tiles with the most keys start first
    i_t = (NT - 1 - tl.program_id(0) % NT) * BT
    i_bh = tl.program_id(0) // NT
    i_b = (i_bh // HQ).to(tl.int64)
    i_hq = (i_bh % HQ).to(tl.int64)
    i_h = i_hq // G
    q += i_b * sq_b + i_hq * sq_h
    k += i_b * sk_b + i_h * sk_h
    v += i_b * sv_b + i_h * sv_h
    o += i_b * so_b + i_hq * so_h
    lse += i_bh.to(tl.int64) * T

    o_t = i_t + tl.arange(0, BT)
    # [BT] last key that each row sees
    o_last = o_t + (S - T)
    b_q = load_rows(q, i_t, sq_t, T, K, BT, BK, True)
    b_m = tl.full([BT], 0.0, tl.float32)
    if IS_SAFE:
        b_m = tl.full([BT], smallest_shift(NORMALIZER), tl.float32)
    b_z = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, BV], tl.float32)
    scale = scale * RCP_LN2

    # keys that every row sees, in whole tiles; then the rest
    end = tl.minimum(i_t + BT + S - T, S)
    end_full = (i_t + S - T + 1) // BS * BS
    b_m, b_z, b_o = _accumulate_keys(
        b_q, b_m, b_z, b_o, k, v, sk_t, sv_t, o_last, scale, 0, end_full, S,
        K, V, BS, BK, BV, NORMALIZER, IS_SAFE, False, PRECISION,
    )  # fmt: skip
    b_m, b_z, b_o = _accumulate_keys(
        b_q, b_m, b_z, b_o, k, v, sk_t, sv_t, o_last, scale, end_full, end, S,
        K, V, BS, BK, BV, NORMALIZER, IS_SAFE, True, PRECISION,
    )  # fmt: skip

    b_z += denominator_constant(b_m, NORMALIZER, EPS)
    # a zero denominator stands under zeros only
    b_o = b_o / tl.where(b_z == 0, 1.0, b_z)[:, None]
    store_rows(o, b_o, i_t, so_t, T, V, BT, BV)
    tl.store(lse + o_t, b_m + tl.log2(b_z), mask=o_t < T)


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of a float32 ``tl.dot``: torch's own matmul setting decides."""
    is_ieee = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if is_ieee else "tf32"


def feature_tile(D: int) -> int:
    """Power of two that holds a head dimension; ``tl.dot`` needs 16."""
    return max(16, triton.next_power_of_2(D))


def empty_rows(q: torch.Tensor, T: int, H: int, D: int, head_first: bool) -> torch.Tensor:
    """``[B, H, T, D]`` or ``[B, T, H, D]`` with the dtype and device of ``q``."""
    return q.new_empty((q.shape[0], H, T, D) if head_first else (q.shape[0], T, H, D))


def strides_bth(x: torch.Tensor, head_first: bool) -> tuple[int, int, int]:
    """Strides of batch, time and head, in elements."""
    b, t, h = (0, 2, 1) if head_first else (0, 1, 2)
    return x.stride(b), x.stride(t), x.stride(h)


def _tile_config(q: torch.Tensor, V: int) -> dict[str, int]:
    """Launch shape by head dimension and element size."""
    D = max(feature_tile(q.shape[-1]), feature_tile(V))
    if q.dtype == torch.float32:
        # IEEE products run on no tensor core of NVIDIA: larger tiles spill and take minutes to compile
        tile = {"BT": 64, "BS": 32} if D <= 64 else {"BT": 32, "BS": 16}
        return tile | {"num_warps": 8, "num_stages": 1}
    if D <= 64:
        return {"BT": 64, "BS": 64, "num_warps": 4, "num_stages": 3}
    if D <= 128:
        # a third stage takes more than the 64 KB of shared memory of gfx90a and gfx942
        return {"BT": 128, "BS": 64, "num_warps": 8, "num_stages": 2}
    return {"BT": 64, "BS": 32, "num_warps": 4, "num_stages": 2}


def parallel_normalized_attn_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    head_first: bool,
    safe: bool,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel.

    Args:
        q: ``[B, T, HQ, K]`` (``head_first``: ``[B, HQ, T, K]``), last dimension contiguous; likewise
            ``k [B, S, H, K]`` and ``v [B, S, H, V]``.

    Returns:
        Outputs ``[B, T, HQ, V]`` in the dtype of ``q``, contiguous in the layout given, and the base-2
        lse ``[B, HQ, T]`` in float32: log2 of the denominator, -inf where that is 0.
    """
    time, head = (2, 1) if head_first else (1, 2)
    B, T, S, HQ, H = q.shape[0], q.shape[time], k.shape[time], q.shape[head], k.shape[head]
    K, V = q.shape[-1], v.shape[-1]
    o = empty_rows(q, T, HQ, V, head_first)
    lse = torch.empty(B, HQ, T, dtype=torch.float32, device=q.device)
    config = _tile_config(q, V)
    parallel_normalized_attn_fwd_kernel[(triton.cdiv(T, config["BT"]) * B * HQ,)](
        q,
        k,
        v,
        o,
        lse,
        scale,
        *strides_bth(q, head_first),
        *strides_bth(k, head_first),
        *strides_bth(v, head_first),
        *strides_bth(o, head_first),
        T=T,
        S=S,
        HQ=HQ,
        G=HQ // H,
        K=K,
        V=V,
        BK=feature_tile(K),
        BV=feature_tile(V),
        NORMALIZER=normalizer,
        EPS=EPS,
        IS_SAFE=safe,
        PRECISION=dot_precision(q.dtype),
        **config,
    )
    return o, lse
