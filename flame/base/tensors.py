"""Plain tensors from DTensors, which torch distributes over processes."""

import torch
from torch.distributed.tensor import DTensor


def local_tensor(x: torch.Tensor) -> torch.Tensor:
    """This process's part, without communication; a plain tensor is returned as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_tensor(x: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from all processes; a plain tensor is returned as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
