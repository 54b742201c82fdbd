"""Runs of `flame.train` in processes forked from one that has imported it, since importing takes seconds."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import types
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flame.train", "torch.utils.tensorboard"])


class Run:
    """One run: its processes, what they print and what they draw from their random generators."""

    def __init__(self, flags, *, processes=1, tamper=None, pace=0.0):
        self.folder = Path(flags["job.dump_folder"])
        self.log = self.folder.with_name(self.folder.name + ".log")
        self.draws = self.folder.with_name(self.folder.name + ".draws")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        argv = [word for flag, value in flags.items() for word in _words(flag, value)]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = [
            _CONTEXT.Process(
                target=_process, args=(argv, rank, processes, port, self, tamper, pace), daemon=True
            )
            for rank in range(processes)
        ]
        # the processes are the server's children: no GPU, as in the other tests of whole runs
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
            forkserver.ensure_running()
        for process in self.processes:
            process.start()

    def __getstate__(self):
        return {"log": self.log, "draws": self.draws}

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

    def wait_for_step(self, step):
        self.wait_for(lambda: max(self.drawn(), default=0) >= step)

    def drawn(self, rank=0):
        """Step -> what was drawn after it, the last time it was done."""
        path = self.draws.with_name(f"{self.draws.name}.{rank}")
        if not path.exists():
            return {}
        lines = path.read_text().split("\n")[:-1]
        return {x["step"]: x["draws"] for x in map(json.loads, lines)}

    def output(self):
        return self.log.read_text()


def _words(flag, value):
    section, option = flag.split(".")
    if isinstance(value, bool):
        return [f"--{section}.{option if value else 'no_' + option}"]
    return [f"--{flag}={value}"]


def _process(argv, rank, processes, port, run, tamper, pace):
    # pytest itself may run under nohup, which the run would obey
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with run.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = ["flame.train", *argv]
    import torch
    import torchtitan.train

    from flame import train

    torch.set_num_threads(1)
    # torchtitan sleeps for two seconds after the last step
    torchtitan.train.time = types.SimpleNamespace(
        sleep=lambda _: None, perf_counter=time.perf_counter
    )
    _draw_after_every_step(run.draws.with_name(f"{run.draws.name}.{rank}"), pace)
    if tamper is not None:
        tamper()
    code = 0
    try:
        train.main()
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    # as an interpreter does that ends: it waits for a save under way
    threading._shutdown()
    os._exit(code)


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
