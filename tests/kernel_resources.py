"""What a compiled kernel takes: registers, memory, matrix instructions, and those of AMD's inner loops."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton import knobs


class Resources(NamedTuple):
    """Registers per thread (AMD: the vector ones), spilled ones, bytes of scratch and of shared memory, and the
    multiplications that the matrix instructions of one program do, each instruction counted once."""

    registers: int
    spills: int
    scratch: int
    shared: int
    matrix_products: int


# the shape M, N, K of an instruction is in its name; tcgen05 of sm_100 keeps it in a descriptor
_MATRIX_INSTRUCTIONS = {
    "amdgcn": re.compile(r"^\s+v_mfma_f32_(\d+)x(\d+)x(\d+)", re.M),
    "ptx": re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)\.\S*\.m(\d+)n(\d+)k(\d+)\."),
}


def _matrix_products(kernel) -> int:
    language = "amdgcn" if "amdgcn" in kernel.asm else "ptx"
    assembly = kernel.asm[language]
    if "tcgen05.mma" in assembly:
        return -1
    total = 0
    for m, n, k in _MATRIX_INSTRUCTIONS[language].findall(assembly):
        # wgmma is one instruction of four warps
        warps = kernel.metadata.num_warps / (4 if m == "64" else 1)
        total += int(int(m) * int(n) * int(k) * warps)
    return total


def resources(kernel) -> Resources:
    if "amdgcn" in kernel.asm:
        assembly = kernel.asm["amdgcn"]

        def read(name):
            return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

        return Resources(
            registers=read("vgpr_count"),
            spills=read("vgpr_spill_count"),
            scratch=read("private_segment_fixed_size"),
            shared=kernel.metadata.shared,
            matrix_products=_matrix_products(kernel),
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    scratch = int(re.search(r"STACK:(\d+)", usage).group(1))
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        # ptxas keeps spilled registers on the stack, where nothing else of these kernels is
        spills=scratch // 4,
        scratch=scratch,
        shared=kernel.metadata.shared,
        matrix_products=_matrix_products(kernel),
    )


def inner_loops(assembly: str) -> list[tuple[int, int]]:
    """Vector and matrix instructions in each innermost loop with matrix instructions of AMD's assembly, in its order."""
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        if found := re.match(r"(\.LBB\d+_\d+):", line):
            labels[found[1]] = i
        found = re.match(r"\s+s_c?branch\w*\s+(\.LBB\d+_\d+)", line)
        # a branch back
        if found and found[1] in labels:
            loops.append((labels[found[1]], i))
    counts = []
    for start, end in sorted(set(loops)):
        body = [x for x in lines[start:end] if re.match(r"\s+v_", x)]
        num_matrix = sum("v_mfma" in x for x in body)
        is_inner = not any((a, b) != (start, end) and start <= a and b <= end for a, b in loops)
        if num_matrix and is_inner:
            counts.append((len(body) - num_matrix, num_matrix))
    return counts
