"""The measurements of flame.analysis: against dense weights in float64, in any tiling, and on attention made by hand."""

import math

import pytest
import torch
from small_model import write_model
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from fla.ops.attn.softpick import NORMALIZERS
from fla.ops.attn.softpick.naive import naive_normalized_attn
from flame.analysis.activations import Activations, record_activations
from flame.analysis.heads import (
    HeadObserver,
    MapObserver,
    Thresholds,
    attend_observed,
    position_buckets,
)
from flame.analysis.measure import loss_of, measure, record_maps, replaced_attention
from flame.analysis.records import Recorder
from flame.models import SoftpickTransformerForCausalLM, read_config

LENGTH = 21
THRESHOLDS = Thresholds(sink_eps=(0.1, 0.2), small_eps=(1e-5, 1e-2))


def tiny(tmp_path, normalizer):
    """A model in float64 with grouped heads, some of which look at the first key, and one without output."""
    file = write_model(tmp_path, num_key_value_heads=2)
    file.write_text(file.read_text().replace("naive_softpick_attn", f"naive_{normalizer}_attn"))
    torch.manual_seed(0)
    model = SoftpickTransformerForCausalLM(read_config(file)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(50)
        # the values that heads 2 and 3 of layer 1 read
        model.model.layers[1].self_attn.v_proj.weight[8:] = 0
    return model


def dense(model, samples):
    """Weights ``[N, L, HQ, T, T]``, outputs before o_proj ``[N, L, T, HQ, V]``, values of each query head of the same
    shape, activations ``[1 + L, N, T, D]``, transformers' hidden states, loss."""
    weights, outputs, values, hidden, states, losses = [], [], [], [], [], []
    layers = model.model.layers
    hooks = [model.model.embed_tokens.register_forward_hook(lambda *a: hidden.append(a[2]))]
    hooks += [layer.register_forward_hook(lambda *a: hidden.append(a[2])) for layer in layers]
    hooks += [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: outputs.append(a[0]))
        for layer in layers
    ]
    hooks += [
        layer.self_attn.v_proj.register_forward_hook(lambda *a: values.append(a[2]))
        for layer in layers
    ]
    with torch.no_grad():
        for row in samples:
            result = model(row[None, :-1], output_attentions=True, output_hidden_states=True)
            states.append(torch.stack(result.hidden_states))
            weights.append(torch.cat(result.attentions))
            losses.append(F.cross_entropy(result.logits[0], row[1:]))
    for hook in hooks:
        hook.remove()
    N, L, HQ = len(samples), len(layers), weights[0].shape[1]
    # two query heads read each of two key heads
    of_key_heads = torch.cat(values).view(N, L, LENGTH, 2, 1, -1)
    return (
        torch.stack(weights),
        torch.cat(outputs).view(N, L, LENGTH, HQ, -1),
        of_key_heads.expand(-1, -1, -1, -1, 2, -1).flatten(3, 4),
        torch.cat(hidden).view(N, 1 + L, LENGTH, -1).transpose(0, 1),
        torch.stack(states),
        torch.stack(losses).mean().item(),
    )


def moment_ratio(x):
    d = x - x.mean()
    return ((d**4).mean() / (d**2).mean() ** 2).item()


def by_definition(weights, outputs, of_values):
    """Metric and eps -> [L, HQ], from everything at once."""
    T = weights.shape[-1]
    seen = torch.ones(T, T).tril().bool()
    first = weights[..., 0].mean(-1)
    sums = weights.sum(-1)
    p = weights / sums[..., None]
    entropy = -torch.special.xlogy(p, p).sum(-1)
    largest = outputs.abs().amax(-1)
    # queries 10 to 20 of 21
    late = weights[..., 10:, 0].mean(-1)
    norms = (of_values**2).sum(-1).sqrt()
    values = {
        ("late_first_weight", None): late.mean(0),
        ("first_value_ratio", None): (norms[:, :, 0] / norms[:, :, 1:].mean(2)).mean(0),
        ("first_weight", None): first.mean(0),
        ("zeros", None): (weights[..., seen] == 0).double().mean((0, -1)),
        ("row_sum", None): sums.mean((0, -1)),
        ("top_weight", None): weights.amax(-1).mean((0, -1)),
        ("entropy", None): entropy.nanmean(-1).nanmean(0)
        if not (sums == 0).any()
        else torch.stack(
            [entropy[:, i].transpose(0, 1).flatten(1).nanmean(-1) for i in range(weights.shape[1])]
        ),
        ("empty_rows", None): (sums == 0).double().mean((0, -1)),
        ("dead_head", None): ((largest < 1e-6).double().mean((0, 2)) > 0.95).double(),
        ("dead_everywhere", None): (largest.amax((0, 2)) < 1e-6).double(),
        ("dormant_head", None): ((weights[..., 0] > 0.9).double().mean((0, -1)) > 0.95).double(),
        ("largest_output", None): largest.amax((0, 2)),
    }
    for eps in THRESHOLDS.sink_eps:
        values["sink_rate", eps] = (first > eps).double().mean(0)
        values["late_sink_rate", eps] = (late > eps).double().mean(0)
    for eps in THRESHOLDS.small_eps:
        values["at_most", eps] = (weights[..., seen] <= eps).double().mean((0, -1))
    return values


