"""What the inner loop of a kernel costs on an AMD card, from its assembly alone: bounds by unit, and llvm-mca's clocks.

`rank_amd.py` compiles the kernels and prints these numbers. The text goes in, so nothing here needs a card or Triton.
"""

import re
import shutil
import subprocess
from typing import NamedTuple

# Debian's package llvm-22 names it with the version
MCA_NAMES = "llvm-mca-22", "llvm-mca"
MCA_ITERATIONS = 20
# it takes less than one
MCA_SECONDS = 60
NUM_SIMDS = 4
# of one SIMD, for each lane
NUM_REGISTERS = 512
MAX_WAVES = 8
# llvm-mca counts in the four clocks in which 16 lanes take the 64 threads of a wave
CLOCKS_PER_CYCLE = 4
# waves of a SIMD that hide each other's latency, in the estimate
MAX_OVERLAP = 2


class CardRates(NamedTuple):
    """Rates of a compute unit, or of one of its four SIMDs.

    products: multiplications of 16-bit matrix instructions per clock and SIMD. short_products: of gfx950's shorter
    instructions, those that gfx942 has too. lds_read, lds_write: bytes per clock. lds_size: bytes.
    """

    products: int
    short_products: int
    lds_read: int
    lds_write: int
    lds_size: int


# Peak FLOP/s over clock and units in AMD's data sheets give the products; AMD's CDNA 4 presentation gives gfx950's
# local memory twice the read bandwidth, and says nothing of writes.
RATES = {
    "gfx90a": CardRates(128, 128, 128, 128, 64 * 1024),
    "gfx942": CardRates(256, 256, 128, 128, 64 * 1024),
    "gfx950": CardRates(512, 256, 256, 128, 160 * 1024),
}

_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_BRANCH = re.compile(r"^\s+s_c?branch\S*\s+(\.LBB\d+_\d+)")
_MATRIX = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(?:b?f16)")
# a quarter of the rate of the remaining vector instructions
_QUARTER_RATE = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos|mul_lo|mul_hi|mad_u64|mad_i64)_")
_LDS_BITS = re.compile(r"_[buif](\d+)")
_SWAP = re.compile(r"^\s+v_permlane\d+_swap_b32\S*\s+(v\d+), (v\d+)$")
_DIRECT_LOAD = re.compile(r"(?:buffer|global)_load_(?:lds_)?dword(x\d)?\b")


class LoopError(ValueError):
    """The assembly has no loop that can be measured, or an instruction without a known rate."""


class LoopCost(NamedTuple):
    """What one wave does in one iteration: clocks of its SIMD, bytes of local memory, instructions."""

    products: int
    matrix_clocks: float
    vector_clocks: int
    lds_read: int
    lds_written: int
    vector_instructions: int
    memory_instructions: int


def instructions(lines: list[str]) -> list[str]:
    """Lines that hold an instruction, without comments."""
    bare = (line.split(";")[0].rstrip() for line in lines)
    return [x for x in bare if re.match(r"\s+[a-z]", x)]


def matrix_loop(assembly: str) -> list[str]:
    """Instructions of the first innermost loop with matrix instructions: the one over tiles without a mask.

    Raises:
        LoopError: There is none.
    """
    lines = assembly.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    loops = set()
    for i, line in enumerate(lines):
        match = _BRANCH.match(line)
        if match and labels.get(match[1], i + 1) <= i:
            loops.add((labels[match[1]], i))
    for first, last in sorted(loops):
        if any(x != (first, last) and first <= x[0] and x[1] <= last for x in loops):
            continue
        body = instructions(lines[first : last + 1])
        if any("v_mfma" in x for x in body):
            return body
    raise LoopError("the assembly has no loop with a matrix instruction of 16-bit inputs")


def _lds_bytes(name: str) -> int:
    """Bytes that the 64 threads of a wave move by an instruction of local memory."""
    match = _LDS_BITS.search(name)
    if match is None:
        raise LoopError(f"{name}: unknown size of an access to local memory")
    pair = 2 if re.match(r"ds_(read|write)2", name) else 1
    return 64 * pair * int(match[1]) // 8


def loop_cost(body: list[str], card: str) -> LoopCost:
    """Counts the instructions of a loop.

    Raises:
        LoopError: A matrix instruction whose inputs are not 16-bit, or an access to local memory of unknown size.
    """
    rates = RATES[card]
    products = matrix_clocks = vector_clocks = read = written = vector = memory = 0
    for line in body:
        name, _, operands = line.strip().partition(" ")
        if name.startswith("v_mfma"):
            match = _MATRIX.match(name)
            if match is None:
                raise LoopError(f"{name}: only matrix instructions of 16-bit inputs have a rate")
            m, n, k = map(int, match.groups())
            # the long ones: 16 x 16 x 32 and 32 x 32 x 16
            rate = rates.products if m * k >= 512 else rates.short_products
            products += m * n * k
            matrix_clocks += m * n * k / rate
        elif name.startswith("v_"):
            vector += 1
            vector_clocks += 16 if _QUARTER_RATE.match(name) else 4
        elif name.startswith("ds_"):
            if "write" in name:
                written += _lds_bytes(name)
            else:
                # permutations go through the same crossbar
                read += _lds_bytes(name)
        elif name.startswith(("buffer_", "global_")):
            memory += 1
            match = _DIRECT_LOAD.match(name)
            # gfx950 loads from memory into local memory
            if match and ("_lds_" in name or re.search(r"\blds\b", operands)):
                written += 64 * 4 * int((match[1] or "x1")[1:])
    return LoopCost(products, matrix_clocks, vector_clocks, read, written, vector, memory)


