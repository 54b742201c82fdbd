"""Registers of waves, tensors in global memory, local memory, and the instructions that move data between them.

Many waves execute one instruction at once: a scalar register is an array [waves], a vector register [waves, 64].

Legend
    w                  `Waves`
    live               [waves, 64] True where a lane executes, the bits of EXEC
    at                 [waves, 64] addresses, in bytes
"""

from collections.abc import Callable

import numpy as np
import torch

from amd.decode import (
    ACCUMULATORS,
    EXEC,
    FIRST_VECTOR,
    FLOAT_CONSTANTS,
    INVERSE_TWO_PI,
    LITERAL,
    SCC,
    Instruction,
)

LANES = 64
# Registers and local memory start as this: a NaN in float32, and twice in bfloat16 and float16.
POISON = np.uint32(0x7FC07FC0) | np.uint32(0x7C00)
Step = Callable[["Waves"], object]


class AccessError(Exception):
    """An access outside every tensor, or outside a workgroup's local memory."""


class Waves:
    """Registers of waves at one instruction.

    s, v: scalar and vector registers, 32-bit; i and f show v as integers and as floats. scc: [waves] bool.
    workgroup: [waves] the workgroup of each, counted from 0. index: the number of each wave in the launch.
    """

    def __init__(self, s, v, scc, workgroup, index, local, tensors, pc):
        self.s, self.v, self.scc = s, v, scc
        self.workgroup, self.index = workgroup, index
        self.local, self.tensors, self.pc = local, tensors, pc
        self.is_waiting = False
        self.i, self.f = v.view(np.int32), v.view(np.float32)
        self.update_live()

    @classmethod
    def start(cls, num_workgroups, waves_per_workgroup, local, tensors, pc):
        n = num_workgroups * waves_per_workgroup
        s, v = np.full((128, n), POISON), np.full((2 * ACCUMULATORS, n, LANES), POISON)
        s[EXEC : EXEC + 2] = 0xFFFFFFFF
        index = np.arange(n)
        workgroup = index // waves_per_workgroup
        lanes = np.arange(LANES)
        v[0] = lanes + (index % waves_per_workgroup)[:, None] * LANES
        return cls(s, v, np.zeros(n, bool), workgroup, index, local, tensors, pc)

    def update_live(self) -> None:
        """After a change of EXEC."""
        self.live = self.mask(EXEC)
        self.is_full = bool(self.live.all())

    def mask(self, register: int) -> np.ndarray:
        """[waves, 64] the bits of a pair of scalar registers."""
        pair = np.ascontiguousarray(self.s[register : register + 2].T)
        return np.unpackbits(pair.view(np.uint8), axis=1, bitorder="little").view(bool)

    def set_mask(self, register: int, mask: np.ndarray) -> None:
        """Sets the bits of a pair of scalar registers from [waves, 64]."""
        mask = np.broadcast_to(mask, (len(self.index), LANES))
        bits = np.packbits(mask, axis=1, bitorder="little").view(np.uint32)
        self.s[register], self.s[register + 1] = bits[:, 0], bits[:, 1]
        if register == EXEC:
            self.update_live()

    def set_vector(self, register: int, x: np.ndarray, live: np.ndarray | None = None) -> None:
        """Writes a vector register in the lanes that execute; 64-bit numbers take two registers."""
        x = np.asarray(x)
        if x.dtype.itemsize == 8:
            x = x.view(np.uint64)
            self.set_vector(register, x.astype(np.uint32), live)
            self.set_vector(register + 1, (x >> np.uint64(32)).astype(np.uint32), live)
            return
        into = self.f if x.dtype == np.float32 else self.i if x.dtype == np.int32 else self.v
        assert x.dtype == into.dtype, f"a result of type {x.dtype}"
        if live is not None:
            np.copyto(into[register], x, where=live)
        elif self.is_full:
            into[register] = x
        else:
            np.copyto(into[register], x, where=self.live)

    def pick(self, chosen: np.ndarray, pc: int) -> "Waves":
        """The chosen waves, to go on at pc."""
        return Waves(
            self.s[:, chosen], self.v[:, chosen], self.scc[chosen], self.workgroup[chosen],
            self.index[chosen], self.local, self.tensors, pc,
        )  # fmt: skip

    def join(self, other: "Waves") -> "Waves":
        """These and others that have reached the same instruction."""
        both = (
            np.concatenate([getattr(self, name), getattr(other, name)], axis=axis)
            for name, axis in (("s", 1), ("v", 1), ("scc", 0), ("workgroup", 0), ("index", 0))
        )
        return Waves(*both, self.local, self.tensors, self.pc)


