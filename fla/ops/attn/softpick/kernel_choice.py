"""Which kernels serve which inputs on which card: those of Triton, or those for Hopper in Gluon.

Decided before the launch, by card, kind and size of the input. The whole answer, without a GPU:
``python -m fla.ops.attn.softpick.kernel_table``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fla.ops.attn.softpick.launch_shapes import architecture
from fla.ops.attn.softpick.parallel_bwd import parallel_normalized_attn_bwd
from fla.ops.attn.softpick.parallel_fwd import parallel_normalized_attn_fwd
from fla.ops.attn.softpick.tiles import descriptor_strides

# The kernels that exist for Hopper, and those of them that operators may choose; dq and dkv are one.
WRITTEN_FOR_HOPPER = frozenset({"fwd", "dq", "dkv"})
ENABLED_ON_HOPPER: frozenset[str] = WRITTEN_FOR_HOPPER
MAX_HOPPER_HEAD_DIM = 128
# Least B * HQ * T * S * K of a call for Hopper's kernels. Below it a call takes the GPU less than a millisecond, and the
# host takes longer to launch them than the Triton kernels: it makes up to 8 tensor descriptors.
MIN_HOPPER_WORK: float = 2**36


@contextmanager
def hopper_for_work_of(least: float) -> Iterator[None]:
    """Within it Hopper's kernels serve calls of this work and more: 0 for all that they take, inf for none."""
    global MIN_HOPPER_WORK
    before, MIN_HOPPER_WORK = MIN_HOPPER_WORK, least
    try:
        yield
    finally:
        MIN_HOPPER_WORK = before


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
        if x.data_ptr() % 16 or any(s <= 0 or s % 8 for s in descriptor_strides(x, head_first)):
            return f"{name} with rows that start at multiples of 16 bytes, got strides {x.stride()}"
        if x.stride(-1) != 1:
            return f"{name} with a contiguous last dimension, got strides {x.stride()}"
    return None


def _is_for_hopper(
    kernel: str, window_size: int | None, head_first: bool, **tensors: torch.Tensor
) -> bool:
    """True if the Hopper kernel is enabled, takes these tensors and is worth its launch."""
    if kernel not in ENABLED_ON_HOPPER:
        return False
    q, k = tensors["q"], tensors["k"]
    work = q.numel() * k.shape[2 if head_first else 1]
    return work >= MIN_HOPPER_WORK and not hopper_refusal(
        kernel, window_size, head_first, **tensors
    )


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
    if _is_for_hopper("fwd", window_size, head_first, q=q, k=k, v=v):
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
    if _is_for_hopper("dkv", window_size, head_first, q=q, k=k, v=v, do=do):
        from fla.ops.attn.softpick.hopper.backward import hopper_normalized_attn_bwd as launch
    return launch(
        q, k, v, sink_bias, cu_seqlens, o, lse, do, dlse, scale, window_size, head_first, normalizer
    )


def serving_kernel(row: str, kernel: str, dtype: torch.dtype, K: int, V: int) -> str:
    """Whose kernel computes inputs of this kind: "Gluon", or "Triton".

    Args:
        row: Architecture, a key of `launch_shapes.TABLE`.
        kernel: "fwd", "delta", "dq", "dkv", "decode" or "chunk".
        dtype: Of queries, keys and values.
        K: Head dimension of queries and keys.
        V: Head dimension of values.
    """
    if kernel in ENABLED_ON_HOPPER and not hopper_refusal_of_kind(kernel, row, dtype, K, V):
        return "Gluon"
    return "Triton"
