"""`configs/sweeps/sinks.toml` at toy size: what it measures arrives in metrics, records and report."""

import json
from pathlib import Path

import pytest
from metrics_files import curve
from small_model import write_model, write_text
from sweep_standins import run_main

from flame.sweeps.plan import read_sweep

ROOT = Path(__file__).parents[2]
STATISTICS = (
    *("sink_rate_0.2", "sink_rate_0.3", "zeros", "at_most_1e-05", "max_score", "kurtosis"),
    *("first_value_ratio", "largest_activation", "largest_first_activation"),
)


def toy(folder):
    """The file with two arms, one seed, 100 steps and a small model on a CPU; what it measures stays."""
    text = (ROOT / "configs/sweeps/sinks.toml").read_text()
    first, rest = text.split("# normalisers with some")
    text = first + rest[rest.index("[run]") :]
    model = write_model(folder, num_attention_heads=2, num_key_value_heads=2)
    data = write_text(folder)
    for old, new in (
        ('"exp/sweeps/sinks"', f'"{folder}/out"'),
        ("[1, 2, 3]", "[1]"),
        ('"configs/softpick_transformer_10M.json"', f'"{model}"'),
        ('"data/miniature/tokenizer"', '"byte"'),
        ('"data/miniature/tokens_sequence"', f'"{data}"'),
        ("seq_len = 256", "seq_len = 64"),
        ("batch_size = 256", "batch_size = 2"),
        ("steps = 2400\n", "steps = 100\n"),
        ("compile = true", "compile = false"),
        ("warmup_steps = 100", "warmup_steps = 10"),
        ("share = 0.01", "share = 0.1"),
        ("interval = 2400", "interval = 100"),
        ('"parallel_softmax_attn"', '"naive_softmax_attn"'),
        ('"parallel_softpick_attn"', '"naive_softpick_attn"'),
        ('"data/miniature/heldout"\nheld_out = true', f'"{data}"'),
        ("[16, 64, 256]", "[16, 64]"),
        ("samples = 32", "samples = 4"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "sinks.toml"
    file.write_text(text)
    return file


@pytest.mark.slow
def test_every_statistic_reaches_the_report(tmp_path, monkeypatch, capsys):
    file = toy(tmp_path)
    assert run_main(monkeypatch, file) == 0, capsys.readouterr()
    runs = read_sweep(file).runs
    assert [run.arm for run in runs] == ["softmax", "softpick"]
    for run in runs:
        for name in STATISTICS:
            for place in ("attention", "attention/layer_00", "attention/layer_01"):
                values = curve(run.folder, f"{place}/{name}")
                assert list(values) == [50, 100], (place, name)
                assert all(isinstance(value, float) for value in values.values()), (place, name)
        largest, first = (
            curve(run.folder, f"attention/{name}")[100]
            for name in ("largest_activation", "largest_first_activation")
        )
        assert largest >= first > 0
    report = tmp_path / "out/report"
    records = [json.loads(line) for line in (report / "records.jsonl").read_text().splitlines()]
    drawn = {(r["label"], r["name"], r["step"]) for r in records if r.get("metric") == "curve"}
    for arm in ("softmax", "softpick"):
        for name in STATISTICS:
            assert {(arm, f"attention/{name}", step) for step in (50, 100)} <= drawn
        assert (arm, "validation_loss", 100) in drawn
    page = (report / "report.html").read_text()
    for title in ("First value ratio", "Largest activation", "Largest first activation"):
        assert f"{title} by step" in page
    lengths = {r["length"] for r in records if r.get("metric") == "sink_rate"}
    assert lengths == {16, 64}
    # every sequence begins with bos, in training and in the analysis
    assert "&lt;|bos|&gt;, as in training" in page
