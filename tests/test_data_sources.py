"""flame.data from flags to batches: several sources, workers, streaming, packed documents."""

import json
import os
import random
import signal
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.config.parse import parse_args
from flame.config.sections import JobConfig, Training, Validation
from flame.data import IGNORE_INDEX, load_tokenizer, open_data
from flame.data import stream as stream_module
from flame.data import workers as workers_module
from flame.data.batches import Rows, to_batch
from flame.data.mixing import Mixture

BYTE = load_tokenizer("byte")
EOS = BYTE.eos_token_id
T = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of three formats and two other sources; every document names its file and its number."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)

    def document(name, i):
        return f"{name}{i}:" + "".join(draw.choices("0123456789 ", k=draw.randint(0, 150)))

    for name in ("a", "c"):
        lines = (json.dumps({"text": document(name, i)}) + "\n" for i in range(60))
        (folder / "many").mkdir(exist_ok=True)
        (folder / "many" / f"{name}.jsonl").write_text("".join(lines))
    table = pa.table({"text": [document("b", i) for i in range(60)]})
    pq.write_table(table, folder / "many" / "b.parquet", row_group_size=7)
    (folder / "few").mkdir()
    for i in range(3):
        (folder / "few" / f"{i}.txt").write_text(f"few{i}:" + "y" * (100 + 70 * i))
    return folder


MAP = ("--validation.share", "0")
STREAM = ("--training.streaming", "--validation.share", "0")


def data_of(text, *flags, mixed=True):
    dataset = f"{text / 'many'},{text / 'few'}" if mixed else str(text / "many")
    probs = ["--training.data_probs", "0.7,0.3"] if mixed else []
    # the modes of --training.bos are those of test_bos.py
    size = ["--training.seq_len", str(T), "--training.batch_size", "3", "--training.bos", "none"]
    config = parse_args(["--training.dataset", dataset, *probs, *size, *flags])
    return open_data(config, BYTE)


def rows_of(loaders, steps, state=None):
    """What the ranks together train on, in the order of the ranks within each step ``[rows, T + 1]``."""
    for loader in loaders if state else []:
        loader.load_state_dict(state)
    batches = zip(*(islice(loader, steps) for loader in loaders), strict=True)
    return [
        [*row, label[-1]]
        for step in batches
        for inputs, labels in step
        for row, label in zip(inputs["input"].tolist(), labels.tolist(), strict=True)
    ]


def loaders_of(data, world_size):
    return [data.loader(dp_rank=rank, dp_world_size=world_size) for rank in range(world_size)]


@pytest.mark.parametrize("mode", [MAP, STREAM], ids=["map", "stream"])
class TestBothKinds:
    def test_order_and_resume_depend_neither_on_workers_nor_on_ranks(self, text, mode, monkeypatch):
        # several pieces in flight, so that their order can go wrong
        monkeypatch.setattr(stream_module, "_CHUNK", 200)
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
        for _ in range(24):
            [fresh] = loaders_of(data, 1)
            resumed = rows_of([fresh], 5, loader.state_dict())
            assert rows_of([loader], 13)[:15] == resumed

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


class TestPackedRows:
    def test_example(self):
        tokens = np.arange(14, dtype=np.uint16).reshape(2, 7)
        # the first row: documents of 2 and 4 tokens, the second: one that goes on, and an empty one
        rows = Rows(tokens, [np.array([2, 6]), np.array([3, 4, 7])])
        inputs, labels = to_batch(rows, 3)
        assert inputs["cu_seqlens"].tolist() == [0, 2, 5, 6, 9, 10, 12]
        assert inputs["positions"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 1]]
        assert labels.tolist() == tokens[:, 1:].tolist()
        assert list(to_batch(rows, None)[0]) == ["input"]

    def test_inputs_and_labels_are_apart(self):
        inputs, labels = to_batch(Rows(np.zeros((1, 5), np.uint16), [np.empty(0, int)]), None)
        labels[:] = IGNORE_INDEX
        assert not inputs["input"].any()


