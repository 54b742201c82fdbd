"""Handles loss spikes and steps that are not finite: writes a dump, counts a skipped step, or ends the run."""

import io
import math
import statistics
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flame.base.errors import TrainingError
from flame.base.log import logger
from flame.base.tensors import full_tensor
from flame.config.sections import JobConfig
from flame.run.metrics_file import strict_json
from flame.training.step import Microbatch

SPIKE_FOLDER = "spikes"


class SpikeDetector:
    """Detects a spike from the losses of the previous steps."""

    def __init__(self, *, window: int, deviations: float) -> None:
        self.deviations = deviations
        self.window = window
        self.losses: deque[float] = deque(maxlen=window)

    def threshold(self) -> float:
        """The loss above which the next step is a spike; infinite until the window is full."""
        if not self.deviations or len(self.losses) < self.window:
            return math.inf
        return statistics.fmean(self.losses) + self.deviations * statistics.pstdev(self.losses)


class StepCheck:
    """Checks loss and gradient norm of every step of a run.

    skipped_steps: Steps without an update since the start of the run.
    skipped_in_a_row: Steps without an update since the last update.
    """

    def __init__(self, config: JobConfig, model: nn.Module, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        metrics = config.metrics
        self.detector = SpikeDetector(
            window=metrics.spike_window, deviations=metrics.spike_deviations
        )
        self.skipped_steps = self.skipped_in_a_row = self.num_dumps = 0

    def state_dict(self) -> dict[str, int]:
        """The two counts. The losses are not saved: a continued run fills its window anew."""
        return {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the counts of a checkpoint."""
        self.skipped_steps = state_dict["skipped_steps"]
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]

    def check(
        self, step: int, *, loss: float, grad_norm: float, lr: float, microbatches: list[Microbatch]
    ) -> None:
        """Writes a dump of a step that is a spike or not finite, and counts a skipped step.

        Raises:
            TrainingError: Loss or gradient norm is not finite and the step is not to be skipped, or
                ``training.max_skipped_steps`` were skipped in a row. The same on every process.
        """
        training = self.config.training
        seen = {"loss": loss, "gradient_norm": grad_norm, "lr": lr}
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            threshold = self.detector.threshold()
            if loss > threshold:
                seen["threshold"] = threshold
                dump_note = self._write_spike_dump(step, seen, "spike", microbatches)
                logger.info(
                    f"step {step}: loss {loss:.4f} is a spike, above {threshold:.4f}{dump_note}"
                )
            self.detector.losses.append(loss)
            return
        dump_note = self._write_spike_dump(step, seen, "not finite", microbatches)
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if not training.skip_nan_inf:
            raise TrainingError(
                f"{what}{dump_note}; --training.skip_nan_inf would leave such steps out"
            )
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= training.max_skipped_steps:
            raise TrainingError(
                f"{what}{dump_note}; {self.skipped_in_a_row} steps in a row were skipped "
                f"(--training.max_skipped_steps {training.max_skipped_steps})"
            )
        logger.info(f"{what}: no update{dump_note}")

    def _write_spike_dump(
        self, step: int, seen: dict[str, float], reason: str, microbatches: list[Microbatch]
    ) -> str:
        """Writes the batch and norms of the step to ``spikes/step-N``; returns a message suffix with the folder."""
        if self.num_dumps >= self.config.metrics.max_dumps:
            return ""
        self.num_dumps += 1
        folder = self.config.dump_folder / SPIKE_FOLDER / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        rank = dist.get_rank()
        batch = {
            "step": step,
            "inputs": [inputs for inputs, _ in microbatches],
            "labels": [labels for _, labels in microbatches],
        }
        # through a buffer, since torch's writer does not report a full disk as an OSError
        buffer = io.BytesIO()
        torch.save(batch, buffer)
        (folder / f"batch.rank{rank}.pt").write_bytes(buffer.getbuffer())
        # on every rank: norms of sharded parameters are collectives
        norms = self._norms(seen["gradient_norm"])
        if rank == 0:
            summary = {"step": step, "reason": reason, **seen, "parameters": norms}
            text = strict_json(summary, indent=1) + "\n"
            (folder / "summary.json").write_text(text, encoding="utf-8")
        return f"; its batch and the norms of every layer are in {folder}"

    @torch.no_grad()
    def _norms(self, total: float) -> dict[str, dict[str, float]]:
        """Norms of every parameter and of its gradient before clipping."""
        max_norm = self.config.training.max_norm
        scale = max(1.0, (total + 1e-6) / max_norm) if math.isfinite(total) else 1.0
        named = list(self.model.named_parameters())
        values = []
        for _, p in named:
            gradient = p.grad.norm() * scale if p.grad is not None else p.new_zeros(())
            values += [full_tensor(p.norm()), full_tensor(gradient)]
        numbers = torch.stack([x.float().to(self.device) for x in values]).tolist()
        return {
            name.replace("_checkpoint_wrapped_module.", ""): {"norm": norm, "gradient_norm": grad}
            for (name, _), norm, grad in zip(named, numbers[::2], numbers[1::2], strict=True)
        }
