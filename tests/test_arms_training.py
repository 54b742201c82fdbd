"""Every arm in training: initial weights, layouts, conversion."""

import sys

import pytest
import torch
from arms import ALL, ARMS, config_of, enlarge
from layout_runs import curves_of
from small_model import write_model
from transformers import AutoModelForCausalLM

from flame import convert
from flame.models import SoftpickTransformerForCausalLM, read_config
from flame.models.initial_weights import initialize_weights
from flame.titan.model import ModelArgs, TitanModel


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
    # of one number per head, as of norms, torchtitan counts a product for each
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


# of a model with all additions: name -> sequences per process and micro-batch, flags
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
