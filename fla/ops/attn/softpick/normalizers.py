"""The few jitted helpers in which the normalisers differ; every kernel calls these and names none.

Legend
    n d c              numerator, denominator and constant of README.md, section 1
    b_s                base-2 scores
    b_r                products <q, k> before the scale
    b_neg_shift        minus a base-2 shift: -m in forward, -lse2 in backward. Passed negated because ptxas
                       does not fold a negation that it finds in two places
    b_exp_neg_shift    2**b_neg_shift
    b_neg_lse2         minus the base-2 lse, so 1 / Z = 2**b_neg_lse2
    m_s                score mask: True where the query sees the key
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

# log2(e) = 1 / ln(2): scores are multiplied by it, so that exp becomes exp2.
RCP_LN2 = tl.constexpr(1.4426950408889634)

# Those that divide a gradient by less than 1, at the smallest by EPS: README.md, section 3.
WITH_SMALL_DENOMINATORS = ("softpick", "relu_softpick", "abs_softpick")

# The magnitude of a normal float32 times this is at least 1.
HUGE = tl.constexpr(2.0**126)


@triton.jit
def scores_and_sign(
    b_r,
    m_s,
    scale,
    NORMALIZER: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_NEGATED: tl.constexpr,
):
    """Base-2 scores s = b_r * scale, and r with the sign of s, both fp32 of the shape of b_r.

    scale includes log2(e). r is b_r, or s where scale < 0 (IS_NEGATED). With IS_MASKED, entries where m_s is
    False give n = d = 0 and no gradient.
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
    # softmax alone has no term of weight 1 in its sums: its shift may fall below 0, and has to where all scores
    # of a row are very negative
    if NORMALIZER == "softmax":
        # finite, so that a row whose first keys are all masked is not inf - inf
        return -3.4028234663852886e38
    else:
        return 0.0


@triton.jit
def signed_terms(b_s, b_neg_shift, b_exp_neg_shift, NORMALIZER: tl.constexpr):
    """A number whose positive part is n(s), and d(s), both times 2**b_neg_shift.

    b_neg_shift and b_exp_neg_shift broadcast against b_s. For kernels that take the positive part as they round n.
    """
    b_e = tl.exp2(b_s + b_neg_shift)
    if NORMALIZER == "softmax" or NORMALIZER == "softmax_plus_one":
        return b_e, b_e
    elif NORMALIZER == "rectified":
        # written so that NaN passes
        b_e = tl.where(b_s < 0, 0.0, b_e)
        return b_e, b_e
    else:
        b_x = b_e - b_exp_neg_shift
        if NORMALIZER == "softpick":
            return b_x, tl.abs(b_x)
        elif NORMALIZER == "relu_softpick":
            b_x = tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            return b_x, b_x
        else:
            tl.static_assert(NORMALIZER == "abs_softpick", "unknown normalizer")
            b_x = tl.abs(b_x)
            return b_x, b_x


@triton.jit
def numerator_and_denominator_terms(
    b_s,
    b_neg_shift,
    b_exp_neg_shift,
    NORMALIZER: tl.constexpr,
    DROPS_NAN: tl.constexpr,
):
    """n(s) and d(s), both times 2**b_neg_shift. b_neg_shift and b_exp_neg_shift broadcast against b_s.

    DROPS_NAN allows a number for n where d is NaN: gfx90a and gfx942 have no maximum that passes NaN, so LLVM takes
    three instructions more.
    """
    b_n, b_d = signed_terms(b_s, b_neg_shift, b_exp_neg_shift, NORMALIZER)
    if NORMALIZER == "softpick":
        b_x = b_n
        if DROPS_NAN:
            b_n = tl.maximum(b_x, 0.0)
        else:
            b_n = tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        # after n: in this order LLVM takes 7 instructions fewer in forward for gfx942
        b_d = tl.abs(b_x)
    return b_n, b_d


