"""Checkpoints to Hugging Face folders and back, on the command line and bit for bit."""

import json
import os
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked_runs import run_program
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from small_model import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flame import convert
from flame.base.errors import UsageError
from flame.checkpoints import huggingface
from flame.checkpoints.huggingface import hf_to_dcp
from flame.checkpoints.step_folder import is_complete, read_contents
from flame.config.sections import JobConfig, Training
from flame.data.tokenizer import TOKENIZER_KEY, load_tokenizer, tokenizer_sha256
from flame.data.train_tokenizer import train_tokenizer
from flame.models import SoftpickTransformerForCausalLM, read_config
from flame.run.export import export_model
from flame.run.fingerprint import fingerprint
from flame.run.record import PACKAGES


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def source(request, tmp_path):
    """Model configuration, its JSON file, a checkpoint of random weights, and these weights."""
    written = write_model(tmp_path, num_key_value_heads=2, tie_word_embeddings=request.param)
    file = written.rename(tmp_path / "model.json")
    config = read_config(file)
    weights = SoftpickTransformerForCausalLM(config).state_dict()
    # bfloat16's values, so that every dtype here can hold them; no two are swapped unseen
    weights = {name: (x + torch.randn_like(x)).bfloat16().float() for name, x in weights.items()}
    if request.param:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    dcp.save(dict(weights), checkpoint_id=tmp_path / "step-5", no_dist=True)
    return config, file, tmp_path / "step-5", weights


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["flame.convert", *map(str, words)])
    convert.main()


def refused(monkeypatch, capfd, *words):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    assert end.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def loaded(checkpoint):
    tensors = {name: torch.empty(shape) for name, shape in read_contents(checkpoint).items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_and_there(source, tmp_path, monkeypatch, dtype):
    config, file, checkpoint, weights = source
    first, back, second = tmp_path / "hf", tmp_path / "init" / "step-0", tmp_path / "hf2"
    flags = ["--model.config", file, "--dtype", dtype, "--max_shard_size", "20KB"]
    run(monkeypatch, "dcp-to-hf", "--checkpoint", checkpoint, "--out", first, *flags)
    run(monkeypatch, "hf-to-dcp", "--model", first, "--out", back)
    run(monkeypatch, "dcp-to-hf", "--checkpoint", back, "--out", second, *flags)
    assert_equal(loaded(back), weights)
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(files) > 2
    # a matrix that is larger has a file of its own
    largest = max(x.numel() * (4 if dtype == "float32" else 2) for x in weights.values())
    assert all((first / name).stat().st_size < max(20_000, largest) + 2000 for name in files)
    for name in (*files, "model.safetensors.index.json", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    model = AutoModelForCausalLM.from_pretrained(first)
    assert model.dtype == getattr(torch, dtype)
    assert_equal({name: x.float() for name, x in model.state_dict().items()}, weights)
    assert model.config.attn_impl == config.attn_impl
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(first).pad_token_id == 258
    assert sorted(os.listdir(tmp_path)) == ["hf", "hf2", "init", "model.json", "step-5"]


def test_the_folder_is_what_transformers_writes(source, tmp_path):
    config, _, checkpoint, weights = source
    tokenizer = load_tokenizer("byte")
    export_model(checkpoint, config=config, tokenizer=tokenizer, out=tmp_path / "ours")
    model = SoftpickTransformerForCausalLM(config)
    model.load_state_dict(weights)
    for x in (model.config, model.generation_config):
        x.bos_token_id, x.eos_token_id, x.pad_token_id = 256, 257, 258
    # without these transformers samples from the 50 likeliest tokens
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((tmp_path / x / name).read_text()) for x in ("ours", "theirs"))
        assert ours == theirs
    assert_equal(*(load_file(tmp_path / x / "model.safetensors") for x in ("ours", "theirs")))


@pytest.fixture
def llama(source, tmp_path):
    config, file, _, _ = source
    wanted = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        *convert._MEANING,
    )
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in wanted}))
    llama.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    raw = json.loads(file.read_text()) | {"attn_impl": "naive_softmax_attn"}
    (tmp_path / "softmax.json").write_text(json.dumps(raw))
    return llama.eval(), tmp_path / "llama", tmp_path / "softmax.json"


