"""Parts of an optimizer step: reading micro-batches, clipping gradients, copying numbers to the host."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flame.base.tensors import full_tensor
from flame.data.stream import StreamLoader
from flame.training.stop_request import StopRequest

Microbatch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Inputs by name and labels ``[B, T]``, on the host."""


class DataError(ValueError):
    """The next data cannot be read; the message is the same on every process."""


class HostCopy:
    """Copies numbers to the host; `wait` does not wait for work that is queued after the copy."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if values.is_cuda else None
        if self.event is not None:
            self.event.record()

    def wait(self) -> list[float]:
        """The numbers, as soon as the copy is done."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


def read_stream(
    batches: Iterator[Microbatch], count: int, *, loader: StreamLoader, stop: StopRequest
) -> list[Microbatch]:
    """The next ``count`` micro-batches of a stream. Either all processes get theirs, or all raise.

    Raises:
        DataError: A process could not read its micro-batches, for example from a shard that is damaged on one machine.
            The loader is reset to the start of the step.
    """
    mark = loader.mark()
    microbatches, problem = [], None
    try:
        microbatches = [next(batches) for _ in range(count)]
    except ValueError as error:
        problem = str(error)
    _, has_failed = stop.agree(problem is not None)
    if not has_failed:
        return microbatches
    problems = [problem] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=stop.group)
    loader.rewind(mark)
    raise DataError(next(x for x in problems if x is not None))


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales gradients down to ``max_norm``; returns the norm before clipping, a scalar on the device.

    If the norm is not finite, gradients stay unchanged, so that a dump shows the layer that caused it.
    """
    norm = full_tensor(
        get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    )
    finite = norm.nan_to_num(nan=0.0, posinf=0.0)
    clip_grads_with_norm_(parameters, max_norm, finite, foreach=True)
    return norm