def check_activations(found, hidden, states, samples):
    """Records by metric and layer against activations ``[1 + L, N, T, D]`` and transformers' hidden states ``[N, 1 + L, 1, T, D]``."""
    for layer in (None, -1, 0, 1):
        x = hidden if layer is None else hidden[layer + 1 : layer + 2]
        assert found["kurtosis", layer]["value"] == pytest.approx(moment_ratio(x), rel=1e-9)
        energies = (x**2).sum((0, 1, 2))
        share = found["top_channel_energy", layer]
        assert share["value"] == pytest.approx((energies.max() / energies.sum()).item(), rel=1e-9)
        assert share["channel"] == energies.argmax()
        for metric, values, best in (
            ("min", x, x.min()),
            ("max", x, x.max()),
            ("largest_activation", x.abs(), x.abs().max()),
            ("largest_activation_at_first", x.abs(), x[:, :, 0].abs().max()),
        ):
            r = found[metric, layer]
            assert r["value"] == pytest.approx(best.item(), rel=1e-9)
            index = 0 if layer is not None else r["in_layer"] + 1
            at = values[index, r["sample"], r["position"], r["channel"]]
            assert at.item() == pytest.approx(best.item(), rel=1e-9)
            assert r["token"] == samples[r["sample"], r["position"]]
            assert r["token_text"] == f"<{r['token']}>"
    assert found["largest_activation_at_first", None]["position"] == 0
    pooled = moment_ratio(states)
    assert found["kurtosis_hidden_states", None]["value"] == pytest.approx(pooled, rel=1e-9)
    # the final norm changes it
    assert pooled != pytest.approx(moment_ratio(hidden), rel=1e-3)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_every_number_is_that_of_dense_weights_in_any_tiling(tmp_path, normalizer):
    model = tiny(tmp_path, normalizer)
    samples = torch.randint(0, 250, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    weights, outputs, values, hidden, states, loss = dense(model, samples)
    expected = by_definition(weights, outputs, values)
    assert expected["first_value_ratio", None][1].isnan().tolist() == [False, False, True, True]
    assert expected["dead_head", None].tolist()[1] == [0, 0, 1, 1]
    # one row per tile; 5 rows, and a rest of one; all of them
    for elements in (1, 5 * 4 * LENGTH, 10**9):
        recorder = Recorder("m", "l")
        options = {"token_text": "<{}>".format, "tile_elements": elements}
        measure(model, samples, recorder, thresholds=THRESHOLDS, **options)
        found = {}
        for r in recorder.records:
            assert r["length"] == LENGTH
            found[r["metric"], r.get("eps"), r.get("position_start"), r["layer"], r["head"]] = r
        for (metric, eps), values in expected.items():
            for layer in range(2):
                for head in range(4):
                    got = found[metric, eps, None, layer, head]["value"]
                    expect = pytest.approx(values[layer, head].item(), rel=1e-9, nan_ok=True)
                    assert got == expect, metric
                if not metric.startswith("largest"):
                    got = found[metric, eps, None, layer, None]["value"]
                    assert got == pytest.approx(values[layer].nanmean().item(), rel=1e-9), metric
            whole = values.max() if metric.startswith("largest") else values.nanmean()
            got = found[metric, eps, None, None, None]["value"]
            assert got == pytest.approx(whole.item(), rel=1e-9), metric
        for start, end in position_buckets(LENGTH):
            for metric, of_rows in (
                ("row_sum_at", weights.sum(-1)),
                ("top_weight_at", weights.amax(-1)),
            ):
                values = of_rows[..., start:end].mean((0, -1))
                for layer, head in ((0, 0), (1, 3)):
                    r = found[metric, None, start, layer, head]
                    assert r["value"] == pytest.approx(values[layer, head].item(), rel=1e-9)
                    assert r["position_end"] == end
        of_outputs = {key[::3]: r for key, r in found.items() if key[1:3] + key[4:] == (None,) * 3}
        check_activations(of_outputs, hidden, states, samples)
        assert found["loss", None, None, None, None]["value"] == pytest.approx(loss, rel=1e-12)
        assert loss_of(model, samples, tile_elements=elements) == pytest.approx(loss, rel=1e-12)


def test_learned_sinks_and_windows_of_another_architecture():
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
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks += torch.tensor([-2.0, 0.0, 1.0, 3.0])
    samples = torch.randint(0, 64, (2, LENGTH + 1))
    with torch.no_grad():
        weights = [
            torch.cat(model(row[None, :-1], output_attentions=True).attentions) for row in samples
        ]
        logits = model(samples[:, :-1]).logits
    sums = torch.stack(weights).sum(-1).mean((0, -1))
    recorder = Recorder("m", "l")
    measure(model, samples, recorder, thresholds=THRESHOLDS)
    found = {(r["metric"], r["layer"], r["head"]): r["value"] for r in recorder.records}
    for layer in range(2):
        for head in range(4):
            assert found["row_sum", layer, head] == pytest.approx(
                sums[layer, head].item(), rel=1e-4
            )
    assert found["row_sum", 1, 3] < found["row_sum", 1, 0] < 1
    expected = F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()
    assert found["loss", None, None] == pytest.approx(expected, rel=1e-4)
    # of five keys at most, none is zero; those outside the window are no weights
    assert found["zeros", 0, 0] == 0


def test_a_model_that_runs_something_else_is_refused():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="must run one of parallel_softpick_attn.*got 'sdpa'"):
        measure(model, torch.zeros(1, 4).long(), Recorder("", ""), thresholds=THRESHOLDS)
    model.set_attn_implementation("naive_softmax")
    mask = torch.tensor([[0, 1, 1]])
    with (
        pytest.raises(NotImplementedError, match="a mask is not measured"),
        replaced_attention(model, lambda *a, **o: None),
    ):
        model(torch.zeros(1, 3).long(), attention_mask=mask)


