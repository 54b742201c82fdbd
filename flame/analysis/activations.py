"""Moments and extremes of what the layers of a decoder put out, and their records."""

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
    """The smallest or largest activation so far, and where it is."""

    value: float = math.nan
    location: dict[str, int] = field(default_factory=dict)


class Activations:
    """Moments and extremes of the outputs of the embedding (index 0) and of each layer."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.powers = torch.zeros(1 + num_layers, 5, dtype=torch.float64, device=device)
        self.minima = [Extreme() for _ in range(1 + num_layers)]
        self.maxima = [Extreme() for _ in range(1 + num_layers)]

    def see(self, index: int, x: torch.Tensor, sample: int) -> None:
        """``x [1, T, hidden]`` of a sample."""
        self.powers[index] += power_sums(x)
        channels = x.shape[-1]
        for extremes, at in ((self.minima, x.argmin()), (self.maxima, x.argmax())):
            at, known = int(at.item()), extremes[index]
            value = x.flatten()[at].item()
            sign = -1 if extremes is self.minima else 1
            if not known.location or value * sign > known.value * sign:
                location = {"sample": sample, "position": at // channels, "channel": at % channels}
                extremes[index] = Extreme(value, location)


@contextlib.contextmanager
def observed_layers(
    layers: list[nn.Module], see: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """``see(index, output)``: what enters the first layer as index 0, then each layer's output."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        see(0, args[0] if args else kwargs["hidden_states"])

    def after(index: int, module: nn.Module, args: tuple, output: Any) -> None:
        see(index, output[0] if isinstance(output, tuple) else output)

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


def record_activations(recorder: Recorder, activations: Activations, length: int) -> None:
    """Adds the kurtosis and the extremes of each layer, of the embedding's output and of all of them."""
    for index, powers in enumerate(activations.powers):
        layer = EMBEDDING if index == 0 else index - 1
        recorder.add("kurtosis", kurtosis(powers), layer=layer, length=length)
        for metric, extremes in (("min", activations.minima), ("max", activations.maxima)):
            extreme = extremes[index]
            recorder.add(metric, extreme.value, layer=layer, length=length, **extreme.location)
    recorder.add("kurtosis", kurtosis(activations.powers.sum(0)), length=length)
    for metric, extremes, best in (
        ("min", activations.minima, min),
        ("max", activations.maxima, max),
    ):
        index = best(range(len(extremes)), key=lambda i, e=extremes: e[i].value)
        where = {"in_layer": EMBEDDING if index == 0 else index - 1} | extremes[index].location
        recorder.add(metric, extremes[index].value, length=length, **where)
