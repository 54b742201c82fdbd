"""Instructions that carry data from lane to lane, and between lanes and scalar registers.

Legend: as in registers.py.
"""

import re

import numpy as np

from amd.decode import FIRST_VECTOR, Instruction
from amd.registers import LANES, Step, Waves, scalar, vector

_LANE = np.arange(LANES)
_ALL = np.ones(LANES, bool)


def _from_lanes(w: Waves, x: np.ndarray, source: np.ndarray) -> np.ndarray:
    """x of the lane `source` of each lane, 0 from one that does not execute."""
    source = np.broadcast_to(source, x.shape)
    x = np.take_along_axis(x, source, 1)
    return x if w.is_full else np.where(np.take_along_axis(w.live, source, 1), x, np.uint32(0))


def permute(op: Instruction) -> Step | None:
    """DS_BPERMUTE_B32, DS_SWIZZLE_B32."""
    into, address = op.operand("vdst") - FIRST_VECTOR, vector(op.operand("addr"), "u")
    offset = op.field("offset0") | op.field("offset1") << 8
    if op.name == "DS_BPERMUTE_B32":
        data = vector(op.operand("data0"), "u")

        def step(w: Waves) -> None:
            source = (address(w) + np.int64(offset)) // 4 % LANES
            w.set_vector(into, _from_lanes(w, data(w), source))

        return step
    if op.name != "DS_SWIZZLE_B32":
        return None
    source = swizzle_sources(offset)
    # this instruction takes its data from the field that holds an address elsewhere
    return lambda w: w.set_vector(into, _from_lanes(w, address(w), source))


def swizzle_sources(offset: int) -> np.ndarray:
    """[64] the lane that DS_SWIZZLE_B32 reads: of the same four if bit 15 is set, else of the same 32 by three masks."""
    if offset & 0x8000:
        return _LANE & ~3 | offset >> 2 * (_LANE & 3) & 3
    return _LANE & 32 | (_LANE & 31 & offset | offset >> 5 & 31) ^ offset >> 10 & 31


def dpp_sources(control: int) -> tuple[np.ndarray, np.ndarray]:
    """[64] the lane that a DPP operand reads, and whether there is such a lane."""
    row, column, amount = _LANE & ~15, _LANE & 15, control & 15
    if control < 0x100:
        return _LANE & ~3 | control >> 2 * (_LANE & 3) & 3, _ALL
    if 0x101 <= control <= 0x10F:
        return row + (column + amount) % 16, column + amount < 16
    if 0x111 <= control <= 0x11F:
        return row + (column - amount) % 16, column >= amount
    if 0x121 <= control <= 0x12F:
        return row + (column - amount) % 16, _ALL
    if control in (0x140, 0x141):
        return _LANE ^ (15 if control == 0x140 else 7), _ALL
    if control == 0x142:
        # the last lane of a row to the next row
        return (row - 1) % LANES, _LANE >= 16
    if control == 0x143:
        return np.full(LANES, 31), _LANE >= 32
    if 0x150 <= control <= 0x15F:
        return row + amount, _ALL
    raise NotImplementedError(f"DPP control {control:#x}")


def dpp(op: Instruction):
    """What reads a DPP instruction's first operand: its bits and the lanes that take a result."""
    source, exists = dpp_sources(op.field("dpp"))
    banks = op.field("bank_mask") >> (_LANE & 15) // 4 & 1
    enabled = op.field("row_mask") >> _LANE // 16 & banks != 0
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
    first, second = (op.operand(x) - FIRST_VECTOR for x in ("vdst", "src0"))

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
    # the encoding numbers a scalar register as a vector register too
    into, read = op.operand("vdst") - FIRST_VECTOR, vector(op.operand("src0"), "u", op.literal)
    lane = None if op.name == "V_READFIRSTLANE_B32" else scalar(op, "src1", "u")

    def at(w: Waves) -> tuple[np.ndarray, np.ndarray]:
        lanes = w.live.argmax(1) if lane is None else lane(w) & np.uint32(63)
        return np.arange(len(w.live)), np.broadcast_to(lanes, len(w.live))

    def write(w: Waves) -> None:
        w.v[into][at(w)] = np.broadcast_to(read(w), (len(w.live), 1))[:, 0]

    def read_lane(w: Waves) -> None:
        w.set_scalar(into, np.broadcast_to(read(w), w.live.shape)[at(w)])

    return write if op.name == "V_WRITELANE_B32" else read_lane
