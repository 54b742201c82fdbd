"""Runs whose checkpoints are tested: 12 steps of a model of width 32, saved every third step."""

import os
import signal

import pytest
from forked_runs import Run
from trainer_runs import curve

from flame.checkpoints.step_folder import (
    complete_checkpoints,
    step_of,
)

STEPS, INTERVAL = 12, 3
slow = pytest.mark.slow


def train(flags, folder, *, code=0, **kwargs):
    with Run(flags | {"job.dump_folder": folder}, **kwargs) as run:
        assert run.wait() == code, run.output()
    return run


def steps(folder):
    return [step_of(path) for path in complete_checkpoints(folder / "checkpoint")]


def assert_same_curve(run, whole):
    expected, got = curve(whole.folder), curve(run.folder)
    # a step that a kill kept from TensorBoard was trained before the last checkpoint
    assert got == {step: expected[step] for step in got}
    assert max(got) == STEPS
    assert run.drawn() == whole.drawn()


def die(where, step):
    """SIGKILL while step-`step` is saved: before torch's metadata, before the rename, or while deleting."""
    import flame.checkpoints.step_folder as folder

    finish = folder.FileSystemWriter.finish

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def finish_or_die(self, *args, **kwargs):
        if self.final.name == f"step-{step}":
            if where == "metadata":
                kill()
            if where == "rename":
                folder.fsync = kill
            if where == "purge":
                folder.shutil.rmtree = kill
        finish(self, *args, **kwargs)

    folder.FileSystemWriter.finish = finish_or_die
