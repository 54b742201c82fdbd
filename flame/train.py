"""``python -m flame.train``: one process of a run. ``bash train.sh`` starts as many as it takes."""

import signal

from flame.log import announce_imports
from flame.stop_signals import end_with_launcher

if __name__ == "__main__":
    # until there is something to save, Ctrl-C ends at once and without a traceback, as SIGTERM and the death of
    # the launcher do; set here, since importing the rest takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_launcher()
    announce_imports()

import contextlib
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from huggingface_hub.utils import logging as huggingface_hub_logging
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from flame._compat import DEVICE_TYPE
from flame.checkpoint import check_start
from flame.checkpoint_folder import newest_checkpoint
from flame.config import DEFAULT_BOS, JobConfig, parse_args
from flame.convert import dcp_to_hf
from flame.data import load_tokenizer, open_data
from flame.errors import (
    UsageError,
    exit_on_training_error,
    exit_on_usage_error,
    explain_out_of_memory,
)
from flame.generate import generate
from flame.layout import check_layout
from flame.log import init_logger, logger
from flame.loss import linear_loss
from flame.memory_estimation import estimate_memory
from flame.models import SoftpickTransformerConfig, read_config, require_device
from flame.run_folder import claim, explain_full_disk, identity, set_bos
from flame.run_record import write_record
from flame.titan import global_batch_size, world_size
from flame.train_step import explain_lost_processes
from flame.trainer import FlameTrainer, RunInputs, describe
from flame.writers import require_wandb


def read_model(config: JobConfig, num_processes: int) -> SoftpickTransformerConfig:
    """The model of a run of ``num_processes``, if it and the flags fit each other and this machine.

    Raises:
        UsageError: They do not.
    """
    try:
        model = read_config(config.model.config)
    except ValueError as error:
        raise UsageError(f"--model.config: {error}") from None
    require_device(model.attn_impl, DEVICE_TYPE)
    # refuses what this machine does not have
    linear_loss(config.training.loss, DEVICE_TYPE)
    if config.metrics.enable_wandb:
        require_wandb()
    if config.profiling.enable_memory_snapshot and DEVICE_TYPE == "cpu":
        raise UsageError(
            "--profiling.enable_memory_snapshot records a GPU's allocator, and this machine has none"
        )
    t = config.training
    check_layout(config, model, num_processes=num_processes, device_type=DEVICE_TYPE)
    if t.seq_len > model.max_position_embeddings:
        raise UsageError(
            f"--training.seq_len {t.seq_len} must be at most max_position_embeddings "
            f"{model.max_position_embeddings} of --model.config {config.model.config}"
        )
    if t.varlen and t.compile and model.attn_impl.startswith("naive_"):
        raise UsageError(
            f'--training.varlen with --training.compile needs a Triton attn_impl, got "{model.attn_impl}", '
            "which reads cu_seqlens on the host; leave out --training.compile"
        )
    return model


