"""What attention does, measured layer by layer: sink rate, zero weights, the largest score, kurtosis.

The first half are functions of q, k and activations alone. Scores are made a few query rows at a time, so
memory grows with the length and not with its square. Everything is a sum, a count or a maximum until the
end, so that batches, tiles and processes add up. The second half runs a model under training over held-out
sequences and hands its q, k and layer outputs to the first.

Definitions, those of arXiv:2504.20966:

- sink rate at eps: the share of (sequence, head) whose mean weight on the first key, over all queries, exceeds eps;
- zeros: the share of weights that are exactly 0 among the keys that causality and window let a query see; also
  the share that is at most `SMALL`. Weights are computed in float32 from the q and k of the model;
- kurtosis: mu4 / mu2^2 (3 for a normal distribution) of a layer's output, and of all of them and the embedding
  pooled, from moments in float64.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fla.ops.attn.softpick import NORMALIZERS

SINK_EPS = (0.2, 0.3)
"""Mean weights on the first key above which a head counts as a sink."""
SMALL = 1e-5
"""Weights up to this are counted beside the exact zeros."""
TILE_ELEMENTS = 1 << 24
"""Scores that exist at a time, 64 MiB in float32."""


@dataclass(kw_only=True)
class AttentionCounts:
    """Counts over every (sequence, head) and weight seen so far; `sums` and `max_score` reduce over processes.

    sums: float64 ``[3 + len(SINK_EPS) + 1]``: weights, zeros, small weights, pairs (sequence, head), and the
        pairs above each of `SINK_EPS`.
    max_score: float64 scalar, the largest score ``scale * <q, k>``; -inf before there is one.
    """

    sums: torch.Tensor
    max_score: torch.Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> "AttentionCounts":
        sums = torch.zeros(4 + len(SINK_EPS), dtype=torch.float64, device=device)
        return cls(sums=sums, max_score=torch.full_like(sums[0], -math.inf))

    def add(self, other: "AttentionCounts") -> None:
        self.sums += other.sums
        self.max_score = torch.maximum(self.max_score, other.max_score)

    def ratios(self) -> dict[str, float]:
        """The statistics by name; NaN where nothing was counted."""
        weights, zeros, small, pairs, *sinks = self.sums.tolist()
        named = {
            f"sink_rate_{eps}": _ratio(n, pairs) for eps, n in zip(SINK_EPS, sinks, strict=True)
        }
        return named | {
            "zeros": _ratio(zeros, weights),
            f"at_most_{SMALL:.0e}": _ratio(small, weights),
            "max_score": self.max_score.item(),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


@torch.no_grad()
def attention_counts(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    normalizer: str,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sink_bias: torch.Tensor | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> AttentionCounts:
    """Counts the weights of causal attention, a tile of query rows of one sequence at a time.

    Args:
        q: Queries ``[B, T, HQ, K]``, any float dtype.
        k: Keys ``[B, S, H, K]``, ``S >= T``: the queries are the last ``T`` positions. ``HQ`` is a multiple of ``H``.
        normalizer: A key of `fla.ops.attn.softpick.NORMALIZERS`.
        scale: Factor on ``q @ k.T``. Default: ``K ** -0.5``.
        window_size: A query sees itself and the ``window_size - 1`` keys before it. Default: all.
        cu_seqlens: Boundaries ``[N + 1]`` of packed sequences, ``B == 1``; each non-empty one counts as a sequence.
        sink_bias: A score of each query head ``[HQ]`` that stands in the denominator alone.
        tile_elements: Scores that exist at a time, at least; one query row of all heads is the least there can be.

    Raises:
        ValueError: Shapes that do not fit, or an unknown normaliser.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}; got {normalizer!r}")
    B, T, HQ, K = q.shape
    S, H = k.shape[1:3]
    if k.shape != (B, S, H, K) or HQ % H or S < T or (cu_seqlens is not None and (B, S) != (1, T)):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    scale = K**-0.5 if scale is None else scale
    counts = AttentionCounts.empty(q.device)
    # NOTE(numerics): scores and weights in float32 at least whatever the model's dtype, as in the operators
    with torch.autocast(q.device.type, enabled=False):
        for i in range(B):
            bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
            for start, end in zip(bounds[:-1], bounds[1:], strict=True):
                if end > start:
                    keys = k[i] if cu_seqlens is None else k[i, start:end]
                    counts.add(
                        _count_sequence(
                            q[i, start:end],
                            keys,
                            normalizer=normalizer,
                            scale=scale,
                            window_size=window_size,
                            sink_bias=sink_bias,
                            tile_elements=tile_elements,
                        )
                    )
    return counts


