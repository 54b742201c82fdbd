"""Documents that are tokenized while training: their order, what is held out, the hub, damaged files."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_sources import BYTE, EOS, MAP, STREAM, T, data_of, loaders_of, rows_of, write_sources

from flame.config.parse import parse_args
from flame.data.batches import IGNORE_INDEX
from flame.data.run_data import open_data


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("text"))


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

    @pytest.mark.parametrize("num_shards", [pytest.param(1, marks=pytest.mark.slow), 3])
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
