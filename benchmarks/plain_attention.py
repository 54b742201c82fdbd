"""Softmax attention as aiter and flash-attention structure it in Triton, over full tiles alone: what `rank_amd.py --check` compiles.

Their shapes were tuned on hardware for such loops. They are never run: no mask, no tail, one head.
"""

import torch
import triton
import triton.language as tl

from fla.ops.attn.softpick.launch_shapes import LaunchShape


@triton.jit
def _rows(p, first, stride, BT: tl.constexpr, D: tl.constexpr):
    """[BT, D] pointers to the rows from first on."""
    return p + (first + tl.arange(0, BT))[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def plain_fwd_kernel(
    q, k, v, o, lse, scale, stride, S, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    PRELOADS_V: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0) * BT
    b_q = tl.load(_rows(q, i_t, stride, BT, D))
    b_m = tl.full([BT], -float("inf"), tl.float32)
    b_z = tl.full([BT], 1.0, tl.float32)
    b_o = tl.zeros([BT, D], tl.float32)
    for i_s in tl.range(0, S, BS):
        b_k = tl.load(_rows(k, i_s, stride, BS, D))
        if PRELOADS_V:
            b_v = tl.load(_rows(v, i_s, stride, BS, D))
        b_s = tl.dot(b_q, tl.trans(b_k)) * scale
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_m_new[:, None])
        b_f = tl.exp2(b_m - b_m_new)
        b_o = b_o * b_f[:, None]
        if not PRELOADS_V:
            b_v = tl.load(_rows(v, i_s, stride, BS, D))
        b_z = b_z * b_f + tl.sum(b_p, 1)
        b_m = b_m_new
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o)
    b_o = b_o * (1 / b_z)[:, None]
    tl.store(_rows(o, i_t, stride, BT, D), b_o.to(o.dtype.element_ty))
    tl.store(lse + i_t + tl.arange(0, BT), b_m + tl.log2(b_z))


@triton.jit
def plain_dkv_kernel(
    q, k, v, do, lse, delta, dk, dv, scale, stride, S,
    D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0) * BT
    b_k = tl.load(_rows(k, i_t, stride, BT, D))
    b_v = tl.load(_rows(v, i_t, stride, BT, D))
    b_dk = tl.zeros([BT, D], tl.float32)
    b_dv = tl.zeros([BT, D], tl.float32)
    for i_s in tl.range(0, S, BS):
        b_q = tl.load(_rows(q, i_s, stride, BS, D))
        b_lse = tl.load(lse + i_s + tl.arange(0, BS))
        b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q)) * scale - b_lse[None, :])
        b_do = tl.load(_rows(do, i_s, stride, BS, D))
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv)
        b_delta = tl.load(delta + i_s + tl.arange(0, BS))
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do)) - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
    tl.store(_rows(dk, i_t, stride, BT, D), (b_dk * scale).to(dk.dtype.element_ty))
    tl.store(_rows(dv, i_t, stride, BT, D), b_dv.to(dv.dtype.element_ty))


@triton.jit
def plain_dq_kernel(
    q, k, v, do, lse, delta, dq, scale, stride, S,
    D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0) * BT
    b_q = tl.load(_rows(q, i_t, stride, BT, D))
    b_do = tl.load(_rows(do, i_t, stride, BT, D))
    b_lse = tl.load(lse + i_t + tl.arange(0, BT))
    b_delta = tl.load(delta + i_t + tl.arange(0, BT))
    b_dq = tl.zeros([BT, D], tl.float32)
    for i_s in tl.range(0, S, BS):
        b_k = tl.load(_rows(k, i_s, stride, BS, D))
        b_v = tl.load(_rows(v, i_s, stride, BS, D))
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k)) * scale - b_lse[:, None])
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v)) - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)
    tl.store(_rows(dq, i_t, stride, BT, D), (b_dq * scale).to(dq.dtype.element_ty))


def launch(kernel: str, D: int, shape: LaunchShape, preloads_v: bool, **options: int) -> None:
    """Launches a kernel on one head of 256 queries and keys.

    Args:
        kernel: "fwd", "dq" or "dkv".
        shape: Its launch shape.
        preloads_v: Forward loads values before the scores are computed, as aiter does on gfx950.
        options: Further options of Triton.
    """
    x = torch.empty(256, D, dtype=torch.bfloat16)
    stats = torch.empty(256)
    options |= {"D": D, "BT": shape.BT, "BS": shape.BS}
    options |= {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    if shape.waves_per_eu is not None:
        options["waves_per_eu"] = shape.waves_per_eu
    sizes = {"scale": 1.0, "stride": D, "S": 256}
    if kernel == "fwd":
        plain_fwd_kernel[(1,)](x, x, x, x, stats, **sizes, PRELOADS_V=preloads_v, **options)
    elif kernel == "dkv":
        plain_dkv_kernel[(1,)](x, x, x, x, stats, stats, x, x, **sizes, **options)
    else:
        plain_dq_kernel[(1,)](x, x, x, x, stats, stats, x, **sizes, **options)
