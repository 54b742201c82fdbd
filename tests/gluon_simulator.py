"""Runs the Python of Gluon kernels for Hopper on a CPU: indices, barriers, phases and arithmetic, but no layouts.

`simulate(module)` gives the names of a module whose launchers then run their Gluon kernels here. Each partition of
each program is a thread, of which one runs at a time. At each operation on a barrier, a copy or a product, a random
generator with a seed decides which thread goes on, and whether a TMA copy lands: so a run repeats exactly, and seeds
try orders that a card may never show. Found, and raised as `Fault`:

- a deadlock, with what each thread waits for;
- shared memory that changes between the start and the end of a product or a TMA store that reads it, so a missing
  wait and a buffer that is released early; a buffer that a load is filling, or that was never written, reads as NaN;
- shared memory written by threads and read by a product or a TMA store without `fence_async_shared`;
- too many arrivals, an uninitialised barrier, a pointer out of its tensor;
- what is left at the end: arrivals, bytes, loads, products, stores.

Not simulated: registers, layouts, swizzles, memory order of plain loads and stores. `pytest -m compile` and a card
check these.
"""

import ast
import inspect
import sys
import textwrap
import types
from typing import Any

import gluon_memory as memory
import torch
import triton.language as tl
from gluon_machine import Fault, Machine, Program, current, switch
from gluon_memory import Barriers, Pointer, Shared
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from fla.ops.attn.softpick.hopper import gluon_api


def _warp_specialize(partitions, worker_num_warps, worker_num_regs=None):
    machine, program = current.machine, current.worker.program
    parts = []
    for i, (function, args) in enumerate(partitions):
        num_warps = ([current.worker.num_warps, *worker_num_warps])[i]
        name = f"{function.__name__} {i} of program {program.index}"
        parts.append(machine.start(name, program, num_warps, lambda f=function, a=args: f(*a)))
    switch(lambda: all(x.is_done for x in parts), lambda: "its partitions")


class Kernel:
    """A jitted function: a helper when called; a kernel when launched, here if it is one of Gluon's."""

    def __init__(self, original, function, seed):
        self.original, self.function, self.seed = original, function, seed
        self.__name__ = function.__name__

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __getitem__(self, grid):
        if not isinstance(self.original, GluonJITFunction):
            return self.original[grid]
        return lambda *args, **kwargs: self.launch(grid[0], args, kwargs)

    def launch(self, grid, args, kwargs):
        num_warps = kwargs.pop("num_warps", 4)
        for name in "num_stages", "maxnreg", "launch_cooperative_grid":
            kwargs.pop(name, None)
        wrapped = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
        named = {n: Pointer(x) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        machine = Machine(self.seed, grid)
        programs = [Program(i) for i in range(grid)]
        for program in programs:
            run = lambda: self.function(*wrapped, **named)  # noqa: E731
            machine.start(f"program {program.index}", program, num_warps, run)
        machine.hand_over(None)
        machine.finished.acquire()
        if machine.failure is not None:
            raise machine.failure
        if machine.loads:
            raise Fault(f"{len(machine.loads)} loads are left")
        while machine.stores:
            machine.land()
        for program in programs:
            if program.progress is not None and int(program.progress.data) != -1:
                raise Fault("progress was stored after -1, which the watchdog may have missed")
            for barrier in (x for array in program.barriers for x in array.barriers):
                if barrier.missing != barrier.count or barrier.bytes:
                    raise Fault(f"left at the end: {barrier}")


def _tensor(x):
    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float32)


def _extreme(of_numbers, passing_nan, dropping_nan):
    def extreme(a, b, propagate_nan=None):
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            return of_numbers(a, b)
        like = a if isinstance(a, torch.Tensor) else b
        a, b = (
            x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=like.dtype) for x in (a, b)
        )
        passes = propagate_nan == tl.PropagateNan.ALL or not like.is_floating_point()
        return (passing_nan if passes else dropping_nan)(a, b)

    return extreme


def _allocate_shared_memory(dtype, shape, layout=None):
    data = torch.empty(shape, dtype=dtype)
    data.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min)
    return Shared(data, torch.zeros(shape, dtype=torch.bool))


def _allocate_barriers(n, count):
    barriers = Barriers(n)
    current.worker.program.barriers.append(barriers)
    for x in barriers.barriers:
        memory.init(x, count)
    return barriers


def _reduction(function):
    return lambda x, axis=None: function(x, axis) if axis is not None else function(x.flatten(), 0)


def _assert(condition, message=""):
    if not condition:
        raise Fault(message)


def _nothing(*args, **kwargs):
    return None


