"""Dense PyTorch references for softpick attention and its relatives.

These functions define what the Triton kernels must compute, and serve tests and small models. Every score is
materialised, so memory grows with T * S. They run on any device, in any float dtype, without Triton.

Shape letters: ``B`` batch, ``T`` queries, ``S`` keys, ``HQ`` query heads, ``H`` key heads, ``K`` and
``V`` the dimensions of a key and of a value.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fla.ops.attn.softpick.checks import (
    autocast_inputs,
    check_bounds,
    check_inputs,
    without_autocast,
)
from fla.ops.attn.softpick.named_operators import bind_normalizer

# Added to the unshifted denominator, in reference and kernels alike: it is part of the function.
EPS = 1e-6
INF = float("inf")


class Terms(NamedTuple):
    """n(s), d(s) and the constant c, all times e^-m, and the shift m of each row."""

    n: torch.Tensor
    d: torch.Tensor
    c: torch.Tensor | float
    m: torch.Tensor


def _exponentials(
    x: torch.Tensor,
    dim: int,
    visible: torch.Tensor | None,
    safe: bool,
    masked: float,
    floor: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x`` filled with ``masked`` where a key is not visible, ``e^(x - m)``, and m = max(floor, row maximum)."""
    if visible is not None:
        x = x.masked_fill(~visible, masked)
    shape = list(x.shape)
    shape[dim] = 1
    m = x.new_zeros(shape)
    if safe:
        # a row without keys has no maximum
        top = x.detach().amax(dim, keepdim=True) if x.shape[dim] else m - INF
        # numerator and denominator carry the same factor e^-m: the shift is exact and has no gradient
        m = torch.maximum(top, m + floor)
        # a row without a visible key has no maximum
        m = m.masked_fill(m == -INF, 0.0)
    return x, torch.exp(x - m), m


