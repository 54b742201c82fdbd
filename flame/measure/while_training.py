"""`measure.counts` of a model while it trains: attention and layer outputs on held-out sequences."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flame.base.tensors import local_tensor
from flame.measure.counts import AttentionCounts, attention_counts, kurtosis, power_sums
from flame.models.operator_override import replaced_operator


class Observer:
    """Accumulates statistics of a model's layers while `observe` is active.

    counts: `AttentionCounts` of each layer.
    powers: `power_sums` of the embedding, then of each layer's output, ``[1 + layers, 5]``.
    """

    def __init__(self, num_layers: int, normalizer: str, device: torch.device) -> None:
        self.normalizer = normalizer
        self.counts = [AttentionCounts.empty(device) for _ in range(num_layers)]
        self.powers = torch.zeros(1 + num_layers, 5, dtype=torch.float64, device=device)
        # off while the batch is padding that only keeps the processes in step
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
        """Counts the weights of one layer's attention on one batch."""
        if self.is_counting:
            self.counts[layer].add(
                attention_counts(
                    query.transpose(1, 2),
                    key.transpose(1, 2),
                    normalizer=self.normalizer,
                    scale=scaling,
                    window_size=window_size,
                    cu_seqlens=cu_seqlens,
                    sink_bias=None if sink_bias is None else local_tensor(sink_bias),
                )
            )

    def see_output(self, index: int, output: torch.Tensor) -> None:
        """Adds the output of the embedding (index 0) or of layer ``index - 1`` to its moments."""
        if self.is_counting:
            self.powers[index] += power_sums(local_tensor(output))

    def reduce(self) -> None:
        """All-reduces over every rank.

        Ranks that hold replicas are counted more than once in both numerator and denominator, so ratios are
        unaffected.
        """
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
    """Context in which ``observer`` sees the attention and the outputs of a Llama decoder; it runs eagerly meanwhile.

    Args:
        decoder: Module with ``embed_tokens`` and ``layers``.
        attn_impl: The operator it runs, a name in transformers' table of attention functions.
        observer: Accumulates the statistics.
    """
    operator: Callable[..., object] = ALL_ATTENTION_FUNCTIONS[attn_impl]

    def observed(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        *args: object,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> object:
        cu_seqlens, sink_bias = kwargs.get("cu_seq_lens_q"), kwargs.get("s_aux")
        observer.see_attention(
            module.layer_idx,  # pyright: ignore[reportArgumentType]  # every attention module of transformers has layer_idx
            query,
            key,
            scaling,
            sliding_window,
            cu_seqlens,
            sink_bias,
        )
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        return operator(module, query, key, *args, **kwargs)

    modules = [decoder.embed_tokens, *decoder.layers]  # pyright: ignore[reportGeneralTypeIssues]  # a decoder of transformers has embed_tokens and layers
    hooks = [
        module.register_forward_hook(partial(_see_output, observer, index))
        for index, module in enumerate(modules)
    ]
    try:
        with replaced_operator(attn_impl, observed):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _see_output(
    observer: Observer, index: int, module: nn.Module, args: object, output: torch.Tensor
) -> None:
    observer.see_output(index, output)
