"""Instructions that carry data from lane to lane: through local memory, by permutation, and to scalar registers.

Legend: as in memory.py.
"""

import re

import numpy as np

from amd.decode import ACCUMULATORS, FIRST_VECTOR, Instruction
from amd.memory import _SIZES, LANES, Step, Waves, _count, _data, scalar, vector

_LANE = np.arange(LANES)


def local_memory(op: Instruction) -> Step | None:
    """DS_READ*, DS_WRITE*."""
    match = re.fullmatch(r"DS_(READ|WRITE)(2|2ST64)?_([A-Z]\d+)(_D16_HI)?(_TR_B16)?", op.name)
    if match is None or match[3] not in _SIZES:
        return None
    action, two, kind, is_high, is_transposed = match.groups()
    if (
        (kind in ("U8", "U16")) != (action == "READ" and _SIZES[kind] < 4)
        or is_high
        and action == "READ"
    ):
        return None
    num_bytes = _SIZES[kind]
    read_at = vector(op.operand("addr"), None, "u")
    offsets = [op.field("offset0"), op.field("offset1")]
    if two:
        scale = num_bytes * (64 if two == "2ST64" else 1)
        offsets = [np.int64(x * scale) for x in offsets]
    else:
        offsets = [np.int64(offsets[0] | offsets[1] << 8)]
    count = _count(num_bytes)
    into = _data(op, "vdst")
    sources = [op.operand("data0"), op.operand("data1")]
    sources = [x - FIRST_VECTOR + ACCUMULATORS * op.field("acc") for x in sources]

    def write(w: Waves) -> None:
        for offset, source in zip(offsets, sources, strict=False):
            registers = [w.v[source + j] for j in range(count)]
            if is_high:
                registers = [registers[0] >> np.uint32(16)]
            w.local.write(w, read_at(w) + offset, num_bytes, registers)

    def read(w: Waves) -> None:
        # all is read before a register is written: the address may be in one of them
        registers = [
            x for offset in offsets for x in w.local.read(w, read_at(w) + offset, num_bytes)
        ]
        if is_transposed:
            registers = _transposed(registers)
        for j, x in enumerate(registers):
            w.set_vector(into + j, x)

    return write if action == "WRITE" else read


def _transposed(registers: list[np.ndarray]) -> list[np.ndarray]:
    """Of 16 lanes, four hold a row of 16 numbers of 16 bits; lane i of them gets column i of the four rows."""
    x = np.stack(registers, -1).view(np.uint16)
    n = len(x)
    x = x.reshape(n, 4, 4, 16).swapaxes(2, 3).reshape(n, LANES, 4)
    x = np.ascontiguousarray(x).view(np.uint32)
    return [x[..., 0], x[..., 1]]


def _from_lanes(w: Waves, x: np.ndarray, source: np.ndarray) -> np.ndarray:
    """x of the lane `source` of each lane, 0 from one that does not execute."""
    source = np.broadcast_to(source, x.shape)
    x = np.take_along_axis(x, source, 1)
    return x if w.is_full else np.where(np.take_along_axis(w.live, source, 1), x, np.uint32(0))


def permute(op: Instruction) -> Step | None:
    """DS_BPERMUTE_B32, DS_SWIZZLE_B32."""
    into, read = _data(op, "vdst"), vector(op.operand("data0"), None, "u")
    offset = op.field("offset0") | op.field("offset1") << 8
    read_at = vector(op.operand("addr"), None, "u")
    if op.name == "DS_BPERMUTE_B32":

        def step(w: Waves) -> None:
            source = (read_at(w) + np.uint32(offset)) // np.uint32(4) % np.uint32(LANES)
            w.set_vector(into, _from_lanes(w, read(w), source.astype(np.int64)))

        return step
    if op.name != "DS_SWIZZLE_B32":
        return None
    source = swizzle_sources(offset)
    # the register is the one that other DS instructions take the address from
    return lambda w: w.set_vector(into, _from_lanes(w, read_at(w), source))


def swizzle_sources(offset: int) -> np.ndarray:
    """[64] the lane that DS_SWIZZLE_B32 reads: of the same four if bit 15 is set, else of the same 32 by three masks."""
    if offset & 0x8000:
        return _LANE & ~3 | offset >> 2 * (_LANE & 3) & 3
    lane = (_LANE & 31 & offset | offset >> 5 & 31) ^ offset >> 10 & 31
    return _LANE & 32 | lane


