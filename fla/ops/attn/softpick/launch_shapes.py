"""Launch shapes of the kernels, by architecture, kernel, precision and head dimension.

A table, read at launch: nothing is searched at run time, and nothing touches a driver at import.
docs/softpick/KERNELS.md says which rows were timed. `pytest -m compile` checks the table: up to head dimension 128
a shape spills no registers (at most 8 where it was timed), and all fit the card's shared memory.
"""

import functools
from typing import NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fla.ops.attn.softpick.tiles import feature_tile


class LaunchShape(NamedTuple):
    """Launch shape of a forward, delta, dq or dkv kernel.

    BT: rows of the tile that a program computes (keys in dkv, else queries). BS: rows of each tile that it
    streams. num_warps, num_stages, maxnreg (NVIDIA only): as in Triton. maxnreg, the most registers per thread, is
    set where slightly fewer registers fit one more program on a multiprocessor. waves_per_eu (AMD only): waves that
    the compiler must let a SIMD hold at once, which bounds registers as maxnreg does; None leaves it the choice.
    """

    BT: int
    BS: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    # load streamed tiles through tensor descriptors (TMA), which need no registers for addresses
    HAS_DESCRIPTORS: bool = False
    waves_per_eu: int | None = None


class DecodeShape(NamedTuple):
    """Launch shape of the decoding kernel.

    programs: programs that must fit on a multiprocessor at once (occupancy). BT: query rows of a program. BS: keys of
    each tile that it streams. num_warps, num_stages, maxnreg (NVIDIA only): as in Triton.
    """

    programs: int
    BT: int
    BS: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# (kernel, precision) -> four shapes: for head dimensions up to 64, 128 and 256, and for those that are no multiple
# of 16, whose unaligned rows are loaded in small pieces, which takes registers
KernelShape = LaunchShape | DecodeShape
ShapeTable = dict[tuple[str, str], tuple[KernelShape, KernelShape, KernelShape, KernelShape]]


def _shape_table(**rows: tuple[tuple[int | bool | None, ...], ...]) -> ShapeTable:
    shapes = {}
    for name, row in rows.items():
        kernel, precision = name.split("_")
        kind = DecodeShape if kernel in ("decode", "chunk") else LaunchShape
        # the tables below give the fields by position, or a whole LaunchShape, which is a tuple of them
        shapes[kernel, precision] = tuple(kind(*x) for x in row)  # pyright: ignore[reportArgumentType]  # entries of a row are plain tuples of int or None
    return shapes


# How to read the tables below. A key is the kernel and the precision of its products: bfloat16 or float16, TF32, or
# float32 in full. Decoding has two sets of shapes: "decode" for up to MAX_SKIPPING_ROWS query rows, "chunk" for more.
# The four columns are head dimensions up to 64, up to 128, up to 256, and no multiple of 16. An entry of fwd, delta, dq
# or dkv is (BT, BS, num_warps, num_stages[, maxnreg[, HAS_DESCRIPTORS]]) or a LaunchShape, one of decode or chunk is
# (programs, BT, BS, num_warps, num_stages[, maxnreg]).

