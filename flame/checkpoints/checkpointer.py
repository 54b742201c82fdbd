"""Saves and loads the state of a run, asynchronously or between steps."""

import copy
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.stateful import Stateful

from flame.base.errors import UsageError
from flame.base.log import logger
from flame.checkpoints.huggingface import check_weights
from flame.checkpoints.step_folder import (
    AtomicWriter,
    describe_failure,
    first_failure,
    has_weights_only,
    is_complete,
    newest_checkpoint,
    purge,
    read_contents,
    read_step,
    remove_leftovers,
    remove_unfinished,
    step_of,
)
from flame.config.sections import JobConfig
from flame.models import SoftpickTransformerConfig
from flame.titan.upstream import ModelWrapper


def check_start(config: JobConfig, model: SoftpickTransformerConfig, device_type: str) -> None:
    """Raises UsageError if the run cannot start from the checkpoint that it would load; reads only metadata."""
    c = config.checkpoint
    if c.async_mode == "async_with_pinned_mem" and device_type == "cpu":
        raise UsageError(
            "--checkpoint.async_mode async_with_pinned_mem is for GPUs; use async on a CPU"
        )
    newest = newest_checkpoint(config.dump_folder / c.folder)
    if c.create_seed_checkpoint:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(
                f"--checkpoint.create_seed_checkpoint takes one process, got {os.environ['WORLD_SIZE']} (NGPU)"
            )
        if newest is not None:
            raise UsageError(
                f"--checkpoint.create_seed_checkpoint: {newest} exists already; name another --job.dump_folder"
            )
    if newest is not None:
        step, steps = step_of(newest), config.training.steps
        if 0 < step < steps and has_weights_only(read_contents(newest)):
            raise UsageError(
                f"--training.steps {steps}: {newest} holds weights only "
                "(--checkpoint.last_save_model_weights_only), so the run cannot continue; start another with "
                f"--checkpoint.initial_load_path {newest}"
            )
    elif c.initial_load_path is not None:
        _check_initial(config, Path(c.initial_load_path), model)


def _check_initial(config: JobConfig, path: Path, model: SoftpickTransformerConfig) -> None:
    flag = f"--checkpoint.initial_load_path {path}"
    if not is_complete(path):
        hint = "name a complete checkpoint, a folder step-N"
        if (path / "config.json").is_file():
            hint = f"convert it: python -m flame.convert hf-to-dcp --model {path} --out <folder>"
        elif (inner := newest_checkpoint(path)) is not None:
            hint = f"name a checkpoint in it, such as {inner}"
        raise UsageError(f"{flag} is not a checkpoint; {hint}")
    contents = read_contents(path)
    check_weights(contents, model, what=flag, wanted=f"--model.config {config.model.config}")
    takes_step = "train_state" not in config.checkpoint.excluded()
    if not config.checkpoint.initial_load_model_weights_only and has_weights_only(contents):
        raise UsageError(
            f"--checkpoint.no_initial_load_model_weights_only: {path} holds weights only; leave the flag out"
        )
    if not config.checkpoint.initial_load_model_weights_only and takes_step:
        step = read_step(path)
        if step >= config.training.steps:
            raise UsageError(
                f"--training.steps {config.training.steps} must be more than the {step} that {flag} has done"
            )


class _Stager(BlockingAsyncStager):
    """Copies the state to the host, so that training cannot change it while it is written.

    With ``cache_staged_state_dict`` the copies of tensors are pinned and kept for the next save. This holds
    for model and optimizer only: the other states are small, and may change their structure between saves.
    """

    def __init__(self, *, cache_staged_state_dict: bool, others: tuple[str, ...]) -> None:
        super().__init__(cache_staged_state_dict=cache_staged_state_dict)
        self.others = others

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        others = {name: x for name, x in state_dict.items() if name in self.others}
        tensors = {name: x for name, x in state_dict.items() if name not in self.others}
        return super().stage(tensors) | copy.deepcopy(others)


