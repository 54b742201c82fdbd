"""Every arm of the ablations in arXiv:2504.20966: against its formula, in training, and in what transformers does with it."""

import json
import math
import sys

import pytest
import torch
from layout_runs import curves_of
from small_model import checkpoint_activations, write_model
from transformers import AutoModelForCausalLM

from flame import convert
from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM, read_config
from flame.models.attention_layer import _scale_by_length
from flame.models.initial_weights import initialize_weights
from flame.titan.model import ModelArgs, TitanModel

# name -> the normaliser, and what is added to it
ARMS = {
    "softpick": ("softpick", {}),
    "softmax": ("softmax", {}),
    "rectified": ("rectified", {}),
    "relu_softpick": ("relu_softpick", {}),
    "abs_softpick": ("abs_softpick", {}),
    "softmax_plus_one": ("softmax_plus_one", {}),
    "gpt_oss": ("softmax", {"attn_sink": True}),
    "gated": ("softmax", {"attn_gate": True}),
    "scaled softpick": ("softpick", {"attn_log_scale": True}),
    "scaled softmax": ("softmax", {"attn_log_scale": True}),
}
ALL = {"attn_sink": True, "attn_gate": True, "attn_log_scale": True}
ADDED = ("self_attn.sinks", "self_attn.log_scale", "self_attn.g_proj.weight")
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


def config_of(normalizer, additions, *, operator="naive", **shape):
    return SoftpickTransformerConfig(
        attn_impl=f"{operator}_{normalizer}_attn",
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        | additions
        | shape,
    )