# type of an operand -> bytes, NumPy's type
TYPES = {
    "u": np.uint32, "i": np.int32, "f": np.float32, "U": np.uint64, "I": np.int64, "d": np.float64,
    "w": np.uint16, "h": np.float16,
}  # fmt: skip


def constant(number: int, literal: int | None, kind: str) -> np.generic | None:
    """The value of an operand that is a constant, None if it is a register."""
    dtype = np.dtype(TYPES[kind])
    unsigned = np.dtype(f"u{dtype.itemsize}")
    if number == LITERAL:
        bits = unsigned.type(literal & (1 << 8 * dtype.itemsize) - 1)
        if dtype == np.float64:
            bits = np.uint64(literal << 32)
        elif dtype == np.int64:
            bits = np.int64(np.uint32(literal).view(np.int32)).view(np.uint64)
    elif 128 <= number <= 208:
        value = number - 128 if number <= 192 else 192 - number
        bits = np.array(value).astype(f"i{dtype.itemsize}").view(unsigned)[()]
    elif number in FLOAT_CONSTANTS or number == INVERSE_TWO_PI:
        value = FLOAT_CONSTANTS.get(number, 0.15915494309189535)
        bits = np.array(value, f"f{dtype.itemsize}").view(unsigned)[()]
    else:
        return None
    return bits.view(dtype)


def scalar(number: int, literal: int | None, kind: str) -> Callable[[Waves], np.ndarray]:
    """Reads a scalar operand: [waves], or a constant without dimension."""
    value = constant(number, literal, kind)
    if value is not None:
        return lambda w: value
    dtype = TYPES[kind]
    if number == SCC:
        return lambda w: w.scc.astype(dtype)
    assert number < 128, f"scalar operand {number}"
    if kind in "uif":
        return lambda w: w.s[number].view(dtype)
    if kind in "wh":
        return lambda w: w.s[number].astype(np.uint16).view(dtype)
    return lambda w: pair(w.s[number], w.s[number + 1]).view(dtype)


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """64-bit numbers from their halves."""
    return high.astype(np.uint64) << np.uint64(32) | low


def vector(number: int, literal: int | None, kind: str) -> Callable[[Waves], np.ndarray]:
    """Reads an operand of a vector instruction: [waves, 64], or what broadcasts against it."""
    if number < FIRST_VECTOR:
        read = scalar(number, literal, kind)
        if constant(number, literal, kind) is not None:
            return read
        return lambda w: read(w)[:, None]
    register, dtype = number - FIRST_VECTOR, TYPES[kind]
    if kind == "u":
        return lambda w: w.v[register]
    if kind == "f":
        return lambda w: w.f[register]
    if kind == "i":
        return lambda w: w.i[register]
    if kind in "wh":
        return lambda w: w.v[register].astype(np.uint16).view(dtype)
    return lambda w: pair(w.v[register], w.v[register + 1]).view(dtype)


