"""Times decoding, and that of other projects: python benchmarks/bench_decode.py

Query tokens of a sequence in bfloat16 against a full cache, each operator captured in a CUDA graph over caches of
at least 1 GiB together, so that none is found in L2, and replayed: medians of `triton.testing.do_bench`. Each row
is one operator, cache, number of query rows and share of negative keys, which score below 0 with every query of their
group, as the others score above: microseconds with the spread between the 20th and the 80th percentile, the bytes of K
and V over that time as GB/s and as a share of what a plain device copy moves in the same process (it counts what is
read and what is written), the share of V that was read, and the time over that of one query token. Query rows are
tokens times query heads per key head: one token is ordinary decoding, more are a speculated continuation or a chunk of a
prompt. An operator whose output disagrees with float64 is not timed, and the
exit code is 1. The rows so far are kept after Ctrl-C or an error.
"""

import argparse
import csv
import gc
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_attn import MAX_ERROR, describe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention
from triton.testing import do_bench

from fla.ops.attn.softpick import naive_normalized_attn
from fla.ops.attn.softpick.decoding import MAX_ROWS, softmax_attn_decode, softpick_attn_decode

# name -> head dimension, query heads, key heads
HEADS = {"D64 MHA": (64, 32, 32), "D128 GQA 4:1": (128, 32, 8)}
SHARES = (0.0, 0.5, 0.9, 0.99)
LEAST_BYTES = 2**30
MAX_BYTES = 40 * 2**30


@dataclass(kw_only=True, slots=True)
class Result:
    """One operator on one cache."""

    operator: str
    heads: str
    B: int
    T: int
    queries: int
    negative: float
    us: float
    spread_us: float
    gb_per_s: float
    of_copy: float
    v_read: float | None
    """Share of V, as the operator counts it; None of one that does not count."""
    of_one_token: float
    """Time over that of one query token per sequence."""


def median_and_spread(f: Callable[[], object]) -> tuple[float, float]:
    """Microseconds."""
    low, median, high = do_bench(f, quantiles=[0.2, 0.5, 0.8])
    return median * 1e3, (high - low) * 1e3


