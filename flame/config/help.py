"""``bash train.sh -h``: an overview of the sections, or one section or flag in full."""

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from types import ModuleType
from typing import Any

from flame.base.command_line import closest
from flame.base.errors import UsageError

_WIDTH = 80
_OVERVIEW = """\
usage: bash train.sh [--section.option value ...]
       bash train.sh -h [section | section.option | all]

Trains a model; repeating the command continues the run. The defaults are the
smallest useful run: a 1M parameter model on the text that ships with Python.
A flag wins over --job.config_file, a TOML file with the same names in sections,
and the file over the defaults. docs/softpick/FLAME.md explains a run.

Sections and their options; bash train.sh -h training explains those of one:
"""
_VARIABLES = {
    "NGPU": "processes on this machine, one per GPU, the first ones; without a GPU CPU processes (default: 1)",
    "HIP_VISIBLE_DEVICES": "GPUs of this run on AMD, of one NUMA group; -1 trains on the CPU (default: all)",
    "CUDA_VISIBLE_DEVICES": "GPUs of this run on NVIDIA; -1 trains on the CPU (default: all)",
    "MASTER_PORT": "port of this run, for several side by side (default: a free one)",
    "NNODE": "machines of this run (default: 1); several need the next two and MASTER_PORT",
    "NODE_RANK": "number of this machine, from 0",
    "MASTER_ADDR": "address of machine 0",
}


def show(topic: str | None, tree: Any, module: ModuleType) -> None:
    """Prints help on a section, a flag, or ``all``; an overview if ``topic`` is None.

    Args:
        topic: A section, a flag, or ``all``.
        tree: The flags' defaults, a dataclass of sections.
        module: Module that defines the sections, with a docstring below each field.

    Raises:
        UsageError: There is no such topic.
    """
    sections = {x.name: getattr(tree, x.name) for x in dataclasses.fields(tree)}
    options = {s: [x.name for x in dataclasses.fields(sections[s])] for s in sections}
    topic = topic.removeprefix("--").replace("-", "_") if topic else None
    if topic is None:
        sys.stdout.write(_overview(options))
        return
    chosen = [f"{s}.{name}" for s in options for name in options[s]]
    known = [*options, *chosen, "all"]
    if topic not in known:
        # an option without its section
        named = [flag for flag in chosen if flag.endswith(f".{topic}")]
        if not named:
            meant = closest(topic, known)
            hint = f"; perhaps you meant -h {meant}" if meant else ""
            raise UsageError(f"-h {topic}: no such section or flag{hint}")
        chosen = named
    elif topic != "all":
        chosen = [flag for flag in chosen if topic in (flag, flag.partition(".")[0])]
    texts = _texts(module)
    for flag in chosen:
        section, _, name = flag.partition(".")
        part = sections[section]
        kind = typing.get_type_hints(type(part))[name]
        sys.stdout.write(_entry(flag, kind, getattr(part, name), texts[type(part).__name__, name]))


def _overview(options: dict[str, list[str]]) -> str:
    width = max(map(len, options)) + 2
    lines = [_OVERVIEW]
    for section, names in options.items():
        lines.append(_hanging(f"  {section:{width}}", " ".join(names)))
    lines.append("\nEnvironment variables:\n\n")
    for name, text in _VARIABLES.items():
        lines.append(_hanging(f"  {name:{width}}", text))
    return "".join(lines)


def _hanging(head: str, text: str) -> str:
    filled = textwrap.fill(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled + "\n"


def _entry(flag: str, kind: Any, default: Any, text: str) -> str:
    section, _, name = flag.partition(".")
    members = [x for x in typing.get_args(kind) if x is not type(None)]
    if kind is bool:
        head = f"--{flag}, --{section}.no_{name}"
    elif typing.get_origin(kind) is typing.Literal:
        head = f"--{flag} {'|'.join(map(str, members))}"
    elif members and typing.get_origin(members[0]) is typing.Literal:
        head = f"--{flag} {'|'.join(map(str, typing.get_args(members[0])))}"
    else:
        head = f"--{flag} {(members[0] if members else kind).__name__.upper()}"
    text = " ".join(text.split())
    # some texts describe the default themselves
    if default is not None or "Default:" not in text:
        text += f" (default: {'none' if default is None else repr(default)})"
    return f"{head}\n{_hanging(' ' * 4, text)}\n"


def _texts(module: ModuleType) -> dict[tuple[str, str], str]:
    """(section's class, field) -> the string below the field."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    found[node.name, field.target.id] = ast.literal_eval(below.value)  # pyright: ignore[reportAttributeAccessIssue]  # the target of a field is a plain name
    return found
