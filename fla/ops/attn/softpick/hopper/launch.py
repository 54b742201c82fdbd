"""With which launch configuration the Hopper kernels run, and their tensor descriptors."""

import sys
from functools import cache
from typing import NamedTuple

import torch

from fla.ops.attn.softpick.hopper.gluon_api import NVMMASharedLayout, TensorDescriptor
from fla.ops.attn.softpick.tiles import descriptor_strides


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
# the first for a prototype without masks, packing and checks, and the others at T 2,048, 4,096 and 16,384.
FORWARD_SHAPES: dict[int, list[tuple[float, ForwardShape]]] = {
    64: [
        (1024, ForwardShape(2, 128, 3, 3, True, 232, 40)),
        (float("inf"), ForwardShape(3, 64, 4, 4, False, 160, 32)),
    ],
    128: [
        (4096, ForwardShape(2, 64, 4, 4, True, 232, 40)),
        (float("inf"), ForwardShape(2, 128, 2, 2, True, 232, 40)),
    ],
}


def padded_head_dim(D: int) -> int:
    """Columns of a row in shared memory: TMA fills those from D on with zeros."""
    return 64 if D <= 64 else 128


def select_forward_shape(D: int, S: int) -> ForwardShape:
    """The row of `FORWARD_SHAPES` for head dimension D and S keys."""
    rows = FORWARD_SHAPES[padded_head_dim(D)]
    return next(shape for longest, shape in rows if longest >= S)


def shape_of(kernel: str, D: int) -> str:
    """Launch configuration for head dimension D and long sequences, for people."""
    if kernel == "fwd":
        return str(select_forward_shape(D, sys.maxsize))
    return "one kernel for dq and dkv: 128 keys, tiles of 64 queries above 64, of 128 up to 64"


@cache
def shared_layout(element_bits: int, rank: int) -> NVMMASharedLayout:
    """Of TMA blocks: 16-bit ones swizzled for the tensor cores, others not. Kept, since it takes longer than a descriptor."""
    swizzle = 128 if element_bits == 16 else 0
    return NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=element_bits, rank=rank)


def block_descriptor(x: torch.Tensor, head_first: bool, rows: int, BD: int) -> TensorDescriptor:
    """Descriptor of ``x`` as ``[B, T, H, D]`` for blocks of ``rows`` tokens of one head, ``[1, rows, 1, BD]``."""
    B, T, H, D = x.shape
    if head_first:
        T, H = H, T
    strides = [*descriptor_strides(x, head_first), 1]
    return TensorDescriptor(x, [B, T, H, D], strides, [1, rows, 1, BD], shared_layout(16, 4))