class WeightBlock(NamedTuple):
    """Some query rows of one sequence; ``[H, G, rows, keys]`` with the query heads of a key head side by side."""

    start: int
    """First query row."""
    end: int
    """One past the last query row."""
    scores: torch.Tensor
    weights: torch.Tensor
    visible: torch.Tensor
    """``[rows, keys]``, bool: what causality and window let a query see. Later keys than that are left out."""


def weight_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    normalizer: str,
    scale: float,
    window_size: int | None = None,
    sink_bias: torch.Tensor | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> Iterator[WeightBlock]:
    """The weights of causal attention within one sequence, a block of query rows at a time.

    Args:
        q: Queries ``[T, HQ, K]``; weights are computed in their dtype, in float32 at least.
        k: Keys ``[S, H, K]``, ``S >= T``: the queries are the last ``T`` positions.
        sink_bias: A score of each query head ``[HQ]`` that takes weight and has no value.
        tile_elements: Scores that exist at a time, at least; one query row of all heads is the least there can be.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    (T, HQ, K), (S, H, _) = q.shape, k.shape
    rows = max(1, tile_elements // (HQ * S))
    # query heads of a group stand side by side: [H, G, T, K] against [H, 1, K, S]
    q = q.to(dtype).view(T, H, HQ // H, K).permute(1, 2, 0, 3)
    k = k.to(dtype).permute(1, 2, 0)[:, None]
    sink = None if sink_bias is None else sink_bias.to(dtype).view(H, HQ // H, 1, 1)
    for start in range(0, T, rows):
        end = min(start + rows, T)
        # positions among the keys, of which those after the last query's are left out
        i = torch.arange(S - T + start, S - T + end, device=q.device)[:, None]
        j = torch.arange(S - T + end, device=q.device)
        visible = j <= i
        if window_size is not None:
            visible &= j > i - window_size
        x = q[:, :, start:end] @ k[..., : len(j)] * scale
        n, d, c, m = NORMALIZERS[normalizer](
            x, -1, visible, True, -math.inf if sink is None else sink
        )
        z = d.sum(-1, keepdim=True) + c
        if sink is not None:
            z = z + torch.exp(sink - m)
        # n <= d, so a zero denominator stands under zeros only
        yield WeightBlock(start, end, x, n / z.masked_fill(z == 0, 1.0), visible)


def _count_sequence(
    q: torch.Tensor,  # [T, HQ, K]
    k: torch.Tensor,  # [S, H, K]
    **options: Any,
) -> AttentionCounts:
    counts = AttentionCounts.empty(q.device)
    T, HQ = q.shape[:2]
    first_weight = torch.zeros(k.shape[1], HQ // k.shape[1], dtype=torch.float64, device=q.device)
    for block in weight_blocks(q, k, **options):
        weights, visible = block.weights, block.visible
        first_weight += weights[..., 0].sum(-1, dtype=torch.float64)
        counts.sums[0] += visible.sum() * HQ
        counts.sums[1] += ((weights == 0) & visible).sum()
        counts.sums[2] += ((weights <= SMALL) & visible).sum()
        top = block.scores.masked_fill(~visible, -math.inf).amax()
        counts.max_score = torch.maximum(counts.max_score, top.double())
    counts.sums[3] = HQ
    for place, eps in enumerate(SINK_EPS, start=4):
        counts.sums[place] = (first_weight / T > eps).sum()
    return counts


def power_sums(x: torch.Tensor) -> torch.Tensor:
    """Number of elements and the sums of their first four powers, float64 ``[5]``; those of parts add up."""
    x = x.detach().double().flatten()
    powers = torch.stack([x.sum(), (x**2).sum(), (x**3).sum(), (x**4).sum()])
    return torch.cat([powers.new_full((1,), x.numel()), powers])


def kurtosis(sums: torch.Tensor) -> float:
    """mu4 / mu2^2 from `power_sums`; 3 for a normal distribution, NaN for a constant."""
    number, *powers = sums.tolist()
    if not number:
        return math.nan
    m1, m2, m3, m4 = (power / number for power in powers)
    mu2 = m2 - m1**2
    mu4 = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return mu4 / mu2**2 if mu2 > 0 else math.nan


class Observer:
    """Counts what passes through a model's layers while `observe` is open.

    counts: `AttentionCounts` of each layer.
    powers: `power_sums` of the embedding, then of each layer's output, ``[1 + layers, 5]``.
    """

    def __init__(self, num_layers: int, normalizer: str, device: torch.device) -> None:
        self.normalizer = normalizer
        self.counts = [AttentionCounts.empty(device) for _ in range(num_layers)]
        self.powers = torch.zeros(1 + num_layers, 5, dtype=torch.float64, device=device)
        # off while what runs is padding that only keeps the processes in step
        self.is_counting = True

    def see_attention(
        self,
        layer: int,
        query: torch.Tensor,  # [B, HQ, T, K]
        key: torch.Tensor,  # [B, H, S, K]
        scaling: float | None,
        window_size: int | None,
        cu_seqlens: torch.Tensor | None,
        sink_bias: torch.Tensor | None,
    ) -> None:
        if self.is_counting:
            self.counts[layer].add(
                attention_counts(
                    query.transpose(1, 2),
                    key.transpose(1, 2),
                    normalizer=self.normalizer,
                    scale=scaling,
                    window_size=window_size,
                    cu_seqlens=cu_seqlens,
                    sink_bias=_local(sink_bias),
                )
            )

    def see_output(self, place: int, output: torch.Tensor) -> None:
        if self.is_counting:
            self.powers[place] += power_sums(_local(output))

    def reduce(self) -> None:
        """Sums over all processes. What several of them hold alike counts several times in the numerator and in
        the denominator, so that ratios stay right in any layout."""
        sums = torch.stack([c.sums for c in self.counts])
        maxima = torch.stack([c.max_score for c in self.counts])
        dist.all_reduce(sums)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        dist.all_reduce(self.powers)
        self.counts = [
            AttentionCounts(sums=s, max_score=m) for s, m in zip(sums, maxima, strict=True)
        ]

    def scalars(self) -> dict[str, float]:
        """``attention/<statistic>`` of the whole model and ``attention/layer_NN/<statistic>`` of each layer."""
        total = AttentionCounts.empty(self.powers.device)
        named: dict[str, float] = {}
        for i, counts in enumerate(self.counts):
            total.add(counts)
            values = counts.ratios() | {"kurtosis": kurtosis(self.powers[1 + i])}
            named |= {f"attention/layer_{i:02}/{name}": x for name, x in values.items()}
        values = total.ratios() | {"kurtosis": kurtosis(self.powers.sum(0))}
        return {f"attention/{name}": x for name, x in values.items()} | named


@contextlib.contextmanager
def observe(decoder: nn.Module, attn_impl: str, observer: Observer) -> Iterator[None]:
    """Shows ``observer`` the attention and the outputs of a Llama decoder, which runs eagerly meanwhile.

    Args:
        decoder: Module with ``embed_tokens`` and ``layers``.
        attn_impl: The operator it runs, a name in transformers' table of attention functions.
    """
    operator: Callable[..., object] = ALL_ATTENTION_FUNCTIONS[attn_impl]

    def observed(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        *args: object,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: object,
    ) -> object:
        cu_seqlens, sink_bias = kwargs.get("cu_seq_lens_q"), kwargs.get("s_aux")
        observer.see_attention(
            module.layer_idx, query, key, scaling, sliding_window, cu_seqlens, sink_bias
        )
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        return operator(module, query, key, *args, **kwargs)

    places = [decoder.embed_tokens, *decoder.layers]
    hooks = [
        module.register_forward_hook(partial(_see_output, observer, place))
        for place, module in enumerate(places)
    ]
    try:
        with replaced_operator(attn_impl, observed):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def replaced_operator(attn_impl: str, function: Callable[..., object]) -> Iterator[None]:
    """Runs ``function`` where models ask transformers' table for ``attn_impl``, eagerly and without TF32."""
    precision = torch.get_float32_matmul_precision()
    # an entry of this table's own, on top of the registered one
    ALL_ATTENTION_FUNCTIONS[attn_impl] = function
    try:
        # NOTE(numerics): TF32 would round float32 scores and blur which of them are zero
        torch.set_float32_matmul_precision("highest")
        # compiled layers are bypassed, not compiled again
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        del ALL_ATTENTION_FUNCTIONS[attn_impl]


def _local(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.to_local() if isinstance(x, DTensor) else x


def _see_output(
    observer: Observer, place: int, module: nn.Module, args: object, output: torch.Tensor
) -> None:
    observer.see_output(place, output)
