"""Initial weights: transformers' own rules and distribution, from the seed and the names alone."""

import pytest
import torch
from transformers import set_seed

from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM
from flame.models.initial_weights import initialize_weights


def build(*, seed=None, **changes):
    """A model on the CPU by way of meta: initialised here from ``seed``, by transformers without one."""
    config = SoftpickTransformerConfig(
        **{
            "attn_impl": "naive_softpick_attn",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.05,
            "pad_token_id": 3,
            "attention_bias": True,
        }
        | changes
    )
    if seed is None:
        set_seed(0)
        return SoftpickTransformerForCausalLM(config)
    with torch.device("meta"):
        model = SoftpickTransformerForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x.fill_(float("nan"))
    initialize_weights(model, seed)
    return model


def test_distribution_is_that_of_transformers():
    theirs, ours = dict(build().named_parameters()), dict(build(seed=1).named_parameters())
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        y = ours[name]
        assert y.dtype == x.dtype, name
        if x.std() == 0:
            # norms and biases
            assert torch.equal(x, y), name
            continue
        # Kolmogorov-Smirnov: two samples of one distribution pass with probability 1 - 1e-6
        both = torch.cat((x.detach().flatten(), y.detach().flatten())).sort().values
        below = [torch.searchsorted(s.detach().flatten().sort().values, both) for s in (x, y)]
        distance = (below[0] - below[1]).abs().max() / x.numel()
        assert distance < 2.7 * (2 / x.numel()) ** 0.5, name


def test_padding_row_is_zero_and_buffers_are_filled():
    model = build(seed=1)
    assert torch.equal(model.model.embed_tokens.weight[3], torch.zeros(64))
    assert torch.equal(model.model.rotary_emb.inv_freq, build().model.rotary_emb.inv_freq)


def test_every_module_draws_values_of_its_own():
    weights = [p.flatten()[:64] for p in build(seed=1).parameters() if p.std() > 0]
    assert (torch.corrcoef(torch.stack(weights)) - torch.eye(len(weights))).abs().max() < 0.7


def test_the_seed_decides_and_the_global_generator_does_not():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a = build(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    b, c = build(seed=1), build(seed=2)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert x.std() == 0 or not torch.equal(x, z), name


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_depends_on_its_name_and_not_on_the_others(name):
    a, b = build(seed=1), build(seed=1, num_hidden_layers=1, num_key_value_heads=4)
    assert torch.equal(a.get_parameter(name), b.get_parameter(name))


def test_tied_weights_are_the_embedding():
    tied, untied = build(seed=1, tie_word_embeddings=True), build(seed=1)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, untied.model.embed_tokens.weight)