def _shifted_expm1(
    x: torch.Tensor,
    dim: int,
    visible: torch.Tensor | None,
    safe: bool,
    sink_bias: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(e^x - 1) e^-m``, 0 where not visible, and m."""
    x, e, m = _exponentials(x, dim, visible, safe, masked=0.0, floor=_at_least_0(sink_bias))
    # NOTE(numerics): x = 0 gives 0 and no gradient to the bit; the two exponentials alone may differ by
    # one rounding, since CPU code computes the ends of a row by another routine than its middle
    return torch.where(x != 0, e - torch.exp(-m), 0.0), m


def _at_least_0(sink_bias: torch.Tensor | float) -> torch.Tensor | float:
    return sink_bias.clamp(min=0.0) if isinstance(sink_bias, torch.Tensor) else max(sink_bias, 0.0)


def _softpick(x, dim, visible, safe, sink_bias):
    y, m = _shifted_expm1(x, dim, visible, safe, sink_bias)
    return Terms(y.relu(), y.abs(), EPS * torch.exp(-m), m)


def _relu_softpick(x, dim, visible, safe, sink_bias):
    y, m = _shifted_expm1(x, dim, visible, safe, sink_bias)
    return Terms(y.relu(), y.relu(), EPS * torch.exp(-m), m)


def _abs_softpick(x, dim, visible, safe, sink_bias):
    y, m = _shifted_expm1(x, dim, visible, safe, sink_bias)
    return Terms(y.abs(), y.abs(), EPS * torch.exp(-m), m)


def _softmax(x, dim, visible, safe, sink_bias):
    _, e, m = _exponentials(x, dim, visible, safe, masked=-INF, floor=sink_bias)
    return Terms(e, e, 0.0, m)


def _softmax_plus_one(x, dim, visible, safe, sink_bias):
    _, e, m = _exponentials(x, dim, visible, safe, masked=-INF, floor=_at_least_0(sink_bias))
    return Terms(e, e, torch.exp(-m), m)


def _rectified(x, dim, visible, safe, sink_bias):
    x, e, m = _exponentials(x, dim, visible, safe, masked=-INF, floor=_at_least_0(sink_bias))
    # written so that NaN passes
    e = torch.where(x < 0, 0.0, e)
    return Terms(e, e, 0.0, m)


NORMALIZERS: dict[str, Callable[..., Terms]] = {
    "softpick": _softpick,
    "relu_softpick": _relu_softpick,
    "abs_softpick": _abs_softpick,
    "softmax": _softmax,
    "softmax_plus_one": _softmax_plus_one,
    "rectified": _rectified,
}
"""Name -> ``f(x, dim, visible, safe, sink_bias)``: the terms of the sums over ``dim`` of the scores ``x``.
``visible`` (bool, broadcastable to ``x``, or None) marks the keys that count; ``sink_bias`` is a score that the
shift m must cover too, or -inf."""


def normalized_weights(
    scores: torch.Tensor,
    dim: int = -1,
    *,
    normalizer: str,
    visible: torch.Tensor | None = None,
    safe: bool = True,
    sink_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``n(s) / Z`` and ``log Z``, with ``Z = c + e^sink_bias + sum d(s)`` over the visible keys along ``dim``.

    Args:
        scores: Scores of any shape, float32 or float64.
        dim: Dimension of the keys.
        normalizer: A key of `NORMALIZERS`.
        visible: Bool, broadcastable to ``scores``, True where a key counts. Default: everywhere.
        safe: Shift the scores before ``exp``, see `naive_normalized_attn`.
        sink_bias: Dtype of ``scores``, broadcastable to them, of size 1 along ``dim``. Default: no sink.

    Returns:
        Weights like ``scores``, and ``log Z`` of size 1 along ``dim``. Where ``Z`` is 0 they are 0 and -inf.
    """
    floor = -INF if sink_bias is None else sink_bias.detach()
    n, d, c, m = NORMALIZERS[normalizer](scores, dim, visible, safe, floor)
    z = d.sum(dim, keepdim=True) + c
    if sink_bias is not None:
        z = z + torch.exp(sink_bias - m)
    # n <= d, so where the denominator is 0 the numerators are too
    is_empty = z == 0
    z = z.masked_fill(is_empty, 1.0)
    return n / z, (m + z.log()).masked_fill(is_empty, -INF)


def softpick(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    r"""``relu(e^x - 1) / (1e-6 + sum |e^x - 1|)`` along ``dim``.

    Args:
        x: Scores of any shape and float dtype; float16 and bfloat16 are computed in float32.
        dim: Dimension that the sum runs over.

    Returns:
        Weights like ``x``: non-negative, summing to at most one, exactly zero where ``x <= 0``.

    Raises:
        ValueError: ``x`` is not a floating point tensor.

    Source:
        Zuhri, Fuadi and Aji, "Softpick", arXiv:2504.20966.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating point tensor, got {x.dtype}")
    weights, _ = normalized_weights(_at_least_float32(x), dim, normalizer="softpick")
    return weights.to(x.dtype)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def visible_keys(
    T: int,
    S: int,
    device: torch.device,
    cu_seqlens: torch.Tensor | None = None,
    window_size: int | None = None,
) -> torch.Tensor:
    """Mask ``[T, S]``, bool, True where a query sees a key. Queries are the last ``T`` of ``S`` positions."""
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)[None, :]
    visible = j <= i
    if window_size is not None:
        visible &= j > i - window_size
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens.to(device), j[0], right=True)
        visible &= sequence[:, None] == sequence[None, :]
    return visible


def naive_normalized_attn(
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
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    r"""Causal attention with one of the `NORMALIZERS`, by materialising the scores.

    With ``s_ij = scale * <q_i, k_j>`` and sums over the keys ``j`` that query ``i`` sees::

        o_i = sum_j n(s_ij) v_j / (c + e^sink_bias + sum_j d(s_ij))

    ============================  ======================  ======================  =====
    normalizer                    n(s)                    d(s)                    c
    ============================  ======================  ======================  =====
    ``softpick``                  ``relu(e^s - 1)``       ``abs(e^s - 1)``        1e-6
    ``relu_softpick``             ``relu(e^s - 1)``       ``relu(e^s - 1)``       1e-6
    ``abs_softpick``              ``abs(e^s - 1)``        ``abs(e^s - 1)``        1e-6
    ``softmax``                   ``e^s``                 ``e^s``                 0
    ``softmax_plus_one``          ``e^s``                 ``e^s``                 1
    ``rectified``                 ``e^s`` where s >= 0    ``e^s`` where s >= 0    0
    ============================  ======================  ======================  =====

    Args:
        q: Queries ``[B, T, HQ, K]``, any float dtype.
        k: Keys ``[B, S, H, K]``, dtype and device of ``q``. The queries are the last ``T`` positions; where
            ``S < T`` the first ``T - S`` of them see no key and give 0. ``HQ`` is a multiple of ``H``; query
            head ``h`` reads key head ``h // (HQ // H)``.
        v: Values ``[B, S, H, V]``, dtype and device of ``q``.
        scale: Factor on ``q @ k.T``. Default: ``K ** -0.5``.
        cu_seqlens: Boundaries ``[N + 1]`` of ``N`` packed sequences, int32 or int64, from 0 to ``T``,
            non-decreasing. Requires ``B == 1`` and ``S == T``; tokens see only their own sequence.
        head_first: Inputs and output are ``[B, H, T, D]`` instead.
        normalizer: A key of `NORMALIZERS`.
        safe: Shift scores by ``max(0, row maximum)`` (softmax: by the row maximum) before ``exp``: exact
            for every finite input. ``False`` does not shift: for scores known to stay below 80.
        window_size: A query sees itself and the ``window_size - 1`` keys before it, with 0 no key. Default: all.
        sink_bias: A score of each query head ``[HQ]`` that takes weight and has no value, any float dtype; it
            gets a gradient. Default: none.
        return_lse: Also return the natural logarithm of the denominator.
        return_weights: Also return the weights.

    Returns:
        Outputs ``[B, T, HQ, V]`` in the dtype of ``q``; with ``return_lse`` then the log of the
        denominator ``[B, HQ, T]``, float32 (float64 for float64); with ``return_weights`` then the weights
        ``[B, HQ, T, S]``. A row without a key or with a denominator of 0 gives 0; the log of 0 is -inf.
        ``B``, ``T`` and ``S`` may be 0.

    Raises:
        ValueError: A shape, dtype, device, ``cu_seqlens`` or name breaks a condition above; the message
            names the argument and shows the value received.

    Numerics:
        float16 and bfloat16: scores and weights are computed in float32, weights are rounded to the
        input dtype before they meet ``v``, as in the kernels. The gradient at ``s_ij = 0`` is 0 for
        the three softpicks.

    Source:
        arXiv:2504.20966; the relatives are those of its authors' ablations.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_inputs(q, k, v, cu_seqlens, head_first, window_size, sink_bias, normalizer, NORMALIZERS)
    if cu_seqlens is not None:
        check_bounds(cu_seqlens.tolist(), q.shape[2 if head_first else 1])
    if not head_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    T, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if G > 1:
        k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    visible = visible_keys(T, S, q.device, cu_seqlens, window_size)
    # NOTE(numerics): inputs have autocast's dtype already; the scores must not be cast again
    with without_autocast(q.device):
        scores_BHTS = _at_least_float32(q) @ _at_least_float32(k).transpose(-1, -2) * factor
        if sink_bias is not None:
            sink_bias = sink_bias.to(scores_BHTS.dtype)[:, None, None]
        weights_BHTS, lse_BHT1 = normalized_weights(
            scores_BHTS, normalizer=normalizer, visible=visible, safe=safe, sink_bias=sink_bias
        )
        weights_BHTS = weights_BHTS.to(v.dtype)
        o = weights_BHTS @ v
    if not head_first:
        o = o.transpose(1, 2)
    extra = (lse_BHT1[..., 0],) * return_lse + (weights_BHTS,) * return_weights
    return (o, *extra) if extra else o


naive_softpick_attn = bind_normalizer(naive_normalized_attn, "softpick")
naive_relu_softpick_attn = bind_normalizer(naive_normalized_attn, "relu_softpick")
naive_abs_softpick_attn = bind_normalizer(naive_normalized_attn, "abs_softpick")
naive_softmax_attn = bind_normalizer(naive_normalized_attn, "softmax")
naive_softmax_plus_one_attn = bind_normalizer(naive_normalized_attn, "softmax_plus_one")
naive_rectified_attn = bind_normalizer(naive_normalized_attn, "rectified")
