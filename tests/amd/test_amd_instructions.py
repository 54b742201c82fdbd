"""Each instruction of the emulator alone, on random registers: against the pseudocode of the ISA manual, or a formula."""

import numpy as np
import pytest
import torch
from tinygrad.renderer.amd.dsl import FixedBitField
from tinygrad.runtime.autogen.amd.cdna import enum, ins

from amd import arithmetic, scalar, vector
from amd.decode import EXEC, VCC, decode
from amd.memory import AccessError, Local, Tensors
from amd.pseudocode import TEXT, evaluate
from amd.registers import LANES, Waves
from amd.run import UnknownInstructionError, meaning

V = 256
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
_INTEGERS = np.array(
    [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x10000], np.uint32
)
_FLOATS = np.array([0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-40, -1e-42, 3e38, 1e-38, 0.5], np.float32)  # fmt: skip


def random_bits(rng, shape, is_float):
    bits = rng.integers(0, 2**32, shape, np.uint32)
    if is_float:
        near_one = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
        bits = np.where(rng.random(shape) < 0.6, near_one, bits)
    special = rng.choice(_FLOATS.view(np.uint32) if is_float else _INTEGERS, shape)
    return np.where(rng.random(shape) < 0.3, special, bits).astype(np.uint32)


def waves(is_float=False, local_size=0, seed=0):
    """Two waves of two workgroups with random registers, of which some lanes do not execute."""
    rng = np.random.default_rng(seed)
    w = Waves.start(2, 1, (None, Local(2, local_size)), 0)
    w.v[:40] = random_bits(rng, (40, 2, LANES), is_float)
    w.s[: VCC + 2] = random_bits(rng, (VCC + 2, 2), is_float)
    w.scc = rng.random(2) < 0.5
    w.set_mask(EXEC, rng.random((2, LANES)) < 0.8)
    return w


def assemble(form, op, card="gfx950", **fields):
    """An instruction with these numbers in its fields."""
    encoding, raw = getattr(ins, form), 0
    for name, field in encoding._fields:
        value = field.default if isinstance(field, FixedBitField) else fields.pop(name, 0)
        raw |= (op.value if name == "op" else value) << field.lo
    assert not fields, fields
    return decode(raw.to_bytes(encoding._size(), "little") + bytes(16), 0, card)


def find(name, *forms):
    """The first of these encodings that has the instruction, and its opcode."""
    for form in forms:
        table = getattr(enum, form + "Op")
        for suffix in ("", "_E64", "_E32"):
            if hasattr(table, name + suffix):
                return form, getattr(table, name + suffix)
    raise KeyError(name)


def same(got, expected, is_float):
    got, expected = np.uint64(got), np.uint64(expected)
    if is_float and got != expected:
        x, y = (np.uint32(z).view(np.float32) for z in (got, expected))
        return np.isnan(x) and np.isnan(y)
    return got == expected


# what the manual gives no pseudocode for, or as functions without a definition: below
FORMULAS = {"V_PERM_B32", "V_LDEXP_F32", "V_EXP_F32", "V_LOG_F32", "V_RCP_F32", "V_RCP_IFLAG_F32", "V_BFREV_B32", "V_CVT_PK_BF16_F32", "V_CVT_PK_F16_F32"}  # fmt: skip
_VECTOR = sorted(set(vector._TABLE) - FORMULAS)


def pair(registers, i):
    return int(registers[i]) | int(registers[i + 1]) << 32


def bits_of(mask):
    return sum(1 << int(i) for i in np.flatnonzero(mask))


def check_lanes(w, before, after, expected, size, is_float=False):
    """Registers of lanes that execute have the expected bits, of the others those from before."""
    for wave, lane in np.ndindex(2, LANES):
        old, new = (pair(x[:, wave, lane], 0) & (1 << size) - 1 for x in (before, after))
        want = expected(wave, lane) & (1 << size) - 1 if w.live[wave, lane] else old
        assert same(new, want, is_float), f"wave {wave}, lane {lane}: {new:#x}, not {want:#x}"


@pytest.mark.parametrize("name", [*_VECTOR, "V_CNDMASK_B32", "V_FMAC_F32"])
def test_vector_instruction(name):
    form, opcode = find(name, "VOP3", "VOP2", "VOP1")
    kinds = vector._TABLE.get(name, ("fff",))[0]
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


