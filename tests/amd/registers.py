"""Registers of waves, and what reads the operands of an instruction.

Many waves execute one instruction at once: a scalar register is an array [waves], a vector register [waves, 64].

Legend
    w                  `Waves`
    live               [waves, 64] True where a lane executes, the bits of EXEC
    kind               type of an operand, a key of TYPES
"""

from collections.abc import Callable

import numpy as np

from amd.decode import (
    ACCUMULATORS,
    EXEC,
    FIRST_VECTOR,
    FLOAT_CONSTANTS,
    LITERAL,
    SCC,
    Instruction,
)

LANES = 64
# Registers and local memory start as this, a NaN in float32 and two in bfloat16 and float16.
POISON = np.uint32(0x7FC07FC0 | 0x7C007C00)
TYPES = {
    "u": np.uint32, "i": np.int32, "f": np.float32, "w": np.uint16, "h": np.float16,
    "U": np.uint64, "I": np.int64, "d": np.float64,
}  # fmt: skip


class Waves:
    """Registers of waves at one instruction.

    s, v: scalar and vector registers, 32-bit; i and f show v as integers and floats. scc: [waves] bool.
    index, workgroup: [waves] number of each in the launch, and of its workgroup. pc: byte of the instruction.
    """

    def __init__(self, s, v, scc, index, workgroup, memory, pc):
        self.s, self.v, self.scc, self.index, self.workgroup = s, v, scc, index, workgroup
        self.tensors, self.local = self._memory = memory
        self.pc, self.is_waiting, self.num_branches = pc, False, 0
        self.i, self.f = v.view(np.int32), v.view(np.float32)
        self.update_live()

    @classmethod
    def start(cls, num_workgroups: int, waves_per_workgroup: int, memory, pc: int) -> "Waves":
        index = np.arange(n := num_workgroups * waves_per_workgroup)
        s, v = np.full((128, n), POISON), np.full((2 * ACCUMULATORS, n, LANES), POISON)
        s[EXEC : EXEC + 2] = 0xFFFFFFFF
        v[0] = np.arange(LANES) + (index % waves_per_workgroup)[:, None] * LANES
        return cls(s, v, np.zeros(n, bool), index, index // waves_per_workgroup, memory, pc)

    def pick(self, chosen: np.ndarray, pc: int) -> "Waves":
        """The chosen waves, to go on at pc."""
        parts = (x[..., chosen, :] if x is self.v else x[..., chosen] for x in self._parts())
        return Waves(*parts, self._memory, pc)

    def join(self, other: "Waves") -> "Waves":
        """These waves and more that have reached the same instruction."""
        parts = zip(self._parts(), other._parts(), strict=True)
        both = (np.concatenate(x, axis=1 if x[0].ndim > 1 else 0) for x in parts)
        return Waves(*both, self._memory, self.pc)

    def _parts(self) -> tuple[np.ndarray, ...]:
        return self.s, self.v, self.scc, self.index, self.workgroup

    def update_live(self) -> None:
        """After a change of EXEC."""
        self.live = self.mask(EXEC)
        self.is_full = bool(self.live.all())

    def mask(self, register: int) -> np.ndarray:
        """[waves, 64] the bits of a pair of scalar registers."""
        pairs = np.ascontiguousarray(self.s[register : register + 2].T)
        return np.unpackbits(pairs.view(np.uint8), axis=1, bitorder="little").view(bool)

    def set_mask(self, register: int, mask: np.ndarray) -> None:
        """Sets the bits of a pair of scalar registers from [waves, 64]."""
        bits = np.packbits(np.broadcast_to(mask, self.live.shape), axis=1, bitorder="little")
        self.set_scalar(register, bits.view(np.uint64)[:, 0])

    def set_scalar(self, register: int, x: np.ndarray) -> None:
        """Writes a scalar register; 64-bit numbers take two."""
        x = np.asarray(x)
        if x.dtype.itemsize == 8:
            self.s[register + 1] = x.view(np.uint64) >> np.uint64(32)
        self.s[register] = x.astype(np.uint32) if x.dtype.itemsize == 8 else x.view(np.uint32)
        if EXEC <= register <= EXEC + 1:
            self.update_live()

    def set_vector(self, register: int, x: np.ndarray, live: np.ndarray | None = None) -> None:
        """Writes a vector register in the lanes that execute; 64-bit numbers take two."""
        x = np.asarray(x)
        if x.dtype.itemsize == 8:
            x = x.view(np.uint64)
            self.set_vector(register + 1, (x >> np.uint64(32)).astype(np.uint32), live)
            x = x.astype(np.uint32)
        into = self.f if x.dtype == np.float32 else self.i if x.dtype == np.int32 else self.v
        assert x.dtype == into.dtype, f"a result of type {x.dtype}"
        if live is None and self.is_full:
            into[register] = x
        else:
            np.copyto(into[register], x, where=self.live if live is None else live)


Step = Callable[[Waves], object]
Read = Callable[[Waves], np.ndarray]


def constant(number: int, literal: int | None, kind: str) -> np.generic | None:
    """The value of an operand that is a constant, None if it is a register."""
    dtype = np.dtype(TYPES[kind])
    if number == LITERAL:
        # the upper half of a float64; else the lower bits, with their sign if the type has one
        value = literal << 32 if kind == "d" else literal
        if kind in "iI":
            value = (literal ^ 1 << 31) - (1 << 31)
        value = np.array(value & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}")
    elif 128 <= number <= 208:
        value = np.array(number - 128 if number <= 192 else 192 - number, f"i{dtype.itemsize}")
    elif number in FLOAT_CONSTANTS:
        value = np.array(FLOAT_CONSTANTS[number], f"f{dtype.itemsize}")
    else:
        return None
    return value.view(dtype)[()]


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """64-bit numbers from their halves."""
    return high.astype(np.uint64) << np.uint64(32) | low


def _typed(read: Read, kind: str) -> Read:
    """An operand of 32 bits as its type."""
    dtype = TYPES[kind]
    if kind in "wh":
        return lambda w: read(w).astype(np.uint16).view(dtype)
    return read if kind == "u" else lambda w: read(w).view(dtype)


def scalar(op: Instruction, name: str, kind: str) -> Read:
    """Reads a scalar operand: [waves], or a constant without dimension."""
    number, dtype = op.operand(name), TYPES[kind]
    value = constant(number, op.literal, kind)
    if value is not None:
        return lambda w: value
    if number == SCC:
        return lambda w: w.scc.astype(dtype)
    assert number < 128, f"scalar operand {number}"
    if kind in "UId":
        return lambda w: pair(w.s[number], w.s[number + 1]).view(dtype)
    return _typed(lambda w: w.s[number], kind)


def vector(
    number: int, kind: str, literal: int | None = None, select: Callable | None = None
) -> Read:
    """Reads an operand of a vector instruction: [waves, 64], or what broadcasts against it.

    select: takes a part of the 32 bits, before they become their type.
    """
    value = constant(number, literal, "u" if select else kind)
    assert value is not None or number < 128 or number >= FIRST_VECTOR, f"operand {number}"
    register, dtype = number - FIRST_VECTOR, TYPES[kind]
    if value is not None:
        return _typed(lambda w: select(value), kind) if select else lambda w: value
    if kind in "UId":
        if number < FIRST_VECTOR:
            return lambda w: pair(w.s[number], w.s[number + 1]).view(dtype)[:, None]
        return lambda w: pair(w.v[register], w.v[register + 1]).view(dtype)

    def read(w: Waves) -> np.ndarray:
        bits = w.s[number][:, None] if number < FIRST_VECTOR else w.v[register]
        return select(bits) if select else bits

    return _typed(read, kind)
