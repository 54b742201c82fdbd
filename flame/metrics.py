"""What is printed and drawn while training: one line and one set of TensorBoard scalars a `log_freq`."""

import math
import time
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

import flame._compat  # noqa: F401  # before torchtitan
from flame.config import JobConfig
from flame.log import logger

# isort: split
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig as TitanConfig
from torchtitan.distributed import ParallelDims


class Metrics(MetricsProcessor):
    """torchtitan's counters with our own line and scalars."""

    def __init__(
        self, titan_config: TitanConfig, parallel_dims: ParallelDims, config: JobConfig
    ) -> None:
        super().__init__(titan_config, parallel_dims)
        self.config = config
        # step and time of the first line: what comes before is start-up and compilation
        self.first_log: tuple[int, float] | None = None
        self.writer: SummaryWriter | None = None
        # step of the checkpoint that the run continues from
        self.start_step = 0

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
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
            "lr": extra_metrics["lr"],
            "tokens_per_s": tokens_per_s,
            "memory_GiB": memory,
            "data_loading_share": sum(self.data_loading_times) / seconds,
        }
        # NaN where the peak of the device is unknown
        if math.isfinite(mfu):
            scalars["mfu"] = mfu
        self._draw(scalars, step)
        steps = self.config.training.steps
        logger.info(
            f"step {step:>{len(str(steps))}}/{steps} {step / steps:4.0%}  loss {global_avg_loss:.4f}  "
            f"grad_norm {grad_norm:.3f}  lr {scalars['lr']:.2e}  {tokens_per_s:,.0f} tokens/s  "
            + (f"MFU {mfu:.1%}  " if "mfu" in scalars else "")
            + f"{memory:.2f} GiB  {self._time_left(step, now)}"
        )
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()
        self.time_last_log = time.perf_counter()

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        self._draw({"validation_loss": loss}, step)
        logger.info(f"step {step}  validation loss {loss:.4f}")

    def pause(self) -> "_Pause":
        """Context whose time counts neither as training nor as data loading."""
        return _Pause(self)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _draw(self, scalars: dict[str, float], step: int) -> None:
        if dist.get_rank() != 0:
            return
        if self.writer is None:
            folder = self.config.dump_folder / self.config.metrics.save_tb_folder
            # a continued run repeats the steps since its checkpoint: TensorBoard drops the first ones
            self.writer = SummaryWriter(str(folder), purge_step=self.start_step + 1, flush_secs=10)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

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


class _Pause:
    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        self.metrics.time_last_log += seconds
        if self.metrics.first_log is not None:
            step, first_time = self.metrics.first_log
            self.metrics.first_log = step, first_time + seconds
