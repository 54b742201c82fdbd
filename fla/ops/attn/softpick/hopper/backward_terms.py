"""Weights and score gradients of one tile, from registers that hold one number for each score.

Legend: as in `normalizers.py`, and
    b_e                2**(b_s + b_neg_lse2) with the sign of the score, 0 where `score_grad` is 0
    b_neg_delta        minus delta
"""

import triton.language as tl

from fla.ops.attn.softpick.hopper.gluon_api import copysign, gluon
from fla.ops.attn.softpick.normalizers import HUGE


@gluon.jit
def signed_exponential(b_s, b_r, b_neg_lse2, NORMALIZER: tl.constexpr):
    """All that `grad_from_exponential` needs to know of a score; b_r has the sign of b_s."""
    b_x = b_s + b_neg_lse2
    if NORMALIZER == "rectified":
        # before the exponential, which a small sink makes infinite
        b_x = tl.where(b_r < 0, -float("inf"), b_x)
    b_e = tl.exp2(b_x)
    if NORMALIZER == "softpick" or NORMALIZER == "abs_softpick":
        b_e *= tl.clamp(tl.abs(b_r) * HUGE, 0.0, 1.0)
        return copysign(b_e, b_r)
    elif NORMALIZER == "relu_softpick":
        # a factor, since a select would be put off and keep both of its operands in registers; e is at most 1 / EPS at 0
        return b_e * tl.clamp(b_r * HUGE, 0.0, 1.0)
    else:
        tl.static_assert(
            NORMALIZER == "softmax"
            or NORMALIZER == "softmax_plus_one"
            or NORMALIZER == "rectified",
            "unknown normalizer",
        )
        return b_e


@gluon.jit
def grad_from_exponential(b_e, b_dp, b_neg_delta, NORMALIZER: tl.constexpr):
    """`score_grad`, from b_e alone instead of scores and products."""
    if NORMALIZER == "softpick":
        b_g = b_e * b_neg_delta
        return tl.where(b_e > 0, b_e * b_dp + b_g, b_g)
    else:
        # in abs_softpick the sign of b_e is the sign of both derivatives
        return b_e * (b_dp + b_neg_delta)
