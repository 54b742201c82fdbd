"""Every arm of the ablations in arXiv:2504.20966: against its formula, in training, and in what transformers does with it."""

import json
import math

import pytest
import torch
from arms import ADDED, ALL, ARMS, config_of, enlarge
from small_model import checkpoint_activations, padded, write_model
from transformers import AutoModelForCausalLM

from flame.models import SoftpickTransformerForCausalLM, read_config
from flame.models.attention_layer import _scale_by_length
from flame.titan.model import ModelArgs, TitanModel

# numerator, denominator, constant: PAPER's section "The authors' ablations" and section 3, written with plain exp
FORMULAS = {
    "softpick": (lambda s: (s.exp() - 1).relu(), lambda s: (s.exp() - 1).abs(), 1e-6),
    "relu_softpick": (lambda s: (s.exp() - 1).relu(), lambda s: (s.exp() - 1).relu(), 1e-6),
    "abs_softpick": (lambda s: (s.exp() - 1).abs(), lambda s: (s.exp() - 1).abs(), 1e-6),
    "softmax": (torch.exp, torch.exp, 0.0),
    "softmax_plus_one": (torch.exp, torch.exp, 1.0),
    "rectified": (lambda s: s.exp() * (s >= 0), lambda s: s.exp() * (s >= 0), 0.0),
}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def model_of(normalizer, additions, **options):
    model = SoftpickTransformerForCausalLM(config_of(normalizer, additions, **options))
    return enlarge(model).eval()


def tokens(B, T):
    return torch.randint(2, 97, (B, T), generator=torch.Generator().manual_seed(0))


def reference(attention, normalizer, *, x, cos, sin):
    """One layer's attention of whole rows ``x`` ``[B, T, hidden]``, and its weights, from the formulas alone."""
    W = dict(attention.named_parameters())
    B, T, _ = x.shape

    def heads(name):
        y = (x @ W[f"{name}.weight"].T).view(B, T, -1, attention.head_dim).transpose(1, 2)
        return y.repeat_interleave(4 // y.shape[1], dim=1)

    def rotate(y):
        half = y.shape[-1] // 2
        return y * cos[:, None] + torch.cat((-y[..., half:], y[..., :half]), -1) * sin[:, None]

    s = rotate(heads("q_proj")) @ rotate(heads("k_proj")).transpose(2, 3) / math.sqrt(8)
    if "log_scale" in W:
        n = torch.tensor([float(i + 1) for i in range(T)], dtype=x.dtype, device=x.device)
        s = s * W["log_scale"][:, None, None] * n.log()[:, None]
    numerator, denominator, c = FORMULAS[normalizer]
    visible = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    Z = c + (denominator(s) * visible).sum(-1, keepdim=True)
    if "sinks" in W:
        Z = Z + W["sinks"].exp()[:, None, None]
    # a row without any term gives 0
    weights = numerator(s) * visible / torch.where(Z == 0, 1.0, Z)
    o = (weights @ heads("v_proj")).transpose(1, 2).reshape(B, T, -1)
    if "g_proj.weight" in W:
        o = o / (1 + (-(x @ W["g_proj.weight"].T)).exp())
    return o @ W["o_proj.weight"].T, weights


def logits_and_gradients(model, ids):
    model.zero_grad()
    logits = model(ids).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def check_formula(model, normalizer, ids, **tolerance):
    logits, gradients = logits_and_gradients(model, ids)
    for layer in model.model.layers:

        def forward(hidden_states, position_embeddings, attention=layer.self_attn, **_):
            cos, sin = position_embeddings
            return reference(attention, normalizer, x=hidden_states, cos=cos, sin=sin)

        layer.self_attn.forward = forward
    expected, expected_gradients = logits_and_gradients(model, ids)
    torch.testing.assert_close(logits, expected, **tolerance)
    for name, gradient in expected_gradients.items():
        # in parts of the largest, which sets the rounding of all
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            gradients[name] / scale,
            gradient / scale,
            msg=lambda m, n=name: f"{n}: {m}",
            **tolerance,
        )


