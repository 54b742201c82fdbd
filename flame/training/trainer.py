"""torchtitan's trainer with this project's model, data and validation; a stop signal loses no step."""

import contextlib
import math
import signal
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from flame.base.errors import UsageError
from flame.base.log import logger
from flame.base.tensors import local_tensor
from flame.checkpoints.checkpointer import Checkpointer
from flame.checkpoints.step_folder import newest_checkpoint
from flame.config.sections import JobConfig
from flame.data.batches import IGNORE_INDEX
from flame.data.loader import TokenLoader
from flame.data.stream import StreamLoader
from flame.models.linear_loss import linear_loss
from flame.run.export import export_model
from flame.run.inputs import RunInputs
from flame.titan.config import global_batch_size, titan_config
from flame.titan.context_parallel import shard_batch
from flame.titan.mesh import Layout
from flame.titan.model import ModelArgs, TitanModel
from flame.titan.parallelize import parallelize
from flame.titan.patches import DEVICE_TYPE
from flame.titan.upstream import (
    TitanConfig,
    Trainer,
    build_cross_entropy_loss,
    build_lr_schedulers,
    build_optimizers,
    dist_utils,
    train_spec,
)
from flame.training import held_out
from flame.training.lost_processes import make_trace_folder
from flame.training.metrics_processor import RunMetrics
from flame.training.random_state import RandomState, seed_host
from flame.training.spikes import StepCheck
from flame.training.step import DataError, HostCopy, Microbatch, clip_gradients, read_stream
from flame.training.stop_request import StopRequest


