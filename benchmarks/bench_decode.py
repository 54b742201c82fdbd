"""Times decoding beside other people's: python benchmarks/bench_decode.py

One query token a sequence in bfloat16 against a full cache, medians of `triton.testing.do_bench`. Each row is one
operator, cache and share of keys with a negative score: microseconds with the spread between the 20th and the 80th
percentile, the bytes of K and V over that time as GB/s and as a share of what a plain device copy moves in the
same process (it counts what is read and what is written), and the share of V that was read. An operator whose
output disagrees with float64 is not timed, and the exit code is 1. The rows so far are kept after Ctrl-C or an error.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_attn import MAX_ERROR, describe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from triton.testing import do_bench

from fla.ops.attn.softpick import naive_normalized_attn
from fla.ops.attn.softpick.decoding import softmax_attn_decode, softpick_attn_decode

# name -> head dimension, query heads, key heads
HEADS = {"D64 MHA": (64, 32, 32), "D128 GQA 4:1": (128, 32, 8)}
# share of keys with a negative score; random keys have half
SHARES = (0.5, 0.9, 0.99)
MAX_GIB = 40


@dataclass(kw_only=True, slots=True)
class Result:
    """One operator on one cache."""

    operator: str
    heads: str
    B: int
    T: int
    negative: float
    us: float
    spread_us: float
    gb_per_s: float
    of_copy: float
    v_read: float | None
    """Share of V, as the operator counts it; None of one that does not count."""


def median_and_spread(f: Callable[[], object]) -> tuple[float, float]:
    """Microseconds."""
    low, median, high = do_bench(f, quantiles=[0.2, 0.5, 0.8])
    return median * 1e3, (high - low) * 1e3


def copy_bandwidth() -> float:
    """GB/s that a device copy of 2 GiB reads and writes."""
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    us, _ = median_and_spread(lambda: y.copy_(x))
    return 2 * x.numel() / us / 1e3


def draw(B: int, T: int, D: int, HQ: int, H: int, negative: float):
    """q [B, 1, HQ, D], k and v [B, T, H, D]; a share of about `negative` of the scores below 0."""
    q = torch.randn(B, 1, HQ, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    # all queries of a group share a direction, which the keys lean away from as far as the share asks
    q[..., 0] = D**0.5
    # the rest of a product is normal with variance D - 1
    score = torch.distributions.Normal(0, (D - 1) ** 0.5).icdf(torch.tensor(negative)).item()
    k[..., 0] = -score / D**0.5
    return q, k, v


def dense(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def attention(q, k, v, lengths):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
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


def check(name: str, D: int, HQ: int, H: int) -> None:
    """Raises RuntimeError if an operator disagrees with the reference in float64."""
    f, normalizer = OPERATORS[name]
    q, k, v = draw(2, 1024, D, HQ, H, 0.9)
    lengths = torch.full((2,), 1024, dtype=torch.int32, device="cuda")
    o = f(q, k, v, lengths)
    gold = naive_normalized_attn(q.double(), k.double(), v.double(), normalizer=normalizer)
    error = ((o.double() - gold).norm() / gold.norm()).item()
    if not error <= MAX_ERROR:
        raise RuntimeError(f"the output is wrong, relative error {error:.1e}: not timed")


HEADER = f"{'':24} {'us':>14} {'GB/s':>6} {'copy':>6} {'V read':>7}"


def bench(results: list[Result], names: list[str], heads: str, args: argparse.Namespace) -> None:
    D, HQ, H = HEADS[heads]
    right = []
    for name in names:
        try:
            check(name, D, HQ, H)
            right.append(name)
        except RuntimeError as error:
            print(f"{name}, {heads}: {str(error).splitlines()[0]}", flush=True)
    for T in args.lengths:
        for B in args.batches:
            num_bytes = 2 * B * T * H * D * 2
            if num_bytes > MAX_GIB * 2**30:
                print(f"\n{heads}, B {B}, T {T}: left out, the cache takes more than {MAX_GIB} GiB")
                continue
            for negative in args.negative:
                q, k, v = draw(B, T, D, HQ, H, negative)
                lengths = torch.full((B,), T, dtype=torch.int32, device="cuda")
                is_negative = (q.view(B, H, -1, D)[:1] @ k[:1].permute(0, 2, 3, 1) < 0).float()
                _, share = softpick_attn_decode(q, k, v, lengths, return_stats=True)
                print(
                    f"\n{heads}, B {B}, T {T}, {is_negative.mean().item():.1%} of the scores negative\n{HEADER}",
                    flush=True,
                )
                for name in right:
                    f, _ = OPERATORS[name]
                    us, spread = median_and_spread(partial(f, q, k, v, lengths))
                    result = Result(
                        operator=name,
                        heads=heads,
                        B=B,
                        T=T,
                        negative=negative,
                        us=us,
                        spread_us=spread,
                        gb_per_s=num_bytes / us / 1e3,
                        of_copy=num_bytes / us / 1e3 / args.copy,
                        v_read=share.mean().item() if name == "softpick" else None,
                    )
                    results.append(result)
                    print(
                        f"{name:24} {us:8.1f} ±{spread / 2:4.1f} {result.gb_per_s:6.0f} "
                        f"{result.of_copy:5.2f}x "
                        + (f"{result.v_read:7.1%}" if result.v_read is not None else "      -"),
                        flush=True,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**12, 2**14, 2**15, 2**17])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--negative", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--csv", type=Path, help="file for the rows")
    args = parser.parse_args()
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
    if len({row.operator for row in results}) < len(args.operators):
        sys.exit("some operators were not timed, see above")


if __name__ == "__main__":
    main()
