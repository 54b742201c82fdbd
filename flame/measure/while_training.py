"""`measure.counts` of a model while it trains: attention and layer outputs on held-out sequences."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flame.base.tensors import local_tensor
from flame.measure.counts import (
    AttentionCounts,
    attention_counts,
    kurtosis,
    largest_activations,
    power_sums,
    value_ratio_sums,
)
from flame.models.operator_override import replaced_operator


class Observer:
    """Accumulates statistics of a model's layers while `observe` is active.

    counts: `AttentionCounts` of each layer.
    value_ratios: `value_ratio_sums` of each layer, ``[layers, 2]``.
    powers: `power_sums` of the embedding, then of each layer's output, ``[1 + layers, 5]``.
    largest: `largest_activations` of each layer's output, ``[layers, 2]``.

    Args:
        num_layers: Layers of the model.
        normalizer: A key of `fla.ops.attn.softpick.NORMALIZERS`.
        device: Where the sums are.
        sequence_part: Number of this process's part of the sequence, which tensor parallelism splits between layers
            into parts of the same length.
    """

    def __init__(
        self, num_layers: int, normalizer: str, device: torch.device, *, sequence_part: int = 0
    ) -> None:
        self.normalizer, self.sequence_part = normalizer, sequence_part
        self.counts = [AttentionCounts.empty(device) for _ in range(num_layers)]
        self.powers = torch.zeros(1 + num_layers, 5, dtype=torch.float64, device=device)
        self.value_ratios = torch.zeros(num_layers, 2, dtype=torch.float64, device=device)
        self.largest = torch.full_like(self.value_ratios, -math.inf)
        # off while the batch is padding that only keeps the processes in step
        self.is_counting = True

    def see_attention(
        self,
        layer: int,
        query: torch.Tensor,  # [B, HQ, T, K]
        key: torch.Tensor,  # [B, H, S, K]
        value: torch.Tensor,  # [B, H, S, V]
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
            self.value_ratios[layer] += value_ratio_sums(value.transpose(1, 2), cu_seqlens)

    def see_embedding(self, output: torch.Tensor) -> None:
        """Adds the output of the embedding to its moments."""
        if self.is_counting:
            self.powers[0] += power_sums(local_tensor(output))

    def see_output(self, layer: int, output: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
        """Adds the output of a layer to its moments and maxima."""
        if self.is_counting:
            output = local_tensor(output)
            self.powers[1 + layer] += power_sums(output)
            start = self.sequence_part * output.shape[1]
            largest = largest_activations(output, cu_seqlens, start=start)
            self.largest[layer] = torch.maximum(self.largest[layer], largest)

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
        dist.all_reduce(self.value_ratios)
        dist.all_reduce(self.largest, dist.ReduceOp.MAX)
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
            values |= _first_token(self.value_ratios[i], self.largest[i])
            named |= {f"attention/layer_{i:02}/{name}": x for name, x in values.items()}
        values = total.ratios() | {"kurtosis": kurtosis(self.powers.sum(0))}
        values |= _first_token(self.value_ratios.sum(0), self.largest.amax(0))
        return {f"attention/{name}": x for name, x in values.items()} | named


def _first_token(value_ratios: torch.Tensor, largest: torch.Tensor) -> dict[str, float]:
    ratio_sum, number = value_ratios.tolist()
    of_all, of_firsts = largest.tolist()
    return {
        "first_value_ratio": ratio_sum / number if number else math.nan,
        "largest_activation": of_all,
        "largest_first_activation": of_firsts,
    }


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
        value: torch.Tensor,
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
            value,
            scaling,
            sliding_window,
            cu_seqlens,
            sink_bias,
        )
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        return operator(module, query, key, value, *args, **kwargs)

    layers: Iterable[nn.Module] = decoder.layers  # pyright: ignore[reportAssignmentType]  # a decoder of transformers has layers
    embedding: nn.Module = decoder.embed_tokens  # pyright: ignore[reportAssignmentType]  # and embed_tokens, a module
    hooks = [embedding.register_forward_hook(partial(_see_embedding, observer))]
    hooks += [
        layer.register_forward_hook(partial(_see_output, observer, index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        with replaced_operator(attn_impl, observed):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _see_embedding(
    observer: Observer, module: nn.Module, args: object, output: torch.Tensor
) -> None:
    observer.see_embedding(output)


def _see_output(
    observer: Observer,
    layer: int,
    module: nn.Module,
    args: object,
    kwargs: dict[str, Any],
    output: torch.Tensor,
) -> None:
    observer.see_output(layer, output, kwargs.get("cu_seq_lens_q"))
