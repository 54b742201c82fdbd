"""What a run leaves behind and how it ends when something goes wrong: whole runs on a CPU, one process and two."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from forked_runs import Forked, main_of, run_program
from metrics_files import STEPS, curve, drawn, small_flags, summary

import flame.run.metrics_file as writers
from flame.base.errors import UsageError
from flame.run.metrics_file import JsonLines, require_wandb, strict_json
from flame.training.spikes import SpikeDetector

TOGETHER = pytest.param("together", marks=pytest.mark.slow)


def troubled(out, flags, names, processes):
    """Runs of `metrics_driver.py`, by name: what each rank noted, and the run's folder."""
    flags = flags | {
        "checkpoint.no_enable_checkpoint": True,
        "training.batch_size": 4 // processes,
    }
    notes = {}
    with Forked(main_of("metrics_driver", out, flags, names), processes=processes) as group:
        assert group.wait(300) == 0, group.output()
        for name in names:
            files = sorted(out.glob(f"{name}.rank*.json"))
            assert len(files) == processes, group.output()
            ranks = [json.loads(file.read_text()) for file in files]
            notes[name] = SimpleNamespace(ranks=ranks, folder=out / name, **ranks[0])
    return notes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_flags(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    names = ["plain", "skipped", "one_layer", "row", "stopped", "spike", "young_spike"]
    return troubled(tmp_path_factory.mktemp("alone"), small, names, 1)


@pytest.fixture(scope="module")
def together(small, tmp_path_factory):
    names = ["plain", "skipped", "stopped", "spike", "hang"]
    flags = small | {"metrics.save_for_all_ranks": True}
    return troubled(tmp_path_factory.mktemp("together"), flags, names, 2)


@pytest.mark.parametrize("runs", ["alone", TOGETHER])
def test_a_skipped_step_changes_nothing_on_any_rank(runs, request):
    run = request.getfixturevalue(runs)["skipped"]
    for rank in run.ranks:
        assert rank["code"] == 0
        assert rank["unchanged"] == {str(step): step in (3, 4) for step in range(1, STEPS + 1)}
    assert list(curve(run.folder, "skipped_steps").values()) == [0, 0, 1, *[2] * 9]
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


@pytest.mark.parametrize("runs", ["alone", TOGETHER])
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


@pytest.mark.parametrize(
    ("runs", "processes"), [("alone", 1), pytest.param("together", 2, marks=pytest.mark.slow)]
)
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
    detector = SpikeDetector(window=3, deviations=2)
    for loss in (1.0, 2.0, 3.0):
        assert detector.threshold() == math.inf
        detector.losses.append(loss)
    assert detector.threshold() == pytest.approx(2 + 2 * math.sqrt(2 / 3))
    assert SpikeDetector(window=3, deviations=0).threshold() == math.inf


@pytest.mark.slow
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
    assert any("trainer.py" in frame["filename"] for frame in entries[-1]["frames"])


@pytest.mark.slow
def test_every_rank_writes_with_save_for_all_ranks(together, alone):
    folder = together["plain"].folder
    own = curve(folder, "tokens_per_s", "metrics.rank1.jsonl")
    assert list(own) == list(range(1, STEPS + 1))
    assert own != curve(folder, "tokens_per_s")
    assert curve(folder, "loss", "metrics.rank1.jsonl") == curve(folder, "loss")
    assert drawn(folder / "tb" / "rank1", "loss").keys() == own.keys()
    assert not list(alone["plain"].folder.glob("metrics.rank*"))


def test_wandb_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--metrics.enable_wandb needs the package wandb"):
        require_wandb()


@pytest.mark.slow
def test_attention_over_two_processes_is_that_of_one(together):
    run = together["plain"]
    assert [step for step, _, _ in run.attention] == [4, 8, 12]
    for step, found, expected in run.attention:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
    assert curve(run.folder, "attention/zeros")[4] == run.attention[0][1]["attention/zeros"]
    # it was measured in this run and not in the other, whose eighth step is another
    without = curve(together["spike"].folder, "loss")
    assert [curve(run.folder, "loss")[step] for step in range(1, 8)] == [
        without[step] for step in range(1, 8)
    ]


def test_json_lines_repeat_nothing_and_survive_a_kill(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for start in (0, 0):
        writer = JsonLines(file, start)
        for step in (1, 2, 3):
            writer.write({"loss": float(step), "grad_norm": math.nan}, step)
        writer.write({"validation_loss": math.inf}, 3)
        writer.close()
    file.write_text(file.read_text() + '{"step": 4, "lo')
    writer = JsonLines(file, 2)
    writer.write({"loss": 7.0}, 3)
    # at once, not when it is closed
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == [1, 2, 3]
    writer.write({"validation_loss": 1.0}, 3)
    writer.close()
    before = file.read_text()
    # a finished run that is started again
    writer = JsonLines(file, 3)
    writer.write({"validation_loss": 1.0}, 3)
    writer.close()
    assert file.read_text() == before
    assert json.loads(before.splitlines()[0])["grad_norm"] is None
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UsageError, match="line 2 is damaged"):
        JsonLines(file, 3)


def test_strict_json():
    value = {"a": [math.nan, 1.5, (math.inf, "NaN")], "b": True}
    assert json.loads(strict_json(value)) == {"a": [None, 1.5, [None, "NaN"]], "b": True}


SHARED = (
    "--validation.share=0 --training.batch_size=1 --training.seq_len=32 --sample.max_new_tokens=0"
)


def refused(tmp_path, words, small, code=2):
    flags = [f"--{flag}={small[flag]}" for flag in ("model.config", "training.dataset")]
    return run_program(
        "flame.train", [*SHARED.split(), *flags, *words], cwd=tmp_path, code=code, timeout=120
    )


@pytest.mark.slow
def test_a_snapshot_of_gpu_memory_is_refused_without_a_gpu(tmp_path, small):
    line = refused(tmp_path, ["--profiling.enable_memory_snapshot"], small).stderr
    assert "--profiling.enable_memory_snapshot records a GPU's allocator" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "exp").exists()


@pytest.mark.slow
def test_memory_is_estimated_and_nothing_is_trained(tmp_path, small):
    words = ["--memory_estimation.enabled", "--training.compile"]
    sizes = {}
    for line in refused(tmp_path, words, small, code=0).stdout.splitlines():
        if line.endswith("MiB") and "estimate" not in line:
            name, size = line.split("  ", 2)[2].rsplit(maxsplit=2)[:2]
            sizes[name.strip()] = float(size)
    mib = 37_216 * 4 / 2**20
    assert sizes["Parameter"] == pytest.approx(mib, abs=0.06)
    # two moments of every weight
    assert sizes["Optstate"] == pytest.approx(2 * mib, abs=0.06)
    assert sizes["Activation"] > 0
    assert not (tmp_path / "exp").exists()


def test_a_line_fits_a_terminal(monkeypatch):
    from flame.training import metrics_processor as metrics

    pieces = [(0, "R", "step 1/2"), (2, "G", "loss 5.1234"), (3, "B", ""), (1, "C", "0:00:12 left")]
    assert metrics._fitting(pieces, 80) == "Rstep 1/2  Gloss 5.1234  C0:00:12 left"
    assert metrics._fitting(pieces, 22) == "Rstep 1/2  C0:00:12 left"
    assert [metrics._short(x) for x in (0.4, 9999, 12345, 9999999, 12345678)] == [
        "0",
        "9999",
        "12k",
        "10,000k",
        "12M",
    ]
