"""Reads a code object: where the kernel starts, what the card sets up for it, and its instructions.

The bit fields of instructions come from the package tinygrad, their meaning from the other files of this folder.
"""

import re
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tinygrad.renderer.amd import decode_inst
from tinygrad.runtime.autogen.amd.cdna.enum import VOP3POp

# Numbers of operands in encodings: registers of lanes from here on, then accumulator registers in our numbering.
FIRST_VECTOR = 256
ACCUMULATORS = 256
VCC, M0, EXEC, SCC, LITERAL = 106, 124, 126, 253, 255
# A float constant has the bits of its operand's type.
FLOAT_CONSTANTS = {240: 0.5, 241: -0.5, 242: 1.0, 243: -1.0, 244: 2.0, 245: -2.0, 246: 4.0, 247: -4.0}  # fmt: skip
INVERSE_TWO_PI = 248

# gfx90a numbers its products of bfloat16 apart; the later cards' instructions of the same meaning
_GFX90A_MATRIX = {
    102: VOP3POp.V_MFMA_F32_32X32X8_BF16.value,
    103: VOP3POp.V_MFMA_F32_16X16X16_BF16.value,
}
# opcodes with another name on a card than in the table
_GFX90A_NAMES = {"V_FMAMK_F32": "V_MADMK_F32", "V_FMAAK_F32": "V_MADAK_F32"}
_NAMES = {
    "V_MAD_MIX_F32": "V_FMA_MIX_F32",
    "V_MAD_MIXLO_F16": "V_FMA_MIXLO_F16",
    "V_MAD_MIXHI_F16": "V_FMA_MIXHI_F16",
}


@dataclass(frozen=True)
class Instruction:
    """A decoded instruction. `field` reads its bit fields, `operand` gives the number of an operand."""

    name: str
    pc: int
    size: int
    raw: Any
    card: str

    @cached_property
    def form(self) -> str:
        """Its encoding: "VOP2", "VOP2_SDWA", "DS", ..."""
        return type(self.raw).__name__

    def field(self, name: str, default: int = 0) -> int:
        return getattr(self.raw, name) if hasattr(type(self.raw), name) else default

    def operand(self, name: str) -> int | None:
        """Number of an operand, None if the encoding has none of that name."""
        for candidate in (f"v{name}", f"s{name}", name):
            if hasattr(type(self.raw), candidate):
                return getattr(self.raw, candidate).offset
        return None

    @property
    def literal(self) -> int | None:
        return getattr(self.raw, "literal", None)

    def __str__(self) -> str:
        return f"{self.raw} at byte {self.pc:#x}"


def decode(code: bytes, pc: int, card: str) -> Instruction:
    """The instruction at this byte of the code."""
    data = code[pc : pc + 16]
    (word,) = struct.unpack_from("<I", data)
    if card == "gfx90a" and word >> 23 == 0b110100111:
        number = word >> 16 & 0x7F
        word = word & ~(0x7F << 16) | _GFX90A_MATRIX.get(number, number) << 16
        data = struct.pack("<I", word) + data[4:]
    raw = decode_inst(data, "cdna")
    name = re.sub("_E(32|64)$", "", raw.op_name)
    name = _NAMES.get(name, name)
    if card == "gfx90a":
        name = _GFX90A_NAMES.get(name, name)
    return Instruction(name, pc, raw.size(), raw, card)


@dataclass(frozen=True)
class CodeObject:
    """The loaded segments of a kernel's file.

    entry: Byte of the first instruction. user_registers: scalar registers before the one that holds the number of the
    workgroup. registers: registers of a lane, accumulators included.
    """

    code: bytes
    entry: int
    user_registers: int
    kernarg_size: int
    accumulator_offset: int
    scratch: int


def load(file: bytes, name: str) -> CodeObject:
    """Loads the kernel `name` from its ELF file."""
    assert file[:4] == b"\x7fELF", "the code object is no ELF file"
    (first_header,) = struct.unpack_from("<Q", file, 0x20)
    size, count = struct.unpack_from("<HH", file, 0x36)
    segments, dynamic = [], {}
    for i in range(count):
        kind, _, offset, address, _, stored, _, _ = struct.unpack_from(
            "<IIQQQQQQ", file, first_header + i * size
        )
        if kind == 1:
            segments.append((address, file[offset : offset + stored]))
        elif kind == 2:
            dynamic = dict(struct.iter_unpack("<QQ", file[offset : offset + stored]))
    code = bytearray(max(address + len(data) for address, data in segments))
    for address, data in segments:
        code[address : address + len(data)] = data
    strings, symbols = dynamic[5], dynamic[6]
    # the symbol of the descriptor; the table of symbols ends where the next table begins
    wanted = f"{name}.kd".encode()
    for at in range(symbols, len(code) - 24, 24):
        string, _, _, _, descriptor, _ = struct.unpack_from("<IBBHQQ", code, at)
        if code[strings + string : strings + string + len(wanted) + 1] == wanted + b"\0":
            break
    else:
        raise ValueError(f"the code object has no kernel {name}")
    _, scratch, kernarg_size, _, entry = struct.unpack_from("<IIIIq", code, descriptor)
    resources3, _, resources2, properties = struct.unpack_from("<IIIH", code, descriptor + 44)
    # a pointer to the arguments alone, and of the workgroup its first number
    assert properties & 0x7F in (8, 8 | 32), f"{name} asks for registers that are not set up"
    # of flat scratch, gfx90a's, whose two registers come after the arguments
    return CodeObject(
        code=bytes(code),
        entry=descriptor + entry,
        user_registers=resources2 >> 1 & 31,
        kernarg_size=kernarg_size,
        accumulator_offset=((resources3 & 63) + 1) * 4,
        scratch=scratch,
    )
