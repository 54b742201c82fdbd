"""``python -m flame.train``: one process of a run. ``bash train.sh`` starts all of them."""

from flame.base.log import announce_imports
from flame.base.stop_signals import end_at_interrupt, end_with_launcher

if __name__ == "__main__":
    # before the other imports, which take seconds
    end_at_interrupt()
    end_with_launcher()
    announce_imports()

import contextlib
import os
import signal
import socket
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from huggingface_hub.utils import logging as huggingface_hub_logging
from transformers.utils import logging as transformers_logging

from flame.base.errors import (
    UsageError,
    exit_on_training_error,
    exit_on_usage_error,
    explain_out_of_memory,
)
from flame.base.log import init_logger, logger
from flame.checkpoints.checkpointer import check_start
from flame.checkpoints.step_folder import newest_checkpoint
from flame.config.parse import parse_args
from flame.config.sections import JobConfig
from flame.run.fingerprint import claim_run_folder, explain_full_disk, fingerprint, set_bos
from flame.run.finish import finish
from flame.run.inputs import read_inputs, set_precision
from flame.run.record import write_record
from flame.titan.config import global_batch_size
from flame.titan.patches import DEVICE_TYPE
from flame.training.lost_processes import explain_lost_processes
from flame.training.memory_estimation import estimate_memory
from flame.training.trainer import FlameTrainer, describe

_OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def _join_group() -> None:
    """Checks what torchrun sets, or sets it for a process started by hand.

    Raises:
        UsageError: Only some of the variables are set, or one is invalid.
    """
    env = os.environ
    if not any(name in env for name in _OF_A_GROUP):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return
    names = (*_OF_A_GROUP, "MASTER_ADDR", "MASTER_PORT")
    given = " ".join(f"{name}={env[name]}" for name in names if name in env)
    advice = (
        f"unset {', '.join(name for name in _OF_A_GROUP if name in env)} for a run of one process, "
        "or start the run with bash train.sh, which sets them all"
    )
    if missing := [name for name in names if not env.get(name)]:
        raise UsageError(f"the environment has {given}, but no {', '.join(missing)}; {advice}")
    for name in (*_OF_A_GROUP, "MASTER_PORT"):
        if not (env[name].isascii() and env[name].isdecimal()):
            raise UsageError(
                f"{name} must be an integer of at least 0, got {env[name]!r}; {advice}"
            )
    if not int(env["LOCAL_RANK"]) <= int(env["RANK"]) < int(env["WORLD_SIZE"]):
        raise UsageError(
            f"RANK must be at least LOCAL_RANK and below WORLD_SIZE, got {given}; {advice}"
        )


def main() -> None:
    """Runs one process of a training run."""
    init_logger()
    transformers_logging.disable_progress_bar()
    huggingface_hub_logging.set_verbosity_error()
    with exit_on_usage_error(), exit_on_training_error():
        _join_group()
        config = parse_args(sys.argv[1:])
        set_bos(config)
        asked = config.flags()
        set_precision(config)
        t = config.training
        batch = f"--training.batch_size {t.batch_size}, --training.seq_len {t.seq_len}"
        with explain_out_of_memory(batch), explain_full_disk(config):
            stopped = _run(config, asked)
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped is not None:
        sys.exit(128 + stopped)


def _run(config: JobConfig, asked: dict[str, Any]) -> signal.Signals | None:
    """Trains, exports and reports; returns the signal that ended it before the last step."""
    logger.info("reading the model, the tokenizer and the data")
    inputs = read_inputs(config)
    if config.memory_estimation.enabled:
        estimate_memory(config, inputs)
        return None
    check_start(config, inputs.model, DEVICE_TYPE)
    run = fingerprint(
        config,
        model=inputs.model,
        data=inputs.data.fingerprint,
        global_batch_size=global_batch_size(config),
    )
    # rank 0 only, since other ranks would find a half written folder; they wait for it when the group is built
    if os.environ["RANK"] == "0":
        lock = claim_run_folder(config, run)  # noqa: F841  # held to the end of the process
        write_record(config, sys.argv[1:])
    logger.info("building the model")
    trainer = FlameTrainer(config, inputs)
    if config.checkpoint.create_seed_checkpoint:
        trainer.checkpointer.save_seed()
        seed = newest_checkpoint(config.dump_folder / config.checkpoint.folder)
        logger.info(f"seed checkpoint: --checkpoint.initial_load_path {seed}")
        trainer.close()
        return None
    try:
        with explain_lost_processes(trainer):
            describe(trainer)
            stopped = trainer.train()
            if stopped is None and config.validates:
                loss = trainer.validation_loss()
                trainer.metrics_processor.log_validation(loss, trainer.step)
            else:
                loss = None
    finally:
        trainer.close()
    if stopped is not None:
        newest = newest_checkpoint(config.dump_folder / config.checkpoint.folder)
        start = newest.name if newest else "the start"
        logger.info(
            f"{stopped.name} after step {trainer.step}: the same command continues from {start}"
        )
    elif dist.get_rank() == 0:
        finish(config, inputs, asked, loss)
    return stopped


def run() -> NoReturn:
    """Runs `main`, then exits without running destructors.

    Under context parallelism over gloo on a loaded machine, destructors of C++ threads abort one process in some dozens
    at exit (torch 2.13: "terminate called without an active exception"). The exit code of a good run would be 134.
    """
    code: int | str | None = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code
    for stream in (sys.stdout, sys.stderr):
        # a stream that cannot be written was reported before
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    run()
