"""With which launch configuration the Hopper kernels run, and their tensor descriptors."""

from functools import cache
from typing import NamedTuple

import torch

from fla.ops.attn.softpick.hopper.gluon_api import NVMMASharedLayout, TensorDescriptor
from fla.ops.attn.softpick.tiles import descriptor_strides


class ForwardShape(NamedTuple):
    """Launch configuration of the forward kernel.

    NUM_WG: warpgroups, 2 or 3, each with 64 queries of a unit. KST, VST: tiles of 64 keys and of 64 values in shared
    memory.
    """

    NUM_WG: int
    KST: int
    VST: int


# Head dimension, rounded up to 64 or 128 -> what was fastest on an H200 in CUDA graphs
FORWARD_SHAPES = {64: ForwardShape(3, 6, 6), 128: ForwardShape(2, 4, 4)}


def padded_head_dim(D: int) -> int:
    """Columns of a row in shared memory: TMA fills those from D on with zeros."""
    return 64 if D <= 64 else 128


def shape_of(kernel: str, D: int) -> str:
    """Launch configuration for head dimension D, for people."""
    if kernel == "fwd":
        return str(FORWARD_SHAPES[padded_head_dim(D)])
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
