"""flame.data: the documents of files and folders, and which files of a folder are the data."""

import json
import sys

import datasets
import pyarrow as pa
import pytest
from document_files import compressed, save_to_disk, write

from flame.data.files import read_file
from flame.data.text import load_documents


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
        caplog.set_level("WARNING", "flame")
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