class FlameTrainer(Trainer):
    """One run: trains to ``training.steps`` or to a signal, from the newest checkpoint if there is one."""

    # narrower than in torchtitan's Trainer
    checkpointer: Checkpointer
    metrics_processor: RunMetrics  # pyright: ignore[reportIncompatibleVariableOverride]  # build_metrics_processor_fn makes this subclass
    dataloader: TokenLoader | StreamLoader  # pyright: ignore[reportIncompatibleVariableOverride]  # not subclasses of BaseDataLoader, but Stateful iterables, which is what torchtitan uses

    def __init__(self, config: JobConfig, inputs: RunInputs) -> None:
        self.config, self.inputs = config, inputs
        self.linear_loss = linear_loss(config.training.loss, DEVICE_TYPE)
        # step of the checkpoint that the run continues from, set when it is loaded
        self.start_step: int | None = None
        train_spec._extra_train_specs["flame"] = train_spec.TrainSpec(
            model_cls=TitanModel,
            model_args={"flame": ModelArgs(inputs.model, config.training.seed)},
            parallelize_fn=lambda model, parallel_dims, _: parallelize(
                model, parallel_dims, config
            ),
            pipelining_fn=None,
            build_optimizers_fn=build_optimizers,
            build_lr_schedulers_fn=build_lr_schedulers,
            build_dataloader_fn=self._build_dataloader,  # pyright: ignore[reportArgumentType]  # its loaders are Stateful iterables, not subclasses of BaseDataLoader
            build_tokenizer_fn=None,
            build_loss_fn=build_cross_entropy_loss,
            build_validator_fn=partial(held_out.Validator, trainer=self),
            build_metrics_processor_fn=lambda titan, dims, _: RunMetrics(titan, dims, config),
        )
        seed_host(config.training.seed)
        super().__init__(titan_config(config))
        if config.training.mixed_precision_param == "float32":
            # torchtitan would turn autocast on with float32, which torch refuses with a warning
            self.maybe_enable_amp = contextlib.nullcontext()
        self.step_check = StepCheck(config, self.model_parts[0], self.device)
        self.stop = StopRequest(timedelta(seconds=config.comm.init_timeout_seconds))
        self.checkpointer = Checkpointer(  # pyright: ignore[reportIncompatibleVariableOverride]  # not a subclass of torchtitan's, but it has the methods that torchtitan calls
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
                export_model,
                config=inputs.model,
                tokenizer=inputs.tokenizer,
                bos=config.training.bos,  # pyright: ignore[reportArgumentType]  # set_bos has replaced None
                run=config.dump_folder,
                dtype=getattr(torch, config.checkpoint.export_dtype),
            ),
        )

    def init_distributed(self) -> Layout:
        """Joins the process group; the layout shards weights with FSDP2 in every run of several processes."""
        return Layout.of(super().init_distributed())

    def _build_dataloader(
        self, *, dp_world_size: int, dp_rank: int, tokenizer: None, job_config: TitanConfig
    ) -> TokenLoader | StreamLoader:
        return self.inputs.data.loader(dp_rank=dp_rank, dp_world_size=dp_world_size)

    def train_step(self, data_iterator: Iterator[Microbatch]) -> None:
        """Forward and backward over the micro-batches, clipping, the optimizer's step and the schedule's.

        Raises:
            TrainingError: Loss or gradient norm is not finite and the step is not to be skipped, or
                ``training.max_skipped_steps`` were skipped in a row. The same on every process.
            DataError: The data of a stream cannot be read; its loader is reset to the start of the step.
        """
        training, dims = self.config.training, self.parallel_dims
        is_first = self.start_step is not None and self.step == self.start_step + 1
        if is_first:
            make_trace_folder(self.config)
        self.optimizers.zero_grad()
        lr: float = self.lr_schedulers.schedulers[0].get_last_lr()[0]  # pyright: ignore[reportAssignmentType]  # a float, since the optimizer's rate is no tensor
        microbatches = self._read_microbatches(data_iterator)
        tokens = sum((labels != IGNORE_INDEX).sum() for _, labels in microbatches).to(self.device)  # pyright: ignore[reportAttributeAccessIssue]  # at least one tensor is summed, so the sum is no int
        if dims.dp_enabled:
            dist.all_reduce(tokens, group=dims.get_mesh("batch").get_group())
        losses = []
        for input_dict, labels in microbatches:
            on_device = {
                name: x.to(self.device) if isinstance(x, torch.Tensor) else x
                for name, x in input_dict.items()
            }
            loss = self.forward_backward_step(
                input_dict=on_device,
                labels=labels.to(self.device),
                global_valid_tokens=tokens,
            )
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        if dims.dp_cp_enabled:
            dist.all_reduce(loss, group=dims.get_mesh("loss").get_group())
        parameters = [p for part in self.model_parts for p in part.parameters()]
        grad_norm = clip_gradients(parameters, training.max_norm)
        # the norm is already on the host if gradients are offloaded
        on_host = HostCopy(torch.stack([loss.float(), grad_norm.float().to(self.device)]))
        self.checkpointer.maybe_wait_for_staging()
        if not training.skip_nan_inf:
            self.optimizers.step()
        loss, grad_norm = on_host.wait()
        if training.skip_nan_inf and math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizers.step()
        # a skipped step counts in the schedule, as in upstream flame: a step is a position in the data
        self.lr_schedulers.step()
        self.step_check.check(
            self.step, loss=loss, grad_norm=grad_norm, lr=lr, microbatches=microbatches
        )
        if self.metrics_processor.should_log(self.step):
            extra = {"lr": lr}
            if training.skip_nan_inf:
                extra["skipped_steps"] = self.step_check.skipped_steps
            self.metrics_processor.log(self.step, loss, loss, grad_norm, extra_metrics=extra)
        freq = self.config.metrics.attention_freq
        if freq and self.step % freq == 0:
            with self.metrics_processor.pause():
                scalars = self.attention_scalars()
            self.metrics_processor.log_attention(scalars, self.step)
        if is_first:
            self._shorten_timeouts()

    def _read_microbatches(self, data_iterator: Iterator[Microbatch]) -> list[Microbatch]:
        count = self.gradient_accumulation_steps
        if not self.config.training.streaming:
            return [next(data_iterator) for _ in range(count)]
        ntokens_seen = self.ntokens_seen
        try:
            return read_stream(data_iterator, count, loader=self.dataloader, stop=self.stop)  # pyright: ignore[reportArgumentType]  # with --training.streaming the loader is a StreamLoader
        except DataError:
            self.ntokens_seen = ntokens_seen
            raise

    def _shorten_timeouts(self) -> None:
        """Shortens timeouts after the first step, which compiles: from then on a late process is stuck."""
        timeout = timedelta(seconds=self.config.comm.train_timeout_seconds)
        if self.step != 1:
            # torchtitan does so only after step 1, not in a run that continues
            dist_utils.set_pg_timeouts(timeout, self.parallel_dims)
        dist.distributed_c10d._set_pg_timeout(timeout, self.stop.group)

    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, torch.Tensor],
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Summed loss of a micro-batch divided by the tokens of the step; accumulates its gradients."""
        with self.train_context():
            with self.maybe_enable_amp:
                loss = self.summed_loss(input_dict, labels) / global_valid_tokens
            loss.backward()
        return local_tensor(loss)

    def summed_loss(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the losses of the labels ``[B, T]``, of this process's share under context parallelism."""
        if (mesh := self.parallel_dims.get_optional_mesh("cp")) is not None:
            input_dict, labels = shard_batch(input_dict, labels, mesh)
        rest = {name: x for name, x in input_dict.items() if name != "input"}
        model, inputs = self.model_parts[0], input_dict["input"]
        # a linear loss always computes its gradients too
        if self.linear_loss is None or not torch.is_grad_enabled():
            return self.loss_fn(model(inputs, **rest), labels)
        return model(inputs, **rest, labels=labels, linear_loss=self.linear_loss)

    def train(self) -> signal.Signals | None:  # pyright: ignore[reportIncompatibleMethodOverride]  # torchtitan's returns None
        """Trains; returns the signal that ended it before the last step, the same on every rank.

        Raises:
            UsageError: The data of a stream cannot be read; the steps so far are saved.
        """
        try:
            super().train()
            stopped, _ = self.stop.agree(failed=False)
            if stopped is None:
                self.checkpointer.wait()
            else:
                self.checkpointer.save_before_stop(self.step)
        except DataError as error:
            # torchtitan counts a step before it reads the data
            self.step -= 1
            self.checkpointer.save_before_stop(self.step)
            newest = newest_checkpoint(self.checkpointer.folder)
            then = f"; then the same command continues from {newest.name}" if newest else ""
            raise UsageError(f"step {self.step + 1}: {error}{then}") from error
        finally:
            self.stop.close()
        return stopped

    def should_continue_training(self) -> bool:
        """Whether another step follows: the same answer on all ranks, which all must ask.

        The first call, after the checkpoint is loaded, sets ``start_step``.
        """
        if self.start_step is None:
            self.start_step = self.metrics_processor.start_step = self.step
            if self.step >= self.config.training.steps:
                logger.info(f"step {self.step} of {self.config.training.steps} is done already")
        stopped, failed = self.stop.agree(self.checkpointer.has_failed())
        if self.step > self.start_step:
            # every rank has finished a step, so there is something to save
            self.stop.listen()
        if failed:
            # on all ranks after the same step: a rank that continued alone would wait for the others
            self.checkpointer.wait()
        return super().should_continue_training() and stopped is None

    def state_dict(self) -> dict[str, Any]:
        """Step, skipped steps, and the tokens that all data-parallel ranks have seen."""
        # the total over data-parallel ranks, so that another number of ranks can continue it
        tokens = {"ntokens_seen": self.ntokens_seen * self._data_ranks()}
        return super().state_dict() | self.step_check.state_dict() | tokens

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the counts of a checkpoint, which another number of ranks may have written."""
        super().load_state_dict(state_dict)
        self.step_check.load_state_dict(state_dict)
        self.ntokens_seen = state_dict["ntokens_seen"] // self._data_ranks()

    def _data_ranks(self) -> int:
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard

    def validation_loss(self) -> float:
        """Mean loss over the held-out tokens, in nats per token; the same on every rank."""
        return held_out.validation_loss(self)

    def attention_scalars(self) -> dict[str, float]:
        """Statistics of every layer's attention on the first ``metrics.attention_sequences`` held-out sequences."""
        return held_out.attention_scalars(self)

    def close(self) -> None:
        """Ends the workers of the data before torchtitan's own clean-up."""
        self.dataloader.close()
        super().close()


def describe(trainer: FlameTrainer) -> None:
    """Logs model, layout, steps, data and folder of the run."""
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
