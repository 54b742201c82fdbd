"""Each script of examples/ as a user runs it, on a CPU."""

import re
from pathlib import Path

import pytest
from forked_runs import Forked, script

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *words):
    with Forked(script(EXAMPLES / name, words)) as example:
        assert example.wait(300) == 0, example.output()
        return example.out.read_text()


def test_every_example_is_run_here():
    source = Path(__file__).read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert f'run("{file.name}"' in source, file.name


def test_attention_module():
    text = run("attention_module.py")
    assert "naive on cpu: (2, 100, 64) -> (2, 100, 64)" in text
    assert float(text.split()[-1]) > 0


@pytest.mark.slow
def test_finetune_packed(tmp_path):
    text = run("finetune_packed.py", "--out", str(tmp_path / "out"))
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", text).groups())
    assert last < 0.8 * first
    # what was trained is a folder that the other script reads
    text = run("share_of_values.py", "--model", str(tmp_path / "out"), "--max_new_tokens", "5")
    assert "% of the values read" in text


@pytest.mark.slow
def test_share_of_values():
    share = re.search(r"([\d.]+)% of the values read", run("share_of_values.py")).group(1)
    assert 0 < float(share) < 100
