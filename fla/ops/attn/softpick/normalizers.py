"""The few jitted helpers in which the normalisers differ; every kernel calls these and names none.

Legend: `b_s` base-2 scores; `b_nm` minus a base-2 shift, which is the running maximum in forward and the
base-2 lse in backward, so that no formula stands twice, and added, since ptxas does not fold a negation that
it finds in two places; `n`, `d`, `c` numerator, denominator and constant of README.md.
"""

import triton
import triton.language as tl

# The names that the branches below know; a test holds them equal to `naive.NORMALIZERS`.
KERNEL_NORMALIZERS = (
    "softpick",
    "relu_softpick",
    "abs_softpick",
    "softmax",
    "softmax_plus_one",
    "rectified",
)

# log2(e): scores enter the kernels times this, so that exp becomes exp2.
RCP_LN2 = tl.constexpr(1.4426950408889634)

# 2**126: takes every normal float32 to 1 or beyond
HUGE = tl.constexpr(2.0**126)


@triton.jit
def scores(
    b_r,
    m_s,
    scale,
    NORMALIZER: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_NEGATED: tl.constexpr,
):
    """Base-2 scores of the products b_r, and something of their sign: b_r itself unless IS_NEGATED, scale < 0.

    Where not m_s they give no weight and no gradient.
    """
    if NORMALIZER == "softpick" or NORMALIZER == "relu_softpick" or NORMALIZER == "abs_softpick":
        # n, d and the gradient are 0 at 0
        if IS_MASKED:
            b_r = tl.where(m_s, b_r, 0.0)
        b_s = b_r * scale
    else:
        b_s = b_r * scale
        if IS_MASKED:
            b_s = tl.where(m_s, b_s, -float("inf"))
    if IS_NEGATED:
        return b_s, b_s
    else:
        return b_s, b_r


@triton.jit
def smallest_shift(NORMALIZER: tl.constexpr):
    """Start of the running maximum."""
    # softmax alone has no term of weight 1 in its sums, so nothing forbids a shift below 0, and rows
    # whose scores are all very negative need one
    if NORMALIZER == "softmax":
        # finite, so that a row whose first keys are all masked is not inf - inf
        return -3.4028234663852886e38
    else:
        return 0.0


@triton.jit
def weights(b_s, b_nm, b_u, NORMALIZER: tl.constexpr):
    """n(s) and d(s), both times 2**b_nm; b_nm, and b_u which is 2**b_nm, broadcast against b_s."""
    b_e = tl.exp2(b_s + b_nm)
    if NORMALIZER == "softmax" or NORMALIZER == "softmax_plus_one":
        return b_e, b_e
    elif NORMALIZER == "rectified":
        # written so that NaN passes
        b_e = tl.where(b_s < 0, 0.0, b_e)
        return b_e, b_e
    else:
        b_x = b_e - b_u
        if NORMALIZER == "softpick":
            return tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.abs(b_x)
        elif NORMALIZER == "relu_softpick":
            b_x = tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            return b_x, b_x
        else:
            tl.static_assert(NORMALIZER == "abs_softpick", "unknown normalizer")
            b_x = tl.abs(b_x)
            return b_x, b_x


@triton.jit
def denominator_constant(b_m, b_c, NORMALIZER: tl.constexpr, EPS: tl.constexpr):
    """c times 2**-b_m, with 2**b_c of a sink on top."""
    b_sink = tl.exp2(b_c - b_m)
    if NORMALIZER == "softmax" or NORMALIZER == "rectified":
        return b_sink
    elif NORMALIZER == "softmax_plus_one":
        return b_sink + tl.exp2(-b_m)
    else:
        return b_sink + EPS * tl.exp2(-b_m)


@triton.jit
def in_range(b_z, NORMALIZER: tl.constexpr):
    """Whether an unshifted denominator proves that no term overflowed, nor all of them vanished."""
    if NORMALIZER == "softmax":
        # the other sums hold a term of 1, or a constant, or no term at all
        return (b_z > 2.0**-24) & (b_z < float("inf"))
    else:
        return b_z < float("inf")


@triton.jit
def denominator_log(b_lse, NORMALIZER: tl.constexpr):
    """b_lse with +inf, which gives weight and gradient 0, where the denominator is 0."""
    if NORMALIZER == "softmax" or NORMALIZER == "rectified":
        return tl.where(b_lse == -float("inf"), float("inf"), b_lse)
    else:
        return b_lse


@triton.jit
def lift(b_nm, MOST: tl.constexpr, NORMALIZER: tl.constexpr):
    """Exponent, at most MOST, by which, with minus the base-2 lse b_nm, `score_grad` may be too large for float16: 1 / Z reaches 1 / EPS."""
    if NORMALIZER == "softpick" or NORMALIZER == "relu_softpick" or NORMALIZER == "abs_softpick":
        return tl.minimum(tl.maximum(b_nm, 0.0), MOST)
    else:
        return tl.zeros_like(b_nm)


@triton.jit
def score_grad(b_s, b_r, b_nm, b_dp, b_delta, NORMALIZER: tl.constexpr):
    """(n'(s) dp - d'(s) delta) / Z with 1 / Z = 2**b_nm; 0 at s = 0 for the three softpicks.

    b_r has the sign of b_s and need not be scaled: with it, scale and lse cost one multiply-add.
    """
    b_e = tl.exp2(b_s + b_nm)
    if NORMALIZER == "softpick" or NORMALIZER == "abs_softpick":
        # 0 at 0, else 1 (a subnormal score is as good as 0): one multiplication that saturates, and not a
        # comparison and a choice, which run at half its rate on NVIDIA
        b_e *= tl.clamp(tl.abs(b_r) * HUGE, 0.0, 1.0)
    elif NORMALIZER == "relu_softpick":
        b_e = tl.where(b_r <= 0, 0.0, b_e)
    elif NORMALIZER == "rectified":
        b_e = tl.where(b_r < 0, 0.0, b_e)
    if NORMALIZER == "softpick":
        # a product and a multiply-add under a predicate: two instructions fewer than choosing dp - delta
        b_g = b_e * b_delta
        return tl.where(b_r > 0, b_e * b_dp - b_g, b_g)
    elif NORMALIZER == "abs_softpick":
        return b_e * tl.where(b_r > 0, b_dp - b_delta, b_delta - b_dp)
    else:
        return b_e * (b_dp - b_delta)
