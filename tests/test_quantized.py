"""Weights of few bits: on the quantiser's grid, the nearer the more bits, and nothing but the linear layers."""

import copy
import sys

import pytest
import torch
from small_model import write_model, write_text

from flame.analysis.quantized import BITS, quantize_weights
from flame.base.errors import UsageError
from flame.models import SoftpickTransformerForCausalLM, read_config


@pytest.fixture(scope="module")
def hqq():
    pytest.importorskip("hqq", reason="the extra [eval] is not installed")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Token ids ``[N, 64]`` of arithmetic, a byte each."""
    raw = write_text(tmp_path_factory.mktemp("text")).read_bytes()
    return torch.tensor(list(raw))[: len(raw) // 64 * 64].view(-1, 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """Far enough that its weights matter."""
    torch.manual_seed(0)
    model = new_model(tmp_path_factory.mktemp("model"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        model(text[step::60], labels=text[step::60]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def new_model(folder, **keys):
    return SoftpickTransformerForCausalLM(read_config(write_model(folder, **keys))).eval()


def quantized(model, *args):
    model = copy.deepcopy(model)
    quantize_weights(model, *args)
    return model


def layers(model):
    return {n: m for n, m in model.named_modules() if n.endswith("_proj")}


# of 32 weights in a row: a group is a row, or goes on in the next
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", BITS)
def test_a_group_has_evenly_spaced_values_of_so_many_bits(hqq, trained, bits, group_size):
    found = layers(quantized(trained, bits, group_size))
    assert len(found) == 2 * 7
    most = 0
    for name, layer in found.items():
        assert not layer.weight.equal(trained.get_submodule(name).weight)
        for group in layer.weight.view(-1, group_size):
            values = group.double().unique()
            step = values.diff().min()
            # not all of the 2^bits places are taken, and rounding to float32 moves the values a little
            places = (values - values[0]) / step
            assert places.max() < 2**bits - 0.5
            assert len(values) <= 2**bits
            off = (places - places.round()).abs().max()
            assert bits == 8 or off < 0.01, name
            most = max(most, len(values))
    assert most > min(2**bits, group_size) / 2


def test_the_error_falls_with_bits_and_is_below_plain_rounding(hqq, trained):
    errors, rounded = [], []
    for bits in BITS:
        after = layers(quantized(trained, bits))
        error = plain = 0.0
        for name, layer in layers(trained).items():
            groups = layer.weight.view(-1, 64)
            low, high = groups.aminmax(dim=1, keepdim=True)
            step = (high - low) / (2**bits - 1)
            nearest = low + ((groups - low) / step).round() * step
            plain += (nearest - groups).abs().sum().item()
            error += (after[name].weight - layer.weight).abs().sum().item()
        errors.append(error)
        rounded.append(plain)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 50 * errors[-1]
    # the half-quadratic solver is at work, which moves the zero points
    for bits, error, plain in zip(BITS, errors, rounded, strict=True):
        assert bits == 8 or error < 0.99 * plain, bits


def test_perplexity_stays_at_eight_bits_and_suffers_at_two(hqq, trained, text):
    def perplexity(model):
        return model(text, labels=text).loss.exp().item()

    before = perplexity(trained)
    assert before < 10  # of 259: it has learned
    at = {bits: perplexity(quantized(trained, bits)) for bits in BITS}
    assert at[8] == pytest.approx(before, rel=0.005)
    # in so small a model 3 and 4 bits may even help a little
    assert at[2] > 1.03 * before
    assert at[2] == max(at.values())


@pytest.mark.parametrize("tie", [False, True])
def test_all_but_the_linear_layers_stays_to_the_bit(hqq, tmp_path, tie):
    model = new_model(tmp_path, tie_word_embeddings=tie).bfloat16()
    after = quantized(model, 2).state_dict()
    for name, before in model.state_dict().items():
        assert after[name].dtype == torch.bfloat16
        assert after[name].equal(before) == ("_proj" not in name), name


def test_says_what_it_does_not_quantise(tmp_path):
    model = new_model(tmp_path)
    before = copy.deepcopy(model.state_dict())
    for bits in (1, 5, 16):
        with pytest.raises(UsageError, match=f"bits must be one of 2, 3, 4, 8, got {bits}"):
            quantize_weights(model, bits)
    for size in (0, 12, -8):
        with pytest.raises(UsageError, match=f"group_size must be a multiple of 8, got {size}"):
            quantize_weights(model, 4, size)
    with pytest.raises(UsageError, match=r"divide the 1024 weights of model\.layers\.0.*got 24"):
        quantize_weights(model, 4, 24)
    with pytest.raises(UsageError, match="Embedding has no linear layer to quantise"):
        quantize_weights(torch.nn.Embedding(8, 8), 4)
    assert all(model.state_dict()[name].equal(x) for name, x in before.items())


def test_says_which_extra_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    with pytest.raises(UsageError, match=r"need the package hqq .*pip install -e '\.\[eval\]'"):
        quantize_weights(new_model(tmp_path), 4)


@pytest.mark.gpu
def test_the_same_values_on_a_gpu(hqq, trained):
    cpu = quantized(trained, 3).state_dict()
    gpu = quantized(copy.deepcopy(trained).cuda(), 3).state_dict()
    assert all(gpu[name].is_cuda and gpu[name].cpu().equal(x) for name, x in cpu.items())