def read_tokenizer(config: JobConfig, model: SoftpickTransformerConfig) -> PreTrainedTokenizerFast:
    """The tokenizer, if its ids fit the model.

    Raises:
        UsageError: It cannot be read, or they do not.
    """
    try:
        tokenizer = load_tokenizer(config.model.tokenizer_path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # the largest id and not the count: vocabularies may have gaps
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids > model.vocab_size:
        raise UsageError(
            f"--model.tokenizer_path {config.model.tokenizer_path} has {num_ids} tokens, more than "
            f"vocab_size {model.vocab_size} of --model.config {config.model.config}"
        )
    return tokenizer


def read_inputs(config: JobConfig) -> RunInputs:
    """Reads and checks everything the run needs.

    Raises:
        UsageError: A flag or file that the user must mend.
    """
    model = read_model(config, world_size())
    tokenizer = read_tokenizer(config, model)
    try:
        data = open_data(config, tokenizer)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return RunInputs(tokenizer=tokenizer, data=data, model=model)


def set_precision(config: JobConfig) -> None:
    """Sets the dtype that this machine's runs compute in where no flag does."""
    if config.training.mixed_precision_param is None:
        config.training.mixed_precision_param = "float32" if DEVICE_TYPE == "cpu" else "bfloat16"


_OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def _join_group() -> None:
    """Checks what torchrun sets, or sets it for a process started by hand.

    Raises:
        UsageError: Something else has set a part of it.
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


def finish(
    config: JobConfig, inputs: RunInputs, asked: dict[str, Any], validation_loss: float | None
) -> None:
    """Exports the newest checkpoint, lets it write, and says what there is and what to do next."""
    checkpoints = config.dump_folder / config.checkpoint.folder
    checkpoint = newest_checkpoint(checkpoints) if config.checkpoint.enable_checkpoint else None
    if checkpoint is None:
        logger.info("no checkpoint (--checkpoint.no_enable_checkpoint), so no exported model")
        return
    out = config.dump_folder / "hf"
    try:
        dcp_to_hf(
            checkpoint,
            config=inputs.model,
            tokenizer=inputs.tokenizer,
            bos=config.training.bos,
            run=config.dump_folder,
            out=out,
            dtype=getattr(torch, config.checkpoint.export_dtype),
        )
    # safetensors has an error of its own for a full disk
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{out} could not be written: {error}; {checkpoint} is kept, which the same command exports"
        ) from None
    if config.sample.max_new_tokens:
        text = generate(
            str(out),
            config.sample.prompt,
            max_new_tokens=config.sample.max_new_tokens,
            temperature=config.sample.temperature,
            seed=config.training.seed,
            device=DEVICE_TYPE,
        )
        logger.info(f"the model writes:\n{text}\n")
    logger.info(f"checkpoint      {checkpoint}")
    logger.info(f"exported model  {out}")
    if validation_loss is not None:
        unit = "byte" if config.model.tokenizer_path == "byte" else "token"
        logger.info(f"validation loss {validation_loss:.4f} nats a {unit}")
    logger.info(f"curves          tensorboard --logdir {config.dump_folder.parent}")
    if (twin := twin_of(asked)) is not None:
        _offer_comparison(config, asked, twin)


def _offer_comparison(config: JobConfig, asked: dict[str, Any], twin: str) -> None:
    """Says how to train the twin or, if that is done, how to compare the two."""
    folder = twin_folder(config, twin)
    if not (folder / "hf" / "config.json").is_file():
        logger.info(f"its twin        {_twin_command(asked, twin, folder)}")
        return
    t, source = config.training, config.training.sources()[0]
    options = (source.name, source.data_dir, source.data_files)
    # what is held out is the end of the data, where analyze looks
    has_end = len(t.sources()) == 1 and not any(options) and config.validation.share > 0
    # softpick first, whichever was trained first
    is_softpick = Path(twin).name.startswith("softmax_")
    runs = [config.dump_folder, folder] if is_softpick else [folder, config.dump_folder]
    words = ["python", "-m", "flame.analyze", "--model", *(str(run / "hf") for run in runs)]
    words += [
        "--label",
        "softpick",
        "softmax",
        "--run",
        *map(str, runs),
        "--data",
        source.dataset if has_end else "HELD_OUT_TEXT",
    ]
    words += ["--lengths", str(t.seq_len), "--out", str(config.dump_folder.parent / "report")]
    logger.info(f"with its twin   {shlex.join(words)}")


def twin_of(asked: dict[str, Any]) -> str | None:
    """The model configuration with the other normaliser, if there is one."""
    folder, name = os.path.split(asked["model.config"])
    for own, other in (("softpick_", "softmax_"), ("softmax_", "softpick_")):
        twin = os.path.join(folder, name.replace(own, other, 1))
        if name.startswith(own) and os.path.isfile(twin):
            return twin
    return None


def twin_folder(config: JobConfig, twin: str) -> Path:
    """Where the twin's run is, or else would be."""
    if config.job.dump_folder is None:
        return Path("exp") / Path(twin).stem
    folder = config.dump_folder
    is_softpick = Path(twin).name.startswith("softmax_")
    own, other = ("softpick", "softmax") if is_softpick else ("softmax", "softpick")
    renamed = folder.with_name(folder.name.replace(own, other, 1))
    if renamed != folder and renamed.is_dir():
        return renamed
    # the twin of a twin is the first run
    name = folder.name
    return folder.with_name(
        name.removesuffix("-twin") if name.endswith("-twin") else f"{name}-twin"
    )


def _twin_command(asked: dict[str, Any], twin: str, folder: Path) -> str:
    """The command of the same run with the other normaliser."""
    default = JobConfig().flags() | {"training.bos": DEFAULT_BOS}
    changed = {flag: value for flag, value in asked.items() if value != default[flag]}
    # what a recipe file said is among the flags
    changed |= {"model.config": twin, "job.config_file": None}
    if asked["job.dump_folder"] is not None:
        changed["job.dump_folder"] = str(folder)
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    words = [] if local == "1" else [f"NGPU={local}"]
    words += ["bash", "train.sh"]
    for flag, value in changed.items():
        section, option = flag.split(".")
        if isinstance(value, bool):
            words.append(f"--{section}.{option if value else 'no_' + option}")
        elif value is not None:
            # a value that looks like a flag needs the other form
            is_flag = str(value).startswith("-")
            words += [f"--{flag}={value}"] if is_flag else [f"--{flag}", str(value)]
    return " ".join(shlex.quote(word) for word in words)


def main() -> None:
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
    run = identity(
        config,
        model=inputs.model,
        data=inputs.data.identity,
        global_batch_size=global_batch_size(config),
    )
    # one process alone, which the others then wait for: they would find a folder half written
    if os.environ["RANK"] == "0":
        lock = claim(config, run)  # noqa: F841  # held to the end of the process
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
    """`main`, and out by the shortest way.

    When all is done, destructors of C++ threads abort one process in some dozens on a loaded machine under context
    parallelism over gloo (torch 2.13: "terminate called without an active exception"), which would turn the exit
    code of a good run into 134.
    """
    code: int | str | None = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code
    for stream in (sys.stdout, sys.stderr):
        # one that cannot be written has been told of
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    run()
