"""Evaluates the pseudocode of the ISA manual, one lane at a time, for what the tests of instructions compare.

It evaluates assignments, conditions and arithmetic. It does not evaluate loops or definitions of functions.
"""

import re
from fractions import Fraction
from types import CodeType, SimpleNamespace

import numpy as np
from tinygrad.runtime.autogen.amd.cdna.str_pcode import PCODE

TEXT = {re.sub("_E(32|64)$", "", op.name): text for op, text in PCODE.items()}


class Int(int):
    """An integer whose bits can be read: x[4, 0] from 4 down to 0, x.i32 as a type."""

    def __getitem__(self, key):
        high, low = key if isinstance(key, tuple) else (key, key)
        return Int(int(self) >> int(low) & (1 << int(high) - int(low) + 1) - 1)

    def __getattr__(self, kind):
        size = int(kind[1:])
        bits = int(self) & (1 << size) - 1
        if kind[0] == "f":
            return np.array(bits, f"u{size // 8}").view(f"f{size // 8}")[()]
        if kind[0] == "i" and bits >> size - 1:
            bits -= 1 << size
        return Int(bits)


def _bits(x) -> int:
    """Of an integer or float."""
    if isinstance(x, float) and not isinstance(x, np.floating):
        x = np.float32(x)
    if isinstance(x, np.floating):
        return int(np.array(x).view(f"u{x.dtype.itemsize}"))
    return int(x)


def nearest(x: Fraction) -> np.float32:
    """The float32 nearest to a fraction, even among two."""
    near = np.float32(float(x))
    candidates = [
        near,
        np.nextafter(near, np.float32(-np.inf)),
        np.nextafter(near, np.float32(np.inf)),
    ]
    finite = [c for c in candidates if np.isfinite(c)]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - x), _bits(c) & 1))


def fma(a, b, c) -> np.float32:
    if not all(map(np.isfinite, (a, b, c))):
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0 or abs(exact) >= 2**128:
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    return nearest(exact)


def _maximum(a, b):
    if np.isnan(a) or np.isnan(b):
        return b if np.isnan(a) else a
    # +0 is above -0
    return max(a, b, key=lambda x: (x, not np.signbit(x)))


def _minimum(a, b):
    return -_maximum(-a, -b)


def _sign_extended(x, size):
    return (int(x) ^ 1 << size - 1) - (1 << size - 1) if size else 0


def _to_unsigned(x):
    return 0 if np.isnan(x) else int(np.clip(np.trunc(np.float64(x)), 0, 2**32 - 1))


_NAMES = {
    "fma": fma,
    "INF": np.float32(np.inf),
    "NAN": np.float32(np.nan),
    "UNDERFLOW_F32": np.float32(0),
    # signalling NaNs, which no arithmetic gives, are not modelled
    "WAVE_MODE": SimpleNamespace(IEEE=False),
    "isNAN": np.isnan,
    "cvtToQuietNAN": lambda x: x,
    "sign": lambda x: int(np.signbit(x)),
    "exponent": lambda x: _bits(x) >> 23 & 255,
    "abs": abs,
    "trunc": np.trunc,
    "signext": int,
    "signext_from_bit": _sign_extended,
    "v_min_f32": _minimum,
    "v_max_f32": _maximum,
    "v_min3_f32": lambda a, b, c: _minimum(_minimum(a, b), c),
    "v_max3_f32": lambda a, b, c: _maximum(_maximum(a, b), c),
    "v_maximum_f32": lambda a, b: np.float32(np.nan) if np.isnan(a) or np.isnan(b) else _maximum(a, b),
    "u32_to_f32": lambda x: np.float32(int(x)),
    "i32_to_f32": lambda x: np.float32(int(x)),
    "f32_to_u32": _to_unsigned,
    "f16_to_f32": np.float32,
    "f32_to_f16": np.float16,
    "U": lambda x: Int(int(x)),
    "F": lambda x: x if isinstance(x, np.floating) else np.uint32(x).view(np.float32),
}  # fmt: skip


def _expression(text: str) -> str:
    """C-like to Python."""
    text = re.sub(r"\d+'[UIB]\(", "U(", text)
    text = re.sub(r"\d+'F\(", "F(", text)
    text = re.sub(r"\d+'(\d+)U", r"\1", text)
    text = re.sub(r"\b(0x[0-9a-fA-F]+|\d+)(ULL|LL|U)\b", r"\1", text)
    text = re.sub(r"(\d\.\d+)F\b", r"\1", text).replace("INF.f32", "INF").replace("NAN.f32", "NAN")
    text = re.sub(r"\[(\w+) : (\w+)\]", r"[\1, \2]", text)
    text = text.replace("&&", " and ").replace("||", " or ")
    # less or greater, so not of NaN
    text = re.sub(r"([\w.]+) <> ([\w.]+)", r"(\1 < \2 or \1 > \2)", text)
    text = re.sub(r"!(?!=)", " not ", text)
    if match := re.fullmatch(r"(.*?) \? (.*?) : (.*)", text):
        condition, first, second = (_expression(x) for x in match.groups())
        return f"(({first}) if ({condition}) else ({second}))"
    return text


def _statements(text: str) -> CodeType:
    lines, depth = [], 0
    for line in text.splitlines():
        line = line.split("//")[0].strip().removesuffix(";")
        if not line or line.startswith("declare"):
            continue
        if match := re.fullmatch(r"(if|elsif) (.*) then", line):
            depth -= match[1] == "elsif"
            word = "if" if match[1] == "if" else "elif"
            lines.append(" " * depth + f"{word} {_expression(match[2])}:")
            depth += 1
        elif line == "else":
            lines.append(" " * (depth - 1) + "else:")
        elif line == "endif":
            depth -= 1
        else:
            left, right = re.split(r" (?:[+]?=) ", line, maxsplit=1)
            target, *part = re.split(r"(?=[.\[])", left)
            lines.append(
                " " * depth + f"assign({target!r}, {''.join(part)!r}, {_expression(right)})"
            )
    return compile("\n".join(lines), text, "exec")


_compiled: dict[str, CodeType] = {}


def evaluate(name: str, **registers: int) -> dict[str, Int]:
    """What the instruction of this name leaves in the registers, given as bits."""
    values = {key: Int(x) for key, x in registers.items()}

    def assign(target, part, x):
        bits, before = _bits(x), int(values.get(target, 0))
        if match := re.search(r"\[(\d+) : (\d+)\]", part):
            high, low = int(match[1]), int(match[2])
            mask = (1 << high - low + 1) - 1 << low
            bits = before & ~mask | bits << low & mask
        elif "laneId" in part:
            bits = before & ~(1 << values["laneId"]) | (bits & 1) << values["laneId"]
        elif part:
            bits &= (1 << int(part[2:])) - 1
        values[target] = Int(bits)

    if name not in _compiled:
        _compiled[name] = _statements(TEXT[name])

    class Names(dict):
        def __missing__(self, key):
            return values[key] if key in values else _NAMES[key]

    exec(_compiled[name], {}, Names(assign=assign))
    return values
