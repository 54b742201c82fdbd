"""Which kernels serve which inputs on which card: those of Triton, or those for Hopper in Gluon.

Decided before the launch, by card, kind and size of the input. The whole answer, without a GPU:
``python -m fla.ops.attn.softpick.kernel_table``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from fla.ops.attn.softpick.launch_shapes import architecture, num_processors
from fla.ops.attn.softpick.parallel_bwd import parallel_normalized_attn_bwd
from fla.ops.attn.softpick.parallel_fwd import parallel_normalized_attn_fwd
from fla.ops.attn.softpick.tiles import descriptor_strides

# dq and dkv are one
HOPPER_KERNELS = frozenset({"fwd", "dq", "dkv"})
MAX_HOPPER_HEAD_DIM = 128
# Kind of call, then forward or backward -> K = V -> the least length at which Hopper's kernel was timed in bfloat16,
# and was as fast as Triton's or faster. Float16 and grouped heads follow. The length is S, window_size, or the mean length
# of packed sequences. benchmarks/bench_choice.py times them; docs/softpick/KERNELS.md, section 5, has the figures.
SHORTEST: dict[tuple[str, str], dict[int, int]] = {
    ("dense", "fwd"): {48: 1024, 64: 1024, 80: 1024, 96: 1024, 112: 1024, 128: 1024},
    ("dense", "bwd"): {48: 1024, 64: 1024, 80: 1024, 96: 1024, 112: 1024, 128: 1024},
    ("window", "fwd"): {64: 1024, 128: 1024},
    ("window", "bwd"): {64: 1024, 128: 1024},
    ("packed", "fwd"): {64: 512, 128: 512},
    ("packed", "bwd"): {64: 1024, 128: 512},
}
# Least B * HQ * T * K times the keys that a query sees: S / 2, window_size, or the mean length. The host may need longer
# to launch smaller calls than the GPU to compute them.
MIN_HOPPER_WORK = 2**33
# The most rows of a head, queries in forward and keys in backward, that a program computes at a time. Calls with fewer
# programs than the card has multiprocessors were not timed.
PROGRAM_ROWS = 192
# "faster": where they were measured and were faster; "all": all that they take; "none". See `hopper_serving`.
_serving = "faster"


@contextmanager
def hopper_serving(what: str) -> Iterator[None]:
    """Within it Hopper's kernels serve "all" inputs that they take, or "none"; outside those where they are "faster"."""
    global _serving
    if what not in ("faster", "all", "none"):
        raise ValueError(f'what must be "faster", "all" or "none", got {what!r}')
    before, _serving = _serving, what
    try:
        yield
    finally:
        _serving = before


@cache
def hopper_refusal_of_kind(kernel: str, row: str, dtype: torch.dtype, K: int, V: int) -> str | None:
    """What a Hopper kernel would need, or None if it takes this.

    Args:
        kernel: "fwd", or for the backward kernel "dq" or "dkv".
        row: Architecture, a key of `launch_shapes.TABLE`.
        dtype: Of queries, keys and values.
        K: Head dimension of queries and keys.
        V: Head dimension of values.
    """
    if row != "sm_90":
        return f"a GPU of architecture sm_90, got {row}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16, got {dtype}"
    if any(D % 16 or not 0 < D <= MAX_HOPPER_HEAD_DIM for D in (K, V)):
        return (
            f"K and V that are multiples of 16 up to {MAX_HOPPER_HEAD_DIM}, got K = {K} and V = {V}"
        )
    if kernel == "fwd" and K != V:
        return f"K = V, got K = {K} and V = {V}"
    return None


def hopper_refusal(
    kernel: str, window_size: int | None, head_first: bool, **tensors: torch.Tensor
) -> str | None:
    """What a Hopper kernel would need, or None if it takes these tensors: q, k, v, and in backward do."""
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    time = 2 if head_first else 1
    if window_size == 0:
        return "a window of at least one key, got 0"
    if k.shape[time] < q.shape[time]:
        return f"at least as many keys as queries, got {k.shape[time]} and {q.shape[time]}"
    row = architecture(q.device.index)
    if reason := hopper_refusal_of_kind(kernel, row, q.dtype, q.shape[-1], v.shape[-1]):
        return reason
    for name, x in tensors.items():
        if x.numel() == 0:
            return f"{name} with at least one element"
        b, t, h = descriptor_strides(x, head_first)
        if x.data_ptr() % 16 or (b | t | h) % 8 or min(b, t, h) <= 0:
            return (
                f"{name} with rows that start at multiples of 16 bytes, got strides {x.stride()} "
                f"and address {x.data_ptr():#x}"
            )
        if x.stride(-1) != 1:
            return f"{name} with a contiguous last dimension, got strides {x.stride()}"
    return None


