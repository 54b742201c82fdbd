"""`flame.analyze` on the command line: samples, records, report, and one line for every mistake."""

import json
import re
import shutil
import sys
import types
from html.parser import HTMLParser

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from small_model import write_model, write_text
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM
from word_tokenizer import word_tokenizer

from flame import analyze
from flame.analysis.curves import MAX_POINTS, read_curves, record_curves
from flame.analysis.records import KEYS, Mean, Recorder, Results, mean_of, read_records
from flame.analysis.report import html, tables
from flame.analysis.report.svg import Axis, Line, heat_map, level, line_chart
from flame.analysis.samples import read_samples
from flame.base.errors import UsageError
from flame.config.sections import DataSource, JobConfig, Training
from flame.data import load_tokenizer
from flame.data.prepare import prepare
from flame.models import SoftpickTransformerForCausalLM, read_config
from flame.run.identity import fingerprint

LENGTHS = [16, 48]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices so small that threads wait for each other, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def export(folder, config, seed):
    torch.manual_seed(seed)
    model = SoftpickTransformerForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(40)
    model.save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two seeds of softmax and of softpick, with the curves of their runs, and text."""
    root = tmp_path_factory.mktemp("models")
    write_text(root)
    for normalizer in ("softmax", "softpick"):
        config = read_config(write_model(root, normalizer=normalizer))
        for seed in (0, 1):
            run = root / f"{normalizer}-{seed}"
            export(run / "hf", config, seed)
            with open(run / "metrics.jsonl", "w") as file:
                for step in (10, 20):
                    numbers = {"step": step, "time": 1.0, "loss": 5.0 + seed - step / 10}
                    file.write(json.dumps(numbers | {"attention/zeros": 0.25}) + "\n")
    return root


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["flame.analyze", *map(str, words)])
    # models of seconds, and naive operators
    monkeypatch.setattr(analyze.torch.cuda, "is_available", lambda: False)
    analyze.main()


def refused(monkeypatch, capfd, *words):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    assert end.value.code == 2
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("flame: error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def report(models):
    """The report of all four models, with stand-ins for what quantises and what asks for passkeys."""

    def quantize_weights(model, bits, group_size=64):
        model.lm_head.weight.data *= bits

    def passkey_accuracy(model, tokenizer, length, *, depths, samples, seed):
        return {depth: depth / 2 for depth in depths}

    def passkey_loss(model, tokenizer, length, *, depths, samples, seed):
        return {d: {"with_key": 1.0, "other_key": 2.0, "without_key": 3.0} for d in depths}

    quantized = types.ModuleType("flame.analysis.quantized")
    quantized.quantize_weights = quantize_weights
    passkey = types.ModuleType("flame.analysis.passkey")
    passkey.passkey_accuracy, passkey.passkey_loss = passkey_accuracy, passkey_loss
    names = ["softmax-0", "softmax-1", "softpick-0", "softpick-1"]
    out = models / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flame.analysis.quantized", quantized)
        patch.setitem(sys.modules, "flame.analysis.passkey", passkey)
        run(
            patch,
            *["--model", *(models / name / "hf" for name in names)],
            *["--label", "softmax", "softmax", "softpick", "softpick"],
            *["--run", *(models / name for name in names)],
            *["--data", models / "text.txt", "--out", out, "--samples", 3],
            *["--lengths", *LENGTHS, "--bits", 2, 8, "--passkey_lengths", 40],
            *["--passkey_depths", 0, 1, "--first_token", "bos"],
        )
    return out


def test_records_are_complete_and_differ_between_models(report):
    lines = (report / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(list(r)[: len(KEYS)] == list(KEYS) for r in records)
    results = Results(records)
    assert results.labels == ["softmax", "softpick"]
    assert results.lengths == LENGTHS
    assert results.setup["first_token"] == "bos"
    for length in LENGTHS:
        for metric in ("first_weight", "zeros", "entropy", "dead_head", "sink_rate", "row_sum"):
            places = [(r["layer"], r["head"]) for r in results.where(metric, length=length)]
            eps = 2 if metric == "sink_rate" else 1
            # 2 layers of 4 heads, each layer, and the model, of 4 models
            assert len(places) == 4 * eps * (8 + 2 + 1)
        for metric in ("loss", "kurtosis", "zeros"):
            values = {
                r["value"] for r in results.where(metric, layer=None, head=None, length=length)
            }
            assert len(values) >= 3, metric
    assert results.of_model("zeros", "softpick", 48).mean > 0.3
    assert results.of_model("row_sum", "softmax", 48).mean == pytest.approx(1)
    curve = results.where("curve", label="softpick", name="loss", step=20)
    assert [r["value"] for r in curve] == [3.0, 4.0]
    losses = [r["value"] for r in results.where("perplexity", label="softmax", length=48)]
    # each model: as it is, 2 bits, 8 bits
    assert len(set(losses)) == 6
    # one model of each arm, two heads
    maps = results.where("attention_map")
    assert len(maps) == 4
    assert {r["model"][-4:] for r in maps} == {"0/hf"}
    assert {r["length"] for r in maps} == {16}


class Page(HTMLParser):
    """Rows of every table, titles inside drawings, what is fetched, and tags that are left open."""

    def __init__(self):
        super().__init__()
        self.tables, self.titles, self.fetched, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data")]
        assert tag not in ("script", "link", "img", "iframe", "object")
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "title" and "svg" in self.open:
            self.titles.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += text
        elif self.open[-1:] == ["title"] and "svg" in self.open:
            self.titles[-1] += text


@pytest.fixture(scope="module")
def page(report):
    parser = Page()
    parser.feed((report / "report.html").read_text())
    parser.close()
    return parser


def test_the_page_is_whole_and_needs_nothing_else(report, page):
    assert page.open == []
    assert page.fetched
    assert all(link.startswith("#") for link in page.fetched)
    text = (report / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)
    for name in ("summary", "sinks", "activations", "weights", "maps", "training", "robustness"):
        assert f'<section id="{name}">' in text
        assert f'href="#{name}"' in text
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    assert "NaN" not in text
    assert "nan" not in re.sub(r"<text.*?</text>", "", text).split()


def test_the_numbers_of_the_page_and_of_the_tables_are_those_of_the_records(report, page):
    records = read_records(report / "records.jsonl")
    results = Results(records)
    longest = page.tables[0]
    assert longest[0][:4] == ["arm", "seeds", "loss", "ppl"]
    for label, row in zip(("softmax", "softpick"), longest[1:], strict=True):
        by_title = dict(zip(longest[0], row, strict=True))
        assert by_title["arm"] == label
        for title, metric, eps, shape in (
            ("loss", "loss", None, "{:.4f} ± {:.4f}"),
            ("sink % >0.2", "sink_rate", 0.2, "{:.2f} ± {:.2f}"),
            ("zeros %", "zeros", None, "{:.2f} ± {:.2f}"),
            ("≤1e-05 %", "at_most", 1e-5, "{:.2f} ± {:.2f}"),
        ):
            a, b = (
                r["value"] * (100 if "%" in title else 1)
                for r in records
                if (r["metric"], r["label"], r["length"]) == (metric, label, 48)
                and r["layer"] is r["head"] is None
                and r.get("eps") == eps
            )
            assert by_title[title] == shape.format((a + b) / 2, abs(a - b) / 2**0.5)
    markdown = (report / "report.md").read_text()
    for table in tables.all_tables(results):
        assert [table.header, *table.rows] in page.tables or table.title == "Attention at 16 tokens"
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in markdown
    # the heat map of softpick
    for layer in range(2):
        for head in range(4):
            keys = {"label": "softpick", "layer": layer, "head": head, "length": 48}
            mean = mean_of(r["value"] for r in results.where("first_weight", **keys)).mean
            assert f"layer {layer}, head {head}: {mean:.4g}" in page.titles
    # a point of a chart
    mean = results.of_model("loss", "softpick", 16)
    assert f"softpick, 16: {mean.mean:.6g} ± {mean.std:.4g}" in page.titles


def test_the_report_can_be_drawn_again_without_the_models(report, monkeypatch):
    before = {name: (report / name).read_bytes() for name in ("report.md", "report.html")}
    for name in before:
        (report / name).unlink()
    monkeypatch.setattr(analyze, "_analyze", None)
    run(monkeypatch, "--out", report, "--report_only")
    assert {name: (report / name).read_bytes() for name in before} == before


def test_a_checkpoint_and_another_architecture(models, monkeypatch, tmp_path):
    config = read_config(models / "softpick_small.json")
    weights = export(tmp_path / "hf", config, seed=5).state_dict()
    checkpoint = tmp_path / "run" / "checkpoint" / "step-7"
    dcp.save(dict(weights), checkpoint_id=checkpoint, no_dist=True)
    asked = JobConfig(training=Training(bos="tokenizer"))
    flags = fingerprint(asked, model=config, data={}, global_batch_size=1)
    (tmp_path / "run" / "run.json").write_text(json.dumps(flags))
    options = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    for name in ("llama", "again"):
        llama = LlamaForCausalLM(LlamaConfig(**options, vocab_size=259, num_attention_heads=2))
        llama.save_pretrained(tmp_path / name)
        load_tokenizer("byte").save_pretrained(tmp_path / name)
    folders = [tmp_path / "hf", checkpoint, tmp_path / "llama", tmp_path / "again"]
    words = ["--model", *folders, "--label", "hf", "dcp", "own", "softpick", "--lengths", 12]
    words += ["--attn_implementation", "own", "own", "own", "softpick", "--samples", 2]
    words += ["--data", models / "text.txt", "--heatmap_heads", "0.1", "--out", tmp_path / "out"]
    run(monkeypatch, *words)
    results = Results(read_records(tmp_path / "out" / "records.jsonl"))

    def numbers(label):
        return [
            (r["metric"], r["layer"], r["head"], r["value"], r.get("map"))
            for r in results.records
            if r["label"] == label
        ]

    assert numbers("hf") == numbers("dcp")
    assert len(numbers("hf")) > 100
    assert results.of_model("zeros", "own", 12).mean == 0
    assert results.of_model("row_sum", "own", 12).mean == pytest.approx(1)
    assert results.of_model("zeros", "softpick", 12).mean > 0.1
    assert [r["head"] for r in results.where("attention_map")] == [1] * 4


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


def test_mean_and_spread_over_seeds():
    assert mean_of([]) is None
    assert mean_of([2.0]) == (2.0, None, 1)
    assert mean_of([1.0, 3.0]) == (2.0, pytest.approx(2**0.5), 2)
    assert tables.cell(mean_of([1.0, 3.0]), tables.number) == "2.000 ± 1.4"
    assert tables.cell(mean_of([1.0, None]), tables.loss).startswith("not finite")
    for x, text in ((33510.81, "33,511"), (0.0, "0"), (-207.55, "-207.6"), (2e-5, "2.00e-05")):
        assert tables.number(x) == text


def test_charts_place_what_they_are_given():
    line = Line(0, "a & b", {1.0: Mean(0.0, 1.0, 2), 2.0: Mean(10.0, None, 1)})
    drawing = line_chart([line], Axis("x"), Axis("y", low=0, high=10))
    # the plot reaches from 50 to 368 across and from 202 up to 10
    assert 'points="50.0,202.0 368.0,10.0"' in drawing
    assert "a &amp; b, 1: 0 ± 1" in drawing
    assert (
        line_chart([Line(0, "a", {1.0: Mean(float("nan"), None, 1)})], Axis("x"), Axis("y")) == ""
    )
    logs = line_chart(
        [Line(0, "a", {1: Mean(0.0, None, 1), 2: Mean(5.0, None, 1)})],
        Axis("x"),
        Axis("y", log=True),
    )
    assert "a, 1:" not in logs
    assert "a, 2: 5" in logs
    zeros = line_chart([Line(0, "a", {1.0: Mean(0.0, None, 1)})], Axis("x"), Axis("y"))
    assert ">1</text>" in zeros
    assert ">-" not in zeros
    assert [level(x) for x in (0, 1e-9, 0.5, 1)] == [0, 1, 10, 20]
    assert 'class="l20"' in heat_map([[0.0, 1.0]], "layer", "head", "what", most=1.0)
    assert 'class="l20"' in heat_map([[0.0, 0.1]], "layer", "head", "what", most=0.1)
    assert 'class="l2"' in heat_map([[0.0, 0.1]], "layer", "head", "what", most=1.0)


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


def test_an_arm_that_was_not_measured_everywhere_leaves_a_gap(report):
    records = read_records(report / "records.jsonl")
    results = Results([r for r in records if (r["label"], r.get("bits")) != ("softmax", 2)])
    rows = {row[0]: row for row in tables.quantized(results).rows}
    assert rows["softmax"][3] == "–"
    assert rows["softpick"][3] != "–"
    assert html.page(results).endswith("</html>\n")
