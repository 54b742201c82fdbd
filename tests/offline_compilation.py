"""Compiles what the project's own launchers would launch, for GPUs that are not there: no GPU, no driver.

    python tests/offline_compilation.py gfx942                  # every launch shape's resources
    python tests/offline_compilation.py sm_90 compilations      # how often kernels compile for shapes that differ
    python tests/offline_compilation.py sm_90 rows              # decoding with every number of query rows
    python tests/offline_compilation.py gfx942 candidates       # the launch shapes that the doctor tries
    python tests/offline_compilation.py sm_90 launch            # the host's time for a launch, the driver's left out
    python tests/offline_compilation.py gfx942 loops            # AMD: vector instructions of the inner loops

A process of its own, since one that interprets kernels cannot compile them. Shared memory above a card's
limit is no error of the compiler, so the limits stand here.
"""

import itertools
import json
import sys
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

if __name__ == "__main__":
    import upstream_packages

    upstream_packages.skip()

from kernel_resources import inner_loops, resources

from fla.ops.attn.softpick import (
    decoding_kernels,
    doctor_shapes,
    launch_shapes,
    parallel_bwd,
    parallel_fwd,
)
from fla.ops.attn.softpick.decoding import MAX_ROWS


class Card(NamedTuple):
    target: GPUTarget
    # bytes of shared memory that one program may take
    shared: int