def dpp_sources(control: int) -> tuple[np.ndarray, np.ndarray]:
    """[64] the lane that a DPP operand reads, and whether there is such a lane."""
    row, column = _LANE & ~15, _LANE & 15
    amount = control & 15
    if control < 0x100:
        return _LANE & ~3 | control >> 2 * (_LANE & 3) & 3, np.ones(LANES, bool)
    if 0x101 <= control <= 0x10F:
        return row + (column + amount) % 16, column + amount < 16
    if 0x111 <= control <= 0x11F:
        return row + (column - amount) % 16, column >= amount
    if 0x121 <= control <= 0x12F:
        return row + (column - amount) % 16, np.ones(LANES, bool)
    if control == 0x140:
        return row + 15 - column, np.ones(LANES, bool)
    if control == 0x141:
        return row + (column & 8) + 7 - (column & 7), np.ones(LANES, bool)
    if control == 0x142:
        # the last lane of a row to the next row
        return (row - 1) % LANES, _LANE >= 16
    if control == 0x143:
        return np.full(LANES, 31), _LANE >= 32
    if 0x150 <= control <= 0x15F:
        return row + amount, np.ones(LANES, bool)
    raise NotImplementedError(f"DPP control {control:#x}")


def dpp(op: Instruction):
    """What reads a DPP instruction's first operand: its values and the lanes that take a result."""
    source, exists = dpp_sources(op.field("dpp"))
    bank = 1 << (_LANE & 15) // 4
    enabled = (op.field("row_mask") >> _LANE // 16 & 1 != 0) & (op.field("bank_mask") & bank != 0)
    is_zero_outside = bool(op.field("bc"))
    register = op.operand("vsrc0") - FIRST_VECTOR

    def read(w: Waves) -> tuple[np.ndarray, np.ndarray]:
        valid = exists & w.live[:, source]
        x = np.where(valid, w.v[register][:, source], np.uint32(0))
        live = w.live & enabled
        return x, live if is_zero_outside else live & valid

    return read


def swap(op: Instruction) -> Step | None:
    """V_PERMLANE16_SWAP_B32, V_PERMLANE32_SWAP_B32 of gfx950: odd rows of vdst with even rows of src0."""
    match = re.fullmatch(r"V_PERMLANE(16|32)_SWAP_B32", op.name)
    if match is None:
        return None
    size = int(match[1])
    odd = _LANE[_LANE // size % 2 == 1]
    first, second = op.operand("vdst") - FIRST_VECTOR, op.operand("src0") - FIRST_VECTOR

    def step(w: Waves) -> None:
        assert w.is_full, "lanes that do not execute"
        x = w.v[first][:, odd]
        w.v[first][:, odd] = w.v[second][:, odd - size]
        w.v[second][:, odd - size] = x

    return step


def lane_access(op: Instruction) -> Step | None:
    """V_READFIRSTLANE_B32, V_READLANE_B32, V_WRITELANE_B32."""
    if op.name not in ("V_READFIRSTLANE_B32", "V_READLANE_B32", "V_WRITELANE_B32"):
        return None
    # encodings of VOP1 and VOP3 give a scalar register the number of a vector register
    into = op.operand("vdst") - FIRST_VECTOR
    read = vector(op.operand("src0"), op.literal, "u")
    read_lane = None if op.name == "V_READFIRSTLANE_B32" else scalar(op.operand("src1"), None, "u")

    def lanes(w: Waves) -> np.ndarray:
        if read_lane is None:
            return w.live.argmax(1)
        return np.broadcast_to(read_lane(w) & np.uint32(63), w.index.shape)

    def read_step(w: Waves) -> None:
        x = np.broadcast_to(read(w), w.live.shape)
        w.s[into] = x[np.arange(len(x)), lanes(w)]

    def write_step(w: Waves) -> None:
        x = read(w)
        w.v[into][np.arange(len(w.index)), lanes(w)] = x[..., 0] if np.ndim(x) else x

    return write_step if op.name == "V_WRITELANE_B32" else read_step