@pytest.mark.parametrize("kind", ["F32", "F16", "I32", "U32", "U16", "U64"])
@pytest.mark.parametrize("name", vector._COMPARISONS)
def test_comparison(name, kind):
    if f"V_CMP_{name}_{kind}" not in TEXT:
        pytest.skip("no such instruction")
    w = waves(is_float=kind[0] == "F")
    w.v[4] = np.where(np.arange(LANES) % 3 == 0, w.v[2], w.v[4])
    meaning(
        assemble(
            "VOP3_SDST", find(f"V_CMP_{name}_{kind}", "VOP3")[1], vdst=20, src0=V + 2, src1=V + 4
        )
    )(w)
    for wave, lane in np.ndindex(2, LANES):
        x = w.v[:, wave, lane]
        values = evaluate(f"V_CMP_{name}_{kind}", S0=pair(x, 2), S1=pair(x, 4), D0=0, laneId=lane)
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


@pytest.mark.parametrize("name", scalar._TABLE)
def test_scalar_instruction(name):
    kinds = scalar._TABLE[name][0]
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


@pytest.mark.parametrize(
    "name",
    [
        *sorted(x for x in TEXT if x.startswith(("S_CMP_", "S_BITCMP"))),
        "S_CSELECT_B32",
        "S_CSELECT_B64",
    ],
)
def test_scalar_comparison(name):
    if name.endswith("BITCMP0_B64") or name.endswith("BITCMP1_B64"):
        pytest.skip("not of these kernels")
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


