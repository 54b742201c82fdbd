"""Checks and times the kernels on the GPU of this machine: ``python -m fla.ops.attn.softpick.doctor``.

Prints the card and the versions, compares every kernel with float64, times the operators against torch's, and tries
launch shapes other than those of `launch_shapes.py`. All lines also go to a text file, as they come. What fails
becomes a line with FAILED, the rest goes on, and the exit status is 1.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
import triton

from fla.ops.attn.softpick import doctor_accuracy, doctor_shapes, doctor_speed
from fla.ops.attn.softpick.launch_shapes import architecture, num_processors
from fla.ops.attn.softpick.parallel import IS_INTERPRETED

Result = TypeVar("Result")

SECTIONS = ("correctness", "speed", "shapes")
# share of the time that has passed when a section starts no further measurement
DEADLINES = {"correctness": 0.5, "speed": 0.75, "shapes": 1.0}
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION",
    "HSA_FORCE_FINE_GRAIN_PCIE", "NCCL_MIN_NCHANNELS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF", "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "TRITON_INTERPRET",
)  # fmt: skip


class LostGPUError(Exception):
    """The GPU no longer answers this process, as after an access outside of memory."""


class Report:
    """Lines for the terminal and the file, and what went wrong.

    `seconds` is the time allowed for all, `deadlines` the share of it at which a section ends.
    """

    def __init__(self, file: Path, seconds: float, deadlines: dict[str, float]):
        self._file = file.open("w", encoding="utf-8")
        self._start = time.monotonic()
        self._seconds = seconds
        self._deadlines = deadlines
        self._deadline = seconds
        self.failed = 0
        self.left_out = 0

    def line(self, text: str = "") -> None:
        """Writes and flushes a line."""
        for stream in (sys.stdout, self._file):
            stream.write(text + "\n")
            stream.flush()

    def begin(self, section: str, title: str) -> None:
        """Starts the time of a section."""
        self._deadline = self._deadlines[section] * self._seconds
        self.line(f"\n{title}")

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def remaining(self) -> float:
        """Seconds that the section has left."""
        return self._deadline - self.elapsed()

    def fail(self, label: str, reason: str) -> None:
        """Writes a line with FAILED, which makes the exit status 1."""
        self.failed += 1
        self.line(f"{label}  FAILED: {reason}")

    def skip(self, label: str, reason: str) -> None:
        """Writes a line for what is not measured."""
        self.left_out += 1
        self.line(f"{label}  skipped: {reason}")

    def attempt(self, label: str, f: Callable[[], Result]) -> Result | None:
        """Result of ``f``, or None after a line that says why there is none.

        Raises:
            LostGPUError: The GPU answers no more.
        """
        if self.remaining() <= 0:
            self.skip(label, "out of time")
            return None
        if sys.stdout.isatty():
            # overwritten by the line to come; stays if the driver ends the process
            sys.stdout.write(f"{label} ...\r")
            sys.stdout.flush()
        try:
            return f()
        except torch.OutOfMemoryError:
            self.skip(label, "out of memory on the GPU")
        except Exception as error:
            # any error of a compiler or a driver is a finding, and the other cases are still of interest
            self.fail(label, f"{type(error).__name__}: {first_line(error)}")
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                raise LostGPUError(first_line(error)) from error
        return None


def first_line(error: Exception) -> str:
    """First line of the message of an error."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"


def driver() -> str:
    """Version of the kernel's driver."""
    if torch.version.hip:
        file = Path("/sys/module/amdgpu/version")
        # the driver that comes with Linux has no version but the kernel's
        return f"amdgpu {file.read_text().strip() if file.exists() else 'of the Linux kernel'}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown, nvidia-smi does not answer"


def describe(report: Report) -> bool:
    """Prints the machine; returns whether the kernels know its architecture."""
    try:
        package = version("softpick")
    except PackageNotFoundError:
        package = "not installed as a package"
    runtime = (
        f"ROCm (HIP) {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    )
    report.line("softpick doctor")
    report.line(f"softpick      {package}")
    report.line(f"torch         {torch.__version__}")
    report.line(f"runtime       {runtime}")
    report.line(f"triton        {triton.__version__}")
    report.line(f"python        {platform.python_version()}, {platform.platform()}")
    if IS_INTERPRETED:
        report.line("card          none: Triton's interpreter on a CPU")
    else:
        card = torch.cuda.get_device_properties(0)
        name = (
            getattr(card, "gcnArchName", "")
            if torch.version.hip
            else f"sm_{card.major}{card.minor}"
        )
        report.line(f"card          {card.name}, the first of {torch.cuda.device_count()}")
        report.line(f"memory        {card.total_memory / 2**30:.0f} GiB")
        report.line(f"driver        {driver()}")
        report.line(f"architecture  {name}, {num_processors(0)} processors")
    file = Path("/proc/sys/kernel/numa_balancing")
    if file.exists():
        report.line(f"numa_balancing {file.read_text().strip()}")
    for name in ENVIRONMENT:
        if name in os.environ:
            report.line(f"{name}={os.environ[name]}")
    try:
        report.line(f"launch shapes of the entry {architecture(0)} of launch_shapes.py")
    except ValueError as error:
        report.fail("launch shapes", str(error))
        return False
    return True


def examine(report: Report, sections: list[str], is_quick: bool) -> None:
    """Runs the sections."""
    if "correctness" in sections:
        doctor_accuracy.check_kernels(report, is_quick)
    for section, measure in (
        ("speed", doctor_speed.time_operators),
        ("shapes", doctor_shapes.try_shapes),
    ):
        if section not in sections:
            continue
        if IS_INTERPRETED:
            report.line(f"\n{section}: not measured, since Triton's interpreter runs on a CPU")
        else:
            measure(report, is_quick)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fla.ops.attn.softpick.doctor",
        description="Checks and times the kernels on the first GPU, and writes a text file for a report.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("softpick_doctor.txt"), help="text file to write"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, as the tests use")
    parser.add_argument("--only", choices=SECTIONS, help="one section alone")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing after this long")
    args = parser.parse_args(arguments)
    if not args.seconds > 0:
        parser.error(f"--seconds must be more than 0, got {args.seconds}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    args = parse(arguments)
    if not IS_INTERPRETED and not torch.cuda.is_available():
        sys.exit(
            "doctor needs a GPU that torch sees (torch.cuda.is_available() is False); without one, "
            "TRITON_INTERPRET=1 with --quick runs the kernels in Triton's interpreter"
        )
    if IS_INTERPRETED and not args.quick:
        sys.exit(
            "doctor needs --quick in Triton's interpreter (TRITON_INTERPRET=1), which takes hours otherwise"
        )
    try:
        report = Report(args.out, args.seconds, {args.only: 1.0} if args.only else DEADLINES)
    except OSError as error:
        sys.exit(f"--out must be a file that can be written, got {args.out}: {error.strerror}")
    status = 0
    try:
        if describe(report):
            examine(report, [args.only] if args.only else list(SECTIONS), args.quick)
    except KeyboardInterrupt:
        report.line("\nstopped by Ctrl-C; what comes before is complete")
        status = 130
    except LostGPUError as error:
        report.fail("\nthe GPU no longer answers this process, so the rest cannot run", str(error))
    report.line(
        f"\n{report.failed} FAILED, {report.left_out} skipped, in {report.elapsed():.0f} seconds; "
        f"written to {args.out.resolve()}"
    )
    return status or int(report.failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
