"""Checkpoints: killed at any moment, stopped by signals, continued elsewhere, started from, deleted."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forked_runs import Run
from small_model import write_model, write_text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flame.checkpoints.step_folder import (
    AtomicWriter,
    complete_checkpoints,
    has_weights_only,
    is_complete,
    newest_checkpoint,
    purge,
    read_contents,
    remove_leftovers,
    step_of,
)

ROOT = Path(__file__).parent.parent
STEPS, INTERVAL = 12, 3


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a small run: 2 layers of width 32 on 20 KB of text."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder, normalizer="softmax")
    return {
        "training.steps": STEPS,
        "training.batch_size": 4,
        "training.seq_len": 32,
        "validation.share": 0.0,
        "checkpoint.interval": INTERVAL,
        "metrics.log_freq": 1,
        "sample.max_new_tokens": 0,
        "lr_scheduler.warmup_steps": 2,
        "model.config": write_model(folder),
        "training.dataset": write_text(folder),
    }


def train(flags, folder, *, code=0, **kwargs):
    with Run(flags | {"job.dump_folder": folder}, **kwargs) as run:
        assert run.wait() == code, run.output()
    return run


def curve(folder, name="loss"):
    """Step -> value of a TensorBoard scalar, at full precision."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def steps(folder):
    return [step_of(path) for path in complete_checkpoints(folder / "checkpoint")]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that nothing interrupted."""
    return train(flags, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def seed(flags, tmp_path_factory):
    """The run that makes a seed checkpoint."""
    flags = flags | {"checkpoint.create_seed_checkpoint": True}
    return train(flags, tmp_path_factory.mktemp("seed") / "run")


def assert_same_curve(run, whole):
    expected, got = curve(whole.folder), curve(run.folder)
    # a step that a kill kept from TensorBoard was trained before the last checkpoint
    assert got == {step: expected[step] for step in got}
    assert max(got) == STEPS
    assert run.drawn() == whole.drawn()


def test_the_last_checkpoint_is_full_and_counts(whole):
    assert sorted(os.listdir(whole.folder / "checkpoint")) == ["step-12", "step-9"]
    contents = read_contents(whole.folder / "checkpoint" / f"step-{STEPS}")
    for name in ("train_state.step", "rng.states", "dataloader.sequences_seen"):
        assert name in contents
    assert any(name.startswith("optimizer") for name in contents)


# a kill loses an interval, and beside the training the steps done while the last save was being written
@pytest.mark.parametrize(("mode", "bound"), [("disabled", INTERVAL), ("async", 2 * INTERVAL)])
def test_killed_at_random_moments(flags, whole, tmp_path, mode, bound):
    rng = random.Random()
    flags = flags | {"checkpoint.async_mode": mode}
    for attempt in range(3):
        with Run(flags | {"job.dump_folder": tmp_path / "run"}, pace=0.02) as run:
            before = max(run.drawn(), default=0)
            run.wait_for_step(min(before + 1, STEPS) if attempt else 1)
            time.sleep(rng.uniform(0, 0.2))
        found = {path.name for path in (tmp_path / "run" / "checkpoint").glob("*")}
        assert all(
            is_complete(tmp_path / "run" / "checkpoint" / name)
            for name in found
            if not name.endswith((".saving", ".deleting"))
        )
        done, saved = max(run.drawn()), max(steps(tmp_path / "run"), default=0)
        assert done - saved <= bound, (done, found)
    run = train(flags, tmp_path / "run")
    assert_same_curve(run, whole)
    assert steps(tmp_path / "run") == [9, 12]


def _die(where, step):
    """SIGKILL while step-`step` is saved: before torch's metadata, before the rename, or while deleting."""
    import flame.checkpoints.step_folder as folder

    finish = folder.FileSystemWriter.finish

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def finish_or_die(self, *args, **kwargs):
        if self.final.name == f"step-{step}":
            if where == "metadata":
                die()
            if where == "rename":
                folder.fsync = die
            if where == "purge":
                folder.shutil.rmtree = die
        finish(self, *args, **kwargs)

    folder.FileSystemWriter.finish = finish_or_die


