"""flame.data: tokenizers, documents, the token stream, and the loaders over it."""

import json
import sys
import tracemalloc
from itertools import islice
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from flame.data import (
    IGNORE_INDEX,
    TokenLoader,
    load_documents,
    load_tokenizer,
    split_tokens,
    tokenize,
    validation_batches,
)
from flame.data import loader as loader_module
from flame.data import tokens as tokens_module

BYTE = load_tokenizer("byte")
BOS, EOS, PAD = 256, 257, 258
# no deadline: the first example pays for imports
quick = settings(max_examples=100, deadline=None)


@pytest.fixture
def offline(monkeypatch):
    """The hub as unreachable as without a network, without the retries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def word_tokenizer(num_words, **special):
    """A tokenizer that is unlike the byte one: whole words, unknown ones included."""
    vocab = {f"w{i}": i for i in range(num_words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
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
        assert ids == list(text.encode())
        assert BYTE.decode(ids) == text
        assert BYTE.decode(ids, skip_special_tokens=True) == text

    def test_special_tokens(self):
        assert isinstance(BYTE, PreTrainedTokenizerFast)
        assert (BYTE.bos_token_id, BYTE.eos_token_id, BYTE.pad_token_id) == (BOS, EOS, PAD)
        assert len(BYTE) == 259
        assert BYTE.decode([104, EOS, 105], skip_special_tokens=True) == "hi"
        # reading them from text is possible, and has to be asked for
        assert BYTE("a<|eos|>", split_special_tokens=False)["input_ids"] == [97, EOS]

    def test_survives_saving(self, tmp_path):
        BYTE.save_pretrained(tmp_path)
        for reloaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
            assert isinstance(reloaded, PreTrainedTokenizerFast)
            assert reloaded.get_vocab() == BYTE.get_vocab()
            assert (reloaded.eos_token_id, reloaded.pad_token_id) == (EOS, PAD)
            text = " é😀<|eos|>\x00 ."
            assert reloaded(text)["input_ids"] == list(text.encode())
            assert reloaded.decode(reloaded(text)["input_ids"]) == text


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

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
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
        assert calls == [(("owner/name", "n"), {"split": "s", "data_dir": "d", "data_files": "f"})]


class TestLoadDocumentsErrors:
    FLAG = r"^--training\.dataset "

    @pytest.mark.parametrize(
        "value",
        [
            "./nowhere",
            "../x",
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
            ValueError, match=self.FLAG + "'some/dataset': no local path, .*'python-docs'"
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


class TestTokenize:
    @quick
    @given(st.lists(st.text(max_size=40)))
    @example(["", "<|eos|>", ""])
    def test_is_the_bytes_with_eos_behind_each_document(self, documents):
        expected = [i for document in documents for i in (*document.encode(), EOS)]
        tokens = tokenize(iter(documents), BYTE)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == expected

    def test_pieces_and_batches_do_not_show(self, monkeypatch):
        documents = load_documents("python-docs")[:6] + ["x" * 500, "", "\n" * 500]
        whole = tokenize(documents, BYTE)
        monkeypatch.setattr(tokens_module, "_PIECE", 100)
        monkeypatch.setattr(tokens_module, "_BATCH", 250)
        pieces = list(tokens_module._pieces(documents))
        assert max(len(text) for text, _ in pieces) == 100
        assert "".join(text for text, _ in pieces) == "".join(documents)
        assert len(list(tokens_module._batches(pieces))) > 10
        np.testing.assert_array_equal(tokenize(documents, BYTE), whole)

    @pytest.mark.parametrize(("num_words", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
    def test_dtype_holds_every_id(self, num_words, dtype):
        # the eos token takes the next id, 65,535 or 65,536
        tokens = tokenize([f"w{num_words - 1}"], word_tokenizer(num_words, eos_token="</s>"))
        assert tokens.dtype == dtype
        assert tokens.tolist() == [num_words - 1, num_words]

    def test_any_tokenizer_reads_special_tokens_as_text_and_is_left_alone(self):
        tokenizer = word_tokenizer(4, eos_token="</s>", pad_token="<pad>")
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=8, pad_id=5, pad_token="<pad>")
        assert tokenize(["w1 </s> w2 w3", "w1"], tokenizer).tolist() == [1, 0, 2, 3, 4, 1, 4]
        assert tokenizer.backend_tokenizer.truncation["max_length"] == 2
        assert tokenizer.backend_tokenizer.padding["length"] == 8
        assert tokenizer("</s>", truncation=False)["input_ids"] == [4]


class TestSplitTokens:
    @quick
    @given(
        num_tokens=st.integers(0, 400),
        seq_len=st.integers(1, 50),
        share=st.one_of(st.just(0.0), st.floats(0, 1, exclude_max=True)),
    )
    def test_parts_are_whole_and_do_not_overlap(self, num_tokens, seq_len, share):
        tokens = np.arange(num_tokens, dtype=np.uint16)
        try:
            train, validation = split_tokens(tokens, seq_len, share)
        except ValueError:
            # too short: the held-out part is at most the share plus a sequence and a label
            assert num_tokens < share * num_tokens + 2 * seq_len + 2
            return
        assert np.concatenate([train, validation]).tolist() == tokens.tolist()
        assert train.base is not None
        assert len(train) >= seq_len + 1
        if share == 0:
            assert not len(validation)
        else:
            count, rest = divmod(len(validation) - 1, seq_len)
            assert rest == 0
            assert count >= 1
            assert abs(count - share * num_tokens / seq_len) <= 1

    def test_example(self):
        train, validation = split_tokens(np.arange(1000), 10, 0.1)
        assert (len(train), len(validation)) == (899, 101)

    def test_too_short(self):
        message = r"^--training\.seq_len 10: the data has {} tokens, .* takes 11 .*; use a shorter"
        split_tokens(np.arange(11), 10, 0.0)
        with pytest.raises(ValueError, match=message.format(10)):
            split_tokens(np.arange(10), 10, 0.0)
        split_tokens(np.arange(22), 10, 0.01)
        with pytest.raises(ValueError, match=message.format(21)):
            split_tokens(np.arange(21), 10, 0.01)

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_bad_share(self, share):
        with pytest.raises(ValueError, match=r"^--validation\.share"):
            split_tokens(np.arange(100), 10, share)


def make_loader(tokens, *, seq_len=4, batch_size=2, dp_rank=0, dp_world_size=1, seed=0):
    return TokenLoader(
        tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        seed=seed,
    )


def visited(batch, seq_len=4):
    """The sequences of a batch; the streams here count up, so the first token says which."""
    inputs, labels = batch
    torch.testing.assert_close(labels, inputs["input"] + 1, rtol=0, atol=0)
    return (inputs["input"][:, 0] // seq_len).tolist()


def global_order(loaders, num_batches):
    """What the ranks together visit, in the order of the ranks within each step."""
    steps = zip(*(islice(loader, num_batches) for loader in loaders), strict=True)
    return [sequence for step in steps for batch in step for sequence in visited(batch)]


def ranks(tokens, world_size, batch_size, state=None):
    loaders = [
        make_loader(tokens, batch_size=batch_size, dp_rank=rank, dp_world_size=world_size)
        for rank in range(world_size)
    ]
    for loader in loaders if state else []:
        loader.load_state_dict(state)
    return loaders


class TestTokenLoader:
    # 10 sequences of 4 and three tokens that are not used
    TOKENS = np.arange(10 * 4 + 1 + 3, dtype=np.uint16)

    def test_batch(self):
        inputs, labels = next(iter(make_loader(self.TOKENS, batch_size=3)))
        assert list(inputs) == ["input"]
        for tensor in (inputs["input"], labels):
            assert tensor.shape == (3, 4)
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
        torch.testing.assert_close(
            inputs["input"] % 4, torch.arange(4).expand(3, 4), rtol=0, atol=0
        )
        torch.testing.assert_close(labels, inputs["input"] + 1, rtol=0, atol=0)

    def test_epochs_are_fresh_permutations_that_may_end_inside_a_batch(self):
        order = global_order([make_loader(self.TOKENS, batch_size=7)], 10)
        epochs = [order[i : i + 10] for i in range(0, 70, 10)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(10))
        assert len({tuple(epoch) for epoch in epochs}) == 7
        assert global_order([make_loader(self.TOKENS, batch_size=7)], 10) == order
        assert global_order([make_loader(self.TOKENS, batch_size=7, seed=1)], 10) != order

    def test_batch_larger_than_several_epochs(self):
        order = global_order([make_loader(self.TOKENS, batch_size=35)], 2)
        assert order == global_order([make_loader(self.TOKENS, batch_size=5)], 14)

    def test_order_is_the_same_for_every_version(self):
        # written down: a change here breaks the exact resume of every older checkpoint
        assert loader_module._permutation(10, 0, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
        assert loader_module._permutation(10, 42, 3).tolist() == [0, 8, 6, 5, 1, 3, 7, 4, 2, 9]

    @quick
    @given(
        num_sequences=st.integers(1, 23),
        world_size=st.integers(1, 5),
        batch_size=st.integers(1, 6),
        num_batches=st.integers(0, 8),
        new_world_size=st.integers(1, 5),
        new_batch_size=st.integers(1, 6),
    )
    def test_order_and_resume_do_not_depend_on_the_ranks(
        self, num_sequences, world_size, batch_size, num_batches, new_world_size, new_batch_size
    ):
        tokens = np.arange(num_sequences * 4 + 1, dtype=np.uint16)
        before = ranks(tokens, world_size, batch_size)
        order = global_order(before, num_batches)
        states = [loader.state_dict() for loader in before]
        assert all(state == states[0] for state in states)
        after = ranks(tokens, new_world_size, new_batch_size, states[0])
        order += global_order(after, 5)
        assert order == global_order([make_loader(tokens, batch_size=1)], len(order))

    def test_resume_is_bitwise_and_counts_only_what_was_handed_out(self):
        loader = make_loader(self.TOKENS, batch_size=3)
        state = loader.state_dict()
        for batch in islice(loader, 9):
            resumed = make_loader(self.TOKENS, batch_size=3)
            resumed.load_state_dict(state)
            torch.testing.assert_close(next(iter(resumed)), batch, rtol=0, atol=0)
            state = loader.state_dict()

    def test_state_passes_through_a_distributed_checkpoint(self, tmp_path):
        loader = make_loader(self.TOKENS)
        list(islice(loader, 7))
        dcp.save({"dataloader": loader}, checkpoint_id=tmp_path, no_dist=True)
        fresh = make_loader(self.TOKENS)
        dcp.load({"dataloader": fresh}, checkpoint_id=tmp_path, no_dist=True)
        assert fresh.state_dict() == loader.state_dict()
        torch.testing.assert_close(next(iter(fresh)), next(iter(loader)), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seq_len": 5}, r"^--training\.seq_len: .*has seq_len 4, this run's has 5"),
            ({"seed": 1}, r"^--training\.seed: .*has seed 0, this run's has 1"),
            (
                {"tokens": TOKENS[:-4]},
                r"^--training\.dataset: .*has num_sequences 10, this run's has 9",
            ),
            ({"tokens": TOKENS[1:]}, r"^--training\.dataset: .*has checksum"),
        ],
        ids=["seq_len", "seed", "fewer", "shifted"],
    )
    def test_resume_onto_something_else(self, change, message):
        state = make_loader(self.TOKENS).state_dict()
        other = make_loader(**{"tokens": self.TOKENS, **change})
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)

    def test_memory_map_is_not_copied(self, tmp_path):
        size = 8 << 20
        np.memmap(tmp_path / "tokens", np.uint16, "w+", shape=size)[:] = np.arange(
            size, dtype=np.uint16
        )
        mapped = np.memmap(tmp_path / "tokens", np.uint16, "r")
        tracemalloc.start()
        try:
            train, validation = split_tokens(mapped, 1024, 0.5)
            loader = make_loader(train, seq_len=1024)
            inputs, _ = next(iter(loader))
            next(
                validation_batches(
                    validation, seq_len=1024, batch_size=2, dp_rank=0, dp_world_size=1
                )
            )
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < size / 8
        np.testing.assert_array_equal(inputs["input"].diff() % (1 << 16), 1)

    @pytest.mark.parametrize(
        ("change", "flag"),
        [
            ({"seq_len": 44}, "seq_len"),
            ({"seq_len": 0}, "seq_len"),
            ({"batch_size": 0}, "batch_size"),
            ({"seed": -1}, "seed"),
        ],
    )
    def test_bad_argument(self, change, flag):
        with pytest.raises(ValueError, match=rf"^--training\.{flag} -?\d+: "):
            make_loader(self.TOKENS, **change)


class TestValidationBatches:
    @quick
    @given(
        num_sequences=st.integers(0, 30),
        rest=st.integers(0, 3),
        world_size=st.integers(1, 5),
        batch_size=st.integers(1, 6),
    )
    def test_every_sequence_once_and_as_many_batches_on_each_rank(
        self, num_sequences, rest, world_size, batch_size
    ):
        tokens = np.arange(num_sequences * 4 + 1 + rest, dtype=np.uint16)
        per_rank = [
            list(
                validation_batches(
                    tokens, seq_len=4, batch_size=batch_size, dp_rank=rank, dp_world_size=world_size
                )
            )
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in per_rank} == {
            -(-num_sequences // (batch_size * world_size))
        }
        seen = []
        for step in zip(*per_rank, strict=True):
            for inputs, labels in step:
                assert inputs["input"].shape == labels.shape == (batch_size, 4)
                assert inputs["input"].dtype == labels.dtype == torch.int64
                real = (labels != IGNORE_INDEX).all(dim=1)
                assert (labels[~real] == IGNORE_INDEX).all()
                assert (inputs["input"][~real] == 0).all()
                seen += visited(({"input": inputs["input"][real]}, labels[real]))
        assert seen == list(range(num_sequences))

    def test_nothing_held_out(self):
        _, validation = split_tokens(np.arange(100), 10, 0.0)
        assert not list(
            validation_batches(validation, seq_len=10, batch_size=1, dp_rank=0, dp_world_size=1)
        )


def test_ignore_index_is_the_one_torch_uses():
    loss = torch.nn.functional.cross_entropy(
        torch.zeros(1, 3), torch.tensor([IGNORE_INDEX]), reduction="sum"
    )
    assert loss.item() == 0
