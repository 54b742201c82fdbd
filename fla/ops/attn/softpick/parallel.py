"""Public Triton operators: argument checks, custom-op and autograd registration.

`kernel_choice.py` launches the kernels. These are in `parallel_fwd.py` and `parallel_bwd_*.py`, the normalisers in
`normalizers.py`, the definition in `naive.py`, the derivation and the numerics contract in README.md.
"""

import math
from collections.abc import Callable

import torch
from triton import knobs

from fla.ops.attn.softpick.checks import autocast_inputs, check_inputs
from fla.ops.attn.softpick.kernel_choice import normalized_attn_bwd, normalized_attn_fwd
from fla.ops.attn.softpick.named_operators import bind_normalizer
from fla.ops.attn.softpick.normalizers import KERNEL_NORMALIZERS
from fla.ops.attn.softpick.tiles import empty_rows

MAX_HEAD_DIM = 256
# Offsets within a tile of at most 128 rows are 32-bit.
MAX_TIME_STRIDE = 2**31 // 128
# Triton decides this when it defines the kernels, at import.
IS_INTERPRETED = bool(knobs.runtime.interpret)


# `torch.library.custom_op` would add checks to every call that take the host longer than the launch
_LIBRARY = torch.library.Library("softpick", "DEF")


def _define(launcher: Callable, autograd: Callable, fake: Callable, name: str) -> Callable:
    """Registers ``softpick::name`` with its kernels, gradient and fake implementation; returns the operator."""
    schema = torch.library.infer_schema(launcher, mutates_args=())
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, launcher, key)
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"softpick::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"softpick::{name}", _refuse_vmap, lib=_LIBRARY)
    return getattr(torch.ops.softpick, name).default


class _Attention(torch.autograd.Function):
    """Autograd of `_fwd`: the backward kernels, and the gradient of the sink from their row statistics."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = _fwd(*inputs)
        (
            q,
            k,
            v,
            sink_bias,
            cu_seqlens,
            ctx.scale,
            ctx.window_size,
            ctx.head_first,
            _,
            ctx.normalizer,
        ) = inputs
        ctx.save_for_backward(q, k, v, sink_bias, cu_seqlens, *output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, do, dlse):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares *grads; forward has two outputs
        q, k, v, sink_bias, cu_seqlens, o, lse = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        do = _last_contiguous(do)
        if do.stride(2 if ctx.head_first else 1) > MAX_TIME_STRIDE:
            do = do.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv, row_stats = _bwd(
            q, k, v, sink_bias, cu_seqlens, o, lse, do, dlse,
            ctx.scale, ctx.window_size, ctx.head_first, ctx.normalizer,
        )  # fmt: skip
        dsink = None
        if sink_bias is not None:
            # exp(sink) / Z; 0 for a row whose denominator is 0
            weight = torch.exp2(sink_bias[:, None] / math.log(2) + row_stats[..., 0])
            dsink = -(row_stats[..., 1] * weight).sum((0, 2))
        return dq, dk, dv, dsink, None, None, None, None, None, None


class _AttentionBackward(torch.autograd.Function):
    """Refuses the gradient of `_bwd`."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return _bwd(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "softpick attention has no second derivative in Triton; use naive_normalized_attn"
        )


def _fwd_fake(q, k, v, sink_bias, cu_seqlens, scale, window_size, head_first, safe, normalizer):
    B, T, HQ = (q.shape[i] for i in ((0, 2, 1) if head_first else (0, 1, 2)))
    o = empty_rows(q, T, HQ, v.shape[-1], head_first)
    return o, q.new_empty((B, HQ, T), dtype=torch.float32)


def _bwd_fake(
    q, k, v, sink_bias, cu_seqlens, o, lse, do, dlse, scale, window_size, head_first, normalizer
):
    return *(torch.empty_like(x) for x in (q, k, v)), lse.new_empty((*lse.shape, 2))


def _refuse_vmap(info, in_dims, *args):
    raise NotImplementedError(
        "softpick attention has no torch.vmap rule in Triton; make the mapped dimension part of the batch"
    )


