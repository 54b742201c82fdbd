"""flame.data: documents that cannot be read are named."""

from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from document_files import compressed, go_offline, write

from flame.data.text import load_documents


@pytest.fixture
def offline(monkeypatch):
    go_offline(monkeypatch)


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
