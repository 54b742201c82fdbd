"""`flame.analyze` on the command line: its samples and curves, and one line for every mistake."""

import json
import re
import shutil

import pytest
import torch
from analyze_runs import export, refused, run
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel
from word_tokenizer import word_tokenizer

from flame import analyze
from flame.analysis.curves import MAX_POINTS, read_curves, record_curves
from flame.analysis.records import Recorder, read_records
from flame.analysis.samples import read_samples
from flame.base.errors import UsageError
from flame.config.sections import DataSource
from flame.data.prepare import prepare
from flame.data.tokenizer import load_tokenizer
from flame.models import read_config


def test_samples_are_the_end_of_the_text_and_begin_alike(tmp_path):
    tokenizer = load_tokenizer("byte")
    texts = ["a" * 50, "".join(chr(97 + i % 26) for i in range(35)), "short", "z" * 12]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"first_token": "text", "is_held_out": False}
    samples = read_samples(str(file), tokenizer, number=4, length=10, **options)
    # 12 letters and eos hold one sequence of 11; 35 and eos hold three, the last of them first
    expected = ["z" * 11] + [texts[1][n : n + 11] for n in (20, 10, 0)]
    assert [tokenizer.decode(row) for row in samples.tokens] == expected
    assert samples.num_documents == 2
    assert samples.share_from_end == pytest.approx(1 - 50 / 102)
    # of all of it: every third of 9 sequences
    options["is_held_out"] = True
    spread = read_samples(str(file), tokenizer, number=3, length=10, **options)
    assert [tokenizer.decode(row)[0] for row in spread.tokens] == ["z", "a", "a"]
    assert spread.num_documents == 3
    # token files of the same text give the same
    source = DataSource(str(file), None, "train", None, None, 1)
    prepare(source, tokenizer, "byte", tmp_path / "tokens", num_proc=1)
    options["is_held_out"] = False
    tokens = read_samples(str(tmp_path / "tokens"), tokenizer, number=4, length=10, **options)
    assert torch.equal(tokens.tokens, samples.tokens)
    options["first_token"] = "eos"
    rows = read_samples(str(file), tokenizer, number=2, length=10, **options).tokens
    assert rows.shape == (2, 11)
    assert rows[:, 0].tolist() == [tokenizer.eos_token_id] * 2
    # 10 letters are enough behind it, and the eos that ends a document is the last label there is
    assert tokenizer.decode(rows[1, 1:]) == texts[1][20:30]
    with pytest.raises(
        UsageError, match="--samples 10: .* has 9 sequences of 10 tokens.*longest has 51"
    ):
        read_samples(
            str(file), tokenizer, number=10, length=10, **options | {"first_token": "text"}
        )
    # held-out text is no split train
    (tmp_path / "splits").mkdir()
    for split in ("train", "test"):
        (tmp_path / "splits" / f"{split}.jsonl").write_text(file.read_text())
    folder = str(tmp_path / "splits")
    assert read_samples(folder, tokenizer, number=2, length=10, **options).tokens.shape == (2, 11)
    options["is_held_out"] = True
    with pytest.raises(UsageError, match="--data .*has splits, and training reads the split train"):
        read_samples(folder, tokenizer, number=2, length=10, **options)


def test_a_damaged_or_foreign_token_folder_is_named_after_this_flag(tmp_path):
    (tmp_path / "flame-tokens.json").write_text("{")
    with pytest.raises(UsageError, match="--data .*flame-tokens.json.*cannot be read"):
        read_samples(
            str(tmp_path),
            load_tokenizer("byte"),
            number=1,
            length=8,
            first_token="text",
            is_held_out=False,
        )


