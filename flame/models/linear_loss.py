"""The training loss, cross-entropy, with the logits or without them: ``--training.loss``.

The logits of 16 Ki tokens over a vocabulary of 32,000 take 1 GiB in bfloat16, and their gradient as much again.
The linear variant multiplies the last hidden states by the vocabulary matrix a piece at a time, and computes the
gradients in the same pass. torch's own `torch.nn.functional.linear_cross_entropy` is not offered: it returns the
loss in the dtype of the hidden states, and bfloat16 has three digits.
"""

import warnings
from collections.abc import Callable

import torch

from flame.base.errors import UsageError

# summed loss of hidden states [N, D], weights [V, D] of their dtype, labels [N] with -100 left out
LinearLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _fla(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        # upstream warns on every machine without a GPU, where `linear_loss` refuses
        warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
        from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
    return fused_linear_cross_entropy_loss(hidden, labels, weight, reduction="sum")  # pyright: ignore[reportArgumentType]  # upstream annotates labels with torch.LongTensor


def linear_loss(name: str, device_type: str) -> LinearLoss | None:
    """The loss that ``--training.loss`` names, from hidden states; None for "cross_entropy", from logits.

    Raises:
        UsageError: This machine cannot compute it.
    """
    if name == "cross_entropy":
        return None
    if device_type != "cuda":
        raise UsageError(
            f"--training.loss {name} is a Triton kernel and needs a GPU; take cross_entropy"
        )
    return _fla
