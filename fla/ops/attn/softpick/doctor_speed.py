"""Times the operators against torch's, for `doctor.py`: bfloat16, causal, medians."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from fla.ops.attn.softpick.decoding import normalized_attn_decode
from fla.ops.attn.softpick.kernel_choice import hopper_serving
from fla.ops.attn.softpick.launch_shapes import architecture
from fla.ops.attn.softpick.naive import naive_normalized_attn
from fla.ops.attn.softpick.parallel import parallel_normalized_attn

if TYPE_CHECKING:
    from fla.ops.attn.softpick.doctor import Report

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# query and key heads by head dimension
NUM_HEADS = {64: 32, 128: 16}
TOKENS = 2**14
LENGTHS = (1024, 4096, 16384)
# sequences of one query token each against a cache
DECODED = 8
# largest relative L2 error in bfloat16 of what is timed
MAX_ERROR = 1e-2


def draw(B: int, T: int, D: int, queries: int | None = None) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    H = NUM_HEADS[D]
    lengths = queries or T, T, T, queries or T
    return [torch.randn(B, x, H, D, device="cuda", dtype=torch.bfloat16) for x in lengths]


def by_kernels(normalizer: str) -> Attention:
    """Attention through the kernels of this package."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return parallel_normalized_attn(q, k, v, normalizer=normalizer)  # pyright: ignore[reportReturnType]  # without return_lse the result is one tensor

    return attention


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of torch, by the backend of its choice."""
    # [B, T, H, D] -> [B, H, T, D] without a copy, as a model would
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def compiled_flex_attention() -> Attention:
    """FlexAttention of torch."""
    # imported here: both take seconds
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # or its backward could not be timed again and again on one forward
    torch._functorch.config.donated_buffer = False
    # one compilation per shape; past the limit it would run uncompiled
    torch._dynamo.config.recompile_limit = 1000
    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        T = q.shape[1]
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=masks[T]).transpose(1, 2)

    return attention


def relative_error(got: torch.Tensor, gold: torch.Tensor) -> float:
    """L2 norm of the difference over that of ``gold``."""
    return ((got.double() - gold.double()).norm() / gold.double().norm()).item()


def check(f: Attention, normalizer: str, D: int) -> None:
    """Raises RuntimeError if an output or a gradient disagrees with float64."""
    *inputs, do = draw(1, 512, D)
    leaves = [x.requires_grad_() for x in inputs]
    o = f(*leaves)
    got = o, *torch.autograd.grad(o, leaves, do)
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = leaves
    o: torch.Tensor = naive_normalized_attn(q, k, v, normalizer=normalizer)  # pyright: ignore[reportAssignmentType]  # without return_lse the result is one tensor
    gold = o, *torch.autograd.grad(o, leaves, do.double())
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, gold, strict=True):
        error = relative_error(x.detach(), y.detach())
        if not error <= MAX_ERROR:
            raise RuntimeError(f"{name} is wrong, relative error {error:.1e}: not timed")


def check_all_kernels(f: Attention, normalizer: str, D: int) -> None:
    """`check`, on Hopper of both kinds of kernels: the inputs are small, and of those that are timed some are large."""
    for what in ("none", "all") if architecture(0) == "sm_90" else ("none",):
        with hopper_serving(what):
            check(f, normalizer, D)


def median_ms(f: Callable[[], object], is_quick: bool = False) -> float:
    """Median time of a call in milliseconds."""
    times = {"warmup": 1, "rep": 5} if is_quick else {"warmup": 15, "rep": 60}
    return do_bench(f, return_mode="median", **times)  # pyright: ignore[reportReturnType]  # one number, without quantiles


def time_attention(f: Attention, T: int, D: int, is_quick: bool) -> str:
    """Milliseconds and TFLOP/s of forward and of backward."""
    B = max(1, (512 if is_quick else TOKENS) // T)
    *inputs, do = draw(B, T, D)
    for x in inputs:
        x.requires_grad_()
    forward = median_ms(lambda: f(*inputs), is_quick)
    o = f(*inputs)
    backward = median_ms(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True), is_quick)
    # the products below the diagonal alone
    gflop = 2 * B * NUM_HEADS[D] * T * T * D / 1e9
    return f"{forward:9.3f} {gflop / forward:6.0f} {backward:9.3f} {2.5 * gflop / backward:6.0f}"


def time_decoding(name: str, T: int, D: int, is_quick: bool) -> str:
    """Microseconds, and GB/s of keys and values."""
    q, k, v, _ = draw(DECODED, T, D, queries=1)
    lengths = torch.full((DECODED,), T, dtype=torch.int32, device="cuda")

    def torch_sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )

    def ours() -> object:
        return normalized_attn_decode(q, k, v, lengths, normalizer=name)

    ms = median_ms(torch_sdpa if name == "SDPA" else ours, is_quick)
    return f"{1e3 * ms:9.1f} {2 * k.numel() * k.element_size() / ms / 1e6:8.0f}"


def time_operators(report: "Report", is_quick: bool) -> None:
    """Prints a line for each operator, head dimension and length."""
    lengths = (256,) if is_quick else LENGTHS
    report.begin(
        "speed",
        f"Speed, bfloat16, causal, {TOKENS} tokens, heads {NUM_HEADS} by head dimension, medians. TFLOP/s count the\n"
        "products below the diagonal; backward counts 2.5 times forward. SDPA is torch's own choice of backend.",
    )
    report.line(f"{'D':>4} {'T':>6}  {'':22} {'fwd ms':>9} {'TFL/s':>6} {'bwd ms':>9} {'TFL/s':>6}")
    operators: dict[str, tuple[Attention, str]] = {
        "softpick": (by_kernels("softpick"), "softpick"),
        "softmax, same kernels": (by_kernels("softmax"), "softmax"),
        "softmax, SDPA": (sdpa, "softmax"),
    }
    for D in NUM_HEADS:
        for name, (f, normalizer) in operators.items():
            _time_one(report, name, f, normalizer, D, lengths, is_quick)
    report.line(
        f"\nDecoding, one token of each of {DECODED} sequences, the host's part of a call included:\n"
        f"{'D':>4} {'T':>6}  {'':22} {'us':>9} {'GB/s':>8}"
    )
    for D in NUM_HEADS:
        for T in lengths:
            for name in ("softpick", "softmax", "SDPA"):
                label = f"{D:4} {T:6}  {name:22}"
                cells = report.attempt(
                    label, lambda D=D, T=T, name=name: time_decoding(name, T, D, is_quick)
                )
                if cells:
                    report.line(f"{label} {cells}")
    report.line("\nFlexAttention, as the first table; it compiles for each row")
    _time_flex_attention(report, lengths, is_quick)


def _time_one(
    report: "Report",
    name: str,
    f: Attention,
    normalizer: str,
    D: int,
    lengths: tuple[int, ...],
    is_quick: bool,
) -> None:
    label = f"{D:4}         {name:22}"
    if not report.attempt(label, lambda: (check_all_kernels(f, normalizer, D), True)):
        return
    for T in lengths:
        label = f"{D:4} {T:6}  {name:22}"
        cells = report.attempt(label, lambda T=T: time_attention(f, T, D, is_quick))
        if cells:
            report.line(f"{label} {cells}")


def _time_flex_attention(report: "Report", lengths: tuple[int, ...], is_quick: bool) -> None:
    if is_quick:
        report.skip("FlexAttention", "a quick run compiles nothing else")
        return
    name, longest = "FlexAttention", 15.0
    f: Attention | None = None
    for D in NUM_HEADS:
        for T in lengths:
            label = f"{D:4} {T:6}  {name:22}"
            # a compilation cannot be stopped, so it starts only if one like the longest so far would end in time
            if report.remaining() < longest:
                report.skip(label, "out of time")
                continue
            start = time.monotonic()
            try:
                f = f or compiled_flex_attention()
                report.line(f"{label} {time_attention(f, T, D, is_quick)}")
            except torch.OutOfMemoryError:
                report.skip(label, "out of memory on the GPU")
            except Exception as error:
                # torch's operator, so no fault of the kernels that this program examines
                lines = str(error).strip().splitlines() or ["no message"]
                report.skip(label, f"{type(error).__name__}: {lines[0][:300]}")
            longest = max(longest, time.monotonic() - start)
