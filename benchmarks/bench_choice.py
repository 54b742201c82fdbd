"""Times Hopper's kernels against Triton's, for every kind of call: python benchmarks/bench_choice.py

What `fla.ops.attn.softpick.kernel_choice.SHORTEST` rests on. softpick, causal, random normal inputs, medians of
`triton.testing.do_bench_cudagraph`, all in one process. A CUDA graph leaves the host out, whose time differs between
machines; backward is a forward with its backward, less the forward. Each row is one call: the TFLOP/s of Hopper's
kernel, its speed divided by that of Triton's, and by that of FlashAttention-4 (softmax, deterministic) if flash-attn-4
is installed; forward, then backward. TFLOP/s count the products of visible pairs of queries and keys, 2 forward and 5
backward. A call on which the kernels disagree is not timed, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from bench_attn import (
    Attention,
    describe,
    flash_attention_4,
    flash_attention_4_version,
    time_in_graphs,
)

from fla.ops.attn.softpick import parallel_softmax_attn, parallel_softpick_attn
from fla.ops.attn.softpick.kernel_choice import hopper_serving

TOKENS = 2**14
FEWER_TOKENS = (2**12, 2**13)
# largest relative L2 difference of an output or a gradient between the two
MAX_DIFFERENCE = 1e-2
KINDS = ("dense", "window", "packed")
# what Hopper's kernels serve, forward, forward and backward
Timed = tuple[str, Callable[[], object], Callable[[], object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A kind of call; length is T, the window, or the mean length of packed sequences, as in `SHORTEST`."""

    kind: str
    D: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    # query heads per key head
    G: int = 1
    tokens: int = TOKENS

    @property
    def num_heads(self) -> int:
        return 32 if self.D <= 64 else 16

    @property
    def row_length(self) -> int:
        return self.length if self.kind == "dense" else self.tokens

    def bounds(self) -> list[int]:
        """Where the sequences of a row start and end: one of T tokens, or with "packed" random ones, the same in every run."""
        if self.kind != "packed":
            return [0, self.row_length]
        generator = torch.Generator().manual_seed(1)
        count = self.tokens // self.length - 1
        inner = torch.randperm(self.tokens - 1, generator=generator)[:count] + 1
        return [0, *sorted(inner.tolist()), self.tokens]

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, in all sequences of one head."""
        bounds = self.bounds()
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        window = self.length if self.kind == "window" else self.tokens
        # a triangle, and behind it `window` keys a query
        seen = sum(
            min(n, window) * (min(n, window) + 1) // 2 + max(n - window, 0) * window
            for n in lengths
        )
        return seen * (self.tokens // self.row_length)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"{self.num_heads}/{self.num_heads // self.G}"
        return f"{self.kind:6} {dtype:8} D {self.D:3} heads {heads:5} {self.tokens:5} tokens length {self.length:5}"


def calls() -> Iterator[Call]:
    """What is timed, in order."""
    for D in (32, 48, 64, 80, 96, 112, 128):
        for length in (1024, 2048, 4096, 16384):
            yield Call(kind="dense", D=D, length=length)
    for D in (64, 128):
        for length in (1024, 2048, 4096, 16384):
            yield Call(kind="dense", D=D, length=length, dtype=torch.float16)
            yield Call(kind="dense", D=D, length=length, G=4)
        for length in (1024, 4096):
            yield Call(kind="window", D=D, length=length)
        for length in (512, 1024, 4096):
            yield Call(kind="packed", D=D, length=length)
        yield Call(kind="packed", D=D, length=1024, dtype=torch.float16)
        yield Call(kind="packed", D=D, length=1024, G=4)
        for tokens in FEWER_TOKENS:
            for length in (1024, 2048, 4096):
                yield Call(kind="dense", D=D, length=length, tokens=tokens)


def peer(call: Call, cu_seqlens: torch.Tensor | None) -> Attention:
    """Softmax attention of FlashAttention-4, deterministic."""
    if cu_seqlens is None:
        window_size = call.length if call.kind == "window" else None
        return flash_attention_4(deterministic=True, window_size=window_size)
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]  # no requirement

    bounds = call.bounds()
    longest = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, _ = flash_attn_varlen_func(
            q[0], k[0], v[0], cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest, max_seqlen_k=longest, causal=True, deterministic=True,
        )  # fmt: skip
        return o[None]

    return attention


def require_agreement(name: str, results: list[list[torch.Tensor]]) -> None:
    """Raises RuntimeError if two lists of an output and its gradients differ."""
    for tensor, a, b in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        difference = ((a.float() - b.float()).norm() / a.float().norm()).item()
        if not difference <= MAX_DIFFERENCE:
            raise RuntimeError(f"{tensor} of {name} differs by {difference:.1e}")


def time_passes(timed: Timed) -> tuple[float, float]:
    """Milliseconds of forward and backward."""
    serving, forward, both = timed
    with hopper_serving(serving):
        (forward_ms, _), (backward_ms, _) = time_in_graphs(forward, both)
    return forward_ms, backward_ms


def measure(call: Call) -> list[tuple[float, float]]:
    """Milliseconds of forward and backward of Triton's kernels, of Hopper's, and of FlashAttention-4 if it takes the call.

    Raises:
        RuntimeError: Triton's and Hopper's disagree.
    """
    B, T, HQ = call.tokens // call.row_length, call.row_length, call.num_heads

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(B, T, heads, call.D, device="cuda", dtype=call.dtype)

    inputs = [draw(heads).requires_grad_() for heads in (HQ, HQ // call.G, HQ // call.G)]
    do = draw(HQ)
    options = {}
    cu_seqlens = None
    if call.kind == "window":
        options["window_size"] = call.length
    if call.kind == "packed":
        cu_seqlens = torch.tensor(call.bounds(), dtype=torch.int32, device="cuda")
        options["cu_seqlens"] = cu_seqlens
    softpick = partial(parallel_softpick_attn, *inputs, **options)
    softmax = partial(parallel_softmax_attn, *inputs, **options)

    def run(
        attention: Callable[[], torch.Tensor], serving: str
    ) -> tuple[Timed, list[torch.Tensor]]:
        """What to time, and the output and the gradients."""

        def both() -> list[torch.Tensor]:
            o = attention()
            return [o.detach(), *torch.autograd.grad(o, inputs, do)]

        with hopper_serving(serving):
            return (serving, attention, both), both()

    (of_triton, expected), (of_hopper, got) = run(softpick, "none"), run(softpick, "all")
    require_agreement("softpick", [expected, got])
    times = [time_passes(of_triton), time_passes(of_hopper)]
    if flash_attention_4_version():
        try:
            (_, expected), (of_peer, got) = (
                run(softmax, "none"),
                run(partial(peer(call, cu_seqlens), *inputs), "none"),
            )
            require_agreement("FA4", [expected, got])
            times.append(time_passes(of_peer))
        except (AssertionError, ImportError, RuntimeError) as error:
            # it asserts what it takes
            print(f"{call} FA4 not timed: {str(error).splitlines()[:1]}", flush=True)
    return times


def columns(gflop: float, triton_ms: float, ms: float, peer_ms: float | None) -> str:
    """TFLOP/s of Hopper's kernel, and its speed against the others'."""
    against_peer = f"{peer_ms / ms:6.2f}" if peer_ms else "     -"
    return f"{gflop / ms:10.0f} {triton_ms / ms:6.2f} {against_peer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    head_dims = sorted({call.D for call in calls()})
    parser.add_argument("--head-dims", type=int, nargs="+", default=head_dims, choices=head_dims)
    args = parser.parse_args()
    chosen = [call for call in calls() if call.kind in args.kinds and call.D in args.head_dims]
    if not chosen:
        parser.error(f"no call of --kinds {args.kinds} has --head-dims {args.head_dims}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("bench_choice.py needs a GPU of architecture sm_90")
    print(describe(), "\n")
    titles = f"{'TFL/s':>10} {'Triton':>6} {'FA4':>6}"
    print(f"{'':60}{titles:24}{titles:24}")
    has_failed = False
    for call in chosen:
        try:
            times = measure(call)
        except RuntimeError as error:
            has_failed = True
            print(f"{call} not timed: {error}", flush=True)
            continue
        gflop = 4 * call.pairs() * call.num_heads * call.D / 1e9
        (of_triton, of_hopper), peer = times[:2], times[2] if len(times) > 2 else (None, None)
        print(
            f"{call}{columns(gflop, of_triton[0], of_hopper[0], peer[0])}"
            f"{columns(2.5 * gflop, of_triton[1], of_hopper[1], peer[1])}",
            flush=True,
        )
    sys.exit(1 if has_failed else 0)


if __name__ == "__main__":
    main()
