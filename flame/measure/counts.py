"""Sink rate, zero weights, largest score, value norms and kurtosis of q, k, v and activations, as sums.

Everything is a sum, a count or a maximum until the end, so that batches, tiles and processes can be combined.

Definitions, those of arXiv:2504.20966:

- sink rate at eps: the share of (sequence, head) whose mean weight on the first key, over all queries, exceeds eps;
- zeros: the share of weights that are exactly 0 among the keys that causality and window let a query see; also
  the share that is at most `SMALL`. Weights are computed in float32 from the q and k of the model;
- kurtosis: mu4 / mu2^2 (3 for a normal distribution) of a layer's output, and of all of them and the embedding
  pooled, from moments in float64.

Of this project:

- first value ratio: the norm of the first token's value over the mean norm of the other tokens' values of the same
  sequence and key head; its mean over (sequence, key head);
- largest activation: the largest absolute output of a layer, over all tokens, and over the first tokens of sequences.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from fla.ops.attn.softpick import NORMALIZERS
from flame.measure.weight_blocks import TILE_ELEMENTS, weight_blocks

SINK_EPS = (0.2, 0.3)
"""Mean weights on the first key above which a head counts as a sink."""
SMALL = 1e-5
"""Weights up to this are counted in addition to the exact zeros."""


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
        """Counts of nothing, to add to."""
        sums = torch.zeros(4 + len(SINK_EPS), dtype=torch.float64, device=device)
        return cls(sums=sums, max_score=torch.full_like(sums[0], -math.inf))

    def add(self, other: "AttentionCounts") -> None:
        """Adds counts of other sequences or layers in place."""
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
        sink_bias: A score of each query head ``[HQ]`` that is added to the denominator only.
        tile_elements: Scores in memory at a time, but at least one query row of all heads.

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
    for index, eps in enumerate(SINK_EPS, start=4):
        counts.sums[index] = (first_weight / T > eps).sum()
    return counts


@torch.no_grad()
def value_ratios(v: torch.Tensor) -> torch.Tensor:
    """First value ratio of each key head of one sequence, and 1; 0 and 0 without a ratio; float64 ``[2, H]``.

    A sequence of one token, or whose other values are all 0, has no ratio.

    Args:
        v: Values ``[S, H, V]``, any float dtype.
    """
    with torch.autocast(v.device.type, enabled=False):
        norms = v.to(torch.promote_types(v.dtype, torch.float32)).norm(dim=-1).double()
    # of no token, 0
    others = norms[1:].sum(0) / max(1, len(norms) - 1)
    # NaN counts, so that it shows
    is_counted = others != 0
    return torch.stack([torch.where(is_counted, norms[0] / others, 0), is_counted.double()])


@torch.no_grad()
def value_ratio_sums(v: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of `value_ratios` over (sequence, key head), and their number; float64 ``[2]``.

    Args:
        v: Values ``[B, S, H, V]``, any float dtype.
        cu_seqlens: Boundaries ``[N + 1]`` of packed sequences, ``B == 1``.
    """
    bounds = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    sums = torch.zeros(2, dtype=torch.float64, device=v.device)
    for row in v:
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            if end > start:
                sums += value_ratios(row[start:end]).sum(-1)
    return sums


@torch.no_grad()
def largest_activations(
    x: torch.Tensor, cu_seqlens: torch.Tensor | None = None, *, start: int = 0
) -> torch.Tensor:
    """Largest absolute element of all tokens, and of the first tokens of sequences; float64 ``[2]``.

    Args:
        x: Output of a layer ``[B, T, hidden]``, or tokens ``start`` to ``start + T`` of its sequence dimension.
        cu_seqlens: Boundaries ``[N + 1]`` of packed sequences, ``B == 1``.
        start: The tokens before ``x``. Without a first token in ``x`` the second maximum is -inf.
    """
    largest = x.detach().abs().amax(-1)  # [B, T]
    firsts = torch.zeros(1, dtype=torch.long, device=x.device)
    if cu_seqlens is not None:
        # the beginning of an empty sequence at the end is no token
        firsts = cu_seqlens[:-1][cu_seqlens.diff() > 0].long()
    firsts = firsts[(firsts >= start) & (firsts < start + x.shape[1])] - start
    of_firsts = largest[:, firsts]
    none = largest.new_full((1,), -math.inf)
    return torch.stack([largest.max(), torch.cat([of_firsts.flatten(), none]).max()]).double()


def power_sums(x: torch.Tensor) -> torch.Tensor:
    """Number of elements and the sums of their first four powers, float64 ``[5]``; sums of parts can be added."""
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
