"""Interventions: what a trained model loses when its sinks lose what they may need.

An intervention changes the model at inference. It removes the first token, flattens that token's largest channel, or
cuts the weight of sink heads on that token. The loss is measured before and after, on the same target tokens. A model
without sink heads has nothing to cut; ``heads`` is 0 in those records. Source: docs/softpick/ANALYSIS.md, section 4.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from flame.analysis.activations import observed_layers
from flame.analysis.heads import attend_observed
from flame.analysis.measure import decoder_layers, replaced_attention, summed_loss
from flame.analysis.records import Recorder
from flame.base.errors import UsageError
from flame.measure.weight_blocks import TILE_ELEMENTS, WeightBlock

SINK_HEAD_MIN = 0.3
"""A head is cut if its mean weight on key 0, over all samples and queries, is above this."""
NAMES = (
    "first_token_removed",
    "first_token_replaced",
    "channel_to_mean",
    "sinks_cut",
    "sinks_cut_renormalized",
)
NUM_RUNS = 1 + len(NAMES)
"""Largest number of times that `intervene` reads each sample."""
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class _Outcome:
    """Of all samples: mean loss of the targets, nats per token, and share of (sample, layer, head) that are sinks."""

    loss: float
    sink_rate: float


def frequent_token(samples: torch.Tensor, special: Collection[int]) -> int:
    """The most frequent token of ``samples [N, T]`` behind the first position that is not ``special``.

    Raises:
        UsageError: There is none.
    """
    counts = samples[:, 1:].flatten().bincount()
    counts[[i for i in special if i < len(counts)]] = 0
    if not counts.sum():
        raise UsageError(
            "--interventions: the samples hold no token that is not special, so none can replace the first; --data must "
            "have text"
        )
    return int(counts.argmax())


@torch.no_grad()
def intervene(
    model: PreTrainedModel,
    samples: torch.Tensor,
    recorder: Recorder,
    *,
    replacement: int,
    token_text: Callable[[int], str] = str,
    sink_head_min: float = SINK_HEAD_MIN,
    tick: Callable[[int], object] = lambda n: None,
    tile_elements: int = TILE_ELEMENTS,
) -> None:
    """Adds a record ``intervention`` for each of `NAMES`.

    Args:
        model: In evaluation mode, running one of `flame.models.attention.IMPLEMENTATIONS`.
        samples: Token ids ``[N, length + 1]``. The targets are those of position 2 and later: without the first
            token, nothing predicts that of position 1.
        recorder: Holds what `flame.analysis.measure.measure` found on these samples.
        replacement: Token id that replaces the first.
        token_text: Text of a token id.
        sink_head_min: A head is cut if its mean weight on key 0 is above this.
        tick: Called with the number of samples after each batch; `NUM_RUNS` times the samples in all.
        tile_elements: Scores in memory at a time.
    """
    length = samples.shape[1] - 1
    samples = samples.to(model.device)
    inputs, targets = samples[:, :-1], samples[:, 2:]
    layers = decoder_layers(model)
    run = partial(_run, model, tick=tick, tile_elements=tile_elements)
    channel = next(
        r["channel"]
        for r in recorder.records
        if r["metric"] == "largest_activation_at_first"
        and (r["layer"], r["length"]) == (None, length)
    )
    # sums over samples of this channel's mean over all positions but the first, after the embedding and each layer
    sums = torch.zeros(1 + len(layers), dtype=torch.float64, device=model.device)

    def add_means(index: int, x: torch.Tensor) -> None:
        sums[index] += x[:, 1:, channel].double().mean(1).sum()

    def set_to_mean(index: int, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 0, channel] = sums[index] / len(samples)
        return x

    with observed_layers(layers, add_means):
        before = run(inputs, targets)

    def add(name: str, after: _Outcome | None, **extra: Any) -> None:
        rates = {
            "sink_rate_before": before.sink_rate,
            "sink_rate": None if after is None else after.sink_rate,
        }
        loss = None if after is None else after.loss
        recorder.add(
            "intervention", loss, length=length, name=name, before=before.loss, **rates, **extra
        )

    add("first_token_removed", run(inputs[:, 1:], targets))
    replaced = torch.cat([torch.full_like(inputs[:, :1], replacement), inputs[:, 1:]], 1)
    named = {"token": replacement, "token_text": token_text(replacement)}
    add("first_token_replaced", run(replaced, targets), **named)
    with observed_layers(layers, set_to_mean):
        add("channel_to_mean", run(inputs, targets), channel=channel)

    cut = torch.zeros(len(layers), model.config.num_attention_heads, dtype=torch.bool)
    for r in recorder.records:
        if r["metric"] == "first_weight" and r["head"] is not None and r["length"] == length:
            cut[r["layer"], r["head"]] = r["value"] > sink_head_min
    number = int(cut.sum())
    for name, is_renormalized in (("sinks_cut", False), ("sinks_cut_renormalized", True)):
        if number:
            edit = partial(_cut_first_key, cut.to(model.device), is_renormalized)
            add(name, run(inputs, targets, edit=edit), heads=number)
        else:
            add(name, None, heads=0)
            tick(len(samples))


def _run(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    tick: Callable[[int], object],
    tile_elements: int,
    edit: Callable[[int, WeightBlock], torch.Tensor] | None = None,
) -> _Outcome:
    """Runs a model on token ids ``[N, T]``; ``targets [N, n]`` are the labels of the last ``n`` positions."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    sinks, heads = torch.zeros_like(total), 0

    def attend_layer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        nonlocal heads
        T, HQ, _ = q.shape
        # of each block of queries: [H, G]
        first: list[torch.Tensor] = []

        def see(block: WeightBlock) -> None:
            first.append(block.weights[..., 0].sum(-1, dtype=torch.float64))

        of_layer = None if edit is None else partial(edit, layer)
        options |= {"edit": of_layer, "tile_elements": tile_elements}
        output = attend_observed(q, k, v, see, **options)
        sinks.add_((torch.stack(first).sum(0) / T > SINK_HEAD_MIN).sum())
        heads += HQ
        return output

    batch = max(1, _BATCH_TOKENS // inputs.shape[1])
    num_targets = targets.shape[1]
    with replaced_attention(model, attend_layer):
        for ids, labels in zip(inputs.split(batch), targets.split(batch), strict=True):
            logits = model(ids, use_cache=False).logits[:, -num_targets:].flatten(0, 1)
            total += summed_loss(logits, labels.flatten())
            tick(len(ids))
    return _Outcome((total / targets.numel()).item(), (sinks / heads).item())


def _cut_first_key(
    cut: torch.Tensor, is_renormalized: bool, layer: int, block: WeightBlock
) -> torch.Tensor:
    """The weights of a block, those of the heads ``cut [layers, HQ]`` on key 0 set to 0.

    The first query keeps its weight, since it sees no other key. A row is renormalised to its former sum; one
    without any other weight becomes empty.
    """
    weights = block.weights.clone()
    H, G = weights.shape[:2]
    # [H, G, rows], a flag for each row
    is_cut = cut[layer].view(H, G, 1).expand(weights.shape[:-1]).clone()
    if block.start == 0:
        is_cut[..., 0] = False
    weights[..., 0].masked_fill_(is_cut, 0.0)
    if not is_renormalized:
        return weights
    rest = weights.sum(-1, keepdim=True)
    # NOTE(numerics): divided first, since the quotient of the sums may overflow
    whole = weights / rest * block.weights.sum(-1, keepdim=True)
    return torch.where(is_cut[..., None] & (rest > 0), whole, weights)