def gather(words: np.ndarray, at: np.ndarray, num_bytes: int) -> list[np.ndarray]:
    """Registers' worth of the bytes [at, at + num_bytes) of memory; one or two bytes are extended by zeros."""
    if num_bytes < 4:
        data = words.view(np.uint8)
        x = data[at].astype(np.uint32)
        return [x | data[at + 1].astype(np.uint32) << np.uint32(8) if num_bytes == 2 else x]
    if not (at & 3).any():
        at = at >> 2
        return [words[at + j] for j in range(num_bytes // 4)]
    data = words.view(np.uint8)
    return [
        np.ascontiguousarray(data[(at + 4 * j)[..., None] + np.arange(4)]).view(np.uint32)[..., 0]
        for j in range(num_bytes // 4)
    ]


def scatter(words: np.ndarray, at: np.ndarray, num_bytes: int, registers: list[np.ndarray]) -> None:
    """Writes what `gather` reads."""
    if num_bytes >= 4 and not (at & 3).any():
        for j in range(num_bytes // 4):
            words[(at >> 2) + j] = registers[j]
        return
    data = words.view(np.uint8)
    for j in range(num_bytes):
        data[at + j] = registers[j // 4] >> np.uint32(8 * (j % 4))


class Tensors:
    """Global memory: copies of the storages that a launch may touch, apart from each other, and whose bytes are a tensor's.

    Lanes that do not execute read bytes of the zeros at the start and write to those after them.
    """

    BASE = 1 << 40
    _ZEROS, _BIN, _FIRST = 0, 256, 512
    # between storages: an index that is wrong by a row shall not meet another tensor
    _GAP = 4096

    def __init__(self):
        self._storages: dict[int, tuple[int, torch.Tensor]] = {}
        self._end = self._FIRST
        self._names: list[str] = []
        self._views: list[tuple[int, torch.Tensor]] = []
        self._bytes: list[tuple[int, np.ndarray]] = []

    def add(self, name: str, x: torch.Tensor) -> int:
        """Makes the elements of a tensor accessible; returns its address."""
        storage = x.untyped_storage()
        key = storage.data_ptr()
        if key not in self._storages:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[key] = self._reserve(len(flat)), flat
        offset = self._storages[key][0] + x.data_ptr() - key
        self._views.append((offset, x))
        self._names.append(name)
        return self.BASE + offset

    def add_bytes(self, name: str, data: bytes) -> int:
        offset = self._reserve(len(data))
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._storages[-len(self._storages) - 1] = offset, flat
        self._views.append((offset, flat))
        self._names.append(name)
        return self.BASE + offset

    def _reserve(self, size: int) -> int:
        offset = self._end
        self._end = -(-(offset + size + self._GAP) // 256) * 256
        return offset

    def __enter__(self) -> "Tensors":
        self.words = np.zeros(self._end // 4, np.uint32)
        self.owner = np.zeros(self._end, np.uint8)
        self.owner[: self._FIRST] = 255
        for offset, flat in self._storages.values():
            self.words.view(np.uint8)[offset : offset + len(flat)] = flat.numpy()
        for number, (offset, x) in enumerate(self._views, 1):
            if x.numel():
                size = x.element_size()
                strides = (*(s * size for s in x.stride()), 1)
                elements = np.lib.stride_tricks.as_strided(
                    self.owner[offset:], (*x.shape, size), strides
                )
                elements[...] = number
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            for offset, flat in self._storages.values():
                flat.copy_(torch.from_numpy(self.words.view(np.uint8)[offset : offset + len(flat)]))

    def _offsets(self, at: np.ndarray, live: np.ndarray, num_bytes: int, idle: int) -> np.ndarray:
        offset = np.where(live, at.astype(np.int64) - self.BASE, idle)
        inside = (offset >= 0) & (offset < self._end - num_bytes)
        safe = np.where(inside, offset, 0)
        inside &= (self.owner[safe] > 0) & (self.owner[safe + num_bytes - 1] > 0)
        if not inside.all():
            self._fail(offset, inside, num_bytes)
        return offset

    def _fail(self, offset: np.ndarray, inside: np.ndarray, num_bytes: int) -> None:
        where = np.unravel_index(np.argmin(inside), inside.shape)
        at = int(offset[where])
        near = [
            f"{at - start:+} from the start of {name} {list(x.shape)} {str(x.dtype)[6:]}"
            for name, (start, x) in zip(self._names, self._views, strict=True)
            if -self._GAP <= at - start < x.untyped_storage().nbytes() + self._GAP
        ]
        raise AccessError(
            f"{num_bytes} bytes at {self.BASE + at:#x} are in no tensor ({'; '.join(near) or 'none is near'}), "
            f"lane {where[-1]}"
        )

    def read(self, at: np.ndarray, live: np.ndarray, num_bytes: int) -> list[np.ndarray]:
        return gather(self.words, self._offsets(at, live, num_bytes, self._ZEROS), num_bytes)

    def write(self, at, live, num_bytes: int, registers: list[np.ndarray]) -> None:
        scatter(self.words, self._offsets(at, live, num_bytes, self._BIN), num_bytes, registers)


class Local:
    """Local memory of all workgroups, one after another; a lane that does not execute reads and writes the last bytes."""

    def __init__(self, num_workgroups: int, size: int):
        self.size, self._stride = size, -(-size // 16) * 16
        self._idle = num_workgroups * self._stride
        self.words = np.full(self._idle // 4 + 64, POISON)

    def _offsets(self, w: Waves, at: np.ndarray, num_bytes: int) -> np.ndarray:
        at = at.astype(np.int64)
        outside = w.live & (at + num_bytes > self.size)
        if outside.any():
            wave, lane = np.unravel_index(np.argmax(outside), outside.shape)
            raise AccessError(
                f"{num_bytes} bytes at {at[wave, lane]} of {self.size} bytes of local memory, lane {lane}"
            )
        return np.where(w.live, at + w.workgroup[:, None] * self._stride, self._idle)

    def read(self, w: Waves, at: np.ndarray, num_bytes: int) -> list[np.ndarray]:
        return gather(self.words, self._offsets(w, at, num_bytes), num_bytes)

    def write(self, w: Waves, at: np.ndarray, num_bytes: int, registers: list[np.ndarray]) -> None:
        scatter(self.words, self._offsets(w, at, num_bytes), num_bytes, registers)


_SIZES = {
    "UBYTE": 1, "USHORT": 2, "BYTE": 1, "SHORT": 2, "DWORD": 4, "DWORDX2": 8, "DWORDX3": 12, "DWORDX4": 16,
    "DWORDX8": 32, "DWORDX16": 64, "U8": 1, "U16": 2, "B8": 1, "B16": 2, "B32": 4, "B64": 8, "B96": 12, "B128": 16,
}  # fmt: skip


def _data(op: Instruction, name: str) -> int:
    """The vector register that a memory instruction reads or writes."""
    return op.operand(name) - FIRST_VECTOR + ACCUMULATORS * op.field("acc")


def _count(num_bytes: int) -> int:
    return -(-num_bytes // 4)


def scalar_load(op: Instruction) -> Step | None:
    """S_LOAD_DWORD*."""
    if not op.name.startswith("S_LOAD_DWORD"):
        return None
    num_bytes = _SIZES[op.name.removeprefix("S_LOAD_")]
    base, into = op.operand("sbase"), op.operand("sdata")
    offset = (
        np.int64((op.field("offset") & 0x1FFFFF ^ 0x100000) - 0x100000) if op.field("imm") else 0
    )
    read_base = scalar(base, None, "I")
    read_offset = scalar(op.operand("soffset"), None, "u") if op.field("soffset_en") else None

    def step(w: Waves) -> None:
        at = read_base(w) + offset
        if read_offset is not None:
            at = at + read_offset(w)
        at = at & ~np.int64(3)
        for j, x in enumerate(w.tensors.read(at[:, None], np.ones((len(at), 1), bool), num_bytes)):
            w.s[into + j] = x[:, 0]

    return step


def buffer(op: Instruction) -> Step | None:
    """BUFFER_LOAD_* and BUFFER_STORE_*: offsets past the end of the buffer read 0 and write nothing."""
    _, action, *kind = op.name.split("_")
    kind = "_".join(kind)
    if (
        action not in ("LOAD", "STORE")
        or kind not in _SIZES
        or kind in ("BYTE", "SHORT")
        and action == "LOAD"
    ):
        return None
    assert not op.field("idxen"), "an index"
    assert not op.field("lds"), "a load to local memory"
    num_bytes = _SIZES[kind]
    resource, register = op.operand("srsrc"), _data(op, "vdata")
    read_offset = (
        vector(op.operand("vaddr"), None, "u") if op.field("offen") else lambda w: np.uint32(0)
    )
    read_base = scalar(op.operand("soffset"), op.literal, "u")
    fixed = np.int64(op.field("offset"))

    def step(w: Waves) -> None:
        base = w.s[resource] + ((w.s[resource + 1] & np.uint32(0xFFFF)).astype(np.int64) << 32)
        from_scalar = read_base(w).astype(np.int64)
        offset = np.broadcast_to(read_offset(w) + fixed, w.live.shape)
        size = (w.s[resource + 2].astype(np.int64) - from_scalar)[:, None]
        inside = w.live & (offset + min(num_bytes, 4) <= size)
        at = (base + from_scalar)[:, None] + offset
        if action == "STORE":
            registers = [w.v[register + j] for j in range(_count(num_bytes))]
            w.tensors.write(at, inside, num_bytes, registers)
            return
        for j, x in enumerate(w.tensors.read(at, inside, num_bytes)):
            w.set_vector(register + j, x)

    return step


def flat(op: Instruction) -> Step | None:
    """GLOBAL_LOAD_*, GLOBAL_STORE_*."""
    space, action, *kind = op.name.split("_")
    kind = "_".join(kind)
    if space != "GLOBAL" or action not in ("LOAD", "STORE") or kind not in _SIZES:
        return None
    if kind in ("BYTE", "SHORT") and action == "LOAD":
        return None
    num_bytes = _SIZES[kind]
    base = op.operand("saddr")
    fixed = np.int64((op.field("offset") & 0x1FFF ^ 0x1000) - 0x1000)
    register = _data(op, "vdst" if action == "LOAD" else "data")
    address = op.operand("addr")
    if base in (124, 125, 127):
        read_at = vector(address, None, "I")
    else:
        read_base, read_offset = scalar(base, None, "I"), vector(address, None, "u")

        def read_at(w):
            return read_base(w)[:, None] + read_offset(w).astype(np.int64)

    def step(w: Waves) -> None:
        at = read_at(w) + fixed
        if action == "STORE":
            w.tensors.write(
                at, w.live, num_bytes, [w.v[register + j] for j in range(_count(num_bytes))]
            )
            return
        for j, x in enumerate(w.tensors.read(at, w.live, num_bytes)):
            w.set_vector(register + j, x)

    return step
