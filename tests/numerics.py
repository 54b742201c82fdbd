"""How tests measure attention: against float64, and against the error that eager PyTorch makes itself.

Inputs are drawn once, in the dtype under test. ``gold`` is the reference on those very numbers in float64,
``eager`` the reference in the dtype under test; what is tested may err at most twice as much as ``eager``,
plus one rounding of the terms that an output is the sum of.
"""

import itertools
from collections.abc import Callable, Collection, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from fla.ops.attn.softpick import NORMALIZERS, naive_normalized_attn

HAS_GPU = torch.cuda.is_available()
_SLOW = () if HAS_GPU else (pytest.mark.slow,)

each_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)


def with_slow(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`: without a GPU all but the ``quick`` ones are slow."""
    return [pytest.param(case, marks=() if case in quick else _SLOW) for case in cases]


def quick_normalizers(*quick: str) -> pytest.MarkDecorator:
    """Parametrises ``normalizer``: all of them, without a GPU all but the ``quick`` ones slow."""
    return pytest.mark.parametrize("normalizer", with_slow(NORMALIZERS, quick))


def each_case(
    argument: str,
    cases: Iterable[Any],
    softpick: Collection[Any],
    softmax: Collection[Any] = (),
    others: Collection[Any] = (),
) -> pytest.MarkDecorator:
    """Parametrises ``normalizer`` and ``argument`` by every pair, of which the default run takes a few.

    Without a GPU all are slow but the cases given for softpick, for softmax and for each of the other normalisers.
    """
    quick = {"softpick": softpick, "softmax": softmax}
    return pytest.mark.parametrize(
        ("normalizer", argument),
        [
            pytest.param(
                name,
                case,
                marks=() if case in quick.get(name, others) else _SLOW,
                id=f"{name}-{getattr(case, '__name__', case)}",
            )
            for name in NORMALIZERS
            for case in cases
        ],
    )


class Inputs(NamedTuple):
    """What one call of attention takes, and the gradient that its output gets."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor

    def to(self, *args) -> "Inputs":
        return Inputs(*(x.to(*args) for x in self))


def draw(
    T: int,
    K: int = 16,
    *,
    B: int = 1,
    HQ: int = 1,
    H: int | None = None,
    S: int | None = None,
    V: int | None = None,
    head_first: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Standard normal numbers, the same on every device."""
    H, S, V = H or HQ, S or T, V or K
    generator = torch.Generator().manual_seed(T + 1000 * S)
    shapes = (B, T, HQ, K), (B, S, H, K), (B, S, H, V), (B, T, HQ, V)
    inputs = Inputs(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))
    if head_first:
        inputs = Inputs(*(x.transpose(1, 2).contiguous() for x in inputs))
    return inputs.to(device)


def outputs_and_gradients(
    attn: Callable[..., torch.Tensor],
    inputs: Inputs,
    *,
    sink_bias: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    **kwargs,
) -> dict[str, torch.Tensor]:
    """``o``, ``dq``, ``dk`` and ``dv``, with a sink ``dsink_bias``; strides of the inputs are kept.

    With the gradient ``dlse`` of the log of the denominator also that, ``lse``.
    """
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    leaves = {"q": q, "k": k, "v": v}
    if sink_bias is not None:
        leaves["sink_bias"] = kwargs["sink_bias"] = sink_bias.detach().requires_grad_()
    outputs, gradients = {}, (inputs.do,)
    if dlse is None:
        outputs["o"] = attn(q, k, v, **kwargs)
    else:
        outputs["o"], outputs["lse"] = attn(q, k, v, **kwargs, return_lse=True)
        gradients = inputs.do, dlse
    grads = torch.autograd.grad(tuple(outputs.values()), tuple(leaves.values()), gradients)
    return {name: x.detach() for name, x in outputs.items()} | {
        "d" + name: x for name, x in zip(leaves, grads, strict=True)
    }


class Formula(NamedTuple):
    """A normaliser without a shift: n(s) = n' (e^s - base), d(s) = d' (e^s - base), c.

    n' and d' are the factors before e^s in the derivatives of n and d.
    """

    n: Callable[[torch.Tensor], torch.Tensor]
    d: Callable[[torch.Tensor], torch.Tensor]
    base: float
    c: float


def _positive(s):
    return (s > 0).to(s.dtype)


def _not_negative(s):
    return (s >= 0).to(s.dtype)


# The definitions again, written otherwise than the reference and the kernels write them.
FORMULAS = {
    "softpick": Formula(_positive, torch.sign, 1.0, 1e-6),
    "relu_softpick": Formula(_positive, _positive, 1.0, 1e-6),
    "abs_softpick": Formula(torch.sign, torch.sign, 1.0, 1e-6),
    "softmax": Formula(torch.ones_like, torch.ones_like, 0.0, 0.0),
    "softmax_plus_one": Formula(torch.ones_like, torch.ones_like, 0.0, 1.0),
    "rectified": Formula(_not_negative, _not_negative, 0.0, 0.0),
}

SOFTPICKS = tuple(name for name, f in FORMULAS.items() if f.base == 1.0)
"""Normalisers in which a key of score 0 has no weight, no denominator and no gradient."""

WITHOUT_NEGATIVE_KEYS = tuple(
    name for name, f in FORMULAS.items() if f.n(torch.tensor(-1.0)).item() == 0.0
)
"""Normalisers in which a key of negative score has no weight."""


class Formulas(NamedTuple):
    """Outputs by the formulas, and the root of the sum of squares of the terms that each adds up."""

    values: dict[str, torch.Tensor]
    sizes: dict[str, torch.Tensor]
    log_z: torch.Tensor


def by_formula(
    inputs: Inputs,
    normalizer: str,
    scale: float | None = None,
    head_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    window_size: int | None = None,
    sink_bias: torch.Tensor | None = None,
) -> Formulas:
    """Causal attention and its gradients in float64 without autograd."""
    q, k, v, do = inputs.to(torch.float64)
    if not head_first:
        q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
    B, HQ, T, K = q.shape
    H, S, V = v.shape[1:]
    scale = K**-0.5 if scale is None else scale
    # query heads of a group side by side: [B, H, G, T, D] against [B, H, 1, S, D]
    q, do = (x.reshape(B, H, HQ // H, T, -1) for x in (q, do))
    k, v = k[:, :, None], v[:, :, None]
    s = q @ k.mT * scale
    visible = torch.ones(T, S, dtype=torch.bool, device=s.device).tril(S - T)
    if window_size is not None:
        visible = visible.triu(S - T - window_size + 1)
    if cu_seqlens is not None:
        same = torch.zeros_like(visible)
        for bos, eos in itertools.pairwise(cu_seqlens.tolist()):
            same[bos:eos, bos:eos] = True
        visible &= same
    f = FORMULAS[normalizer]
    n, d = (torch.where(visible, x(s), 0.0) for x in (f.n, f.d))
    m = s.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True)
    m = m.clamp(min=0.0) if f.base or f.c else m
    if sink_bias is not None:
        sink_bias = sink_bias.double().reshape(H, HQ // H, 1, 1)
        m = torch.maximum(m, sink_bias)
    e = torch.exp((s - m).clamp(max=0.0))
    base, c = (x * torch.exp(-m) if x else torch.zeros_like(m) for x in (f.base, f.c))
    z = (d * (e - base)).sum(-1, keepdim=True) + c
    if sink_bias is not None:
        z = z + torch.exp(sink_bias - m)
    log_z = m + z.log()
    z = z.masked_fill(z == 0, float("inf"))
    p, p_size = n * (e - base) / z, n.abs() * (e + base) / z
    o = p @ v
    # what float32 rounds inside the kernels, in roundings of the inputs' dtype: exponentials (GPUs' own
    # err by 2 eps), the exponent of e^(s - log Z), and the partial sums of V products
    eps, eps_float32 = torch.finfo(inputs.q.dtype).eps, torch.finfo(torch.float32).eps
    inside = min(eps_float32 / eps, 1.0)
    exponent = s.abs() + log_z.masked_fill(log_z == float("-inf"), 0.0).abs()
    amplified, summed = 1 + inside * exponent, 1 + inside * V**0.5
    p_size = p_size * (1 + inside)
    # below the smallest normal number a rounding no longer shrinks with what is rounded
    o_square = (amplified * p_size) ** 2 @ v**2 + torch.finfo(inputs.q.dtype).smallest_normal ** 2
    dp, delta = do @ v.mT, (do * o).sum(-1, keepdim=True)
    dp_size = summed * (do**2 @ v.mT**2).sqrt()
    delta_size = summed * (do**2 * (o**2 + o_square)).sum(-1, keepdim=True).sqrt()
    plus, minus = n * e / z * scale, d * e / z * scale
    ds = plus * dp - minus * delta
    plus_size = (amplified * plus * dp_size) ** 2
    minus_size = (amplified * minus * delta_size) ** 2
    # where a softpick divides by less than 1, its terms cancel in float32, and only what is left is rounded
    is_small = (log_z < -0.01) & (f.base != 0)
    delta_small = ((amplified * p_size * dp_size) ** 2).sum(-1, keepdim=True).sqrt()
    delta_size = torch.where(is_small, inside * delta_small, delta_size)
    plus_size = torch.where(is_small, inside**2 * plus_size + ds**2, plus_size)
    minus_size = torch.where(is_small, (amplified * minus * delta_size) ** 2, minus_size)
    values = {
        "o": o.reshape(B, HQ, T, -1),
        "dq": (ds @ k).reshape(B, HQ, T, K),
        "dk": (ds.mT @ q).sum(2),
        "dv": (p.mT @ do).sum(2),
    }
    # delta is one number for all keys of a row, so its rounding adds up along a row of dq
    squares = {
        "o": o_square.reshape(B, HQ, T, -1),
        "dq": (plus_size @ k**2 + ((amplified * minus) @ k * delta_size) ** 2).reshape(B, HQ, T, K),
        "dk": ((plus_size + minus_size).mT @ q**2).sum(2),
        "dv": ((amplified * p_size).mT ** 2 @ do**2).sum(2),
    }
    if not head_first:
        values, squares = (
            {name: x.transpose(1, 2) for name, x in y.items()} for y in (values, squares)
        )
    if sink_bias is not None:
        p_sink = torch.exp(sink_bias - log_z)
        amplified_sink = 1 + inside * (sink_bias.abs() + log_z.abs())
        values["dsink_bias"] = -(p_sink * delta).sum((0, 3)).flatten()
        squares["dsink_bias"] = ((amplified_sink * p_sink * delta_size) ** 2).sum((0, 3)).flatten()
    sizes = {name: x.sqrt() for name, x in squares.items()}
    return Formulas(values, sizes, log_z.reshape(B, HQ, T))


def assert_exact(got, expected) -> None:
    """Equal but for rounding in float64: tensors, or dictionaries of them."""
    if isinstance(expected, torch.Tensor):
        got, expected = {"result": got}, {"result": expected}
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert x.dtype == torch.float64, name
        torch.testing.assert_close(
            x, expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def worst_row(err: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Largest L2 error of a row (last dimension) relative to its size, or to 1e-3 of the largest row."""
    norms = size.norm(dim=-1)
    floor = max(1e-3 * norms.max().item(), torch.finfo(size.dtype).tiny)
    return (err.norm(dim=-1) / norms.clamp(min=floor)).max()


def assert_no_worse_than_eager(
    name: str,
    got: torch.Tensor,
    eager: torch.Tensor,
    gold: torch.Tensor,
    size: torch.Tensor | None = None,
    factor: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """got may err at most `factor` times as much as eager PyTorch in the same dtype, plus one rounding.

    Default: 2; in float32 on a GPU 4, since the exp2 instruction errs by two units in the last place and
    a score in base 2 is rounded at 1.44 times its size (largest seen on an H200: 3.3).

    `size` says of what: terms that cancel leave a gradient near 0 and the rounding of what cancelled.
    Default: of the result. `dtype` says which rounding, where that is not the dtype of the result.
    """
    if factor is None:
        factor = 4.0 if got.is_cuda and got.dtype == torch.float32 else 2.0
    assert gold.dtype == torch.float64, name
    assert got.dtype == eager.dtype, name
    assert gold.isfinite().all(), name
    assert eager.isfinite().all(), name
    size = gold.abs() if size is None else torch.maximum(size, gold.abs())
    eps = torch.finfo(dtype or got.dtype).eps
    err, err_eager = (got.double() - gold).abs(), (eager.double() - gold).abs()
    torch.testing.assert_close(
        got.double(),
        gold,
        rtol=0.0,
        atol=(factor * err_eager.max() + eps * size.max()).item(),
        msg=lambda message: f"{name}, max abs: {message}",
    )
    torch.testing.assert_close(
        worst_row(err, size),
        torch.zeros_like(err[(0,) * err.dim()]),
        rtol=0.0,
        atol=(factor * worst_row(err_eager, size) + eps).item(),
        msg=lambda message: f"{name}, worst row: {message}",
    )


@contextmanager
def poisoned_memory():
    """``torch.empty`` and its relatives, in kernels' launchers too, give NaN instead of what was there."""
    # what torch.use_deterministic_algorithms sets, which also imports torch._inductor, for seconds
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


def check_attention(
    attn: Callable[..., torch.Tensor],
    inputs: Inputs,
    *,
    normalizer: str,
    safe: bool = True,
    sink_bias: torch.Tensor | None = None,
    factor: float | None = None,
    **kwargs,
) -> dict[str, torch.Tensor]:
    """Holds o, dq, dk and dv of `attn`, and dsink_bias, to the reference and returns them."""
    kwargs["normalizer"] = normalizer
    with poisoned_memory():
        got = outputs_and_gradients(attn, inputs, safe=safe, sink_bias=sink_bias, **kwargs)
    eager = outputs_and_gradients(
        naive_normalized_attn, inputs, safe=safe, sink_bias=sink_bias, **kwargs
    )
    if sink_bias is not None:
        kwargs["sink_bias"] = sink_bias.double()
    gold = outputs_and_gradients(naive_normalized_attn, inputs.to(torch.float64), **kwargs)
    sizes = by_formula(inputs, **kwargs).sizes
    for name, x in got.items():
        assert_no_worse_than_eager(
            name, x, eager[name], gold[name], sizes[name], factor, inputs.q.dtype
        )
    return got
