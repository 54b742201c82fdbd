"""Parts of an optimizer step: its micro-batches, clipped gradients, numbers for the host."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flame.base.tensors import full_tensor
from flame.data import StreamLoader
from flame.training.stop_request import StopRequest

Microbatch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Inputs by name and labels ``[B, T]``, on the host."""


class DataError(ValueError):
    """No step can be made of the data that come next; the message is the same on every process."""


class HostCopy:
    """Numbers of the device that the host waits for without waiting for what is queued after them."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if values.is_cuda else None
        if self.event is not None:
            self.event.record()

    def wait(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


def read_stream(
    batches: Iterator[Microbatch], count: int, *, loader: StreamLoader, stop: StopRequest
) -> list[Microbatch]:
    """The next ``count`` micro-batches of a stream, on all processes or on none.

    Raises:
        DataError: One process could not read its own, such as from a shard that is damaged on its machine alone.
            The loader is back where the step began.
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
    """Scales gradients down to ``max_norm``; returns their norm before, a scalar of the device.

    Gradients whose norm is not finite are left as they are, so that a dump shows which layer it came from.
    """
    norm = full_tensor(
        get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    )
    finite = norm.nan_to_num(nan=0.0, posinf=0.0)
    clip_grads_with_norm_(parameters, max_norm, finite, foreach=True)
    return norm