@pytest.mark.parametrize("mode", ["async", "disabled"])
@pytest.mark.parametrize(
    ("where", "left"),
    [("metadata", "step-9.saving"), ("rename", "step-9.saving"), ("purge", "step-3.deleting")],
)
def test_killed_in_mid_save(flags, whole, tmp_path, mode, where, left):
    flags = flags | {"checkpoint.async_mode": mode}
    folder = tmp_path / "run"
    train(flags, folder, code=-signal.SIGKILL, tamper=partial(_die, where, 9))
    assert left in os.listdir(folder / "checkpoint")
    assert newest_checkpoint(folder / "checkpoint").name == (
        "step-9" if where == "purge" else "step-6"
    )
    run = train(flags, folder)
    assert_same_curve(run, whole)
    assert sorted(os.listdir(folder / "checkpoint")) == ["step-12", "step-9"]


def _slow_writes(seconds):
    import flame.checkpoints.step_folder as folder

    write_data = folder.FileSystemWriter.write_data

    def slow(self, *args, **kwargs):
        time.sleep(seconds)
        return write_data(self, *args, **kwargs)

    folder.FileSystemWriter.write_data = slow


def test_training_goes_on_while_a_checkpoint_is_written(flags, whole, tmp_path):
    folder, slow = tmp_path / "run", partial(_slow_writes, 1.5)
    with Run(flags | {"job.dump_folder": folder}, tamper=slow, pace=0.1) as run:
        run.wait_for_step(INTERVAL + 1)
        assert steps(folder) == []
        assert (folder / "checkpoint" / "step-3.saving").exists()
        run.wait_for(lambda: steps(folder))
        run.send(signal.SIGKILL)
    # what was trained in the meantime is not in it
    assert max(run.drawn()) > INTERVAL
    assert steps(folder) == [INTERVAL]
    assert_same_curve(train(flags, folder), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_what_was_trained(flags, whole, tmp_path, number):
    folder = tmp_path / "run"
    slow = partial(_slow_writes, 0.5)
    with Run(flags | {"job.dump_folder": folder}, tamper=slow, pace=0.05) as run:
        # the save of step 3 is under way
        run.wait_for_step(4)
        run.send(number)
        if number == signal.SIGUSR1:
            # Slurm's time limit after Slurm's warning
            time.sleep(0.1)
            run.send(signal.SIGTERM)
        assert run.wait() == 128 + number
    assert f"{number.name} after step {max(run.drawn())}" in run.output()
    assert max(steps(folder)) == max(run.drawn()) < STEPS
    run = train(flags, folder)
    assert_same_curve(run, whole)


@pytest.mark.slow
def test_the_launcher_passes_on_sigusr1_and_lets_nohup_ignore_sighup(flags, tmp_path):
    folder = tmp_path / "run"
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    env = os.environ | {"NGPU": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    with subprocess.Popen(
        [
            "nohup",
            "bash",
            "train.sh",
            *words,
            f"--job.dump_folder={folder}",
            "--training.steps=100000",
        ],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not steps(folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        # as a terminal that closes sends it, to every process
        os.killpg(process.pid, signal.SIGHUP)
        seen = max(steps(folder))
        while max(steps(folder)) == seen and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert "Traceback" not in output
    step = int(output.split("SIGUSR1 after step ")[1].split(":")[0])
    assert max(steps(folder)) == step


def _limit_files(size):
    """Every file larger than `size` fails in the middle of step-6, as on a full disk."""
    import flame.checkpoints.step_folder as folder

    write_data = folder.FileSystemWriter.write_data

    def limited(self, *args, **kwargs):
        if self.final.name == "step-6":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return write_data(self, *args, **kwargs)

    folder.FileSystemWriter.write_data = limited


@pytest.mark.parametrize(("mode", "processes"), [("async", 2), ("disabled", 1)])
def test_a_failed_save_ends_the_run_and_keeps_the_earlier(flags, whole, tmp_path, mode, processes):
    folder = tmp_path / "run"
    flags = flags | {"checkpoint.async_mode": mode, "training.batch_size": 4 // processes}
    failed = train(
        flags, folder, code=2, processes=processes, tamper=partial(_limit_files, 60_000), pace=0.3
    )
    # one line, of each process where torchrun is not there to silence all but one
    (error,) = {line for line in failed.output().splitlines() if "error" in line}
    assert "checkpoint step-6" in error
    assert os.strerror(errno.EFBIG) in error
    assert "step-3 is kept" in error
    assert os.listdir(folder / "checkpoint") == ["step-3"]
    # the next save does not need to come to find out
    assert max(failed.drawn()) < 9
    before = failed.drawn(processes - 1)
    run = train(flags, folder, processes=processes)
    # every rank goes on with its own random state
    after = run.drawn(processes - 1)
    assert [after[step] for step in (4, 5)] == [before[step] for step in (4, 5)]
    if processes == 1:
        assert_same_curve(run, whole)
    else:
        assert run.drawn(1)[4] != run.drawn(0)[4]


def test_two_then_one_then_two_processes(flags, tmp_path):
    # softpick's gradient has a heavy tail that follows the last bits, which differ by the number of processes
    flags = flags | {"model.config": flags["model.config"].with_name("softmax_small.json")}
    train(flags | {"checkpoint.create_seed_checkpoint": True}, tmp_path / "seed")
    whole, folder = train(flags, tmp_path / "whole"), tmp_path / "run"
    flags = flags | {"checkpoint.initial_load_path": tmp_path / "seed" / "checkpoint" / "step-0"}
    for processes, how, step, saved in ((2, "KILL", 4, 3), (1, "TERM", 7, 6)):
        halves = flags | {"training.batch_size": 4 // processes, "job.dump_folder": folder}
        with Run(halves, processes=processes, pace=0.05) as run:
            run.wait_for_step(step)
            run.wait_for(lambda saved=saved: max(steps(folder), default=0) >= saved)
            run.send(signal.Signals[f"SIG{how}"])
            run.wait()
    stopped = max(steps(folder))
    run = train(flags | {"training.batch_size": 2}, folder, processes=2)
    expected, got = curve(whole.folder), curve(folder)
    assert list(got) == list(range(1, STEPS + 1))
    for step, value in got.items():
        assert value == pytest.approx(expected[step], rel=1e-5), step
    # rank 0 goes on with its random state; what torch's starts from depends on the layout
    assert [x[:2] for x in run.drawn(0).values()] == [x[:2] for x in whole.drawn().values()]
    # rank 1, which the process of one did not have, has one that follows from seed and rank
    state = int(np.random.SeedSequence([42, 1]).generate_state(1, np.uint64)[0])
    generator = random.Random(state)
    # the first draw of a step is rank 1's second
    expected = [generator.random() for _ in range(2 * (STEPS - stopped))][1::2]
    assert [run.drawn(1)[step][0] for step in range(stopped + 1, STEPS + 1)] == expected


def test_weights_only_at_the_end(flags, tmp_path):
    flags = flags | {
        "checkpoint.last_save_model_weights_only": True,
        "checkpoint.export_dtype": "bfloat16",
        "checkpoint.keep_latest_k": 1,
    }
    # the signal's checkpoint is a full one
    with Run(flags | {"job.dump_folder": tmp_path / "run"}, pace=0.05) as run:
        run.wait_for_step(4)
        run.send(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    train(flags, tmp_path / "run")
    assert steps(tmp_path / "run") == [STEPS]
    assert has_weights_only(read_contents(tmp_path / "run" / "checkpoint" / f"step-{STEPS}"))
    exported = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert exported["dtype"] == "bfloat16"
    assert "is done already" in train(flags, tmp_path / "run").output()
    longer = train(flags | {"training.steps": 20}, tmp_path / "run", code=2)
    assert "--training.steps 20" in longer.output()
    assert "holds weights only" in longer.output()


def test_arms_start_from_one_seed_checkpoint(flags, whole, seed, tmp_path):
    path = seed.folder / "checkpoint" / "step-0"
    assert f"--checkpoint.initial_load_path {path}" in seed.output()
    assert os.listdir(path.parent) == ["step-0"]
    again = train(flags | {"checkpoint.create_seed_checkpoint": True}, seed.folder, code=2)
    assert "step-0 exists already" in again.output()
    start = {
        "checkpoint.initial_load_path": path,
        "training.steps": 1,
        "checkpoint.convert_to_hf_on_save": True,
    }
    other = {"model.config": flags["model.config"].with_name("softmax_small.json")}
    softpick = train(flags | start, tmp_path / "softpick")
    train(flags | start | other, tmp_path / "softmax")
    assert curve(softpick.folder)[1] == curve(whole.folder)[1]
    assert curve(tmp_path / "softmax")[1] != curve(whole.folder)[1]
    exported = tmp_path / "softmax" / "checkpoint" / "step-1" / "hf" / "config.json"
    assert json.loads(exported.read_text())["attn_impl"] == "naive_softmax_attn"


def test_all_of_another_run_but_what_is_excluded(flags, whole, tmp_path):
    path = whole.folder / "checkpoint" / "step-9"
    start = {
        "checkpoint.initial_load_path": path,
        "checkpoint.initial_load_model_weights_only": False,
    }
    branch = train(flags | start, tmp_path / "branch")
    assert curve(branch.folder) == {x: y for x, y in curve(whole.folder).items() if x > 9}
    assert branch.drawn() == {x: y for x, y in whole.drawn().items() if x > 9}
    anew = start | {"checkpoint.exclude_from_loading": "train_state,lr_scheduler,dataloader"}
    # killed before it has a checkpoint of its own, it starts from the other again
    with Run(
        flags | anew | {"job.dump_folder": tmp_path / "anew"}, tamper=partial(_die, "metadata", 3)
    ) as run:
        assert run.wait() == -signal.SIGKILL
    anew = train(flags | anew, tmp_path / "anew")
    got = curve(anew.folder)
    assert list(got) == list(range(1, STEPS + 1))
    assert got[1] < curve(whole.folder)[1] - 0.5
    assert curve(anew.folder, "lr")[1] == curve(whole.folder, "lr")[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"initial_load_path": "/nowhere"}, ["/nowhere is not a checkpoint", "step-N"]),
        ({"initial_load_path": "{run}/checkpoint"}, ["name a checkpoint in it", "step-12"]),
        ({"initial_load_path": "{run}/hf"}, ["flame.convert hf-to-dcp --model"]),
        ({"initial_load_path": "{run}/checkpoint/step-9"}, ["embed_tokens.weight is [259, 32]", "128"]),
        ({"async_mode": "async_with_pinned_mem"}, ["for GPUs"]),
        ({"create_seed_checkpoint": True}, ["takes one process, got 2"]),
    ],
)  # fmt: skip
def test_a_wrong_start_is_refused(whole, tmp_path, monkeypatch, changed, words):
    from flame.base.errors import UsageError
    from flame.checkpoints.checkpointer import check_start
    from flame.config.parse import parse_args
    from flame.models import read_config

    monkeypatch.setenv("WORLD_SIZE", "2")
    config = parse_args([f"--job.dump_folder={tmp_path / 'new'}"])
    for name, value in changed.items():
        value = value.format(run=whole.folder) if isinstance(value, str) else value
        setattr(config.checkpoint, name, value)
    with pytest.raises(UsageError) as error:
        check_start(config, read_config(config.model.config), "cpu")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_start_that_is_over_is_refused(flags, whole, tmp_path):
    initial = whole.folder / "checkpoint" / f"step-{STEPS}"
    start = {
        "checkpoint.initial_load_path": initial,
        "checkpoint.initial_load_model_weights_only": False,
    }
    run = train(flags | start, tmp_path / "over", code=2)
    error = f"--training.steps {STEPS} must be more than the {STEPS} that"
    assert error in run.output().splitlines()[-1]
    assert not run.folder.exists()


@pytest.mark.parametrize("damage", [b"", b"junk", None], ids=["empty", "junk", "cut"])
def test_damaged_metadata_is_one_line_that_says_what_to_do(flags, whole, tmp_path, damage):
    shutil.copytree(whole.folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint" / f"step-{STEPS}"
    file = newest / ".metadata"
    file.write_bytes(file.read_bytes()[:100] if damage is None else damage)
    run = train(flags, tmp_path / "run", code=2)
    line = run.output().splitlines()[-1]
    assert line.startswith(f"flame: error: checkpoint {newest} is damaged: its .metadata")
    assert line.endswith("delete the folder, or copy it again")
    shutil.rmtree(newest)
    train(flags, tmp_path / "run")
    assert curve(tmp_path / "run") == curve(whole.folder)


def test_damaged_data_is_one_line_that_says_what_to_do(flags, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint" / f"step-{STEPS}"
    os.truncate(next(newest.glob("*.distcp")), 100)
    line = train(flags, tmp_path / "run", code=2).output().splitlines()[-1]
    assert line.startswith(f"flame: error: checkpoint {newest} cannot be loaded (EOFError")
    assert line.endswith("if it is damaged, delete the folder, or copy it again")


def test_a_file_in_the_place_of_the_checkpoints_is_refused(flags, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / "checkpoint").touch()
    line = train(flags, tmp_path / "run", code=2).output().splitlines()[-1]
    assert line.endswith("checkpoint is a file; move it away")


@pytest.mark.parametrize("kind", ["link", "file"])
def test_an_export_replaces_what_has_its_name(flags, whole, tmp_path, kind):
    shutil.copytree(whole.folder, tmp_path / "run")
    hf = tmp_path / "run" / "hf"
    hf.rename(tmp_path / "elsewhere")
    if kind == "link":
        hf.symlink_to(tmp_path / "elsewhere")
    else:
        hf.touch()
    train(flags, tmp_path / "run")
    assert (hf / "model.safetensors").is_file()
    assert not hf.is_symlink()
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert not list((tmp_path / "run").glob("hf.*"))


def test_weights_that_are_not_finite_write_no_sample(flags, tmp_path):
    # 0 / 0 in Adam's step, whose own loss is that of before
    broken = {"optimizer.eps": 0.0, "optimizer.beta2": 0.0, "optimizer.lr": 1e-300}
    flags = flags | broken | {"training.steps": 1, "sample.max_new_tokens": 3}
    line = train(flags, tmp_path / "run", code=2).output().splitlines()[-1]
    assert line.startswith(f"flame: error: the model in {tmp_path / 'run' / 'hf'} cannot be used: ")
    assert line.endswith("is not finite")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint.exclude_from_loading=model"], r"some of optimizer, lr_scheduler"),
        (["--checkpoint.exclude_from_loading=rng"], r"no_initial_load_model_weights_only"),
        (
            [
                "--checkpoint.initial_load_path=x",
                "--checkpoint.no_initial_load_model_weights_only",
                "--checkpoint.exclude_from_loading=train_state",
            ],
            "lr_scheduler together with train_state",
        ),
        (["--checkpoint.async_mode=fast"], r"--checkpoint\.async_mode"),
        (["--checkpoint.no_enable_checkpoint", "--checkpoint.initial_load_path=x"], "left out"),
        (["--checkpoint.no_enable_checkpoint", "--checkpoint.create_seed_checkpoint"], "left out"),
    ],
)
def test_a_wrong_flag_is_refused(argv, message):
    from flame.base.errors import UsageError
    from flame.config.parse import parse_args

    with pytest.raises(UsageError, match=message):
        parse_args(argv)


def test_copies_in_pinned_memory_are_kept_and_renewed(monkeypatch):
    import torch

    from flame.checkpoints.checkpointer import _Stager

    # which only a GPU's driver can pin
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    stager = _Stager(cache_staged_state_dict=True, others=("dataloader",))
    weight, buffer = torch.ones(3), [1]
    state = {"w": weight, "optimizer": {"step": torch.tensor(1)}, "dataloader": {"buffer": buffer}}
    first = stager.stage(state)
    weight += 1
    buffer += [2, 3]
    assert first["w"].tolist() == [1, 1, 1]
    assert first["dataloader"]["buffer"] == [1]
    second = stager.stage(state)
    assert second["w"] is first["w"]
    assert second["w"].tolist() == [2, 2, 2]
    assert second["optimizer"]["step"] == 1
    assert second["dataloader"]["buffer"] == [1, 2, 3]


def _checkpoint(folder, name, *, complete=True):
    (folder / name).mkdir(parents=True)
    (folder / name / "__0_0.distcp").touch()
    if complete:
        (folder / name / ".metadata").touch()


def test_what_is_purged(tmp_path):
    for step in (0, 2, 10, 4):
        _checkpoint(tmp_path, f"step-{step}")
    _checkpoint(tmp_path, "step-12.saving")
    _checkpoint(tmp_path, "step-11", complete=False)
    _checkpoint(tmp_path, "step-best")
    purge(tmp_path, 0)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [0, 2, 4, 10]
    purge(tmp_path, 2)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [4, 10]
    # a save under way is not touched
    assert (tmp_path / "step-12.saving").exists()
    _checkpoint(tmp_path, "step-2.deleting")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-4", "step-best"]


def test_links_are_deleted_and_not_what_they_lead_to(tmp_path):
    folder, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    folder.mkdir()
    _checkpoint(elsewhere, "old")
    _checkpoint(elsewhere, "half", complete=False)
    (folder / "step-1").symlink_to(elsewhere / "old")
    (folder / "step-2").symlink_to(elsewhere / "half")
    (folder / "step-3").symlink_to(tmp_path / "nowhere")
    (folder / "step-4").touch()
    _checkpoint(folder, "step-5")
    remove_leftovers(folder)
    assert sorted(os.listdir(folder)) == ["step-1", "step-5"]
    purge(folder, 1)
    assert os.listdir(folder) == ["step-5"]
    assert sorted(os.listdir(elsewhere)) == ["half", "old"]
    assert is_complete(elsewhere / "old")


def test_a_complete_checkpoint_is_never_written_over(tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    path = tmp_path / "step-1"
    _checkpoint(tmp_path, "step-1", complete=False)
    dcp.save({"x": torch.ones(2)}, storage_writer=AtomicWriter(path), no_dist=True)
    assert (path / "__0_0.distcp").stat().st_size > 0
    with pytest.raises((FileExistsError, CheckpointException), match="complete checkpoint already"):
        dcp.save({"x": torch.zeros(2)}, storage_writer=AtomicWriter(path), no_dist=True)
    loaded = {"x": torch.zeros(2)}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    assert loaded["x"].tolist() == [1, 1]


def test_a_full_disk_is_named_wherever_it_is_hit(tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from flame.checkpoints.step_folder import first_failure

    # objects and tensors; torch writes a tensor as a zip file, which ends with an error of its own
    state = {"x": torch.ones(40_000), "y": "y" * 9000}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(5000, 160_000, 15_000):
        path = tmp_path / f"step-{size}"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(CheckpointException) as error:
                dcp.save(state, storage_writer=AtomicWriter(path), no_dist=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert isinstance(first_failure(error.value), OSError), (size, first_failure(error.value))
        assert first_failure(error.value).errno == errno.EFBIG
        assert not path.exists()
