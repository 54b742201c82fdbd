"""Attention statistics: against the definitions on dense weights, in any tiling, and inside a compiled model."""

import math

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fla.ops.attn.softpick import NORMALIZERS
from fla.ops.attn.softpick.naive import naive_normalized_attn
from flame.measure.counts import (
    SMALL,
    AttentionCounts,
    attention_counts,
    kurtosis,
    largest_activations,
    power_sums,
    value_ratio_sums,
)
from flame.measure.while_training import Observer, observe
from flame.models import read_config
from flame.titan.model import ModelArgs, TitanModel


def by_definition(q, k, *, normalizer, eps, **kwargs):
    """The paper's statistics from all weights at once, [B, HQ, T, S] in float64."""
    v = torch.zeros_like(k)
    _, weights = naive_normalized_attn(
        q, k, v, normalizer=normalizer, return_weights=True, **kwargs
    )
    T, S = weights.shape[-2:]
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    visible = (j <= i) & (j > i - (kwargs.get("window_size") or S))
    seen = weights[..., visible]
    scores = q.transpose(1, 2) @ k.repeat_interleave(q.shape[2] // k.shape[2], 2).permute(
        0, 2, 3, 1
    )
    return {
        f"sink_rate_{eps}": (weights[..., 0].mean(-1) > eps).double().mean().item(),
        "zeros": (seen == 0).double().mean().item(),
        f"at_most_{SMALL:.0e}": (seen <= SMALL).double().mean().item(),
        "max_score": (scores * q.shape[-1] ** -0.5)[..., visible].amax().item(),
    }


def heads_with_sinks(T, S, *, HQ, H, K=8, dtype=torch.float32):
    """q and k some of whose heads look at the first key, by various degrees."""
    generator = torch.Generator().manual_seed(T + 100 * HQ)
    q, k = (
        torch.randn(2, T, HQ, K, generator=generator),
        torch.randn(2, S, H, K, generator=generator),
    )
    q[..., 0] = torch.linspace(0, 6, HQ)
    k[..., 0] = 0
    k[:, 0, :, 0] = 4
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(
    ("T", "S", "HQ", "H", "window_size"),
    [(33, 33, 4, 4, None), (33, 33, 6, 2, None), (20, 33, 4, 2, None), (33, 33, 4, 2, 7)],
    ids=["square", "gqa", "last-queries", "window"],
)
def test_counts_follow_the_definition_in_any_tiling(normalizer, T, S, HQ, H, window_size):
    q, k = heads_with_sinks(T, S, HQ=HQ, H=H)
    options = {"normalizer": normalizer, "window_size": window_size}
    # one row per tile; some rows and a rest; all of them
    results = [
        attention_counts(q, k, **options, tile_elements=n).ratios() for n in (1, 5 * HQ * S, 10**9)
    ]
    for eps in (0.2, 0.3):
        for name, value in by_definition(q, k, eps=eps, **options).items():
            for result in results:
                assert result[name] == pytest.approx(value, abs=1e-6), name


def test_the_statistics_tell_the_normalisers_apart():
    q, k = heads_with_sinks(64, 64, HQ=8, H=8)
    softmax, softpick = (
        attention_counts(q, k, normalizer=name).ratios() for name in ("softmax", "softpick")
    )
    assert softmax["zeros"] == 0
    assert softpick["zeros"] > 0.3
    assert 0 < softmax["sink_rate_0.3"] < 1
    assert softmax["max_score"] == softpick["max_score"]


@pytest.mark.parametrize("normalizer", ["softmax", "softpick"])
def test_a_learned_sink_takes_weight(normalizer):
    q, k = heads_with_sinks(33, 33, HQ=4, H=2)
    sink = torch.tensor([-1.0, 0.5, 3.0, 12.0])
    options = {"normalizer": normalizer, "sink_bias": sink}
    result = attention_counts(q, k, **options, tile_elements=5 * 4 * 33).ratios()
    for name, value in by_definition(q, k, eps=0.3, **options).items():
        assert result[name] == pytest.approx(value, abs=1e-6), name
    without = attention_counts(q, k, normalizer=normalizer).ratios()
    assert result["sink_rate_0.3"] < without["sink_rate_0.3"]
    # and the one that a model hands to its operator is seen
    decoder = torch.nn.Module()
    decoder.embed_tokens, decoder.layers = torch.nn.Identity(), torch.nn.ModuleList()
    observer, module = Observer(1, normalizer, torch.device("cpu")), torch.nn.Module()
    module.layer_idx = 0
    operator = f"naive_{normalizer}_attn"
    states = (x.transpose(1, 2) for x in (q, k, k))
    with observe(decoder, operator, observer):
        ALL_ATTENTION_FUNCTIONS[operator](module, *states, None, s_aux=sink)
    assert observer.counts[0].ratios() == attention_counts(q, k, **options).ratios()


