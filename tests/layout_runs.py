"""Short runs of the trainer in many layouts, in one group of processes: ``layout_runs.py RUNS CURVES``.

Started by torchrun. RUNS is a JSON list of ``[name, flags]``; CURVES becomes ``{name: [[loss, gradient norm] of
every step, [validation loss, 0]]}``. To start processes takes ten seconds, a run one.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flame.config.parse import parse_args
from flame.config.sections import JobConfig
from flame.run.inputs import read_inputs
from flame.training.trainer import FlameTrainer

# isort: split
import torchtitan.distributed.utils as titan_distributed

STEPS = 10

_init_distributed = titan_distributed.init_distributed


def _init_distributed_once(*args: Any, **kwargs: Any) -> int:
    """All runs in one default group: torch cannot meet at the same store a second time."""
    return dist.get_world_size() if dist.is_initialized() else _init_distributed(*args, **kwargs)


titan_distributed.init_distributed = _init_distributed_once


def run(config: JobConfig) -> list[list[float]]:
    """Loss and gradient norm of every step, then the validation loss."""
    curve = []
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    trainer = FlameTrainer(config, read_inputs(config))
    trainer.metrics_processor.log = lambda step, loss, max_loss, norm, **_: curve.append(
        [loss, norm]
    )
    assert torch.are_deterministic_algorithms_enabled() == config.training.deterministic
    assert trainer.gc_handler.gc_freq == config.training.gc_freq
    batches = trainer.batch_generator(trainer.dataloader)
    for _ in range(STEPS):
        trainer.step += 1
        trainer.train_step(batches)
    curve.append([trainer.validation_loss(), 0.0])
    trainer.close()
    gc.collect()
    return curve


def main(runs: Path, out: Path) -> None:
    curves = {}
    is_first = os.environ["RANK"] == "0"
    runs = json.loads(runs.read_text())
    # those of one process last: they need a group of their own
    for name, argv in sorted(runs, key=lambda x: x[0].startswith("one process")):
        config = parse_args([*argv, "--checkpoint.no_enable_checkpoint"])
        if config.training.mixed_precision_param is None:
            config.training.mixed_precision_param = "float32"
        if not name.startswith("one process"):
            curves[name] = run(config)
        elif is_first:
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.destroy_process_group()
                os.environ |= {"WORLD_SIZE": "1", "MASTER_PORT": "0"}
                del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
            curves[name] = run(config)
    if is_first:
        out.write_text(json.dumps(curves))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
