"""`flame.analysis.interventions` against a decoder that is written out densely, in float64."""

from functools import partial

import pytest
import torch
from small_model import write_model
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fla.ops.attn.softpick.naive import normalized_weights
from flame.analysis.heads import Thresholds
from flame.analysis.interventions import NAMES, NUM_RUNS, frequent_token, intervene
from flame.analysis.measure import measure
from flame.analysis.records import Recorder
from flame.base.errors import UsageError
from flame.models import SoftpickTransformerForCausalLM, read_config

LENGTH, REPLACEMENT = 17, 7
ADDITIONS = {"attn_sink": True, "attn_gate": True, "attn_log_scale": True}


def tiny(tmp_path, normalizer, additions):
    """A model in float64 whose four query heads share two key heads."""
    file = write_model(tmp_path, num_key_value_heads=2, **additions)
    file.write_text(file.read_text().replace("naive_softpick_attn", f"naive_{normalizer}_attn"))
    torch.manual_seed(0)
    model = SoftpickTransformerForCausalLM(read_config(file)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(50)
            elif "v_proj" in name or "g_proj" in name or "o_proj" in name:
                parameter.mul_(10)
    return model


def as_it_is(index, x):
    return x


@torch.no_grad()
def dense(model, ids, targets, normalizer, *, residual=as_it_is, weights=as_it_is):
    """Loss, weights ``[N, HQ, T, T]`` of each layer, activations ``[N, T, D]`` of the embedding and each layer."""
    (N, T), decoder = ids.shape, model.model
    x = residual(0, decoder.embed_tokens(ids))
    hidden, maps = [x], []
    rotation = decoder.rotary_emb(x, torch.arange(T)[None])
    for index, layer in enumerate(decoder.layers):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (p(y).view(N, T, -1, attention.head_dim).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, *rotation)
        if model.config.attn_log_scale:
            q = q * attention.log_scale[:, None, None] * torch.arange(1, T + 1)[:, None].log()
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        scores = q @ k.transpose(-1, -2) * attention.head_dim**-0.5
        sink = attention.sinks[:, None, None] if model.config.attn_sink else None
        visible = torch.ones(T, T).tril().bool()
        w, _ = normalized_weights(scores, normalizer=normalizer, visible=visible, sink_bias=sink)
        w = weights(index, w)
        o = (w @ v).transpose(1, 2).flatten(2)
        if model.config.attn_gate:
            o = o * attention.g_proj(y).sigmoid()
        x = x + attention.o_proj(o)
        x = residual(index + 1, x + layer.mlp(layer.post_attention_layernorm(x)))
        hidden.append(x)
        maps.append(w)
    logits = model.lm_head(decoder.norm(x))[:, -targets.shape[1] :]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), maps, hidden


def sink_rate(maps):
    return (torch.stack(maps)[..., 0].mean(-1) > 0.3).double().mean().item()


def expected_outcomes(model, samples, normalizer, sink_head_min):
    """Name -> loss and sink rate, with ``before``; the channel, and the number of sink heads."""
    inputs, targets = samples[:, :-1], samples[:, 2:]

    def run(ids, **changes):
        loss, maps, _ = dense(model, ids, targets, normalizer, **changes)
        return loss, sink_rate(maps)

    before, maps, hidden = dense(model, inputs, targets, normalizer)
    hidden = torch.stack(hidden)
    channel = int(hidden[:, :, 0].abs().amax((0, 1)).argmax())
    means = hidden[:, :, 1:, channel].mean((1, 2))
    # [L, HQ], by the mean weight on key 0
    is_sink = torch.stack(maps)[..., 0].mean((1, 3)) > sink_head_min

    def to_mean(index, x):
        x = x.clone()
        x[:, 0, channel] = means[index]
        return x

    def cut(layer, w, is_renormalized):
        w = w.clone()
        for head in is_sink[layer].nonzero().flatten():
            for row in range(1, w.shape[-1]):
                for sample in range(len(w)):
                    weights = w[sample, head, row]
                    whole = weights.sum().clone()
                    weights[0] = 0
                    if is_renormalized and weights.sum() > 0:
                        weights *= whole / weights.sum()
        return w

    replaced = inputs.clone()
    replaced[:, 0] = REPLACEMENT
    outcomes = {
        "before": (before, sink_rate(maps)),
        "first_token_removed": run(inputs[:, 1:]),
        "first_token_replaced": run(replaced),
        "channel_to_mean": run(inputs, residual=to_mean),
        "sinks_cut": run(inputs, weights=lambda i, w: cut(i, w, False)),
        "sinks_cut_renormalized": run(inputs, weights=lambda i, w: cut(i, w, True)),
    }
    return outcomes, channel, int(is_sink.sum())


