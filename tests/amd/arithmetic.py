"""The arithmetic of vector instructions, element by element, on NumPy arrays.

Floats are rounded once an instruction, as IEEE 754 says. `exp2`, `log2` and the reciprocal are too, where a card may
err by one unit in the last place; these three take and give 0 for subnormal numbers.
"""

import numpy as np

TINY = np.float32(2.0**-126)
_U = np.uint32


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = np.asarray(product + c)
    bits = total.view(np.uint64)
    # the product is exact and the sum is rounded to float64, which harms where that is halfway between two float32
    doubtful = (bits & np.uint64(0x1FFFFFFF) == 0x10000000) | (np.abs(total) < 2 * TINY)
    if doubtful.any():
        part = total - product
        error = (product - (total - part)) + (c - part)
        # an odd last bit says that there is more
        is_even = doubtful & (bits & np.uint64(1) == 0) & (error != 0) & np.isfinite(total)
        total = np.where(is_even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return total.astype(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    """x, with 0 of the same sign for subnormal numbers."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def exp2(x: np.ndarray) -> np.ndarray:
    return flushed(np.exp2(flushed(x).astype(np.float64)).astype(np.float32))


def log2(x: np.ndarray) -> np.ndarray:
    return np.log2(flushed(x).astype(np.float64)).astype(np.float32)


def reciprocal(x: np.ndarray) -> np.ndarray:
    return flushed((1.0 / flushed(x).astype(np.float64)).astype(np.float32))


def _zeros_apart(choose, combine):
    """minNum or maxNum, -0 below +0."""

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x = choose(a, b)
        is_zero = x == 0
        if is_zero.any():
            signs = combine(np.asarray(a).view(_U), np.asarray(b).view(_U))
            is_zero &= (a == 0) & (b == 0)
            x = np.where(is_zero, signs.view(np.float32), x)
        return x

    return run


maximum = _zeros_apart(np.fmax, np.bitwise_and)
minimum = _zeros_apart(np.fmin, np.bitwise_or)


def median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The smallest number if one of them is none."""
    x = maximum(minimum(a, b), minimum(maximum(a, b), c))
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), minimum(minimum(a, b), c), x)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper 16 bits of a float32, rounded to nearest even, as uint32."""
    bits = np.asarray(x).view(_U)
    rounded = bits + _U(0x7FFF) + (bits >> _U(16) & _U(1)) >> _U(16)
    return np.where(np.isnan(x), bits >> _U(16) | _U(0x40), rounded)


def to_unsigned(x: np.ndarray) -> np.ndarray:
    x = np.nan_to_num(np.asarray(x, np.float64), nan=0.0)
    return np.clip(np.trunc(x), 0, 2.0**32 - 1).astype(np.uint32)


def _exponent(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x).view(_U) >> _U(23) & _U(255)).astype(np.int32)


def div_scale(x: np.ndarray, divisor: np.ndarray, dividend: np.ndarray):
    """x, one of the two, times a power of two so that the division neither overflows nor underflows; whether the
    quotient must be scaled back.
    """
    x, divisor, dividend = np.broadcast_arrays(x, divisor, dividend)
    up, down = np.ldexp(x, 64), np.ldexp(x, -64)
    is_subnormal = [
        (y != 0) & (np.abs(y) < TINY) for y in (divisor, 1 / divisor, dividend / divisor)
    ]
    is_divisor, is_dividend = x == divisor, x == dividend
    # conditions, of which the first that holds counts; result; flag
    cases = [
        ((divisor == 0) | (dividend == 0), np.float32(np.nan), False),
        (_exponent(dividend) - _exponent(divisor) >= 96, np.where(is_divisor, up, x), True),
        (is_subnormal[0], up, False),
        (is_subnormal[1] & is_subnormal[2], np.where(is_divisor, down, x), True),
        (is_subnormal[1], down, False),
        (is_subnormal[2], np.where(is_dividend, up, x), True),
        (_exponent(dividend) <= 23, up, False),
    ]
    conditions, results, flags = zip(*cases, strict=True)
    return np.select(conditions, results, x), np.select(conditions, flags, False)


def div_fmas(a, b, c, is_scaled) -> np.ndarray:
    """fma, scaled back."""
    # NOTE(numerics): the manual says 2**32, but its `div_scale` scales by 2**64 or 2**-64. The inverse of that is assumed,
    # unverified on a card; the quotient's size says which of the two was used.
    x = fma(a, b, c)
    return np.where(is_scaled, np.ldexp(x, np.where(_exponent(c) > 127, 64, -64)), x)


def div_fixup(quotient, divisor, dividend) -> np.ndarray:
    """The quotient that Newton's steps gave, or what it is for numbers that they do not serve."""
    quotient, divisor, dividend = np.broadcast_arrays(quotient, divisor, dividend)
    sign = np.copysign(np.float32(1), divisor) * np.copysign(np.float32(1), dividend)
    infinite, zero = np.isinf, lambda x: x == 0
    conditions = [
        np.isnan(dividend), np.isnan(divisor),
        zero(divisor) & zero(dividend) | infinite(divisor) & infinite(dividend),
        zero(divisor) | infinite(dividend), infinite(divisor) | zero(dividend),
        _exponent(dividend) - _exponent(divisor) < -150,
    ]  # fmt: skip
    infinity, nothing = sign * np.float32(np.inf), sign * np.float32(0)
    results = [
        dividend,
        divisor,
        -np.full(sign.shape, np.nan, np.float32),
        infinity,
        nothing,
        nothing,
    ]
    return np.select(conditions, results, sign * np.abs(quotient))


