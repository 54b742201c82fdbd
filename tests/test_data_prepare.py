"""flame.data.prepare: token files that are complete or absent, and training's view of them."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from word_tokenizer import word_tokenizer

from flame.base.errors import UsageError
from flame.config.parse import parse_args
from flame.config.sections import DataSource
from flame.data import prepare
from flame.data.prepared import read_prepared, verify
from flame.data.run_data import open_data
from flame.data.tokenizer import load_tokenizer, tokenizer_sha256
from flame.data.tokens import Encoder, tokenize

ROOT = Path(__file__).parent.parent
BYTE = load_tokenizer("byte")


def source(path):
    return DataSource(str(path), None, "train", None, None, 1)


def write(path, out, num_proc=1, tokenizer=BYTE):
    prepare.prepare(source(path), tokenizer, "byte", out, num_proc=num_proc)
    return out


@pytest.fixture
def text(tmp_path):
    """Two files of 200 documents; the folder that holds them is not the one they are prepared in."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "ab":
        lines = (json.dumps({"text": f"{name}{i} " * (i % 9)}) + "\n" for i in range(200))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def documents(text):
    return [
        json.loads(line)["text"]
        for file in sorted(text.iterdir())
        for line in file.read_text().splitlines()
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_is_the_token_stream_whatever_num_proc(text, tmp_path, monkeypatch):
    one = write(text, tmp_path / "one")
    monkeypatch.setattr(prepare, "_CHUNK", 100)
    three = write(text, tmp_path / "deep" / "three", num_proc=3)
    assert files(one) == files(three)
    tokens = np.fromfile(one / "tokens.bin", "<u2")
    np.testing.assert_array_equal(tokens, tokenize(documents(text), BYTE, "tokenizer"))
    ends = np.fromfile(one / "ends.bin", "<i8")
    assert ends.tolist() == (np.flatnonzero(tokens == BYTE.eos_token_id) + 1).tolist()
    index = verify(one)
    assert (index["num_tokens"], index["num_documents"]) == (len(tokens), 400)
    # nothing else is left next to the results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "one", "text"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["three"]


def test_wide_vocabulary(text, tmp_path):
    tokenizer = word_tokenizer(70_000, eos_token="</s>")
    (text / "a.jsonl").write_text('{"text": "w69999 w5"}')
    (text / "b.jsonl").unlink()
    out = write(text, tmp_path / "out", tokenizer=tokenizer)
    assert np.fromfile(out / "tokens.bin", "<u4").tolist() == [69_999, 5, 70_000]
    assert read_prepared("out", out, tokenizer).tokens.dtype == np.uint32


def test_trains_like_the_text(text, tmp_path):
    out = write(text, tmp_path / "out")
    size = ["--training.seq_len", "16", "--training.varlen", "--validation.share", "0.2"]
    a, b = (
        open_data(parse_args(["--training.dataset", str(path), *size]), BYTE)
        for path in (text, out)
    )
    for kind in ("loader", "validation"):
        batches = (getattr(data, kind)(dp_rank=0, dp_world_size=1) for data in (a, b))
        for one, other in islice(zip(*batches, strict=True), 20):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert b.fingerprint == {
        "the sha256 of the tokenizer (--model.tokenizer_path)": tokenizer_sha256(BYTE),
        "the number of tokens (--training.dataset)": verify(out)["num_tokens"],
        "the checksum of the tokens (--training.dataset)": f"sha256 {verify(out)['tokens_sha256']}",
    }


def test_only_what_is_asked_for_is_read(tmp_path):
    # 4 MiB of tokens, 1 MiB of ends
    documents = [f"{i % 10}" * 14 for i in range(1 << 17)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{x}"}}\n' for x in documents))
    out = write(tmp_path / "a.jsonl", tmp_path / "out")
    argv = ["--training.dataset", str(out), "--training.seq_len", "4096", "--training.varlen"]
    config = parse_args([*argv, "--training.batch_size", "2"])
    tracemalloc.start()
    try:
        data = open_data(config, BYTE)
        inputs, _ = next(iter(data.loader(dp_rank=0, dp_world_size=1)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20, peak
    assert len(inputs["cu_seqlens"]) >= 512


def test_existing_folder_is_refused_and_kept(text, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="--out .*out exists"):
        write(text, tmp_path / "out")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="--out .*link exists"):
        write(text, tmp_path / "link")
    with pytest.raises(UsageError, match="must be writable"):
        write(text, Path("/proc/out"))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_leaves_nothing_and_names_the_file(text, tmp_path, num_proc, monkeypatch):
    monkeypatch.setattr(prepare, "_CHUNK", 100)
    with (text / "b.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl': line 201 has int"):
        write(text, tmp_path / "out", num_proc=num_proc)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    (text / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"b\.jsonl': holds no text"):
        write(text, tmp_path / "out", num_proc=num_proc)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def command(*argv):
    return [sys.executable, "-m", "flame.data.prepare", *map(str, argv)]


@pytest.mark.slow
def test_stopped_command_line_leaves_nothing(tmp_path):
    # takes long enough to be stopped in the middle
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "x" * 1000}) + "\n") * 100_000)
    argv = ["--training.dataset", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--num_proc", 2]
    with subprocess.Popen(
        command(*argv),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 1 << 20 for path in tmp_path.glob(".out*/tokens.bin")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # as Ctrl-C does: the workers too
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped; nothing was written" in output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_command_line(text, tmp_path, monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, argv)])
        prepare.main()

    def refused(*argv):
        with pytest.raises(SystemExit) as exit_:
            run(*argv)
        assert exit_.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(prepare, "init_logger", lambda: None)
    out = tmp_path / "out"
    data = ["--training.dataset", text, "--training.data_files", "a.*"]
    run("--out", out, *data)
    assert verify(out)["num_documents"] == 200
    assert verify(out)["source"]["training.data_files"] == "a.*"
    run("--verify", out)
    assert "exists" in refused("--out", out, *data)
    assert "--out and --training.dataset are needed" in refused("--out", tmp_path / "x")
    assert "must be one source" in refused("--out", tmp_path / "x", "--training.dataset", "a,b")
    assert "--num_proc must be at least 1" in refused("--out", out, *data, "--num_proc", 0)
    assert "no other flag" in refused("--verify", out, "--num_proc", 2)
    assert "holds tokens, not text" in refused("--out", tmp_path / "x", "--training.dataset", out)
    raw = bytearray((out / "tokens.bin").read_bytes())
    raw[101] ^= 1
    (out / "tokens.bin").write_bytes(raw)
    assert "tokens.bin': does not match its checksum" in refused("--verify", out)


class TestDamage:
    @pytest.fixture
    def out(self, text, tmp_path):
        return write(text, tmp_path / "out")

    def test_another_tokenizer(self, out):
        other = word_tokenizer(4, eos_token="</s>")
        message = r"written with --model.tokenizer_path 'byte', whose vocabulary_sha256 is"
        with pytest.raises(ValueError, match=message):
            read_prepared("out", out, other)

    @pytest.mark.parametrize("name", ["tokens.bin", "ends.bin"])
    def test_truncated_or_gone(self, out, name):
        file = out / name
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(ValueError, match=rf"{name}': has \d+ bytes, its index says \d+"):
            read_prepared("out", out, BYTE)
        file.unlink()
        with pytest.raises(ValueError, match=rf"{name}': No such file"):
            read_prepared("out", out, BYTE)

    def test_other_tokens_of_the_same_size(self, out):
        file = out / "tokens.bin"
        file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises(ValueError, match=r"tokens\.bin': does not match its checksum"):
            read_prepared("out", out, BYTE)

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", '{"format": 1}', b"\xff"],
        ids=["empty", "cut", "list", "few", "raw"],
    )
    def test_index(self, out, content):
        (out / "flame-tokens.json").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        with pytest.raises(ValueError, match=r"flame-tokens\.json': "):
            read_prepared("out", out, BYTE)

    def test_newer_format(self, out):
        index = verify(out) | {"format": 2}
        (out / "flame-tokens.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="has format 2 and dtype '<u2', not 1"):
            read_prepared("out", out, BYTE)

    @pytest.mark.parametrize("flag", ["dataset_name", "dataset_split", "data_dir", "data_files"])
    def test_option_that_does_not_apply(self, out, flag):
        with pytest.raises(ValueError, match=rf"^--training\.{flag} 'x': does not apply"):
            open_data(parse_args(["--training.dataset", str(out), f"--training.{flag}", "x"]), BYTE)

    def test_streaming(self, out):
        argv = ["--training.dataset", str(out), "--training.streaming", "--validation.share", "0"]
        with pytest.raises(ValueError, match="holds tokens, not text"):
            open_data(parse_args(argv), BYTE)


def test_encoder_lengths_are_the_documents():
    tokens, lengths = Encoder(BYTE, "none")(["ab", "", "c"])
    assert tokens.tolist() == [97, 98, 257, 257, 99, 257]
    assert lengths.tolist() == [3, 1, 2]