def test_dead_is_what_the_output_projection_sees_behind_a_gate(tmp_path):
    model = tiny(tmp_path, "softmax")
    # closed for head 1 of layer 0
    gate = torch.ones(32)
    gate[8:16] = 0
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a: (a[0] * gate,))
    recorder = Recorder("m", "l")
    measure(model, torch.arange(LENGTH + 1)[None], recorder, thresholds=THRESHOLDS)
    found = {(r["metric"], r["layer"], r["head"]): r["value"] for r in recorder.records}
    assert [found["dead_head", 0, head] for head in range(4)] == [0, 1, 0, 0]
    assert found["empty_rows", 0, 1] == 0


def heads_by_hand(scores, values, normalizer, tile_elements=1):
    """The totals of heads whose score of key j is ``scores[head][j]`` for every query."""
    scores, values = torch.tensor(scores).double(), torch.tensor(values).double()
    HQ, T = scores.shape
    q = torch.ones(T, HQ, 1).double()
    observer = HeadObserver(T, HQ, Thresholds(), torch.device("cpu"))
    output = attend_observed(
        q,
        scores.T[..., None],
        values.T[..., None],
        observer.see,
        normalizer=normalizer,
        scale=1.0,
        tile_elements=tile_elements,
    )
    return observer.finish(output)


def test_heads_made_by_hand():
    T, low = 40, -1.0
    scores = [
        # everything on the first key; nowhere; even; the first query that has weight is the last, the last but two
        [30.0] + [low] * (T - 1),
        [low] * T,
        [math.log(2)] * T,
        [low] * (T - 1) + [5.0],
        [low] * (T - 3) + [5.0] + [low] * 2,
    ]
    totals = heads_by_hand(scores, [[1.0] * T] * 5, "softpick")
    harmonic = sum(1 / n for n in range(1, T + 1))
    assert totals.first.tolist() == pytest.approx([1, 0, harmonic / T, 0, 0], abs=1e-6)
    # 0.107 of the even head is below both
    assert totals.sinks.tolist() == [[1, 0, 0, 0, 0]] * 2
    # queries 20 to 39
    late = sum(1 / n for n in range(21, T + 1)) / 20
    assert totals.late_first.tolist() == pytest.approx([1, 0, late, 0, 0], abs=1e-6)
    assert totals.late_sinks.tolist() == [[1, 0, 0, 0, 0]] * 2
    assert totals.dormant.tolist() == [T, 0, 1, 0, 0]
    assert (totals.dormant / T > 0.95).tolist() == [True, False, False, False, False]
    weights = T * (T + 1) / 2
    assert totals.weights == weights
    assert totals.zeros.tolist() == [weights - T, weights, 0, weights - 1, weights - 3]
    assert totals.empty.tolist() == [0, T, 0, T - 1, T - 3]
    assert totals.dead.tolist() == [0, T, 0, T - 1, T - 3]
    # 39 of 40 tokens are over 95 %, 37 are not
    assert (totals.dead / T > 0.95).tolist() == [False, True, False, True, False]
    assert (totals.largest_output < 1e-6).tolist() == [False, True, False, False, False]
    logs = sum(math.log(n) for n in range(1, T + 1))
    assert totals.entropy.tolist() == pytest.approx([0, 0, logs, 0, 0], abs=1e-5)
    # the negative keys take from the sum: (e^5 - 1) / (e^5 - 1 + n (1 - 1/e)) with n of them
    top = math.expm1(5)
    sums = [top / (top + n * (1 - math.exp(-1))) for n in range(T - 3, T)]
    assert totals.row_sums.sum(0)[4].item() == pytest.approx(sum(sums), rel=1e-6)
    assert totals.max_score.tolist() == [30, low, pytest.approx(math.log(2)), 5, 5]