@triton.jit
def denominator_constant(b_m, b_c, NORMALIZER: tl.constexpr, EPS: tl.constexpr):
    """(c + 2**b_c) times 2**-b_m; b_c is the base-2 score of a sink, -inf without one."""
    b_sink = tl.exp2(b_c - b_m)
    if NORMALIZER == "softmax" or NORMALIZER == "rectified":
        return b_sink
    elif NORMALIZER == "softmax_plus_one":
        return b_sink + tl.exp2(-b_m)
    else:
        return b_sink + EPS * tl.exp2(-b_m)


@triton.jit
def in_range(b_z, NORMALIZER: tl.constexpr):
    """True where an unshifted denominator is finite and, for softmax, not underflowed: no term of the row overflowed."""
    if NORMALIZER == "softmax":
        # underflow harms softmax alone: the other sums hold a term of 1, or a constant, or no term at all
        return (b_z > 2.0**-24) & (b_z < float("inf"))
    else:
        return b_z < float("inf")


@triton.jit
def denominator_log(b_lse, NORMALIZER: tl.constexpr):
    """b_lse, with +inf in place of -inf: a row whose denominator is 0 gets no weight and no gradient."""
    if NORMALIZER == "softmax" or NORMALIZER == "rectified":
        return tl.where(b_lse == -float("inf"), float("inf"), b_lse)
    else:
        return b_lse


@triton.jit
def has_small_denominator(b_lse, NORMALIZER: tl.constexpr):
    """True where the gradient would divide a rounding of the output by less than 1; b_lse is the base-2 lse."""
    if NORMALIZER == "softpick" or NORMALIZER == "relu_softpick" or NORMALIZER == "abs_softpick":
        return b_lse < 0.0
    else:
        return tl.full(b_lse.shape, False, tl.int1)


@triton.jit
def fp16_rescale_exponent(b_neg_lse2, MAX_EXPONENT: tl.constexpr, NORMALIZER: tl.constexpr):
    """Exponent e in [0, MAX_EXPONENT], of the shape of b_neg_lse2; 0 but for the three softpicks.

    Their 1 / Z reaches 1 / EPS, which overflows fp16 in `score_grad`. The caller subtracts e from b_neg_lse2,
    computes ds * 2**-e, and multiplies by 2**e afterwards.
    """
    if NORMALIZER == "softpick" or NORMALIZER == "relu_softpick" or NORMALIZER == "abs_softpick":
        return tl.minimum(tl.maximum(b_neg_lse2, 0.0), MAX_EXPONENT)
    else:
        return tl.zeros_like(b_neg_lse2)


@triton.jit
def score_grad(b_s, b_r, b_neg_lse2, b_dp, b_delta, NORMALIZER: tl.constexpr):
    """(n'(s) dp - d'(s) delta) / Z with 1 / Z = 2**b_neg_lse2; 0 at s = 0 for the three softpicks.

    b_r has the sign of b_s. Comparing the unscaled b_r leaves scale and lse to one multiply-add.
    """
    b_e = tl.exp2(b_s + b_neg_lse2)
    if NORMALIZER == "softpick" or NORMALIZER == "abs_softpick":
        # the factor is 0 at 0, else 1 (a subnormal score counts as 0): one saturating multiplication, since a
        # comparison and a select run at half its rate on NVIDIA
        b_e *= tl.clamp(tl.abs(b_r) * HUGE, 0.0, 1.0)
    elif NORMALIZER == "relu_softpick":
        b_e = tl.where(b_r <= 0, 0.0, b_e)
    elif NORMALIZER == "rectified":
        b_e = tl.where(b_r < 0, 0.0, b_e)
    if NORMALIZER == "softpick":
        # a product and a predicated multiply-add: two instructions fewer than selecting dp - delta
        b_g = b_e * b_delta
        return tl.where(b_r > 0, b_e * b_dp - b_g, b_g)
    elif NORMALIZER == "abs_softpick":
        return b_e * tl.where(b_r > 0, b_dp - b_delta, b_delta - b_dp)
    else:
        return b_e * (b_dp - b_delta)