def permuted_bytes(a, b, selector) -> np.ndarray:
    """Four bytes that the selector's four choose from those of b (0 to 3) and a (4 to 7)."""
    data = np.asarray(a).astype(np.uint64) << np.uint64(32) | np.asarray(b)
    result = np.uint32(0)
    for i in range(4):
        choice = np.asarray(selector) >> _U(8 * i) & _U(255)
        byte = data >> (choice & _U(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        if (choice >= 8).any():
            # 8 to 11: the sign of bytes 1, 3, 5 and 7
            sign = data >> ((choice & _U(3)) * _U(16) + _U(15)).astype(np.uint64) & np.uint64(1)
            byte = np.where(choice >= 8, sign * np.uint64(255), byte)
            byte = np.where(choice == 12, np.uint64(0), np.where(choice > 12, np.uint64(255), byte))
        result = result | byte.astype(np.uint32) << _U(8 * i)
    return result


def bit_table(table: int):
    """Function of the bits of a, b and c whose value for them is bit 4 a + 2 b + c of the table."""

    def run(a, b, c):
        result = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return run


def bit_field(x, offset, width) -> np.ndarray:
    """width bits of x from offset on, extended by the sign of the type of x."""
    kind = x.dtype.type
    offset, width = ((n & _U(31)).astype(kind) for n in (offset, width))
    x = x >> offset & ((kind(1) << width) - kind(1))
    if kind is np.uint32:
        return x
    sign = np.where(width > 0, kind(1) << (width - kind(1) & kind(31)), kind(0))
    return (x ^ sign) - sign


def reversed_bits(x) -> np.ndarray:
    data = np.ascontiguousarray(x)[..., None].view(np.uint8)
    bits = np.unpackbits(data, axis=-1, bitorder="little")
    return np.packbits(bits[..., ::-1], axis=-1, bitorder="little").view(_U)[..., 0]


def packed_halves(low, high) -> np.ndarray:
    low, high = (np.asarray(x).view(np.uint16).astype(_U) for x in (low, high))
    return low | high << _U(16)


def multiply_add(a, b, c):
    """a * b + c in 64 bits, and whether the sum overflows."""
    product = a.astype(np.uint64) * b
    return product + c, product + c < product