def test_a_llama_is_the_softmax_arm(llama, tmp_path, monkeypatch):
    model, folder, file = llama
    run(
        monkeypatch, "hf-to-dcp", "--model", folder, "--model.config", file, "--out", tmp_path / "s"
    )
    run(monkeypatch, "dcp-to-hf", "--checkpoint", tmp_path / "s", "--model.config", file, "--out", tmp_path / "hf")  # fmt: skip
    ids = torch.arange(40)[None]
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_is_no_source_is_refused(llama, source, tmp_path, monkeypatch, capfd):
    config, file, checkpoint, _ = source
    _, folder, softmax = llama
    out = tmp_path / "out"

    def hf(*words):
        return refused(monkeypatch, capfd, "hf-to-dcp", "--out", out, *words)

    def dcp_(*words):
        return refused(monkeypatch, capfd, "dcp-to-hf", "--out", out, *words)

    assert "is a Llama, which names no attn_impl: add --model.config" in hf("--model", folder)
    raw = json.loads(softmax.read_text())
    for key, value in (("num_attention_heads", 8), ("rms_norm_eps", 1e-5)):
        (tmp_path / "other.json").write_text(json.dumps(raw | {key: value}))
        line = hf("--model", folder, "--model.config", tmp_path / "other.json")
        assert f"{key} must be {value}, got {raw[key]}" in line
    (tmp_path / "other.json").write_text(json.dumps(raw | {"intermediate_size": 48}))
    line = hf("--model", folder, "--model.config", tmp_path / "other.json")
    assert "gate_proj.weight must have the shape [48, 32], got [64, 32]" in line
    line = dcp_("--checkpoint", checkpoint, "--model.config", tmp_path / "other.json")
    assert "gate_proj.weight must have the shape [48, 32], got [64, 32]" in line
    assert "has no usable config.json" in hf("--model", tmp_path / "nowhere")
    assert "is not a complete checkpoint" in dcp_("--checkpoint", tmp_path, "--model.config", file)
    small = ["--checkpoint", checkpoint, "--model.config", file]
    assert "--max_shard_size: expected a size such as 500MB or 2GB, got '2'" in dcp_(*small, "--max_shard_size", "2")  # fmt: skip
    assert "--dtype: invalid choice: 'int8'" in dcp_(*small, "--dtype", "int8")
    assert "the following arguments are required: --model" in hf()
    (tmp_path / "there").mkdir()
    line = refused(monkeypatch, capfd, "hf-to-dcp", "--model", folder, "--out", tmp_path / "there")
    assert "exists already; name a new folder" in line
    blocked = refused(monkeypatch, capfd, "dcp-to-hf", *small, "--out", file / "out")
    assert f"--out {file / 'out'} cannot be written" in blocked
    part = next(folder.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    line = hf("--model", folder, "--model.config", softmax)
    assert f"--model {folder} cannot be read: SafetensorError" in line
    part.unlink()
    assert f"No such file or directory: {folder}" in hf("--model", folder, "--model.config", softmax).replace('"', "")  # fmt: skip
    (folder / "model.safetensors.index.json").unlink()
    assert "has no model.safetensors" in hf("--model", folder, "--model.config", softmax)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "must be a softpick_transformer or a llama, got 'gpt2'" in hf("--model", folder, "--model.config", softmax)  # fmt: skip
    assert not out.exists()


def test_a_damaged_checkpoint_is_named_and_nothing_is_left(source, tmp_path, monkeypatch, capfd):
    _, file, checkpoint, _ = source
    words = ["dcp-to-hf", "--checkpoint", checkpoint, "--model.config", file]
    words += ["--out", tmp_path / "out"]
    before = sorted(os.listdir(tmp_path))
    part = next(checkpoint.glob("*.distcp"))
    os.truncate(part, part.stat().st_size // 2)
    line = refused(monkeypatch, capfd, *words)
    assert line.startswith(f"flame: error: --checkpoint {checkpoint}: ")
    assert "Traceback" not in line
    (checkpoint / ".metadata").write_bytes(b"junk")
    line = refused(monkeypatch, capfd, *words)
    assert f"checkpoint {checkpoint} is damaged: its .metadata cannot be read" in line
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("out", ["", "..", "dangling"])
def test_a_name_that_is_no_new_folder_is_refused(source, tmp_path, monkeypatch, capfd, out):
    _, file, checkpoint, _ = source
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    out = tmp_path / out if out else ""
    words = ["--checkpoint", checkpoint, "--model.config", file, "--out", out]
    line = refused(monkeypatch, capfd, "dcp-to-hf", *words)
    assert "--out" in line
    assert "new folder" in line


def test_a_killed_export_leaves_the_earlier_one(source, tmp_path, monkeypatch):
    config, _, checkpoint, _ = source
    arguments = {"config": config, "tokenizer": load_tokenizer("byte"), "out": tmp_path / "hf"}
    export_model(checkpoint, **arguments)
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "save_file", die)
        with pytest.raises(KeyboardInterrupt):
            export_model(checkpoint, dtype=torch.bfloat16, **arguments)
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    export_model(checkpoint, dtype=torch.bfloat16, **arguments)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.glob("hf*")) == ["hf"]


@pytest.mark.parametrize("source", [True], ids=["tied"], indirect=True)
def test_tied_weights_that_differ_are_refused(source, tmp_path):
    config, _, _, weights = source
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    dcp.save(dict(weights), checkpoint_id=tmp_path / "step-6", no_dist=True)
    with pytest.raises(UsageError, match=r"tied weights lm_head\.weight that differ"):
        export_model(
            tmp_path / "step-6",
            config=config,
            tokenizer=load_tokenizer("byte"),
            out=tmp_path / "hf",
        )
    assert not (tmp_path / "hf").exists()


