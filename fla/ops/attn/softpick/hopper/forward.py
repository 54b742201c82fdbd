"""Forward of normalised attention for Hopper: the kernel, its roles in `forward_roles.py`, and its launcher.

Computes what `parallel_fwd.py` does, and returns the same.
"""

# Triton's annotations refuse what its compiler accepts, in kernels and in their launches: an int for a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

import math

import torch

from fla.ops.attn.softpick.hopper.forward_roles import consumer, producer
from fla.ops.attn.softpick.hopper.gluon_api import (
    allocate_barriers,
    fence_async_shared,
    gl,
    gluon,
)
from fla.ops.attn.softpick.hopper.launch import (
    FORWARD_SHAPES,
    ForwardShape,
    block_descriptor,
    padded_head_dim,
)
from fla.ops.attn.softpick.launch_shapes import num_processors
from fla.ops.attn.softpick.naive import EPS
from fla.ops.attn.softpick.tiles import empty_rows, strides_bth, tiles_of

# keys of a tile
BN = 64
# bytes of keys and values that stay in L2, of which an H100 has 50 MB
L2_BYTES = 2**25


# few arguments, since each takes the host time at every launch
@gluon.jit(do_not_specialize=["NT", "BH", "HQ", "G", "GROUP", "T_max", "S_max", "W"])
def hopper_normalized_attn_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, o, so, lse, sink_bias, numbers, scale,
    tiles, NT, BH, HQ, G, GROUP, T_max, S_max, W,
    D: gl.constexpr, NUM_WG: gl.constexpr, KST: gl.constexpr, VST: gl.constexpr,
    NORMALIZER: gl.constexpr, EPS: gl.constexpr, IS_SHIFTED: gl.constexpr, HAS_CHECK: gl.constexpr,
):  # fmt: skip
    """Each program draws units from a queue until none is left: NUM_WG times 64 queries of one head."""
    dtype: gl.constexpr = q_desc.dtype
    BN: gl.constexpr = k_desc.block_shape[1]
    BD: gl.constexpr = k_desc.block_shape[3]
    IS_VARLEN: gl.constexpr = tiles is not None
    HAS_WINDOW: gl.constexpr = W is not None
    HAS_SINK: gl.constexpr = sink_bias is not None
    q_s = gl.allocate_shared_memory(dtype, [NUM_WG, 1, 64, 1, BD], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [KST, 1, BN, 1, BD], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [VST, 1, BN, 1, BD], v_desc.layout)
    o_s = gl.allocate_shared_memory(dtype, [NUM_WG, 1, 64, 1, BD], o_desc.layout)
    # the unit, from word 8 on whether each warpgroup has flagged one
    unit_s = gl.allocate_shared_memory(gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))  # fmt: skip
    q_full = allocate_barriers(NUM_WG, 1)
    q_empty = allocate_barriers(NUM_WG, 1)
    k_full = allocate_barriers(KST, 1)
    k_empty = allocate_barriers(KST, NUM_WG)
    v_full = allocate_barriers(VST, 1)
    v_empty = allocate_barriers(VST, NUM_WG)
    tail_full = allocate_barriers(1, 1)
    tail_empty = allocate_barriers(1, 1)
    done = allocate_barriers(1, NUM_WG)
    fence_async_shared()
    memory = (q_s, k_s, v_s, o_s, unit_s)
    barriers = (
        q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, done
    )  # fmt: skip
    work = (tiles, NT * BH, NT, BH, HQ, G, GROUP, T_max, S_max, W)
    results = (o_desc, o, so, lse, sink_bias, numbers, memory, barriers, work, scale)
    inputs = (q_desc, k_desc, v_desc, numbers, memory, barriers, work)
    # Gluon keeps constants only in a tuple that is written where it is passed
    if NUM_WG == 2:
        gl.warp_specialize(
            [
                (consumer, (
                    results, 0, D, BD, BN, NUM_WG, KST, VST,
                    NORMALIZER, IS_VARLEN, HAS_WINDOW, HAS_SINK, IS_SHIFTED, HAS_CHECK, EPS)),
                (consumer, (
                    results, 1, D, BD, BN, NUM_WG, KST, VST,
                    NORMALIZER, IS_VARLEN, HAS_WINDOW, HAS_SINK, IS_SHIFTED, HAS_CHECK, EPS)),
                (producer, (inputs, BD, BN, NUM_WG, KST, VST, IS_VARLEN, HAS_WINDOW, HAS_CHECK)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
    else:
        gl.static_assert(NUM_WG == 3, "2 or 3 warpgroups")
        gl.warp_specialize(
            [
                (consumer, (
                    results, 0, D, BD, BN, NUM_WG, KST, VST,
                    NORMALIZER, IS_VARLEN, HAS_WINDOW, HAS_SINK, IS_SHIFTED, HAS_CHECK, EPS)),
                (consumer, (
                    results, 1, D, BD, BN, NUM_WG, KST, VST,
                    NORMALIZER, IS_VARLEN, HAS_WINDOW, HAS_SINK, IS_SHIFTED, HAS_CHECK, EPS)),
                (consumer, (
                    results, 2, D, BD, BN, NUM_WG, KST, VST,
                    NORMALIZER, IS_VARLEN, HAS_WINDOW, HAS_SINK, IS_SHIFTED, HAS_CHECK, EPS)),
                (producer, (inputs, BD, BN, NUM_WG, KST, VST, IS_VARLEN, HAS_WINDOW, HAS_CHECK)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip


def hopper_normalized_attn_fwd(
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
    shape: ForwardShape | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel on inputs for which `hopper_refusal` is None.

    Args:
        q: ``[B, T, HQ, K]`` (``head_first``: ``[B, HQ, T, K]``), float16 or bfloat16, last dimension contiguous.
        k: ``[B, S, H, K]``, likewise.
        v: ``[B, S, H, K]``, likewise.
        sink_bias: ``[HQ]`` float32, contiguous, or None.
        cu_seqlens: Boundaries ``[N + 1]`` of packed sequences, int32 or int64, or None.
        scale: Factor on ``q @ k.T``.
        window_size: Keys that a query sees, itself included, or None for all.
        head_first: Layout ``[B, H, T, D]`` instead of ``[B, T, H, D]``.
        safe: Computes rows again, with a shift, whose unshifted sums leave float32's range.
        normalizer: A name in `normalizers.KERNEL_NORMALIZERS`.
        shape: Launch configuration. Default: the table's.

    Returns:
        Outputs ``[B, T, HQ, K]`` in the dtype of ``q``, contiguous in the layout given, and the base-2
        lse ``[B, HQ, T]`` in float32: log2 of the denominator, -inf where that is 0.
    """
    time, head = (2, 1) if head_first else (1, 2)
    B, T, S, HQ, H = q.shape[0], q.shape[time], k.shape[time], q.shape[head], k.shape[head]
    D = q.shape[-1]
    BD = padded_head_dim(D)
    shape = shape or FORWARD_SHAPES[BD]
    # NOTE(numerics): fp16 weights overflow above s = 11, so safe fp16 always shifts
    is_shifted = safe and q.dtype == torch.float16
    has_check = safe and not is_shifted
    o = empty_rows(q, T, HQ, D, head_first)
    lse = torch.empty(B, HQ, T, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        NT, tiles = tiles_of(cu_seqlens, T, 64 * shape.NUM_WG, is_last_first=True)
        n_units = NT * B * HQ
        # the queue, then whether a row of each unit has failed, and which unit its program had before
        numbers = torch.zeros(1 + 2 * n_units * has_check, dtype=torch.int32, device=q.device)
        group = max(1, L2_BYTES // (4 * S * D)) * (HQ // H)
        hopper_normalized_attn_fwd_kernel[(min(num_processors(q.device.index), n_units),)](
            block_descriptor(q, head_first, 64, BD),
            block_descriptor(k, head_first, BN, BD),
            block_descriptor(v, head_first, BN, BD),
            block_descriptor(o, head_first, 64, BD),
            o,
            strides_bth(o, head_first),
            lse,
            sink_bias,
            numbers,
            scale * math.log2(math.e),
            tiles=tiles,
            NT=NT,
            BH=B * HQ,
            HQ=HQ,
            G=HQ // H,
            GROUP=min(group, B * HQ),
            T_max=T,
            S_max=S,
            W=None if window_size is None else min(window_size, S),
            D=D,
            NORMALIZER=normalizer,
            EPS=EPS,
            IS_SHIFTED=is_shifted,
            HAS_CHECK=has_check,
            **shape._asdict(),
        )
    return o, lse
