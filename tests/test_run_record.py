"""The record of a start: in a changed checkout, outside any, and without git."""

import json
import subprocess
import tomllib

import pytest

from flame.config.parse import parse_args
from flame.run import record as run_record
from flame.run.record import command, write_record


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a module ``flame/run/record.py``, which is where the record looks for its code."""
    root = tmp_path / "checkout"
    (root / "flame" / "run").mkdir(parents=True)
    (root / "flame" / "run" / "record.py").write_text("one\n")
    (root / "data.txt").write_text("data\n")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    monkeypatch.setattr(run_record, "__file__", str(root / "flame" / "run" / "record.py"))
    return root


def record(tmp_path, *argv):
    (tmp_path / "run").mkdir(exist_ok=True)
    config = parse_args(["--job.dump_folder", str(tmp_path / "run"), *argv])
    return json.loads(write_record(config, list(argv)).read_text())


def test_clean_checkout(checkout, tmp_path):
    seen = record(tmp_path)["git"]
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert seen["commit"] == head.stdout.strip()
    assert seen["changed"] == []
    assert seen["patch"] is None
    assert not list((tmp_path / "run" / "record").glob("*.patch"))


def test_patch_makes_the_code_of_the_commit(checkout, tmp_path):
    (checkout / "flame" / "run" / "record.py").write_text("two\n")
    (checkout / "flame" / "new.py").write_bytes(b"a new file, \xff\x00\n")
    # nobody's code
    (checkout / "big.bin").write_bytes(b"\0" * 1000)
    seen = record(tmp_path)["git"]
    assert seen["patch"] == "001.patch"
    assert "?? big.bin" in seen["changed"]
    fresh = tmp_path / "fresh"
    git(tmp_path, "clone", "-q", str(checkout), str(fresh))
    git(fresh, "apply", str(tmp_path / "run" / "record" / "001.patch"))
    assert (fresh / "flame" / "run" / "record.py").read_text() == "two\n"
    assert (fresh / "flame" / "new.py").read_bytes() == b"a new file, \xff\x00\n"
    assert not (fresh / "big.bin").exists()


def test_every_start_has_its_own(checkout, tmp_path):
    for steps in (1, 2, 3):
        record(tmp_path, "--training.steps", str(steps))
    folder = tmp_path / "run" / "record"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"00{n}.{kind}" for n in (1, 2, 3) for kind in ("json", "toml")
    ]
    assert tomllib.loads((folder / "002.toml").read_text())["training"]["steps"] == 2


def test_code_within_another_checkout_has_no_commit(checkout, tmp_path, monkeypatch):
    # a package installed below a folder that somebody keeps in git
    inner = checkout / "venv" / "flame"
    inner.mkdir(parents=True)
    monkeypatch.setattr(run_record, "__file__", str(inner / "run" / "record.py"))
    seen = record(tmp_path)["git"]
    assert seen["commit"] is None
    assert "not a checkout of its own" in seen["reason"]


def test_without_git_and_outside_a_checkout(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "__file__", str(tmp_path / "plain" / "flame" / "run" / "x.py"))
    (tmp_path / "plain" / "flame").mkdir(parents=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert "not a git repository" in record(tmp_path)["git"]["reason"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record(tmp_path)["git"] == {
        "commit": None,
        "reason": "git is not installed",
        "patch": None,
    }


def test_environment_without_secrets(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("EDITOR", "vi")
    seen = record(tmp_path)
    assert seen["environment"]["NCCL_DEBUG"] == "INFO"
    assert seen["environment"]["HIP_VISIBLE_DEVICES"] == "0,1"
    assert "EDITOR" not in seen["environment"]
    assert "secret" not in json.dumps(seen)


def test_command_can_be_typed(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command(["--sample.prompt", "a b"]) == "NGPU=4 bash train.sh --sample.prompt 'a b'"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert command(["--training.steps", "3"]).endswith(" -m flame.train --training.steps 3")
