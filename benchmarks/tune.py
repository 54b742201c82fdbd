"""Searches launch shapes for the GPU it runs on: python benchmarks/tune.py --kernel dkv --head-dim 128

Times one kernel at every candidate `LaunchShape`, in bfloat16, at three lengths of 16k tokens each. Prints one line
per candidate, best first: the geometric mean over the lengths of its time over the best time, the time at each
length, and the fields of the shape. Enter what it finds in the table of `launch_shapes.py` by hand, with the
output in the commit.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import sys
from unittest import mock

import torch
import triton
from triton.testing import do_bench

from fla.ops.attn.softpick import launch_shapes, parallel_bwd
from fla.ops.attn.softpick.launch_shapes import LaunchShape
from fla.ops.attn.softpick.parallel_fwd import parallel_normalized_attn_fwd

NUM_HEADS = {64: 32, 128: 16, 256: 8}
LENGTHS = (1024, 4096, 16384)
TOKENS = 2**14


class Nothing:
    """Stands in for the kernel of backward that is not being timed."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def use(kernel: str, D: int, shape: LaunchShape) -> None:
    shapes = launch_shapes.TABLE[launch_shapes.architecture(0)]
    column = {64: 0, 128: 1, 256: 2}[D]
    row = list(shapes[kernel, "16bit"])
    row[column] = shape
    shapes[kernel, "16bit"] = tuple(row)


def launcher(kernel: str, normalizer: str, B: int, T: int, H: int, D: int):
    """A function that launches the one kernel."""
    q, k, v, do = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    common = {
        "cu_seqlens": None,
        "scale": D**-0.5,
        "window_size": None,
        "head_first": False,
        "normalizer": normalizer,
    }

    def forward():
        return parallel_normalized_attn_fwd(q, k, v, sink_bias=None, safe=True, **common)

    if kernel == "fwd":
        return forward
    o, lse = forward()
    others = {
        f"parallel_normalized_attn_bwd_kernel_{name}": Nothing()
        for name in ("delta", "dq", "dkv")
        if name != kernel
    }

    def backward():
        with mock.patch.multiple(parallel_bwd, **others):
            parallel_bwd.parallel_normalized_attn_bwd(
                q, k, v, None, o=o, lse=lse, do=do, dlse=None, **common
            )

    return backward


def time_of(kernel: str, normalizer: str, D: int, shape: LaunchShape, T: int) -> float:
    """Milliseconds; infinite where the shape does not fit the card."""
    use(kernel, D, shape)
    try:
        return do_bench(
            launcher(kernel, normalizer, TOKENS // T, T, NUM_HEADS[D], D), return_mode="median"
        )
    except triton.runtime.errors.OutOfResources:
        return math.inf


def compile_only(job: tuple[str, str, int, LaunchShape]) -> None:
    """Fills Triton's cache on disk, in a process of its own."""
    kernel, normalizer, D, shape = job
    use(kernel, D, shape)
    with contextlib.suppress(triton.runtime.errors.OutOfResources):
        launcher(kernel, normalizer, 1, 256, NUM_HEADS[D], D)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=("fwd", "dq", "dkv"), required=True)
    parser.add_argument("--head-dim", type=int, choices=NUM_HEADS, required=True)
    parser.add_argument("--normalizer", default="softpick")
    parser.add_argument("--BT", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--BS", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument(
        "--maxnreg", type=int, nargs="+", default=[0], help="registers per thread, 0 for no limit"
    )
    parser.add_argument(
        "--descriptors", type=int, nargs="+", default=[0, 1], choices=(0, 1), help="without, with"
    )
    parser.add_argument("--processes", type=int, default=8, help="that compile at the same time")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune.py needs a GPU")
    shapes = [
        LaunchShape(BT, BS, warps, stages, maxnreg or None, bool(descriptors))
        for BT, BS, warps, stages, maxnreg, descriptors in itertools.product(
            args.BT, args.BS, args.warps, args.stages, args.maxnreg, args.descriptors
        )
    ]
    jobs = [(args.kernel, args.normalizer, args.head_dim, shape) for shape in shapes]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.map(compile_only, jobs, chunksize=1)
    times = {
        shape: [time_of(args.kernel, args.normalizer, args.head_dim, shape, T) for T in LENGTHS]
        for shape in shapes
    }
    best = [min(column) for column in zip(*times.values(), strict=True)]
    means = {
        shape: math.prod(x / y for x, y in zip(row, best, strict=True)) ** (1 / len(LENGTHS))
        for shape, row in times.items()
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(
        f"{args.kernel}, D {args.head_dim}, {args.normalizer}, {TOKENS} tokens. Columns: mean time over the best "
        f"time, ms at T = {LENGTHS}, ({', '.join(LaunchShape._fields)})"
    )
    for shape in sorted(means, key=means.get):
        cells = "  ".join(f"{x:8.3f}" for x in times[shape])
        print(f"{means[shape]:6.3f}  {cells}  {tuple(shape)}")


if __name__ == "__main__":
    main()