def mca_path() -> str:
    """Where llvm-mca is.

    Raises:
        LoopError: It is not installed.
    """
    for name in MCA_NAMES:
        if path := shutil.which(name):
            return path
    raise LoopError(f"none of {', '.join(MCA_NAMES)} is on PATH; Debian's package llvm-22 has it")


def mca_version() -> str:
    """llvm-mca and its version.

    Raises:
        LoopError: It is not installed, or was built without AMD cards.
    """
    command = [mca_path(), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "amdgcn" not in text:
        raise LoopError(f"{command[0]} was built without AMD cards")
    return "llvm-mca of LLVM " + re.search(r"LLVM version (\S+)", text)[1]


def mca_input(body: list[str]) -> str:
    """What llvm-mca is given of a loop: it follows no branch, and a barrier has nobody to wait for."""
    kept = [x for x in body if not re.match(r"\s+s_(c?branch|barrier|endpgm)", x)]
    # LLVM 22 counts a swap as two steps and can then wait forever for the second
    return "".join(_SWAP.sub(r"\tv_mov_b32 \1, \2\n\tv_mov_b32 \2, \1", x) + "\n" for x in kept)


def mca_clocks(body: list[str], card: str) -> float:
    """Clocks of one wave alone for one iteration, by llvm-mca's model of the card.

    Raises:
        LoopError: llvm-mca is not installed, is older than the card, refused the instructions or did not end.
    """
    command = [mca_path(), "-mtriple=amdgcn", f"-mcpu={card}", f"-iterations={MCA_ITERATIONS}"]
    try:
        result = subprocess.run(
            command,
            input=mca_input(body),
            capture_output=True,
            text=True,
            check=False,
            timeout=MCA_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise LoopError(f"llvm-mca did not end in {MCA_SECONDS} seconds") from None
    if "not a recognized processor" in result.stderr:
        raise LoopError(f"{command[0]} does not know {card}; LLVM 22's does")
    match = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    if result.returncode != 0 or match is None:
        reason = (result.stderr.strip().splitlines() or ["no output"])[0]
        raise LoopError(f"llvm-mca refused the loop: {reason}")
    return int(match[1]) * CLOCKS_PER_CYCLE / MCA_ITERATIONS


def resident_waves(card: str, registers: int, lds_used: int, num_warps: int) -> float:
    """Waves that a SIMD holds at once: as many whole programs as registers and local memory allow."""
    # registers are given out in steps of 8
    by_registers = min(MAX_WAVES, NUM_REGISTERS // (-(-max(registers, 1) // 8) * 8))
    waves_of_program = num_warps / NUM_SIMDS
    programs = min(by_registers // waves_of_program, RATES[card].lds_size // max(lds_used, 1))
    return programs * waves_of_program


class ShapeCost(NamedTuple):
    """Clocks of a compute unit for 64 x 64 scores: bounds by unit, one wave after another (serial), the estimate.

    repeats: multiplications of the loop over those that its tile needs; above 1, waves repeat each other's.
    """

    matrix: float
    vector: float
    lds: float
    serial: float
    estimate: float
    waves: float
    repeats: float


def shape_cost(
    cost: LoopCost,
    clocks: float,
    card: str,
    tile: tuple[int, int],
    num_warps: int,
    features: int,
    waves: float,
) -> ShapeCost:
    """Costs of a launch shape.

    Args:
        cost: Of one wave and iteration.
        clocks: llvm-mca's, of one wave and iteration.
        tile: BT and BS.
        features: Multiplications that one score needs: (K + V in forward, 2 K + V in dq, 2 K + 2 V in dkv).
        waves: Resident on a SIMD.

    Raises:
        LoopError: The loop multiplies less than its tile needs, so it is not the loop over tiles.
    """
    rates, scores = RATES[card], tile[0] * tile[1]
    repeats = cost.products * num_warps / (scores * features)
    if repeats < 1:
        raise LoopError(f"the loop does {repeats:.2f} of the multiplications that its tile needs")
    unit = 64 * 64 / scores
    waves_of_simd = num_warps / NUM_SIMDS * unit
    matrix = cost.matrix_clocks * waves_of_simd
    vector = cost.vector_clocks * waves_of_simd
    lds = cost.lds_read / rates.lds_read + cost.lds_written / rates.lds_write
    lds *= num_warps * unit
    serial = clocks * waves_of_simd
    overlap = min(max(waves, 1), MAX_OVERLAP)
    estimate = max(serial / overlap, matrix, vector, lds)
    return ShapeCost(matrix, vector, lds, serial, estimate, waves, repeats)
