"""flame.data: tokenizers and documents."""

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from flame.data import (
    load_documents,
    load_tokenizer,
)
from flame.data.files import read_file

BYTE = load_tokenizer("byte")
BOS, EOS, PAD = 256, 257, 258
# no deadline: the first example pays for imports
quick = settings(max_examples=100, deadline=None)


@pytest.fixture
def offline(monkeypatch):
    """The hub as unreachable as without a network, without the retries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def compressed(ending, content):
    if ending == ".zst":
        return bytes(pa.compress(content.encode(), "zstd", asbytes=True))
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress(content.encode())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table) and path.suffix == ".arrow":
        with pa.ipc.new_stream(path, content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
    elif isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_bytes(content.encode())
    return str(path)


class TestByteTokenizer:
    @quick
    @given(st.text())
    @example("")
    @example("  leading, trailing  ")
    @example("don 't , re-join . these")
    @example("\x00\x07\x1b\x7f\x85\u2028\r\n\t")
    @example("👩‍👩‍👧 e\u0301 \U0010ffff \ufeff")
    @example("a<|bos|><|eos|><|pad|>b</s>")
    def test_gives_back_every_string(self, text):
        ids = BYTE(text)["input_ids"]
        assert ids == [BOS, *text.encode()]
        assert BYTE.decode(ids[1:]) == text
        assert BYTE.decode(ids, skip_special_tokens=True) == text

    def test_special_tokens(self):
        assert isinstance(BYTE, PreTrainedTokenizerFast)
        assert (BYTE.bos_token_id, BYTE.eos_token_id, BYTE.pad_token_id) == (BOS, EOS, PAD)
        assert len(BYTE) == 259
        assert BYTE.decode([104, EOS, 105], skip_special_tokens=True) == "hi"
        # reading them from text is possible, and has to be asked for
        assert BYTE("a<|eos|>", split_special_tokens=False)["input_ids"] == [BOS, 97, EOS]

    def test_survives_saving(self, tmp_path):
        BYTE.save_pretrained(tmp_path)
        for reloaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
            assert isinstance(reloaded, PreTrainedTokenizerFast)
            assert reloaded.get_vocab() == BYTE.get_vocab()
            assert (reloaded.eos_token_id, reloaded.pad_token_id) == (EOS, PAD)
            text = " é😀<|eos|>\x00 ."
            assert reloaded(text)["input_ids"] == [BOS, *text.encode()]
            assert reloaded.decode(reloaded(text)["input_ids"][1:]) == text


class TestLoadTokenizerErrors:
    FLAG = r"^--model\.tokenizer_path "

    @pytest.mark.parametrize(
        "value", ["./nowhere", "/nowhere/at/all", "~/no-such-folder", "a/b/c", "t.json"]
    )
    def test_path_that_does_not_exist(self, value):
        with pytest.raises(
            ValueError, match=self.FLAG + f"'{value}': no such file or folder; .*'byte'"
        ):
            load_tokenizer(value)

    def test_empty_value_is_not_the_working_directory(self):
        with pytest.raises(ValueError, match=self.FLAG + "'': empty"):
            load_tokenizer("")

    @pytest.mark.parametrize(
        "files",
        [
            pytest.param({}, id="empty"),
            pytest.param({"config.json": '{"model_type": "llama"}'}, id="model-only"),
            pytest.param(
                {"tokenizer.json": '{"version":', "tokenizer_config.json": "{}"}, id="cut-off"
            ),
            pytest.param({"tokenizer.json": '{"version": "1.0"}'}, id="no-model"),
        ],
    )
    def test_folder_without_a_usable_tokenizer(self, tmp_path, files):
        for name, content in files.items():
            write(tmp_path / name, content)
        with pytest.raises(
            ValueError, match=self.FLAG + r".*no usable tokenizer in this folder \(.+\)"
        ) as info:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(info.value)

    def test_file(self, tmp_path):
        file = write(tmp_path / "tokenizer.json", "{}")
        with pytest.raises(ValueError, match=self.FLAG + ".*is a file; give the folder"):
            load_tokenizer(file)

    def test_no_eos(self, tmp_path):
        word_tokenizer(4).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=self.FLAG + ".*no eos token"):
            load_tokenizer(str(tmp_path))

    def test_not_fast(self, tmp_path):
        ByT5Tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=self.FLAG + ".*ByT5Tokenizer is not a fast tokenizer"):
            load_tokenizer(str(tmp_path))

    @pytest.mark.usefixtures("offline")
    def test_hub_out_of_reach(self):
        with pytest.raises(
            ValueError, match=self.FLAG + "'some/tokenizer': .*hub failed.*'byte'"
        ) as info:
            load_tokenizer("some/tokenizer")
        assert "\n" not in str(info.value)


class TestLoadDocuments:
    def test_python_docs(self):
        documents = load_documents("python-docs")
        sizes = {(3, 11, 7): 466_117, (3, 12, 1): 493_344, (3, 13, 0): 511_791}
        size = sum(len(document.encode()) for document in documents)
        assert size == sizes.get(sys.version_info[:3], size)
        assert size > 400_000
        assert len(documents) > 70
        assert documents == load_documents("python-docs")
        assert documents[0].startswith('The "assert" statement')

    def test_text_file_stays_as_it_is(self, tmp_path):
        text = "one\r\n\r\ntwo\u2028 three \n\x00"
        assert load_documents(write(tmp_path / "a.txt", text)) == [text]
        assert load_documents(write(tmp_path / "b.md", "\ufeff" + text)) == [text]

    def test_json_lines(self, tmp_path):
        texts = ["a\nb", "\u2028\x85é😀", "", "<|eos|>"]
        # written raw as well as escaped: the separators must not be taken for line ends
        texts += texts
        lines = [
            json.dumps({"id": i, "text": text}, ensure_ascii=i < len(texts) / 2)
            for i, text in enumerate(texts)
        ]
        for name in ("a.jsonl", "a.json"):
            assert load_documents(write(tmp_path / name, "\n".join(lines))) == texts
            assert load_documents(write(tmp_path / name, "\r\n\n".join(lines) + "\n")) == texts
        array = "\n [" + ",\n".join(lines) + "]"
        assert load_documents(write(tmp_path / "array.json", array)) == texts

    @pytest.mark.parametrize(
        "kind",
        [
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.dictionary(pa.int8(), pa.string()),
            pa.dictionary(pa.int32(), pa.large_string()),
        ],
        ids=str,
    )
    def test_parquet(self, tmp_path, kind):
        table = pa.table({"n": [1, 2, 3], "text": pa.array(["a", "", "é"], kind)})
        # a folder name that read_table would take for a column
        assert load_documents(write(tmp_path / "text=x" / "a.parquet", table)) == ["a", "", "é"]

    def test_folder_is_recursive_sorted_and_complete(self, tmp_path, caplog):
        write(tmp_path / "b" / "deep" / "2.txt", "b2")
        write(tmp_path / "c.MD", "c")
        write(tmp_path / "b" / "1.jsonl", '{"text": "b1"}')
        write(tmp_path / "a.parquet", pa.table({"text": ["a"]}))
        write(tmp_path / ".hidden.txt", "hidden")
        write(tmp_path / ".git" / "x.txt", "hidden")
        assert load_documents(str(tmp_path)) == ["a", "b1", "b2", "c"]
        assert not caplog.records
        write(tmp_path / "b" / "picture.png", "")
        (tmp_path / "link").symlink_to(tmp_path / "b")
        assert load_documents(str(tmp_path)) == ["a", "b1", "b2", "c"]
        assert "2 entries" in caplog.text
        assert "b/picture.png the first" in caplog.text

    @pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
    def test_compressed_text(self, tmp_path, ending):
        for name, content in (
            ("a.txt", "one"),
            ("b.jsonl", '{"text": "two"}\n{"text": "three"}\n'),
            ("c.json", '[{"text": "four"}]'),
            ("d.MD", "five"),
        ):
            write(tmp_path / (name + ending), compressed(ending, content))
        texts = ["one", "two", "three", "four", "five"]
        assert load_documents(str(tmp_path)) == texts
        assert list(read_file(tmp_path / f"b.jsonl{ending}", 1)) == ["three"]

    def test_arrow(self, tmp_path):
        texts = [f"{i}" for i in range(9)]
        write(tmp_path / "stream.arrow", table := pa.table({"text": texts}))
        with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        for name in ("stream.arrow", "file.arrow"):
            assert load_documents(str(tmp_path / name)) == texts
            assert list(read_file(tmp_path / name, 3)) == texts[3:]

    def test_data_files_choose_within_a_folder(self, tmp_path):
        for name in ("b/2.txt", "b/1.txt", "a.txt", "c.json"):
            write(tmp_path / name, name)
        assert load_documents(str(tmp_path), data_files="**/*.txt") == [
            "a.txt",
            "b/1.txt",
            "b/2.txt",
        ]
        assert load_documents(str(tmp_path), data_files=["b/*", "b/2.txt"]) == [
            "b/1.txt",
            "b/2.txt",
        ]
        with pytest.raises(ValueError, match=r"^--training\.data_files 'x\*': matches no file"):
            load_documents(str(tmp_path), data_files=["*.txt", "x*"])

    def test_hugging_face_dataset(self, tmp_path, monkeypatch):
        # a real load_dataset, with one of its own builders instead of a dataset of the hub
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        file = write(tmp_path / "a.jsonl", '{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n')
        monkeypatch.chdir(tmp_path)
        documents = load_documents("json", data_files=file)
        assert list(documents) == ["one", "two"]
        assert len(documents) == 2
        with pytest.raises(ValueError, match=r"'json': .*Unknown split \"test\""):
            load_documents("json", data_files=file, split="test")

    def test_hub_options_reach_the_hub(self, monkeypatch):
        calls = []
        table = datasets.Dataset.from_dict({"text": ["one"]})
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or table)
        load_documents("owner/name", name="n", split="s", data_dir="d", data_files="f")
        options = {"split": "s", "data_dir": "d", "data_files": "f", "streaming": False}
        assert calls == [(("owner/name", "n"), options)]


CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/part-*
  - split: held_out
    path: main/rest.parquet
- config_name: other
  data_dir: other
---
# A card
"""