# of triton.language and of Gluon's language
_LANGUAGE: Any = types.SimpleNamespace(
    constexpr=lambda x: x, PropagateNan=tl.PropagateNan, static_range=range, range=range,
    static_assert=_assert, cdiv=lambda a, b: -(-a // b), program_id=lambda axis: current.worker.program.index,
    num_programs=lambda axis: current.machine.grid, num_warps=lambda: current.worker.num_warps,
    arange=lambda a, b, layout=None: torch.arange(a, b), convert_layout=lambda x, layout, **_: x,
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype), zeros_like=torch.zeros_like,
    full=lambda shape, x, dtype, layout=None: torch.full(shape, x, dtype=dtype),
    cast=lambda x, dtype: x, where=torch.where, reshape=lambda x, shape: x.reshape(shape),
    expand_dims=lambda x, axis: x.unsqueeze(axis), permute=lambda x, order: x.permute(order),
    exp2=lambda x: torch.exp2(_tensor(x)), log2=lambda x: torch.log2(_tensor(x)), abs=torch.abs,
    clamp=torch.clamp, fma=lambda a, b, c: a * b + c, sum=_reduction(torch.sum), max=_reduction(torch.amax),
    min=_reduction(torch.amin),
    maximum=_extreme(max, torch.maximum, torch.fmax), minimum=_extreme(min, torch.minimum, torch.fmin),
    load=lambda p, mask=None, other=0, **_: p.load(mask, other),
    store=lambda p, x, mask=None, **_: p.store(x, mask), allocate_shared_memory=_allocate_shared_memory,
    warp_specialize=_warp_specialize,
    NVMMADistributedLayout=_nothing, NVMMASharedLayout=_nothing, DotOperandLayout=_nothing, SliceLayout=_nothing,
    BlockedLayout=_nothing, SwizzledSharedLayout=_nothing,
    float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16, int32=torch.int32, int64=torch.int64,
)  # fmt: skip
# of gluon_api.py
API: dict[str, Any] = {
    "KEYS_IN_REGISTERS": gluon_api.KEYS_IN_REGISTERS.value,
    "NVMMASharedLayout": _nothing,
    "TensorDescriptor": memory.Descriptor,
    "allocate_barriers": _allocate_barriers,
    "copysign": torch.copysign,
    "fence_async_shared": memory.fence,
    "gl": _LANGUAGE,
    "gluon": None,
    "group_barrier": _nothing,
    "load_scalar": lambda word: int(word.load()),
    "mbarrier": types.SimpleNamespace(wait=memory.wait, arrive=memory.arrive, expect=memory.expect),
    "named_sync": memory.named_sync,
    "opaque": lambda x: x,
    "pass_turn": memory.pass_turn,
    "positive_part": lambda x, dtype: x.clamp(min=0).to(dtype),
    "store_scalar": memory.store_scalar,
    "take_number": memory.take_number,
    "tma_add": memory.tma_add,
    "tma_load": memory.tma_load,
    "tma_store": memory.tma_store,
    "tma_store_done": memory.tma_store_done,
    "tma_store_wait": memory.tma_store_wait,
    "trap_without_progress": memory.trap_without_progress,
    "wait_turn": memory.wait_turn,
    "warpgroup_mma": memory.warpgroup_mma,
    "warpgroup_mma_wait": memory.warpgroup_mma_wait,
    "zero_rows": memory.zero_rows,
}
_PACKAGE = gluon_api.__package__ or ""


def simulate(module, seed: int = 0, faults: dict[str, str] | None = None, **replaced) -> Any:
    """The names of a module; jitted functions and launchers run here, everything else is as it was.

    Args:
        module: A module of `fla.ops.attn.softpick.hopper`.
        seed: Of the order in which threads run and loads land.
        faults: Text of the kernels' source -> text to put in its place, to plant a fault.
        replaced: Values for names of the module.
    """
    unused = dict(faults or {})
    spaces: dict[str, dict[str, Any]] = {}

    def rebuilt(function, space):
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in (faults or {}).items():
            if old in source:
                source = source.replace(old, new)
                unused.pop(old, None)
        tree = ast.parse(source)
        tree.body[0].decorator_list = []  # pyright: ignore[reportAttributeAccessIssue]  # it is a function
        ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
        exec(compile(tree, function.__code__.co_filename, "exec"), space)
        return space[function.__name__]

    def space_of(name):
        if name in spaces:
            return spaces[name]
        space = spaces[name] = {}
        for key, value in vars(sys.modules[name]).items():
            is_jitted = isinstance(value, JITFunction | InterpretedFunction)
            function = value.fn if is_jitted else value
            if key in API and value is getattr(gluon_api, key):
                space[key] = API[key]
            elif value is tl:
                space[key] = _LANGUAGE
            elif isinstance(value, tl.constexpr):
                space[key] = value.value
            elif is_jitted or (inspect.isfunction(value) and value.__module__.startswith(_PACKAGE)):
                if function.__module__ == name:
                    made = rebuilt(function, space)
                    space[key] = Kernel(value, made, seed) if is_jitted else made
                else:
                    space[key] = space_of(function.__module__)[function.__name__]
            else:
                space[key] = value
        return space

    space = space_of(module.__name__)
    space.update(replaced)
    if unused:
        raise ValueError(f"no function contains {list(unused)}")
    return types.SimpleNamespace(**space)
