"""Vector instructions: how their operands are read, what they compute, how results are written.

Legend: as in registers.py.
"""

import operator
from collections.abc import Callable

import numpy as np

from amd import arithmetic as ar
from amd.decode import ACCUMULATORS, FIRST_VECTOR, LITERAL, VCC, Instruction
from amd.exchange import dpp, lane_access, swap
from amd.registers import Read, Step, Waves, vector

_U = np.uint32


def _same(a):
    return a


def _left(a, b):
    return b << a % (8 * b.dtype.itemsize)


def _right(a, b):
    return b >> (a % (8 * b.dtype.itemsize)).astype(b.dtype)


# name -> types of the operands, then of the result; function
TABLE: dict[str, tuple[str, Callable]] = {
    "V_MOV_B32": ("uu", _same), "V_MOV_B64": ("UU", _same), "V_NOT_B32": ("uu", np.invert),
    "V_BFREV_B32": ("uu", ar.reversed_bits),
    "V_AND_B32": ("uuu", np.bitwise_and), "V_OR_B32": ("uuu", np.bitwise_or), "V_XOR_B32": ("uuu", np.bitwise_xor),
    "V_OR3_B32": ("uuuu", lambda a, b, c: a | b | c),
    "V_AND_OR_B32": ("uuuu", lambda a, b, c: a & b | c),
    "V_BFI_B32": ("uuuu", lambda a, b, c: a & b | ~a & c),
    "V_PERM_B32": ("uuuu", ar.permuted_bytes),
    "V_BFE_U32": ("uuuu", ar.bit_field), "V_BFE_I32": ("iuui", ar.bit_field),
    "V_LSHLREV_B16": ("www", _left), "V_LSHLREV_B32": ("uuu", _left), "V_LSHLREV_B64": ("uUU", _left),
    "V_LSHRREV_B32": ("uuu", _right), "V_LSHRREV_B64": ("uUU", _right), "V_ASHRREV_I32": ("uii", _right),
    "V_LSHL_OR_B32": ("uuuu", lambda a, b, c: _left(b, a) | c),
    "V_LSHL_ADD_U32": ("uuuu", lambda a, b, c: _left(b, a) + c),
    "V_ADD_LSHL_U32": ("uuuu", lambda a, b, c: _left(c, a + b)),
    "V_LSHL_ADD_U64": ("UuUU", lambda a, b, c: (a << (b & _U(7)).astype(np.uint64)) + c),
    "V_ADD_U32": ("uuu", np.add), "V_SUB_U32": ("uuu", np.subtract), "V_SUBREV_U32": ("uuu", lambda a, b: b - a),
    "V_ADD3_U32": ("uuuu", lambda a, b, c: a + b + c),
    "V_XAD_U32": ("uuuu", lambda a, b, c: (a ^ b) + c),
    "V_MUL_LO_U32": ("uuu", np.multiply),
    "V_MUL_HI_U32": ("uuu", lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(_U)),
    "V_MUL_I32_I24": ("iii", lambda a, b: (a << 8 >> 8) * (b << 8 >> 8)),
    "V_MAD_I32_I24": ("iiii", lambda a, b, c: (a << 8 >> 8) * (b << 8 >> 8) + c),
    "V_MUL_U32_U24": ("uuu", lambda a, b: (a & _U(0xFFFFFF)) * (b & _U(0xFFFFFF))),
    "V_MAD_U32_U24": ("uuuu", lambda a, b, c: (a & _U(0xFFFFFF)) * (b & _U(0xFFFFFF)) + c),
    "V_MIN_I32": ("iii", np.minimum), "V_MAX_I32": ("iii", np.maximum),
    "V_MIN_U32": ("uuu", np.minimum), "V_MAX_U32": ("uuu", np.maximum),
    "V_ADD_F32": ("fff", np.add), "V_SUB_F32": ("fff", np.subtract), "V_SUBREV_F32": ("fff", lambda a, b: b - a),
    "V_MUL_F32": ("fff", np.multiply), "V_FMA_F32": ("ffff", ar.fma),
    "V_MAX_F32": ("fff", ar.maximum), "V_MIN_F32": ("fff", ar.minimum),
    "V_MAX3_F32": ("ffff", lambda a, b, c: ar.maximum(ar.maximum(a, b), c)),
    "V_MIN3_F32": ("ffff", lambda a, b, c: ar.minimum(ar.minimum(a, b), c)),
    "V_MAXIMUM3_F32": ("ffff", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "V_MED3_F32": ("ffff", ar.median),
    "V_TRUNC_F32": ("ff", np.trunc),
    "V_LDEXP_F32": ("fif", lambda a, b: np.ldexp(a, np.clip(b, -400, 400))),
    "V_EXP_F32": ("ff", ar.exp2), "V_LOG_F32": ("ff", ar.log2),
    "V_RCP_F32": ("ff", ar.reciprocal), "V_RCP_IFLAG_F32": ("ff", ar.reciprocal),
    "V_DIV_FIXUP_F32": ("ffff", ar.div_fixup),
    "V_CVT_F32_U32": ("uf", lambda a: a.astype(np.float32)), "V_CVT_F32_I32": ("if", lambda a: a.astype(np.float32)),
    "V_CVT_U32_F32": ("fu", ar.to_unsigned),
    "V_CVT_F32_F16": ("hf", lambda a: a.astype(np.float32)), "V_CVT_F16_F32": ("fh", lambda a: a.astype(np.float16)),
    "V_CVT_PK_BF16_F32": ("ffu", lambda a, b: ar.bfloat16(a) | ar.bfloat16(b) << _U(16)),
    "V_CVT_PK_F16_F32": ("ffu", lambda a, b: ar.packed_halves(a.astype(np.float16), b.astype(np.float16))),
    "V_PACK_B32_F16": ("hhu", ar.packed_halves),
}  # fmt: skip


def _differs(a, b):
    return (a < b) | (a > b)


COMPARISONS = {
    "LT": operator.lt, "EQ": operator.eq, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne,
    # N of floats: not, so true of NaN
    "LG": _differs, "NLG": lambda a, b: ~_differs(a, b), "NEQ": operator.ne, "NLT": lambda a, b: ~(a < b),
    "NLE": lambda a, b: ~(a <= b), "NGT": lambda a, b: ~(a > b), "NGE": lambda a, b: ~(a >= b),
    "O": lambda a, b: (a == a) & (b == b), "U": lambda a, b: (a != a) | (b != b),
}  # fmt: skip
KINDS = {"F32": "f", "F16": "h", "I32": "i", "U32": "u", "U16": "w", "U64": "U"}


def _selection(number: int, is_signed: bool) -> Callable | None:
    """What takes a byte (0 to 3) or a half (4, 5) out of 32 bits, None for all of them (6)."""
    if number == 6:
        return None
    size = 8 if number < 4 else 16
    shift, mask, sign = _U(size * (number & 3)), _U((1 << size) - 1), _U(1 << size - 1)
    if is_signed:
        return lambda x: ((x >> shift & mask) ^ sign) - sign
    return lambda x: x >> shift & mask


def _modified(read: Read, is_absolute: int, is_negative: int) -> Read:
    if is_absolute:
        return (lambda w: -np.abs(read(w))) if is_negative else lambda w: np.abs(read(w))
    return (lambda w: -read(w)) if is_negative else read


def _operands(op: Instruction, kinds: str) -> list[Read]:
    """What reads the operands of these types, with the modifiers of the encoding."""
    reads = []
    is_vop3 = op.form in ("VOP3", "VOP3SD", "VOP3_SDST")
    for i, kind in enumerate(kinds):
        number, select = op.operand(*(f"vsrc{i}", f"src{i}")), None
        if "SDWA" in op.form:
            select = _selection(op.field(f"src{i}_sel"), bool(op.field(f"src{i}_sext")))
            # a bit says that the operand is a scalar register
            number -= FIRST_VECTOR * op.field(f"s{i}")
        elif is_vop3 and kind in "wh" and op.field("opsel") >> i & 1:
            select = _selection(5, False)
        read = vector(number, kind, op.literal, select)
        if kind in "fh":
            bits = [op.field(x) >> i & 1 for x in ("abs", "neg")]
            read = _modified(
                read, *bits if is_vop3 else (op.field(f"src{i}_{x}") for x in ("abs", "neg"))
            )
        reads.append(read)
    return reads


def _finish(op: Instruction, kind: str) -> Callable:
    """Applies the output modifiers and gives bits that `Waves.set_vector` takes."""
    steps = []
    if kind == "f" and op.field("omod"):
        factor = np.float32({1: 2.0, 2: 4.0, 3: 0.5}[op.field("omod")])
        steps.append(lambda x: x * factor)
    if op.field("clmp"):
        assert kind == "f", "a clamp of a type that is not float32"
        steps.append(lambda x: np.clip(np.where(np.isnan(x), np.float32(0), x), 0, 1))
    if kind in "wh":
        assert op.field("opsel") < 8, "a result in the upper half"
        steps.append(lambda x: np.asarray(x).view(np.uint16).astype(_U))
    if op.field("dst_sel", 6) != 6:
        assert op.field("dst_unused") == 0, "a result that keeps bits of the register"
        size, index = 8 if op.field("dst_sel") < 4 else 16, op.field("dst_sel") & 3
        steps.append(lambda x: (np.asarray(x).view(_U) & _U((1 << size) - 1)) << _U(size * index))

    def run(x):
        for step in steps:
            x = step(x)
        return x

    return run if steps else _same


def build(op: Instruction) -> Step | None:
    """What a vector instruction does, None if it has no meaning here."""
    for builder in (swap, lane_access, _compare, _with_carry, _packed, _mixed, _accumulator_moves):
        if (step := builder(op)) is not None:
            return step
    kinds, function, more = _with_more(op) or (*TABLE.get(op.name, ("", _same)), [])
    if not kinds:
        return None
    into, finish = op.operand("vdst") - FIRST_VECTOR, _finish(op, kinds[-1])
    reads = _operands(op, kinds[:-1]) + more
    if "DPP" not in op.form:
        return lambda w: w.set_vector(into, finish(function(*(x(w) for x in reads))))
    read_first = dpp(op)
    assert op.field("src0_abs") == op.field("src0_neg") == 0, "a modifier"
    dtype = np.dtype({"i": np.int32, "f": np.float32}.get(kinds[0], np.uint32))

    def from_other_lanes(w: Waves) -> None:
        x, live = read_first(w)
        w.set_vector(into, finish(function(x.view(dtype), *(y(w) for y in reads[1:]))), live)

    return from_other_lanes


def _with_more(op: Instruction) -> tuple[str, Callable, list[Read]] | None:
    """Instructions that take more than their operands: types, function, what reads the further arguments."""
    if op.name == "V_CNDMASK_B32":
        register = op.operand("src2") if op.form == "VOP3" else VCC
        return "fff", lambda a, b, m: np.where(m, b, a), [lambda w: w.mask(register)]
    if op.name == "V_BITOP3_B32":
        # the table is in the bits that hold modifiers elsewhere
        return (
            "uuuu",
            ar.bit_table(op.field("omod") << 6 | op.field("abs") << 3 | op.field("neg")),
            [],
        )
    if op.name == "V_DIV_FMAS_F32":
        return "ffff", ar.div_fmas, [lambda w: w.mask(VCC)]
    if op.name == "V_FMAC_F32":
        return "fff", ar.fma, [vector(op.operand("vdst"), "f")]
    if op.name in ("V_FMAMK_F32", "V_MADMK_F32"):
        fma = ar.fma if op.name == "V_FMAMK_F32" else lambda a, b, c: a * b + c
        return "fff", lambda a, c, b: fma(a, b, c), [vector(LITERAL, "f", op.literal)]
    return None


def _compare(op: Instruction) -> Step | None:
    """V_CMP_*: a bit of a pair of scalar registers for each lane, 0 for those that do not execute."""
    if not op.name.startswith("V_CMP_"):
        return None
    _, _, name, kind = op.name.split("_")
    if name not in COMPARISONS or kind not in KINDS:
        return None
    compare, (a, b) = COMPARISONS[name], _operands(op, 2 * KINDS[kind])
    into = op.operand("vdst") if op.form == "VOP3_SDST" else VCC
    if op.field("sd"):
        into = op.operand("sdst")
    return lambda w: w.set_mask(into, compare(a(w), b(w)) & w.live)


def _with_carry(op: Instruction) -> Step | None:
    """Additions and subtractions with carries of lanes, V_MAD_U64_U32 and V_DIV_SCALE_F32."""
    names = {"V_ADD_CO_U32": 1, "V_ADDC_CO_U32": 1, "V_SUB_CO_U32": -1, "V_SUBB_CO_U32": -1}
    if op.name == "V_DIV_SCALE_F32":
        reads, function = _operands(op, "fff"), ar.div_scale
    elif op.name == "V_MAD_U64_U32":
        reads, function = _operands(op, "uuU"), ar.multiply_add
    elif op.name in names:
        reads, sign = _operands(op, "uu"), np.int64(names[op.name])
        if op.name[5] in "CB":
            carry_in = VCC if op.form.startswith("VOP2") else op.operand("src2")
            reads.append(lambda w: w.mask(carry_in))

        def function(a, b, carry=0):
            total = a.astype(np.int64) + sign * (b.astype(np.int64) + carry)
            return total.astype(_U), (total < 0) | (total >= 1 << 32)

    else:
        return None
    into = op.operand("vdst") - FIRST_VECTOR
    carry_out = op.operand("sdst") if op.has("sdst") else VCC

    def step(w: Waves) -> None:
        result, carry = function(*(x(w) for x in reads))
        w.set_vector(into, result)
        w.set_mask(carry_out, carry & w.live)

    return step


def _packed(op: Instruction) -> Step | None:
    """V_PK_*_F32 and V_PK_MOV_B32: two results from pairs of registers."""
    functions = {"V_PK_ADD_F32": np.add, "V_PK_MUL_F32": np.multiply, "V_PK_FMA_F32": ar.fma}
    if op.name not in functions and op.name != "V_PK_MOV_B32":
        return None
    into, function = op.operand("vdst") - FIRST_VECTOR, functions.get(op.name)

    def read(i: int, is_high: int) -> Read:
        number = op.operand(f"src{i}")
        chosen = op.field("opsel_hi") | op.field("opsel_hi2") << 2 if is_high else op.field("opsel")
        if number < 128 or number >= FIRST_VECTOR:
            number += chosen >> i & 1
        negated = op.field("neg_hi" if is_high else "neg") >> i & 1
        return _modified(vector(number, "f" if function else "u"), False, negated)

    if function is None:
        # the first operand gives the lower half of the result, the second the upper one, both by the lower bits
        low, high = read(0, 0), read(1, 0)
    else:
        reads = [[read(i, x) for i in range(3 if function is ar.fma else 2)] for x in (0, 1)]
        low, high = (lambda w, x=x: function(*(y(w) for y in x)) for x in reads)

    def step(w: Waves) -> None:
        # the first result may overwrite the register that the second is
        a, b = low(w), np.array(high(w))
        w.set_vector(into, a)
        w.set_vector(into + 1, b)

    return step


def _mixed(op: Instruction) -> Step | None:
    """V_FMA_MIX*: an fma whose operands are float32 or halves of registers."""
    if not op.name.startswith("V_FMA_MIX"):
        return None
    into, reads = op.operand("vdst") - FIRST_VECTOR, []
    is_half = op.field("opsel_hi") | op.field("opsel_hi2") << 2
    assert op.field("clmp") == 0, "a clamp"
    for i in range(3):
        number, select = op.operand(f"src{i}"), _selection(4 + (op.field("opsel") >> i & 1), False)
        read = vector(number, "h", None, select) if is_half >> i & 1 else vector(number, "f")
        reads.append(_modified(read, op.field("neg_hi") >> i & 1, op.field("neg") >> i & 1))

    def step(w: Waves) -> None:
        x = ar.fma(*(x(w).astype(np.float32) for x in reads))
        if op.name != "V_FMA_MIX_F32":
            half = x.astype(np.float16).view(np.uint16).astype(_U)
            low, high = w.v[into] & _U(0xFFFF), w.v[into] & _U(0xFFFF0000)
            x = high | half if op.name == "V_FMA_MIXLO_F16" else half << _U(16) | low
        w.set_vector(into, x)

    return step


def _accumulator_moves(op: Instruction) -> Step | None:
    """V_ACCVGPR_READ, _WRITE, _MOV_B32."""
    if not op.name.startswith("V_ACCVGPR_"):
        return None
    into, number = op.operand("vdst") - FIRST_VECTOR, op.operand("src0")
    into += ACCUMULATORS * ("READ" not in op.name)
    read = vector(number + ACCUMULATORS * ("WRITE" not in op.name), "u")
    return lambda w: w.set_vector(into, read(w))