class TestMixture:
    @settings(max_examples=50, deadline=None)
    @given(
        shares=st.lists(st.integers(1, 30), min_size=2, max_size=4),
        seed=st.integers(0, 2**40),
        start=st.integers(0, 200),
    )
    def test_each_sequence_of_a_source_once_and_shares_exact(self, shares, seed, start):
        mixture, size = Mixture(shares, seed), sum(shares)
        seen = [mixture.locate(place) for place in range(start, start + 2 * size)]
        assert seen == [
            Mixture(shares, seed).locate(place) for place in range(start, start + 2 * size)
        ]
        for source, share in enumerate(shares):
            numbers = [number for own, number in seen if own == source]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert abs(len(numbers) - 2 * share) <= share
        whole = [source for source, _ in (mixture.locate(place) for place in range(size))]
        assert [whole.count(source) for source in range(len(shares))] == list(shares)

    def test_blocks_and_seeds_differ(self):
        orders = {
            tuple(Mixture([50, 50], seed).locate(place)[0] for place in range(block, block + 100))
            for seed in (0, 1)
            for block in (0, 100)
        }
        assert len(orders) == 4

    def test_order_is_the_same_for_every_version(self):
        # written down: a change here breaks the exact resume of every older checkpoint
        order = [Mixture([3, 2], 42).locate(place) for place in range(10)]
        assert order == [
            (0, 0),
            (1, 0),
            (0, 1),
            (1, 1),
            (0, 2),
            (0, 3),
            (0, 4),
            (0, 5),
            (1, 2),
            (1, 3),
        ]


