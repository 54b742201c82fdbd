"""What reaches torchtitan: the configuration, the learning-rate schedule, the known peaks."""

import math
from datetime import timedelta

import pytest
import torch

import flame.titan.patches as compat
from flame.config.parse import parse_args
from flame.titan.config import titan_config

# isort: split
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.tools import utils


def rates(*argv: str) -> list[float]:
    """Learning rate of each step, as a share of the peak."""
    config = titan_config(parse_args(["--optimizer.lr", "1", *argv]))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.optimizer.lr)
    schedule = build_lr_schedulers([optimizer], config.lr_scheduler, config.training.steps)
    seen = []
    for _ in range(config.training.steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warmup_then_cosine_to_lr_min():
    got = rates("--training.steps", "100", "--lr_scheduler.warmup_steps", "10")
    assert got[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    for i in range(11, 100):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (i - 10) / 90))
        assert got[i] == pytest.approx(expected, abs=0.01)


def test_warmup_stable_decay():
    argv = ["--training.steps", "100", "--lr_scheduler.warmup_steps", "10"]
    argv += ["--lr_scheduler.decay_ratio", "0.2", "--lr_scheduler.decay_type", "linear"]
    got = rates(*argv, "--lr_scheduler.lr_min", "0")
    assert got[10:80] == [1.0] * 70
    assert got[90] == pytest.approx(0.5, abs=0.06)
    assert got[99] == pytest.approx(0.05, abs=0.01)


def test_flags_reach_torchtitan(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--training.batch_size", "3", "--training.gradient_accumulation_steps", "5"]
    config = titan_config(parse_args([*argv, "--optimizer.eps", "1e-9", "--training.seed", "7"]))
    assert config.training.local_batch_size == 3
    assert config.training.global_batch_size == 30
    assert config.optimizer.eps == 1e-9
    assert config.debug.seed == 7
    assert not config.checkpoint.enable


def test_no_mfu_where_the_peak_is_unknown(monkeypatch):
    assert math.isnan(utils.get_peak_flops("cpu")) or compat.DEVICE_TYPE != "cpu"
    monkeypatch.setattr(compat, "DEVICE_TYPE", "cuda")
    assert utils.get_peak_flops("NVIDIA H200") == 989e12
    assert utils.get_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert math.isnan(utils.get_peak_flops("AMD Radeon PRO W7900"))


def test_a_warmup_longer_than_the_run_warns_in_no_process(caplog):
    got = rates("--training.steps", "4", "--lr_scheduler.warmup_steps", "10")
    assert got == rates("--training.steps", "4", "--lr_scheduler.warmup_steps", "4")
    assert caplog.text == ""


def test_timeouts_are_set_without_a_warning(recwarn):
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=9), None)
    finally:
        torch.distributed.destroy_process_group()
    assert not [x for x in recwarn if x.category is FutureWarning]
