"""Short runs of the trainer in many layouts, in one group of processes."""

import gc
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked_runs import Forked, environment

from flame.config.parse import parse_args
from flame.config.sections import JobConfig
from flame.run.inputs import read_inputs
from flame.training.trainer import FlameTrainer

# isort: split
import torchtitan.distributed.utils as titan_distributed

STEPS = 10


def _join_once() -> None:
    """Lets all runs share one default group: torch cannot meet at the same store a second time."""
    join = titan_distributed.init_distributed

    def init_distributed(*args: Any, **kwargs: Any) -> int:
        return dist.get_world_size() if dist.is_initialized() else join(*args, **kwargs)

    titan_distributed.init_distributed = init_distributed


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


def curves_of(
    runs: list[tuple[str, list[str]]], folder: Path, processes: int
) -> dict[str, list[list[float]]]:
    """Name -> loss and gradient norm of every step, then the validation loss, for names and flags of runs."""
    out, env = folder / f"curves{processes}.json", environment()
    env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    with Forked(partial(_main, runs, out), processes=processes, env=env) as group:
        assert group.wait(600) == 0, group.output()
    return json.loads(out.read_text())


def _main(runs: list[tuple[str, list[str]]], out: Path) -> None:
    _join_once()
    curves = {}
    is_first = os.environ["RANK"] == "0"
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
            curves[name] = run(config)
    if is_first:
        out.write_text(json.dumps(curves))
