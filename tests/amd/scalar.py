"""Scalar instructions: arithmetic, comparisons, branches.

Legend: as in registers.py.
"""

import operator

import numpy as np

from amd.decode import EXEC, VCC, Instruction
from amd.registers import Step, Waves, pair, scalar


def _carry_add(a, b, c=0):
    total = a.astype(np.uint64) + b + c
    return total.astype(np.uint32), total >> np.uint64(32) != 0


def _borrow_sub(a, b, c=0):
    total = a.astype(np.uint64) - b - c
    return total.astype(np.uint32), total >> np.uint64(32) != 0


def _checked(function):
    """Of signed numbers, and whether the result overflows."""

    def run(a, b):
        exact = function(a.astype(np.int64), b.astype(np.int64))
        return exact.astype(np.int32), exact.astype(np.int32) != exact

    return run


def _bit_field(a, b):
    """b[22:16] bits of a from b[4:0] on, extended by the sign of the type of a."""
    width = np.minimum(b >> np.uint32(16) & np.uint32(127), 32).astype(np.int64)
    x = (a >> (b & np.uint32(31)).astype(a.dtype)).astype(np.int64)
    x &= (np.int64(1) << width) - 1
    if a.dtype == np.int32:
        sign = np.where(width > 0, np.int64(1) << (width - 1 & 31), 0)
        x = (x ^ sign) - sign
    return x.astype(a.dtype)


def _shifted(shift):
    return lambda a, b: shift(a, (b & np.uint32(8 * a.dtype.itemsize - 1)).astype(a.dtype))


def _scaled_add(amount: int):
    return lambda a, b: _carry_add(a.astype(np.uint64) << np.uint64(amount), b)


# what becomes of SCC: nothing, it says that the result is not 0, or it is the function's second result, which may also
# take it
_KEPT, _NOT_ZERO, _GIVEN, _CARRIED = range(4)

# name -> types of the operands, then of the result; function; SCC
TABLE = {
    "S_MOV_B32": ("uu", np.copy, _KEPT),
    "S_MOV_B64": ("UU", np.copy, _KEPT),
    "S_NOT_B32": ("uu", np.invert, _NOT_ZERO),
    "S_NOT_B64": ("UU", np.invert, _NOT_ZERO),
    "S_ABS_I32": ("ii", np.abs, _NOT_ZERO),
    "S_ADD_U32": ("uuu", _carry_add, _GIVEN),
    "S_SUB_U32": ("uuu", _borrow_sub, _GIVEN),
    "S_ADDC_U32": ("uuu", _carry_add, _CARRIED),
    "S_SUBB_U32": ("uuu", _borrow_sub, _CARRIED),
    "S_ADD_I32": ("iii", _checked(np.add), _GIVEN),
    "S_SUB_I32": ("iii", _checked(np.subtract), _GIVEN),
    "S_MIN_I32": ("iii", lambda a, b: (np.minimum(a, b), a < b), _GIVEN),
    "S_MAX_I32": ("iii", lambda a, b: (np.maximum(a, b), a >= b), _GIVEN),
    "S_MIN_U32": ("uuu", lambda a, b: (np.minimum(a, b), a < b), _GIVEN),
    "S_MAX_U32": ("uuu", lambda a, b: (np.maximum(a, b), a >= b), _GIVEN),
    "S_MUL_I32": ("uuu", np.multiply, _KEPT),
    "S_MUL_HI_U32": ("uuu", lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32), _KEPT),
    "S_BFE_U32": ("uuu", _bit_field, _NOT_ZERO),
    "S_BFE_I32": ("iui", _bit_field, _NOT_ZERO),
    "S_LSHL_B32": ("uuu", _shifted(np.left_shift), _NOT_ZERO),
    "S_LSHL_B64": ("UuU", _shifted(np.left_shift), _NOT_ZERO),
    "S_LSHR_B32": ("uuu", _shifted(np.right_shift), _NOT_ZERO),
    "S_LSHR_B64": ("UuU", _shifted(np.right_shift), _NOT_ZERO),
    "S_ASHR_I32": ("iui", _shifted(np.right_shift), _NOT_ZERO),
    "S_ASHR_I64": ("IuI", _shifted(np.right_shift), _NOT_ZERO),
}  # fmt: skip
TABLE |= {f"S_LSHL{i}_ADD_U32": ("uuu", _scaled_add(i), _GIVEN) for i in range(1, 5)}
_BITWISE = {
    "AND": np.bitwise_and, "OR": np.bitwise_or, "XOR": np.bitwise_xor, "ANDN2": lambda a, b: a & ~b,
    "ORN2": lambda a, b: a | ~b,
}  # fmt: skip
for _name, _function in _BITWISE.items():
    TABLE[f"S_{_name}_B32"] = "uuu", _function, _NOT_ZERO
    TABLE[f"S_{_name}_B64"] = "UUU", _function, _NOT_ZERO

