"""Instructions that compute, one at a time on random registers, against the pseudocode of the ISA manual or a formula."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from tinygrad.runtime.autogen.amd.cdna import enum

from amd import arithmetic, scalar, vector
from amd.assembler import V, assemble, bits_of, check_lanes, find, pair, random_bits, waves
from amd.decode import VCC, CodeObject
from amd.memory import Tensors
from amd.pseudocode import TEXT, evaluate, nearest
from amd.registers import LANES
from amd.run import ExecutionError, Program, UnknownInstructionError, meaning, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# functions for which the manual has no definition, and bytes and bits in an order: below
FORMULAS = {
    "V_PERM_B32", "V_LDEXP_F32", "V_EXP_F32", "V_LOG_F32", "V_RCP_F32", "V_RCP_IFLAG_F32", "V_BFREV_B32",
    "V_CVT_PK_BF16_F32", "V_CVT_PK_F16_F32",
}  # fmt: skip
WITH_PSEUDOCODE = [*sorted(set(vector.TABLE) - FORMULAS), "V_CNDMASK_B32", "V_FMAC_F32"]
COMPARISONS = [f"V_CMP_{x}_{y}" for x, y in itertools.product(vector.COMPARISONS, vector.KINDS)]
COMPARISONS = [name for name in COMPARISONS if name in TEXT]


@pytest.mark.parametrize("name", WITH_PSEUDOCODE)
def test_vector_instruction(name):
    form, opcode = find(name, "VOP3", "VOP2", "VOP1")
    kinds = vector.TABLE.get(name, ("fff",))[0]
    w = waves(is_float="f" in kinds)
    names = ["src0", "src1", "src2"] if form == "VOP3" else ["src0", "vsrc1"]
    numbers = dict(zip(names, (V + 2, V + 4, V + 6), strict=False))
    if name == "V_CNDMASK_B32":
        numbers["src2"] = VCC
    if kinds[-1] == "h":
        w.v[10] = 0
    before, vcc = w.v.copy(), w.mask(VCC)
    meaning(assemble(form, opcode, vdst=10, **numbers))(w)

    def expected(wave, lane):
        x = before[:, wave, lane]
        values = evaluate(
            name, S0=pair(x, 2), S1=pair(x, 4), S2=pair(x, 6), D0=pair(x, 10), VCC=bits_of(vcc[wave]), laneId=lane
        )  # fmt: skip
        return int(values["D0"])

    is_float = kinds[-1] == "f" and name != "V_CNDMASK_B32"
    check_lanes(w, before[10:12], w.v[10:12], expected, 64 if kinds[-1] in "UI" else 32, is_float)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison(name):
    w = waves(is_float="_F" in name)
    w.v[4] = np.where(np.arange(LANES) % 3 == 0, w.v[2], w.v[4])
    meaning(assemble("VOP3_SDST", find(name, "VOP3")[1], vdst=20, src0=V + 2, src1=V + 4))(w)
    for wave, lane in np.ndindex(2, LANES):
        x = w.v[:, wave, lane]
        values = evaluate(name, S0=pair(x, 2), S1=pair(x, 4), D0=0, laneId=lane)
        want = values["D0"] >> lane & 1 and w.live[wave, lane]
        assert w.mask(20)[wave, lane] == want


@pytest.mark.parametrize("name", ["V_ADD_CO_U32", "V_SUB_CO_U32", "V_ADDC_CO_U32", "V_SUBB_CO_U32"])
def test_carry(name):
    w = waves()
    before, carry = w.v.copy(), w.mask(VCC)
    meaning(assemble("VOP2", find(name, "VOP2")[1], vdst=10, src0=V + 2, vsrc1=4))(w)

    def values(wave, lane):
        x = before[:, wave, lane]
        return evaluate(name, S0=int(x[2]), S1=int(x[4]), VCC=bits_of(carry[wave]), laneId=lane)

    check_lanes(w, before[10:12], w.v[10:12], lambda *at: int(values(*at)["D0"]), 32)
    for wave, lane in np.ndindex(2, LANES):
        want = values(wave, lane)["VCC"] >> lane & 1 and w.live[wave, lane]
        assert w.mask(VCC)[wave, lane] == want


def test_multiply_add_of_64_bits():
    w = waves()
    before = w.v.copy()
    meaning(
        assemble(
            "VOP3SD",
            find("V_MAD_U64_U32", "VOP3SD")[1],
            vdst=10,
            sdst=20,
            src0=V + 2,
            src1=V + 4,
            src2=V + 6,
        )
    )(w)

    def exact(wave, lane):
        x = before[:, wave, lane]
        return int(x[2]) * int(x[4]) + pair(x, 6)

    check_lanes(w, before[10:12], w.v[10:12], exact, 64)
    for at in np.ndindex(2, LANES):
        assert w.mask(20)[at] == (exact(*at) >> 64 and w.live[at])


@pytest.mark.parametrize("name", scalar.TABLE)
def test_scalar_instruction(name):
    kinds = scalar.TABLE[name][0]
    form, opcode = find(name, "SOP2", "SOP1")
    for seed in range(20):
        w = waves(seed=seed)
        w.s[4] = np.where(np.arange(2) == 0, w.s[2], w.s[4])
        before, scc = w.s.copy(), w.scc.copy()
        fields = {"ssrc0": 2} | ({"ssrc1": 4} if form == "SOP2" else {})
        meaning(assemble(form, opcode, sdst=10, **fields))(w)
        for wave in range(2):
            x = before[:, wave]
            values = evaluate(name, S0=pair(x, 2), S1=pair(x, 4), D0=0, SCC=int(scc[wave]))
            mask = (1 << (64 if kinds[-1] in "UI" else 32)) - 1
            assert pair(w.s[:, wave], 10) & mask == values["D0"] & mask
            assert w.scc[wave] == bool(values["SCC"])


SCALAR_COMPARISONS = [x for x in TEXT if x.startswith(("S_CMP_", "S_BITCMP")) and "B64" not in x]


@pytest.mark.parametrize("name", [*SCALAR_COMPARISONS, "S_CSELECT_B32", "S_CSELECT_B64"])
def test_scalar_comparison(name):
    form, opcode = find(name, "SOPC", "SOP2")
    for seed in range(20):
        w = waves(seed=seed)
        w.s[2:4, 0] = w.s[4:6, 0]
        scc = w.scc.copy()
        meaning(
            assemble(form, opcode, ssrc0=2, ssrc1=4, **({"sdst": 10} if form == "SOP2" else {}))
        )(w)
        for wave in range(2):
            x = w.s[:, wave]
            values = evaluate(name, S0=pair(x, 2), S1=pair(x, 4), SCC=int(scc[wave]))
            assert w.scc[wave] == bool(values["SCC"])
            if form == "SOP2":
                size = int(name[-2:])
                assert pair(x, 10) & (1 << size) - 1 == values["D0"] & (1 << size) - 1


@pytest.mark.parametrize("name", ["S_MOVK_I32", "S_ADDK_I32", "S_MULK_I32"])
def test_scalar_with_constant(name):
    for seed in range(20):
        w = waves(seed=seed)
        constant = int(w.s[30, 0]) & 0xFFFF
        before, scc = w.s.copy(), w.scc.copy()
        meaning(assemble("SOPK", find(name, "SOPK")[1], sdst=10, simm16=constant))(w)
        for wave in range(2):
            D0 = int(before[10, wave])
            # the pseudocode sees the constant with its sign
            constant_bits = (constant ^ 0x8000) - 0x8000 & 0xFFFFFFFF
            text = {
                "S_MOVK_I32": constant_bits,
                "S_ADDK_I32": D0 + constant_bits,
                "S_MULK_I32": D0 * constant_bits,
            }
            assert int(w.s[10, wave]) == text[name] & 0xFFFFFFFF
            if name == "S_ADDK_I32":
                total = np.int64(np.int32(np.uint32(D0))) + np.int32(np.uint32(constant_bits))
                assert w.scc[wave] == (total != np.int32(np.uint32(int(total) & 0xFFFFFFFF)))
            else:
                assert w.scc[wave] == scc[wave]


def test_exec_is_saved():
    w = waves()
    before, mask = w.s.copy(), w.live.copy()
    given = w.mask(2)
    meaning(assemble("SOP1", find("S_AND_SAVEEXEC_B64", "SOP1")[1], sdst=10, ssrc0=2))(w)
    assert (w.live == (mask & given)).all()
    assert (w.mask(10) == mask).all()
    assert (before[2:4] == w.s[2:4]).all()
    assert (w.scc == w.live.any(1)).all()


@pytest.mark.parametrize("name", ["V_PK_ADD_F32", "V_PK_MUL_F32", "V_PK_FMA_F32"])
def test_packed(name):
    w = waves(is_float=True)
    before = w.v.copy()
    # the lower results from the upper half of the first operand, the upper from the lower half of the second
    fields = {"opsel": 0b001, "opsel_hi": 0b01, "opsel_hi2": 1, "neg": 0b010, "neg_hi": 0b001}
    meaning(
        assemble(
            "VOP3P", find(name, "VOP3P")[1], vdst=10, src0=V + 2, src1=V + 4, src2=V + 6, **fields
        )
    )(w)
    function = {"ADD": "V_ADD_F32", "MUL": "V_MUL_F32", "FMA": "V_FMA_F32"}[name[5:8]]
    for half, (a, b, c, sign_a, sign_b) in enumerate([(3, 4, 6, 0, 1), (3, 4, 7, 1, 0)]):

        def expected(wave, lane, a=a, b=b, c=c, sign_a=sign_a, sign_b=sign_b):
            x = before[:, wave, lane]
            return int(
                evaluate(
                    function,
                    S0=int(x[a]) ^ sign_a << 31,
                    S1=int(x[b]) ^ sign_b << 31,
                    S2=int(x[c]),
                    D0=0,
                )["D0"]
            )

        at = slice(10 + half, 12 + half)
        check_lanes(w, before[at], w.v[at], expected, 32, True)


def test_permuted_bytes():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 500), np.uint32)
    selector = rng.integers(0, 14, (500, 4)).astype(np.uint8)
    got = (
        arithmetic.permuted_bytes(a, b, selector.view(np.uint32)[:, 0])
        .view(np.uint8)
        .reshape(-1, 4)
    )
    for i in range(500):
        data = int(b[i]).to_bytes(4, "little") + int(a[i]).to_bytes(4, "little")
        signs = [255 * (data[x] >> 7) for x in (1, 3, 5, 7)]
        assert [(*data, *signs, 0, 255)[x] for x in selector[i]] == got[i].tolist()


def test_reversed_bits():
    x = random_bits(np.random.default_rng(0), 100, False)
    got = arithmetic.reversed_bits(x)
    assert [f"{a:032b}"[::-1] for a in x] == [f"{a:032b}" for a in got]


def test_powers_of_two():
    x = random_bits(np.random.default_rng(0), 300, True).view(np.float32)
    x = x[np.isfinite(x)]
    exponents = np.random.default_rng(1).integers(-160, 160, len(x)).astype(np.int32)
    got = vector.TABLE["V_LDEXP_F32"][1](x, exponents)
    for a, b, c in zip(x, exponents, got, strict=True):
        exact = Fraction(float(a)) * Fraction(2) ** int(b)
        assert c == (
            nearest(exact) if abs(exact) < 2**127 else np.float32(float(a) * 2.0 ** int(b))
        )


def test_bit_table():
    a, b, c = (np.uint32(x) for x in (0b11110000, 0b11001100, 0b10101010))
    for table in range(256):
        assert arithmetic.bit_table(table)(a, b, c) & 0xFF == table


def test_rounding_to_16_bits():
    bits = np.concatenate(
        [
            np.arange(2**16, dtype=np.uint32) << 16 | low
            for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
        ]
    )
    x = bits.astype(np.uint32).view(np.float32)
    got = arithmetic.bfloat16(x)
    expected = torch.from_numpy(x).to(torch.bfloat16)
    nan = np.isnan(x)
    assert (
        got[~nan] == expected[~torch.from_numpy(nan)].view(torch.int16).numpy().view(np.uint16)
    ).all()
    assert np.isnan((got[nan] << 16).astype(np.uint32).view(np.float32)).all()


@pytest.mark.parametrize("name", ["exp2", "log2", "reciprocal"])
def test_functions(name):
    rng = np.random.default_rng(0)
    exponents = rng.uniform(-160, 140, 2000).astype(np.float32)
    x = np.concatenate([random_bits(rng, 2000, True).view(np.float32), exponents])
    tiny = np.float32(2.0**-126)
    normal = np.where(np.abs(x) < tiny, np.copysign(0, x), x).astype(np.float64)
    formula = {"exp2": np.exp2, "log2": np.log2, "reciprocal": lambda z: 1 / z}[name]
    expected = formula(normal).astype(np.float32)
    expected = np.where(np.abs(expected) < tiny, np.copysign(np.float32(0), expected), expected)
    assert np.array_equal(getattr(arithmetic, name)(x), expected, equal_nan=True)


def test_division():
    """The sequence that LLVM gives a division, rounded as a division is."""
    rng = np.random.default_rng(0)
    x, y = (random_bits(rng, 20000, True).view(np.float32) for _ in range(2))
    bottom, _ = arithmetic.div_scale(y, y, x)
    top, is_scaled = arithmetic.div_scale(x, y, x)
    inverse = arithmetic.reciprocal(bottom)
    inverse = arithmetic.fma(arithmetic.fma(-bottom, inverse, np.float32(1)), inverse, inverse)
    quotient = top * inverse
    quotient = arithmetic.fma(arithmetic.fma(-bottom, quotient, top), inverse, quotient)
    rest = arithmetic.fma(-bottom, quotient, top)
    got = arithmetic.div_fixup(arithmetic.div_fmas(rest, inverse, quotient, is_scaled), y, x)
    expected = x / y
    # beyond the largest number the sequence may give none, and a subnormal quotient is rounded twice
    is_normal = (
        (np.abs(expected) >= 2**-126) & np.isfinite(expected) | ~np.isfinite(x) | ~np.isfinite(y)
    )
    assert np.array_equal(got[is_normal], expected[is_normal], equal_nan=True)
    assert (np.abs(got - expected)[np.abs(expected) < 2**-126] <= 2.0**-149).all()


def test_a_kernel_that_does_not_end():
    # s_branch to itself
    code = CodeObject((0xBF82FFFF).to_bytes(4, "little") + bytes(12), 0, 0, 2, 0, 0)
    with pytest.raises(ExecutionError, match="s_branch.* does not end"):
        run(Program(code, "gfx942"), Tensors(), bytes(16), 1, 1, 0)


def test_unknown_instructions_are_named():
    with pytest.raises(UnknownInstructionError, match="V_SIN_F32 has no meaning"):
        meaning(assemble("VOP1", enum.VOP1Op.V_SIN_F32_E32))
    with pytest.raises(UnknownInstructionError, match="BUFFER_ATOMIC_ADD has no meaning"):
        meaning(assemble("MUBUF", enum.MUBUFOp.BUFFER_ATOMIC_ADD))