class Checkpointer:
    """Replaces torchtitan's `CheckpointManager`: its `Trainer` calls this to load and save.

    Every rank must call every method, in the same order.

    Args:
        config: The run's configuration.
        model: The model; its parameters' names are those in the checkpoint.
        states: Everything else that is saved, by name.
        export: Called with a checkpoint and ``out`` for ``checkpoint.convert_to_hf_on_save``.
    """

    def __init__(
        self,
        config: JobConfig,
        *,
        model: torch.nn.Module,
        states: dict[str, Stateful],
        export: Callable[..., None],
    ) -> None:
        self.config = config.checkpoint
        self.steps = config.training.steps
        self.folder = config.dump_folder / self.config.folder
        self.model, self.states, self.export = ModelWrapper(model), states, export
        # a separate group on the host: an asynchronous save must not interleave with the collectives of training
        self.group: dist.ProcessGroup = dist.new_group(backend="gloo")  # pyright: ignore[reportAttributeAccessIssue]  # new_group returns an int to processes outside the group; this group has all
        self.stager = _Stager(
            cache_staged_state_dict=self.config.async_mode == "async_with_pinned_mem",
            others=tuple(name for name in states if name != "optimizer"),
        )
        # newest step that was loaded, or whose save was started
        self.saved_step = 0
        self._pending: tuple[int, Future] | None = None

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Loads the newest checkpoint of the run, else the initial one; returns whether there was one.

        Args:
            step: ``checkpoint.load_step``, as torchtitan passes it; `claim_run_folder` checked that it is the newest.

        Raises:
            UsageError: The checkpoint lacks something, or belongs to other data.
        """
        if not self.config.enable_checkpoint:
            return False
        if dist.get_rank() == 0:
            remove_leftovers(self.folder)
        path = newest_checkpoint(self.folder)
        if path is not None:
            excluded: list[str] = []
            weights_only = has_weights_only(read_contents(path))
        elif self.config.initial_load_path is not None:
            path = Path(self.config.initial_load_path)
            excluded = self.config.excluded()
            weights_only = self.config.initial_load_model_weights_only
        else:
            return False
        logger.info(f"loading {'the weights of ' if weights_only else ''}{path}")
        states = {} if weights_only else self.states
        states = {name: x for name, x in states.items() if name not in excluded}
        weights = self.model.state_dict()
        try:
            dcp.load(weights | states, checkpoint_id=str(path), process_group=self.group)  # pyright: ignore[reportPrivateImportUsage]  # torch documents this name but does not export it
        except CheckpointException as error:
            raise UsageError(
                f"checkpoint {path} cannot be loaded ({describe_failure(error)}); if it is damaged, delete the "
                "folder, or copy it again"
            ) from error
        except ValueError as error:
            # from the state of the data, whose message names the flag
            raise UsageError(str(error)) from error
        self.model.load_state_dict(weights)
        if path.parent == self.folder:
            self.saved_step = step_of(path)
            if weights_only:
                # the initial weights, or the last ones of a run that is done
                self.states["train_state"].step = self.saved_step  # pyright: ignore[reportAttributeAccessIssue]  # the trainer, which counts the steps
        elif not weights_only:
            self.saved_step = self.states["train_state"].step  # pyright: ignore[reportAttributeAccessIssue]  # the trainer, which counts the steps
        return True

    def save(self, step: int, last_step: bool = False) -> None:
        """Saves if the interval or the last step asks for it.

        Returns when the state is copied; for the last step, when it is written.
        """
        if self.config.enable_checkpoint and (last_step or step % self.config.interval == 0):
            weights_only = last_step and self.config.last_save_model_weights_only
            dtype = getattr(torch, self.config.export_dtype) if weights_only else None
            self._save(step, weights_only_in=dtype, wait=last_step)

    def save_before_stop(self, step: int) -> None:
        """Makes sure that all of ``step`` is on the disk when this returns."""
        self.wait()
        if self.config.enable_checkpoint and step != self.saved_step:
            self._save(step, wait=True)

    def save_seed(self) -> None:
        """Saves the initial weights as ``step-0``."""
        self._save(0, weights_only_in=torch.float32, wait=True)

    @torch.no_grad()
    def _save(self, step: int, *, wait: bool, weights_only_in: torch.dtype | None = None) -> None:
        self.wait()
        weights = self.model.state_dict()
        state: dict[str, Any] = (
            weights | self.states
            if weights_only_in is None
            else {name: x.to(weights_only_in) for name, x in weights.items()}
        )
        wait = wait or self.config.async_mode == "disabled"
        writer = AtomicWriter(self.folder / f"step-{step}", staged=not wait, then=self._saved)
        self.saved_step = step
        if wait:
            try:
                dcp.save(state, storage_writer=writer, process_group=self.group)  # pyright: ignore[reportPrivateImportUsage]  # torch documents this name but does not export it
            except CheckpointException as error:
                raise self._failure(step, error) from error
        else:
            self._pending = (  # pyright: ignore[reportAttributeAccessIssue]  # a Future, since the stager blocks
                step,
                dcp.async_save(  # pyright: ignore[reportPrivateImportUsage]  # torch documents this name but does not export it
                    state,
                    storage_writer=writer,
                    process_group=self.group,
                    async_stager=self.stager,
                ),
            )

    def _saved(self, path: Path) -> None:
        # runs on one rank, in the saving thread: a checkpoint is deleted only after a newer one is complete
        purge(self.folder, self.config.keep_latest_k)
        if self.config.convert_to_hf_on_save:
            self.export(path, out=path / "hf")

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            UsageError: It could not be written.
        """
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        try:
            future.result()
        except CheckpointException as error:
            raise self._failure(step, error) from error

    def has_failed(self) -> bool:
        """Whether this rank knows that the save in progress has failed; `wait` raises the reason."""
        return (
            self._pending is not None
            and self._pending[1].done()
            and self._pending[1].exception() is not None
        )

    def _failure(self, step: int, error: CheckpointException) -> Exception:
        # when one rank gets the error, all have stopped writing
        if dist.get_rank() == 0:
            remove_unfinished(self.folder, step)
        newest = newest_checkpoint(self.folder)
        kept = f"{newest.name} is kept, from which" if newest else "from the start"
        message = (
            f"checkpoint step-{step} in {self.folder} could not be written: {describe_failure(error)}; "
            f"{kept} the same command continues"
        )
        # a full disk is for the user to fix; any other error is a bug, and keeps its traceback
        return (UsageError if isinstance(first_failure(error), OSError) else RuntimeError)(message)

    def maybe_wait_for_staging(self) -> None:
        """Nothing to wait for: `save` returns when the state is copied."""

    def close(self) -> None:
        """Nothing to close: the process waits for the thread of a save in progress when it ends."""
