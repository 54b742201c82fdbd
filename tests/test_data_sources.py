"""flame.data from flags to batches, mapped and streamed alike: order, resuming, workers, packed documents."""

import gc
import os
import signal
import struct
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from data_sources import EOS, MAP, STREAM, T, data_of, loaders_of, rows_of, write_sources

from flame.data import token_stream
from flame.data import workers as workers_module
from flame.data.batches import IGNORE_INDEX


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("mode", [MAP, STREAM], ids=["map", "stream"])
class TestBothKinds:
    def test_order_and_resume_depend_neither_on_workers_nor_on_ranks(self, text, mode, monkeypatch):
        # several pieces in flight, so that their order can go wrong
        monkeypatch.setattr(token_stream, "_CHUNK", 200)
        order = rows_of(loaders_of(data_of(text, *mode), 1), 60)
        assert len({tuple(row) for row in order[:60]}) > 45
        workers = ("--training.num_workers", "3", "--training.prefetch_factor", "2")
        data = data_of(text, *mode, *workers)
        [ahead] = loaders_of(data, 1)
        assert rows_of([ahead], 20) == order[:60]
        ranks = loaders_of(data_of(text, *mode), 2)
        assert rows_of(ranks, 10) == order[:60]
        # the same state whatever is read ahead and by whom
        states = [loader.state_dict() for loader in (ahead, *ranks)]
        assert states[0] == states[1] == states[2]
        # further, the other way round, and a loader that has been elsewhere
        assert rows_of(loaders_of(data_of(text, *mode), 2), 10, states[0]) == order[60:120]
        assert rows_of([ahead], 40, states[1]) == order[60:180]
        ahead.close()

    def test_resume_anywhere(self, text, mode):
        data = data_of(text, *mode)
        [loader] = loaders_of(data, 1)
        # more than an epoch, through all kinds of files
        for _ in range(12):
            [fresh] = loaders_of(data, 1)
            resumed = rows_of([fresh], 5, loader.state_dict())
            assert rows_of([loader], 26)[:15] == resumed

    def test_state_passes_through_a_distributed_checkpoint(self, text, mode, tmp_path):
        [loader] = loaders_of(data_of(text, *mode), 1)
        rows_of([loader], 7)
        dcp.save({"dataloader": loader}, checkpoint_id=tmp_path, no_dist=True)
        [fresh] = loaders_of(data_of(text, *mode), 1)
        dcp.load({"dataloader": fresh}, checkpoint_id=tmp_path, no_dist=True)
        assert fresh.state_dict() == loader.state_dict()
        assert rows_of([fresh], 3) == rows_of([loader], 3)

    @pytest.mark.parametrize(
        ("change", "flag"),
        [
            (("--training.seed", "7"), "seed"),
            (("--training.seq_len", "16"), "seq_len"),
            (("--training.data_probs", "0.6,0.4"), "dataset"),
            (("--training.data_files", "b.parquet,"), "dataset"),
        ],
    )
    def test_resume_onto_something_else(self, text, mode, change, flag):
        [loader], [other] = (loaders_of(data_of(text, *mode, *more), 1) for more in ((), change))
        rows_of([loader], 3)
        with pytest.raises(ValueError, match=rf"^--training\.{flag}: the checkpoint's data has"):
            other.load_state_dict(loader.state_dict())

    def test_shares(self, text, mode):
        order = rows_of(loaders_of(data_of(text, *mode), 1), 200)
        # only the documents of this source have the letter
        few = sum(ord("y") in row for row in order)
        assert few == pytest.approx(0.3 * len(order), abs=45)

    def test_a_killed_worker_is_an_error(self, text, mode):
        [loader] = loaders_of(data_of(text, *mode, "--training.num_workers", "2"), 1)
        batches = iter(loader)
        next(batches)
        os.kill(children()[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"one of the 2 data workers .*was killed"):
            # what is ahead may still come
            list(islice(batches, 5000))
        loader.close()
        assert not children()

    def test_a_worker_killed_while_it_writes_is_an_error(self, text, mode, monkeypatch):
        monkeypatch.setattr(workers_module, "_LOOK_S", 0.1)
        [loader] = loaders_of(data_of(text, *mode, "--training.num_workers", "2"), 1)
        batches = iter(loader)
        next(batches)
        pools = [x for x in gc.get_objects() if type(x) is ProcessPoolExecutor]
        (pool,) = (x for x in pools if x._processes)
        # the length of a result, and not all of it
        os.write(pool._result_queue._writer.fileno(), struct.pack("!i", 1000) + b"some")
        os.kill(children()[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"one of the 2 data workers .*was killed"):
            list(islice(batches, 5000))
        loader.close()
        assert not children()

    def test_workers_leave_stopping_to_the_parent(self, text, mode):
        [loader] = loaders_of(data_of(text, *mode, "--training.num_workers", "2"), 1)
        next(iter(loader))
        for child in children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(child, number)
        assert len(rows_of([loader], 50)) == 150
        assert len(children()) == 2
        loader.close()
        assert not children()

    def test_packed_documents(self, text, mode):
        data = data_of(text, *mode, "--training.varlen", "--training.context_len", "20")
        for inputs, labels in islice(data.loader(dp_rank=0, dp_world_size=1), 30):
            check_packed(inputs, labels, context_len=20)
        held_out = "--validation.share", "0.3"
        if "--training.streaming" in mode:
            held_out = "--validation.sequences", "6"
        data = data_of(text, *mode, *held_out, "--training.varlen")
        for inputs, labels in islice(data.validation(dp_rank=0, dp_world_size=1), 6):
            check_packed(inputs, labels, context_len=T)
        data = data_of(text, *mode, "--training.varlen", "--training.context_len", "20")
        plain = data_of(text, *mode)
        assert rows_of(loaders_of(plain, 1), 9) == rows_of(loaders_of(data, 1), 9)


def test_signals_do_not_end_workers_that_are_starting(monkeypatch):
    start = workers_module._start

    def slow_start(*args):
        time.sleep(0.5)
        start(*args)

    monkeypatch.setattr(workers_module, "_start", slow_start)
    workers = workers_module.Workers(abs, 2, 2)
    first = workers.submit(-1)
    assert len(children()) == 2
    for child in children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(child, number)
    assert workers.result(first) == 1
    assert len(children()) == 2
    workers.close()
    assert not children()


_others: set[int] = set()


@pytest.fixture(autouse=True)
def _set_others_aside():
    """What other tests started and left running."""
    _others.clear()
    _others.update(children())


def children():
    """Processes that this test started, those that ended and were not waited for aside."""
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    deadline = time.monotonic() + 5
    while True:
        found = [child for child in map(int, task.read_text().split()) if child not in _others]
        states = [
            Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in found
        ]
        if "Z" not in states or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def check_packed(inputs, labels, context_len):
    ids, bounds = inputs["input"].flatten(), inputs["cu_seqlens"]
    assert inputs["cu_seqlens"].dtype == torch.int32
    rows = range(0, len(ids) + 1, labels.shape[1])
    documents = [i + 1 for i, token in enumerate(ids.tolist()) if token == EOS]
    natural = sorted({*rows, *documents})
    expected = [
        bound
        for first, last in zip(natural, natural[1:], strict=False)
        for bound in range(first, last, context_len)
    ]
    assert bounds.tolist() == [*expected, len(ids)]
    positions = inputs["positions"].flatten().tolist()
    assert positions == [
        i for first, last in zip(bounds, bounds[1:], strict=False) for i in range(last - first)
    ]
    # the label behind the end of a document stays: the first token of the next
    assert (labels != IGNORE_INDEX).all()
    assert (labels[:, :-1] == inputs["input"][:, 1:]).all()
