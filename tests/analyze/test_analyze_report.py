"""`flame.analyze` on the command line: records, and the report that is drawn from them."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
import torch.distributed.checkpoint as dcp
from analyze_runs import LENGTHS, export, run
from transformers import LlamaConfig, LlamaForCausalLM

from flame import analyze
from flame.analysis.records import KEYS, Mean, Results, mean_of, read_records
from flame.analysis.report import answers, html, markdown, tables
from flame.analysis.report.maps import heat_map, level
from flame.analysis.report.svg import Axis, Line, line_chart
from flame.config.sections import JobConfig, Training
from flame.data.tokenizer import load_tokenizer
from flame.models import read_config
from flame.run.fingerprint import fingerprint


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
        self.abbreviations, self.terms = set(), []

    def handle_starttag(self, tag, attributes):
        self.fetched += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data")]
        assert tag not in ("script", "link", "img", "iframe", "object")
        if tag not in ("meta", "wbr"):
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
        if self.open[-1:] == ["abbr"]:
            self.abbreviations.add(text)
        elif self.open[-1:] == ["dt"]:
            self.terms.append(text)
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
    # on hover, and where there is no mouse
    assert page.abbreviations >= set(page.terms)
    assert {"loss", "kurtosis", "zeros %", "dormant %", "top weight", "token"} <= set(page.terms)
    assert page.fetched
    assert all(link.startswith("#") for link in page.fetched)
    text = (report / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)
    for name in (
        "summary",
        "sinks",
        "activations",
        "interventions",
        "weights",
        "maps",
        "training",
        "robustness",
    ):
        assert f'<section id="{name}">' in text
        assert f'href="#{name}"' in text
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    assert "NaN" not in text
    assert "nan" not in re.sub(r"<text.*?</text>", "", text).split()


def test_the_numbers_of_the_page_and_of_the_tables_are_those_of_the_records(report, page):
    records = read_records(report / "records.jsonl")
    results = Results(records)
    glance = answers.table(results)
    assert [glance.header, *glance.rows] == page.tables[0]
    longest = page.tables[1]
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
    for title, text in answers.sentences(results):
        assert f"- **{title}**: {text}" in markdown
    for table in [glance, *tables.all_tables(results)]:
        assert [table.header, *table.rows] in page.tables
        for row in table.rows:
            cells = [x.replace("|", "\\|").replace("<", "&lt;") for x in row]
            assert "| " + " | ".join(cells) + " |" in markdown
    at_48 = tables.sinks(results, 48)
    by_title = dict(zip(at_48.header, at_48.rows[1], strict=True))
    for title, metric, eps in (
        ("sink % >0.2, later half", "late_sink_rate", 0.2),
        ("value norm, first token / others", "first_value_ratio", None),
        ("sum of a row", "row_sum", None),
        ("at position 0", "largest_activation_at_first", None),
        ("energy in top channel %", "top_channel_energy", None),
        ("kurtosis of hidden_states", "kurtosis_hidden_states", None),
    ):
        mean = results.of_model(metric, "softpick", 48, eps=eps)
        show, factor = (tables.percent, 100) if "%" in title else (tables.number, 1)
        assert by_title[title] == tables.cell(mean, show, factor) != "–"
    with_sinks = []
    changes, rates = tables.interventions(results, 48)
    assert changes.title.startswith("Interventions at 48 tokens: change of the loss")
    for row, rate, label in zip(changes.rows, rates.rows, results.labels, strict=True):
        r = results.where("intervention", label=label, length=48, name="first_token_removed")
        a, b = (x["value"] - x["before"] for x in r)
        assert row[3].lstrip("+") == f"{(a + b) / 2:.4f} ± {abs(a - b) / 2**0.5:.4f}"
        cut = results.where("intervention", label=label, length=48, name="sinks_cut")
        number = sum(x["heads"] > 0 for x in cut)
        ends = {0: "none", 1: " (1 of 2 seeds)", 2: ""}[number]
        assert row[6].endswith(ends)
        assert rate[6].endswith(ends)
        with_sinks.append(number)
    # of seeds with and without sink heads
    assert sorted(with_sinks) == [0, 1]
    where = tables.extremes(results, 48)
    assert len(where.rows) == 4 * len(tables.EXTREMES)
    at_first = [row for row in where.rows if row[1] == "largest absolute at position 0"]
    # the byte tokenizer's bos
    assert {(row[5], row[7]) for row in at_first} == {("0", "256 <|bos|>")}
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
    # only the checkpoint has a run.json above it
    trained = {r["label"]: (r["training_length"], r["seed"]) for r in results.models}
    of_run = asked.training.seq_len, asked.training.seed
    assert trained == dict.fromkeys(("hf", "own", "softpick"), (None, None)) | {"dcp": of_run}


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
    # the plot reaches from 50 to 368 across and from 202 up to 26
    assert 'points="50.0,202.0 368.0,26.0"' in drawing
    assert "log scale" not in drawing
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
    assert ">y, log scale</text>" in logs
    zeros = line_chart([Line(0, "a", {1.0: Mean(0.0, None, 1)})], Axis("x"), Axis("y"))
    assert ">1</text>" in zeros
    assert ">-" not in zeros
    assert [level(x) for x in (0, 1e-9, 0.5, 1)] == [0, 1, 10, 20]
    assert 'class="l20"' in heat_map([[0.0, 1.0]], "layer", "head", "what", most=1.0)
    assert 'class="l20"' in heat_map([[0.0, 0.1]], "layer", "head", "what", most=0.1)
    assert 'class="l2"' in heat_map([[0.0, 0.1]], "layer", "head", "what", most=1.0)


def test_an_arm_that_was_not_measured_everywhere_leaves_a_gap(report):
    records = read_records(report / "records.jsonl")
    results = Results([r for r in records if (r["label"], r.get("bits")) != ("softmax", 2)])
    rows = {row[0]: row for row in tables.quantized(results).rows}
    assert rows["softmax"][3] == "–"
    assert rows["softpick"][3] != "–"
    assert html.page(results).endswith("</html>\n")


def test_records_of_before_the_newer_metrics_are_drawn(report):
    newer = ("late_", "first_value", "top_channel", "largest_activation", "intervention")
    records = [
        {key: x for key, x in r.items() if not key.startswith("token")}
        for r in read_records(report / "records.jsonl")
        if not r["metric"].startswith((*newer, "kurtosis_hidden"))
    ]
    maps = [r for r in read_records(report / "records.jsonl") if r["metric"] == "attention_map"]
    results = Results([r for r in records if r["metric"] != "attention_map"] + maps)
    assert tables.sinks(results, 48).rows[0][3] == "–"
    assert {row[-1] for row in tables.extremes(results, 48).rows} == {"–"}
    assert html.page(results).endswith("</html>\n")
    assert "Interventions" not in markdown.report(results)


def test_records_that_are_not_finite_are_drawn(report):
    records = read_records(report / "records.jsonl")
    for r in records:
        match r["metric"]:
            case "intervention":
                r["before"] = None
            case "first_weight" if (r["layer"], r["head"]) == (0, 0):
                r["value"] = None
            case "attention_map":
                r["map"][0][0] = None
    results = Results(records)
    changes, _ = tables.interventions(results, 48)
    assert changes.rows[0][1].startswith("not finite")
    assert changes.rows[0][3].startswith("not finite")
    assert "layer 0, head 0: not finite" in html.page(results)
