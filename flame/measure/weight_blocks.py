"""The weights of causal attention from q and k alone, a block of query rows at a time.

Memory grows with the length and not with its square.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fla.ops.attn.softpick.naive import normalized_weights, visible_keys

TILE_ELEMENTS = 1 << 24
"""Scores in memory at a time, 64 MiB in float32."""


class WeightBlock(NamedTuple):
    """Some query rows of one sequence; ``[H, G, rows, keys]`` with the query heads grouped by key head."""

    start: int
    """First query row."""
    end: int
    """One past the last query row."""
    scores: torch.Tensor
    weights: torch.Tensor
    visible: torch.Tensor
    """``[rows, keys]``, bool, True where causality and window let a query see a key.

    Keys after the last query are left out."""


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
        normalizer: A key of `fla.ops.attn.softpick.NORMALIZERS`.
        scale: Factor on ``q @ k.T``.
        window_size: A query sees itself and the ``window_size - 1`` keys before it. Default: all.
        sink_bias: A score of each query head ``[HQ]`` that takes weight and has no value.
        tile_elements: Scores in memory at a time, but at least one query row of all heads.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    (T, HQ, K), (S, H, _) = q.shape, k.shape
    rows = max(1, tile_elements // (HQ * S))
    # query heads grouped by key head: [H, G, T, K] against [H, 1, K, S]
    q = q.to(dtype).view(T, H, HQ // H, K).permute(1, 2, 0, 3)
    k = k.to(dtype).permute(1, 2, 0)[:, None]
    sink = None if sink_bias is None else sink_bias.to(dtype).view(H, HQ // H, 1, 1)
    for start in range(0, T, rows):
        end = min(start + rows, T)
        # the keys after the last query of the block are left out, so the queries are the last positions
        num_keys = S - T + end
        visible = visible_keys(end - start, num_keys, q.device, window_size=window_size)
        scores = q[:, :, start:end] @ k[..., :num_keys] * scale
        weights, _ = normalized_weights(
            scores, normalizer=normalizer, visible=visible, sink_bias=sink
        )
        yield WeightBlock(start, end, scores, weights, visible)