COMPARISONS = {
    "EQ": operator.eq, "LG": operator.ne, "GT": operator.gt, "GE": operator.ge, "LT": operator.lt, "LE": operator.le,
}  # fmt: skip


def _set_scc(w: Waves, x: np.ndarray) -> None:
    w.scc = np.array(np.broadcast_to(x, w.scc.shape))


def build(op: Instruction) -> Step | None:
    """What a scalar instruction does, None if it has no meaning here."""
    if op.form.startswith("SOPC"):
        return _compare(op)
    into = op.operand("sdst")
    if op.form.startswith("SOPK"):
        return _with_constant(op, into)
    if op.name.endswith("_SAVEEXEC_B64"):
        return _save_exec(op, into)
    if op.name in ("S_CSELECT_B32", "S_CSELECT_B64"):
        a, b = (scalar(op, x, "u" if op.name.endswith("32") else "U") for x in ("ssrc0", "ssrc1"))
        return lambda w: w.set_scalar(into, np.where(w.scc, a(w), b(w)))
    if op.name not in TABLE:
        return None
    kinds, function, flag = TABLE[op.name]
    reads = [scalar(op, f"ssrc{i}", kind) for i, kind in enumerate(kinds[:-1])]

    def step(w: Waves) -> None:
        operands = [np.broadcast_to(x(w), w.scc.shape) for x in reads]
        result = function(*operands, w.scc) if flag == _CARRIED else function(*operands)
        if flag in (_GIVEN, _CARRIED):
            result, scc = result
            _set_scc(w, scc)
        elif flag == _NOT_ZERO:
            _set_scc(w, result != 0)
        w.set_scalar(into, result)

    return step


def _compare(op: Instruction) -> Step | None:
    """S_CMP_*, S_BITCMP*."""
    if op.name.startswith("S_BITCMP"):
        a, b = (scalar(op, x, "u") for x in ("ssrc0", "ssrc1"))
        is_set = op.name == "S_BITCMP1_B32"
        return lambda w: _set_scc(w, (a(w) >> (b(w) & np.uint32(31)) & np.uint32(1) != 0) == is_set)
    _, _, name, kind = op.name.split("_")
    compare = COMPARISONS[name]
    a, b = (scalar(op, x, {"I32": "i", "U32": "u", "U64": "U"}[kind]) for x in ("ssrc0", "ssrc1"))
    return lambda w: _set_scc(w, compare(a(w), b(w)))


def _with_constant(op: Instruction, into: int) -> Step | None:
    """SOPK: the second operand is in the instruction."""
    x = np.int32((op.field("simm16") ^ 0x8000) - 0x8000)
    if op.name == "S_MOVK_I32":
        return lambda w: w.set_scalar(into, x)
    if op.name == "S_MULK_I32":
        return lambda w: w.set_scalar(into, w.s[into].view(np.int32) * x)
    if op.name != "S_ADDK_I32":
        return None

    def step(w: Waves) -> None:
        result, overflows = _checked(np.add)(w.s[into].view(np.int32), x)
        w.set_scalar(into, result)
        _set_scc(w, overflows)

    return step


def _save_exec(op: Instruction, into: int) -> Step | None:
    """S_*_SAVEEXEC_B64: sets EXEC and keeps what it was."""
    function, read = _BITWISE.get(op.name.split("_")[1]), scalar(op, "ssrc0", "U")
    if function is None:
        return None

    def step(w: Waves) -> None:
        before = pair(w.s[EXEC], w.s[EXEC + 1])
        after = np.broadcast_to(function(read(w), before), before.shape)
        w.set_scalar(into, before)
        w.set_scalar(EXEC, after)
        _set_scc(w, after != 0)

    return step


# names of branches -> which waves take them
BRANCHES = {
    "S_BRANCH": lambda w: np.ones(w.scc.shape, bool),
    "S_CBRANCH_SCC0": lambda w: ~w.scc,
    "S_CBRANCH_SCC1": lambda w: w.scc,
    "S_CBRANCH_VCCZ": lambda w: w.s[VCC] | w.s[VCC + 1] == 0,
    "S_CBRANCH_VCCNZ": lambda w: w.s[VCC] | w.s[VCC + 1] != 0,
    "S_CBRANCH_EXECZ": lambda w: ~w.live.any(1),
    "S_CBRANCH_EXECNZ": lambda w: w.live.any(1),
}


def branch_target(op: Instruction) -> int:
    return op.pc + 4 + 4 * ((op.field("simm16") ^ 0x8000) - 0x8000)