def test_help_names_every_flag(monkeypatch, capfd):
    text = run_program("flame.convert", ["-h"]).stdout
    assert "dcp-to-hf" in text
    assert "hf-to-dcp" in text
    for command, names in (
        ("dcp-to-hf", ["--checkpoint", "--model.config", "--model.tokenizer_path", "--out", "--dtype"]),
        ("hf-to-dcp", ["--model ", "--model.config", "--out"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="0"):
            run(monkeypatch, command, "-h")
        text = capfd.readouterr().out
        assert all(name in text for name in names)


def test_the_checkpoint_is_complete(source, tmp_path):
    config, _, checkpoint, _ = source
    export_model(checkpoint, config=config, tokenizer=load_tokenizer("byte"), out=tmp_path / "hf")
    hf_to_dcp(tmp_path / "hf", config=config, out=tmp_path / "a" / "b")
    assert is_complete(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("source", [False], ids=["untied"], indirect=True)
def test_a_run_says_what_its_checkpoint_is(source, tmp_path, monkeypatch, capfd):
    config, file, checkpoint, _ = source
    asked = JobConfig(training=Training(bos="sequence", seq_len=64))
    tokenizer = train_tokenizer(["a text to learn from, and some more of it"] * 9, vocab_size=260)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    asked.model.tokenizer_path = str(tmp_path / "tokenizer")
    data = {TOKENIZER_KEY: tokenizer_sha256(tokenizer)}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint").mkdir()
    checkpoint = checkpoint.rename(folder / "checkpoint" / "step-5")
    made = fingerprint(asked, model=config, data=data, global_batch_size=16)
    (folder / "run.json").write_text(json.dumps(made))
    lines = [{"step": 5, "time": 0, "loss": 2.5}, {"step": 5, "time": 0, "validation_loss": 2.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "record").mkdir()
    record = {"command": "NGPU=1 bash train.sh --training.data_files 'a|b'", "device": "2 x x86_64"}
    record |= {"git": {"commit": "abc", "patch": None}, "versions": dict.fromkeys(PACKAGES, "1.0")}
    (folder / "record" / "001.json").write_text(json.dumps(record))

    words = ["dcp-to-hf", "--checkpoint", checkpoint, "--out"]
    old_mask = os.umask(0o027)
    try:
        run(monkeypatch, *words, tmp_path / "hf")
    finally:
        os.umask(old_mask)
    exported = read_config(tmp_path / "hf")
    assert (exported.attn_impl, exported.rope_parameters) == (
        config.attn_impl,
        config.rope_parameters,
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("a").input_ids[0] == tokenizer.bos_token_id
    # others may read what the umask lets them
    for path in (tmp_path / "hf").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path
    assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o750

    card = (tmp_path / "hf" / "README.md").read_text()
    header = ModelCard(card).data
    assert (header.library_name, header.pipeline_tag) == ("transformers", "text-generation")
    assert "softpick" in header.tags
    rows = (
        "| attention normalizer | softpick |",
        "| a text begins with | <\\|bos\\|> (`--training.bos sequence`), which the tokenizer adds |",
        "| training | step 5, 5,120 tokens |",
        "| sequence length | 64 tokens |",
        "| data | python-docs |",
        "| training loss | 2.5000 nats per token at step 5 |",
        "| validation loss | 2.7500 nats per token at step 5 |",
        "| command | `NGPU=1 bash train.sh --training.data_files 'a\\|b'` |",
        "| commit | abc |",
    )
    for row in rows:
        assert row in card.splitlines(), row
    code = card.split("```python\n")[1].split("```")[0]
    assert code.startswith("import flame.models")
    names: dict = {}
    exec(code, names)
    assert names["model"].config.attn_impl == config.attn_impl

    # the same again is fine; what contradicts it is not
    own = ["--model.config", file, "--model.tokenizer_path", tmp_path / "tokenizer"]
    run(monkeypatch, *words, tmp_path / "again", *own, "--training.bos", "sequence")
    capfd.readouterr()
    raw = json.loads(file.read_text())
    for key, value in (
        ("attn_impl", "naive_softmax_attn"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
    ):
        (tmp_path / "other.json").write_text(json.dumps(raw | {key: value}))
        line = refused(
            monkeypatch, capfd, *words, tmp_path / "no", "--model.config", tmp_path / "other.json"
        )
        assert f"other.json: {key} is " in line
        assert "leave the flag out" in line
    line = refused(monkeypatch, capfd, *words, tmp_path / "no", "--model.tokenizer_path", "byte")
    assert "--model.tokenizer_path byte: its sha256 is " in line
    line = refused(monkeypatch, capfd, *words, tmp_path / "no", "--training.bos", "none")
    assert "--training.bos: the mode is 'none', but --checkpoint" in line
    # the tokenizer's folder may have changed since
    load_tokenizer("byte").save_pretrained(tmp_path / "tokenizer")
    line = refused(monkeypatch, capfd, *words, tmp_path / "no")
    assert "tokenizer: its sha256 is " in line
    assert not (tmp_path / "no").exists()