def measured(model, samples, *, tile_elements, **options):
    recorder, ticks = Recorder("m", "l"), []
    measure(model, samples, recorder, thresholds=Thresholds())
    intervene(
        model,
        samples,
        recorder,
        replacement=REPLACEMENT,
        token_text="<{}>".format,
        tick=ticks.append,
        tile_elements=tile_elements,
        **options,
    )
    assert sum(ticks) == NUM_RUNS * len(samples)
    records = {r["name"]: r for r in recorder.records if r["metric"] == "intervention"}
    assert tuple(records) == NAMES
    assert all(r["length"] == LENGTH and r["layer"] is None for r in records.values())
    return records


@pytest.mark.parametrize("additions", [{}, ADDITIONS], ids=["plain", "sink-gate-scale"])
@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_interventions_are_those_of_a_dense_decoder(tmp_path, normalizer, additions):
    model = tiny(tmp_path, normalizer, additions)
    samples = torch.randint(0, 250, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    samples[:, 0] = 256
    expected, channel, heads = expected_outcomes(model, samples, normalizer, sink_head_min=0.1)
    assert 0 < heads < 8
    losses = [loss for loss, _ in expected.values()]
    assert all(abs(a - b) > 1e-5 for i, a in enumerate(losses) for b in losses[:i]), losses
    # one row a tile, and all of them
    for tile_elements in (1, 10**9):
        records = measured(model, samples, tile_elements=tile_elements, sink_head_min=0.1)
        for name, r in records.items():
            before, after = expected["before"], expected[name]
            assert (r["before"], r["value"]) == pytest.approx((before[0], after[0]), rel=1e-9)
            rates = r["sink_rate_before"], r["sink_rate"]
            assert rates == pytest.approx((before[1], after[1])), name
        assert records["channel_to_mean"]["channel"] == channel
        assert records["first_token_replaced"]["token"] == REPLACEMENT
        assert records["first_token_replaced"]["token_text"] == "<7>"
        assert records["sinks_cut"]["heads"] == heads


def test_another_architecture_with_windows(tmp_path):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="naive_softmax",
    )
    model = GptOssForCausalLM(config).eval()
    samples = torch.randint(0, 64, (2, LENGTH + 1))
    records = measured(model, samples, tile_elements=10**9, sink_head_min=0.0)
    assert records["sinks_cut"]["heads"] == 8

    def loss(ids):
        with torch.no_grad():
            logits = model(ids).logits[:, -LENGTH + 1 :]
        return F.cross_entropy(logits.flatten(0, 1), samples[:, 2:].flatten()).item()

    removed = records["first_token_removed"]
    expected = loss(samples[:, :-1]), loss(samples[:, 1:-1])
    assert (removed["before"], removed["value"]) == pytest.approx(expected, rel=1e-5)
    channel = records["channel_to_mean"]["channel"]
    outputs = [[], [], []]
    modules = [model.model.embed_tokens, *model.model.layers]
    hooks = [
        m.register_forward_hook(lambda m, a, x, seen=seen: seen.append(x))
        for m, seen in zip(modules, outputs, strict=True)
    ]
    loss(samples[:, :-1])
    for hook in hooks:
        hook.remove()

    def to_mean(module, args, x, seen):
        x = x.clone()
        x[:, 0, channel] = seen[0][:, 1:, channel].mean()
        return x

    for module, seen in zip(modules, outputs, strict=True):
        module.register_forward_hook(partial(to_mean, seen=seen))
    assert records["channel_to_mean"]["value"] == pytest.approx(loss(samples[:, :-1]), rel=1e-5)


def test_an_arm_without_sink_heads_has_none_to_cut(tmp_path):
    model = tiny(tmp_path, "softpick", {})
    samples = torch.arange(2 * (LENGTH + 1)).view(2, -1)
    records = measured(model, samples, tile_elements=10**9, sink_head_min=0.99)
    for name in ("sinks_cut", "sinks_cut_renormalized"):
        assert (records[name]["value"], records[name]["heads"]) == (None, 0)
    assert records["first_token_removed"]["value"] > 0


def test_the_replacement_is_the_most_frequent_token_that_is_not_special():
    samples = torch.tensor([[9, 1, 2, 2, 5, 5, 5], [9, 9, 2, 3, 5, 5, 1]])
    assert frequent_token(samples, [5, 300]) == 2
    with pytest.raises(UsageError, match="no token that is not special"):
        frequent_token(samples, [1, 2, 3, 5, 9])