DPP = {
    "quad_perm": (0b00_01_10_11, lambda i: (i & ~3) + 3 - i % 4),
    "row_shl": (0x103, lambda i: i + 3 if i % 16 < 13 else None),
    "row_shr": (0x114, lambda i: i - 4 if i % 16 >= 4 else None),
    "row_ror": (0x125, lambda i: i // 16 * 16 + (i - 5) % 16),
    "row_mirror": (0x140, lambda i: i // 16 * 16 + 15 - i % 16),
    "row_half_mirror": (0x141, lambda i: i // 8 * 8 + 7 - i % 8),
    "row_bcast15": (0x142, lambda i: i // 16 * 16 - 1 if i >= 16 else None),
    "row_bcast31": (0x143, lambda i: 31 if i >= 32 else None),
    "row_newbcast": (0x15A, lambda i: i // 16 * 16 + 10),
}


@pytest.mark.parametrize("is_zero_outside", [False, True])
@pytest.mark.parametrize("name", DPP)
def test_dpp(name, is_zero_outside):
    control, source_of = DPP[name]
    w = waves()
    before = w.v.copy()
    op = assemble(
        "VOP2_DPP16", enum.VOP2Op.V_ADD_U32_E32, vdst=10, src0=250, vsrc0=2, vsrc1=4,
        dpp=control, bc=is_zero_outside, row_mask=0b0111, bank_mask=0xF,
    )  # fmt: skip
    meaning(op)(w)
    for wave, lane in np.ndindex(2, LANES):
        source = source_of(lane)
        is_valid = source is not None and w.live[wave, source]
        want = before[10, wave, lane]
        if w.live[wave, lane] and lane < 48 and (is_valid or is_zero_outside):
            want = before[4, wave, lane] + (before[2, wave, source] if is_valid else np.uint32(0))
        assert w.v[10, wave, lane] == want


def test_permutations():
    w = waves()
    before = w.v.copy()
    meaning(assemble("DS", enum.DSOp.DS_BPERMUTE_B32, vdst=10, addr=2, data0=4, offset0=8))(w)
    # a swap of neighbours, by the masks and, in another instruction, by the list of four
    meaning(assemble("DS", enum.DSOp.DS_SWIZZLE_B32, vdst=12, addr=4, offset0=0x1F, offset1=0x04))(
        w
    )
    meaning(
        assemble(
            "DS", enum.DSOp.DS_SWIZZLE_B32, vdst=13, addr=4, offset0=0b10_11_00_01, offset1=0x80
        )
    )(w)
    for wave, lane in np.ndindex(2, LANES):
        if not w.live[wave, lane]:
            assert (w.v[10:14, wave, lane] == before[10:14, wave, lane]).all()
            continue
        source = (int(before[2, wave, lane]) + 8) // 4 % 64
        for register, other in ((10, source), (12, lane ^ 1), (13, lane ^ 1)):
            want = before[4, wave, other] if w.live[wave, other] else 0
            assert w.v[register, wave, lane] == want


@pytest.mark.parametrize("size", [16, 32])
def test_swap_of_rows(size):
    w = waves()
    w.set_mask(EXEC, np.ones((2, LANES), bool))
    a, b = w.v[10].copy(), w.v[12].copy()
    meaning(assemble("VOP1", find(f"V_PERMLANE{size}_SWAP_B32", "VOP1")[1], vdst=10, src0=V + 12))(
        w
    )
    for first in range(0, LANES, 2 * size):
        for lane in range(first, first + size):
            a[:, lane + size], b[:, lane] = b[:, lane].copy(), a[:, lane + size].copy()
    assert (w.v[10] == a).all()
    assert (w.v[12] == b).all()


def test_lanes_and_scalars():
    w = waves()
    w.set_mask(EXEC, np.arange(LANES) >= 5)
    before = w.v.copy()
    w.s[6] = 64 + 9
    meaning(assemble("VOP1", find("V_READFIRSTLANE_B32", "VOP1")[1], vdst=20, src0=V + 2))(w)
    meaning(assemble("VOP3", find("V_READLANE_B32", "VOP3")[1], vdst=21, src0=V + 2, src1=6))(w)
    meaning(assemble("VOP3", find("V_WRITELANE_B32", "VOP3")[1], vdst=10, src0=20, src1=128 + 3))(w)
    assert (w.s[20] == before[2, :, 5]).all()
    assert (w.s[21] == before[2, :, 9]).all()
    before[10, :, 3] = w.s[20]
    assert (w.v == before).all()


def test_parts_of_registers():
    w = waves()
    before = w.v.copy()
    form = {"vdst": 10, "src0": 249, "vsrc0": 2, "vsrc1": 4, "dst_sel": 6}
    op = enum.VOP2Op.V_ADD_U32_E32
    meaning(assemble("VOP2_SDWA", op, **form, src0_sel=5, src0_sext=1, src1_sel=2))(w)
    halves = (before[2] >> 16).astype(np.uint16).view(np.int16).astype(np.int32).view(np.uint32)
    assert (w.v[10] == np.where(w.live, halves + (before[4] >> 16 & 0xFF), before[10])).all()
    meaning(assemble("VOP2_SDWA", op, **form | {"dst_sel": 5}, src0_sel=6, src1_sel=6))(w)
    assert (w.v[10][w.live] == ((before[2] + before[4]) << 16)[w.live]).all()


def test_mixed_multiply_add():
    w = waves(is_float=True)
    before = w.v.copy()
    # a half from above, a half from below, a float32 with its sign changed
    fields = {"opsel": 0b001, "opsel_hi": 0b11, "opsel_hi2": 0, "neg": 0b100}
    for name, register in (("V_MAD_MIXLO_F16", 10), ("V_MAD_MIXHI_F16", 11), ("V_MAD_MIX_F32", 12)):
        meaning(
            assemble(
                "VOP3P",
                find(name, "VOP3P")[1],
                vdst=register,
                src0=V + 2,
                src1=V + 4,
                src2=V + 6,
                **fields,
            )
        )(w)
    for wave, lane in np.ndindex(2, LANES):
        if not w.live[wave, lane]:
            continue
        a, b, c = before[[2, 4, 6], wave, lane]
        a, b = (x.astype(np.uint16).view(np.float16).astype(np.float32) for x in (a >> 16, b))
        x = evaluate(
            "V_FMA_F32",
            S0=int(a.view(np.uint32)),
            S1=int(b.view(np.uint32)),
            S2=int(c) ^ 1 << 31,
            D0=0,
        )["D0"].f32
        half = x.astype(np.float16)
        low, high = w.v[10:12, wave, lane].copy().view(np.float16)[[0, 3]]
        for got, want in ((w.f[12, wave, lane], x), (low, half), (high, half)):
            assert np.array_equal(got, want, equal_nan=True)
        assert w.v[10, wave, lane] >> 16 == before[10, wave, lane] >> 16
        assert w.v[11, wave, lane] & 0xFFFF == before[11, wave, lane] & 0xFFFF


@pytest.mark.parametrize(
    "name",
    [
        "DS_WRITE_B8",
        "DS_WRITE_B16",
        "DS_WRITE_B32",
        "DS_WRITE_B64",
        "DS_WRITE_B128",
        "DS_WRITE2_B32",
        "DS_WRITE2_B64",
        "DS_WRITE2ST64_B32",
    ],
)
def test_local_memory(name):
    size = {"8": 1, "6": 2, "2": 4, "4": 8}[name[-1]] if not name.endswith("128") else 16
    w = waves(local_size=64 * 64 * 4)
    # so far apart that no lane writes where another does
    step = 4 if "ST64" in name else 32
    at = (np.random.default_rng(1).permutation(LANES) * step).astype(np.uint32)
    w.v[2] = at
    before = w.v.copy()
    offsets = {"offset0": 1, "offset1": 3} if "2" in name.split("_")[1] else {"offset0": size}
    op = getattr(enum.DSOp, name)
    meaning(assemble("DS", op, addr=2, data0=4, data1=8, **offsets))(w)
    read = name.replace("WRITE", "READ").replace("_B8", "_U8").replace("_B16", "_U16")
    meaning(assemble("DS", getattr(enum.DSOp, read), vdst=20, addr=2, **offsets))(w)
    count = max(size // 4, 1)
    sources = [4 + i for i in range(count)] + (
        [8 + i for i in range(count)] if "offset1" in offsets else []
    )
    for j, source in enumerate(sources):
        want = before[source] & np.uint32((1 << 8 * min(size, 4)) - 1)
        assert (w.v[20 + j] == np.where(w.live, want, before[20 + j])).all()
    # where it was written: the bytes themselves
    scale = size * 64 if "ST64" in name else size
    first = int(at[w.live[0]][0]) + (scale if "offset1" in offsets else size)
    lane = int(np.flatnonzero(w.live[0])[0])
    data = w.local.read(w, np.where(w.live, np.uint32(first), np.uint32(0)), min(size, 4))[0]
    assert data[0, lane] == before[4, 0, lane] & np.uint32((1 << 8 * min(size, 4)) - 1)


def test_transposed_read():
    w = waves(local_size=64 * 8)
    w.set_mask(EXEC, np.ones((2, LANES), bool))
    w.v[2] = np.arange(LANES, dtype=np.uint32) * 8
    halves = np.arange(256, dtype=np.uint16)
    words = halves.view(np.uint32).reshape(LANES, 2)
    w.v[4], w.v[5] = words[:, 0], words[:, 1]
    meaning(assemble("DS", enum.DSOp.DS_WRITE_B64, addr=2, data0=4))(w)
    meaning(assemble("DS", enum.DSOp.DS_READ_B64_TR_B16, vdst=10, addr=2))(w)
    got = np.ascontiguousarray(w.v[10:12, 0].T).view(np.uint16)
    rows = halves.reshape(4, 4, 16)
    for lane in range(LANES):
        assert (got[lane] == rows[lane // 16, :, lane % 16]).all()


def test_access_outside_local_memory():
    w = waves(local_size=256)
    w.v[2] = 248
    meaning(assemble("DS", enum.DSOp.DS_READ_B64, vdst=10, addr=2))(w)
    w.v[2, 1, w.live[1].argmax()] = 252
    with pytest.raises(AccessError, match="8 bytes at 252 of 256"):
        meaning(assemble("DS", enum.DSOp.DS_READ_B64, vdst=10, addr=2))(w)


def test_access_outside_tensors():
    x, y = torch.arange(64, dtype=torch.float32), torch.zeros(64, 3)
    tensors = Tensors()
    # every third number of y is no element of the view
    at = [tensors.add("x", x), tensors.add("y", y[:, :2])]
    load = assemble("GLOBAL", enum.GLOBALOp.GLOBAL_LOAD_DWORD, vdst=10, addr=2, saddr=20)
    store = assemble("GLOBAL", enum.GLOBALOp.GLOBAL_STORE_DWORDX2, addr=3, data=10, saddr=22)
    with tensors:
        w = Waves.start(1, 1, (tensors, Local(1, 0)), 0)
        w.set_scalar(20, np.uint64(at[0]))
        w.set_scalar(22, np.uint64(at[1]))
        w.v[2], w.v[3] = np.arange(LANES) * 4, np.arange(LANES) * 12
        meaning(load)(w)
        w.v[11] = w.v[10]
        meaning(store)(w)
        w.v[2] += np.uint32(4)
        with pytest.raises(
            AccessError,
            match=r"lane 63, are in no tensor; it would be byte 256 of x \[64\] float32",
        ):
            meaning(load)(w)
        w.v[3] += np.uint32(4)
        with pytest.raises(
            AccessError, match=r"lane 0, are in no tensor.* byte 4 of y \[64, 2\] float32"
        ):
            meaning(store)(w)
    assert (y[:, :2] == x[:, None]).all()
    assert (y[:, 2] == 0).all()


def test_buffers_end():
    x = torch.arange(1, 65, dtype=torch.int32)
    tensors = Tensors()
    at = tensors.add("x", x)
    with tensors:
        w = Waves.start(1, 1, (tensors, Local(1, 0)), 0)
        w.set_scalar(20, np.uint64(at))
        w.s[22] = 80
        w.v[2] = np.arange(LANES) * 4
        fields = {"vdata": 10, "vaddr": 2, "offen": 1, "srsrc": 5, "soffset": 128 + 8}
        meaning(assemble("MUBUF", enum.MUBUFOp.BUFFER_LOAD_DWORD, **fields, offset=4))(w)
        w.v[11] = 7
        meaning(assemble("MUBUF", enum.MUBUFOp.BUFFER_STORE_DWORD, **fields | {"vdata": 11}))(w)
    assert w.v[10, 0].tolist() == [*range(4, 21), *[0] * 47]
    assert x.tolist() == [1, 2, *[7] * 18, *range(21, 65)]


@pytest.mark.parametrize(
    ("name", "M", "K", "card"),
    [
        ("16X16X16_BF16", 16, 16, "gfx90a"), ("16X16X16_F16", 16, 16, "gfx90a"), ("16X16X4_F32", 16, 4, "gfx90a"),
        ("16X16X16_BF16", 16, 16, "gfx942"), ("16X16X8_XF32", 16, 8, "gfx942"), ("16X16X32_BF16", 16, 32, "gfx950"),
        ("16X16X32_F16", 16, 32, "gfx950"), ("32X32X8_F16", 32, 8, "gfx942"), ("32X32X16_BF16", 32, 16, "gfx950"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_accumulator", [False, True])
def test_matrix_product(name, M, K, card, is_accumulator):
    """On small integers, whose products are exact in every type."""
    rng = np.random.default_rng(0)
    A, B = (
        rng.integers(-8, 9, (2, M, K)).astype(np.float32),
        rng.integers(-8, 9, (2, K, M)).astype(np.float32),
    )
    C = rng.integers(-99, 99, (2, M, M)).astype(np.float32)
    w = waves()
    kind = name.split("_")[1]
    groups, size = LANES // M, M * M // LANES
    c, d = (512 - 256 if is_accumulator else 0) + 64, (256 if is_accumulator else 0) + 96
    for wave, lane in np.ndindex(2, LANES):
        part = slice(lane // M * K // groups, (lane // M + 1) * K // groups)
        for register, x in ((10, A[wave, lane % M, part]), (30, B[wave, part, lane % M])):
            if kind == "F16":
                words = x.astype(np.float16).view(np.uint32)
            elif kind == "BF16":
                words = (
                    (np.ascontiguousarray(x).view(np.uint32) >> 16)
                    .astype(np.uint16)
                    .view(np.uint32)
                )
            else:
                words = np.ascontiguousarray(x).view(np.uint32)
            w.v[register : register + len(words), wave, lane] = words
        for j in range(size):
            row = j // 4 * 4 * groups + lane // M * 4 + j % 4
            w.f[c + j, wave, lane] = C[wave, row, lane % M]
    opcode = enum.VOP3POp["V_MFMA_F32_" + name]
    fields = {
        "vdst": 96,
        "src0": V + 10,
        "src1": V + 30,
        "src2": V + 64,
        "acc_cd": int(is_accumulator),
    }
    op = assemble("VOP3P_MFMA", opcode, card, **fields)
    meaning(op)(w)
    D = A @ B + C
    for wave, lane, j in np.ndindex(2, LANES, size):
        row = j // 4 * 4 * groups + lane // M * 4 + j % 4
        assert w.f[d + j, wave, lane] == D[wave, row, lane % M]


def test_unknown_instructions_are_named():
    with pytest.raises(UnknownInstructionError, match="V_SIN_F32 has no meaning"):
        meaning(assemble("VOP1", enum.VOP1Op.V_SIN_F32_E32))
    with pytest.raises(UnknownInstructionError, match="BUFFER_ATOMIC_ADD has no meaning"):
        meaning(assemble("MUBUF", enum.MUBUFOp.BUFFER_ATOMIC_ADD))
