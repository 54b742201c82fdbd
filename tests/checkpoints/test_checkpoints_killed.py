"""Runs that are killed at any moment, stopped by signals, out of disk, continued by more or fewer processes."""

import errno
import os
import random
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoint_runs import INTERVAL, STEPS, assert_same_curve, curve, die, slow, steps, train
from forked_runs import Run, environment, flag_words

from flame.checkpoints.step_folder import (
    is_complete,
    newest_checkpoint,
    read_contents,
)

ROOT = Path(__file__).parents[2]


def test_the_last_checkpoint_is_full_and_counts(whole):
    assert sorted(os.listdir(whole.folder / "checkpoint")) == ["step-12", "step-9"]
    contents = read_contents(whole.folder / "checkpoint" / f"step-{STEPS}")
    for name in ("train_state.step", "rng.states", "dataloader.sequences_seen"):
        assert name in contents
    assert any(name.startswith("optimizer") for name in contents)


# a kill loses an interval, and in addition the steps done while the last save was being written
@pytest.mark.parametrize(
    ("mode", "bound"),
    [pytest.param("disabled", INTERVAL, marks=slow), ("async", 2 * INTERVAL)],
)
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


@pytest.mark.parametrize("mode", ["async", pytest.param("disabled", marks=slow)])
@pytest.mark.parametrize(
    ("where", "left"),
    [
        pytest.param("metadata", "step-9.saving", marks=slow),
        ("rename", "step-9.saving"),
        ("purge", "step-3.deleting"),
    ],
)
def test_killed_in_mid_save(flags, whole, tmp_path, mode, where, left):
    flags = flags | {"checkpoint.async_mode": mode}
    folder = tmp_path / "run"
    train(flags, folder, code=-signal.SIGKILL, tamper=partial(die, where, 9))
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


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGUSR1,
        pytest.param(signal.SIGHUP, marks=slow),
        pytest.param(signal.SIGINT, marks=slow),
    ],
)
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


@slow
def test_the_launcher_passes_on_sigusr1_and_lets_nohup_ignore_sighup(flags, tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen(
        [
            "nohup",
            "bash",
            "train.sh",
            *flag_words(flags | {"job.dump_folder": folder, "training.steps": 100000}),
        ],
        cwd=ROOT,
        env=environment(NGPU="2"),
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


@pytest.mark.parametrize(
    ("mode", "processes"), [pytest.param("async", 2, marks=slow), ("disabled", 1)]
)
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


@slow
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
