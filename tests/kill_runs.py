"""Kills runs at random moments and lets the same command continue them: the losses must be those of a run left alone.

    python tests/kill_runs.py --runs 100 --parallel 8 --seed 0

Each run is a small model's, of one process or of two, with and without a data worker, and is killed 2 to 4 times with
SIGKILL: the launcher (which is torchrun too), one of its processes, the launcher together with one of them, or all,
while they start or while they train. After each kill nothing of the run may live longer than ``--survive`` seconds. Then
the command is repeated until it ends. Every loss and gradient norm and the exported weights must be equal to the bit.
It prints a line per run and exits with 1 if one of them failed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from small_model import ROOT, write_model, write_text

TARGETS = ("launcher", "one process", "launcher and one process", "all")
# in the environment of every process of a run, by which it is found whatever its parent is
MARK = "FLAME_KILL_RUN"
END_S = 600


@dataclass
class Setting:
    """What a run is compared with."""

    flags: dict[str, object]
    processes: int
    start_s: float = 0.0
    """Seconds from the start of the command to its first step."""
    result: dict[str, object] = field(default_factory=dict)


class RunError(Exception):
    """What is wrong with a run."""


class Command:
    """`bash train.sh`, started once."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_name(folder.name + ".log")
        self.mark = f"{folder}:{time.monotonic_ns()}"
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_PORT")}
        env |= {"NGPU": str(setting.processes), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        env |= {MARK: self.mark, "PYTHONUNBUFFERED": "1"}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        flags = setting.flags | {"job.dump_folder": folder}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", "train.sh", *(f"--{flag}={value}" for flag, value in flags.items())],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def alive(self) -> list[int]:
        """Its processes, the launcher first."""
        found = []
        for path in Path("/proc").iterdir():
            # another user's, or one that has just ended; that of a zombie is empty
            with contextlib.suppress(OSError):
                if path.name.isdecimal() and f"{MARK}={self.mark}\0".encode() in (
                    path.joinpath("environ").read_bytes()
                ):
                    found.append(int(path.name))
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_until_gone(self, seconds: float) -> float:
        """Seconds until none of its processes is left."""
        start = time.monotonic()
        while True:
            self.process.poll()
            alive = self.alive()
            waited = time.monotonic() - start
            if not alive:
                return waited
            if waited > seconds:
                stacks = [f"{pid} ({_what(pid)})" for pid in alive]
                self.kill(alive)
                raise RunError(f"alive {seconds:.0f} s after the kill: {', '.join(stacks)}")
            time.sleep(0.1)

    def wait(self) -> None:
        """Waits for its good end."""
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill(self.alive())
            self.process.wait()
            raise RunError(f"not done after {END_S} s") from None
        if code:
            last = [x for x in self.log.read_text(errors="replace").splitlines() if x][-1]
            raise RunError(f"exit code {code}: {last}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _what(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:60]
    return "ended"


def last_step(folder: Path) -> int:
    """The last step that `metrics.jsonl` holds whole; 0 before there is one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((folder / "metrics.jsonl").read_text().split("\n")[-2])["step"]
    return 0


def result(folder: Path) -> dict[str, object]:
    """What must be equal: loss and gradient norm of every line, and the weights."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [[x["step"], x["loss"], x["grad_norm"]] for x in lines]
    weights = (folder / "hf" / "model.safetensors").read_bytes()
    return {"numbers": numbers, "weights": hashlib.sha256(weights).hexdigest()}


def run_alone(setting: Setting, folder: Path) -> None:
    """Fills in the setting's ``result`` and ``start_s``."""
    start = time.monotonic()
    command = Command(setting, folder)
    while not last_step(folder) and command.process.poll() is None:
        time.sleep(0.05)
    setting.start_s = time.monotonic() - start
    command.wait()
    setting.result = result(folder)


def kill_once(
    rng: random.Random, setting: Setting, folder: Path, steps: int, survive: float
) -> str | None:
    """Starts the command and kills it once; what was done, or None if the run ended before."""
    target = rng.choice(TARGETS)
    seconds, step = None, None
    if rng.random() < 0.5:
        seconds = rng.uniform(0, 1.1 * setting.start_s)
    else:
        step = rng.randint(1, steps)
        pause = rng.uniform(0, 0.2)
    start = time.monotonic()
    command = Command(setting, folder)
    if seconds is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.process.wait(seconds)
    else:
        while last_step(folder) < step and command.process.poll() is None:
            time.sleep(0.01)
        time.sleep(pause)
    if command.process.poll() is not None:
        # good or bad
        command.wait()
        return None
    alive = command.alive()
    launcher, others = alive[:1], alive[1:]
    if target == "launcher" or not others:
        command.kill(launcher)
    elif target == "one process":
        command.kill([rng.choice(others)])
    elif target == "launcher and one process":
        command.kill([*launcher, rng.choice(others)])
    else:
        command.kill(alive)
    when = f"{time.monotonic() - start:.1f} s, step {last_step(folder)}"
    gone = command.wait_until_gone(survive)
    command.process.wait()
    return f"{target if others else 'launcher'} at {when}, gone after {gone:.1f} s"


def killed_run(number: int, setting: Setting, folder: Path, args: argparse.Namespace) -> bool:
    rng = random.Random(f"{args.seed} {number}")
    kills, verdict = [], "ok"
    start = time.monotonic()
    try:
        for _ in range(rng.randint(2, 4)):
            done = kill_once(rng, setting, folder, args.steps, args.survive)
            if done is None:
                break
            kills.append(done)
        Command(setting, folder).wait()
        got = result(folder)
        if got != setting.result:
            pairs = zip(got["numbers"], setting.result["numbers"], strict=False)
            first = next((f"{x} and not {y}" for x, y in pairs if x != y), "lines or weights")
            raise RunError(f"another result than the run left alone: {first}")
    except RunError as failure:
        verdict = f"FAILED: {failure}; log {folder}.log"
    words = f"{setting.processes} process{'es' if setting.processes > 1 else ''}"
    line = f"{number:3}  {words:11}  {time.monotonic() - start:4.0f} s  {verdict}"
    say("\n     ".join([line, *kills]))
    return verdict == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=4, help="runs to kill (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed and when")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    parser.add_argument("--survive", type=float, default=15, help="seconds after a kill")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a new one in /tmp)")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="kill_runs."))
    out.mkdir(parents=True, exist_ok=True)
    flags = {
        "model.config": write_model(out),
        "training.dataset": write_text(out),
        "training.steps": args.steps,
        "training.seq_len": 32,
        "checkpoint.interval": 5,
        "metrics.log_freq": 1,
        "lr_scheduler.warmup_steps": 2,
        "validation.share": 0,
        "sample.max_new_tokens": 0,
    }
    settings = []
    for processes in (1, 2):
        for workers in (0, 1):
            more = {"training.batch_size": 4 // processes, "training.num_workers": workers}
            settings.append(Setting(flags | more, processes))
    say(f"runs left alone, in {out}")
    for i, setting in enumerate(settings[: args.runs]):
        run_alone(setting, out / f"alone-{i}")
        say(f"     first step after {setting.start_s:.1f} s")
    jobs = [(i, settings[i % len(settings)], out / f"run-{i}", args) for i in range(args.runs)]
    with ThreadPoolExecutor(args.parallel) as pool:
        good = sum(pool.map(lambda job: killed_run(*job), jobs))
    say(f"{good} of {args.runs} runs ended in the losses of the run left alone")
    return 0 if good == args.runs else 1


if __name__ == "__main__":
    sys.exit(main())