def test_packed_sequences_are_sequences():
    q, k = heads_with_sinks(30, 30, HQ=4, H=2)
    packed_q, packed_k = q.flatten(0, 1)[None], k.flatten(0, 1)[None]
    # an empty one between them
    bounds = torch.tensor([0, 30, 30, 60])
    packed = attention_counts(packed_q, packed_k, normalizer="softpick", cu_seqlens=bounds)
    assert packed.ratios() == attention_counts(q, k, normalizer="softpick").ratios()


def test_parts_add_up():
    q, k = heads_with_sinks(30, 30, HQ=4, H=2)
    total = AttentionCounts.empty()
    assert math.isnan(total.ratios()["zeros"])
    for i in range(2):
        total.add(attention_counts(q[i : i + 1], k[i : i + 1], normalizer="softmax"))
    assert total.ratios() == attention_counts(q, k, normalizer="softmax").ratios()


def test_autocast_and_half_precision_are_computed_in_float32():
    q, k = heads_with_sinks(40, 40, HQ=4, H=4, dtype=torch.bfloat16)
    expected = attention_counts(q.float(), k.float(), normalizer="softpick").ratios()
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_counts(q, k, normalizer="softpick").ratios() == expected


@pytest.mark.parametrize(
    ("q", "k", "normalizer"),
    [
        ((1, 4, 2, 8), (1, 4, 2, 8), "softpack"),
        ((1, 4, 3, 8), (1, 4, 2, 8), "softmax"),
        ((1, 4, 2, 8), (1, 3, 2, 8), "softmax"),
        ((1, 4, 2, 8), (1, 4, 2, 7), "softmax"),
    ],
)
def test_what_does_not_fit_is_refused(q, k, normalizer):
    with pytest.raises(ValueError, match="normalizer must be|do not fit together"):
        attention_counts(torch.zeros(q), torch.zeros(k), normalizer=normalizer)


