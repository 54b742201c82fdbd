"""Scalar instructions: arithmetic, comparisons, branches.

Legend: as in memory.py.
"""

import operator

import numpy as np

from amd.decode import EXEC, VCC, Instruction
from amd.memory import Step, Waves, constant, pair, scalar


def _shift(kind: str):
    bits = np.dtype({"u": np.uint32, "i": np.int32, "U": np.uint64, "I": np.int64}[kind])
    mask = np.uint32(8 * bits.itemsize - 1)
    return lambda b: (b & mask).astype(bits)


def _carry_add(a, b, c=0):
    total = a.astype(np.uint64) + b + c
    return total.astype(np.uint32), total >> np.uint64(32) != 0


def _borrow_sub(a, b, c=0):
    return a - b - np.asarray(c, np.uint32), a.astype(np.uint64) < b.astype(np.uint64) + c


def _signed(function):
    def run(a, b):
        exact = function(a.astype(np.int64), b.astype(np.int64))
        result = exact.astype(np.int32)
        return result, result != exact

    return run


def _extract(a, b):
    """Bits of a from b[4:0] on, b[22:16] of them."""
    shift, width = b & np.uint32(31), b >> np.uint32(16) & np.uint32(127)
    mask = (np.uint64(1) << width.astype(np.uint64)) - np.uint64(1)
    return (a >> shift.astype(a.dtype)).astype(np.int64), width, mask.astype(np.int64)


def _extract_unsigned(a, b):
    x, _, mask = _extract(a, b)
    return (x & mask).astype(np.uint32)


def _extract_signed(a, b):
    x, width, mask = _extract(a, b)
    x, sign = x & mask, np.where(width > 0, np.int64(1) << (width.astype(np.int64) - 1 & 63), 0)
    return ((x ^ sign) - sign).astype(np.int32)


def _scaled_add(shift: int):
    return lambda a, b: _carry_add(a.astype(np.uint64) << np.uint64(shift), b)


def _product_high(a, b):
    return (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32)


# what becomes of SCC: it is not written, says that the result is not 0, or is the function's second result
_KEPT, _NOT_ZERO, _GIVEN = range(3)
_WITH_SCC = "with SCC"

# name -> types of the operands and the result, function, SCC
_TWO: dict[str, tuple] = {
    "S_ADD_U32": ("uuu", _carry_add, _GIVEN),
    "S_SUB_U32": ("uuu", _borrow_sub, _GIVEN),
    "S_ADD_I32": ("iii", _signed(np.add), _GIVEN),
    "S_SUB_I32": ("iii", _signed(np.subtract), _GIVEN),
    "S_ADDC_U32": ("uuu", _carry_add, _GIVEN, _WITH_SCC),
    "S_SUBB_U32": ("uuu", _borrow_sub, _GIVEN, _WITH_SCC),
    "S_MIN_I32": ("iii", lambda a, b: (np.minimum(a, b), a < b), _GIVEN),
    "S_MIN_U32": ("uuu", lambda a, b: (np.minimum(a, b), a < b), _GIVEN),
    "S_MAX_I32": ("iii", lambda a, b: (np.maximum(a, b), a >= b), _GIVEN),
    "S_MAX_U32": ("uuu", lambda a, b: (np.maximum(a, b), a >= b), _GIVEN),
    "S_MUL_I32": ("uuu", np.multiply, _KEPT),
    "S_MUL_HI_U32": ("uuu", _product_high, _KEPT),
    "S_BFE_U32": ("uuu", _extract_unsigned, _NOT_ZERO),
    "S_BFE_I32": ("iui", _extract_signed, _NOT_ZERO),
    "S_PACK_LL_B32_B16": ("uuu", lambda a, b: a & np.uint32(0xFFFF) | b << np.uint32(16), _KEPT),
}
for _kind, _size in (("u", "B32"), ("U", "B64")):
    for _name, _function in {
        "S_AND": np.bitwise_and,
        "S_OR": np.bitwise_or,
        "S_XOR": np.bitwise_xor,
        "S_ANDN2": lambda a, b: a & ~b,
        "S_ORN2": lambda a, b: a | ~b,
        "S_NAND": lambda a, b: ~(a & b),
        "S_NOR": lambda a, b: ~(a | b),
        "S_XNOR": lambda a, b: ~(a ^ b),
    }.items():
        _TWO[f"{_name}_{_size}"] = (3 * _kind, _function, _NOT_ZERO)
for _name, _kind, _function in (
    ("S_LSHL_B32", "u", np.left_shift), ("S_LSHL_B64", "U", np.left_shift),
    ("S_LSHR_B32", "u", np.right_shift), ("S_LSHR_B64", "U", np.right_shift),
    ("S_ASHR_I32", "i", np.right_shift), ("S_ASHR_I64", "I", np.right_shift),
):  # fmt: skip
    _TWO[_name] = (
        f"{_kind}u{_kind}",
        lambda a, b, f=_function, amount=_shift(_kind): f(a, amount(b)),
        _NOT_ZERO,
    )
for _shift_by in 1, 2, 3, 4:
    _TWO[f"S_LSHL{_shift_by}_ADD_U32"] = ("uuu", _scaled_add(_shift_by), _GIVEN)

_ONE: dict[str, tuple] = {
    "S_MOV_B32": ("uu", np.asarray, _KEPT),
    "S_MOV_B64": ("UU", np.asarray, _KEPT),
    "S_NOT_B32": ("uu", np.invert, _NOT_ZERO),
    "S_NOT_B64": ("UU", np.invert, _NOT_ZERO),
    "S_ABS_I32": ("ii", np.abs, _NOT_ZERO),
    "S_SEXT_I32_I16": ("uu", lambda a: a.astype(np.int16).astype(np.int32).view(np.uint32), _KEPT),
}

