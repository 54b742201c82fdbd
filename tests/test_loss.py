"""The loss without logits against cross-entropy with them."""

import pytest
import torch
import torch.nn.functional as F

from flame.errors import UsageError
from flame.loss import linear_loss


def draw(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 32, generator=generator).to("cuda", dtype)
    weight = torch.randn(101, 32, generator=generator).to("cuda", dtype)
    labels = torch.randint(0, 101, (70,), generator=generator)
    labels[5:9] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels.cuda()


def loss_and_gradients(loss, inputs):
    hidden, weight, labels = inputs
    # as in training, divided by the number of tokens after summing
    value = loss(hidden, weight, labels) / 66
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def with_logits(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_without_logits(dtype):
    hidden, weight, labels = draw(dtype)
    gold = loss_and_gradients(
        with_logits, (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels)
    )  # fmt: skip
    got = loss_and_gradients(linear_loss("fla_linear_cross_entropy", "cuda"), draw(dtype))
    eager = loss_and_gradients(with_logits, draw(dtype))
    assert got[0].dtype == torch.float32
    for part, x, y, z in zip(("loss", "dhidden", "dweight"), got, eager, gold, strict=True):
        error, allowed = (x.double() - z).norm(), (y.double() - z).norm()
        # float32 products may be TF32
        floor = 2e-3 if dtype == torch.float32 else 1e-6
        assert error <= 2 * allowed + floor * z.norm(), part


def test_loss_that_is_not_here_is_refused():
    with pytest.raises(
        UsageError, match=r"--training.loss fla_linear_cross_entropy .* needs a GPU"
    ):
        linear_loss("fla_linear_cross_entropy", "cpu")
    assert linear_loss("cross_entropy", "cpu") is None