def test_kurtosis():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=generator) * 5 + 3
    assert kurtosis(power_sums(normal)) == pytest.approx(3, abs=0.1)
    # half of it at each of two places: 1, the least there is
    assert kurtosis(power_sums(torch.tensor([2.0, 4.0]))) == pytest.approx(1)
    x = torch.tensor([0.0, 0.0, 0.0, 100.0])
    parts = power_sums(x[:1]) + power_sums(x[1:])
    d = x.double() - x.double().mean()
    assert kurtosis(parts) == pytest.approx(((d**4).mean() / (d**2).mean() ** 2).item())
    assert math.isnan(kurtosis(power_sums(torch.ones(3))))
    assert math.isnan(kurtosis(torch.zeros(5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_token_against_the_rest(dtype):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 12, 2, 8, generator=generator).to(dtype)
    v[:, 0] *= torch.tensor([[0.1], [3.0]]).to(dtype)
    # one (sequence, head) without a mean to compare with
    v[2, 1:, 1] = 0
    norms = v.double().square().sum(-1).sqrt()
    ratios = (norms[:, 0] / norms[:, 1:].mean(1)).flatten()[:5]
    expected = pytest.approx([ratios.sum().item(), 5], rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert value_ratio_sums(v).tolist() == expected
    # packed, with empty sequences, and one of a single token, which has no ratio
    row = torch.cat([*v, v[0, :1]])[None]
    bounds = torch.tensor([0, 12, 24, 24, 36, 37, 37])
    assert value_ratio_sums(row, bounds).tolist() == expected
    v[0, 3, 0, 0] = math.nan
    assert value_ratio_sums(v)[0].isnan()
    x = torch.randn(3, 12, 16, generator=generator).to(dtype)
    x[1, 0, 3], x[2, 5, 2] = -20, 30
    dense = [x.double().abs().max().item(), x.double()[:, 0].abs().max().item()]
    assert dense == [30, 20]
    assert largest_activations(x).tolist() == dense
    row, bounds = x.flatten(0, 1)[None], torch.tensor([0, 12, 24, 36, 36])
    assert largest_activations(row, bounds).tolist() == dense
    # in two parts of the tokens, the second of rows that are no documents has no first token
    halves = [largest_activations(x[:, i : i + 6], start=i) for i in (0, 6)]
    assert torch.stack(halves).amax(0).tolist() == dense
    assert halves[1].tolist() == [x[:, 6:].abs().max().item(), -math.inf]
    halves = [largest_activations(row[:, i : i + 18], bounds, start=i) for i in (0, 18)]
    assert torch.stack(halves).amax(0).tolist() == dense


@pytest.fixture
def model():
    config = read_config("configs/softpick_transformer_tiny.json")
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 32, 3, 64
    config.head_dim, config.num_key_value_heads = 8, 2
    torch.manual_seed(0)
    model = TitanModel(ModelArgs(config, seed=0))
    # weights with which some attention is far from even
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(40)
    return model


def test_a_model_is_observed_layer_by_layer(model):
    tokens = torch.arange(80).reshape(2, 40)
    outputs = []
    for module in (model.model.embed_tokens, *model.model.layers):
        module.register_forward_hook(lambda *a: outputs.append(a[2].detach()))
    observer = Observer(3, "softpick", torch.device("cpu"))
    operator = ALL_ATTENTION_FUNCTIONS["naive_softpick_attn"]
    with torch.no_grad(), observe(model.model, "naive_softpick_attn", observer):
        seen = model(tokens)
        observer.is_counting = False
        # as a process without a sequence does
        model(tokens + 1)
    assert ALL_ATTENTION_FUNCTIONS["naive_softpick_attn"] is operator
    scalars = observer.scalars()
    outputs = outputs[:4]
    for i in range(3):
        layer = f"attention/layer_{i:02}"
        d = outputs[i + 1].double() - outputs[i + 1].double().mean()
        expected = ((d**4).mean() / (d**2).mean() ** 2).item()
        assert scalars[f"{layer}/kurtosis"] == pytest.approx(expected, rel=1e-6)
        assert 0 < scalars[f"{layer}/zeros"] < 1
        for name, seen_tokens in (("largest_activation", 40), ("largest_first_activation", 1)):
            expected = outputs[i + 1][:, :seen_tokens].abs().max().item()
            assert scalars[f"{layer}/{name}"] == expected
            assert scalars[f"attention/{name}"] >= expected
    d = torch.stack(outputs).double() - torch.stack(outputs).double().mean()
    expected = ((d**4).mean() / (d**2).mean() ** 2).item()
    assert scalars["attention/kurtosis"] == pytest.approx(expected, rel=1e-6)
    layers = [scalars[f"attention/layer_{i:02}/zeros"] for i in range(3)]
    assert scalars["attention/zeros"] == pytest.approx(sum(layers) / 3)
    assert len(set(layers)) == 3
    # the first layer by hand
    decoder, attention = model.model, model.model.layers[0].self_attn
    hidden = decoder.layers[0].input_layernorm(outputs[0])
    shape = (2, 40, -1, 8)
    q, k = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
    cos, sin = decoder.rotary_emb(hidden, torch.arange(40)[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    by_hand = attention_counts(q, k, normalizer="softpick").ratios()
    for name in ("zeros", "sink_rate_0.2", "max_score"):
        assert scalars[f"attention/layer_00/{name}"] == pytest.approx(by_hand[name], rel=1e-5)
    norms = attention.v_proj(hidden).view(shape).double().norm(dim=-1)
    ratio = (norms[:, 0] / norms[:, 1:].mean(1)).mean().item()
    assert scalars["attention/layer_00/first_value_ratio"] == pytest.approx(ratio, rel=1e-5)
    ratios = [scalars[f"attention/layer_{i:02}/first_value_ratio"] for i in range(3)]
    assert scalars["attention/first_value_ratio"] == pytest.approx(sum(ratios) / 3)
    # as one packed row of two documents, the first of which ends earlier
    packed = Observer(3, "softpick", torch.device("cpu"))
    bounds = torch.tensor([0, 30, 80], dtype=torch.int32)
    positions = torch.cat([torch.arange(30), torch.arange(50)]).view(2, 40)
    alone = [Observer(3, "softpick", torch.device("cpu")) for _ in range(2)]
    row = tokens.view(1, 80)
    with torch.no_grad():
        with observe(model.model, "naive_softpick_attn", packed):
            model(tokens, positions=positions, cu_seqlens=bounds)
        for observer, part in zip(alone, (row[:, :30], row[:, 30:]), strict=True):
            with observe(model.model, "naive_softpick_attn", observer):
                model(part)
    torch.testing.assert_close(
        packed.largest, torch.maximum(alone[0].largest, alone[1].largest), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        packed.value_ratios, alone[0].value_ratios + alone[1].value_ratios, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(seen, model(tokens))


def test_an_error_in_between_leaves_the_model_as_it_was(model):
    operator = ALL_ATTENTION_FUNCTIONS["naive_softpick_attn"]
    observer = Observer(3, "softpick", torch.device("cpu"))
    with pytest.raises(IndexError), observe(model.model, "naive_softpick_attn", observer):
        model(torch.full((1, 4), 10**6))
    assert ALL_ATTENTION_FUNCTIONS["naive_softpick_attn"] is operator
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_is_not_compiled_again(model):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    tokens = torch.arange(80).reshape(2, 40)
    before = model(tokens)
    compiled = len(graphs)
    assert compiled >= 1
    observer = Observer(3, "softpick", torch.device("cpu"))
    with torch.no_grad(), observe(model.model, "naive_softpick_attn", observer):
        # another shape, and without gradients: either would be compiled anew
        model(tokens[:1, :30])
    assert not math.isnan(observer.scalars()["attention/zeros"])
    assert torch.equal(model(tokens), before)
    assert len(graphs) == compiled
