"""Reads a code object: where the kernel starts, what the card sets up for it, and its instructions.

The package tinygrad gives the bit fields of instructions. The files scalar.py, vector.py, ... give their meaning.
"""

import math
import re
import struct
from dataclasses import dataclass

from tinygrad.renderer.amd import decode_inst
from tinygrad.renderer.amd.dsl import AlignedSGPRField, Inst, SRsrcField, VGPRField
from tinygrad.runtime.autogen.amd.cdna.enum import VOP3POp
from tinygrad.runtime.autogen.amd.cdna.ins import VOP3P_MFMA
from tinygrad.runtime.autogen.amdgpu_kd import llvm_amdhsa_kernel_descriptor_t
from tinygrad.runtime.support.elf import elf_loader

# Numbers of operands in encodings: registers of lanes from here on, then accumulator registers in our numbering.
FIRST_VECTOR = 256
ACCUMULATORS = 256
VCC, EXEC, SCC, LITERAL = 106, 126, 253, 255
# A float constant has the bits of its operand's type.
FLOAT_CONSTANTS = {240: 0.5, 241: -0.5, 242: 1.0, 243: -1.0, 244: 2.0, 245: -2.0, 246: 4.0, 247: -4.0, 248: 0.5 / math.pi}  # fmt: skip

# gfx90a numbers its products of bfloat16 apart; the later cards' instructions of the same meaning
_GFX90A_MATRIX = {
    102: VOP3POp.V_MFMA_F32_32X32X8_BF16.value,
    103: VOP3POp.V_MFMA_F32_16X16X16_BF16.value,
}
# opcodes with another name on a card than in the table
_GFX90A_NAMES = {"V_FMAMK_F32": "V_MADMK_F32"}
_NAMES = {
    "V_MAD_MIX_F32": "V_FMA_MIX_F32",
    "V_MAD_MIXLO_F16": "V_FMA_MIXLO_F16",
    "V_MAD_MIXHI_F16": "V_FMA_MIXHI_F16",
}


@dataclass(frozen=True)
class Instruction:
    """A decoded instruction. encoding: tinygrad's class, which names the bit fields. bits: all of it."""

    name: str
    encoding: type[Inst]
    pc: int
    bits: int
    card: str

    @property
    def form(self) -> str:
        """ "VOP2", "VOP2_SDWA", "DS", ..."""
        return self.encoding.__name__

    @property
    def size(self) -> int:
        return self.encoding._size()

    def has(self, name: str) -> bool:
        return hasattr(self.encoding, name)

    def field(self, name: str, default: int = 0) -> int:
        """Bits of this name, the default in an encoding without them."""
        field = getattr(self.encoding, name, None)
        return default if field is None else self.bits >> field.lo & field.mask

    def operand(self, *names: str) -> int:
        """Number of the register or constant in the first of these fields that the encoding has."""
        field = next(getattr(self.encoding, name) for name in names if self.has(name))
        bits = self.bits >> field.lo & field.mask
        if isinstance(field, AlignedSGPRField):
            return bits * (4 if isinstance(field, SRsrcField) else 2)
        return bits + (FIRST_VECTOR if isinstance(field, VGPRField) else 0)

    @property
    def literal(self) -> int | None:
        return self.field("literal") if self.has("literal") else None

    def __str__(self) -> str:
        text = self.encoding.from_bytes(self.bits.to_bytes(self.size, "little"))
        return f"{text} at byte {self.pc:#x}"


_encodings: dict[tuple[int, ...], tuple[type[Inst], str]] = {}


def _encoding(data: bytes) -> tuple[type[Inst], str]:
    """Encoding and name; found once for instructions that differ in registers alone, since a search takes long."""
    (word,) = struct.unpack_from("<I", data)
    if word >> 31 == 0:
        # VOP2, VOPC and VOP1 with their opcodes; the first operand may announce SDWA, DPP or a literal
        opcode = {0x3E: word >> 17 & 0xFF, 0x3F: word >> 9 & 0xFF}.get(word >> 25, 0)
        key = word >> 25, opcode, word & 0x1FF if word & 0x1FF in (249, 250, 255) else 0
    elif word >> 30 == 0b10:
        # scalar: SOP1, SOPC and SOPP have their opcodes further down
        shift = {0b101111101: 8, 0b101111110: 16, 0b101111111: 16}.get(word >> 23)
        opcode = word >> shift & (0xFF if shift == 8 else 0x7F) if shift else 0
        key = word >> 23, opcode, (word & 0xFF == 255) | (word >> 8 & 0xFF == 255)
    else:
        key = word >> 16, word >> 14 & 3
    if key not in _encodings:
        instruction = decode_inst(data, "cdna")
        name = re.sub("_E(32|64)$", "", instruction.op_name)
        # the table has XF32 under the encoding without accumulators
        encoding = VOP3P_MFMA if name.startswith("V_MFMA") else type(instruction)
        _encodings[key] = encoding, _NAMES.get(name, name)
    return _encodings[key]


def decode(code: bytes, pc: int, card: str) -> Instruction:
    """The instruction at this byte of the code."""
    data = code[pc : pc + 16]
    (word,) = struct.unpack_from("<I", data)
    if card == "gfx90a" and word >> 23 == 0b110100111:
        number = word >> 16 & 0x7F
        word = word & ~(0x7F << 16) | _GFX90A_MATRIX.get(number, number) << 16
        data = struct.pack("<I", word) + data[4:]
    encoding, name = _encoding(data)
    if card == "gfx90a":
        name = _GFX90A_NAMES.get(name, name)
    bits = int.from_bytes(data[: encoding._size()], "little")
    return Instruction(name, encoding, pc, bits, card)


@dataclass(frozen=True)
class CodeObject:
    """A loaded kernel.

    entry: byte of the first instruction. argument_register: first of the two scalar registers with the address of the
    arguments. user_registers: scalar registers before the one with the number of the workgroup. scratch: bytes of
    memory that a lane asks for.
    """

    code: bytes
    entry: int
    argument_register: int
    user_registers: int
    arguments_size: int
    scratch: int


def load(file: bytes) -> CodeObject:
    """Loads the one kernel of an ELF file."""
    code, sections, _ = elf_loader(file)
    at = next(x.header.sh_addr for x in sections if x.name == ".rodata")
    kernel = llvm_amdhsa_kernel_descriptor_t.from_buffer_copy(bytes(code[at : at + 64]))
    # what the card puts into the first registers: four of scratch, the address of the arguments, two of scratch
    properties = kernel.kernel_code_properties & 0x7F
    assert properties | 0b100001 == 0b101001, "the kernel asks for registers that are not set up"
    return CodeObject(
        code=bytes(code),
        entry=at + kernel.kernel_code_entry_byte_offset,
        argument_register=4 * (properties & 1),
        user_registers=kernel.compute_pgm_rsrc2 >> 1 & 31,
        arguments_size=kernel.kernarg_size,
        scratch=kernel.private_segment_fixed_size,
    )
