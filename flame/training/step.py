"""One optimizer step, and what happens when its loss or its gradients are not what they should be.

torchtitan's step asks nobody between the gradients and the optimizer, so this one takes its place. The host
learns loss and gradient norm of every step; with ``--training.skip_nan_inf`` before the optimizer runs, else
while it runs, which leaves the GPU with work in the meantime.
"""

import contextlib
import io
import math
import os
import pickle
import re
import statistics
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import flame._compat  # noqa: F401  # before torchtitan
from flame.attention_stats import Observer, observe
from flame.config import JobConfig
from flame.data import IGNORE_INDEX
from flame.errors import PATIENCE_S, TrainingError
from flame.log import logger
from flame.models import normalizer_of
from flame.stop import StopRequest
from flame.writers import strict_json

# isort: split
from torchtitan.distributed import utils as dist_utils
from torchtitan.train import Trainer


class DataError(ValueError):
    """No step can be made of the data that come next; the message is the same on every process."""


Microbatch = tuple[dict[str, torch.Tensor], torch.Tensor]

SPIKE_FOLDER = "spikes"
TRACE_FOLDER = "comm_traces"
# what gloo says of a collective that the other processes did not join
_LOST = re.compile(
    r"[Tt]imed out|[Tt]imeout|Connection closed by peer|Connection reset|Broken pipe"
)


class LossWatch:
    """Tells a spike from the losses of the steps before."""

    def __init__(self, *, window: int, deviations: float) -> None:
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=window)

    def threshold(self) -> float:
        """The loss above which the next step is a spike; infinite as long as the window is not full."""
        if not self.deviations or len(self.losses) < self.losses.maxlen:
            return math.inf
        return statistics.fmean(self.losses) + self.deviations * statistics.pstdev(self.losses)


