"""The file of a sweep, and the runs that it defines."""

import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.analysis.quantized import BITS
from flame.base.errors import UsageError
from flame.base.paths import expand
from flame.config.parse import flags_of_sections, parse_args
from flame.config.sections import JobConfig

REFERENCE_ARM = "softmax"
"""The arm that the losses of all others are compared with."""

# flags that a sweep sets itself and [base] must not, each with the source of its value
_PER_RUN_FLAGS = {
    "job.config_file": "the [base] tables are the recipe",
    "job.dump_folder": "each run has a folder of its own below `out`",
    "optimizer.lr": "`learning_rates` lists them",
    "training.seed": "`seeds` lists them",
}
# flags with a fixed value in a sweep, since otherwise nothing would be trained or kept
_FIXED_FLAGS = {
    "checkpoint.enable_checkpoint": True,
    "checkpoint.create_seed_checkpoint": False,
    "checkpoint.load_step": -1,
    "memory_estimation.enabled": False,
}
# names that the sweep itself uses in `out`
_RESERVED = ("models", "report", "report.log", "lock")


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm of the ablation: a model configuration, trained with each seed at each learning rate."""

    name: str
    model: dict[str, Any]
    """Fields of the model configuration that differ from the base."""
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Analyze:
    """What `flame.analyze` is given; None and () mean its defaults."""

    data: str
    held_out: bool = False
    lengths: tuple[int, ...] = ()
    samples: int | None = None
    bits: tuple[int, ...] = ()
    passkey_lengths: tuple[int, ...] = ()
    interventions: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One training run; ``folder`` is its dump folder, ``log`` what it prints."""

    arm: str
    learning_rate: float
    seed: int
    folder: Path
    flags: tuple[str, ...]
    config: JobConfig

    @property
    def name(self) -> str:
        """``arm/lrX-seedN``: unique in the sweep, and the path of the folder below ``out``."""
        return f"{self.arm}/{self.folder.name}"

    @property
    def log(self) -> Path:
        """File of what the run prints, next to its dump folder, which the run itself creates."""
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A checked sweep file: its settings, and the runs that they define."""

    file: Path
    name: str
    out: Path
    base_model: Path
    arms: tuple[Arm, ...]
    ngpu: int
    parallel: bool
    runs_per_gpu: int
    analyze: Analyze | None
    runs: tuple[Run, ...]

    def model_file(self, arm: str) -> Path:
        """Model configuration of an arm's runs, which the sweep writes before it starts them."""
        return self.out / "models" / f"{arm}.json"

    def model_keys(self, arm: Arm) -> dict[str, Any]:
        """The arm's model configuration: the keys of the base, overridden by those of the arm."""
        return json.loads(self.base_model.read_text(encoding="utf-8")) | arm.model


class _Table:
    """A table of the file: `take` reads its keys one by one, `end` refuses unknown ones."""

    def __init__(self, file: Path, where: str, table: object) -> None:
        self.file, self.where = file, where
        if not isinstance(table, dict):
            raise UsageError(f"{file}, {where} must be a table, got {table!r}")
        self.rest = dict(table)
        self.known: list[str] = []

    def fail(self, key: str, value: object, expected: str) -> UsageError:
        return UsageError(f"{self.file}, {self.where}: {key} must be {expected}, got {value!r}")

    def take(self, key: str, expected: str, is_valid: Any, default: Any = ...) -> Any:
        """The value of ``key``, or ``default`` if it is missing; with ``...`` a missing key is an error."""
        self.known.append(key)
        if key not in self.rest:
            if default is ...:
                raise UsageError(
                    f"{self.file}, {self.where}: {key} is missing; it must be {expected}"
                )
            return default
        value = self.rest.pop(key)
        if not is_valid(value):
            raise self.fail(key, value, expected)
        return value

    def numbers(
        self, key: str, expected: str, is_valid: Any, default: Any = ...
    ) -> tuple[Any, ...]:
        """A list without repetition whose entries are all valid."""
        value = self.take(
            key,
            f"a list, without repetition, of {expected}",
            lambda x: (
                isinstance(x, list)
                and len(x) > 0
                and all(is_valid(entry) for entry in x)
                and len(set(x)) == len(x)
            ),
            default,
        )
        return tuple(value)

    def end(self) -> None:
        if self.rest:
            key = next(iter(self.rest))
            raise UsageError(
                f"{self.file}, {self.where}: unknown key {key!r}; there are {', '.join(self.known)}"
            )


