"""Instructions that load and store: from tensors to scalar and vector registers, and in local memory.

Legend: as in registers.py and memory.py.
"""

import re

import numpy as np

from amd.decode import ACCUMULATORS, FIRST_VECTOR, Instruction
from amd.memory import num_registers
from amd.registers import LANES, Step, Waves, scalar, vector

_LOADED = {"UBYTE": 1, "USHORT": 2, "DWORD": 4, "DWORDX2": 8, "DWORDX3": 12, "DWORDX4": 16}
_STORED = _LOADED | {"BYTE": 1, "SHORT": 2}
_LOADED_SCALARS = _LOADED | {"DWORDX8": 32, "DWORDX16": 64}
_LOCAL_READ = {"U8": 1, "U16": 2, "B32": 4, "B64": 8, "B96": 12, "B128": 16}
_LOCAL_WRITTEN = {"B8": 1, "B16": 2, "B32": 4, "B64": 8, "B96": 12, "B128": 16}


def _register(op: Instruction, name: str) -> int:
    """The vector register, or accumulator, that a memory instruction reads or writes."""
    return op.operand(name) - FIRST_VECTOR + ACCUMULATORS * op.field("acc")


def _signed_field(op: Instruction, bits: int) -> np.int64:
    sign = 1 << bits - 1
    return np.int64((op.field("offset") & 2 * sign - 1 ^ sign) - sign)


def scalar_load(op: Instruction) -> Step | None:
    """S_LOAD_DWORD*."""
    num_bytes = _LOADED_SCALARS.get(op.name.removeprefix("S_LOAD_"))
    if num_bytes is None:
        return None
    into, fixed = op.operand("sdata"), _signed_field(op, 21) if op.field("imm") else np.int64(0)
    base = scalar(op, "sbase", "I")
    offset = scalar(op, "soffset", "u") if op.field("soffset_en") else lambda w: np.uint32(0)

    def step(w: Waves) -> None:
        at = base(w) + fixed + offset(w) & ~np.int64(3)
        live = np.ones((len(at), 1), bool)
        for j, x in enumerate(w.tensors.read(w, at[:, None], live, num_bytes)):
            w.set_scalar(into + j, x[:, 0])

    return step


def _load_or_store(is_store: bool, register: int, num_bytes: int, addresses) -> Step:
    """Moves registers; `addresses` gives where, and which lanes do."""

    def store(w: Waves) -> None:
        registers = [w.v[register + j] for j in range(num_registers(num_bytes))]
        w.tensors.write(w, *addresses(w), num_bytes, registers)

    def load(w: Waves) -> None:
        for j, x in enumerate(w.tensors.read(w, *addresses(w), num_bytes)):
            w.set_vector(register + j, x)

    return store if is_store else load


def buffer(op: Instruction) -> Step | None:
    """BUFFER_LOAD_* and BUFFER_STORE_*: offsets past the end of the buffer read 0 and write nothing."""
    match = re.fullmatch("BUFFER_(LOAD|STORE)_(.*)", op.name)
    num_bytes = match and (_STORED if match[1] == "STORE" else _LOADED).get(match[2])
    if num_bytes is None:
        return None
    assert op.field("idxen") == 0, "an index"
    assert op.field("lds") == 0, "a load to local memory"
    resource, fixed = op.operand("srsrc"), np.int64(op.field("offset"))
    offset_of = vector(op.operand("vaddr"), "u") if op.field("offen") else lambda w: np.uint32(0)
    scalar_offset = scalar(op, "soffset", "u")

    def addresses(w: Waves):
        low, high, size = (x.astype(np.int64) for x in w.s[resource : resource + 3])
        start = scalar_offset(w).astype(np.int64)
        offset = np.broadcast_to(offset_of(w) + fixed, w.live.shape)
        inside = offset + min(num_bytes, 4) <= (size - start)[:, None]
        return (low + ((high & 0xFFFF) << 32) + start)[:, None] + offset, w.live & inside

    return _load_or_store(match[1] == "STORE", _register(op, "vdata"), num_bytes, addresses)


def global_memory(op: Instruction) -> Step | None:
    """GLOBAL_LOAD_*, GLOBAL_STORE_*."""
    match = re.fullmatch("GLOBAL_(LOAD|STORE)_(.*)", op.name)
    num_bytes = match and (_STORED if match[1] == "STORE" else _LOADED).get(match[2])
    if num_bytes is None:
        return None
    fixed = _signed_field(op, 13)
    if op.operand("saddr") == 127:
        at = vector(op.operand("addr"), "I")
    else:
        base, offset = scalar(op, "saddr", "I"), vector(op.operand("addr"), "u")

        def at(w):
            return base(w)[:, None] + offset(w)

    is_store = match[1] == "STORE"
    register = _register(op, "data" if is_store else "vdst")
    return _load_or_store(is_store, register, num_bytes, lambda w: (at(w) + fixed, w.live))


def local_memory(op: Instruction) -> Step | None:
    """DS_READ*, DS_WRITE*."""
    pattern = r"DS_(READ|WRITE)(2|2ST64)?_([A-Z]\d+)(_D16_HI|_TR_B16)?"
    match = re.fullmatch(pattern, op.name)
    num_bytes = match and (_LOCAL_READ if match[1] == "READ" else _LOCAL_WRITTEN).get(match[3])
    if num_bytes is None or match[4] == "_D16_HI" and match[1] == "READ":
        return None
    at = vector(op.operand("addr"), "u")
    if match[2]:
        scale = num_bytes * (64 if match[2] == "2ST64" else 1)
        offsets = [np.int64(op.field(f"offset{i}") * scale) for i in range(2)]
    else:
        offsets = [np.int64(op.field("offset0") | op.field("offset1") << 8)]
    into, sources = _register(op, "vdst"), [_register(op, f"data{i}") for i in range(2)]

    def write(w: Waves) -> None:
        for offset, source in zip(offsets, sources, strict=False):
            registers = [w.v[source + j] for j in range(num_registers(num_bytes))]
            if match[4]:
                registers = [registers[0] >> np.uint32(16)]
            w.local.write(w, at(w) + offset, num_bytes, registers)

    def read(w: Waves) -> None:
        # all is read before a register is written: the address may be in one of them
        registers = [x for offset in offsets for x in w.local.read(w, at(w) + offset, num_bytes)]
        for j, x in enumerate(_transposed(registers) if match[4] else registers):
            w.set_vector(into + j, x)

    return write if match[1] == "WRITE" else read


def _transposed(registers: list[np.ndarray]) -> list[np.ndarray]:
    """Of 16 lanes, four hold a row of 16 numbers of 16 bits; lane i of them gets column i of the four rows."""
    x = np.stack(registers, -1).view(np.uint16).reshape(-1, 4, 4, 16)
    x = np.ascontiguousarray(x.swapaxes(2, 3)).view(np.uint32)
    return [x[..., j].reshape(-1, LANES) for j in range(2)]
