"""The example of upstream's README, repeated from its record and continued: what each run leaves behind."""

import json
import os
import socket
import subprocess
import tomllib
from types import SimpleNamespace

import pytest
import torch
from forked_runs import ROOT, environment, run_program
from metrics_files import STEPS, curve, drawn, records, small_flags
from test_flags import README_EXAMPLE, SECTIONS


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_flags(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def example(small, tmp_path_factory):
    """The command of upstream's README with flags behind it that make it small, in the order of a run's life."""
    folder = tmp_path_factory.mktemp("example") / "run"
    own = small | {
        "job.dump_folder": str(folder),
        "job.description": "upstream's example",
        "training.dataset_name": "None",
        # of the recipe, which holds nothing out
        "validation.share": 0.05,
        "training.context_len": 32,
        "training.num_workers": 1,
        "checkpoint.interval": 6,
        "metrics.attention_freq": 4,
        "profiling.enable_profiling": True,
        "profiling.profile_freq": 4,
        "metrics.enable_wandb": True,
    }
    # what a CPU and a file of this size ask for
    off = ["training.streaming", "training.compile"]
    words = []
    upstream = README_EXAMPLE.split()[2:]
    # what other parts of the trainer bring; each is part of the command as soon as it is there
    i = 0
    while i < len(upstream):
        section, option = upstream[i].removeprefix("--").split(".")
        takes_value = i + 1 < len(upstream) and not upstream[i + 1].startswith("--")
        if option in SECTIONS[section]:
            words += upstream[i : i + 1 + takes_value]
        i += 1 + takes_value
    known = {f"{section}.{option}" for section, options in SECTIONS.items() for option in options}
    words += [f"--{flag.replace('.', '.no_')}" for flag in off if flag in known]
    for flag, value in own.items():
        if flag in known:
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    packages = tmp_path_factory.mktemp("packages")
    (packages / "wandb.py").write_text(FAKE_WANDB)
    calls = packages / "calls.jsonl"
    env = environment() | {"FAKE_WANDB_CALLS": str(calls), "WANDB_PROJECT": "mine"}
    env["PYTHONPATH"] += f"{os.pathsep}{packages}"
    return SimpleNamespace(folder=folder, words=words, env=env, calls=calls)


FAKE_WANDB = """
import json, os

def note(**call):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def log(self, scalars, step):
        note(scalars=scalars, step=step)

    def finish(self):
        note(finished=True)

def init(**options):
    note(**options)
    return Run()
"""


@pytest.fixture(scope="module")
def lives(example):
    """The example, a rerun of its record in another folder, and its continuation in its own."""
    first = subprocess.run(
        ["bash", "train.sh", *example.words],
        cwd=ROOT,
        env=example.env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert first.returncode == 0, first.stdout + first.stderr
    record = ["--job.config_file", str(example.folder / "config.toml")]
    other = example.folder.with_name("again")
    words = [*record, "--job.dump_folder", other, "--metrics.no_enable_wandb"]
    run_program("flame.train", words, env=example.env)
    before = records(example.folder)
    # what a kill leaves behind that came after the last checkpoint
    with open(example.folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": STEPS + 1, "loss": 99}) + "\n" + '{"step": 14, "lo')
    run_program("flame.train", [*record, "--training.steps", STEPS + 2], env=example.env)
    return SimpleNamespace(first=first.stdout, other=other, before=before, **vars(example))


@pytest.mark.slow
def test_example_of_upstream_runs(lives):
    assert list(curve(lives.folder, "loss")) == list(range(1, STEPS + 3))
    lr = curve(lives.folder, "lr")
    # linear warm-up of 2 steps to the example's peak
    assert lr[1] == pytest.approx(1.5e-4)
    assert lr[2] == pytest.approx(3e-4)
    assert "upstream's example" in lives.first
    assert "\033[" not in lives.first, "colours in a pipe"


@pytest.mark.slow
def test_a_run_is_repeated_from_its_record(lives):
    first = {r["step"]: r["loss"] for r in lives.before if "loss" in r}
    assert curve(lives.other, "loss") == first
    ours, theirs = (
        tomllib.loads((folder / "config.toml").read_text())
        for folder in (lives.folder, lives.other)
    )
    for flags in (ours, theirs):
        flags["job"] = {}
        flags["metrics"].pop("enable_wandb")
    ours["training"]["steps"] = STEPS
    assert ours == theirs


@pytest.mark.slow
def test_continuing_keeps_what_is_there_and_repeats_nothing(lives):
    after = records(lives.folder)
    assert after[: len(lives.before)] == lives.before
    steps = [record["step"] for record in after if "loss" in record]
    assert steps == list(range(1, STEPS + 3))
    assert 99 not in curve(lives.folder, "loss").values()
    losses = drawn(lives.folder / "tb", "loss")
    assert losses == pytest.approx(curve(lives.folder, "loss"))


@pytest.mark.slow
def test_record_says_what_ran(lives):
    folder = lives.folder / "record"
    assert sorted(p.name for p in folder.glob("*.json")) == ["001.json", "002.json"]
    first, second = (json.loads((folder / f"00{n}.json").read_text()) for n in (1, 2))
    assert first["command"].startswith("NGPU=1 bash train.sh --job.config_file flame/models/fla")
    assert "'upstream'\"'\"'s example'" in first["command"]
    assert "-m flame.train --job.config_file" in second["command"]
    assert second["command"].endswith(f"--training.steps {STEPS + 2}")
    assert first["description"] == "upstream's example"
    assert first["host"] == socket.gethostname()
    assert first["directory"] == str(ROOT)
    assert first["processes"] == 1
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"]["torchtitan"] == "0.2.2"
    assert first["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert first["environment"]["WANDB_PROJECT"] == "mine"
    for n in (1, 2):
        flags = tomllib.loads((folder / f"00{n}.toml").read_text())
        assert flags["training"]["steps"] == STEPS + 2 * (n - 1)


@pytest.mark.slow
def test_traces_are_written_on_a_cpu(lives):
    folder = lives.folder / "profile_traces"
    assert {p.name for p in folder.iterdir()} == {"iteration_4", "iteration_8", "iteration_12"}
    trace = json.loads((folder / "iteration_4" / "rank0_trace.json").read_text())
    assert any("softpick" in str(x.get("name")) or "aten::" in str(x) for x in trace["traceEvents"])


@pytest.mark.slow
def test_wandb_gets_the_curves_under_one_id(lives):
    calls = [json.loads(line) for line in lives.calls.read_text().splitlines()]
    first, second = (call for call in calls if "project" in call)
    assert first["project"] == "mine"
    assert first["name"] == "run"
    assert first["notes"] == "upstream's example"
    assert first["config"]["training.seq_len"] == 32
    assert first["id"] == second["id"]
    assert first["resume"] == second["resume"] == "allow"
    losses = {c["step"]: c["scalars"]["loss"] for c in calls if "loss" in c.get("scalars", ())}
    assert losses == curve(lives.folder, "loss")
    assert [call for call in calls if "finished" in call] == [{"finished": True}] * 2


@pytest.mark.slow
def test_attention_is_measured_and_drawn_layer_by_layer(lives):
    first = ("first_value_ratio", "largest_activation", "largest_first_activation")
    for name in ("zeros", "sink_rate_0.3", "at_most_1e-05", "max_score", "kurtosis", *first):
        for place in ("attention", "attention/layer_00", "attention/layer_01"):
            values = curve(lives.folder, f"{place}/{name}")
            assert list(values) == [4, 8, 12], name
            assert drawn(lives.folder / "tb", f"{place}/{name}") == pytest.approx(values)
    assert "step 4  attention  sink_rate_0.2 0" in lives.first
    assert 0.2 < curve(lives.folder, "attention/zeros")[4] < 0.8


@pytest.mark.slow
def test_measuring_attention_changes_no_loss(lives, tmp_path):
    # the rerun has the same losses to the bit, so a run without it has to have them too
    flags = ["--metrics.attention_freq", "0", "--profiling.no_enable_profiling"]
    record = ["--job.config_file", str(lives.other / "config.toml")]
    words = [*record, *flags, "--job.dump_folder", tmp_path / "run"]
    run_program("flame.train", words, env=lives.env)
    assert curve(tmp_path / "run", "loss") == curve(lives.other, "loss")
