"""The loss without logits against cross-entropy with them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flame.base.errors import UsageError
from flame.models import read_config
from flame.models.linear_loss import linear_loss
from flame.titan.model import ModelArgs, TitanModel

ROOT = Path(__file__).parent.parent


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


def test_model_hands_the_loss_its_last_hidden_states_and_the_head():
    config = read_config(ROOT / "configs" / "softpick_transformer_tiny.json")
    model = TitanModel(ModelArgs(config, seed=0))
    model.init_weights()
    tokens = torch.randint(
        0, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0)
    )
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, 3:5] = -100
    logits = model(inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = model(inputs, labels=labels, linear_loss=with_logits)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    seen = []

    def spy(hidden, weight, labels):
        seen.append((hidden.dtype, weight.dtype))
        return with_logits(hidden, weight, labels)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(inputs, labels=labels, linear_loss=spy).backward()
    # fused kernels know nothing of autocast
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert model.lm_head.weight.grad.dtype == torch.float32
