"""What the tests of `python -m flame.sweep` share: a file to change, stand-ins for what it starts, a machine of 8 GPUs."""

import os

import machine
import pytest
import sweep_standins
import torch
from small_model import write_model, write_text

from flame.machine import list_gpus, numa
from flame.sweeps import check, report, runner

FILE = """
name = "small"
out = "{folder}/out"
seeds = [1, 2]
learning_rates = [2e-3]

[base]
model.config = "{model}"
training.dataset = "{text}"
training.seq_len = 32
training.batch_size = 2
training.steps = 300
training.mixed_precision_param = "float32"
metrics.log_freq = 1
metrics.enable_tensorboard = false
sample.max_new_tokens = 0

[arms.softmax]
attn_impl = "naive_softmax_attn"

[arms.softpick]
attn_impl = "naive_softpick_attn"
seeds = [1]

[run]
ngpu = 1

[analyze]
data = "{text}"
"""


@pytest.fixture
def write(tmp_path):
    """Writes the file above, with pairs of texts replaced, and returns its path."""
    model, text = write_model(tmp_path, num_hidden_layers=1), write_text(tmp_path)
    content = FILE.format(folder=tmp_path, model=model, text=text)

    def write(*changes):
        changed = content
        for old, new in changes:
            assert old in changed
            changed = changed.replace(old, new, 1)
        file = tmp_path / "sweep.toml"
        file.write_text(changed)
        return file

    return write


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    # a sweep says what GPUs its runs see; here they see none
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(list_gpus, "addresses", lambda env: [])


@pytest.fixture
def standins(tmp_path, monkeypatch):
    """Stand-ins in the place of training and analysis; their log is in the folder returned."""
    folder = tmp_path / "standins"
    folder.mkdir()
    launcher, analyzer = sweep_standins.write(folder)
    monkeypatch.setattr(runner, "LAUNCHER", launcher)
    monkeypatch.setattr(report, "ANALYZER", analyzer)
    # whose folders are no runs'
    monkeypatch.setattr(check, "check_runs", lambda sweep: None)
    return folder


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Makes a machine of 8 AMD GPUs on two sockets, or another one, the one that is read."""

    def build(nodes=((0, "0-47"), (1, "48-95")), gpu_nodes=(0, 0, 0, 0, 1, 1, 1, 1), **kind):
        root = machine.build(tmp_path / "machine", nodes=list(nodes), gpus=list(gpu_nodes), **kind)
        monkeypatch.setattr(numa, "ROOT", root)
        monkeypatch.setattr(list_gpus, "addresses", lambda env: machine.hip(root, env))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return root

    return build
