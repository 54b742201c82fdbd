"""Runs a decoder over sequences and turns what its heads and layers do into records.

`flame.analysis.heads.attend_observed` computes the attention instead of the model's operator. It is the same function,
computed by the same code for every arm, a block of query rows at a time, so all weights never exist at once.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from flame.analysis.activations import Activations, observed_layers, record_activations
from flame.analysis.heads import (
    DEAD_OUTPUT_MAX,
    HEAD_FRACTION_MIN,
    HeadObserver,
    HeadTotals,
    MapObserver,
    Thresholds,
    attend_observed,
    position_buckets,
)
from flame.analysis.records import Recorder
from flame.base.errors import UsageError
from flame.measure.weight_blocks import TILE_ELEMENTS
from flame.models.attention import IMPLEMENTATIONS, normalizer_of
from flame.models.keywords import refuse_unknown
from flame.models.operator_override import replaced_operator

# attention of a layer on one sequence: (layer, q [T, HQ, K], k [S, H, K], v [S, H, V], options of `attend_observed`) -> [T, HQ, V]
_Attend = Callable[..., torch.Tensor]
_Metric = tuple[str, tuple[tuple[str, float], ...]]
"""Name, and the keys of its record besides layer, head and length."""


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a decoder of transformers, first to last.

    Raises:
        UsageError: They are not where transformers' decoders have them.
    """
    decoder = model.get_decoder()
    for name in ("layers", "h", "blocks"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers) == model.config.num_hidden_layers:
            return list(layers)
    raise UsageError(
        f"{type(model).__name__} is not a decoder that can be measured: {type(decoder).__name__} has no list of "
        f"{model.config.num_hidden_layers} layers"
    )