class _OnHost:
    """Numbers of the device that the host waits for without waiting for what is queued after them."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if values.is_cuda else None
        if self.event is not None:
            self.event.record()

    def wait(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


class CheckedTrainer(Trainer):
    """torchtitan's trainer with a step that looks at loss and gradients.

    A subclass sets `config` before it calls ``super().__init__``, and `stop` and `start_step` after.
    """

    config: JobConfig
    stop: StopRequest
    start_step: int | None
    # steps without an update: in all, and since the last one with
    skipped_steps = 0
    skipped_in_a_row = 0
    num_dumps = 0
    watch: LossWatch | None = None

    def train_step(self, data_iterator: Iterator[Microbatch]) -> None:
        """Forward and backward over the micro-batches, clipping, the optimizer's step and the schedule's.

        Raises:
            TrainingError: Loss or gradient norm is not finite and the step is not to be skipped, or
                ``training.max_skipped_steps`` were skipped in a row. The same on every process.
            DataError: The data of a stream cannot be read; its loader is where the step began.
        """
        training, dims = self.config.training, self.parallel_dims
        is_first = self.start_step is not None and self.step == self.start_step + 1
        if is_first and self.config.comm.trace_buf_size:
            # by now rank 0 has made sure that the dump folder is this run's
            _trace_folder(self.config).mkdir(exist_ok=True)
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        microbatches = self._microbatches(data_iterator)
        tokens = sum((labels != IGNORE_INDEX).sum() for _, labels in microbatches).to(self.device)
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
        grad_norm = self.clip_gradients()
        # the norm is on the host already where gradients are
        on_host = _OnHost(torch.stack([loss.float(), grad_norm.float().to(self.device)]))
        self.checkpointer.maybe_wait_for_staging()
        if not training.skip_nan_inf:
            self.optimizers.step()
        loss, grad_norm = on_host.wait()
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if training.skip_nan_inf and is_finite:
            self.optimizers.step()
        # a skipped step counts in the schedule, as in upstream flame: a step is a place in the data
        self.lr_schedulers.step()
        self._judge(loss, grad_norm, lr, is_finite, microbatches)
        if self.metrics_processor.should_log(self.step):
            extra = {"lr": lr} | self._skipped()
            self.metrics_processor.log(self.step, loss, loss, grad_norm, extra_metrics=extra)
        freq = self.config.metrics.attention_freq
        if freq and self.step % freq == 0:
            with self.metrics_processor.pause():
                scalars = self.attention_scalars()
            self.metrics_processor.log_attention(scalars, self.step)
        if is_first:
            self._end_of_first_step()

    def _microbatches(self, data_iterator: Iterator[Microbatch]) -> list[Microbatch]:
        count = self.gradient_accumulation_steps
        if not self.config.training.streaming:
            return [next(data_iterator) for _ in range(count)]
        mark, ntokens_seen = self.dataloader.mark(), self.ntokens_seen
        microbatches, problem = [], None
        try:
            microbatches = [next(data_iterator) for _ in range(count)]
        # a shard that is damaged, by name, perhaps on this process's machine alone
        except ValueError as error:
            problem = str(error)
        _, has_failed = self.stop.agree(problem is not None)
        if not has_failed:
            return microbatches
        problems = [problem] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self.stop.group)
        self.dataloader.rewind(mark)
        self.ntokens_seen = ntokens_seen
        raise DataError(next(x for x in problems if x is not None))

    def clip_gradients(self) -> torch.Tensor:
        """Scales gradients down to ``training.max_norm``; returns their norm before, a scalar of the device.

        Gradients whose norm is not finite are left as they are, so that a dump shows which layer it came from.
        """
        parameters = [p for part in self.model_parts for p in part.parameters()]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = norm.nan_to_num(nan=0.0, posinf=0.0)
        clip_grads_with_norm_(parameters, self.config.training.max_norm, finite, foreach=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        counts = {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}
        return super().state_dict() | counts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.skipped_steps = state_dict["skipped_steps"]
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]

    def _skipped(self) -> dict[str, int]:
        return {"skipped_steps": self.skipped_steps} if self.config.training.skip_nan_inf else {}

    def _judge(
        self,
        loss: float,
        grad_norm: float,
        lr: float,
        is_finite: bool,
        microbatches: list[Microbatch],
    ) -> None:
        metrics, training = self.config.metrics, self.config.training
        if self.watch is None:
            self.watch = LossWatch(window=metrics.spike_window, deviations=metrics.spike_deviations)
        seen = {"loss": loss, "gradient_norm": grad_norm, "lr": lr}
        if is_finite:
            self.skipped_in_a_row = 0
            threshold = self.watch.threshold()
            if loss > threshold:
                place = self._dump(seen | {"threshold": threshold}, "spike", microbatches)
                logger.info(
                    f"step {self.step}: loss {loss:.4f} is a spike, above {threshold:.4f}{place}"
                )
            self.watch.losses.append(loss)
            return
        place = self._dump(seen, "not finite", microbatches)
        what = f"step {self.step}: loss {loss}, gradient norm {grad_norm}"
        if not training.skip_nan_inf:
            raise TrainingError(
                f"{what}{place}; --training.skip_nan_inf would leave such steps out"
            )
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= training.max_skipped_steps:
            raise TrainingError(
                f"{what}{place}; {self.skipped_in_a_row} steps in a row were skipped "
                f"(--training.max_skipped_steps {training.max_skipped_steps})"
            )
        logger.info(f"{what}: no update{place}")

    def _dump(self, seen: dict[str, float], reason: str, microbatches: list[Microbatch]) -> str:
        """Writes what the step saw to ``spikes/step-N``; returns where, for the end of a message."""
        if self.num_dumps >= self.config.metrics.max_dumps:
            return ""
        self.num_dumps += 1
        folder = self.config.dump_folder / SPIKE_FOLDER / f"step-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        rank = dist.get_rank()
        batch = {
            "step": self.step,
            "inputs": [inputs for inputs, _ in microbatches],
            "labels": [labels for _, labels in microbatches],
        }
        # torch's own writer says nothing of a full disk
        buffer = io.BytesIO()
        torch.save(batch, buffer)
        (folder / f"batch.rank{rank}.pt").write_bytes(buffer.getbuffer())
        # norms are collectives where parameters are sharded
        norms = self._norms(seen["gradient_norm"])
        if rank == 0:
            summary = {"step": self.step, "reason": reason, **seen, "parameters": norms}
            text = strict_json(summary, indent=1) + "\n"
            (folder / "summary.json").write_text(text, encoding="utf-8")
        return f"; its batch and the norms of every layer are in {folder}"

    @torch.no_grad()
    def _norms(self, total: float) -> dict[str, dict[str, float]]:
        """Norms of every parameter and of its gradient as it was before clipping."""
        max_norm = self.config.training.max_norm
        scale = max(1.0, (total + 1e-6) / max_norm) if math.isfinite(total) else 1.0
        named = [x for part in self.model_parts for x in part.named_parameters()]
        values = []
        for _, p in named:
            pair = [p.norm(), p.grad.norm() * scale if p.grad is not None else p.new_zeros(())]
            values += [x.full_tensor() if isinstance(x, DTensor) else x for x in pair]
        numbers = torch.stack([x.float().to(self.device) for x in values]).tolist()
        return {
            name.replace("_checkpoint_wrapped_module.", ""): {"norm": norm, "gradient_norm": grad}
            for (name, _), norm, grad in zip(named, numbers[::2], numbers[1::2], strict=True)
        }

    def _end_of_first_step(self) -> None:
        """What compiles has compiled: from here on a process that keeps the others waiting is stuck."""
        timeout = timedelta(seconds=self.config.comm.train_timeout_seconds)
        if self.step != 1:
            # torchtitan does so after step 1 alone, not in a run that continues
            dist_utils.set_pg_timeouts(timeout, self.parallel_dims)
        dist.distributed_c10d._set_pg_timeout(timeout, self.stop.group)

    @torch.no_grad()
    def attention_scalars(self) -> dict[str, float]:
        """Statistics of every layer's attention on the first ``metrics.attention_sequences`` held-out sequences.

        The same sequences whatever the number of processes, which all take part.
        """
        model, dims = self.model_parts[0], self.parallel_dims
        attn_impl = self.inputs.model.attn_impl
        layers = len(model.model.layers)
        mesh = dims.get_mesh("batch") if dims.dp_enabled else None
        rank, size = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
        observer = Observer(layers, normalizer_of(attn_impl), self.device)
        batches = self.inputs.data.validation(dp_rank=rank, dp_world_size=size, batch_size=1)
        model.eval()
        with observe(model.model, attn_impl, observer), self.maybe_enable_amp:
            for i, (input_dict, labels) in enumerate(batches):
                if i * size >= self.config.metrics.attention_sequences:
                    break
                # a process without a sequence left runs along, since layers are gathered together
                is_asked = i * size + rank < self.config.metrics.attention_sequences
                observer.is_counting = is_asked and bool((labels != IGNORE_INDEX).any())
                on_device = {name: x.to(self.device) for name, x in input_dict.items()}
                model(on_device.pop("input"), **on_device)
        model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # without a backward pass the outermost weights would stay gathered
                module.reshard()
        observer.reduce()
        return observer.scalars()


def _trace_folder(config: JobConfig) -> Path:
    return config.dump_folder / TRACE_FOLDER


@contextlib.contextmanager
def explain_lost_processes(trainer: CheckedTrainer) -> Iterator[None]:
    """Turns gloo's words for a collective that was not joined into a `TrainingError`, with what led up to it.

    Where NCCL is what waits, it writes its trace and ends the process itself.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not _LOST.search(str(error)):
            raise
        if "TORCHELASTIC_RUN_ID" in os.environ:
            trainer.stop.exit_if_told(PATIENCE_S)
        file = _write_trace(trainer.config)
        where = f"; its last collectives are in {file}" if file else ""
        raise TrainingError(
            f"step {trainer.step}: another process ended, or did not answer within "
            f"--comm.train_timeout_seconds {trainer.config.comm.train_timeout_seconds}{where} ({error})"
        ) from error


def _write_trace(config: JobConfig) -> Path | None:
    """Writes this process's flight recorder as NCCL would, or for gloo alone, which torchfrtrace does not
    read, as JSON."""
    folder = _trace_folder(config)
    if not config.comm.trace_buf_size or not folder.is_dir():
        return None
    file = folder / f"rank_{dist.get_rank()}"
    c10d = torch._C._distributed_c10d
    if torch.cuda.is_available():
        file.write_bytes(c10d._dump_nccl_trace())
        return file
    # made by this very process; its own form as JSON leaves the stacks out
    entries = pickle.loads(c10d._dump_fr_trace())["entries"]
    file = file.with_suffix(".json")
    file.write_text(strict_json(entries, indent=1) + "\n", encoding="utf-8")
    return file
