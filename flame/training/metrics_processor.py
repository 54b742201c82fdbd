"""Metrics of training: one line on the screen and one set of scalars every `log_freq` steps."""

import math
import shutil
import sys
import time
from typing import Any

import torch.distributed as dist

from flame.base.log import logger
from flame.config.sections import JobConfig
from flame.run.metrics_file import METRICS_FILE, JsonLines, TensorBoard, WeightsAndBiases, Writer
from flame.titan.upstream import MetricsProcessor, NoColor, ParallelDims, TitanConfig


class RunMetrics(MetricsProcessor):
    """torchtitan's counters, with this project's log line and scalars."""

    def __init__(
        self, titan_config: TitanConfig, parallel_dims: ParallelDims, config: JobConfig
    ) -> None:
        super().__init__(titan_config, parallel_dims)
        self.config = config
        if not sys.stdout.isatty():
            self.color = NoColor()
        # step and time of the first line: what comes before is start-up and compilation
        self.first_log: tuple[int, float] | None = None
        # opened at the first measurement, when the step that the run continues from is known
        self.writers: list[Writer] | None = None
        self.start_step = 0
        # open wandb before building the model, so that a missing login fails early
        is_first = dist.get_rank() == 0
        self.wandb = WeightsAndBiases(config) if config.metrics.enable_wandb and is_first else None

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Writes and prints the numbers of a step, with speeds since the line before.

        ``global_avg_loss`` is the loss in nats per token; ``extra_metrics`` must have ``lr``. Speeds are those of all processes.
        """
        extra_metrics = extra_metrics or {}
        now = time.perf_counter()
        seconds = now - self.time_last_log
        # tensor and context parallelism give several processes the same tokens
        shared = self.parallel_dims.non_data_parallel_size
        local_tokens_per_s = self.ntokens_since_last_log / shared / seconds
        tokens_per_s = local_tokens_per_s * dist.get_world_size()
        mfu = self.num_flops_per_token * local_tokens_per_s / self.gpu_peak_flops
        memory = self.device_memory_monitor.get_peak_stats().max_reserved_gib
        scalars = {
            "loss": global_avg_loss,
            "grad_norm": grad_norm,
            # lr, and skipped_steps where steps may be skipped
            **extra_metrics,
            "tokens_per_s": tokens_per_s,
            "memory_GiB": memory,
            "data_loading_share": sum(self.data_loading_times) / seconds,
        }
        # NaN where the peak of the device is unknown
        if math.isfinite(mfu):
            scalars["mfu"] = mfu
        self._write(scalars, step)
        steps = self.config.training.steps
        color = self.color
        skipped = extra_metrics.get("skipped_steps")
        # (rank of importance, colour, text), in the order in which they are printed
        pieces = [
            (0, color.red, f"step {step:>{len(str(steps))}}/{steps} {step / steps:4.0%}"),
            (1, color.green, f"loss {global_avg_loss:.4f}"),
            (5, color.orange, f"grad {grad_norm:.3g}"),
            (7, color.turquoise, f"lr {scalars['lr']:.2e}"),
            (4, color.blue, f"{_short(tokens_per_s)} tokens/s"),
            (6, color.magenta, f"MFU {mfu:.1%}" if "mfu" in scalars else ""),
            (2, color.red, f"{skipped} skipped" if skipped else ""),
            (8, color.cyan, f"{memory:.2f} GiB"),
            (3, color.reset, self._time_left(step, now)),
        ]
        logger.info(_fitting(pieces, _columns() - len("00:00:00  ")) + color.reset)
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()
        self.time_last_log = time.perf_counter()

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        """Writes and prints a validation loss, in nats per token."""
        self._write({"validation_loss": loss}, step)
        color = self.color
        logger.info(f"{color.yellow}step {step}  validation loss {loss:.4f}{color.reset}")

    def log_attention(self, scalars: dict[str, float], step: int) -> None:
        """Writes what `held_out.attention_scalars` measured, and prints the whole model's."""
        self._write(scalars, step)
        model = {name: value for name, value in scalars.items() if name.count("/") == 1}
        words = (f"{name.split('/')[1]} {value:.4g}" for name, value in model.items())
        color = self.color
        logger.info(f"{color.yellow}step {step}  attention  {'  '.join(words)}{color.reset}")

    def pause(self) -> "_Pause":
        """Context whose time counts neither as training nor as data loading."""
        return _Pause(self)

    def close(self) -> None:
        """Closes the files and the run at wandb."""
        for writer in self.writers or []:
            writer.close()
        if self.wandb is not None:
            self.wandb.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self.writers is None:
            self.writers = self._open()
        for writer in self.writers:
            writer.write(scalars, step)
        if self.wandb is not None:
            self.wandb.write(scalars, step)

    def _open(self) -> list[Writer]:
        metrics, folder, rank = self.config.metrics, self.config.dump_folder, dist.get_rank()
        if rank and not metrics.save_for_all_ranks:
            return []
        file, tb = folder / METRICS_FILE, folder / metrics.save_tb_folder
        if rank:
            file, tb = file.with_suffix(f".rank{rank}.jsonl"), tb / f"rank{rank}"
        writers: list[Writer] = [JsonLines(file, self.start_step)]
        if metrics.enable_tensorboard:
            writers.append(TensorBoard(tb, self.start_step))
        return writers

    def _time_left(self, step: int, now: float) -> str:
        if self.first_log is None:
            self.first_log = step, now
            return ""
        first_step, first_time = self.first_log
        seconds = round(
            (now - first_time) / (step - first_step) * (self.config.training.steps - step)
        )
        minutes, seconds = divmod(seconds, 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"


def _short(number: float) -> str:
    """The number in at most 5 characters, if it is below a billion."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 10 * size:
            return f"{number / size:,.0f}{unit}"
    return f"{number:.0f}"


def _columns() -> int:
    """Width of the terminal; 80 where the output is a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 80


def _fitting(pieces: list[tuple[int, str, str]], width: int) -> str:
    """The pieces (rank, colour, text) in order; where they exceed ``width``, the least important are left out."""
    chosen: list[tuple[int, str, str]] = []
    for piece in sorted(piece for piece in pieces if piece[2]):
        if sum(len(text) + 2 for _, _, text in [*chosen, piece]) - 2 <= width:
            chosen.append(piece)
    return "  ".join(color + text for _, color, text in pieces if (_, color, text) in chosen)


class _Pause:
    def __init__(self, metrics: RunMetrics) -> None:
        self.metrics = metrics

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        self.metrics.time_last_log += seconds
        if self.metrics.first_log is not None:
            step, first_time = self.metrics.first_log
            self.metrics.first_log = step, first_time + seconds
