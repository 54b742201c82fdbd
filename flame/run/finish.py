"""The end of a run: exports the model, prints a sample of it, and prints the commands that come next."""

import os
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flame.base.errors import UsageError
from flame.base.log import logger
from flame.checkpoints.step_folder import newest_checkpoint
from flame.config.sections import DEFAULT_BOS, JobConfig
from flame.run.export import export_model
from flame.run.generate import generate
from flame.run.inputs import RunInputs
from flame.titan.patches import DEVICE_TYPE


def finish(
    config: JobConfig, inputs: RunInputs, asked: dict[str, Any], validation_loss: float | None
) -> None:
    """Exports the newest checkpoint, prints a sample of the model, its files, and the next commands.

    Args:
        config: The resolved flags.
        inputs: What the run has read.
        asked: The flags before defaults of this machine were filled in, for the twin's command.
        validation_loss: Loss after the last step, in nats per token; None if nothing was held out.

    Raises:
        UsageError: The exported folder cannot be written; the checkpoint is kept.
    """
    checkpoints = config.dump_folder / config.checkpoint.folder
    checkpoint = newest_checkpoint(checkpoints) if config.checkpoint.enable_checkpoint else None
    if checkpoint is None:
        logger.info("no checkpoint (--checkpoint.no_enable_checkpoint), so no exported model")
        return
    out = config.dump_folder / "hf"
    try:
        export_model(
            checkpoint,
            config=inputs.model,
            tokenizer=inputs.tokenizer,
            bos=config.training.bos,  # pyright: ignore[reportArgumentType]  # set_bos has replaced None
            run=config.dump_folder,
            out=out,
            dtype=getattr(torch, config.checkpoint.export_dtype),
        )
    # safetensors raises its own exception on a full disk
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
        logger.info(f"validation loss {validation_loss:.4f} nats per {unit}")
    logger.info(f"curves          tensorboard --logdir {config.dump_folder.parent}")
    if (twin := twin_of(asked)) is not None:
        _offer_comparison(config, asked, twin)


def _offer_comparison(config: JobConfig, asked: dict[str, Any], twin: str) -> None:
    """Prints the command that trains the twin or, if the twin is finished, the one that compares both."""
    folder = twin_folder(config, twin)
    if not (folder / "hf" / "config.json").is_file():
        logger.info(f"its twin        {_twin_command(asked, twin, folder)}")
        return
    t, source = config.training, config.training.sources()[0]
    options = (source.name, source.data_dir, source.data_files)
    # the held-out part is the end of the data, from which flame.analyze samples
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
    """Folder of the twin's run, whether it exists or not."""
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
    # the values of the recipe file are among the flags
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
