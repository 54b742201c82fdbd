"""torchtitan's trainer with our model, data, validation, and a stop that loses nothing."""

import contextlib
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

import flame._compat  # noqa: F401  # before torchtitan
from flame.config import JobConfig
from flame.context_parallel import shard_batch
from flame.data import IGNORE_INDEX, RunData, StreamLoader, TokenLoader
from flame.layout import Layout
from flame.log import logger
from flame.metrics import Metrics
from flame.models import SoftpickTransformerConfig
from flame.parallelize import parallelize
from flame.titan import ModelArgs, TitanModel, global_batch_size, titan_config

# isort: split
import torchtitan.protocols.train_spec as titan_specs
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.validate import BaseValidator
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.train import Trainer

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(kw_only=True, slots=True)
class RunInputs:
    """What a run reads before it starts."""

    tokenizer: PreTrainedTokenizerFast
    data: RunData
    model: SoftpickTransformerConfig


class FlameTrainer(Trainer):
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
            model_args={"flame": ModelArgs(inputs.model, config.training.seed)},
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
        self.stop_group = dist.new_group(backend="gloo")

    def init_distributed(self) -> Layout:
        return Layout.of(super().init_distributed())

    def _build_dataloader(
        self, *, dp_world_size: int, dp_rank: int, **_: Any
    ) -> TokenLoader | StreamLoader:
        return self.inputs.data.loader(dp_rank=dp_rank, dp_world_size=dp_world_size)

    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, torch.Tensor],
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Summed loss of a micro-batch over the tokens of the step, with its gradients accumulated."""
        with self.train_context():
            with self.maybe_enable_amp:
                loss = self._summed_loss(input_dict, labels) / global_valid_tokens
            loss.backward()
        return _local(loss)

    def _summed_loss(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the losses of the labels ``[B, T]``, of this process's share under context parallelism."""
        if (mesh := self.parallel_dims.get_optional_mesh("cp")) is not None:
            input_dict, labels = shard_batch(input_dict, labels, mesh)
        rest = {name: x for name, x in input_dict.items() if name != "input"}
        return self.loss_fn(self.model_parts[0](input_dict["input"], **rest), labels)

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
        batches = self.inputs.data.validation(
            dp_rank=mesh.get_local_rank() if mesh else 0,
            dp_world_size=mesh.size() if mesh else 1,
        )
        # [2] summed loss, number of tokens
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        model.eval()
        with self.metrics_processor.pause():
            for input_dict, labels in batches:
                input_dict = {name: x.to(self.device) for name, x in input_dict.items()}
                labels = labels.to(self.device)
                with self.train_context(), self.maybe_enable_amp:
                    total[0] += _local(self._summed_loss(input_dict, labels))
                # processes that share a sequence count its labels each, and its loss in parts
                total[1] += (labels != IGNORE_INDEX).sum() / dims.cp
            dist.all_reduce(total)
            loss, num_tokens = total.tolist()
        model.train()
        return loss / num_tokens

    def close(self) -> None:
        self.dataloader.close()
        super().close()


def _local(loss: torch.Tensor) -> torch.Tensor:
    """A loss that tensor parallelism left on a mesh, where every process has all of it, as a plain tensor."""
    return loss.to_local() if isinstance(loss, DTensor) else loss


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
        f"(replicate {dims.dp_replicate}, shard {dims.dp_shard}, tensor {dims.tp}, "
        f"context {dims.cp}), {t.mixed_precision_param}"
    )
    logger.info(
        f"{t.steps:,} steps of {sequences} x {t.seq_len} = {sequences * t.seq_len:,} tokens; "
        f"{trainer.inputs.data.summary}"
    )
    logger.info(f"run folder {config.dump_folder}")