class TestStream:
    def test_is_the_documents_in_order_again_and_again(self, text):
        lines = [
            json.loads(x)["text"] for x in (text / "many" / "a.jsonl").read_text().splitlines()
        ]
        lines += pq.read_table(text / "many" / "b.parquet")["text"].to_pylist()
        lines += [
            json.loads(x)["text"] for x in (text / "many" / "c.jsonl").read_text().splitlines()
        ]
        stream = [i for line in lines for i in (*line.encode(), EOS)]
        data = data_of(text, *STREAM, mixed=False)
        steps = 2 * len(stream) // (3 * T)
        order = rows_of(loaders_of(data, 1), steps)
        for i, row in enumerate(order):
            expected = [stream[j % len(stream)] for j in range(i * T, i * T + T + 1)]
            assert row == expected

    def test_held_out_documents_are_the_first_and_never_trained_on(self, text):
        data = data_of(text, *STREAM, "--validation.sequences", "4", mixed=False)
        batches = list(data.validation(dp_rank=0, dp_world_size=1))
        held_out = [row.tolist() for inputs, _ in batches for row in inputs["input"]][:4]
        assert bytes(held_out[0]).startswith(b"a0:")
        assert (torch.cat([labels for _, labels in batches]) != IGNORE_INDEX).all(1).sum() == 4
        # three epochs
        stream = [i for row in rows_of(loaders_of(data, 1), 600) for i in row[:-1]]
        documents = bytes(i if i != EOS else 10 for i in stream).decode().split("\n")
        names = {document.partition(":")[0] for document in documents[1:-1]}
        assert not names & {"a0", "a1"}
        assert {"a59", "b0", "b59", "c0", "c59"} <= names

    def test_splits_compressed_and_saved_text_stream_as_they_are_mapped(self, tmp_path):
        texts = [f"{i} is a number" for i in range(50)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (tmp_path / "hub" / "data").mkdir(parents=True)
        (tmp_path / "hub" / "README.md").write_text("# A card")
        for split in ("train", "test"):
            raw = lines if split == "train" else lines.replace(b"is", b"was")
            compressed = pa.compress(raw, "zstd", asbytes=True)
            name = f"{split}-00000-of-00001.jsonl.zst"
            (tmp_path / "hub" / "data" / name).write_bytes(compressed)
        saved = datasets.Dataset.from_dict({"text": texts})
        saved.save_to_disk(tmp_path / "saved", num_shards=2)
        stream = [i for text in texts for i in (*text.encode(), EOS)]
        for folder in ("hub", "saved"):
            flags = ["--training.dataset", str(tmp_path / folder), "--training.seq_len", "8"]
            flags += ["--training.bos", "none"]
            data, mapped = (open_data(parse_args([*flags, *mode]), BYTE) for mode in (STREAM, MAP))
            assert mapped.fingerprint["the number of tokens (--training.dataset)"] == len(stream)
            [loader], [resumed] = loaders_of(data, 1), loaders_of(data, 1)
            for i, row in enumerate(rows_of([loader], 3)):
                assert row == stream[8 * i : 8 * i + 9]
            assert rows_of([resumed], 3, loader.state_dict()) == rows_of([loader], 3)

    @pytest.mark.parametrize("num_shards", [1, 3])
    def test_hub_stream(self, text, tmp_path, monkeypatch, num_shards):
        # a real load_dataset, with one of its own builders instead of a dataset of the hub
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        for i in range(num_shards):
            lines = (json.dumps({"text": f"{i}.{j}"}) + "\n" for j in range(40))
            (tmp_path / f"{i}.jsonl").write_text("".join(lines))
        size = ["--training.seq_len", "8", "--training.batch_size", "2", "--training.bos", "none"]
        flags = ["--training.dataset", "json", "--training.data_files", "*.jsonl", *size]
        data = open_data(parse_args([*flags, *STREAM]), BYTE)
        [loader], [resumed] = loaders_of(data, 1), loaders_of(data, 1)
        order = rows_of([loader], 30)
        stream = "".join(f"{i}.{j}\n" for i in range(num_shards) for j in range(40)).encode()
        for i, row in enumerate(order[:15]):
            expected = [EOS if x == 10 else x for x in stream[8 * i : 8 * i + 9]]
            assert row == expected
        state = loader.state_dict()
        assert rows_of([resumed], 5, state) == rows_of([loader], 5)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"text": "fine"}\n{"text": ', "bad.jsonl': line 2 is not JSON"),
            ('{"text": ""}\n', "bad.jsonl': holds no text"),
            ("", "bad.jsonl': holds no text"),
            ('{"other": "x"}\n', "bad.jsonl': line 1 has no 'text' column"),
        ],
    )
    @pytest.mark.parametrize("num_workers", ["0", "2"])
    def test_bad_shard_is_named(self, tmp_path, content, message, num_workers):
        (tmp_path / "a.jsonl").write_text('{"text": "some words to begin with"}\n' * 30)
        (tmp_path / "bad.jsonl").write_text(content)
        flags = ["--training.dataset", str(tmp_path), "--training.seq_len", "8", *STREAM]
        workers = ["--training.num_workers", num_workers]
        with pytest.raises(ValueError, match=r"^--training\.dataset '.*" + message):
            rows_of(loaders_of(open_data(parse_args([*flags, *workers]), BYTE), 1), 100)

    def test_damaged_parquet_and_bad_hub_rows_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        file = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": ["x" * 50] * 100}), file, row_group_size=20)
        raw = bytearray(file.read_bytes())
        raw[4:40] = b"\xff" * 36
        file.write_bytes(raw)
        flags = ["--training.seq_len", "8", *STREAM]
        local = ["--training.dataset", str(file)]
        with pytest.raises(ValueError, match=r"a\.parquet': not a sound parquet file"):
            open_data(parse_args([*flags, *local]), BYTE)
        hub = ["--training.dataset", "parquet", "--training.data_files", "a.parquet"]
        with pytest.raises(ValueError, match=r"'parquet': shard 0 of 1, row 0, cannot be read"):
            open_data(parse_args([*flags, *hub]), BYTE)
        pq.write_table(pa.table({"text": ["x", None]}), file)
        with pytest.raises(ValueError, match=r"shard 0 of 1, row 1, has NoneType in column 'text'"):
            rows_of(loaders_of(open_data(parse_args([*flags, *hub]), BYTE), 1), 9)

    def test_too_little_to_hold_out(self, text):
        with pytest.raises(
            ValueError, match=r"^--validation\.sequences 1000: .*many has \d+ tokens"
        ):
            data_of(text, *STREAM, "--validation.sequences", "1000", mixed=False)

    def test_document_that_shrank(self, text, tmp_path):
        file = tmp_path / "a.jsonl"
        long, short = json.dumps({"text": "x" * 90}), json.dumps({"text": "x"})
        file.write_text(f"{short}\n{long}\n")
        flags = ["--training.dataset", str(file), "--training.seq_len", "8", *STREAM]
        [loader] = loaders_of(open_data(parse_args(flags), BYTE), 1)
        next(iter(loader))
        state = loader.state_dict()
        file.write_text(f"{long}\n{short}\n")
        [other] = loaders_of(open_data(parse_args(flags), BYTE), 1)
        other.load_state_dict(state)
        with pytest.raises(
            ValueError,
            match=r"document 1 of a\.jsonl, where the checkpoint stopped, is missing or has",
        ):
            next(iter(other))