@contextlib.contextmanager
def replaced_attention(model: PreTrainedModel, attend_layer: _Attend) -> Iterator[None]:
    """Calls ``attend_layer(layer, q, k, v, **options)`` for each sequence instead of the model's operator.

    Raises:
        ValueError: The model runs none of `flame.models.attention.IMPLEMENTATIONS`.
    """
    name = model.config._attn_implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"the model must run one of {', '.join(IMPLEMENTATIONS)}; got {name!r}; for a model's own softmax give "
            'attn_implementation="naive_softmax" to from_pretrained'
        )
    normalizer = normalizer_of(name)

    def forward(
        module: nn.Module,
        query: torch.Tensor,  # [B, HQ, T, K]
        key: torch.Tensor,  # [B, H, S, K]
        value: torch.Tensor,  # [B, H, S, V]
        attention_mask: object,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        # always 0 to length - 1 in samples
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        refuse_unknown(f"measured {name}", kwargs)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        refused = {
            "a mask": attention_mask is not None,
            "dropout": dropout != 0,
            "capped scores (softcap)": softcap is not None,
            "attention that is not causal": not is_causal,
        }
        for what, is_there in refused.items():
            if is_there:
                raise NotImplementedError(f"attention with {what} is not measured")
        options = {
            "normalizer": normalizer,
            "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "window_size": sliding_window,
            "sink_bias": s_aux,
        }
        outputs = [
            attend_layer(module.layer_idx, *(x.transpose(0, 1) for x in qkv), **options)
            for qkv in zip(query, key, value, strict=True)
        ]
        return torch.stack(outputs).to(query.dtype), None

    with replaced_operator(name, forward):
        yield


@torch.no_grad()
def sequence_loss(model: PreTrainedModel, sequence: torch.Tensor) -> float:
    """Mean negative log-likelihood, nats per token, of ``sequence[1:]``; ``sequence [length + 1]`` on any device."""
    sequence = sequence.to(model.device)
    logits = model(sequence[None, :-1], use_cache=False).logits[0]
    return summed_loss(logits, sequence[1:]).item() / (len(sequence) - 1)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods, nats, of token ids ``targets [n]`` under ``logits [n, vocabulary]``; float64."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    # in float32 at least, a piece at a time for large vocabularies
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for x, y in zip(logits.split(1024), targets.split(1024), strict=True):
        total += F.cross_entropy(x.to(dtype), y, reduction="sum")
    return total


def loss_of(
    model: PreTrainedModel,
    samples: torch.Tensor,
    *,
    tick: Callable[[], object] = lambda: None,
    tile_elements: int = TILE_ELEMENTS,
) -> float:
    """Mean loss of ``samples [N, length + 1]``, nats per token."""

    def attend_layer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        return attend_observed(q, k, v, None, **options, tile_elements=tile_elements)

    total = 0.0
    with replaced_attention(model, attend_layer):
        for sequence in samples:
            total += sequence_loss(model, sequence)
            tick()
    return total / len(samples)


def perplexity(loss: float) -> float:
    """e^loss; infinite where float64 ends."""
    return math.exp(loss) if loss < 700 else math.inf


def measure(
    model: PreTrainedModel,
    samples: torch.Tensor,
    recorder: Recorder,
    *,
    thresholds: Thresholds,
    token_text: Callable[[int], str] = str,
    tick: Callable[[], object] = lambda: None,
    tile_elements: int = TILE_ELEMENTS,
) -> None:
    """Measures a model on sequences of one length, and adds the results to ``recorder``.

    Args:
        model: In evaluation mode, running one of `flame.models.attention.IMPLEMENTATIONS`.
        samples: Token ids ``[N, length + 1]``.
        recorder: Gets loss, perplexity, and a record of each metric for every head, layer and the model.
        thresholds: What counts as a sink and as a small weight.
        token_text: Text of a token id, for the records of the largest activations.
        tick: Called after each sample.
        tile_elements: Scores in memory at a time, as in `flame.measure.weight_blocks.weight_blocks`.

    Raises:
        UsageError: A layer has no attention of this kind.
    """
    length = samples.shape[1] - 1
    layers = decoder_layers(model)
    heads: list[HeadTotals | None] = [None] * len(layers)
    activations = Activations(len(layers), model.device)

    projections = [getattr(getattr(x, "self_attn", None), "o_proj", None) for x in layers]
    # layers whose output has not reached the output projection yet
    observers: dict[int, HeadObserver] = {}

    def add(layer: int, totals: HeadTotals) -> None:
        known = heads[layer]
        if known is None:
            heads[layer] = totals
        else:
            known.add(totals)

    def attend_layer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        observer = HeadObserver(length, q.shape[1], thresholds, q.device)
        output = attend_observed(q, k, v, observer.see, **options, tile_elements=tile_elements)
        observer.see_values(v)
        if projections[layer] is None:
            add(layer, observer.finish(output))
        else:
            observers[layer] = observer
        return output

    def see_projected(layer: int, module: nn.Module, args: tuple) -> None:
        # the output after a gate, [1, T, HQ * V]
        observer = observers.pop(layer)
        add(layer, observer.finish(args[0][0].unflatten(-1, (observer.num_heads, -1))))

    hooks = [
        module.register_forward_pre_hook(partial(see_projected, layer))
        for layer, module in enumerate(projections)
        if module is not None
    ]
    # a decoder of transformers returns its last hidden state, behind the final norm, first
    hooks.append(
        model.get_decoder().register_forward_hook(
            lambda module, args, output: activations.see_normed(output[0])
        )
    )
    loss = 0.0
    try:
        with replaced_attention(model, attend_layer):
            for sample, sequence in enumerate(samples):
                with observed_layers(layers, partial(activations.see, sample=sample)):
                    loss += sequence_loss(model, sequence)
                tick()
    finally:
        for hook in hooks:
            hook.remove()
    if None in heads:
        raise UsageError(
            f"layer {heads.index(None)} of {type(model).__name__} has no attention that transformers' attention "
            "interface runs, so its heads cannot be measured"
        )
    loss /= len(samples)
    recorder.add("loss", loss, length=length)
    recorder.add("perplexity", perplexity(loss), length=length)
    _record_heads(recorder, [x for x in heads if x is not None], length, thresholds)
    record_activations(recorder, activations, samples[:, :-1], token_text)


def _record_heads(
    recorder: Recorder, heads: list[HeadTotals], length: int, thresholds: Thresholds
) -> None:
    buckets = position_buckets(length)
    by_layer = [_values(totals, buckets, thresholds) for totals in heads]
    for (metric, extra), _ in by_layer[0].items():
        keys: dict[str, Any] = dict(extra) | {"length": length}
        whole = []
        for layer, values in enumerate(by_layer):
            numbers = values[metric, extra].tolist()
            for head, value in enumerate(numbers):
                recorder.add(metric, value, layer=layer, head=head, **keys)
            recorder.add(metric, _summary(metric, numbers), layer=layer, **keys)
            whole += numbers
        recorder.add(metric, _summary(metric, whole), **keys)


def _summary(metric: str, numbers: list[float]) -> float:
    """A metric over several heads: a maximum for the largest score or output, else the mean over heads that have it."""
    if metric in ("max_score", "largest_output"):
        return max(numbers)
    numbers = [x for x in numbers if not math.isnan(x)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _values(
    totals: HeadTotals, buckets: list[tuple[int, int]], thresholds: Thresholds
) -> dict[_Metric, torch.Tensor]:
    """Metric and its extra keys -> ``[HQ]``."""
    rows = totals.rows
    values: dict[_Metric, torch.Tensor] = {
        ("first_weight", ()): totals.first / totals.samples,
        ("late_first_weight", ()): totals.late_first / totals.samples,
        # NaN for a head without any ratio
        ("first_value_ratio", ()): totals.value_ratios[0] / totals.value_ratios[1],
        ("zeros", ()): totals.zeros / totals.weights,
        ("row_sum", ()): totals.row_sums.sum(0) / rows,
        ("top_weight", ()): totals.tops.sum(0) / rows,
        # NaN for a head without any weight
        ("entropy", ()): totals.entropy / (rows - totals.empty),
        ("empty_rows", ()): totals.empty / rows,
        ("dead_head", ()): (totals.dead / rows > HEAD_FRACTION_MIN).double(),
        ("dead_everywhere", ()): (totals.largest_output < DEAD_OUTPUT_MAX).double(),
        ("dormant_head", ()): (totals.dormant / rows > HEAD_FRACTION_MIN).double(),
        ("largest_output", ()): totals.largest_output,
        ("max_score", ()): totals.max_score,
    }
    for index, eps in enumerate(thresholds.sink_eps):
        values["sink_rate", (("eps", eps),)] = totals.sinks[index] / totals.samples
        values["late_sink_rate", (("eps", eps),)] = totals.late_sinks[index] / totals.samples
    for index, eps in enumerate(thresholds.small_eps):
        values["at_most", (("eps", eps),)] = totals.small[index] / totals.weights
    for index, (start, end) in enumerate(buckets):
        key = (("position_start", start), ("position_end", end))
        n = totals.bucket_rows[index]
        values["row_sum_at", key] = totals.row_sums[index] / n
        values["top_weight_at", key] = totals.tops[index] / n
    return values


def record_maps(
    model: PreTrainedModel,
    sequence: torch.Tensor,
    heads: list[tuple[int, int]],
    recorder: Recorder,
    *,
    cells: int,
    why: dict[tuple[int, int], str],
) -> None:
    """Adds the pooled maps of single heads on one sequence.

    Args:
        model: In evaluation mode, running one of `flame.models.attention.IMPLEMENTATIONS`.
        sequence: Token ids ``[length]``.
        heads: ``(layer, head)``, which the model must have.
        recorder: Gets a record of each map.
        cells: Largest number of rows of a map.
        why: What each head was chosen for.
    """
    length = len(sequence)
    observers = {(layer, head): MapObserver(length, head, cells) for layer, head in heads}

    def attend_layer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        of_layer = [observer for (i, _), observer in observers.items() if i == layer]

        def see(block: Any) -> None:
            for observer in of_layer:
                observer.see(block)

        return attend_observed(q, k, v, see, **options)

    with torch.no_grad(), replaced_attention(model, attend_layer):
        model(sequence[None].to(model.device), use_cache=False)
    first = {
        (r["layer"], r["head"]): r["value"]
        for r in recorder.records
        if r["metric"] == "first_weight" and r["length"] == length
    }
    for (layer, head), observer in observers.items():
        recorder.add(
            "attention_map",
            first[layer, head],
            layer=layer,
            head=head,
            length=length,
            tokens_in_cell=observer.size,
            chosen=why[layer, head],
            map=[[float(f"{x:.4g}") for x in row] for row in observer.cells()],
        )