_fwd = _define(normalized_attn_fwd, _Attention.apply, _fwd_fake, name="normalized_attn_fwd")
_bwd = _define(normalized_attn_bwd, _AttentionBackward.apply, _bwd_fake, name="normalized_attn_bwd")


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def check_kernel_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_first: bool):
    """Raises ValueError unless the kernels take the dtype, device, head dimensions and strides; `check_inputs` comes first."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float32, float16 or bfloat16, got {q.dtype}")
    if q.device.type == "cpu" and not IS_INTERPRETED:
        raise ValueError(
            "q must be on a GPU for the Triton operator, got cpu; on a CPU call the reference of the "
            "same name, naive_..._attn, or set TRITON_INTERPRET=1 before Triton is imported to debug"
        )
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"q must be on a CUDA or ROCm GPU, got {q.device}")
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"the last dimension of {name} must be at most {MAX_HEAD_DIM}, got {x.shape[-1]}"
            )
    time = 2 if head_first else 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(time) > MAX_TIME_STRIDE:
            raise ValueError(
                f"{name} must have at most {MAX_TIME_STRIDE} elements between two time steps, "
                f"got {x.stride(time)}; call .contiguous() on it"
            )


def parallel_normalized_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    *,
    normalizer: str = "softpick",
    safe: bool = True,
    window_size: int | None = None,
    sink_bias: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Causal attention with any normaliser of the family, without materialising the scores.

    Computes what `naive_normalized_attn` defines; its docstring has the table of normalisers. Numerics are those of
    `parallel_softpick_attn`.

    Args:
        q: Queries ``[B, T, HQ, K]``: float32, float16 or bfloat16, ``K <= 256``.
        k: Keys ``[B, S, H, K]``, dtype and device of ``q``; the queries are the last ``T`` positions. ``HQ`` is a
            multiple of ``H``.
        v: Values ``[B, S, H, V]``, dtype and device of ``q``, ``V <= 256``.
        scale: Factor on ``q @ k.T``. Default: ``K ** -0.5``.
        cu_seqlens: Boundaries ``[N + 1]`` of packed sequences, int32 or int64, from 0 to ``T``; requires ``B == 1``
            and ``S == T``.
        head_first: Inputs and output are ``[B, H, T, D]`` instead.
        normalizer: A key of `naive.NORMALIZERS`.
        safe: Exact for every finite input. ``False`` skips the shift of the scores (README.md, section 5).
        window_size: A query sees itself and the ``window_size - 1`` keys before it, with 0 no key. Default: all.
        sink_bias: A score of each query head ``[HQ]`` that takes weight and has no value. Default: none.
        return_lse: Also return the log of the denominator.

    Returns:
        Outputs ``[B, T, HQ, V]`` (``head_first``: ``[B, HQ, T, V]``) in the dtype of ``q``; with ``return_lse`` also
        the natural logarithm of the denominator ``[B, HQ, T]``, float32, -inf where it is 0. Both are differentiable
        in ``q``, ``k``, ``v`` and ``sink_bias``, once.

    Raises:
        ValueError: An argument breaks a condition above, or is on a CPU or an unknown GPU; the message names it and
            shows the value received.
        NotImplementedError: A second derivative, or `torch.vmap`, is asked for.

    Source:
        arXiv:2504.20966; the other normalisers are those of its authors' ablations.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_inputs(
        q, k, v, cu_seqlens, head_first, window_size, sink_bias, normalizer, KERNEL_NORMALIZERS
    )
    check_kernel_inputs(q, k, v, head_first)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    if sink_bias is not None:
        sink_bias = sink_bias.float().contiguous()
    o, lse = _fwd(q, k, v, sink_bias, cu_seqlens, scale, window_size, head_first, safe, normalizer)
    return (o, lse * math.log(2)) if return_lse else o


def parallel_softpick_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    *,
    safe: bool = True,
    window_size: int | None = None,
    sink_bias: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Causal softpick attention without materialising the score matrix.

    With ``s_ij = scale * <q_i, k_j>`` and sums over the visible keys ``j <= i``::

        o_i = sum_j relu(exp(s_ij) - 1) v_j / (eps + sum_j |exp(s_ij) - 1|),  eps = 1e-6

    A key with ``s_ij <= 0`` gets weight exactly zero, and if ``s_ij < 0`` it enlarges the denominator,
    so a row's weights sum to at most one, and a row without a positive score returns zeros.

    Args:
        q: Queries ``[B, T, HQ, K]``: float32, float16 or bfloat16, ``K <= 256``. Any strides; a copy is
            made only if the last dimension is not contiguous.
        k: Keys ``[B, S, H, K]``, dtype and device of ``q``. The queries are the last ``T`` positions; where
            ``S < T`` the first ``T - S`` of them see no key and give 0. ``HQ`` is a multiple of ``H``; query
            head ``h`` reads key head ``h // (HQ // H)``.
        v: Values ``[B, S, H, V]``, dtype and device of ``q``. ``V <= 256`` may differ from ``K``.
        scale: Factor on ``q @ k.T``. Default: ``K ** -0.5``.
        cu_seqlens: Boundaries ``[N + 1]`` of ``N`` packed sequences, int32 or int64, from 0 to ``T``,
            non-decreasing. Requires ``B == 1`` and ``S == T``; tokens see only their own sequence. Read
            back from the GPU once for each new tensor, not at every call.
        head_first: Inputs and output are ``[B, H, T, D]`` instead.
        safe: Exact for every finite input. ``False`` skips the shift of the scores: for scores known to
            stay below 80 (float16: below 11, since weights are rounded to the input dtype).
        window_size: A query sees itself and the ``window_size - 1`` keys before it, with 0 no key. Default: all.
        sink_bias: A score of each query head ``[HQ]`` that takes weight and has no value, any float dtype: adds
            ``e^sink_bias`` to the denominator of every row, and gets a gradient. Default: none.
        return_lse: Also return the log of the denominator.

    Returns:
        Outputs ``[B, T, HQ, V]`` in the dtype of ``q``; with ``return_lse`` also the natural logarithm
        ``[B, HQ, T]``, float32, of the denominator. Both are differentiable in ``q``, ``k``, ``v`` and
        ``sink_bias``, once.

    Raises:
        ValueError: A shape, dtype, device or ``cu_seqlens`` breaks a condition above; the message names
            the argument and shows the value received. A CPU tensor is refused: call
            `naive_softpick_attn`. So is a GPU that `launch_shapes` does not know.
        NotImplementedError: A second derivative, or `torch.vmap`, is asked for.

    Numerics:
        Scores, running maximum, denominator and accumulators are float32; weights round to the input
        dtype before they multiply ``v``. Float32 products follow
        ``torch.set_float32_matmul_precision``. The running maximum starts at 0, so rows of negative
        scores stay finite. ``eps`` is added to the unshifted denominator. The gradient at ``s_ij = 0``
        is 0.

    Source:
        Zuhri, Fuadi and Aji, "Softpick", arXiv:2504.20966. Derivation: README.md in this folder.
    """
    return parallel_normalized_attn(
        q,
        k,
        v,
        scale,
        cu_seqlens,
        head_first,
        normalizer="softpick",
        safe=safe,
        window_size=window_size,
        sink_bias=sink_bias,
        return_lse=return_lse,
    )


parallel_relu_softpick_attn = bind_normalizer(parallel_normalized_attn, "relu_softpick")
parallel_abs_softpick_attn = bind_normalizer(parallel_normalized_attn, "abs_softpick")
parallel_softmax_attn = bind_normalizer(parallel_normalized_attn, "softmax")
parallel_softmax_plus_one_attn = bind_normalizer(parallel_normalized_attn, "softmax_plus_one")
parallel_rectified_attn = bind_normalizer(parallel_normalized_attn, "rectified")