class TestChangedStream:
    """Files that are damaged, and files that change, between two starts of a run."""

    LENGTH = 8

    @pytest.fixture
    def folder(self, tmp_path):
        for part in range(3):
            lines = [json.dumps({"text": f"part {part} line {i}"}) + "\n" for i in range(40)]
            (tmp_path / f"part-{part}.jsonl").write_text("".join(lines))
        return tmp_path

    def loader(self, folder, sequences=0, **options):
        shape = {"seq_len": self.LENGTH, "batch_size": 2, "streaming": True, "bos": "none"}
        config = JobConfig(
            training=Training(dataset=str(folder), **shape, **options),
            validation=Validation(share=0, sequences=sequences),
        )
        return open_data(config, BYTE).loader(dp_rank=0, dp_world_size=1)

    @staticmethod
    def edit(folder, part, edit):
        file = folder / f"part-{part}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        edit(lines)
        file.write_text("".join(lines))

    def tokens(self, folder):
        files = sorted(folder.glob("*.jsonl"))
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [i for line in lines for i in (*json.loads(line)["text"].encode(), EOS)]

    def in_part_1(self, folder):
        """A state about ten documents into part 1, and the tokens before it."""
        loader = self.loader(folder)
        rows_of([loader], 47)
        assert json.loads(loader.state_dict()["places"])["places"][0][:2] == [0, 1]
        return loader.state_dict(), 47 * 2 * self.LENGTH

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: TestChangedStream.edit(folder, 1, lambda lines: lines.pop(30)),
            lambda folder: TestChangedStream.edit(folder, 1, lambda lines: lines.append(lines[0])),
            lambda folder: TestChangedStream.edit(folder, 2, lambda lines: lines.pop(3)),
            lambda folder: (folder / "part-2.jsonl").unlink(),
            lambda folder: (folder / "part-3.jsonl").write_text('{"text": "more"}'),
        ],
        ids=["line", "longer", "file", "gone", "added"],
    )
    def test_what_is_still_to_be_read_may_change(self, folder, change):
        state, used = self.in_part_1(folder)
        change(folder)
        loader = self.loader(folder)
        loader.load_state_dict(state)
        tokens = self.tokens(folder)[used:]
        for i, row in enumerate(rows_of([loader], 20)):
            assert row == tokens[i * self.LENGTH : (i + 1) * self.LENGTH + 1]

    def test_a_file_that_lies_ahead_can_be_left_out(self, folder):
        state, _ = self.in_part_1(folder)
        expected = self.loader(folder)
        expected.load_state_dict(state)
        without = self.loader(folder, data_files="part-[01]*")
        assert rows_of([without], 20, state) == rows_of([expected], 20)
        none = self.loader(folder, data_files="part-[02]*")
        with pytest.raises(ValueError, match=r"data has part-1\.jsonl, .* this run's has part-2\."):
            none.load_state_dict(state)

    def test_what_was_read_must_stay(self, folder):
        state, _ = self.in_part_1(folder)
        self.edit(folder, 0, lambda lines: lines.pop(3))
        with pytest.raises(
            ValueError,
            match=r"^--training\.dataset: .*part-0\.jsonl, 1,\d+ bytes, as file 1, which was read;",
        ):
            self.loader(folder).load_state_dict(state)

    @pytest.mark.parametrize(
        "edit", [lambda lines: lines.pop(3), lambda lines: lines.__delitem__(slice(5, None))]
    )
    def test_what_was_read_of_a_file_must_stay(self, folder, edit):
        state, _ = self.in_part_1(folder)
        self.edit(folder, 1, edit)
        loader = self.loader(folder)
        loader.load_state_dict(state)
        with pytest.raises(
            ValueError, match=r"document 1\d of part-1\.jsonl, where the checkpoint stopped"
        ):
            rows_of([loader], 1)

    def test_held_out_documents_must_stay(self, folder):
        state = self.loader(folder, 3).state_dict()
        self.edit(folder, 0, lambda lines: lines.reverse())
        with pytest.raises(
            ValueError, match=r"^--training\.dataset: the checkpoint's data has held"
        ):
            self.loader(folder, 3).load_state_dict(state)

    def test_after_an_epoch_all_must_stay(self, folder):
        loader = self.loader(folder)
        rows_of([loader], 130)
        state = loader.state_dict()
        more = folder / "part-3.jsonl"
        more.write_text('{"text": "more"}')
        with pytest.raises(ValueError, match=r"data has 3 files, all of which were read; .*has 4"):
            self.loader(folder).load_state_dict(state)
        more.unlink()
        self.edit(folder, 2, lambda lines: lines.pop())
        with pytest.raises(ValueError, match=r"has part-2\.jsonl, .* as file 3, which was read"):
            self.loader(folder).load_state_dict(state)

    def test_states_of_earlier_versions(self, folder):
        state, _ = self.in_part_1(folder)
        # the document in which the next sequence begins, without what was read and how documents begin
        old = state | {"places": json.dumps(json.loads(state["places"])["places"])}
        old["checksum"] = self.loader(folder)._earlier_checksum
        assert rows_of([self.loader(folder)], 5, old) == rows_of([self.loader(folder)], 5, state)
        self.edit(folder, 2, lambda lines: lines.pop())
        with pytest.raises(
            ValueError, match=r"^--training\.dataset: the checkpoint's data has check"
        ):
            self.loader(folder).load_state_dict(old)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_all_before_a_bad_line_is_trained_on_and_the_rest_when_it_is_corrected(
        self, folder, monkeypatch, num_workers
    ):
        monkeypatch.setattr(stream_module, "_CHUNK", 200)
        expected = rows_of([self.loader(folder)], 60)
        good = (folder / "part-1.jsonl").read_text()
        self.edit(folder, 1, lambda lines: lines.__setitem__(20, "{cut\n"))
        loader = self.loader(folder, num_workers=num_workers)
        rows = []

        def read_on():
            for inputs, _ in loader:
                rows.extend(inputs["input"].tolist())
                yield loader.mark(), loader.state_dict()

        steps = read_on()
        # no token before the line is left that would fill a batch
        text = (folder / "part-0.jsonl").read_text() + good
        before = [json.loads(line)["text"] for line in text.splitlines()[:60]]
        num_steps = (len("".join(before)) + len(before) - 1) // (2 * self.LENGTH)
        *_, (mark, state) = islice(steps, num_steps)
        with pytest.raises(ValueError, match=r"part-1\.jsonl': line 21 is not JSON"):
            next(steps)
        assert rows == [row[:-1] for row in expected[: len(rows)]]
        loader.rewind(mark)
        assert loader.state_dict() == state
        loader.close()
        (folder / "part-1.jsonl").write_text(good)
        continued = self.loader(folder, num_workers=num_workers)
        assert rows_of([continued], 60 - num_steps, state) == expected[len(rows) :]
        continued.close()


