"""Runs that all tests of checkpoints share."""

import pytest
from checkpoint_runs import INTERVAL, STEPS, train
from small_model import write_model, write_text


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def whole(flags, tmp_path_factory):
    """A run that nothing interrupted."""
    return train(flags, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="session")
def seed(flags, tmp_path_factory):
    """The run that makes a seed checkpoint."""
    flags = flags | {"checkpoint.create_seed_checkpoint": True}
    return train(flags, tmp_path_factory.mktemp("seed") / "run")
