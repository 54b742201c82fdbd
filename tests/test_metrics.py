"""What a run leaves behind and how it ends when something goes wrong: whole runs on a CPU, one process and two."""

import json
import math
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_flags import README_EXAMPLE, SECTIONS
from test_titan import parse_args

import flame.writers as writers
from flame.errors import UsageError
from flame.train_step import LossWatch
from flame.writers import JsonLines, WeightsAndBiases, require_wandb, strict_json

ROOT = Path(__file__).parent.parent
STEPS = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of 2 layers of width 32 and 29 KB of text."""
    folder = tmp_path_factory.mktemp("small")
    raw = json.loads((ROOT / "configs" / "softpick_transformer_tiny.json").read_text())
    raw |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    (folder / "softpick_small.json").write_text(json.dumps(raw))
    lines = (f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}.\n" for i in range(600))
    (folder / "text.txt").write_text("".join(lines))
    return {
        "model.config": str(folder / "softpick_small.json"),
        "model.tokenizer_path": "byte",
        "training.dataset": str(folder / "text.txt"),
        "training.steps": STEPS,
        "training.batch_size": 4,
        "training.seq_len": 32,
        "validation.freq": 100,
        "metrics.log_freq": 1,
        "sample.max_new_tokens": 0,
        "lr_scheduler.warmup_steps": 2,
    }


def environment():
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RANK")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def troubled(out, flags, names, processes):
    """Runs of `metrics_driver.py`, by name: what each rank noted, and the run's folder."""
    driver = str(ROOT / "tests" / "metrics_driver.py")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-m", *launcher] if processes > 1 else [sys.executable]
    flags = flags | {
        "checkpoint.no_enable_checkpoint": True,
        "training.batch_size": 4 // processes,
    }
    done = subprocess.run(
        [*command, driver, str(out), json.dumps(flags), *names],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    notes = {}
    for name in names:
        files = sorted(out.glob(f"{name}.rank*.json"))
        assert files, done.stdout + done.stderr
        ranks = [json.loads(file.read_text()) for file in files]
        notes[name] = SimpleNamespace(ranks=ranks, folder=out / name, **ranks[0])
    return notes


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    names = ["plain", "skipped", "one_layer", "row", "stopped", "spike", "young_spike"]
    return troubled(tmp_path_factory.mktemp("alone"), small, names, 1)


@pytest.fixture(scope="module")
def together(small, tmp_path_factory):
    names = ["plain", "skipped", "stopped", "spike", "hang"]
    flags = small | {"metrics.save_for_all_ranks": True, "metrics.attention_freq": 2}
    return troubled(tmp_path_factory.mktemp("together"), flags, names, 2)


def records(folder, name="metrics.jsonl"):
    def refuse(text):
        raise ValueError(f"{text} is not JSON")

    lines = (folder / name).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def curve(folder, key, name="metrics.jsonl"):
    return {record["step"]: record[key] for record in records(folder, name) if key in record}


def drawn(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def summary(folder, step):
    return json.loads((folder / "spikes" / f"step-{step}" / "summary.json").read_text())


@pytest.mark.parametrize("runs", ["alone", "together"])
def test_a_skipped_step_changes_nothing_on_any_rank(runs, request):
    run = request.getfixturevalue(runs)["skipped"]
    for rank in run.ranks:
        assert rank["code"] == 0
        assert rank["unchanged"] == {str(step): step in (3, 4) for step in range(1, STEPS + 1)}
    assert [n for n in curve(run.folder, "skipped_steps").values()] == [0, 0, 1, *[2] * 9]
    losses = curve(run.folder, "loss")
    assert [step for step, loss in losses.items() if loss is None] == [3, 4]
    # the schedule goes on
    plain = request.getfixturevalue(runs)["plain"]
    assert curve(run.folder, "lr") == curve(plain.folder, "lr")
    # step 5 has the weights that step 3 had
    assert losses[5] > curve(plain.folder, "loss")[5] + 0.1
    # one dump, as --metrics.max_dumps has it
    assert [path.name for path in (run.folder / "spikes").iterdir()] == ["step-3"]
    assert "2 skipped" in run.output


def test_an_infinite_gradient_alone_is_skipped_and_its_layer_named(alone):
    run = alone["one_layer"]
    assert run.unchanged["3"]
    seen = summary(run.folder, 3)
    assert seen["reason"] == "not finite"
    assert seen["loss"] > 0
    assert seen["gradient_norm"] is None
    bad = [name for name, x in seen["parameters"].items() if x["gradient_norm"] is None]
    assert bad == ["model.layers.1.mlp.up_proj.weight"]


def test_so_many_skipped_in_a_row_end_the_run(alone):
    run = alone["row"]
    assert run.code == 1
    assert list(run.unchanged) == ["1", "2", "3", "4", "5", "6"]
    line = run.output.splitlines()[-1]
    assert line.startswith("flame: error: rank 0: step 6: loss nan, gradient norm nan")
    assert "2 steps in a row were skipped (--training.max_skipped_steps 2)" in line
    assert str(run.folder / "spikes" / "step-6") in line


@pytest.mark.parametrize("runs", ["alone", "together"])
def test_without_the_flag_the_run_ends_at_once(runs, request):
    run = request.getfixturevalue(runs)["stopped"]
    for number, rank in enumerate(run.ranks):
        assert rank["code"] == 1
        assert list(rank["unchanged"]) == ["1", "2", "3", "4", "5"]
        line = rank["output"].splitlines()[-1]
        assert line.startswith(f"flame: error: rank {number}: step 5: loss nan")
        assert "--training.skip_nan_inf" in line
        assert "Traceback" not in rank["output"]
    assert list(curve(run.folder, "loss")) == [1, 2, 3, 4]


@pytest.mark.parametrize(("runs", "processes"), [("alone", 1), ("together", 2)])
def test_a_spike_leaves_its_batch_and_norms(runs, processes, request):
    run = request.getfixturevalue(runs)["spike"]
    plain = request.getfixturevalue(runs)["plain"]
    assert [path.name for path in (run.folder / "spikes").iterdir()] == ["step-8"]
    assert "step 8: loss" in run.output
    assert "is a spike" in run.output
    seen = summary(run.folder, 8)
    assert seen["reason"] == "spike"
    assert seen["loss"] == pytest.approx(10 * curve(plain.folder, "loss")[8], rel=1e-4)
    losses = [curve(plain.folder, "loss")[step] for step in range(3, 8)]
    mean = sum(losses) / 5
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 5)
    assert seen["threshold"] == pytest.approx(mean + 4 * deviation, rel=1e-4)
    # before clipping, and all parameters together
    total = math.sqrt(sum(x["gradient_norm"] ** 2 for x in seen["parameters"].values()))
    assert total == pytest.approx(curve(run.folder, "grad_norm")[8], rel=1e-4)
    assert len(seen["parameters"]) == 2 * 9 + 3
    rows = []
    for rank in range(processes):
        file = run.folder / "spikes" / "step-8" / f"batch.rank{rank}.pt"
        batch = torch.load(file, weights_only=True)
        assert batch["step"] == 8
        (ids,), (labels,) = batch["inputs"], batch["labels"]
        assert ids["input"].shape == labels.shape == (4 // processes, 32)
        assert torch.equal(ids["input"][:, 1:], labels[:, :-1])
        rows += ids["input"].tolist()
    assert len({tuple(row) for row in rows}) == 4


def test_no_spike_before_the_window_is_full(alone):
    assert alone["young_spike"].code == 0
    assert not (alone["young_spike"].folder / "spikes").exists()
    watch = LossWatch(window=3, deviations=2)
    for loss in (1.0, 2.0, 3.0):
        assert watch.threshold() == math.inf
        watch.losses.append(loss)
    assert watch.threshold() == pytest.approx(2 + 2 * math.sqrt(2 / 3))
    assert LossWatch(window=3, deviations=0).threshold() == math.inf


def test_a_process_that_hangs_ends_the_run_with_a_trace(together):
    run = together["hang"]
    assert run.code == 1
    line = run.output.splitlines()[-1]
    assert "step 3: another process ended, or did not answer within" in line
    assert "--comm.train_timeout_seconds 4" in line
    file = run.folder / "comm_traces" / "rank_0.json"
    assert str(file) in line
    entries = json.loads(file.read_text())
    assert entries[-1]["profiling_name"].startswith("gloo:")
    # the others have ended, the last has not
    assert {entry["state"] for entry in entries[-30:]} >= {"completed", "scheduled"} or entries


def test_every_rank_writes_with_save_for_all_ranks(together, alone):
    folder = together["plain"].folder
    own = curve(folder, "tokens_per_s", "metrics.rank1.jsonl")
    assert list(own) == list(range(1, STEPS + 1))
    assert own != curve(folder, "tokens_per_s")
    assert curve(folder, "loss", "metrics.rank1.jsonl") == curve(folder, "loss")
    assert drawn(folder / "tb" / "rank1", "loss").keys() == own.keys()
    assert not list(alone["plain"].folder.glob("metrics.rank*"))


@pytest.fixture(scope="module")
def example(small, tmp_path_factory):
    """The command of upstream's README with flags behind it that make it small, in the order of a run's life."""
    folder = tmp_path_factory.mktemp("example") / "run"
    # flags of this repository's that a CPU and a small text ask for; the last of a flag's values counts
    own = small | {
        "training.gradient_accumulation_steps": 1,
        "job.dump_folder": str(folder),
        "job.description": "upstream's example",
        "training.dataset_name": "",
        "training.max_norm": 1.5,
        "checkpoint.interval": 6,
        "metrics.attention_freq": 2,
        "profiling.enable_profiling": True,
        "profiling.profile_freq": 4,
    }
    del own["training.dataset_name"]
    switches = ["profiling.enable_profiling"]
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
    for flag in ("training.streaming", "training.varlen", "training.compile"):
        section, option = flag.split(".")
        if option in SECTIONS[section]:
            words.append(f"--{section}.no_{option}")
    for flag, value in own.items():
        words += [f"--{flag}"] if flag in switches else [f"--{flag}", str(value)]
    return SimpleNamespace(folder=folder, words=words)
