"""Gluon as the Hopper kernels use it: the one module that knows how Triton 3.6 to 3.9 differ.

Kernels take every name below from here, and write no PTX themselves. So `tests/gluon_simulator.py` can run their
Python with its own versions of these names. What differs between the versions of Triton:

    TMA copies         3.6 has `async_copy_global_to_shared` and `async_copy_shared_to_global`, 3.9 has `async_load`
                       and `async_store`, 3.7 and 3.8 have both
    TMA additions      `async_atomic_add` from 3.8 on; the compiler of 3.6 has them under no name of Gluon
    reinterpretation   `_reinterpret` of shared memory before 3.9, `reinterpret` since
    group barrier      `thread_barrier` in 3.6, `barrier` later
    registers          3.9 has another major version of ptxas, which needs more of them
"""

# Triton's annotations refuse what its compiler accepts: an int for a constexpr, arguments of builtins.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false

from functools import cached_property

import triton
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia import hopper

__all__ = [
    "KEYS_IN_REGISTERS",
    "NVMMASharedLayout",
    "TensorDescriptor",
    "allocate_barriers",
    "copysign",
    "fence_async_shared",
    "gl",
    "gluon",
    "group_barrier",
    "load_scalar",
    "mbarrier",
    "named_sync",
    "opaque",
    "pass_turn",
    "positive_part",
    "store_scalar",
    "take_number",
    "tma_add",
    "tma_load",
    "tma_store",
    "tma_store_done",
    "tma_store_wait",
    "trap_without_progress",
    "wait_turn",
    "warpgroup_mma",
    "warpgroup_mma_wait",
    "zero_rows",
]

# whether ptxas has registers for 64 keys beside the products of the backward kernel; else it serialises these
KEYS_IN_REGISTERS = gl.constexpr([int(x) for x in triton.__version__.split(".")[:2]] < [3, 9])


class TensorDescriptor(hopper.TensorDescriptor):
    """Without the checks of its base, which take the host five times as long as the rest; `hopper_refusal` makes them."""

    def __post_init__(self):
        pass


class NVMMASharedLayout(gl.NVMMASharedLayout):
    """Writes its text once: at each launch Triton asks for it, for the type of a descriptor."""

    @cached_property
    def _text(self) -> str:
        return super().__repr__()

    def __repr__(self) -> str:
        return self._text


if hasattr(tma, "async_load"):
    # (descriptor, coordinates, barrier, shared memory), (descriptor, coordinates, shared memory)
    tma_load, tma_store = tma.async_load, tma.async_store
else:
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

# (number of copies and additions of this warp that may still read shared memory)
tma_store_wait = tma.store_wait

# makes all threads of a partition wait for each other
group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Adds src, float32 in shared memory, to a block in global memory."""
        at = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, at, src.handle)


# (shared memory, dtype, shape, layout)
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or (
    gl.shared_memory_descriptor._reinterpret
)


@gluon.jit
def allocate_barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N mbarriers that COUNT arrivals complete. Other threads may use them after `fence_async_shared`."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def named_sync(BARRIER: gl.constexpr, THREADS: gl.constexpr):
    """Waits at a hardware barrier until THREADS threads, these included, have come to it. Triton uses the low numbers."""
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; mov.b32 $0, 0;", "=r,n,n", [BARRIER, THREADS], gl.int32, False, 1
    )


@gluon.jit
def wait_turn(p, turn):
    """Waits until the counter at p, int32 in global memory, has reached turn, then sees what came before that.

    Traps after 2**28 looks, tens of seconds and more, since a counter that no program raises would keep the GPU busy for
    ever.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 value, looks;
        mov.u32 looks, 0;
        look: ld.acquire.gpu.global.u32 value, [$1];
        setp.ge.u32 p, value, $2;
        @p bra done;
        add.u32 looks, looks, 1;
        setp.lt.u32 p, looks, 268435456;
        @p bra look;
        trap;
        done: fence.proxy.async.global;
        mov.b32 $0, 0;
        }""",
        "=r,l,r", [p, turn], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def take_number(p):
    """Adds 1 to the counter at p, int32 in global memory, and returns what it was. For one warp."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 number;
        mov.u32 number, %laneid;
        setp.eq.u32 p, number, 0;
        @p atom.relaxed.gpu.global.add.u32 number, [$1], 1;
        shfl.sync.idx.b32 $0, number, 0, 31, 0xffffffff;
        }""",
        "=r,l", [p], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def pass_turn(p):
    """Adds 1 to the counter at p once all TMA stores and additions of this warp are in global memory. For one warp."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 lane;
        cp.async.bulk.wait_group 0;
        fence.proxy.async.global;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.eq.u32 p, lane, 0;
        @p red.release.gpu.global.add.u32 [$1], 1;
        mov.b32 $0, 0;
        }""",
        "=r,l", [p], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def tma_store_done():
    """Waits until all TMA stores of this warp are in global memory, where what it stores later overwrites them."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], gl.int32, False, 1
    )  # fmt: skip


@gluon.jit
def copysign(b_x, b_sign):
    """b_x, which is not negative, with the sign bit of b_sign; one instruction."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0x80000000, 0xF8;", "=r,r,r", [b_x, b_sign], gl.float32, True, 1
    )


@gluon.jit
def positive_part(b_x, dtype: gl.constexpr):
    """max(b_x, 0) rounded to dtype, bfloat16 or float16, NaN stays NaN; one instruction for two numbers of a thread."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], gl.bfloat16, True, 2
        )
    else:
        gl.static_assert(dtype == gl.float16, "bfloat16 or float16")
        return gl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], gl.float16, True, 2
        )


@gluon.jit
def opaque(x):
    """x, int32, of which the compiler knows nothing, not even that it is the same in each iteration of a loop.

    An index into shared memory that is opaque keeps the addresses of a loop's products out of registers before it.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def store_scalar(word, x):
    """Stores x, int32, in word, int32 [1] in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    word.store(gl.full([1], x, gl.int32, layout))


@gluon.jit
def load_scalar(word):
    """The int32 in word, int32 [1] in shared memory."""
    return gl.max(word.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def trap_without_progress(progress):
    """Watches progress, int32 [1] in shared memory that starts at 0, until it is -1. For one warp.

    Traps when it stays the same for 2**26 looks: about 8 s on an H200, where a look took 0.1 us. So no wait of the
    program is without an end, not at its mbarriers either, whose own loop has no bound.
    """
    last = 0
    looks = 0
    while last >= 0:
        value = load_scalar(progress)
        looks = gl.where(value == last, looks + 1, 0)
        last = value
        # asks for 4 us; PTX promises no least sleep
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ge.u32 p, $1, 67108864; @p trap; nanosleep.u32 4000; mov.b32 $0, 0; }",
            "=r,r", [looks], gl.int32, False, 1,
        )  # fmt: skip
        # or the compiler would look once
        fence_async_shared()


@gluon.jit
def zero_rows(tile, first):
    """Zeroes the rows from first on of a tile [1, ROWS, 1, D] in shared memory, 16-bit, swizzled by 128 bytes. For one warp."""
    ROWS: gl.constexpr = tile.shape[1]
    D: gl.constexpr = tile.shape[3]
    # the swizzle permutes the 128 bytes of a row, so a row of 64 columns is a row of 32 words
    words = reinterpret(tile, gl.int32, [D // 64 * ROWS, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for row in range(first, ROWS):
        for part in gl.static_range(D // 64):
            words.index(part * ROWS + row).store(
                gl.zeros([32], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
            )
