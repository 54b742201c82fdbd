"""What each attention head does with one sequence, from a block of query rows at a time.

Definitions are those of arXiv:2504.20966, as `docs/softpick/ANALYSIS.md` writes them out. Weights and
output are computed by the formula of the model's normaliser, in float32 at least. No operator is called, so memory
holds one block at a time, on any device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from flame.measure.counts import SINK_EPS, SMALL, value_ratios
from flame.measure.weight_blocks import TILE_ELEMENTS, WeightBlock, weight_blocks

DEAD_OUTPUT_MAX = 1e-6
"""A token's output is dead if all its elements are below this in absolute value."""
DORMANT_WEIGHT_MIN = 0.9
"""A token is dormant if its weight on the first key is above this."""
HEAD_FRACTION_MIN = 0.95
"""A head is dead/dormant if more than this fraction of its tokens is."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What counts as a sink and as a small weight."""

    sink_eps: tuple[float, ...] = SINK_EPS
    """Mean weights on the first key above which a head of a sample counts as a sink."""
    small_eps: tuple[float, ...] = (SMALL,)
    """Weights up to these are counted in addition to the exact zeros."""


def attend_observed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    see: Callable[[WeightBlock], None] | None,
    *,
    normalizer: str,
    scale: float,
    window_size: int | None = None,
    sink_bias: torch.Tensor | None = None,
    edit: Callable[[WeightBlock], torch.Tensor] | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> torch.Tensor:
    """Causal attention within one sequence; calls ``see`` with each block of its weights.

    Args:
        q: Queries ``[T, HQ, K]``.
        k: Keys ``[S, H, K]``, ``S >= T``: the queries are the last ``T`` positions.
        v: Values ``[S, H, V]``.
        see: Called with each block, or None.
        normalizer: A key of `fla.ops.attn.softpick.NORMALIZERS`.
        scale: Factor on ``q @ k.T``.
        window_size: A query sees itself and the ``window_size - 1`` keys before it. Default: all.
        sink_bias: A score of each query head ``[HQ]`` that takes weight and has no value.
        edit: Called with each block; returns the weights to use instead, which ``see`` gets too. Default: none.
        tile_elements: Scores in memory at a time, but at least one query row of all heads.

    Returns:
        ``[T, HQ, V]``, float32 at least.
    """
    (T, HQ, _), V = q.shape, v.shape[-1]
    v = v.to(torch.promote_types(v.dtype, torch.float32)).transpose(0, 1)[:, None]
    o = v.new_empty(T, HQ, V)
    for block in weight_blocks(
        q,
        k,
        normalizer=normalizer,
        scale=scale,
        window_size=window_size,
        sink_bias=sink_bias,
        tile_elements=tile_elements,
    ):
        if edit is not None:
            block = block._replace(weights=edit(block))
        if see is not None:
            see(block)
        # [H, G, rows, V] -> [rows, HQ, V]
        output = block.weights @ v[:, :, : block.weights.shape[-1]]
        o[block.start : block.end] = output.flatten(0, 1).transpose(0, 1)
    return o


def position_buckets(length: int) -> list[tuple[int, int]]:
    """First and one past the last query position: 0, 1, 2-3, 4-7, and so on by powers of two."""
    edges = [0, *(1 << n for n in range(length.bit_length())), length]
    return [(a, min(b, length)) for a, b in zip(edges, edges[1:], strict=False) if a < b]


@dataclass
class HeadTotals:
    """Sums over samples of one length in one layer, float64 on the device; `of` makes those of one sample.

    Tensors are ``[HQ]`` unless stated otherwise; ``P`` is the number of `position_buckets`.
    """

    samples: int
    rows: int
    """Queries."""
    weights: int
    """Visible weights of one head."""
    bucket_rows: list[int]
    first: torch.Tensor
    """Mean weight on the first key, summed over samples."""
    sinks: torch.Tensor
    """``[eps, HQ]``: samples whose mean weight on the first key exceeds each eps."""
    late_first: torch.Tensor
    """Mean weight on the first key over the later half of the queries, summed over samples."""
    late_sinks: torch.Tensor
    """``[eps, HQ]``: samples whose mean weight on the first key, over these queries, exceeds each eps."""
    value_ratios: torch.Tensor
    """``[2, HQ]``: `flame.measure.counts.value_ratios` of the key head that is read, summed over samples."""
    zeros: torch.Tensor
    small: torch.Tensor
    """``[eps, HQ]``."""
    row_sums: torch.Tensor
    """``[P, HQ]``."""
    tops: torch.Tensor
    """``[P, HQ]``: largest weights of the rows."""
    entropy: torch.Tensor
    """Entropy in nats, summed over the rows that have weight, each normalised."""
    empty: torch.Tensor
    """Rows without any weight."""
    dormant: torch.Tensor
    """Rows that have more than `DORMANT_WEIGHT_MIN` on the first key."""
    dead: torch.Tensor
    """Rows whose output is below `DEAD_OUTPUT_MAX`."""
    largest_output: torch.Tensor = field(metadata={"maximum": True})
    max_score: torch.Tensor = field(metadata={"maximum": True})

    def add(self, other: "HeadTotals") -> None:
        """Adds another sample of the same length."""
        for name, options in self.__dataclass_fields__.items():
            a, b = getattr(self, name), getattr(other, name)
            if options.metadata.get("maximum"):
                setattr(self, name, torch.maximum(a, b))
            elif name == "bucket_rows":
                self.bucket_rows = [x + y for x, y in zip(a, b, strict=True)]
            else:
                setattr(self, name, a + b)