class TestFlags:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ("--training.dataset a,b", "data_probs must be 2 numbers"),
            ("--training.dataset a,b --training.data_probs 0.7,0.2", "sum to 1, got '0.7,0.2'"),
            ("--training.dataset a,b --training.data_probs 1,0", "positive"),
            ("--training.dataset a,b --training.data_probs 0.55555,0.44445", "multiple of 0.0001"),
            ("--training.dataset a,b --training.data_probs 1", "data_probs must be 2 numbers"),
            ("--training.dataset a,b --training.data_probs x,y", "data_probs must be 2 numbers"),
            (
                "--training.dataset a,b --training.data_probs 0.5,0.5 --training.data_dir x",
                "data_dir must be 2 values",
            ),
            ("--training.streaming", "--validation.share must be 0 with --training.streaming"),
            ("--validation.sequences 3", "--validation.sequences must be 0 without"),
            ("--training.context_len 8", "context_len must be .* goes with --training.varlen"),
            (
                "--training.varlen --training.context_len 129",
                "between 1 and --training.seq_len 128",
            ),
            ("--training.prefetch_factor 2", "goes with --training.num_workers"),
            ("--training.num_workers -1", "num_workers must be at least 0"),
        ],
    )
    def test_a_mistake_is_named(self, argv, message):
        with pytest.raises(ValueError, match=message):
            parse_args(argv.split())

    def test_values_go_to_their_sources(self):
        flags = "--training.dataset a,b,c --training.data_probs 0.2,0.5,0.3"
        names = "--training.dataset_name x,,z --training.dataset_split ,test,"
        sources = parse_args(
            f"{flags} {names} --training.data_files ,f,".split()
        ).training.sources()
        assert [(s.dataset, s.name, s.split, s.data_files, s.share) for s in sources] == [
            ("a", "x", "train", None, 2000),
            ("b", None, "test", "f", 5000),
            ("c", "z", "train", None, 3000),
        ]
        # one source alone keeps its commas
        [source] = parse_args(
            ["--training.dataset", "a", "--training.data_files", "f,g"]
        ).training.sources()
        assert source.data_files == "f,g"

    def test_empty_source_is_named(self):
        flags = ["--training.dataset", "python-docs,", "--training.data_probs", "0.5,0.5"]
        with pytest.raises(ValueError, match=r"^--training\.dataset '': empty"):
            open_data(parse_args(flags), BYTE)
