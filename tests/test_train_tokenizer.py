"""flame.data.train_tokenizer: byte-level BPE that is the same every time and loses no text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flame.base.errors import UsageError
from flame.data import train_tokenizer as command
from flame.data.text import load_documents
from flame.data.tokenizer import load_tokenizer
from flame.data.tokens import tokenize

ROOT = Path(__file__).parent.parent
DOCUMENTS = load_documents("python-docs")


@pytest.fixture(scope="module")
def tokenizer():
    return command.train_tokenizer(DOCUMENTS, 1024)


def run(monkeypatch, capsys, *argv):
    """The command in this process: exit code and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["train_tokenizer", *map(str, argv)])
    try:
        command.main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def test_every_string_survives(tokenizer):
    for text in (
        "",
        " two  spaces\n\n\ttab\r\n",
        "naïve Ω 你好 🧑‍🚀 \x00\x7f",
        "".join(map(chr, range(0x20, 0x250))),
        "text that spells <|eos|> and <|bos|>",
    ):
        bos, *ids = tokenizer(text, add_special_tokens=True)["input_ids"]
        assert bos == 0
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids)
    merged = tokenize(DOCUMENTS[:5], tokenizer)
    assert len(merged) < 0.5 * sum(map(len, DOCUMENTS[:5]))


def test_loads_as_trainings_tokenizer(tokenizer, tmp_path):
    command.save(tokenizer, tmp_path / "deep" / "tok")
    loaded = load_tokenizer(str(tmp_path / "deep" / "tok"))
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert (len(loaded), max(loaded.get_vocab().values())) == (1024, 1023)
    text = "for <|eos|> in x:"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    # nothing is left next to it, and others may read it as far as the umask lets them
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tok"]
    assert (tmp_path / "deep" / "tok").stat().st_mode & 0o700 == 0o700
    with pytest.raises(UsageError, match=r"--out .*tok exists"):
        command.save(tokenizer, tmp_path / "deep" / "tok")


@pytest.mark.slow
def test_same_bytes_in_another_process_on_one_thread(tokenizer, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    done = subprocess.run(
        [sys.executable, "-m", "flame.data.train_tokenizer", "--training.dataset", str(text)]
        + ["--vocab_size", "1024", "--out", str(tmp_path / "cli")],
        cwd=ROOT,
        env=os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1,024 tokens; use it with --model.tokenizer_path" in done.stdout
    command.save(tokenizer, tmp_path / "here")
    for file in sorted((tmp_path / "here").iterdir()):
        assert file.read_bytes() == (tmp_path / "cli" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--vocab_size", "258"],
            "--vocab_size 258: expected at least 259: 256 bytes, bos, eos and pad",
        ),
        (["--vocab_size", "5000"], r"--vocab_size 5000: the text gives \d+ tokens only"),
        (["--vocab_size", "300", "--training.dataset", "a,b"], "must be one source, got 'a,b'"),
        (["--vocab_size", "300", "--training.dataset", "./no"], "'./no': no such file or folder"),
        (["--vocab_size", "many"], "argument --vocab_size: invalid int value: 'many'"),
        (
            ["--vocab_size", "5000", "--out", "/proc/none/out"],
            "--out /proc/none/out: the folder /proc/none cannot be written",
        ),
        ([], "the following arguments are required: --vocab_size"),
    ],
)
def test_errors(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("hardly any text")
    argv = ["--out", tmp_path / "out", "--training.dataset", tmp_path / "text.txt", *flags]
    code, error = run(monkeypatch, capsys, *argv)
    assert code == 2
    assert error.startswith("flame: error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_existing_out_is_refused_before_training(tmp_path, monkeypatch, capsys):
    argv = ["--out", tmp_path, "--training.dataset", "./no", "--vocab_size", "300"]
    code, error = run(monkeypatch, capsys, *argv)
    assert (code, error) == (
        2,
        f"flame: error: --out {tmp_path} exists; name a folder that does not, or delete it\n",
    )
