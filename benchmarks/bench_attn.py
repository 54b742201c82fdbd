"""Times the Triton operators and other projects' softmax attention: python benchmarks/bench_attn.py

bfloat16, causal, random normal inputs, medians of `triton.testing.do_bench` in one process. Each row is one
operator at one shape: milliseconds with the spread between the 20th and the 80th percentile, TFLOP/s, peak
memory of one forward and backward on top of the inputs, and the speed against cuDNN's softmax. TFLOP/s count
the products below the diagonal only, 4 B HQ T T D / 2 forward and 2.5 times that backward. --graph times CUDA graphs,
which leave the host out; backward is then forward and backward less forward. An operator whose outputs or gradients
disagree with float64 is not timed, and the exit code is 1. FlashAttention-4 is timed if the package flash-attn-4 is
installed. The rows so far are kept after Ctrl-C or an error.
"""

import argparse
import csv
import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from fla.ops.attn.parallel import parallel_attn
from plot_attn import Result, plot
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench, do_bench_cudagraph

from fla.ops.attn.softpick import (
    naive_softmax_attn,
    naive_softpick_attn,
    parallel_softmax_attn,
    parallel_softpick_attn,
)
from fla.ops.attn.softpick.kernel_choice import hopper_serving

# query heads by head dimension
NUM_HEADS = {64: 32, 128: 16}
# largest relative L2 error of an output or a gradient in bfloat16
MAX_ERROR = 1e-2
REFERENCE = "softmax, cuDNN"
# what Hopper's kernels serve
SERVED = {"triton": "none", "hopper": "all", "chosen": "faster"}
FA4, FA4_DETERMINISTIC = "softmax, FA4", "softmax, FA4 det"

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(backend: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # [B, T, H, D] -> [B, H, T, D] without a copy, as a model would
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
        return o.transpose(1, 2)

    return attention


@cache
def causal_block_mask(T: int):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")


@cache
def compiled_flex_attention():
    # or its backward could not be timed again and again on one forward
    torch._functorch.config.donated_buffer = False
    # one compilation per shape; past the limit it would run uncompiled
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = compiled_flex_attention()(
        q, k, v, block_mask=causal_block_mask(q.shape[2]), enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2)


def flash_attention_4_version() -> str | None:
    """The version of flash-attn-4, or None if it is not installed."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def flash_attention_4(*, deterministic: bool, window_size: int | None = None) -> Attention:
    """FlashAttention-4, the package flash-attn-4; deterministic: its gradients agree bitwise between runs, as ours do."""
    # FA4 counts the keys before the query's own
    window = (None, None) if window_size is None else (window_size - 1, 0)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]  # no requirement

        o, _ = flash_attn_func(
            q, k, v, causal=True, window_size=window, deterministic=deterministic
        )
        return o

    return attention


def unsafe_softpick(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return parallel_softpick_attn(q, k, v, safe=False)


OPERATORS: dict[str, tuple[Attention, Attention]] = {
    "softpick": (parallel_softpick_attn, naive_softpick_attn),
    "softpick, safe=False": (unsafe_softpick, naive_softpick_attn),
    "softmax, same kernel": (parallel_softmax_attn, naive_softmax_attn),
    REFERENCE: (sdpa(SDPBackend.CUDNN_ATTENTION), naive_softmax_attn),
    FA4: (flash_attention_4(deterministic=False), naive_softmax_attn),
    FA4_DETERMINISTIC: (flash_attention_4(deterministic=True), naive_softmax_attn),
    "softmax, FA2": (sdpa(SDPBackend.FLASH_ATTENTION), naive_softmax_attn),
    "softmax, FlexAttention": (flex, naive_softmax_attn),
    "softmax, FLA": (parallel_attn, naive_softmax_attn),
}


def forward_and_gradients(f: Attention, inputs: list[torch.Tensor], do: torch.Tensor):
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = f(*inputs)
    return o, *torch.autograd.grad(o, inputs, do.to(o.dtype))


def check(f: Attention, reference: Attention, G: int, D: int) -> float:
    """Seconds that a call, compilation included, and its gradients took.

    Raises:
        RuntimeError: f disagrees with the reference in float64 on fresh random inputs.
    """
    H, T = 2, 512
    q, do = (torch.randn(2, T, H * G, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start = time.perf_counter()
    got = forward_and_gradients(f, [q, k, v], do)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    gold = forward_and_gradients(reference, [q.double(), k.double(), v.double()], do)
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, gold, strict=True):
        error = ((x.double() - y).norm() / y.norm()).item()
        if not error <= MAX_ERROR:
            raise RuntimeError(f"{name} is wrong, relative error {error:.1e}: not timed")
    return seconds


# milliseconds: the median, and from the 20th to the 80th percentile
Time = tuple[float, float]


def median_and_spread(f: Callable[[], object], bench: Callable = do_bench) -> Time:
    low, median, high = bench(f, quantiles=[0.2, 0.5, 0.8])
    return median, high - low


def time_in_graphs(forward: Callable[[], object], both: Callable[[], object]) -> tuple[Time, Time]:
    """Times of forward and backward. Both are captured for backward, which runs on the stream of its forward."""
    bench = partial(do_bench_cudagraph, rep=40)
    forward_ms, forward_spread_ms = median_and_spread(forward, bench)
    both_ms, both_spread_ms = median_and_spread(both, bench)
    return (forward_ms, forward_spread_ms), (both_ms - forward_ms, both_spread_ms)


def measure(name: str, B: int, T: int, HQ: int, H: int, D: int, is_graph: bool) -> Result:
    f, _ = OPERATORS[name]
    q, do = (torch.randn(B, T, HQ, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    # what the first call makes and keeps, such as masks, is no part of the peak
    f(*inputs)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(f(*inputs), inputs, do)
    peak = torch.cuda.max_memory_allocated() - before
    if is_graph:
        forward, backward = time_in_graphs(
            lambda: f(*inputs), lambda: torch.autograd.grad(f(*inputs), inputs, do)
        )
    else:
        forward = median_and_spread(lambda: f(*inputs))
        o = f(*inputs)
        backward = median_and_spread(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True))
    gflop = 2 * B * HQ * T * T * D / 1e9
    return Result(
        operator=name,
        B=B,
        T=T,
        HQ=HQ,
        H=H,
        D=D,
        forward_ms=forward[0],
        forward_spread_ms=forward[1],
        forward_tflops=gflop / forward[0],
        backward_ms=backward[0],
        backward_spread_ms=backward[1],
        backward_tflops=2.5 * gflop / backward[0],
        peak_mib=peak / 2**20,
    )


def line(result: Result, reference: Result | None) -> str:
    """A row of the table; with the speed relative to the reference where there is one."""

    def half(ms: float, spread: float, tflops: float, reference_ms: float | None) -> str:
        ratio = f"{reference_ms / ms:5.2f}x" if reference_ms else "     -"
        return f"{ms:8.3f} ±{spread / 2:5.3f} {tflops:5.0f} {ratio}"

    r, c = result, reference
    forward = half(r.forward_ms, r.forward_spread_ms, r.forward_tflops, c and c.forward_ms)
    backward = half(r.backward_ms, r.backward_spread_ms, r.backward_tflops, c and c.backward_ms)
    return f"{r.operator:24} {forward}   {backward}   {r.peak_mib:7.0f}"


HEADER = f"{'':24} {'forward ms':>15} TFL/s  cuDNN   {'backward ms':>15} TFL/s  cuDNN   peak MiB"


def bench(
    results: list[Result],
    names: list[str],
    D: int,
    G: int,
    tokens: int,
    lengths: list[int],
    kind: str,
    is_graph: bool,
) -> None:
    """Prints the rows of one head dimension and group size and adds them to results; leaves out what fails."""
    HQ = NUM_HEADS[D]
    passed = []
    print(f"\nD {D}, {G} query heads per key head: seconds of the first call, compilation included")
    for name in names:
        try:
            # the inputs of the check are small, and "chosen" times both kinds
            for used in ("triton", "hopper") if kind == "chosen" else (kind,):
                with hopper_serving(SERVED[used]):
                    print(f"{name:24} {check(*OPERATORS[name], G, D):5.1f}", flush=True)
            passed.append(name)
        except (RuntimeError, ImportError) as error:
            # a backend that this build of torch or this card does not have, a package that is missing, a wrong result
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
    for T in lengths:
        B = tokens // T
        print(f"\nB {B}, T {T}, HQ {HQ}, H {HQ // G}, D {D}\n{HEADER}", flush=True)
        # the reference first, since the others are compared with it
        with hopper_serving(SERVED[kind]):
            rows = [
                measure(name, B, T, HQ, HQ // G, D, is_graph)
                for name in sorted(passed, key=lambda name: name != REFERENCE)
            ]
        reference = next((row for row in rows if row.operator == REFERENCE), None)
        for row in sorted(rows, key=lambda row: names.index(row.operator)):
            print(line(row, reference), flush=True)
        results += rows


def write_csv(results: list[Result], path: Path, title: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["machine", *(field.name for field in fields(Result))])
        writer.writeheader()
        writer.writerows({"machine": title, **asdict(result)} for result in results)


def describe() -> str:
    """GPU, its clock, versions and commit."""
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    clock = torch.cuda.get_device_properties(0).clock_rate // 1000
    version = flash_attention_4_version()
    peer = f"flash-attn-4 {version}, " if version else ""
    return (
        f"{torch.cuda.get_device_name()}, at most {clock} MHz, torch {torch.__version__}, "
        f"triton {triton.__version__}, {peer}commit {commit or 'unknown'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], choices=NUM_HEADS)
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[1, 4], help="query heads per key head"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**i for i in range(10, 15)])
    parser.add_argument("--tokens", type=int, default=2**14, help="B times T")
    missing = () if flash_attention_4_version() else (FA4, FA4_DETERMINISTIC)
    default = [name for name in OPERATORS if name not in missing]
    parser.add_argument("--operators", nargs="+", default=default, choices=OPERATORS)
    parser.add_argument("--csv", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="PNG file for speed and memory against T")
    parser.add_argument(
        "--kernels", choices=SERVED, default="chosen",
        help="which kernels serve our operators: chosen by kernel_choice.py, or one kind wherever it can",
    )  # fmt: skip
    parser.add_argument("--graph", action="store_true", help="time CUDA graphs")
    args = parser.parse_args()
    for name in ("groups", "lengths", "tokens"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} must be positive, got {value}")
    if not torch.cuda.is_available():
        sys.exit("bench_attn.py needs a GPU")
    for T in args.lengths:
        if args.tokens % T:
            parser.error(
                f"--tokens must be a multiple of every --lengths, got {args.tokens} and {T}"
            )
    for G in args.groups:
        if any(NUM_HEADS[D] % G for D in args.head_dims):
            parser.error(f"--groups must divide the query heads, {NUM_HEADS}, got {G}")
    title = f"{describe()}, in CUDA graphs" if args.graph else describe()
    print(title)
    results = []
    try:
        for D in args.head_dims:
            for G in args.groups:
                bench(
                    results,
                    args.operators,
                    D,
                    G,
                    args.tokens,
                    args.lengths,
                    args.kernels,
                    args.graph,
                )
    finally:
        # also what there is after Ctrl-C or an error
        if args.csv:
            write_csv(results, args.csv, title)
        if args.plot and results:
            plot(results, list(OPERATORS), args.plot, title)
    if len({row.operator for row in results}) < len(args.operators):
        sys.exit("some operators were not timed, see above")


if __name__ == "__main__":
    main()
