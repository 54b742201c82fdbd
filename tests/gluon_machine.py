"""Threads of a simulated GPU, of which one runs at a time: `gluon_simulator.py` says what for."""

import random
import threading
from collections.abc import Callable
from typing import Any

import torch


class Fault(RuntimeError):  # noqa: N818  # of the kernel, not an error of this program
    """The kernel breaks a rule of the machine."""


class Stopped(BaseException):
    """Ends a thread because another one failed."""


class Worker:
    """A partition of a program; it runs while it holds the baton."""

    def __init__(self, name: str, program: "Program", num_warps: int, speed: float):
        self.name, self.program, self.num_warps, self.speed = name, program, num_warps, speed
        self.baton = threading.Semaphore(0)
        self.is_done = False
        self.ready: Callable[[], bool] | None = None
        self.what: Callable[[], str] = lambda: "its turn"
        # issued and not waited for: [token, a, b, accumulator, snapshots], [descriptor, at, source, snapshot, adds]
        self.products: list[Any] = []
        self.stores: list[Any] = []
        # stores that may still be on their way to global memory
        self.num_landing = 0
        # masks of the shared memory it has written since its last fence
        self.unfenced: list[torch.Tensor] = []


class Program:
    def __init__(self, index: int):
        self.index = index
        self.barriers: list[Any] = []
        # number -> [threads that came, times it was complete]
        self.named: dict[int, list[int]] = {}
        # what its watchdog watches
        self.progress: Any = None


class Machine:
    """Decides who runs; one for each launch."""

    def __init__(self, seed: int, grid: int):
        self.random = random.Random(seed)
        self.grid = grid
        self.workers: list[Worker] = []
        # which land at any time
        self.loads: list[Callable[[], None]] = []
        self.stores: list[Callable[[], None]] = []
        self.lands = self.random.choice((0.05, 0.5, 1.0))
        self.failure: BaseException | None = None
        self.finished = threading.Semaphore(0)

    def start(self, name: str, program: Program, num_warps: int, run: Callable[[], Any]):
        worker = Worker(name, program, num_warps, self.random.choice((1.0, 1.0, 10.0, 0.01)))

        def main():
            worker.baton.acquire()
            current.worker, current.machine = worker, self
            try:
                if self.failure is None:
                    run()
                    check_left_over(worker)
            except Stopped:
                pass
            except BaseException as error:  # whatever it is, the launch raises it
                self.fail(error)
            worker.is_done = True
            self.hand_over(None)

        threading.Thread(target=main, daemon=True).start()
        self.workers.append(worker)
        return worker

    def fail(self, error: BaseException):
        self.failure = self.failure or error

    def hand_over(self, me: Worker | None):
        following = self.choose()
        if following is None:
            self.finished.release()
        elif following is not me:
            following.baton.release()
            if me is not None:
                me.baton.acquire()

    def land(self):
        i = self.random.randrange(len(self.loads) + len(self.stores))
        flights, i = (self.loads, i) if i < len(self.loads) else (self.stores, i - len(self.loads))
        flights.pop(i)()

    def choose(self) -> Worker | None:
        alive = [x for x in self.workers if not x.is_done]
        if self.failure is not None:
            return alive[0] if alive else None
        while alive:
            able = [x for x in alive if x.ready is None or x.ready()]
            if (self.loads or self.stores) and (not able or self.random.random() < self.lands):
                self.land()
            elif able:
                return self.random.choices(able, [x.speed for x in able])[0]
            else:
                waits = "; ".join(f"{x.name} waits for {x.what()}" for x in alive)
                self.fail(Fault(f"deadlock: {waits}"))
                return alive[0]
        return None

    def switch(self, ready: Callable[[], bool] | None = None, what: Callable[[], str] = str):
        """Lets others run until ready()."""
        me = current.worker
        me.ready, me.what = ready, what
        self.hand_over(me)
        if self.failure is not None:
            raise Stopped
        me.ready = None


current = threading.local()


def switch(*args):
    current.machine.switch(*args)


def check_left_over(worker: Worker):
    for what in "products", "stores":
        if left := getattr(worker, what):
            raise Fault(f"{worker.name} ends with {len(left)} {what} that it did not wait for")