def shortest_on_hopper(kernel: str, kind: str, dtype: torch.dtype, K: int, V: int) -> int | None:
    """The least length in `SHORTEST`, or None where Triton's kernel serves all lengths.

    Args:
        kernel: As in `serving_kernel`.
        kind: "dense", "window" or "packed".
        dtype: Of queries, keys and values.
        K: Head dimension of queries and keys.
        V: Head dimension of values.
    """
    if kernel not in HOPPER_KERNELS or dtype == torch.float32 or K != V:
        return None
    return SHORTEST[kind, "fwd" if kernel == "fwd" else "bwd"].get(K)


def _is_faster_on_hopper(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    window_size: int | None,
    head_first: bool,
) -> bool:
    """True for large inputs of a kind at which Hopper's kernel was faster."""
    time = 2 if head_first else 1
    S = k.shape[time]
    if q.shape[time] != S or (cu_seqlens is not None and window_size is not None):
        return False
    if cu_seqlens is not None:
        kind, length = "packed", S // max(len(cu_seqlens) - 1, 1)
    elif window_size is not None:
        kind, length = "window", min(window_size, S)
    else:
        kind, length = "dense", S
    shortest = shortest_on_hopper(kernel, kind, q.dtype, q.shape[-1], v.shape[-1])
    seen = S // 2 if kind == "dense" else length
    if shortest is None or length < shortest:
        return False
    if q.numel() * seen < MIN_HOPPER_WORK:
        return False
    x = q if kernel == "fwd" else k
    num_programs = x.numel() // x.shape[-1] // PROGRAM_ROWS
    return num_programs >= num_processors(q.device.index)


def _is_for_hopper(
    kernel: str,
    cu_seqlens: torch.Tensor | None,
    window_size: int | None,
    head_first: bool,
    **tensors: torch.Tensor,
) -> bool:
    """True if Hopper's kernel serves these tensors."""
    if _serving == "none":
        return False
    if _serving == "faster":
        q, k, v = (tensors[name] for name in ("q", "k", "v"))
        if not _is_faster_on_hopper(kernel, q, k, v, cu_seqlens, window_size, head_first):
            return False
    return not hopper_refusal(kernel, window_size, head_first, **tensors)


def normalized_attn_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    window_size: int | None,
    head_first: bool,
    safe: bool,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`parallel_normalized_attn_fwd`, with the kernel that serves the inputs."""
    launch = parallel_normalized_attn_fwd
    if _is_for_hopper("fwd", cu_seqlens, window_size, head_first, q=q, k=k, v=v):
        # here, since nobody without the card needs Gluon
        from fla.ops.attn.softpick.hopper.forward import hopper_normalized_attn_fwd as launch
    return launch(q, k, v, sink_bias, cu_seqlens, scale, window_size, head_first, safe, normalizer)


def normalized_attn_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    scale: float,
    window_size: int | None,
    head_first: bool,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`parallel_normalized_attn_bwd`, with the kernels that serve the inputs."""
    launch = parallel_normalized_attn_bwd
    if _is_for_hopper("dkv", cu_seqlens, window_size, head_first, q=q, k=k, v=v, do=do):
        from fla.ops.attn.softpick.hopper.backward import hopper_normalized_attn_bwd as launch
    return launch(
        q, k, v, sink_bias, cu_seqlens, o, lse, do, dlse, scale, window_size, head_first, normalizer
    )


def serving_kernel(row: str, kernel: str, dtype: torch.dtype, K: int, V: int) -> str:
    """Whose kernel computes large dense inputs of this kind: "Gluon", or "Triton".

    Args:
        row: Architecture, a key of `launch_shapes.TABLE`.
        kernel: "fwd", "delta", "dq", "dkv", "decode" or "chunk".
        dtype: Of queries, keys and values.
        K: Head dimension of queries and keys.
        V: Head dimension of values.
    """
    if row == "sm_90" and shortest_on_hopper(kernel, "dense", dtype, K, V) is not None:
        return "Gluon"
    return "Triton"
