"""Processes that work ahead of the training process; their results are taken in order."""

import contextlib
import multiprocessing.context
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from flame.base.errors import TrainingError
from flame.base.stop_signals import STOP_SIGNALS, end_with_parent

# the function of a worker, set when it is forked
_function: Callable[[Any], Any] | None = None


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    # Ctrl-C and schedulers signal all processes of a job: the parent decides, and it still needs data
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent, signal.SIGKILL)


def _call(item: object) -> object:
    return _function(item)  # pyright: ignore[reportOptionalCall]  # _start, the initializer of the process, has set it


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Context in which the library tokenizers neither warns of a fork nor starts threads in the children."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Context that blocks stop signals while processes are forked, until these ignore them; the parent gets them later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process(multiprocessing.context.ForkProcess):
    def terminate(self) -> None:
        # a pool terminates its workers when one has died, but they ignore SIGTERM
        self.kill()


# seconds after which a result that does not come makes one look whether the workers live
_LOOK_S = 5.0


class _Context(multiprocessing.context.ForkContext):
    # a fork inherits the function and imports nothing again
    Process = _Process


class Workers:
    """Calls ``function`` in ``num_workers`` forked processes, or with 0 in this process.

    Args:
        function: Called with each item. It is inherited, not pickled, so it may hold memory maps and arrays, which
            are not copied. Items and results are pickled.
        num_workers: Number of processes; 0: none.
        prefetch_factor: Items submitted ahead for each worker.
    """

    def __init__(
        self, function: Callable[[Any], Any], num_workers: int, prefetch_factor: int
    ) -> None:
        self.num_ahead = max(1, num_workers * prefetch_factor)
        self._function = function
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, item: object) -> "Future[Any]":
        """Submits an item; the first one forks the workers."""
        if not self._num_workers:
            future: Future[Any] = Future()
            future.set_result(self._function(item))
            return future
        with self._explain_broken_pool():
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self._num_workers,
                    mp_context=_Context(),
                    initializer=_start,
                    initargs=(self._function, os.getpid()),
                )
                with _one_thread_each(), _signals_wait():
                    return self._pool.submit(_call, item)
            return self._pool.submit(_call, item)

    def result(self, future: "Future[Any]") -> Any:
        """The function's result, or what it raised.

        Raises:
            TrainingError: A worker was killed.
        """
        with self._explain_broken_pool():
            while True:
                try:
                    return future.result(timeout=_LOOK_S)
                except TimeoutError:
                    if future.done():
                        return future.result()
                    self._break_pool_of_a_killed_worker()

    def close(self) -> None:
        """Ends the workers, and drops items that they have not started."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _break_pool_of_a_killed_worker(self) -> None:
        """Ends all workers if one was killed while it wrote a result: the pool waits for the rest of it, for ever.

        The pool has noticed any other death long before.
        """
        pool = self._pool
        assert pool is not None
        processes = list(pool._processes.values())
        if any(process.exitcode is not None for process in processes):
            for process in processes:
                process.kill()
            # the last end to write to, so that the pool reads the end of the file and calls itself broken
            pool._result_queue._writer.close()  # pyright: ignore[reportAttributeAccessIssue]  # a SimpleQueue, whose ends typeshed leaves out

    @contextlib.contextmanager
    def _explain_broken_pool(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            raise TrainingError(
                f"one of the {self._num_workers} data workers (--training.num_workers) was killed; memory "
                "may have run out"
            ) from None
