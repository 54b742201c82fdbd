"""torchtitan's trainer with our model, data, validation, and a stop that loses nothing."""

import contextlib
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerFast

import flame._compat  # noqa: F401  # before torchtitan
from flame.config import JobConfig
from flame.data import IGNORE_INDEX, TokenLoader, validation_batches
from flame.log import logger
from flame.metrics import Metrics
from flame.models import SoftpickTransformerConfig
from flame.parallelize import parallelize
from flame.titan import ModelArgs, TitanModel, global_batch_size, titan_config
from flame.train_step import CheckedTrainer

# isort: split
import torchtitan.protocols.train_spec as titan_specs
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.validate import BaseValidator
from torchtitan.protocols.train_spec import TrainSpec

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(kw_only=True, slots=True)
class RunInputs:
    """What a run reads before it starts."""

    tokenizer: PreTrainedTokenizerFast
    train_tokens: np.ndarray
    """Token ids ``[N]``."""
    validation_tokens: np.ndarray
    """Token ids ``[M]``, the share held out; empty without validation."""
    model: SoftpickTransformerConfig


class FlameTrainer(CheckedTrainer):
    """One run: trains to ``training.steps`` or to a signal, from the newest checkpoint if there is one."""

    def __init__(self, config: JobConfig, inputs: RunInputs) -> None:
        self.config, self.inputs = config, inputs
        # what this process has heard
        self.stop_signal: signal.Signals | None = None
        self.stop_time = 0.0
        # step of the checkpoint that the run continues from, known when it is loaded
        self.start_step: int | None = None
        titan_specs._extra_train_specs["flame"] = TrainSpec(
            model_cls=TitanModel,
            model_args={"flame": ModelArgs(inputs.model)},
            parallelize_fn=lambda model, parallel_dims, _: parallelize(
                model, parallel_dims, config
            ),
            pipelining_fn=None,
            build_optimizers_fn=build_optimizers,
            build_lr_schedulers_fn=build_lr_schedulers,
            build_dataloader_fn=self._build_dataloader,
            build_tokenizer_fn=None,
            build_loss_fn=build_cross_entropy_loss,
            build_validator_fn=partial(Validator, trainer=self),
            build_metrics_processor_fn=lambda titan, dims, _: Metrics(titan, dims, config),
        )
        super().__init__(titan_config(config))
        if config.training.mixed_precision_param == "float32":
            # torchtitan would turn autocast on with float32, which torch refuses with a warning
            self.maybe_enable_amp = contextlib.nullcontext()
        # a flag on the host, so that asking every step whether to stop does not wait for the GPU
        self.stop_group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=config.comm.init_timeout_seconds)
        )

    def _build_dataloader(self, *, dp_world_size: int, dp_rank: int, **_: Any) -> TokenLoader:
        t = self.config.training
        return TokenLoader(
            self.inputs.train_tokens,
            seq_len=t.seq_len,
            batch_size=t.batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            seed=t.seed,
        )

    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, torch.Tensor],
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Summed loss of a micro-batch over the tokens of the step, with its gradients accumulated."""
        with self.train_context(), self.maybe_enable_amp:
            logits = self.model_parts[0](input_dict["input"])
            loss = self.loss_fn(logits, labels) / global_valid_tokens
        del logits
        # DDP averages gradients over its copies, but the loss is a share of the sum over all of them
        dims = self.parallel_dims
        is_ddp = dims.dp_replicate_enabled and not dims.fsdp_enabled
        (loss * dims.dp_replicate if is_ddp else loss).backward()
        return loss

    def train(self) -> signal.Signals | None:
        """Trains; returns the signal that ended it before the last step, the same on every rank."""
        handlers = {s: signal.signal(s, self._stop) for s in STOP_SIGNALS}
        try:
            super().train()
            stopped = self._agreed_signal()
            config = self.config.checkpoint
            is_saved = self.step % config.interval == 0 or self.step in (
                self.start_step,
                self.config.training.steps,
            )
            if stopped is not None and not is_saved:
                self.checkpointer.save(self.step, last_step=True)
            if config.enable_checkpoint:
                # torchtitan's last save does not count the checkpoints to keep
                self.checkpointer._purge_stale_checkpoints()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        return stopped

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop_signal is None:
            self.stop_signal, self.stop_time = signal.Signals(number), now
        elif now - self.stop_time > 5:
            # asked again, and not the same request passed on once more by torchrun: at once
            sys.exit(128 + number)

    def _agreed_signal(self) -> signal.Signals | None:
        # one process may hear the signal a step before another
        number = torch.tensor(self.stop_signal or 0)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.stop_group)
        return signal.Signals(number.item()) if number.item() else None

    def should_continue_training(self) -> bool:
        if self.start_step is None:
            self.start_step = self.metrics_processor.start_step = self.step
            if self.step >= self.config.training.steps:
                logger.info(f"step {self.step} of {self.config.training.steps} is done already")
        return super().should_continue_training() and self._agreed_signal() is None

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the held-out tokens, in nats a token; the same on every rank."""
        model, dims = self.model_parts[0], self.parallel_dims
        mesh = dims.get_mesh("batch") if dims.dp_enabled else None
        batches = validation_batches(
            self.inputs.validation_tokens,
            seq_len=self.config.training.seq_len,
            batch_size=self.config.training.batch_size,
            dp_rank=mesh.get_local_rank() if mesh else 0,
            dp_world_size=mesh.size() if mesh else 1,
        )
        # [2] summed loss, number of tokens
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        model.eval()
        with self.metrics_processor.pause():
            for input_dict, labels in batches:
                inputs, labels = input_dict["input"].to(self.device), labels.to(self.device)
                with self.maybe_enable_amp:
                    total[0] += self.loss_fn(model(inputs), labels)
                total[1] += (labels != IGNORE_INDEX).sum()
            dist.all_reduce(total)
            loss, num_tokens = total.tolist()
        model.train()
        return loss / num_tokens


class Validator(BaseValidator):
    """Measures the validation loss within the loop; the last step's is measured when the loop has ended."""

    def __init__(self, *, trainer: FlameTrainer, **_: Any) -> None:
        self.trainer = trainer

    def should_validate(self, step: int) -> bool:
        config = self.trainer.config
        return step % config.validation.freq == 0 and step < config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        loss = self.trainer.validation_loss()
        self.trainer.metrics_processor.log_validation(loss, step)


def describe(trainer: FlameTrainer) -> None:
    """Prints what is about to happen."""
    config, t = trainer.config, trainer.config.training
    num_parameters = sum(p.numel() for p in trainer.model_parts[0].parameters())
    dims = trainer.parallel_dims
    sequences = global_batch_size(config)
    logger.info(
        f"{num_parameters:,} parameters, {trainer.inputs.model.attn_impl}, "
        f"{trainer.device.type} x {dims.world_size} "
        f"(replicate {dims.dp_replicate}, shard {dims.dp_shard}), {t.mixed_precision_param}"
    )
    logger.info(
        f"{t.steps:,} steps of {sequences} x {t.seq_len} = {sequences * t.seq_len:,} tokens; "
        f"{len(trainer.inputs.train_tokens):,} to train on, "
        f"{len(trainer.inputs.validation_tokens):,} held out"
    )
    logger.info(f"run folder {config.dump_folder}")
    if config.job.description:
        logger.info(config.job.description)
    if config.job.print_args:
        logger.info(f"flags\n{config.to_toml()}")
