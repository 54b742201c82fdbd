"""Vector instructions: how their operands are read, what they compute, how results are written.

Legend: as in memory.py; letters for types of operands as in its table TYPES.
"""

import operator
from collections.abc import Callable

import numpy as np

from amd import arithmetic as ar
from amd.decode import ACCUMULATORS, FIRST_VECTOR, VCC, Instruction
from amd.exchange import dpp, lane_access, swap
from amd.memory import Step, Waves, vector

_U = np.uint32
_FIVE, _SIX = _U(31), _U(63)


def _same(a):
    return a


def _halves(a, b):
    low, high = (np.asarray(x).view(np.uint16).astype(np.uint32) for x in (a, b))
    return low | high << _U(16)


# name -> types of the operands, then of the result; function
_TABLE: dict[str, tuple[str, Callable]] = {
    "V_MOV_B32": ("uu", _same),
    "V_MOV_B64": ("UU", _same),
    "V_NOT_B32": ("uu", np.invert),
    "V_BFREV_B32": ("uu", lambda a: np.flip(np.packbits(np.unpackbits(
        np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1), axis=-1, bitorder="little"), -1).copy().view(_U)[..., 0]),
    "V_AND_B32": ("uuu", np.bitwise_and),
    "V_OR_B32": ("uuu", np.bitwise_or),
    "V_XOR_B32": ("uuu", np.bitwise_xor),
    "V_XNOR_B32": ("uuu", lambda a, b: ~(a ^ b)),
    "V_OR3_B32": ("uuuu", lambda a, b, c: a | b | c),
    "V_AND_OR_B32": ("uuuu", lambda a, b, c: a & b | c),
    "V_BFI_B32": ("uuuu", lambda a, b, c: a & b | ~a & c),
    "V_PERM_B32": ("uuuu", ar.permuted_bytes),
    "V_BFE_U32": ("uuuu", ar.field),
    "V_BFE_I32": ("iuui", ar.field),
    "V_LSHLREV_B32": ("uuu", lambda a, b: b << (a & _FIVE)),
    "V_LSHRREV_B32": ("uuu", lambda a, b: b >> (a & _FIVE)),
    "V_ASHRREV_I32": ("uii", lambda a, b: b >> (a & _FIVE).astype(np.int32)),
    "V_LSHLREV_B64": ("uUU", lambda a, b: b << (a & _SIX).astype(np.uint64)),
    "V_LSHRREV_B64": ("uUU", lambda a, b: b >> (a & _SIX).astype(np.uint64)),
    "V_ASHRREV_I64": ("uII", lambda a, b: b >> (a & _SIX).astype(np.int64)),
    "V_LSHLREV_B16": ("www", lambda a, b: b << (a & np.uint16(15))),
    "V_LSHRREV_B16": ("www", lambda a, b: b >> (a & np.uint16(15))),
    "V_LSHL_OR_B32": ("uuuu", lambda a, b, c: a << (b & _FIVE) | c),
    "V_LSHL_ADD_U32": ("uuuu", lambda a, b, c: (a << (b & _FIVE)) + c),
    "V_ADD_LSHL_U32": ("uuuu", lambda a, b, c: a + b << (c & _FIVE)),
    "V_LSHL_ADD_U64": ("UuUU", lambda a, b, c: (a << (b & _U(7)).astype(np.uint64)) + c),
    "V_ADD_U32": ("uuu", np.add),
    "V_SUB_U32": ("uuu", np.subtract),
    "V_SUBREV_U32": ("uuu", lambda a, b: b - a),
    "V_ADD3_U32": ("uuuu", lambda a, b, c: a + b + c),
    "V_XAD_U32": ("uuuu", lambda a, b, c: (a ^ b) + c),
    "V_MUL_LO_U32": ("uuu", np.multiply),
    "V_MUL_HI_U32": ("uuu", lambda a, b: (np.uint64(a) * np.uint64(b) >> np.uint64(32)).astype(_U)),
    "V_MUL_U32_U24": ("uuu", lambda a, b: (a & _U(0xFFFFFF)) * (b & _U(0xFFFFFF))),
    "V_MAD_U32_U24": ("uuuu", lambda a, b, c: (a & _U(0xFFFFFF)) * (b & _U(0xFFFFFF)) + c),
    "V_MIN_I32": ("iii", np.minimum),
    "V_MAX_I32": ("iii", np.maximum),
    "V_MIN_U32": ("uuu", np.minimum),
    "V_MAX_U32": ("uuu", np.maximum),
    "V_ADD_F32": ("fff", np.add),
    "V_SUB_F32": ("fff", np.subtract),
    "V_SUBREV_F32": ("fff", lambda a, b: b - a),
    "V_MUL_F32": ("fff", np.multiply),
    "V_FMA_F32": ("ffff", ar.fma),
    "V_MAX_F32": ("fff", ar.maximum),
    "V_MIN_F32": ("fff", ar.minimum),
    "V_MAX3_F32": ("ffff", lambda a, b, c: ar.maximum(ar.maximum(a, b), c)),
    "V_MIN3_F32": ("ffff", lambda a, b, c: ar.minimum(ar.minimum(a, b), c)),
    "V_MED3_F32": ("ffff", lambda a, b, c: np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))),
    "V_MAXIMUM3_F32": ("ffff", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "V_MINIMUM3_F32": ("ffff", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "V_TRUNC_F32": ("ff", np.trunc),
    "V_RNDNE_F32": ("ff", np.rint),
    "V_FLOOR_F32": ("ff", np.floor),
    "V_LDEXP_F32": ("fif", lambda a, b: np.ldexp(a, np.clip(b, -400, 400))),
    "V_EXP_F32": ("ff", ar.exp2),
    "V_LOG_F32": ("ff", ar.log2),
    "V_RCP_F32": ("ff", ar.reciprocal),
    "V_RCP_IFLAG_F32": ("ff", ar.reciprocal),
    "V_DIV_FIXUP_F32": ("ffff", ar.div_fixup),
    "V_CVT_F32_U32": ("uf", lambda a: a.astype(np.float32)),
    "V_CVT_F32_I32": ("if", lambda a: a.astype(np.float32)),
    "V_CVT_U32_F32": ("fu", ar.to_unsigned),
    "V_CVT_I32_F32": ("fi", ar.to_signed),
    "V_CVT_F32_F16": ("hf", lambda a: a.astype(np.float32)),
    "V_CVT_F16_F32": ("fh", lambda a: a.astype(np.float16)),
    "V_CVT_PK_BF16_F32": ("ffu", lambda a, b: ar.bfloat16(a) | ar.bfloat16(b) << _U(16)),
    "V_PACK_B32_F16": ("hhu", _halves),
}  # fmt: skip

_COMPARISONS = {
    "LT": operator.lt, "EQ": operator.eq, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne,
    # ordered and different; operator.ne is true of NaN
    "LG": lambda a, b: (a < b) | (a > b), "NEQ": operator.ne, "NLG": lambda a, b: ~((a < b) | (a > b)),
    "NLT": lambda a, b: ~(a < b), "NLE": lambda a, b: ~(a <= b), "NGT": lambda a, b: ~(a > b), "NGE": lambda a, b: ~(a >= b),
    "O": lambda a, b: (a == a) & (b == b), "U": lambda a, b: (a != a) | (b != b),
}  # fmt: skip
_KINDS = {
    "F32": "f", "F16": "h", "F64": "d", "I32": "i", "U32": "u", "U16": "w", "I64": "I", "U64": "U",
}  # fmt: skip


def _select(read: Callable, selection: int, is_signed: bool) -> Callable:
    """A byte (0 to 3), a half (4 and 5) or all (6) of a register, as SDWA reads it."""
    if selection == 6:
        return read
    size = 8 if selection < 4 else 16
    shift, mask = _U(size * (selection & 3)), _U((1 << size) - 1)
    sign = _U(1 << size - 1)
    if is_signed:
        return lambda w: ((read(w) >> shift & mask) ^ sign) - sign
    return lambda w: read(w) >> shift & mask


def _cast(read: Callable, kind: str) -> Callable:
    """An operand of 32 bits as its type."""
    if kind == "u":
        return read
    dtype = {"i": np.int32, "f": np.float32, "w": np.uint16, "h": np.float16}[kind]
    if kind in "wh":
        return lambda w: read(w).astype(np.uint16).view(dtype)
    return lambda w: read(w).view(dtype)


def _modified(read: Callable, is_absolute: bool, is_negative: bool) -> Callable:
    if is_absolute and is_negative:
        return lambda w: -np.abs(read(w))
    if is_absolute:
        return lambda w: np.abs(read(w))
    return (lambda w: -read(w)) if is_negative else read


def operands(op: Instruction, kinds: str) -> list[Callable[[Waves], np.ndarray]]:
    """What reads the operands of these types, with the modifiers of the encoding."""
    form = op.form
    names = [("vsrc0", "src0"), ("vsrc1", "src1"), ("src2",)]
    reads = []
    for i, kind in enumerate(kinds):
        number = op.operand(*names[i])
        is_half = kind in "wh" and op.field("opsel") >> i & 1 and form.startswith("VOP3")
        if "SDWA" in form:
            # a bit of the encoding says that the operand is a scalar register
            if op.field(f"s{i}"):
                number -= FIRST_VECTOR
            read = _select(
                vector(number, None, "u"), op.field(f"src{i}_sel"), bool(op.field(f"src{i}_sext"))
            )
            read = _cast(read, kind)
        elif is_half:
            read = _cast(_select(vector(number, op.literal, "u"), 5, False), kind)
        else:
            read = vector(number, op.literal, kind)
        if kind in "fhd":
            bits = [op.field(f"src{i}_{x}") for x in ("abs", "neg")]
            if form in ("VOP3", "VOP3SD", "VOP3_SDST"):
                bits = [op.field(x) >> i & 1 for x in ("abs", "neg")]
            read = _modified(read, *map(bool, bits))
        reads.append(read)
    return reads


def _outputs(op: Instruction, kind: str) -> Callable:
    """Applies the output modifiers and gives bits that `Waves.set_vector` takes."""
    steps = []
    if kind == "f" and op.field("omod"):
        factor = np.float32({1: 2.0, 2: 4.0, 3: 0.5}[op.field("omod")])
        steps.append(lambda x: x * factor)
    if op.field("clmp"):
        assert kind == "f", "an integer clamp"
        steps.append(lambda x: np.clip(np.where(np.isnan(x), np.float32(0), x), 0, 1))
    if kind in "wh":
        assert not op.field("opsel") >> 3, "a result in the upper half"
        steps.append(lambda x: np.asarray(x).view(np.uint16).astype(np.uint32))
    if "SDWA" in op.form and op.field("dst_sel", 6) != 6:
        assert op.field("dst_unused") == 0, "a result that keeps other bits"
        selection = op.field("dst_sel")
        size = 8 if selection < 4 else 16
        shift, mask = _U(size * (selection & 3)), _U((1 << size) - 1)
        steps.append(lambda x: (np.asarray(x).view(_U) & mask) << shift)

    def run(x):
        for step in steps:
            x = step(x)
        return x

    return run if steps else _same


def _carry_register(op: Instruction) -> int:
    return op.operand("sdst") if op.has("sdst") else VCC


def _with_carry(op: Instruction) -> Step | None:
    """Additions and subtractions with carries of lanes, V_MAD_U64_U32 and V_DIV_SCALE_F32."""
    into = op.operand("vdst") - FIRST_VECTOR
    if op.name == "V_DIV_SCALE_F32":
        reads = operands(op, "fff")

        def function(w, *x):
            return ar.div_scale(*x)

    elif op.name == "V_MAD_U64_U32":
        reads = operands(op, "uuU")

        def function(w, a, b, c):
            product = a.astype(np.uint64) * b
            total = product + c
            return total, total < product

    elif op.name in ("V_ADD_CO_U32", "V_SUB_CO_U32", "V_SUBREV_CO_U32", "V_ADDC_CO_U32", "V_SUBB_CO_U32", "V_SUBBREV_CO_U32"):  # fmt: skip
        reads = operands(op, "uu")
        if "REV" in op.name:
            reads = reads[::-1]
        carry_in = None
        if op.name[5] in "CB":
            carry_in = VCC if op.form.startswith("VOP2") else op.operand("src2")
        is_addition = op.name.startswith("V_ADD")

        def function(w, a, b):
            carry = w.mask(carry_in) if carry_in is not None else np.uint64(0)
            b = b.astype(np.uint64) + carry
            total = a + b if is_addition else a - b
            return total.astype(np.uint32), total >> np.uint64(32) != 0

    else:
        return None
    carry_out = _carry_register(op)

    def step(w: Waves) -> None:
        result, flag = function(w, *(x(w) for x in reads))
        w.set_vector(into, np.broadcast_to(result, w.live.shape))
        w.set_mask(carry_out, flag & w.live)

    return step


def _compare(op: Instruction) -> Step | None:
    """V_CMP_*: a bit of a pair of scalar registers for each lane, 0 for those that do not execute."""
    if not op.name.startswith("V_CMP_") or op.name.startswith("V_CMP_CLASS"):
        return None
    _, _, name, kind = op.name.split("_")
    if name not in _COMPARISONS or kind not in _KINDS:
        return None
    compare, (first, second) = _COMPARISONS[name], operands(op, 2 * _KINDS[kind])
    into = VCC
    if op.form == "VOP3_SDST":
        into = op.operand("vdst")
    elif "SDWA" in op.form and op.field("sd"):
        into = op.operand("sdst")
    return lambda w: w.set_mask(into, compare(first(w), second(w)) & w.live)


def _packed(op: Instruction) -> Step | None:
    """V_PK_*_F32 and V_PK_MOV_B32: two operations on pairs of registers."""
    functions = {
        "V_PK_ADD_F32": ("ff", np.add), "V_PK_MUL_F32": ("ff", np.multiply), "V_PK_FMA_F32": ("fff", ar.fma),
        "V_PK_MOV_B32": ("uu", None),
    }  # fmt: skip
    if op.name not in functions:
        return None
    kinds, function = functions[op.name]
    into = op.operand("vdst") - FIRST_VECTOR
    high_bits = op.field("opsel_hi") | op.field("opsel_hi2") << 2
    halves = []
    for is_high in False, True:
        chosen = high_bits if is_high and function else op.field("opsel")
        negated = op.field("neg_hi" if is_high else "neg")
        reads = []
        for i, kind in enumerate(kinds):
            number = op.operand(f"src{i}")
            is_register = number < 128 or number >= FIRST_VECTOR
            read = vector(number + (chosen >> i & 1 if is_register else 0), op.literal, kind)
            reads.append(_modified(read, False, kind == "f" and bool(negated >> i & 1)))
        halves.append(reads)
    if function is None:
        low, high = halves[0][0], halves[0][1]
        return lambda w: _write_pair(w, into, low(w), high(w))
    return lambda w: _write_pair(w, into, *(function(*(x(w) for x in reads)) for reads in halves))


def _write_pair(w: Waves, into: int, low: np.ndarray, high: np.ndarray) -> None:
    # the first result may overwrite what the second is, a view of a register
    high = np.array(high)
    w.set_vector(into, low)
    w.set_vector(into + 1, high)


def _mixed(op: Instruction) -> Step | None:
    """V_FMA_MIX*: an fma whose operands are float32 or halves of registers."""
    if not op.name.startswith("V_FMA_MIX"):
        return None
    into = op.operand("vdst") - FIRST_VECTOR
    is_half = op.field("opsel_hi") | op.field("opsel_hi2") << 2
    reads = []
    for i in range(3):
        number = op.operand(f"src{i}")
        if is_half >> i & 1:
            selection = 5 if op.field("opsel") >> i & 1 else 4
            read = _cast(_select(vector(number, None, "u"), selection, False), "h")
        else:
            read = vector(number, None, "f")
        reads.append(
            _modified(read, bool(op.field("neg_hi") >> i & 1), bool(op.field("neg") >> i & 1))
        )
    assert not op.field("clmp"), "a clamp"

    def step(w: Waves) -> None:
        x = ar.fma(*(np.asarray(read(w), np.float32) for read in reads))
        if op.name == "V_FMA_MIX_F32":
            return w.set_vector(into, x)
        half = x.astype(np.float16).view(np.uint16).astype(np.uint32)
        before = w.v[into]
        if op.name == "V_FMA_MIXLO_F16":
            return w.set_vector(into, before & _U(0xFFFF0000) | half)
        return w.set_vector(into, before & _U(0xFFFF) | half << _U(16))

    return step


def _accumulator_moves(op: Instruction) -> Step | None:
    """V_ACCVGPR_READ, _WRITE, _MOV_B32."""
    if not op.name.startswith("V_ACCVGPR_"):
        return None
    into, number = op.operand("vdst") - FIRST_VECTOR, op.operand("src0")
    if "READ" not in op.name:
        into += ACCUMULATORS
    if "WRITE" not in op.name:
        number += ACCUMULATORS
    read = vector(number, None, "u")
    return lambda w: w.set_vector(into, read(w))


def _others(op: Instruction) -> tuple[str, Callable, list[Callable]] | None:
    """Instructions that take more than operands: types, function, what reads more arguments."""
    into = op.operand("vdst")
    if op.name == "V_CNDMASK_B32":
        register = op.operand("src2") if op.form == "VOP3" else VCC
        return "fff", lambda a, b, m: np.where(m, b, a), [lambda w: w.mask(register)]
    if op.name == "V_BITOP3_B32":
        table = op.field("omod") << 6 | op.field("abs") << 3 | op.field("neg")
        return "uuuu", ar.bit_table(table), []
    if op.name == "V_DIV_FMAS_F32":
        return "ffff", ar.div_fmas, [lambda w: w.mask(VCC)]
    if op.name == "V_FMAC_F32":
        return "fff", ar.fma, [vector(into, None, "f")]
    if op.name in ("V_FMAMK_F32", "V_FMAAK_F32", "V_MADMK_F32", "V_MADAK_F32"):
        fused = ar.fma if op.name.startswith("V_FMA") else lambda a, b, c: a * b + c
        more = [vector(255, op.literal, "f")]
        if op.name.endswith("AK_F32"):
            return "fff", fused, more
        return "fff", lambda a, b, c: fused(a, c, b), more
    return None


def build(op: Instruction) -> Step | None:
    """What a vector instruction does, None if it is not one of these."""
    for builder in (swap, lane_access, _compare, _with_carry, _packed, _mixed, _accumulator_moves):
        if (step := builder(op)) is not None:
            return step
    kinds, function, more = _others(op) or (*_TABLE.get(op.name, ("", _same)), [])
    if not kinds:
        return None
    into = op.operand("vdst") - FIRST_VECTOR
    reads = operands(op, kinds[:-1])
    finish = _outputs(op, kinds[-1])
    if "DPP" in op.form:
        return _dpp_step(op, kinds, function, reads[1:], more, finish)
    reads += more
    if len(reads) == 2:
        first, second = reads
        return lambda w: w.set_vector(into, finish(function(first(w), second(w))))
    return lambda w: w.set_vector(into, finish(function(*(x(w) for x in reads))))


def _dpp_step(op, kinds, function, reads, more, finish) -> Step:
    """An instruction whose first operand comes from other lanes."""
    read_first, into = dpp(op), op.operand("vdst") - FIRST_VECTOR
    modify = _modified(
        lambda x: x,
        kinds[0] in "fh" and bool(op.field("src0_abs")),
        kinds[0] in "fh" and bool(op.field("src0_neg")),
    )
    cast = _cast(lambda x: x, kinds[0])

    def step(w: Waves) -> None:
        x, live = read_first(w)
        x = modify(cast(x))
        w.set_vector(into, finish(function(x, *(y(w) for y in reads + more))), live)

    return step
