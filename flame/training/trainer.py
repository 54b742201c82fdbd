"""torchtitan's trainer with our model, data, validation, and a stop that loses nothing."""

import contextlib
import signal
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from flame._compat import DEVICE_TYPE  # before torchtitan
from flame.checkpoint import Checkpointer
from flame.checkpoint_folder import newest_checkpoint
from flame.config import JobConfig
from flame.context_parallel import shard_batch
from flame.convert import dcp_to_hf
from flame.data import IGNORE_INDEX, RunData, StreamLoader, TokenLoader
from flame.errors import UsageError
from flame.layout import Layout
from flame.log import logger
from flame.loss import linear_loss
from flame.metrics import Metrics
from flame.models import SoftpickTransformerConfig
from flame.parallelize import parallelize
from flame.rng import RandomState, seed_host
from flame.stop import StopRequest
from flame.titan import ModelArgs, TitanModel, global_batch_size, titan_config
from flame.train_step import CheckedTrainer, DataError

# isort: split
import torchtitan.protocols.train_spec as titan_specs
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.validate import BaseValidator
from torchtitan.config import JobConfig as TitanConfig
from torchtitan.protocols.train_spec import TrainSpec


@dataclass(kw_only=True, slots=True)
class RunInputs:
    """What a run reads before it starts."""

    tokenizer: PreTrainedTokenizerFast
    data: RunData
    model: SoftpickTransformerConfig


class FlameTrainer(CheckedTrainer):
    """One run: trains to ``training.steps`` or to a signal, from the newest checkpoint if there is one."""

    def __init__(self, config: JobConfig, inputs: RunInputs) -> None:
        self.config, self.inputs = config, inputs
        self.linear_loss = linear_loss(config.training.loss, DEVICE_TYPE)
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
        seed_host(config.training.seed)
        super().__init__(titan_config(config))
        if config.training.mixed_precision_param == "float32":
            # torchtitan would turn autocast on with float32, which torch refuses with a warning
            self.maybe_enable_amp = contextlib.nullcontext()
        self.stop = StopRequest(timedelta(seconds=config.comm.init_timeout_seconds))
        self.checkpointer = Checkpointer(
            config,
            model=self.model_parts[0],
            states={
                "optimizer": self.optimizers,
                "lr_scheduler": self.lr_schedulers,
                "dataloader": self.dataloader,
                "train_state": self,
                "rng": RandomState(self.stop.group, self.device, config.training.seed),
            },
            export=partial(
                dcp_to_hf,
                config=inputs.model,
                tokenizer=inputs.tokenizer,
                bos=config.training.bos,
                run=config.dump_folder,
                dtype=getattr(torch, config.checkpoint.export_dtype),
            ),
        )

    def init_distributed(self) -> Layout:
        return Layout.of(super().init_distributed())

    def _build_dataloader(
        self, *, dp_world_size: int, dp_rank: int, tokenizer: None, job_config: TitanConfig
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
        model, inputs = self.model_parts[0], input_dict["input"]
        # a linear loss computes its gradients along with it
        if self.linear_loss is None or not torch.is_grad_enabled():
            return self.loss_fn(model(inputs, **rest), labels)
        return model(inputs, **rest, labels=labels, linear_loss=self.linear_loss)

    def train(self) -> signal.Signals | None:
        """Trains; returns the signal that ended it before the last step, the same on every rank."""
        try:
            super().train()
            stopped, _ = self.stop.agree(failed=False)
            if stopped is None:
                self.checkpointer.wait()
            else:
                self.checkpointer.save_before_stop(self.step)
        except DataError as error:
            # torchtitan counts a step before its data are there
            self.step -= 1
            self.checkpointer.save_before_stop(self.step)
            newest = newest_checkpoint(self.checkpointer.folder)
            then = f"; then the same command continues from {newest.name}" if newest else ""
            raise UsageError(f"step {self.step + 1}: {error}{then}") from error
        finally:
            self.stop.close()
        return stopped

    def should_continue_training(self) -> bool:
        if self.start_step is None:
            self.start_step = self.metrics_processor.start_step = self.step
            if self.step >= self.config.training.steps:
                logger.info(f"step {self.step} of {self.config.training.steps} is done already")
        stopped, failed = self.stop.agree(self.checkpointer.has_failed())
        if self.step > self.start_step:
            # every rank has done a step, so there is something to save
            self.stop.listen()
        if failed:
            # on all ranks after the same step, since one that goes on alone would wait for the others
            self.checkpointer.wait()
        return super().should_continue_training() and stopped is None

    def state_dict(self) -> dict[str, Any]:
        # of all data-parallel ranks, so that another number of them can go on counting
        return super().state_dict() | {"ntokens_seen": self.ntokens_seen * self._data_ranks()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.ntokens_seen = state_dict["ntokens_seen"] // self._data_ranks()

    def _data_ranks(self) -> int:
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard

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

    def __init__(
        self,
        *,
        trainer: FlameTrainer,
        # what torchtitan gives besides, of which the trainer has all that is needed
        job_config: TitanConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: None,
        parallel_dims: Layout,
        loss_fn: Any,
        validation_context: Any,
        maybe_enable_amp: Any,
        metrics_processor: Any,
        pp_schedule: None,
        pp_has_first_stage: None,
        pp_has_last_stage: None,
    ) -> None:
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
    if config.lr_scheduler.warmup_steps > t.steps:
        logger.info(
            f"--lr_scheduler.warmup_steps {config.lr_scheduler.warmup_steps} is more than --training.steps {t.steps}: "
            "the learning rate rises to the end"
        )
    if t.compile:
        logger.info("the first step compiles the model, which takes a minute or more")
    logger.info(trainer.inputs.data.begins)
    logger.info(f"run folder {config.dump_folder}")
    if config.job.description:
        logger.info(config.job.description)
    if config.job.print_args:
        logger.info(f"flags\n{config.to_toml()}")
