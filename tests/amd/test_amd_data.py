"""Instructions that move data, one at a time on random registers: between lanes, in memory, and through matrices."""

import numpy as np
import pytest
import torch
from tinygrad.runtime.autogen.amd.cdna import enum

from amd.assembler import V, assemble, find, waves
from amd.decode import EXEC
from amd.memory import AccessError, Local, Tensors
from amd.pseudocode import evaluate
from amd.registers import LANES, Waves
from amd.run import meaning

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


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


@pytest.mark.parametrize("has_barrier", [False, True])
def test_races_in_local_memory(has_barrier):
    """Two waves of one workgroup: one writes, then the second reads or writes something else."""
    w = Waves.start(1, 2, (None, Local(1, 1024)), 0)
    write, read = enum.DSOp.DS_WRITE_B32, enum.DSOp.DS_READ_B32
    # each its part, and the same numbers to the same addresses
    w.v[2], w.v[4] = w.v[0] * np.uint32(4), w.v[0]
    w.v[3] = w.v[5] = 512
    meaning(assemble("DS", write, addr=2, data0=4))(w)
    meaning(assemble("DS", write, addr=3, data0=5))(w)
    meaning(assemble("DS", read, vdst=6, addr=2))(w)
    meaning(assemble("DS", read, vdst=7, addr=3))(w)
    # the addresses that the second wave wrote
    w.v[2] ^= np.uint32(256)
    if has_barrier:
        w.local.barrier()
        meaning(assemble("DS", read, vdst=6, addr=2))(w)
        assert (w.v[6] == w.v[2] // 4).all()
        w.local.barrier()
        meaning(assemble("DS", write, addr=2, data0=4))(w)
        return
    for op in ({"op": read, "vdst": 6}, {"op": write, "data0": 4}):
        with pytest.raises(AccessError, match="a race: 4 bytes at 0x100"):
            meaning(assemble("DS", addr=2, **op))(w)


def test_two_workgroups_write_one_number():
    x = torch.zeros(64, dtype=torch.int32)
    tensors = Tensors()
    at = tensors.add("x", x)
    with tensors:
        w = Waves.start(2, 1, (tensors, Local(2, 0)), 0)
        w.set_scalar(20, np.uint64(at))
        w.v[2], w.v[4] = w.v[0] * np.uint32(4), 7
        store = assemble("GLOBAL", enum.GLOBALOp.GLOBAL_STORE_DWORD, addr=2, data=4, saddr=20)
        meaning(store)(w)
        w.v[4] = np.array([[1], [2]])
        with pytest.raises(AccessError, match="a race"):
            meaning(store)(w)


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