# Without a bound on registers, ptxas spills a few to fit one more program; with one it does not.
# IEEE products of float32 run on no tensor core of NVIDIA: larger tiles spill and take minutes to compile.
_NVIDIA = _shape_table(
    fwd_16bit=((128, 64, 8, 3), (128, 64, 8, 3), (64, 16, 4, 2), (32, 32, 8, 1)),
    dq_16bit=((64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 1), (32, 32, 8, 1)),
    dkv_16bit=((64, 32, 4, 3), (64, 32, 4, 3), (32, 32, 4, 1), (32, 32, 8, 1)),
    delta_16bit=((64, 64, 4, 1), (64, 32, 4, 1), (32, 16, 2, 1), (32, 16, 2, 1)),
    fwd_tf32=((64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    dq_tf32=((64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    dkv_tf32=((64, 16, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    delta_tf32=((32, 32, 2, 1), (32, 16, 2, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    fwd_ieee=((64, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    dq_ieee=((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    dkv_ieee=((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    delta_ieee=((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    decode_16bit=((3, 16, 64, 4, 3, 168), (2, 16, 32, 4, 3), (2, 16, 32, 4, 2), (2, 16, 32, 4, 1)),
    decode_tf32=((2, 16, 32, 4, 2), (2, 16, 32, 4, 1), (2, 16, 16, 4, 1), (2, 16, 16, 4, 1)),
    decode_ieee=((2, 16, 16, 4, 1), (2, 16, 16, 4, 1), (1, 16, 16, 8, 1), (1, 16, 16, 8, 1)),
    chunk_16bit=((2, 64, 64, 4, 2), (2, 64, 64, 4, 2), (2, 16, 32, 4, 2), (2, 16, 32, 4, 1)),
    chunk_tf32=((2, 16, 32, 4, 2), (2, 16, 32, 4, 1), (2, 16, 16, 4, 1), (2, 16, 16, 4, 1)),
    chunk_ieee=((2, 16, 16, 4, 1), (2, 16, 16, 4, 1), (1, 16, 16, 8, 1), (1, 16, 16, 8, 1)),
)
# One stage, since more need shared memory that gfx90a and gfx942 lack. 16 rows per warp, since with fewer the warps
# repeat each other's matrix instructions.
_AMD = _shape_table(
    fwd_16bit=((128, 64, 4, 1), (128, 64, 8, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    dq_16bit=((64, 64, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    dkv_16bit=((64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    delta_16bit=((64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    fwd_ieee=((64, 32, 4, 1), (64, 16, 4, 1), (32, 16, 2, 1), (32, 16, 2, 1)),
    dq_ieee=((64, 32, 4, 1), (64, 16, 4, 1), (32, 16, 2, 1), (32, 16, 2, 1)),
    dkv_ieee=((64, 32, 4, 1), (64, 16, 4, 1), (32, 16, 2, 1), (32, 16, 2, 1)),
    delta_ieee=((64, 32, 4, 1), (64, 16, 4, 1), (32, 16, 2, 1), (32, 16, 2, 1)),
    # three at 64: Triton 3.9 takes 133 registers with every option on, 3.6 and 3.8 at most 128, which four would fit
    decode_16bit=((3, 16, 64, 4, 1), (3, 16, 64, 4, 1), (3, 16, 32, 4, 1), (3, 16, 32, 4, 1)),
    decode_ieee=((4, 16, 32, 4, 1), (2, 16, 32, 4, 1), (2, 16, 16, 4, 1), (2, 16, 16, 4, 1)),
    chunk_16bit=((2, 64, 64, 4, 1), (2, 64, 64, 4, 1), (2, 16, 32, 4, 1), (2, 16, 32, 4, 1)),
    chunk_ieee=((4, 16, 32, 4, 1), (2, 16, 32, 4, 1), (2, 16, 16, 4, 1), (2, 16, 16, 4, 1)),
)
# At most 99 KB of shared memory, so that sm_86, sm_89 and sm_120 can use these shapes too.
_SM_80 = _NVIDIA | _shape_table(
    fwd_16bit=((128, 64, 8, 3), (64, 32, 4, 2), (32, 32, 4, 1), (32, 16, 8, 1)),
    dq_16bit=((64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1)),
    dkv_16bit=((64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1)),
    chunk_16bit=((2, 64, 32, 4, 2, 168), (2, 64, 32, 4, 2), (2, 16, 32, 4, 2), (2, 16, 32, 4, 1)),
)
# H100, H200
_SM_90 = _NVIDIA | _shape_table(
    fwd_16bit=((128, 64, 8, 3, 128), (64, 64, 4, 3, None, True), (64, 16, 4, 2), (32, 32, 8, 1)),
    dq_16bit=((128, 64, 8, 3, 128), (128, 64, 8, 3, None, True), (32, 32, 4, 1), (32, 32, 8, 1)),
    dkv_16bit=((64, 64, 4, 3), (64, 64, 4, 2, None, True), (32, 32, 4, 1), (32, 32, 8, 1)),
    decode_16bit=((4, 16, 64, 4, 3, 128), (2, 16, 64, 4, 3), (2, 16, 32, 4, 2), (2, 16, 32, 4, 1)),
    chunk_16bit=(
        (3, 64, 64, 4, 3, 168),
        (3, 64, 32, 4, 3, 168),
        (2, 16, 32, 4, 2),
        (2, 16, 32, 4, 1),
    ),
)
# With pages, a window and a sink Triton 3.6 takes up to 212 registers for decoding above 64, which leaves two programs.
_CDNA_2_AND_3 = _AMD | _shape_table(
    decode_16bit=((3, 16, 64, 4, 1), (2, 16, 64, 4, 1), (2, 16, 32, 4, 1), (2, 16, 32, 4, 1)),
)
_GFX90A = _CDNA_2_AND_3 | _shape_table(
    fwd_16bit=((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    # at 64, 128 x 32 is estimated 1.27 times as fast, and spills with Triton 3.7.1 and 3.9
    dkv_16bit=((64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
)
# The rows with waves_per_eu were ranked without a card: the factors are estimates, of docs/softpick/AMD.md section 7.
_GFX942 = _CDNA_2_AND_3 | _shape_table(
    fwd_16bit=(
        # 1.20 times as fast in float16 with Triton 3.6, which takes 240 registers without a bound, 198 with it
        LaunchShape(128, 64, 4, 1, waves_per_eu=2),
        (128, 64, 8, 1), (64, 32, 4, 1), (64, 32, 4, 1),
    ),
    dq_16bit=(
        (64, 64, 4, 1),
        # more work between two barriers: 1.15 times as fast as 64 x 32 with Triton 3.8, 1.11 with 3.6
        LaunchShape(128, 64, 8, 1, waves_per_eu=2),
        (64, 16, 4, 1), (64, 16, 4, 1),
    ),
    dkv_16bit=(
        # a warp's 32 keys share each read of queries: 1.14 times as fast as 64 x 32 with Triton 3.6, 1.08 with 3.8
        LaunchShape(128, 16, 4, 1, waves_per_eu=2),
        (64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1),
    ),
) | {
    # the only AMD card of the table with TF32
    (kernel, "tf32"): _AMD[kernel, "ieee"] for kernel in ("fwd", "delta", "dq", "dkv", "decode", "chunk")
}  # fmt: skip
_GFX950 = _AMD | _shape_table(
    dq_16bit=(
        (64, 64, 4, 1),
        # as on gfx942: 1.59 times as fast as 64 x 32
        LaunchShape(128, 64, 8, 1, waves_per_eu=2),
        (64, 16, 4, 1), (64, 16, 4, 1),
    ),
    dkv_16bit=(
        # a warp's 32 keys share each read of queries: 1.55 times as fast as 64 x 32
        LaunchShape(128, 32, 4, 1, waves_per_eu=2),
        # two waves, where Triton 3.6 leaves 64 x 32 one: 2.1 times as fast with it, 1.06 with 3.8
        LaunchShape(128, 32, 8, 1, waves_per_eu=2),
        (64, 16, 4, 1), (64, 16, 4, 1),
    ),
)  # fmt: skip

TABLE: dict[str, ShapeTable] = {
    "sm_80": _SM_80,
    "sm_90": _SM_90,
    "sm_100": _NVIDIA,
    "gfx90a": _GFX90A,
    "gfx942": _GFX942,
    "gfx950": _GFX950,
}
# The architectures without an instruction that rounds float32 to bfloat16: `tiles.round_for_dot` computes it there.
WITHOUT_BF16_CAST = {"gfx90a", "gfx942"}
_ROW_OF_CAPABILITY: dict[int | str, str] = {
    80: "sm_80", 86: "sm_80", 87: "sm_80", 89: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100",
    120: "sm_80", 121: "sm_80",
}  # fmt: skip


@functools.cache
def architecture(device: int | None) -> str:
    """The key of `TABLE` for the GPU of this index.

    Raises:
        ValueError: `TABLE` has no row for its architecture.
    """
    if knobs.runtime.interpret:
        return "sm_90"
    target: GPUTarget = driver.active.get_current_target()  # pyright: ignore[reportAssignmentType]  # Triton's base class declares no return type
    name = str(target.arch)
    if target.backend == "cuda":
        name = _ROW_OF_CAPABILITY.get(target.arch, f"sm_{target.arch}")
    if name not in TABLE:
        raise ValueError(
            f"q must be on a GPU of one of the architectures {', '.join(TABLE)}, got {name}: "
            "the Triton operators have no launch shapes for it; naive_..._attn runs anywhere"
        )
    return name


@functools.cache
def num_processors(device: int | None) -> int:
    """Multiprocessors (AMD: compute units) of the GPU of this index."""
    if knobs.runtime.interpret:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype, architecture: str) -> str:
    """``input_precision`` of ``tl.dot``: "tf32" for float32 if torch's matmul setting allows it and the card has it."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32" if ("fwd", "tf32") in TABLE[architecture] else "ieee"


def select_launch_shape(row: str, kernel: str, precision: str, K: int, V: int) -> KernelShape:
    """Looks a launch shape up in `TABLE`.

    Args:
        row: Architecture, a key of `TABLE`.
        kernel: "fwd", "delta", "dq", "dkv", "decode" or "chunk".
        precision: "16bit", or the precision of float32, "tf32" or "ieee".
        K: Head dimension of queries and keys.
        V: Head dimension of values.
    """
    D = max(feature_tile(K), feature_tile(V))
    return TABLE[row][kernel, precision][
        3 if K % 16 or V % 16 else 0 if D <= 64 else 1 if D <= 128 else 2
    ]


def launch_options(kernel: str, q: torch.Tensor, V: int) -> dict[str, int | str]:
    """Keyword arguments of the launch of a kernel for inputs like ``q`` with values of size ``V``.

    One entry is not the kernel's and must be removed: HAS_DESCRIPTORS by `tiles.streamed_descriptors`, or for "decode" and
    "chunk" the resident ``programs``, which `decoding_kernels.num_splits` needs.
    """
    row = architecture(q.device.index)
    precision = dot_precision(q.dtype, row)
    kind = precision if q.dtype == torch.float32 else "16bit"
    shape = select_launch_shape(row, kernel, kind, q.shape[-1], V)
    options = {name: x for name, x in shape._asdict().items() if x is not None}
    options["PRECISION"] = precision
    options["ROUNDS_BY_BITS"] = q.dtype == torch.bfloat16 and row in WITHOUT_BF16_CAST
    if row.startswith("gfx"):
        # Triton's default, 32, repeats matrix instructions and takes more registers
        options["matrix_instr_nonkdim"] = 16
    return options