def enlarge(model):
    """Weights so large that attention decides, and heads that differ in what is one number a head."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        start = 0.3 if name.endswith("log_scale") else 0.0
        if p.dim() > 1 or name.endswith(ADDED):
            values = start + 0.3 * torch.randn(p.shape, generator=generator)
            p.data.copy_(values)
    return model


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
    # float32 may stand beside a border of bfloat16
    torch.testing.assert_close(
        _scale_by_length(q, log_scale, n).double(), exact, rtol=1.01 * 2**-8, atol=0
    )


@pytest.fixture(params=["softpick", "softmax"])
def model(request):
    """A model with all that an arm may add."""
    return model_of(request.param, ALL)


def padded(lengths, side):
    """Token ids ``[B, T]``, their attention mask, and the rows without padding."""
    rows = [tokens(1, 40)[0, 20 * i :][:length] for i, length in enumerate(lengths)]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask, rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_as_keys(model, side):
    ids, mask, rows = padded([11, 4], side)
    # without position_ids: RoPE does not see where a row begins, the number of keys does
    logits = model(ids, attention_mask=mask).logits
    for row, own, present in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(own[present], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_batches_generate_what_rows_do_with_any_cache(model, cache):
    ids, mask, rows = padded([9, 4], "left")
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


def initialized(normalizer, additions):
    with torch.device("meta"):
        model = SoftpickTransformerForCausalLM(
            config_of(
                normalizer, additions, num_attention_heads=32, num_key_value_heads=32, head_dim=8
            )
        )
    model.to_empty(device="cpu")
    initialize_weights(model, 1)
    return model.state_dict()


def test_arms_share_every_common_initial_weight():
    plain = initialized("softpick", {})
    for normalizer, additions in (*ARMS.values(), ("softpick", ALL)):
        weights = initialized(normalizer, additions)
        added = weights.keys() - plain.keys()
        assert len(added) == 2 * len(additions)
        for name, x in plain.items():
            assert torch.equal(weights[name], x), name
    own = [weights[f"model.layers.{i}.self_attn.sinks"] for i in range(2)]
    assert not torch.equal(*own)
    assert 0.01 < torch.cat(own).std() < 0.03
    assert torch.equal(weights["model.layers.1.self_attn.log_scale"], torch.full((32,), 0.3))
    gate = weights["model.layers.0.self_attn.g_proj.weight"]
    assert gate.shape == (256, 32)
    assert gate.std().item() == pytest.approx(0.02, rel=0.05)


def test_transformers_initializes_an_arm_alike():
    weights = SoftpickTransformerForCausalLM(config_of("softmax", ALL)).state_dict()
    assert torch.equal(weights["model.layers.1.self_attn.log_scale"], torch.full((4,), 0.3))
    assert 0 < weights["model.layers.0.self_attn.sinks"].abs().max() < 0.1


@pytest.mark.parametrize("additions", [{}, {"attn_gate": True}, ALL])
def test_parameters_and_flops_count_what_is_added(additions):
    args = ModelArgs(config_of("softmax", additions), seed=1)
    num_parameters, flops = args.get_nparams_and_flops(TitanModel(args), 64)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    layer += 32 * 32 * ("attn_gate" in additions)
    # of one number a head, as of norms, torchtitan counts a product for each
    layer += 4 * ("attn_sink" in additions) + 4 * ("attn_log_scale" in additions)
    embedding = 97 * 32
    assert num_parameters == 2 * embedding + 2 * layer + 32
    assert flops == 6 * (num_parameters - embedding) + 12 * 2 * 32 * 64


def convert_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["flame.convert", *map(str, words)])
    convert.main()


def test_an_arm_there_and_back(tmp_path, monkeypatch, capfd):
    file = write_model(tmp_path, **ALL)
    model = enlarge(SoftpickTransformerForCausalLM(read_config(file)))
    model.save_pretrained(tmp_path / "hf")
    checkpoint, out = tmp_path / "step-0", tmp_path / "again"
    convert_command(monkeypatch, "hf-to-dcp", "--model", tmp_path / "hf", "--out", checkpoint)
    flags = ["--checkpoint", checkpoint, "--model.config", file, "--out", out]
    convert_command(monkeypatch, "dcp-to-hf", *flags)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert all(getattr(loaded.config, field) for field in ALL)
    capfd.readouterr()
    # as another arm, either way
    plain = write_model(tmp_path, normalizer="softmax")
    flags[3], flags[5] = plain, tmp_path / "plain"
    for words, message in (
        (["--model", tmp_path / "hf", "--model.config", plain], "which has no parameter"),
        (
            ["--model", tmp_path / "plain", "--model.config", file],
            "it has no model.layers.0.self_attn",
        ),
    ):
        if not (tmp_path / "plain").exists():
            SoftpickTransformerForCausalLM(read_config(plain)).save_pretrained(tmp_path / "plain")
        with pytest.raises(SystemExit):
            convert_command(monkeypatch, "hf-to-dcp", *words, "--out", tmp_path / "step-1")
        assert message in capfd.readouterr().err


TP = "--training.tensor_parallel_degree 2"
CP = "--experimental.context_parallel_degree 2"
FULL = "--activation_checkpoint.mode full"
OP = "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op"
# of a model with all additions: name -> sequences a process has at a time, flags
LAYOUTS = {
    "FSDP, full": (2, FULL),
    "TP": (4, TP),
    "TP, op, compiled": (4, f"{TP} {OP} --training.compile"),
    "CP": (4, CP),
}
PACKED = {"FSDP, packed": (2, "--training.varlen")}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Name -> [loss, gradient norm] of 10 steps and the validation loss, all by one start of two processes."""
    folder = tmp_path_factory.mktemp("arms")
    shape = {"num_hidden_layers": 1, "num_key_value_heads": 2}
    documents = (f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}." for i in range(600))
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{x}"}}\n' for x in documents))
    runs = []

    def add(name, normalizer, additions, batch_size, argv=""):
        model = write_model(folder, attn_impl=f"naive_{normalizer}_attn", **shape, **additions)
        model = model.rename(folder / f"{len(runs)}.json")
        words = (
            f"--model.config {model} --training.dataset {folder}/text.jsonl --training.seq_len 64"
        )
        words += (
            f" --job.dump_folder {folder}/run --training.steps 10 --lr_scheduler.warmup_steps 2"
        )
        words += f" --metrics.log_freq 1 --training.batch_size {batch_size} {argv}"
        runs.append((name, words.split()))

    for arm, (normalizer, additions) in ARMS.items():
        add(arm, normalizer, additions, 2)
    for name, (batch_size, argv) in (LAYOUTS | PACKED).items():
        add(name, "softpick", ALL, batch_size, argv)
    add("one process", "softpick", ALL, 4)
    add("one process, packed", "softpick", ALL, 4, "--training.varlen")
    return curves_of(runs, folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_arm_learns(curves, arm):
    losses = [loss for loss, _ in curves[arm]]
    assert losses[-1] < losses[0] - 0.5
    # and is no other arm under another name
    assert sum(curves[arm] == curve for curve in curves.values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *PACKED])
def test_additions_train_alike_in_every_layout(curves, name):
    expected = curves["one process, packed" if name in PACKED else "one process"]
    # compiled, fused operations round otherwise
    rel = 3e-5 if "compiled" in name else 1e-5
    for step, (a, b) in enumerate(zip(curves[name], expected, strict=True), 1):
        assert a == pytest.approx(b, rel=rel), f"loss and gradient norm of step {step}"
    assert curves["one process"] != curves["one process, packed"]