CARDS = {
    "gfx90a": Card(GPUTarget("hip", "gfx90a", 64), 64 * 1024),
    "gfx942": Card(GPUTarget("hip", "gfx942", 64), 64 * 1024),
    "gfx950": Card(GPUTarget("hip", "gfx950", 64), 160 * 1024),
    "sm_80": Card(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Card(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Card(GPUTarget("cuda", 100, 32), 227 * 1024),
}


class OfflineDriver(DriverBase):
    """Tells Triton of a card that is not there."""

    def __init__(self, target: GPUTarget):
        self.target = target

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_benchmarker(self):
        raise RuntimeError("nothing may be timed offline")


class Launch(NamedTuple):
    """A compiled kernel, its name and keyword arguments, and how many different compilations of it there were so far."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    compilations: int


def compiled_launches(card: Card, call: Callable[[], None]) -> list[Launch]:
    """What `call()` launches, in its order, compiled for a card instead."""
    launches: list[Launch] = []

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            if all(x.name != kernel.__name__ for x in launches):
                # of another card
                kernel.device_caches.clear()
            binary = kernel.warmup(*args, grid=grid, **kwargs)
            (cache,) = kernel.device_caches.values()
            launches.append(Launch(kernel.__name__, binary, kwargs, len(cache[0])))

        return launch

    launch_shapes.architecture.cache_clear()
    with (
        mock.patch.object(driver, "_active", OfflineDriver(card.target)),
        mock.patch.object(KernelInterface, "__getitem__", getitem),
        mock.patch.object(decoding_kernels, "num_processors", return_value=100),
    ):
        call()
    launch_shapes.architecture.cache_clear()
    return launches


def products_needed(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> int:
    """Multiplications of matrices in the code of one program, if no warp repeats another's.

    Each copy of a loop's body counts once: for full tiles, for masked ones, and in forward for rows that need
    the running maximum; float16 has that from the start.
    """
    if name == "normalized_attn_merge_kernel":
        return 0
    K, V, BS = arguments["BK"], arguments["BV"], arguments["BS"]
    features, streamed = {
        "decode": (K + V, BS),
        "fwd": (K + V, (2 if dtype == torch.float16 else 3) * BS),
        "delta": (K + V, BS),
        "dq": (2 * K + V, 2 * BS),
        "dkv": (2 * K + 2 * V, BS + min(BS, 32)),
    }[name.removesuffix("_kernel").rsplit("_", 1)[-1]]
    return arguments["BT"] * streamed * features


def attention(
    K: int,
    V: int,
    dtype: torch.dtype,
    normalizer: str = "softpick",
    sizes: tuple[int, int, int, int] = (1, 256, 4, 4),
    **kwargs,
):
    """Forward, backward and decoding launches for B, T, HQ, H; nothing is computed.

    Decoding takes the keys as pages where there is packing.
    """
    B, T, HQ, H = sizes
    q = torch.empty(B, T, HQ, K, dtype=dtype)
    k, v = (torch.empty(B, T, H, D, dtype=dtype) for D in (K, V))
    args = {"scale": 1.0, "window_size": None, "head_first": False, "normalizer": normalizer}
    args |= {"cu_seqlens": None} | kwargs
    sink_bias = args.pop("sink_bias", None)
    o, lse = parallel_fwd.parallel_normalized_attn_fwd(q, k, v, sink_bias, safe=True, **args)
    parallel_bwd.parallel_normalized_attn_bwd(
        q, k, v, sink_bias, o=o, lse=lse, do=o, dlse=None, **args
    )
    lengths = torch.empty(B, dtype=torch.int32)
    table = None if args.pop("cu_seqlens") is None else torch.empty(B, 1, dtype=torch.int32)
    starts = None if table is None else lengths
    decoding_kernels.normalized_attn_decode_launch(
        q[:, :1], k, v, lengths, starts, table, sink_bias, has_stats=False, **args
    )


def compilations(card: Card, K: int) -> dict[str, int]:
    """How often each kernel compiles for batches, lengths and heads that differ."""

    def call():
        for sizes in (1, 256, 4, 4), (2, 1000, 8, 2), (3, 17, 16, 16), (1, 1, 1, 1):
            attention(K, K, torch.bfloat16, sizes=sizes)

    return {x.name: x.compilations for x in compiled_launches(card, call)}


def decode_rows(card: Card, K: int, dtype: torch.dtype, has_all: bool) -> list[dict[str, Any]]:
    """Decoding with 1 to `MAX_ROWS` query rows: each compilation of its kernel once, with the rows that take it.

    Args:
        has_all: With pages, starts, a window and a sink, or with none of them.
    """
    k = torch.empty(4, 64, 1, K, dtype=dtype)
    lengths = torch.empty(4, dtype=torch.int32)
    optional = (
        (lengths, torch.empty(4, 8, dtype=torch.int32), torch.empty(1)) if has_all else [None] * 3
    )
    options = {"scale": 1.0, "head_first": False, "normalizer": "softpick", "has_stats": False}

    def call():
        for rows in range(1, MAX_ROWS + 1):
            q = torch.empty(4, rows, 1, K, dtype=dtype)
            decoding_kernels.normalized_attn_decode_launch(
                q, k, k, lengths, *optional, window_size=100 if has_all else None, **options
            )

    kernel_name = "normalized_attn_decode_kernel"
    launches = [x for x in compiled_launches(card, call) if x.name == kernel_name]
    found: dict[int, dict[str, Any]] = {}
    for rows, launch in enumerate(launches, 1):
        if launch.compilations not in found:
            shape = {name: launch.arguments[name] for name in ("BT", "BS", "num_warps")}
            found[launch.compilations] = {"rows": [], **shape, **resources(launch.kernel)._asdict()}
        found[launch.compilations]["rows"].append(rows)
    return list(found.values())


@contextmanager
def launches_without_driver(card: Card) -> Iterator[None]:
    """Within it kernels are compiled for a card, and launched up to the call of its driver."""

    def nothing(*args):
        pass

    launch_shapes.architecture.cache_clear()
    with (
        mock.patch.object(driver, "_active", OfflineDriver(card.target)),
        # a mock would take longer than the launch
        mock.patch.object(CompiledKernel, "_init_handles", nothing),
        mock.patch.object(CompiledKernel, "run", nothing),
        mock.patch.object(decoding_kernels, "num_processors", return_value=100),
    ):
        yield
    launch_shapes.architecture.cache_clear()


def least_time(f: Callable[[], object]) -> float:
    """Microseconds of a call."""
    return min(timeit.repeat(f, number=10, repeat=2000)) * 1e5


def launch_times(card: Card, call: Callable[[], None]) -> dict[str, float]:
    """Microseconds in which Triton binds the arguments of each launch of `call()` and finds the compiled kernel.

    The least of many; descriptors are made before.
    """
    times: dict[str, float] = {}

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            run = partial(kernel.run, *args, grid=grid, warmup=False, **kwargs)
            times[kernel.__name__] = least_time(run)

        return launch

    with launches_without_driver(card), mock.patch.object(KernelInterface, "__getitem__", getitem):
        call()
    return times


def candidates(card_name: str) -> Iterator[dict[str, Any]]:
    """The resources of each kernel at the launch shapes that the doctor tries besides the table's."""
    shapes, table = doctor_shapes.CANDIDATES[card_name], launch_shapes.select_launch_shape
    for D, i in itertools.product((64, 128), range(3)):

        def select(row: str, kernel: str, *args, D=D, i=i):
            if kernel not in ("fwd", "dq", "dkv", "decode"):
                return table(row, kernel, *args)
            return shapes[kernel, D][i]

        with mock.patch.object(launch_shapes, "select_launch_shape", select):
            call = partial(attention, D, D, torch.bfloat16)
            for name, kernel, arguments, _ in compiled_launches(CARDS[card_name], call)[:5]:
                if name == "parallel_normalized_attn_bwd_kernel_delta":
                    continue
                row = {key: arguments.get(key) for key in ("BT", "BS", "num_warps", "waves_per_eu")}
                yield {"D": D, "kernel": name, **row, **resources(kernel)._asdict()}


# packed sequences, a window and a sink: every branch of the kernels
EVERYTHING = {
    "cu_seqlens": torch.tensor([0, 256], dtype=torch.int32),
    "window_size": 100,
    "sink_bias": torch.empty(4),
}
# name -> K, V, dtype, precision, further arguments
CASES = {
    "64": (64, 64, torch.bfloat16, "highest", {}),
    "64 float16": (64, 64, torch.float16, "highest", {}),
    "64 everything": (64, 64, torch.bfloat16, "highest", EVERYTHING),
    "128": (128, 128, torch.bfloat16, "highest", {}),
    "128 everything": (128, 128, torch.bfloat16, "highest", EVERYTHING),
    "256": (256, 256, torch.bfloat16, "highest", {}),
    "61": (61, 61, torch.bfloat16, "highest", {}),
    "72, values 127": (72, 127, torch.bfloat16, "highest", {}),
    "64 IEEE": (64, 64, torch.float32, "highest", {}),
    "128 IEEE": (128, 128, torch.float32, "highest", {}),
    "256 IEEE": (256, 256, torch.float32, "highest", {}),
    "64 TF32": (64, 64, torch.float32, "high", {}),
    "128 TF32": (128, 128, torch.float32, "high", {}),
    "256 TF32": (256, 256, torch.float32, "high", {}),
}


def main(card_name: str) -> None:
    """Prints one JSON object per kernel and case."""
    card = CARDS[card_name]
    for case, (K, V, dtype, precision, kwargs) in CASES.items():
        torch.set_float32_matmul_precision(precision)
        compiled = compiled_launches(card, partial(attention, K, V, dtype, **kwargs))
        for name, kernel, arguments, _ in compiled:
            row = {
                "case": case,
                "kernel": name,
                **resources(kernel)._asdict(),
                "products_needed": products_needed(name, arguments, dtype),
                **{key: arguments.get(key) for key in ("BT", "BS", "num_warps", "num_stages")},
            }
            sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    if sys.argv[2:] == ["compilations"]:
        for D in 64, 128:
            sys.stdout.write(json.dumps(compilations(CARDS[sys.argv[1]], D)) + "\n")
    elif sys.argv[2:] == ["candidates"]:
        for row in candidates(sys.argv[1]):
            sys.stdout.write(json.dumps(row) + "\n")
    elif sys.argv[2:] == ["launch"]:
        call = partial(attention, 64, 64, torch.bfloat16)
        for name, time in launch_times(CARDS[sys.argv[1]], call).items():
            sys.stdout.write(f"{name} {time:.1f} us\n")
    elif sys.argv[2:] == ["loops"]:
        for D in 64, 128:
            call = partial(attention, D, D, torch.bfloat16)
            for name, kernel, arguments, _ in compiled_launches(CARDS[sys.argv[1]], call)[:5]:
                used = resources(kernel)
                row = {"D": D, "kernel": name, "loops": inner_loops(kernel.asm["amdgcn"])}
                row |= {key: arguments[key] for key in ("BT", "BS", "num_warps")}
                row |= {"registers": used.registers, "spills": used.spills}
                sys.stdout.write(json.dumps(row) + "\n")
    elif sys.argv[2:] == ["rows"]:
        for D in 64, 128, 256:
            for name, has_all in ("bfloat16", False), ("bfloat16", True), ("float32", False):
                for row in decode_rows(CARDS[sys.argv[1]], D, getattr(torch, name), has_all):
                    case = {"D": D, "dtype": name, "has_all": has_all}
                    sys.stdout.write(json.dumps(case | row) + "\n")
    else:
        main(sys.argv[1])
