"""Programs in processes forked from one that has imported them, since importing takes seconds."""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flame.train", "torch.utils.tensorboard"])


def environment(**changes):
    """What a run on a CPU gets: neither a GPU nor Triton's interpreter, and torchrun from this interpreter's folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RANK")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    # as train.sh does: several runs of the tests on few cores would wait for each other
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    return env | changes


class Forked:
    """A group of processes as torchrun starts them, each of which calls ``target``.

    Variables of ``env`` that libraries read when they are imported have no effect.
    """

    def __init__(self, target, *, processes=1, env=None, cwd=ROOT):
        self._folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self._folder.name) / name for name in ("out", "err"))
        env = environment() if env is None else env
        self.processes = [
            _CONTEXT.Process(target=_process, args=(target, env | group, cwd, self.out, self.err))
            for group in _groups(processes)
        ]
        # the server's children see no GPU, as in the other tests of whole runs
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
            forkserver.ensure_running()
        for process in self.processes:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def send(self, number):
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, timeout=120):
        """The exit code, of all processes alike; for a signal that killed them, less than 0."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = {process.exitcode for process in self.processes}
        assert len(codes) == 1, (codes, self.output())
        assert None not in codes, self.output()
        return codes.pop()

    def wait_for(self, condition, timeout=120):
        deadline = time.monotonic() + timeout
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.005)

    def output(self):
        """All that was printed, stderr last."""
        return "".join(x.read_text() for x in (self.out, self.err) if x.exists())


def _groups(processes):
    """What each process of a group finds in its environment; one alone finds nothing."""
    if processes == 1:
        return [{}]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def flag_words(flags):
    """The words of a command line; True and False are ``--section.option`` and ``--section.no_option``."""
    return [
        f"--{flag if value else flag.replace('.', '.no_')}"
        if isinstance(value, bool)
        else f"--{flag}={value}"
        for flag, value in flags.items()
    ]


def program(module, words):
    """``python -m module words``, for `Forked`."""
    return partial(_main, module, [str(word) for word in words])


def script(path, words):
    """``python path words``, for `Forked`."""
    return partial(_script, str(path), [str(word) for word in words])


def main_of(module, *args):
    """``main(*args)`` of a module that is imported when the process knows its rank, for `Forked`."""
    return partial(_call, module, args)


def run_program(module, words, *, code=0, timeout=300, **kwargs):
    """Runs ``python -m module words`` to its end, which must be with this exit code."""
    with Forked(program(module, words), **kwargs) as run:
        assert run.wait(timeout) == code, run.output()
    return subprocess.CompletedProcess(words, code, run.out.read_text(), run.err.read_text())


class Run(Forked):
    """A run of `flame.train`, and what its processes draw from their random generators after each step."""

    def __init__(self, flags, *, processes=1, tamper=None, pace=0.0):
        self.folder = Path(flags["job.dump_folder"])
        self.draws = self.folder.with_name(self.folder.name + ".draws")
        self.draws.parent.mkdir(parents=True, exist_ok=True)
        target = partial(_train, flag_words(flags), self.draws, tamper, pace)
        super().__init__(target, processes=processes)

    def wait_for_step(self, step):
        self.wait_for(lambda: max(self.drawn(), default=0) >= step)

    def drawn(self, rank=0):
        """Step -> what was drawn after it, the last time it was done."""
        path = self.draws.with_name(f"{self.draws.name}.{rank}")
        if not path.exists():
            return {}
        lines = path.read_text().split("\n")[:-1]
        return {x["step"]: x["draws"] for x in map(json.loads, lines)}


def _process(target, env, cwd, out, err):
    # pytest itself may run under nohup, which the run would obey
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    import torch
    import torchtitan.train

    torch.set_num_threads(1)
    # torchtitan sleeps for two seconds after the last step
    torchtitan.train.time = types.SimpleNamespace(
        sleep=lambda _: None, perf_counter=time.perf_counter
    )
    code = 0
    try:
        target()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except BaseException:
        traceback.print_exc()
        code = 1
    # as an interpreter does that ends: it waits for a save under way
    threading._shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


def _main(module, words):
    sys.argv = [module, *words]
    _call(module, ())


def _script(path, words):
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def _call(module, args):
    importlib.import_module(module).main(*args)


def _train(words, draws, tamper, pace):
    rank = os.environ.get("RANK", "0")
    _draw_after_every_step(draws.with_name(f"{draws.name}.{rank}"), pace)
    if tamper is not None:
        tamper()
    _main("flame.train", words)


def _draw_after_every_step(path, pace):
    import random

    import numpy as np
    import torch
    import torch.distributed as dist

    from flame.training.trainer import FlameTrainer

    train_step = FlameTrainer.train_step

    def draw(self, data_iterator):
        train_step(self, data_iterator)
        # rank r draws r + 1 times, so that no two ranks have the same state
        for _ in range(dist.get_rank() + 1):
            draws = [random.random(), np.random.random(), torch.rand(()).item()]
        with path.open("a") as file:
            file.write(json.dumps({"step": self.step, "draws": draws}) + "\n")
        time.sleep(pace)

    FlameTrainer.train_step = draw