def test_weight_without_value_is_dead_but_not_empty():
    totals = heads_by_hand([[2.0] * 30], [[0.0] * 30], "softmax")
    assert totals.dead.tolist() == [30]
    assert totals.empty.tolist() == [0]


def test_positions_are_cut_at_powers_of_two():
    assert position_buckets(1) == [(0, 1)]
    assert position_buckets(4) == [(0, 1), (1, 2), (2, 4)]
    assert position_buckets(21) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 21)]


def test_extremes_of_several_samples_and_where_they_are():
    activations = Activations(1, torch.device("cpu"))
    x = torch.zeros(1, 3, 4)
    x[0, 1, 2], x[0, 2, 3] = 5, -7
    activations.see(1, x, sample=0)
    activations.see(1, x / 2, sample=1)
    activations.see(1, x * 2, sample=2)
    assert activations.maxima[1].value == 10
    assert activations.maxima[1].location == {"sample": 2, "position": 1, "channel": 2}
    assert activations.minima[1].value == -14
    assert activations.minima[1].location == {"sample": 2, "position": 2, "channel": 3}
    broken = x.clone()
    broken[0, 0, 1] = math.nan
    activations.see(0, x, sample=0)
    activations.see(1, broken, sample=3)
    activations.see(1, x * 9, sample=4)
    recorder = Recorder("m", "l")
    record_activations(recorder, activations, torch.zeros(5, 3, dtype=torch.long), str)
    for metric in ("min", "max", "largest_activation", "largest_activation_at_first"):
        of_layer, of_model = (
            next(r for r in recorder.records if (r["metric"], r["layer"]) == (metric, layer))
            for layer in (0, None)
        )
        assert math.isnan(of_layer["value"]), metric
        assert math.isnan(of_model["value"]), metric
        assert (of_model["in_layer"], of_model["sample"], of_model["channel"]) == (0, 3, 1)


def test_maps_are_pooled_weights(tmp_path):
    model = tiny(tmp_path, "softpick")
    row = torch.arange(LENGTH)
    with torch.no_grad():
        weights = model(row[None], output_attentions=True).attentions[1][0, 2]
    recorder = Recorder("m", "l")
    measure(model, torch.arange(LENGTH + 1)[None], recorder, thresholds=THRESHOLDS)
    record_maps(model, row, [(1, 2)], recorder, cells=6, why={(1, 2): "a test"})
    record = recorder.records[-1]
    # 21 tokens in 6 cells at most: 4 per cell, the last of 1
    assert record["tokens_in_cell"] == 4
    for i, cells in enumerate(record["map"]):
        assert len(cells) == i + 1
        for j, value in enumerate(cells):
            block = weights[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert value == pytest.approx((block.sum(-1).mean()).item(), rel=2e-3)
    assert record["value"] == pytest.approx(weights[:, 0].mean().item())


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_a_map_does_not_depend_on_the_tiling(rows):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(19, 2, 4, generator=generator).double() for _ in range(3))
    observer = MapObserver(19, 1, cells=19)
    options = {"normalizer": "softpick", "scale": 2.0, "window_size": 6}
    o = attend_observed(q, k, v, observer.see, **options, tile_elements=rows * 2 * 19)
    expected, weights = naive_normalized_attn(
        q[None], k[None], v[None], return_weights=True, **options
    )
    torch.testing.assert_close(o, expected[0], rtol=1e-9, atol=1e-12)
    got = torch.zeros(19, 19).double()
    for i, row in enumerate(observer.cells()):
        got[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(got, weights[0, 1], rtol=1e-9, atol=1e-12)