def _is_integer(least: int) -> Any:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= least


def _is_rate(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x > 0


def _is_text(x: object) -> bool:
    return isinstance(x, str) and x.strip() == x != ""


def _is_switch(x: object) -> bool:
    return isinstance(x, bool)


_SEEDS = "integers of at least 0"
_RATES = "positive numbers"


def read_sweep(file: Path) -> Sweep:
    """Reads the file of a sweep, and checks everything that needs neither the models nor the machine.

    Raises:
        UsageError: The message names the file, the table, the key, the value and what is expected.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} is not the TOML file of a sweep: {error}") from None
    top = _Table(file, "at the top", content)
    name = top.take("name", "the sweep's name, a text", _is_text)
    out = Path(
        expand(f"{file}: out", top.take("out", "the folder that the sweep writes", _is_text))
    )
    seeds = top.numbers("seeds", _SEEDS, _is_integer(0))
    rates = top.numbers("learning_rates", _RATES, _is_rate)
    base = top.take("base", "tables of trainer flags, [base.training] and so on", _is_table)
    arms = top.take("arms", "one table for each arm, [arms.<name>]", _is_table)
    run = _Table(file, "[run]", top.take("run", "a table", _is_table, {}))
    analyze = top.take("analyze", "a table", _is_table, None)
    top.end()
    ngpu = run.take("ngpu", "an integer from 1 to 4", lambda x: _is_integer(1)(x) and x <= 4, 1)
    parallel = run.take("parallel", "true or false", _is_switch, False)
    runs_per_gpu = run.take("runs_per_gpu", "an integer of at least 1", _is_integer(1), 1)
    run.end()
    if runs_per_gpu > 1 and not (ngpu == 1 and parallel):
        raise run.fail(
            "runs_per_gpu",
            runs_per_gpu,
            f"1 unless ngpu is 1 and parallel is true, here {ngpu} and {json.dumps(parallel)}",
        )
    if not arms:
        raise UsageError(
            f"{file}, [arms]: there must be at least one arm; add an [arms.<name>] table"
        )
    flags = _base_flags(file, base)
    base_model = Path(expand(f"{file}, [base]: model.config", base["model"]["config"]))
    arms = tuple(_arm(file, arm, table, seeds, rates) for arm, table in arms.items())
    runs = tuple(
        _run(file, name, out, arm, rate, seed, flags)
        for arm in arms
        for rate in arm.learning_rates
        for seed in arm.seeds
    )
    sweep = Sweep(
        file=file,
        name=name,
        out=out,
        base_model=base_model,
        arms=arms,
        ngpu=ngpu,
        parallel=parallel,
        runs_per_gpu=runs_per_gpu,
        analyze=None if analyze is None else _analyze(file, analyze),
        runs=runs,
    )
    _check_base(sweep, runs[0].config)
    return sweep


def _is_table(x: object) -> bool:
    return isinstance(x, dict)


def _base_flags(file: Path, base: dict[str, Any]) -> list[str]:
    for flag, why in _PER_RUN_FLAGS.items():
        section, option = flag.split(".")
        table = base.get(section, {})
        if isinstance(table, dict) and option in table:
            raise UsageError(f"{file}, [base]: {flag} must be left out: {why}")
    model = base.get("model", {})
    if not isinstance(model, dict) or not _is_text(model.get("config")):
        raise UsageError(
            f"{file}, [base]: model.config must name the JSON file that the arms start from"
        )
    try:
        flags = flags_of_sections(base)
        parse_args(flags)
    except UsageError as error:
        raise UsageError(f"{file}, [base]: {error}") from None
    return [word for word in flags if not word.startswith("--model.config=")]


def _arm(
    file: Path, name: str, content: object, seeds: tuple[int, ...], rates: tuple[float, ...]
) -> Arm:
    where = f"[arms.{name}]"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name) or name in _RESERVED:
        raise UsageError(
            f"{file}, {where}: an arm's name must be letters, digits and _ . + -, since it names a folder, and "
            f"none of {', '.join(_RESERVED)}"
        )
    table = _Table(file, where, content)
    seeds = table.numbers("seeds", _SEEDS, _is_integer(0), seeds)
    rates = table.numbers("learning_rates", _RATES, _is_rate, rates)
    if "attn_impl" not in table.rest:
        # without it an arm would be a copy of the base
        raise UsageError(
            f"{file}, {where}: attn_impl is missing; each arm says its operator, such as "
            'attn_impl = "parallel_softmax_attn"'
        )
    return Arm(name, table.rest, seeds, tuple(map(float, rates)))


def _run(
    file: Path, name: str, out: Path, arm: Arm, rate: float, seed: int, base: list[str]
) -> Run:
    folder = out / arm.name / f"lr{rate}-seed{seed}"
    flags = [
        f"--model.config={out / 'models' / f'{arm.name}.json'}",
        f"--job.dump_folder={folder}",
        f"--optimizer.lr={rate}",
        f"--training.seed={seed}",
        *base,
    ]
    if not any(word.startswith("--job.description=") for word in base):
        flags.append(f"--job.description=sweep {name}: {arm.name}, lr {rate}, seed {seed}")
    try:
        config = parse_args(flags)
    except UsageError as error:
        raise UsageError(f"{file}, [arms.{arm.name}], lr {rate}, seed {seed}: {error}") from None
    return Run(arm.name, rate, seed, folder, tuple(flags), config)


def _check_base(sweep: Sweep, config: JobConfig) -> None:
    values = config.flags()
    for flag, expected in _FIXED_FLAGS.items():
        if values[flag] != expected:
            raise UsageError(
                f"{sweep.file}, [base]: {flag} must be {json.dumps(expected)}, its default, in a sweep, got "
                f"{json.dumps(values[flag])}"
            )
    if not config.validates:
        raise UsageError(
            f"{sweep.file}, [base]: validation.share must be above 0 (with training.streaming, "
            "validation.sequences): a sweep compares validation losses"
        )
    try:
        raw = json.loads(sweep.base_model.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{sweep.file}, [base]: model.config must be a JSON file, got {str(sweep.base_model)!r}: {error}"
        ) from None
    if not isinstance(raw, dict):
        raise UsageError(
            f"{sweep.file}, [base]: model.config {sweep.base_model} must be a JSON object, got {type(raw).__name__}"
        )


def _analyze(file: Path, content: dict[str, Any]) -> Analyze:
    table = _Table(file, "[analyze]", content)
    found = Analyze(
        data=table.take("data", "a text file, a folder or a folder of token files", _is_text),
        held_out=table.take("held_out", "true or false", _is_switch, False),
        # a sequence of one token attends to itself alone
        lengths=table.numbers("lengths", "integers of at least 2", _is_integer(2), ()),
        samples=table.take("samples", "an integer of at least 1", _is_integer(1), None),
        bits=table.numbers("bits", f"some of {BITS}", lambda x: x in BITS, ()),
        passkey_lengths=table.numbers(
            "passkey_lengths", "integers of at least 1", _is_integer(1), ()
        ),
        interventions=table.take("interventions", "true or false", _is_switch, False),
    )
    table.end()
    return found