def time_in_graph(f: Callable[..., object], calls: list[tuple[torch.Tensor, ...]]):
    """Median and spread of one call in microseconds, without the host's part of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f(*calls[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in calls:
            f(*arguments)
    us, spread = median_and_spread(graph.replay)
    return us / len(calls), spread / len(calls)


def copy_bandwidth() -> float:
    """GB/s that a device copy of 2 GiB reads and writes."""
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    us, _ = median_and_spread(lambda: y.copy_(x))
    return 2 * x.numel() / us / 1e3


def draw(B: int, T: int, D: int, HQ: int, H: int, negative: float, queries: int = 1):
    """q [B, queries, HQ, D], k and v [B, T, H, D], lengths [B]; a share of `negative` of the keys scores about -8, the
    others 8."""
    q = torch.randn(B, queries, HQ, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    # scores are k[..., 0] and a normal remainder of variance 1
    q[..., 0] = D**0.5
    k[..., 0].fill_(8).masked_fill_(torch.rand(B, T, H, device="cuda") < negative, -8)
    return q, k, v, torch.full((B,), T, dtype=torch.int32, device="cuda")


def dense(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def attention(q, k, v, lengths):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bias = causal_lower_right(q.shape[2], k.shape[2]) if q.shape[2] > 1 else None
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1]
            )
        return o.transpose(1, 2)

    return attention


@cache
def compiled_flex_attention():
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, lengths):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = compiled_flex_attention()(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)


OPERATORS: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "softpick": (softpick_attn_decode, "softpick"),
    "softmax, same kernel": (softmax_attn_decode, "softmax"),
    "softmax, FA2": (dense(SDPBackend.FLASH_ATTENTION), "softmax"),
    "softmax, cuDNN": (dense(SDPBackend.CUDNN_ATTENTION), "softmax"),
    "softmax, FlexAttention": (flex, "softmax"),
}
# the others mask from the first query on, or not at all
TAKES_MANY_QUERIES = ("softpick", "softmax, same kernel", "softmax, FA2")


def check(name: str, D: int, HQ: int, H: int, queries: int) -> None:
    """Raises RuntimeError if an operator disagrees with the reference in float64."""
    f, normalizer = OPERATORS[name]
    q, k, v, lengths = draw(2, 1024, D, HQ, H, 0.9, queries)
    o = f(q, k, v, lengths)
    gold = naive_normalized_attn(q.double(), k.double(), v.double(), normalizer=normalizer)
    error = ((o.double() - gold).norm() / gold.norm()).item()
    if not error <= MAX_ERROR:
        raise RuntimeError(f"the output is wrong, relative error {error:.1e}: not timed")


HEADER = f"{'':24} {'us':>14} {'GB/s':>6} {'copy':>6} {'V read':>7} {'of one':>7}"


def bench_cache(
    names: list[str], heads: str, B: int, T: int, queries: int, negative: float, copy: float
):
    """Times operators on caches of one size; yields their rows."""
    D, HQ, H = HEADS[heads]
    num_bytes = 2 * B * T * H * D * 2
    calls = [draw(B, T, D, HQ, H, negative, queries) for _ in range(-(-LEAST_BYTES // num_bytes))]
    _, share = softpick_attn_decode(*calls[0], return_stats=True)
    for name in names:
        try:
            us, spread = time_in_graph(OPERATORS[name][0], calls)
            one = us
            if queries > 1:
                last_token = [(q[:, -1:], *rest) for q, *rest in calls]
                one, _ = time_in_graph(OPERATORS[name][0], last_token)
        except RuntimeError as error:
            # FlexAttention does not compile where K has 2**31 elements (torch 2.11)
            print(f"{name:24} failed: {str(error).strip().splitlines()[0]}", flush=True)
            continue
        yield Result(
            operator=name,
            heads=heads,
            B=B,
            T=T,
            queries=queries,
            negative=negative,
            us=us,
            spread_us=spread,
            gb_per_s=num_bytes / us / 1e3,
            of_copy=num_bytes / us / 1e3 / copy,
            v_read=share.mean().item() if name == "softpick" else None,
            of_one_token=us / one,
        )
    # the traceback of an operator that failed and its frames hold one another, and with them this cache
    gc.collect()


def bench(results: list[Result], names: list[str], heads: str, args: argparse.Namespace) -> None:
    D, HQ, H = HEADS[heads]
    # a token is HQ / H rows at least
    for queries in sorted({max(1, rows * H // HQ) for rows in args.query_rows}):
        checked = []
        for name in names:
            if queries > 1 and name not in TAKES_MANY_QUERIES:
                continue
            try:
                check(name, D, HQ, H, queries)
                checked.append(name)
            except RuntimeError as error:
                print(f"{name}, {heads}: {str(error).splitlines()[0]}", flush=True)
        for T, B, negative in itertools.product(args.lengths, args.batches, args.negative):
            if 2 * B * T * H * D * 2 > MAX_BYTES:
                print(f"\n{heads}, B {B}, T {T}: left out, the cache takes more than 40 GiB")
                continue
            print(
                f"\n{heads}, B {B}, T {T}, {queries} query tokens ({queries * HQ // H} rows), "
                f"{negative:.0%} negative keys\n{HEADER}",
                flush=True,
            )
            for r in bench_cache(checked, heads, B, T, queries, negative, args.copy):
                results.append(r)
                v_read = "      -" if r.v_read is None else f"{r.v_read:7.1%}"
                print(
                    f"{r.operator:24} {r.us:8.1f} ±{r.spread_us / 2:4.1f} {r.gb_per_s:6.0f} {r.of_copy:5.2f}x "
                    f"{v_read} {r.of_one_token:6.2f}x",
                    flush=True,
                )


def plot(results: list[Result], path: Path, title: str) -> None:
    """Speed against the share of negative keys: a row of panels for each kind of heads, a column for each length."""
    import matplotlib.pyplot as plt

    kinds = [heads for heads in HEADS if any(r.heads == heads for r in results)]
    lengths = sorted({r.T for r in results})
    figure, axes = plt.subplots(
        len(kinds),
        len(lengths),
        figsize=(4.2 * len(lengths), 3.4 * len(kinds)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for heads, row in zip(kinds, axes, strict=True):
        for T, ax in zip(lengths, row, strict=True):
            here = [r for r in results if (r.heads, r.T, r.queries) == (heads, T, 1)]
            if not here:
                continue
            B = max(r.B for r in here)
            for name in OPERATORS:
                points = sorted(
                    (r.negative, r.of_copy) for r in here if (r.operator, r.B) == (name, B)
                )
                if points:
                    style = "o-" if name == "softpick" else "o--"
                    # evenly spaced, since 0.9 and 0.99 are as far apart as they are interesting
                    ax.plot([y for _, y in points], style, label=name, markersize=3)
                    ax.set_xticks(range(len(points)), [f"{x:.0%}" for x, _ in points])
            ax.axhline(1, color="grey", linewidth=0.8)
            ax.set(xlabel="negative keys", title=f"{heads}, B {B}, T {T}")
            ax.grid(alpha=0.3)
        row[0].set_ylabel("bytes of K and V over time,\nof a device copy's")
    # of all panels, which share it
    axes[0][0].set_ylim(0, 1.05 * max(1, *(r.of_copy for r in results)))
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def read_rows(files: list[Path]) -> tuple[list[Result], str]:
    """What --csv wrote, and the machine of the first file.

    Raises:
        OSError, KeyError, ValueError, IndexError: A file is missing, of another kind or empty.
    """
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    kinds = {field.name: field.type for field in fields(Result) if field.name != "v_read"}
    results = [
        Result(
            **{name: kind(row[name]) for name, kind in kinds.items()},
            v_read=float(row["v_read"]) if row["v_read"] else None,
        )
        for row in rows
    ]
    return results, rows[0]["machine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**12, 2**14, 2**17])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument(
        "--query-rows",
        type=int,
        nargs="+",
        default=[1],
        help="query tokens of a sequence times query heads per key head, at most 128; 1: one token",
    )
    parser.add_argument("--negative", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--csv", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="PNG file for speed against negative keys")
    parser.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        help="draw --plot from these files of --csv, and time nothing",
    )
    args = parser.parse_args()
    if args.rows:
        if not args.plot:
            parser.error("--rows is for --plot, which is missing")
        try:
            results, machine = read_rows(args.rows)
        except (OSError, KeyError, ValueError, IndexError) as error:
            parser.error(
                f"--rows must be files that --csv wrote, got {' '.join(map(str, args.rows))}: {error!r}"
            )
        plot(results, args.plot, machine)
        return
    if not all(1 <= rows <= MAX_ROWS for rows in args.query_rows):
        parser.error(f"--query-rows must be between 1 and {MAX_ROWS}, got {args.query_rows}")
    if not torch.cuda.is_available():
        sys.exit("bench_decode.py needs a GPU")
    args.copy = copy_bandwidth()
    title = f"{describe()}, device copy {args.copy:.0f} GB/s"
    print(title)
    results: list[Result] = []
    try:
        for heads in args.heads:
            bench(results, args.operators, heads, args)
    finally:
        # also what there is after Ctrl-C or an error
        if args.csv:
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(
                    file, ["machine", *(field.name for field in fields(Result))]
                )
                writer.writeheader()
                writer.writerows({"machine": title, **asdict(result)} for result in results)
        if args.plot and results:
            plot(results, args.plot, title)
    if len({row.operator for row in results}) < len(args.operators):
        sys.exit("some operators were not timed, see above")


if __name__ == "__main__":
    main()
