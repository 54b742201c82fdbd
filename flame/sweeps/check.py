"""Checks that a sweep makes before its first run starts."""

import argparse
import copy
import json
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast as Tokenizer

from flame.analysis import flags, passkey, quantized
from flame.analysis.lengths import default_lengths
from flame.analysis.samples import read_samples
from flame.base.errors import UsageError
from flame.base.folder_lock import wait_until_free
from flame.checkpoints.checkpointer import check_start
from flame.config.sections import JobConfig
from flame.data.bos import for_inference
from flame.data.run_data import open_data
from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM, read_config
from flame.run.fingerprint import CONFIG_FILE, RUN_FILE, fingerprint, require_same_run, set_bos
from flame.run.inputs import read_model, read_tokenizer, set_precision
from flame.sweeps.plan import Arm, Run, Sweep
from flame.sweeps.report import analysis_flags
from flame.sweeps.state import read_state
from flame.titan.config import global_batch_size
from flame.titan.model import ModelArgs
from flame.titan.patches import DEVICE_TYPE


@dataclass(frozen=True, slots=True)
class Size:
    """Size of an arm's model."""

    parameters: int
    flops_per_token: int
    """Training FLOPs of a token by torchtitan's convention, see `flame.titan.model.ModelArgs`."""


def measure_arms(sweep: Sweep) -> dict[str, Size]:
    """Size of each arm's model.

    Raises:
        UsageError: A model cannot be built; the message names the arm and the key.
    """
    with _model_files(sweep) as folder:
        return {arm.name: _measure(sweep, arm, folder) for arm in sweep.arms}


def _measure(sweep: Sweep, arm: Arm, folder: Path) -> Size:
    with _name_arm_in_errors(sweep, arm.name, folder):
        try:
            config = read_config(folder / f"{arm.name}.json")
        except ValueError as error:
            raise UsageError(str(error)) from None
    args = _analysis(sweep)
    lengths = [*args.lengths, *args.passkey_lengths] if args else []
    if max(lengths, default=0) > config.max_position_embeddings:
        raise UsageError(
            f"{sweep.file}, [analyze]: lengths and passkey_lengths must be at most max_position_embeddings "
            f"{config.max_position_embeddings} of arm {arm.name}, got {max(lengths)}"
        )
    with torch.device("meta"):
        model = SoftpickTransformerForCausalLM(copy.deepcopy(config))
    seq_len = sweep.runs[0].config.training.seq_len
    return Size(*ModelArgs(config, seed=0).get_nparams_and_flops(model, seq_len))


def _analysis(sweep: Sweep) -> argparse.Namespace | None:
    """The flags that `flame.analyze` will get, defaults included.

    Raises:
        UsageError: `flame.analyze` would refuse one.
    """
    if sweep.analyze is None:
        return None
    try:
        args = flags.parser().parse_args(analysis_flags(sweep, list(sweep.runs)))
        flags.check(args)
    except UsageError as error:
        raise UsageError(f"{sweep.file}, [analyze]: {error}") from None
    if not args.lengths:
        training = sweep.runs[0].config.training
        args.lengths = default_lengths([training.context_len or training.seq_len], [])
    return args


def _check_analysis(sweep: Sweep, tokenizer: Tokenizer, bos: str) -> None:
    """Checks that the analysis will find its text and an optional package."""
    if (args := _analysis(sweep)) is None:
        return
    tokenizer = for_inference(tokenizer, bos)
    try:
        read_samples(
            args.data,
            tokenizer,
            number=args.samples,
            length=max(args.lengths),
            first_token=args.first_token,
            is_held_out=args.held_out,
        )
        for length in args.passkey_lengths:
            try:
                passkey.draw(tokenizer, length, args.passkey_depths, args.passkey_samples, seed=0)
            except UsageError as error:
                raise UsageError(f"--passkey_lengths {length}: {error}") from None
        if args.bits:
            quantized.require_hqq()
    except UsageError as error:
        raise UsageError(f"{sweep.file}, [analyze]: {error}") from None