def save_to_disk(folder, texts, num_shards=1):
    dataset = datasets.Dataset.from_dict({"text": texts})
    dataset.save_to_disk(folder, num_shards=num_shards)
    return str(folder)


class TestSplits:
    """What of a folder is read: one split of several, no card."""

    @staticmethod
    def splits_of(folder, *names):
        return [load_documents(str(folder), split=name) for name in names]

    def test_hub_layout(self, tmp_path):
        for split in ("train", "validation", "test", "extra"):
            for i in range(2):
                name = f"data/{split}-{i:05}-of-00002.parquet"
                write(tmp_path / name, pa.table({"text": [f"{split}{i}"]}))
        write(tmp_path / "README.md", "---\nlicense: mit\n---\n# A card")
        assert load_documents(str(tmp_path)) == ["train0", "train1"]
        assert self.splits_of(tmp_path, "extra", "test+train") == [
            ["extra0", "extra1"],
            ["test0", "test1", "train0", "train1"],
        ]
        assert len(load_documents(str(tmp_path), split="all")) == 8
        assert load_documents(str(tmp_path), data_files="data/test-00001*") == ["test1"]
        for split in ("testing", "train[:10%]", ""):
            with pytest.raises(
                ValueError,
                match=r"^--training\.dataset_split '.*has the splits extra, test, train, validation;",
            ):
                load_documents(str(tmp_path), split=split)

    @pytest.mark.parametrize(
        "names", ["{}/a.jsonl.gz", "{}.jsonl.gz", "deep/my-{}-1.jsonl.gz", "{}_files/a.jsonl.gz"]
    )
    def test_names_of_folders_and_files(self, tmp_path, names):
        for split in ("train", "validation", "test"):
            content = compressed(".gz", json.dumps({"text": split}))
            write(tmp_path / names.format(split), content)
        assert self.splits_of(tmp_path, "train", "test") == [["train"], ["test"]]
        write(tmp_path / "essay.txt", "essay")
        with pytest.raises(
            ValueError,
            match=r"1 files, the first essay\.txt, .*none of the splits .*\(train, validation, test\)",
        ):
            load_documents(str(tmp_path))
        assert "essay" in load_documents(str(tmp_path), split="all")

    def test_configurations_of_a_card(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "data"
        for name in ("main/part-1", "main/rest", "main/unused", "other/train", "other/test"):
            write(folder / f"{name}.parquet", pa.table({"text": [name]}))
        write(folder / "README.md", CARD)
        assert self.splits_of(folder, "train", "held_out") == [["main/part-1"], ["main/rest"]]
        assert load_documents(str(folder), name="other", split="test") == ["other/test"]
        with pytest.raises(ValueError, match="has the splits train, held_out;"):
            load_documents(str(folder), split="test")
        with pytest.raises(ValueError, match=r"dataset_name 'x'.*Available: \['main', 'other'\]"):
            load_documents(str(folder), name="x")
        write(folder / "README.md", "---\nconfigs: [\n---\n")
        with pytest.raises(ValueError, match=r"README\.md': is no dataset card .*; correct"):
            load_documents(str(folder))

    def test_card_is_no_text(self, tmp_path, caplog):
        caplog.set_level("INFO")
        write(tmp_path / "README.md", "# A card")
        write(tmp_path / "a.md", "a")
        # of the same kind as the rest
        assert load_documents(str(tmp_path)) == ["# A card", "a"]
        write(tmp_path / "sub" / "b.txt", "b")
        write(tmp_path / "dataset_infos.json", "{}")
        assert load_documents(str(tmp_path)) == ["a", "b"]
        assert f"{tmp_path}/README.md describes the data" in caplog.text
        assert load_documents(str(tmp_path), data_files="**/*") == ["a", "b"]
        assert load_documents(str(tmp_path), data_files="README.md") == ["# A card"]

    @pytest.mark.parametrize("name", ["b.csv", "deep/b.jsonl.zip", "b.csv.gz", "b.parquet.gz"])
    def test_data_of_another_kind_is_never_left_out(self, tmp_path, name):
        write(tmp_path / "a.txt", "a")
        write(tmp_path / name, "b")
        with pytest.raises(ValueError, match=f"{name}': is data of a kind that is not read"):
            load_documents(str(tmp_path))
        assert load_documents(str(tmp_path), data_files="*.txt") == ["a"]

    def test_saved_to_disk(self, tmp_path):
        texts = [str(i) for i in range(10)]
        folder = save_to_disk(tmp_path / "one", texts, num_shards=3)
        assert load_documents(folder) == texts
        with pytest.raises(ValueError, match=r"dataset_split 'test': .*save_to_disk wrote"):
            load_documents(folder, split="test")
        with pytest.raises(
            ValueError, match="one': was written by save_to_disk .*; name this fold"
        ):
            load_documents(str(tmp_path))
        (tmp_path / "one" / "state.json").write_text("{")
        with pytest.raises(
            ValueError, match="one': was written by save_to_disk of datasets, which"
        ):
            load_documents(folder)

    def test_saved_splits(self, tmp_path):
        splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
        datasets.DatasetDict(splits).save_to_disk(tmp_path)
        assert self.splits_of(tmp_path, "train", "test", "all") == [
            ["train"],
            ["test"],
            ["train", "test"],
        ]
        with pytest.raises(ValueError, match=r"dataset_split 'x': .*has the splits train, test;"):
            load_documents(str(tmp_path), split="x")


class TestLoadDocumentsErrors:
    FLAG = r"^--training\.dataset "

    @pytest.mark.parametrize(
        "value",
        [
            "./nowhere",
            "../no-such-folder",
            "/nowhere/at/all",
            "~/no-such-file",
            "a/b/c",
            "corpus.txt",
            "d/e.parquet",
        ],
    )
    def test_path_that_does_not_exist(self, value):
        with pytest.raises(
            ValueError, match=self.FLAG + f"'{value}': no such file or folder; .*'python-docs'"
        ):
            load_documents(value)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "", "holds no text"),
            ("a.jsonl", "\n", "holds no text"),
            ("a.json", "[]", "holds no text"),
            ("a.jsonl", '{"text": ""}', "holds no text"),
            ("a.txt", b"caf\xe9", "byte 3 is not UTF-8"),
            ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2 byte 10 is not UTF-8"),
            ("a.jsonl", '{"text": "a"}\n\n{"text": "cut', "line 3 is not JSON"),
            ("a.jsonl", '{"text": "a"}\n["text"]', "line 2 is not a JSON object"),
            (
                "a.jsonl",
                '{"text": "a"}\n{"b": 1, "a": 2}',
                r"line 2 has no 'text' column, only \['a', 'b'\]",
            ),
            ("a.jsonl", '{"text": null}', 'line 1 has NoneType under "text"'),
            ("a.jsonl", '{"text": "\\ud800"}', "line 1 has a lone surrogate"),
            ("a.json", '[{"text": "a"}, {"text": 1}]', 'record 2 has int under "text"'),
            ("a.json", '[{"text": "a"},', "is not JSON"),
            ("a.json", '{\n "text": "a"\n}', "line 1 is not JSON"),
            ("a.json", "[" * 100_000, "is not JSON"),
            ("a.parquet", b"PAR1 but nothing else PAR1", "not a sound parquet file"),
            ("a.parquet", b"", "not a sound parquet file"),
            (
                "a.parquet",
                pa.table({"b": ["x"], "a": ["x"]}),
                r"has no 'text' column, only \['a', 'b'\]",
            ),
            ("a.parquet", pa.table({"text": [1, 2]}), "column 'text' holds int64"),
            (
                "a.arrow",
                pa.table({"text": pa.array([1, 2]).dictionary_encode()}),
                "column 'text' holds dictionary",
            ),
            (
                "a.arrow",
                pa.table({"text": pa.DictionaryArray.from_arrays([1, 0], ["x", None])}),
                "null in 1 rows, row 0 the first",
            ),
            ("a.arrow", b"not arrow", "not a sound arrow file"),
            ("a.arrow", b"", "not a sound arrow file"),
            ("a.jsonl.gz", b"not gzip", "cannot be decompressed"),
            *(
                pytest.param(
                    f"a.txt{ending}",
                    compressed(ending, "cut " * 9)[:-8],
                    "cannot be decompressed",
                    # what gzip writes holds the time
                    id=f"cut{ending}",
                )
                for ending in (".gz", ".bz2", ".xz", ".zst")
            ),
            ("a.parquet", pa.table({"text": ["x", None]}), "null in 1 rows, row 1 the first"),
            ("a.parquet", pa.table({"text": pa.array([], pa.string())}), "holds no text"),
        ],
    )
    @pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
    def test_bad_file(self, tmp_path, name, content, message, in_folder):
        file = write(tmp_path / "data" / name, content)
        write(tmp_path / "data" / "fine.txt", "fine")
        with pytest.raises(ValueError, match=self.FLAG + f"'.*{name}': .*{message}.*; .+") as info:
            load_documents(str(tmp_path / "data") if in_folder else file)
        assert "\n" not in str(info.value)
        assert file in str(info.value)

    def test_parquet_damaged_inside(self, tmp_path):
        table = pa.table({"text": [f"document {i} " * 20 for i in range(1000)]})
        file = Path(write(tmp_path / "a.parquet", table))
        raw = bytearray(file.read_bytes())
        # the first data page; the footer, which names the columns, stays sound
        raw[4:2000] = b"\xff" * 1996
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=self.FLAG + ".*a.parquet': not a sound parquet file"):
            load_documents(str(file))

    def test_parquet_not_utf8(self, tmp_path):
        raw = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
        file = write(tmp_path / "a.parquet", pa.table({"text": raw}))
        with pytest.raises(ValueError, match=self.FLAG + ".*a.parquet': .*UTF8"):
            load_documents(file)

    def test_ending_that_is_not_read(self, tmp_path):
        file = write(tmp_path / "sub" / "a.csv", "text")
        with pytest.raises(
            ValueError, match=self.FLAG + ".*a.csv': .*does not end in .txt, .*parquet"
        ):
            load_documents(file)
        with pytest.raises(
            ValueError, match=self.FLAG + ".*a.csv': .*does not end in .txt, .*parquet"
        ):
            load_documents(str(tmp_path), data_files="sub/*")
        with pytest.raises(
            ValueError, match=self.FLAG + ".*no .txt, .*parquet file in this folder"
        ):
            load_documents(str(tmp_path))

    @pytest.mark.parametrize("dataset", ["python-docs", "file", "folder"])
    @pytest.mark.parametrize(
        ("option", "flag"),
        [
            ({"name": "x"}, "dataset_name"),
            ({"split": "test"}, "dataset_split"),
            ({"data_dir": "x"}, "data_dir"),
            ({"data_files": "x"}, "data_files"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_option_that_does_not_apply(self, tmp_path, dataset, option, flag):
        file = write(tmp_path / "a.txt", "a")
        dataset = {"file": file, "folder": str(tmp_path)}.get(dataset, dataset)
        with pytest.raises(
            ValueError, match=rf"^--training\.{flag} '\w+': (does not apply|matches no)"
        ):
            load_documents(dataset, **option)

    @pytest.mark.usefixtures("offline")
    def test_hub_out_of_reach(self):
        with pytest.raises(
            ValueError, match=self.FLAG + "'some/dataset': not a local path, .*'python-docs'"
        ):
            load_documents("some/dataset")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"content": ["x"], "id": [1]}, r"has no 'text' column, only \['content', 'id'\]"),
            ({"text": [[1]]}, "column 'text' holds list"),
            ({"text": ["a", None, None]}, "null in 2 rows, row 1 the first"),
            ({"text": []}, "split 'train' is empty"),
        ],
    )
    def test_bad_hub_dataset(self, monkeypatch, columns, message):
        table = datasets.Dataset.from_dict(columns)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table)
        with pytest.raises(ValueError, match=self.FLAG + f"'owner/name': .*{message}"):
            load_documents("owner/name")
