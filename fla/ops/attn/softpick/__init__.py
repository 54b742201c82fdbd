"""Softpick attention and its relatives: Triton operators and their PyTorch references."""

from fla.ops.attn.softpick.decoding import (
    abs_softpick_attn_decode,
    normalized_attn_decode,
    rectified_attn_decode,
    relu_softpick_attn_decode,
    softmax_attn_decode,
    softmax_plus_one_attn_decode,
    softpick_attn_decode,
)
from fla.ops.attn.softpick.naive import (
    NORMALIZERS,
    naive_abs_softpick_attn,
    naive_normalized_attn,
    naive_rectified_attn,
    naive_relu_softpick_attn,
    naive_softmax_attn,
    naive_softmax_plus_one_attn,
    naive_softpick_attn,
    softpick,
)
from fla.ops.attn.softpick.naive_decoding import naive_normalized_attn_decode
from fla.ops.attn.softpick.parallel import (
    parallel_abs_softpick_attn,
    parallel_normalized_attn,
    parallel_rectified_attn,
    parallel_relu_softpick_attn,
    parallel_softmax_attn,
    parallel_softmax_plus_one_attn,
    parallel_softpick_attn,
)

__all__ = [
    "NORMALIZERS",
    "abs_softpick_attn_decode",
    "naive_abs_softpick_attn",
    "naive_normalized_attn",
    "naive_normalized_attn_decode",
    "naive_rectified_attn",
    "naive_relu_softpick_attn",
    "naive_softmax_attn",
    "naive_softmax_plus_one_attn",
    "naive_softpick_attn",
    "normalized_attn_decode",
    "parallel_abs_softpick_attn",
    "parallel_normalized_attn",
    "parallel_rectified_attn",
    "parallel_relu_softpick_attn",
    "parallel_softmax_attn",
    "parallel_softmax_plus_one_attn",
    "parallel_softpick_attn",
    "rectified_attn_decode",
    "relu_softpick_attn_decode",
    "softmax_attn_decode",
    "softmax_plus_one_attn_decode",
    "softpick",
    "softpick_attn_decode",
]
