"""Makes single instructions and random registers, for the tests of the emulator's instructions."""

import numpy as np
from tinygrad.renderer.amd.dsl import FixedBitField
from tinygrad.runtime.autogen.amd.cdna import enum, ins

from amd.decode import EXEC, VCC, decode
from amd.memory import Local
from amd.registers import LANES, Waves

# number of the first vector register in fields that name scalar registers and constants too
V = 256
_INTEGERS = np.array([0, 1, 2, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1, 0xFFFF, 0x10000], np.uint32)
_FLOATS = np.array([0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-40, -1e-42, 3e38, 1e-38], np.float32)  # fmt: skip


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


def pair(registers, i):
    return int(registers[i]) | int(registers[i + 1]) << 32


def bits_of(mask):
    return sum(1 << int(i) for i in np.flatnonzero(mask))


def check_lanes(w, before, after, expected, size, is_float=False):
    """Lanes that execute have the expected bits, and lanes that do not have the bits from before."""
    for wave, lane in np.ndindex(2, LANES):
        old, new = (pair(x[:, wave, lane], 0) & (1 << size) - 1 for x in (before, after))
        want = expected(wave, lane) & (1 << size) - 1 if w.live[wave, lane] else old
        assert same(new, want, is_float), f"wave {wave}, lane {lane}: {new:#x}, not {want:#x}"