class HeadObserver:
    """Counts the weights of one sequence; give `see` to `attend_observed`, its values to `see_values`, its output to `finish`."""

    def __init__(
        self, length: int, num_heads: int, thresholds: Thresholds, device: torch.device
    ) -> None:
        self.length, self.num_heads, self.thresholds = length, num_heads, thresholds
        # the later half of the queries; of an odd number, the larger part
        self.late_start = length // 2
        self.buckets = position_buckets(length)
        starts = torch.tensor([a for a, _ in self.buckets], device=device)
        positions = torch.arange(length, device=device)
        self.bucket_of = torch.searchsorted(starts, positions, right=True) - 1

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, num_heads, dtype=torch.float64, device=device)

        self.totals = HeadTotals(
            samples=1,
            rows=length,
            weights=0,
            bucket_rows=[b - a for a, b in self.buckets],
            first=zeros(),
            sinks=zeros(len(thresholds.sink_eps)),
            late_first=zeros(),
            late_sinks=zeros(len(thresholds.sink_eps)),
            value_ratios=zeros(2),
            zeros=zeros(),
            small=zeros(len(thresholds.small_eps)),
            row_sums=zeros(len(self.buckets)),
            tops=zeros(len(self.buckets)),
            entropy=zeros(),
            empty=zeros(),
            dormant=zeros(),
            dead=zeros(),
            largest_output=zeros(),
            max_score=zeros() - math.inf,
        )

    def see(self, block: WeightBlock) -> None:
        """Adds a block of weights to the totals; each block of the sequence must be given once."""
        totals = self.totals
        # heads of all groups in one row: [HQ, rows, keys]
        w, scores = block.weights.flatten(0, 1), block.scores.flatten(0, 1)
        visible = block.visible
        bucket = self.bucket_of[block.start : block.end]
        totals.weights += int(visible.sum())
        first = w[..., 0]
        totals.first += first.sum(-1, dtype=torch.float64)
        late = first[:, max(0, self.late_start - block.start) :]
        totals.late_first += late.sum(-1, dtype=torch.float64)
        totals.dormant += (first > DORMANT_WEIGHT_MIN).sum(-1)
        totals.zeros += ((w == 0) & visible).sum((-1, -2))
        for index, eps in enumerate(self.thresholds.small_eps):
            totals.small[index] += ((w <= eps) & visible).sum((-1, -2))
        sums = w.sum(-1, dtype=torch.float64)
        totals.row_sums.index_add_(0, bucket, sums.T)
        totals.tops.index_add_(0, bucket, w.amax(-1).double().T)
        # of w / sum: log sum - sum w log w / sum
        logs = torch.special.xlogy(w, w).sum(-1, dtype=torch.float64)
        is_empty = sums == 0
        whole = sums.masked_fill(is_empty, 1.0)
        totals.entropy += (whole.log() - logs / whole).masked_fill(is_empty, 0.0).sum(-1)
        totals.empty += is_empty.sum(-1)
        top = scores.masked_fill(~visible, -math.inf).amax((-1, -2)).double()
        totals.max_score = torch.maximum(totals.max_score, top)

    def see_values(self, v: torch.Tensor) -> None:
        """Adds the ratios of the values ``[T, H, V]``; each query head counts the values of its key head."""
        self.totals.value_ratios += value_ratios(v).repeat_interleave(
            self.num_heads // v.shape[1], dim=1
        )

    def finish(self, output: torch.Tensor) -> HeadTotals:
        """The totals of the sequence, whose output ``[T, HQ, V]`` is what the output projection sees."""
        totals = self.totals
        # the sum over queries becomes their mean
        totals.first /= self.length
        totals.late_first /= self.length - self.late_start
        for index, eps in enumerate(self.thresholds.sink_eps):
            totals.sinks[index] = totals.first > eps
            totals.late_sinks[index] = totals.late_first > eps
        largest = output.abs().amax(-1)
        totals.dead += (largest < DEAD_OUTPUT_MAX).sum(0)
        totals.largest_output = largest.amax(0).double()
        return totals


class MapObserver:
    """The weights of one head of one sequence, pooled to ``cells`` by ``cells``.

    A cell holds the weight that a query of its rows puts on all keys of its columns, in the mean over these rows. So
    the cells of a row add up to the row's sum of weights.
    """

    def __init__(self, length: int, head: int, cells: int) -> None:
        self.head, self.length = head, length
        self.size = math.ceil(length / cells)
        """Tokens in a cell."""
        n = math.ceil(length / self.size)
        self.sums = torch.zeros(n, n, dtype=torch.float64)

    def see(self, block: WeightBlock) -> None:
        """Adds a block of weights to the cells of its rows."""
        w = block.weights.flatten(0, 1)[self.head].double().cpu()
        rows = torch.arange(block.start, block.end) // self.size
        columns = torch.arange(w.shape[1]) // self.size
        pooled = w.new_zeros(len(w), len(self.sums)).index_add_(1, columns, w)
        self.sums.index_add_(0, rows, pooled)

    def cells(self) -> list[list[float]]:
        """Rows of the lower triangle, diagonal included."""
        n = len(self.sums)
        counts = [min(self.size, self.length - i * self.size) for i in range(n)]
        return [(self.sums[i, : i + 1] / counts[i]).tolist() for i in range(n)]