@pytest.mark.parametrize("arm", [*ARMS, "all"])
def test_arm_is_its_formula(arm):
    normalizer, additions = ARMS.get(arm, ("softpick", ALL))
    model = model_of(normalizer, additions).double()
    assert sum(name.endswith(ADDED) for name, _ in model.named_parameters()) == 2 * len(additions)
    # Llama's norm is computed in float32
    check_formula(model, normalizer, tokens(2, 13), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm", [*ARMS, "all"])
def test_arm_in_triton_is_its_formula(arm, device):
    normalizer, additions = ARMS.get(arm, ("softpick", ALL))
    shape = {"num_hidden_layers": 1, "num_key_value_heads": 4}
    model = model_of(normalizer, additions, operator="parallel", **shape).to(device)
    check_formula(model, normalizer, tokens(1, 9).to(device), rtol=1e-3, atol=1e-4)


def test_scale_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 300, 8, generator=generator).bfloat16()
    log_scale, n = torch.randn(4, generator=generator), torch.arange(1, 301)[None]
    exact = q.double() * (log_scale.double()[:, None] * n.double().log()[:, None])[..., None]
    # a float32 value may be next to a rounding border of bfloat16
    torch.testing.assert_close(
        _scale_by_length(q, log_scale, n).double(), exact, rtol=1.01 * 2**-8, atol=0
    )


@pytest.fixture(params=["softpick", "softmax"])
def model(request):
    """A model with all that an arm may add."""
    return model_of(request.param, ALL)


def prompts(lengths, side):
    """Token ids ``[B, T]``, their attention mask, and the rows without padding."""
    rows = [tokens(1, 40)[0, 20 * i :][:length] for i, length in enumerate(lengths)]
    return *padded(rows, side), rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_as_keys(model, side):
    ids, mask, rows = prompts([11, 4], side)
    # without position_ids: RoPE does not see where a row begins, the number of keys does
    logits = model(ids, attention_mask=mask).logits
    for row, own, present in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(own[present], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_batches_generate_what_rows_do_with_any_cache(model, cache):
    ids, mask, rows = prompts([9, 4], "left")
    kind = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    batch = model.generate(ids, attention_mask=mask, disable_compile=True, **kind, **GREEDY)
    for row, written in zip(rows, batch, strict=True):
        expected = row[None]
        for _ in range(8):
            following = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), 1)
        assert torch.equal(written[-8:], expected[0, -8:])


def test_triton_decodes_what_the_reference_does(device):
    model = model_of("softpick", ALL).to(device)
    ids = tokens(1, 6).to(device)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.set_attn_implementation("softpick")
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)


def test_packed_rows_are_the_rows_alone(model):
    ids, bounds = tokens(1, 12), torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    places = torch.tensor([[*range(5), *range(7)]])
    separate = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], 1)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    for given in ({"position_ids": places}, {}):
        got = model(ids, **given, **packed).logits
        torch.testing.assert_close(got, separate, rtol=1e-4, atol=1e-4)
    titan = TitanModel(ModelArgs(model.config, seed=1))
    titan.load_state_dict(model.state_dict())
    # two rows of a batch, of which the second ends with its document
    got = titan(ids.view(2, 6), places.view(2, 6), bounds)
    torch.testing.assert_close(got.view(1, 12, -1), separate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(titan(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


def test_returned_weights_have_the_sink_and_the_scale(model):
    ids = tokens(2, 9)
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append((layer.input_layernorm(args[0]), kwargs)),
        with_kwargs=True,
    )
    got = model(ids, output_attentions=True).attentions[0]
    hook.remove()
    (x, kwargs), normalizer = seen[0], model.config.attn_impl.split("_")[1]
    cos, sin = kwargs["position_embeddings"]
    attention = model.model.layers[0].self_attn
    _, expected = reference(attention, normalizer, x=x, cos=cos, sin=sin)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(model):
    ids = tokens(2, 9)
    _, expected = logits_and_gradients(model, ids)
    model.train()
    checkpoint_activations(model)
    _, got = logits_and_gradients(model, ids)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "model", ["softpick", pytest.param("softmax", marks=pytest.mark.slow)], indirect=True
)
def test_a_step_without_a_cache_compiles(model):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


def test_saved_and_loaded_an_arm_stays(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert ALL.items() <= json.loads((tmp_path / "config.json").read_text()).items()


def test_additions_that_are_off_are_not_written(tmp_path):
    model_of("softpick", {"attn_gate": True}).config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["attn_gate"] is True
    assert not {"attn_sink", "attn_log_scale"} & written.keys()


@pytest.mark.parametrize("field", ["attn_sink", "attn_log_scale"])
def test_attention_that_would_leave_an_addition_out_is_refused(field):
    model = model_of("softmax", {field: True})
    for other in ("sdpa", "eager"):
        with pytest.raises(ValueError, match=f"'{other}' does not go with {field}; take one of"):
            model.set_attn_implementation(other)


def test_gated_softmax_in_torchs_own_attention():
    model, ids = model_of("softmax", {"attn_gate": True}), tokens(2, 9)
    expected = model(ids).logits
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_field_of_another_type_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="attn_sink.*bool") as error:
        read_config(write_model(tmp_path, attn_sink="yes"))
    assert "\n" not in str(error.value)