_COMPARISONS = {
    "EQ": operator.eq, "LG": operator.ne, "GT": operator.gt, "GE": operator.ge, "LT": operator.lt, "LE": operator.le,
}  # fmt: skip

_SAVE_EXEC = {
    "S_AND_SAVEEXEC_B64": lambda a, b: a & b,
    "S_OR_SAVEEXEC_B64": lambda a, b: a | b,
    "S_XOR_SAVEEXEC_B64": lambda a, b: a ^ b,
    "S_ANDN2_SAVEEXEC_B64": lambda a, b: a & ~b,
}


_SOURCES = "ssrc0", "ssrc1"


def _write(w: Waves, register: int, x: np.ndarray) -> None:
    x = np.asarray(x)
    if x.dtype.itemsize == 8:
        x = x.view(np.uint64)
        w.s[register], w.s[register + 1] = x.astype(np.uint32), x >> np.uint64(32)
    else:
        w.s[register] = x.view(np.uint32)
    if EXEC - 1 <= register <= EXEC + 1:
        w.update_live()


def _flag(w: Waves, x) -> None:
    w.scc = np.array(np.broadcast_to(x, w.index.shape))


def _comparison(op: Instruction):
    """Of SOPC and SOPK: types and function."""
    if op.name.startswith("S_BITCMP"):
        is_set = op.name[8] == "1"
        return "uu", lambda a, b: (a >> (b & np.uint32(31)) & np.uint32(1) != 0) == is_set
    _, kind, name, size = op.name.split("_")
    kind = {"I32": "ii", "U32": "uu", "U64": "UU"}[size]
    return kind, _COMPARISONS[name]


def build(op: Instruction) -> Step | None:
    """What a scalar instruction does, None if it is not one of these."""
    if op.form.startswith("SOPC"):
        kinds, compare = _comparison(op)
        read = [
            scalar(op.operand(name), op.literal, kind)
            for name, kind in zip(_SOURCES, kinds, strict=True)
        ]
        return lambda w: _flag(w, compare(read[0](w), read[1](w)))
    if op.form.startswith("SOPK"):
        return _with_constant(op)
    into = op.operand("sdst")
    if op.name in _SAVE_EXEC:
        function, read = _SAVE_EXEC[op.name], scalar(op.operand("ssrc0"), op.literal, "U")

        def save_exec(w: Waves) -> None:
            before = pair(w.s[EXEC], w.s[EXEC + 1])
            after = np.broadcast_to(function(read(w), before), before.shape)
            _write(w, into, before)
            _write(w, EXEC, after)
            _flag(w, after != 0)

        return save_exec
    if op.name in ("S_CSELECT_B32", "S_CSELECT_B64"):
        kind = "u" if op.name.endswith("32") else "U"
        first, second = (scalar(op.operand(x), op.literal, kind) for x in _SOURCES)
        return lambda w: _write(w, into, np.where(w.scc, first(w), second(w)))
    if op.name not in _TWO and op.name not in _ONE:
        return None
    kinds, function, flag, *with_scc = (_TWO | _ONE)[op.name]
    sources = [op.operand(x) for x in _SOURCES[: len(kinds) - 1]]
    read = [scalar(x, op.literal, kind) for x, kind in zip(sources, kinds, strict=False)]
    # constants alone give no array
    is_constant = all(constant(x, op.literal, "u") is not None for x in sources)

    def step(w: Waves) -> None:
        operands = [x(w) for x in read]
        if is_constant:
            operands = [np.broadcast_to(x, w.index.shape) for x in operands]
        if with_scc:
            operands.append(w.scc)
        result = function(*operands)
        if flag == _GIVEN:
            result, scc = result
            _flag(w, scc)
        elif flag == _NOT_ZERO:
            _flag(w, result != 0)
        _write(w, into, result)

    return step


def _with_constant(op: Instruction) -> Step | None:
    """SOPK: the second operand is in the instruction."""
    into, x = op.operand("sdst"), op.field("simm16")
    signed = np.int32((x ^ 0x8000) - 0x8000)
    if op.name == "S_MOVK_I32":
        return lambda w: _write(w, into, np.broadcast_to(signed, w.index.shape))
    if op.name == "S_MULK_I32":
        return lambda w: _write(w, into, w.s[into].view(np.int32) * signed)
    if op.name == "S_ADDK_I32":

        def step(w: Waves) -> None:
            result, scc = _signed(np.add)(w.s[into].view(np.int32), signed)
            _write(w, into, result)
            _flag(w, scc)

        return step
    if op.name.startswith("S_CMPK_"):
        _, _, name, size = op.name.split("_")
        compare, value = _COMPARISONS[name], signed if size == "I32" else np.uint32(x)
        return lambda w: _flag(w, compare(w.s[into].view(value.dtype), value))
    return None


# names of branches -> which waves take them
BRANCHES = {
    "S_BRANCH": lambda w: np.ones(len(w.index), bool),
    "S_CBRANCH_SCC0": lambda w: ~w.scc,
    "S_CBRANCH_SCC1": lambda w: w.scc,
    "S_CBRANCH_VCCZ": lambda w: w.s[VCC] | w.s[VCC + 1] == 0,
    "S_CBRANCH_VCCNZ": lambda w: w.s[VCC] | w.s[VCC + 1] != 0,
    "S_CBRANCH_EXECZ": lambda w: ~w.live.any(1),
    "S_CBRANCH_EXECNZ": lambda w: w.live.any(1),
}


def branch_target(op: Instruction) -> int:
    return op.pc + 4 + 4 * ((op.field("simm16") ^ 0x8000) - 0x8000)
