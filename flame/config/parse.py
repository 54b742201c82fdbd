"""Parses a command line and a TOML file into a `JobConfig`; errors, misspelt flags included, are one line."""

import argparse
import contextlib
import io
import math
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import tyro

from flame.base.command_line import require_flags, require_text
from flame.base.errors import UsageError
from flame.base.paths import expand
from flame.config import sections
from flame.config.help import show
from flame.config.sections import JobConfig
from flame.config.upstream_flags import refuse

# the largest C integer: torch, torchtitan and Python's containers take flags as such
_LARGEST_INTEGER = 2**31 - 1

# names of options in other trainers
_ALIASES = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "max_steps": "training.steps",
    "num_steps": "training.steps",
    "train_steps": "training.steps",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "block_size": "training.seq_len",
    "sequence_length": "training.seq_len",
    "max_seq_len": "training.seq_len",
    "output_dir": "job.dump_folder",
    "save_steps": "checkpoint.interval",
    "logging_steps": "metrics.log_freq",
    "clip_grad": "training.max_norm",
    "max_grad_norm": "training.max_norm",
    "tokenizer": "model.tokenizer_path",
}


def _known_words() -> dict[str, bool]:
    """Flag -> whether it takes a value."""
    words = {}
    for flag, value in JobConfig().flags().items():
        is_switch = isinstance(value, bool)
        words[flag] = not is_switch
        if is_switch:
            words[flag.replace(".", ".no_", 1)] = False
    return words


def _checked_words(argv: list[str]) -> list[str]:
    """``argv`` without flags that `refuse` drops; raises UsageError for a flag that is refused or not known."""
    require_text(argv)
    argv = refuse(argv)
    # dashes and underscores are both accepted
    words = [
        "=".join([flag.replace("-", "_").replace("__", "--", 1), *rest])
        if w.startswith("--")
        else w
        for w in argv
        for flag, *rest in [w.split("=", 1)]
    ]
    require_flags(
        words, _known_words() | {"help": False}, aliases=_ALIASES, help_command="bash train.sh -h"
    )
    return argv


def _flags_of_toml(path: Path) -> list[str]:
    """The file's keys as flags, so that file and flags share parsing, checks and messages."""
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"--job.config_file must be a TOML file, got {str(path)!r}: {error}"
        ) from None
    try:
        return flags_of_sections(sections)
    except UsageError as error:
        raise UsageError(f"--job.config_file {path}: {error}") from None


def flags_of_sections(sections: dict[str, Any]) -> list[str]:
    """The tables of a recipe, section -> option -> value, as flags.

    Raises:
        UsageError: A key is outside a section.
    """
    flags: list[str] = []
    for section, options in sections.items():
        if not isinstance(options, dict):
            raise UsageError(f"key {section!r} is outside a [section]")
        for name, value in options.items():
            if isinstance(value, bool):
                flags.append(f"--{section}.{name}" if value else f"--{section}.no_{name}")
            else:
                flags.append(f"--{section}.{name}={value}")
    return flags


def parse_args(argv: list[str]) -> JobConfig:
    """Defaults, then ``--job.config_file``, then flags.

    Raises:
        UsageError: An unknown flag or key, or a value that its option refuses.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # nargs="?": tyro reports a missing value below
    peek.add_argument("--job.config_file", "--job.config-file", dest="config_file", nargs="?")
    config_file = peek.parse_known_args(argv)[0].config_file
    for i, word in enumerate(argv):
        if word in ("-h", "--help"):
            topic = argv[i + 1] if i + 1 < len(argv) else None
            show(topic, JobConfig(), sections)
            sys.exit(0)
    if config_file is not None:
        # before the file is read
        require_text(["--job.config_file", config_file])
        argv = _flags_of_toml(Path(expand("--job.config_file", config_file))) + argv
    argv = _checked_words(argv)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(
                JobConfig,
                prog="train.sh",
                args=argv,
                use_underscores=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit:
        raise UsageError(_one_line(complaint.getvalue())) from None
    for flag, value in config.flags().items():
        # written so that NaN is refused too
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{flag} must be finite, got {value}")
        is_limited = isinstance(value, int) and flag != "training.seed"
        if is_limited and value > _LARGEST_INTEGER:
            raise UsageError(f"--{flag} must be at most {_LARGEST_INTEGER}, got {value}")
    return config


def _one_line(box: str) -> str:
    """The error of tyro, which prints a box with the help of the option, as one line."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰"))]
    rules = [i for i, line in enumerate(lines) if line.startswith("───")]
    message = " ".join(lines[: rules[0]] if rules else lines)
    # the checks in `sections` name the flag themselves
    message = re.sub(r"^Error parsing \w+: (?=--)", "", message)
    return message + " (bash train.sh -h lists the flags)"
