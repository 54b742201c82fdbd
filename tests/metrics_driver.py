"""Trains several small runs in one process, each with its own trouble, and notes what it saw: for `test_metrics.py`.

Each run of `RUNS` trains into a folder of its name and writes ``<its name>.rankN.json`` next to it.
"""

import io
import json
import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from forked_runs import flag_words
from torch.distributed.tensor import DTensor

import flame.train
from flame.measure.while_training import Observer, observe
from flame.titan.model import ModelArgs, TitanModel
from flame.training.trainer import FlameTrainer

# isort: split
import torchtitan.distributed.utils as titan_distributed

RANK = int(os.environ.get("RANK", "0"))
STEPS = 12


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def fingerprint(trainer):
    """This process's share of the weights and of the optimizer's state, as one float64 and all steps it counts."""
    model = trainer.model_parts[0]
    state = trainer.optimizers.optimizers[0].state
    tensors = [local(p) for p in model.parameters()]
    tensors += [local(v) for s in state.values() for v in s.values()]
    return [x.detach().double().sum().item() for x in tensors]


def trouble(at, rank, *, factor=1.0, layer=None):
    """A forward_backward_step whose loss, or one layer's gradient, goes wrong in some steps on one rank."""
    original = FlameTrainer.forward_backward_step

    def step(self, **batch):
        loss = original(self, **batch)
        if self.step in at and rank in (None, RANK):
            if layer is None:
                for p in self.model_parts[0].parameters():
                    p.grad = p.grad * factor if p.grad is not None else None
                return loss * factor
            with torch.no_grad():
                local(self.model_parts[0].model.layers[layer].mlp.up_proj.weight.grad).fill_(factor)
        return loss

    return step


def by_one_process(trainer):
    """What `attention_scalars` gives on the gathered weights, with all sequences in one batch."""
    model = TitanModel(ModelArgs(trainer.inputs.model, seed=0))
    full = {
        name: p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in trainer.model_parts[0].named_parameters()
    }
    model.load_state_dict({name: p.detach() for name, p in full.items()})
    config = trainer.config
    number = config.metrics.attention_sequences
    batches = trainer.inputs.data.validation(dp_rank=0, dp_world_size=1, batch_size=number)
    inputs, _ = next(batches)
    observer = Observer(len(model.model.layers), "softpick", torch.device("cpu"))
    with torch.no_grad(), observe(model.model, trainer.inputs.model.attn_impl, observer):
        model(inputs["input"][:, : config.metrics.attention_length or None])
    return observer.scalars()


def sleep_in(at, rank, seconds):
    original = FlameTrainer.forward_backward_step

    def step(self, **batch):
        if self.step in at and rank == RANK:
            time.sleep(seconds)
        return original(self, **batch)

    return step


NAN, INF = float("nan"), float("inf")
RUNS = {
    # an odd number of sequences, so that one of two processes has none left
    "plain": (
        {
            "metrics.attention_freq": 4,
            "metrics.attention_sequences": 3,
            "metrics.attention_length": 20,
        },
        None,
    ),
    # the gradients of one rank alone
    "skipped": (
        {"training.skip_nan_inf": True, "metrics.max_dumps": 1},
        trouble({3, 4}, 1 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0, factor=NAN),
    ),
    "one_layer": ({"training.skip_nan_inf": True}, trouble({3}, None, factor=INF, layer=1)),
    "row": (
        {"training.skip_nan_inf": True, "training.max_skipped_steps": 2},
        trouble({3, 5, 6, 7}, None, factor=NAN),
    ),
    "stopped": ({}, trouble({5}, None, factor=NAN)),
    "spike": (
        {"metrics.spike_window": 5, "metrics.spike_deviations": 4},
        trouble({8}, None, factor=10.0),
    ),
    "young_spike": (
        {"metrics.spike_window": 20, "metrics.spike_deviations": 4},
        trouble({8}, None, factor=10.0),
    ),
    "hang": (
        {"comm.train_timeout_seconds": 4, "training.steps": 4},
        sleep_in({3}, 1, 10),
    ),
}


def run(name, out, flags):
    own, step = RUNS[name]
    flags = flags | own | {"job.dump_folder": str(out / name)}
    seen, original = {}, FlameTrainer.forward_backward_step
    original_step, original_scalars = FlameTrainer.train_step, FlameTrainer.attention_scalars
    scalars = []

    def attention_scalars(self):
        found = original_scalars(self)
        scalars.append((self.step, found, by_one_process(self)))
        return found

    def train_step(self, data_iterator):
        before = fingerprint(self)
        try:
            original_step(self, data_iterator)
        finally:
            seen[self.step] = fingerprint(self) == before

    sys.argv = ["train.py", *flag_words(flags)]
    FlameTrainer.train_step = train_step
    FlameTrainer.attention_scalars = attention_scalars
    if step is not None:
        FlameTrainer.forward_backward_step = step
    text, code = io.StringIO(), 0
    try:
        with redirect_stdout(text), redirect_stderr(text):
            flame.train.main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        FlameTrainer.train_step = original_step
        FlameTrainer.attention_scalars = original_scalars
        FlameTrainer.forward_backward_step = original
    note = {"code": code, "unchanged": seen, "attention": scalars, "output": text.getvalue()}
    (out / f"{name}.rank{RANK}.json").write_text(json.dumps(note))


def keep_process_group():
    """Lets all runs share the first one's group: under torchrun another would meet the first one's addresses."""
    first, distributed = flame.titan.patches._init_distributed, titan_distributed

    def init(*args, **kwargs):
        return dist.get_world_size() if dist.is_initialized() else first(*args, **kwargs)

    distributed.init_distributed = init
    dist.destroy_process_group = lambda: None


def main(out, flags, names):
    keep_process_group()
    for name in names:
        run(name, out, flags)
    if "hang" in names:
        # collectives are out of step: nothing that waits for the other process
        os._exit(0)
