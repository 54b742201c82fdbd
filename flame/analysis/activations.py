"""Moments, energy and extremes of what the layers of a decoder put out, and their records."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from flame.analysis.records import Recorder
from flame.measure.counts import kurtosis, power_sums

EMBEDDING = -1
"""The "layer" of the embedding's output, in records of activations."""


@dataclass
class Extreme:
    """The most extreme activation so far, and where it is."""

    value: float = math.nan
    location: dict[str, int] = field(default_factory=dict)


class Activations:
    """Moments, energy and extremes of the outputs of the embedding (index 0) and of each layer.

    powers: `power_sums` of each output, float64 ``[1 + num_layers, 5]``.
    normed_powers: `power_sums` of the last layer's output behind the final norm, float64 ``[5]``.
    energies: Sum of squares of each channel, float64 ``[hidden]``, of each output.
    minima, maxima: Extremes of each output.
    first: Largest absolute value of each output at the first position.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        number = 1 + num_layers
        self.powers = torch.zeros(number, 5, dtype=torch.float64, device=device)
        self.normed_powers = torch.zeros(5, dtype=torch.float64, device=device)
        # scalars until the first output tells the number of channels
        self.energies = [self.powers.new_zeros(()) for _ in range(number)]
        self.minima = [Extreme() for _ in range(number)]
        self.maxima = [Extreme() for _ in range(number)]
        self.first = [Extreme() for _ in range(number)]

    def see(self, index: int, x: torch.Tensor, sample: int) -> None:
        """``x [1, T, hidden]`` of a sample."""
        x = x.detach()
        self.powers[index] += power_sums(x)
        self.energies[index] = self.energies[index] + x[0].double().square().sum(0)
        first = x[:, 0].abs()
        for extremes, values, at, sign in (
            (self.minima, x, x.argmin(), -1),
            (self.maxima, x, x.argmax(), 1),
            (self.first, first, first.argmax(), 1),
        ):
            at, known = int(at.item()), extremes[index]
            value = values.flatten()[at].item()
            # torch finds NaN first, and nothing replaces it
            if not known.location or math.isnan(value) or value * sign > known.value * sign:
                position, channel = divmod(at, x.shape[-1])
                location = {"sample": sample, "position": position, "channel": channel}
                extremes[index] = Extreme(value, location)

    def see_normed(self, x: torch.Tensor) -> None:
        """``x [1, T, hidden]``: the last layer's output of a sample behind the final norm."""
        self.normed_powers += power_sums(x)

    def largest(self) -> list[Extreme]:
        """The largest absolute value of each output."""
        return [
            Extreme(-low.value, low.location) if -low.value > high.value else high
            for low, high in zip(self.minima, self.maxima, strict=True)
        ]


@contextlib.contextmanager
def observed_layers(
    layers: list[nn.Module], see: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """``see(index, output)``: what enters the first layer as index 0, then each layer's output.

    A tensor that ``see`` returns replaces the output.
    """

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        new = see(0, args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def after(index: int, module: nn.Module, args: tuple, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = see(index, output[0] if is_tuple else output)
        return (new, *output[1:]) if is_tuple and new is not None else new

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [
        layer.register_forward_hook(partial(after, index))
        for index, layer in enumerate(layers, start=1)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record_activations(
    recorder: Recorder,
    activations: Activations,
    samples: torch.Tensor,
    token_text: Callable[[int], str],
) -> None:
    """Adds the numbers of each layer's output, of the embedding's, and of all of them.

    Args:
        recorder: Gets the records.
        activations: Of all samples.
        samples: Token ids ``[N, length]``, the inputs.
        token_text: Text of a token id.
    """
    length = samples.shape[1]

    def located(extreme: Extreme) -> dict[str, Any]:
        sample, position = extreme.location["sample"], extreme.location["position"]
        token = int(samples[sample, position])
        return extreme.location | {"token": token, "token_text": token_text(token)}

    by_metric = {
        "min": (activations.minima, -1),
        "max": (activations.maxima, 1),
        "largest_activation": (activations.largest(), 1),
        "largest_activation_at_first": (activations.first, 1),
    }
    for index, powers in enumerate(activations.powers):
        keys: dict[str, Any] = {"layer": _layer(index), "length": length}
        recorder.add("kurtosis", kurtosis(powers), **keys)
        share, channel = _top_channel(activations.energies[index])
        recorder.add("top_channel_energy", share, channel=channel, **keys)
        for metric, (extremes, _) in by_metric.items():
            extreme = extremes[index]
            recorder.add(metric, extreme.value, **keys, **located(extreme))
    recorder.add("kurtosis", kurtosis(activations.powers.sum(0)), length=length)
    # transformers' hidden_states hold the last layer's output behind the final norm only
    transformers = activations.powers[:-1].sum(0) + activations.normed_powers
    recorder.add("kurtosis_hidden_states", kurtosis(transformers), length=length)
    share, channel = _top_channel(torch.stack(activations.energies).sum(0))
    recorder.add("top_channel_energy", share, length=length, channel=channel)
    for metric, (extremes, sign) in by_metric.items():
        index, extreme = max(
            enumerate(extremes),
            # NaN is the most extreme
            key=lambda x, sign=sign: (math.isnan(x[1].value), x[1].value * sign),
        )
        where = {"in_layer": _layer(index)} | located(extreme)
        recorder.add(metric, extreme.value, length=length, **where)


def _layer(index: int) -> int:
    return EMBEDDING if index == 0 else index - 1


def _top_channel(energies: torch.Tensor) -> tuple[float, int]:
    """Share of the energy ``[hidden]`` that lies in the channel with most of it, NaN without energy; and this channel."""
    channel = int(energies.argmax())
    return (energies[channel] / energies.sum()).item(), channel