def test_long_curves_are_thinned_and_damaged_ones_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "time": 0, "loss": 1.0 * n, "other": 1}) for n in range(1000)]
    file.write_text("\n".join(lines))
    recorder = Recorder("m", "l")
    record_curves(read_curves(tmp_path), recorder)
    steps = [r["step"] for r in recorder.records]
    assert len(steps) <= MAX_POINTS
    assert (steps[0], steps[-1]) == (0, 999)
    assert all(r["value"] == r["step"] for r in recorder.records)
    # a run that writes now, or was killed
    file.write_text("\n".join([*lines, '{"step": 10']))
    assert len(read_curves(tmp_path)["loss"]) == 1000
    for damage, message in (
        ("{", "line 1001 is damaged"),
        ("[1]", "line 1001 is damaged: it is not an object with a step"),
        ('{"step": 1, "loss": "x"}', "loss must be a number, got 'x'"),
    ):
        file.write_text("\n".join([*lines, damage, ""]))
        with pytest.raises(UsageError, match=f"--run .*{message}"):
            read_curves(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "1"], "--lengths must be at least 2, got 1"),
        (["--lengths", "8", "8"], "--lengths names 8 twice"),
        (["--lengths", "513"], "--lengths 513: --model .* takes 512 tokens at most"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--samples", "9999"], "--samples 9999: --data .* sequences of 16 tokens"),
        (["--sink_eps", "1.5"], "--sink_eps must be above 0 and below 1, got 1.5"),
        (["--label", "a", "b"], "--label must have one value for each of the 1 of --model, got 2"),
        (["--label", " "], "--label must name an arm, got ' '"),
        (["--heatmap_heads", "1"], "--heatmap_heads must be layer.head, such as 3.5, got 1"),
        (["--heatmap_heads", "2.0"], "--heatmap_heads 2.0: .* layers 0 to 1 and heads 0 to 3"),
        (["--attn_implementation", "x"], "--attn_implementation must be own or one of .*; got x"),
        (["--attn_implementation", "softmax"], "was trained with naive_softpick_attn; give own"),
        (["--data", "/nowhere"], "--data '/nowhere': no such file or folder"),
        (["--model", "/nowhere"], "--model /nowhere must be a Hugging Face folder"),
        (["--run", "/nowhere"], "--run /nowhere must be the --job.dump_folder of one run: no file"),
        (["--bits", "5"], "argument --bits: invalid choice: 5"),
        (["--first_token", "pad"], "argument --first_token: invalid choice: 'pad'"),
        (["--out", "/proc/none"], "--out /proc/none cannot be written"),
        (["--out", "/etc"], "--out /etc holds files and no records.jsonl"),
        (["--run", "{empty}"], "--run .*empty: .*metrics.jsonl has none of loss"),
        (["--report_only"], "--report_only takes --out and no other flag"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(models, monkeypatch, capfd, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").touch()
    words = [word.format(empty=tmp_path / "empty") for word in words]
    # before any model is loaded
    monkeypatch.setattr(analyze, "_measure_all", None)
    given = {"--model": models / "softpick-0/hf", "--data": models / "text.txt"}
    given |= {"--lengths": 16, "--out": tmp_path / "out"}
    given = [x for flag, value in given.items() if flag not in words for x in (flag, value)]
    assert re.search(message, refused(monkeypatch, capfd, *given, *words))
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_go_together_are_refused(models, monkeypatch, capfd, tmp_path):
    options = ["--data", models / "text.txt", "--lengths", 16, "--out", tmp_path / "out"]
    softmax, softpick = models / "softmax-0/hf", models / "softpick-0/hf"
    line = refused(monkeypatch, capfd, "--model", softmax, softpick, "--label", "a", "a", *options)
    assert re.search(
        "--label a: .*softpick-0.* must be another seed of the arm of .*softmax-0", line
    )
    line = refused(monkeypatch, capfd, "--model", softmax, softmax, *options)
    assert "--model names a folder twice" in line
    other = tmp_path / "softmax-0" / "hf"
    export(other, read_config(models / "softmax_small.json"), seed=3)
    line = refused(monkeypatch, capfd, "--model", softmax, other, *options)
    assert "--label is needed, since several folders of --model give the label 'softmax-0'" in line
    word_tokenizer(20, eos_token="w1").save_pretrained(other)
    line = refused(monkeypatch, capfd, "--model", softmax, other, "--label", "a", "b", *options)
    assert "has another tokenizer than" in line
    (other / "model.safetensors").write_bytes(b"x")
    load_tokenizer("byte").save_pretrained(other)
    line = refused(monkeypatch, capfd, "--model", other, *options)
    assert re.search(r"--model .*softmax-0/hf cannot be read: SafetensorError", line)


def test_a_model_that_is_not_whole_is_refused(models, monkeypatch, capfd, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(models / "softpick-0/hf", folder)
    options = ["--model", folder, "--data", models / "text.txt", "--lengths", 16]
    options += ["--samples", 1, "--out", tmp_path / "out"]
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    for change, message in (
        ({name: None}, f"{name} is missing from its weights"),
        ({name: torch.ones(3, 3)}, f"{name} has another shape than config.json says"),
        ({"model.gate": torch.ones(3)}, "model.gate is in its weights, but no part of the model"),
        ({name: whole[name] * torch.nan}, f"{name} is not finite"),
    ):
        weights = {key: x for key, x in (whole | change).items() if x is not None}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert f"--model {folder}: " in (line := refused(monkeypatch, capfd, *options))
        assert message in line
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    line = refused(monkeypatch, capfd, *options, "--passkey_lengths", 50)
    assert re.search("--passkey_lengths 50: length must be at least [0-9]+ tokens", line)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "must hold the model's tokenizer" in refused(monkeypatch, capfd, *options)
    bert = BertConfig(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    bert.num_attention_heads = 2
    BertLMHeadModel(bert).save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    line = refused(monkeypatch, capfd, *options)
    assert f"--model {folder}: BertLMHeadModel is not a decoder that can be measured" in line
    for config, message in (("[]", "must be an object"), ('{"model_type": "resnet"}', "a decoder")):
        load_tokenizer("byte").save_pretrained(folder)
        (folder / "config.json").write_text(config)
        assert message in refused(monkeypatch, capfd, *options)


def test_an_interrupted_analysis_leaves_the_earlier_report(models, monkeypatch, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "records.jsonl").write_text("earlier")

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze, "measure", interrupt)
    words = ["--model", models / "softpick-0/hf", "--data", models / "text.txt", "--lengths", 16]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words, "--samples", 1, "--out", out)
    assert end.value.code == 130
    assert [(x.name, x.read_text()) for x in out.iterdir()] == [("records.jsonl", "earlier")]


def test_records_that_are_none_are_refused(monkeypatch, capfd, tmp_path):
    assert "cannot be read" in refused(monkeypatch, capfd, "--out", tmp_path, "--report_only")
    (tmp_path / "records.jsonl").write_text('{"metric": "loss"}\n')
    line = refused(monkeypatch, capfd, "--out", tmp_path, "--report_only")
    assert "records.jsonl, line 1 lacks one of metric, model, label" in line


@pytest.mark.parametrize(
    ("metric", "change"),
    [("setup", {"sink_eps": None}), ("kurtosis", {"layer": "x"}), ("loss", {"value": "x"})],
)
def test_damaged_records_are_refused_and_the_report_stays(
    report, monkeypatch, capfd, tmp_path, metric, change
):
    records = read_records(report / "records.jsonl")
    next(r for r in records if r["metric"] == metric).update(change)
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    line = refused(monkeypatch, capfd, f"--out={tmp_path}", "--report_only")
    assert f"--report_only: {tmp_path}/records.jsonl is damaged or of another version" in line
    assert [x.name for x in tmp_path.iterdir()] == ["records.jsonl"]
    line = refused(monkeypatch, capfd, f"--out={tmp_path}", "--report_only", "--held_out")
    assert "--report_only takes --out and no other flag" in line
