"""Which inputs the Hopper kernels take, with which launch configuration, and their tensor descriptors."""

from typing import NamedTuple

import torch

from fla.ops.attn.softpick.hopper.gluon_api import TensorDescriptor, gl
from fla.ops.attn.softpick.launch_shapes import architecture

MAX_HEAD_DIM = 128


class ForwardShape(NamedTuple):
    """Launch configuration of the forward kernel.

    NUM_WG: warpgroups, each with 64 queries of a unit. BN: keys of a tile. KST, VST: tiles of keys and of values in
    shared memory. PINGPONG: two warpgroups issue their products in turns. REGS, LOAD_REGS: registers of a thread of a
    computing warpgroup, and of the loading warp, which takes those of four warps. All fit into 65,536.
    """

    NUM_WG: int
    BN: int
    KST: int
    VST: int
    PINGPONG: bool
    REGS: int
    LOAD_REGS: int


# Head dimension, rounded up to 64 or 128 -> configurations with the longest sequence that each is for. An H200 ranked
# these for a prototype without masks, packing and checks, at T from 1,024 to 16,384.
FORWARD_SHAPES: dict[int, list[tuple[float, ForwardShape]]] = {
    64: [
        (1024, ForwardShape(2, 128, 3, 3, True, 232, 40)),
        (float("inf"), ForwardShape(3, 64, 4, 4, False, 160, 32)),
    ],
    128: [
        (4096, ForwardShape(2, 64, 4, 4, True, 232, 40)),
        (float("inf"), ForwardShape(2, 64, 4, 4, False, 232, 40)),
    ],
}


def padded_head_dim(D: int) -> int:
    """Columns of a row in shared memory: TMA fills those from D on with zeros."""
    return 64 if D <= 64 else 128


def select_forward_shape(D: int, S: int) -> ForwardShape:
    """The row of `FORWARD_SHAPES` for head dimension D and S keys."""
    rows = FORWARD_SHAPES[padded_head_dim(D)]
    return next(shape for longest, shape in rows if longest >= S)


def refusal_of_kind(kernel: str, row: str, dtype: torch.dtype, K: int, V: int) -> str | None:
    """What a Hopper kernel would need, or None if it takes this.

    Args:
        kernel: "fwd", or for the backward kernel "dq" or "dkv".
        row: Architecture, a key of `launch_shapes.TABLE`.
        dtype: Of queries, keys and values.
        K: Head dimension of queries and keys.
        V: Head dimension of values.
    """
    if row != "sm_90":
        return f"a GPU of architecture sm_90, got {row}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16, got {dtype}"
    if any(D % 16 or not 0 < D <= MAX_HEAD_DIM for D in (K, V)):
        return f"K and V that are multiples of 16 up to {MAX_HEAD_DIM}, got K = {K} and V = {V}"
    if kernel == "fwd" and K != V:
        return f"K = V, got K = {K} and V = {V}"
    return None


def refuse_others(
    kernel: str, head_first: bool, q: torch.Tensor, v: torch.Tensor, **others: torch.Tensor
) -> None:
    """Raises NotImplementedError, which says what is needed, if the kernel does not take these inputs."""
    reason = refusal_of_kind(
        kernel, architecture(q.device.index), q.dtype, q.shape[-1], v.shape[-1]
    )
    for name, x in {"q": q, "v": v, **others}.items():
        if x.numel() == 0:
            reason = reason or f"{name} with at least one element"
        elif x.data_ptr() % 16 or any(s <= 0 or s % 8 for s in _strides(x, head_first)):
            reason = reason or (
                f"{name} with rows that start at multiples of 16 bytes, got strides {x.stride()}"
            )
        elif x.stride(-1) != 1:
            reason = reason or (
                f"{name} with a contiguous last dimension, got strides {x.stride()}"
            )
    if reason:
        raise NotImplementedError(f"the Hopper kernels take {reason}")


def _strides(x: torch.Tensor, head_first: bool) -> list[int]:
    """Strides of batch, time and head."""
    # the stride of a dimension of size 1 is never used and may have any value
    order = (0, 2, 1) if head_first else (0, 1, 2)
    return [x.stride(i) if x.shape[i] > 1 else 16 for i in order]


def block_descriptor(x: torch.Tensor, head_first: bool, rows: int, BD: int) -> TensorDescriptor:
    """Descriptor of ``x`` as ``[B, T, H, D]`` for blocks of ``rows`` tokens of one head, ``[1, rows, 1, BD]``."""
    order = (0, 2, 1, 3) if head_first else (0, 1, 2, 3)
    shape = [x.shape[i] for i in order]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, shape, [*_strides(x, head_first), 1], [1, rows, 1, BD], layout)