def check_runs(sweep: Sweep) -> None:
    """Checks each arm on this machine, the data, and every existing run folder.

    Raises:
        UsageError: A run could not start, or would differ from the run in its folder.
    """
    data = None
    with _model_files(sweep) as folder:
        _require_one_bos(sweep, [_resolved(run, folder) for run in sweep.runs])
        for run in sweep.runs:
            config = _resolved(run, folder)
            with _name_arm_in_errors(sweep, run.arm, folder):
                # the runs differ in arm, seed and rate, none of which the data depend on
                model = read_model(config, sweep.ngpu)
                tokenizer = read_tokenizer(config, model)
                if data is None:
                    try:
                        data = open_data(config, tokenizer).fingerprint
                    except ValueError as error:
                        raise UsageError(str(error)) from None
                    first = tokenizer
                    bos: str = config.training.bos  # pyright: ignore[reportAssignmentType]  # set_bos has replaced None
                _check_folder(sweep, run, config, model, data)
    _check_analysis(sweep, first, bos)  # pyright: ignore[reportPossiblyUnboundVariable]  # a sweep has at least one run, so the loop has bound it


def _require_one_bos(sweep: Sweep, configs: list[JobConfig]) -> None:
    """Refuses to mix runs whose documents begin differently, such as those of an earlier version.

    Raises:
        UsageError: The runs differ in --training.bos.
    """
    modes = {config.training.bos: config.dump_folder for config in configs}
    if len(modes) > 1:
        has = ", ".join(f"{folder} has {mode}" for mode, folder in sorted(modes.items()))
        raise UsageError(
            f"{sweep.file}: training.bos must be the same in all runs, but {has}; set it in [base] to that of the "
            "runs that exist"
        )


def _check_folder(
    sweep: Sweep,
    run: Run,
    config: JobConfig,
    model: SoftpickTransformerConfig,
    data: dict[str, object],
) -> None:
    batch = global_batch_size(config, sweep.ngpu)
    require_same_run(
        run.folder, fingerprint(config, model=model, data=data, global_batch_size=batch)
    )
    _require_same_steps(run)
    if not read_state(run).is_finished:
        check_start(config, model, DEVICE_TYPE)
        # runs of a sweep that was killed may still be saving, on GPUs that are needed here
        wait_until_free(run.folder)


def _require_same_steps(run: Run) -> None:
    """Refuses an existing run with another number of steps.

    `flame.run.fingerprint` would continue it, but its learning-rate schedule would differ from that of new runs, so the
    runs of the sweep would not be comparable.

    Raises:
        UsageError: They differ, or the folder's record cannot be read.
    """
    if not (run.folder / RUN_FILE).is_file():
        return
    file = run.folder / CONFIG_FILE
    try:
        steps = tomllib.loads(file.read_text(encoding="utf-8"))["training"]["steps"]
    except FileNotFoundError:
        # killed between its first two files: nothing was trained
        return
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
    if steps != run.config.training.steps:
        raise UsageError(
            f"training.steps in [base] must be {steps}, with which {run.folder} was started, got "
            f"{run.config.training.steps}: continued, it would have another learning-rate schedule than a new run; "
            "set it back, or name another `out`"
        )


def _resolved(run: Run, models: Path) -> JobConfig:
    """The flags of the run with defaults resolved, and the model file in the temporary folder ``models``."""
    config = copy.deepcopy(run.config)
    set_precision(config)
    set_bos(config)
    config.model.config = str(models / f"{run.arm}.json")
    return config


@contextmanager
def _model_files(sweep: Sweep) -> Iterator[Path]:
    """Temporary folder with the arms' model files, so that nothing is written to `out` before all checks pass."""
    with tempfile.TemporaryDirectory() as folder:
        for arm in sweep.arms:
            (Path(folder) / f"{arm.name}.json").write_text(model_json(sweep, arm), encoding="utf-8")
        yield Path(folder)


def model_json(sweep: Sweep, arm: Arm) -> str:
    """Content of the arm's model file."""
    return json.dumps(sweep.model_keys(arm), indent=2) + "\n"


@contextmanager
def _name_arm_in_errors(sweep: Sweep, arm: str, folder: Path) -> Iterator[None]:
    """Context that adds the sweep's file and the arm to a UsageError, and the final path of its model file."""
    try:
        yield
    except UsageError as error:
        text = str(error).replace(str(folder), str(sweep.out / "models"))
        raise UsageError(f"{sweep.file}, [arms.{arm}]: {text}") from None
