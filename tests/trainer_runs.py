"""Runs of the trainer in forked processes, and `bash train.sh` with processes of its own."""

import subprocess
import time
from pathlib import Path

import pytest
from forked_runs import ROOT, environment, flag_words, run_program
from metrics_files import drawn
from small_model import write_model, write_text

STEPS = 8
slow = pytest.mark.slow
# what makes a run of seconds: 2 layers of width 32 on 20 KB of text
FLAGS = {
    "training.steps": STEPS,
    "training.batch_size": 4,
    "training.seq_len": 32,
    # with 42 a score next to zero gives softpick a gradient norm of 61 in step 3, which carries the last bit
    # into the fifth digit of the loss
    "training.seed": 43,
    "validation.freq": 4,
    "checkpoint.interval": 2,
    "metrics.log_freq": 1,
    "sample.max_new_tokens": 5,
    "lr_scheduler.warmup_steps": 2,
}


def small_flags(folder):
    """Flags of a small run, its model and its text."""
    write_model(folder, normalizer="softmax")
    return FLAGS | {
        "model.config": write_model(folder),
        "training.dataset": write_text(folder),
    }


def train(flags, *, processes=1, code=0):
    return run_program("flame.train", flag_words(flags), processes=processes, code=code)


def start_launcher(flags, *, processes=2, stderr=subprocess.STDOUT):
    """``bash train.sh`` in a session of its own."""
    return subprocess.Popen(
        ["bash", "train.sh", *flag_words(flags)],
        cwd=ROOT,
        env=environment(NGPU=str(processes)),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def refused_by_launcher(flags):
    """The one line with which ``bash train.sh`` ends."""
    with start_launcher(flags, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 2, output + errors
    return one_line(errors)


def curve(folder, name="loss"):
    """Step -> value of a TensorBoard scalar of a run, at full precision."""
    return drawn(Path(folder) / "tb", name)


def is_saved(flags, step=2):
    """A condition to wait for."""
    return (Path(flags["job.dump_folder"]) / "checkpoint" / f"step-{step}" / ".metadata").exists


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def one_line(errors):
    lines = [line for line in errors.splitlines() if line]
    assert len(lines) == 1, errors
    assert lines[0].startswith("flame: error: ")
    return lines[0]
