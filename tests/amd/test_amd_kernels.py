"""The kernels as compiled for AMD cards, executed in the emulator: `cases.py` says what, and holds it to float64.

The default run takes each kernel once for each card. `pytest -m slow` takes the rest, in which any two values of two
of card, dtype, head dimension and normaliser meet, and each set of options comes once.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amd.cases import BRIEF, CARDS, PAIRWISE, levels

DECODING_KERNELS = ["normalized_attn_decode_kernel", "normalized_attn_merge_kernel"]


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[str, str], dict]]:
    """Runs a case in the process that compiles and emulates."""
    tests = Path(__file__).parents[1]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tests)
    # kernels this small compile in less CPU time on one thread
    environment["MLIR_DISABLE_MULTITHREADING"] = "1"
    with subprocess.Popen(
        [sys.executable, "-m", "amd"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def answer(card: str, name: str) -> dict:
            process.stdin.write(json.dumps([card, name]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, "the process that emulates has ended"
            return json.loads(line)

        yield answer
        # an orderly end takes Python seconds
        process.kill()


def attention_kernels(name: str) -> list[str]:
    """Kernels that a case launches, in this order."""
    kernels = ["fwd_kernel", "bwd_kernel_dq", "bwd_kernel_dkv"]
    if "softpick" in name:
        kernels.insert(1, "bwd_kernel_delta")
    return [f"parallel_normalized_attn_{kernel}" for kernel in kernels]


def check(answer: dict, name: str) -> None:
    assert answer["error"] is None, answer["error"]
    expected = DECODING_KERNELS if name.startswith("decode") else attention_kernels(name)
    assert answer["kernels"] == expected


@pytest.mark.parametrize(("card", "name"), [(card, name) for card in CARDS for name in BRIEF[card]])
def test_each_kernel(card, name, ask):
    check(ask(card, name), name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "name"), [(card, name) for card in CARDS for name in PAIRWISE[card]]
)
def test_pairs(card, name, ask):
    check(ask(card, name), name)


def test_any_two_values_meet():
    *columns, options = zip(*levels(), strict=True)
    assert sorted(options) == list(range(9))
    for x, y in itertools.combinations(columns, 2):
        assert len(set(zip(x, y, strict=True))) == len(set(x)) * len(set(y))


def test_a_wrong_mask_is_found(ask):
    assert (
        "o, max abs: Tensor-likes are not close"
        in ask("gfx942", "a query sees the next key")["error"]
    )


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("a row past the end is read", "_load_"),
        pytest.param("a row past the end is written", "_store_", marks=pytest.mark.slow),
    ],
)
def test_an_access_past_the_end_is_found(name, instruction, ask):
    error = ask("gfx942", name)["error"].splitlines()[-1]
    assert error.startswith("amd.run.ExecutionError: ")
    assert instruction in error.split("(")[0]
    assert "are in no tensor" in error


@pytest.mark.parametrize("card", CARDS)
def test_a_missing_barrier_is_found(card, ask):
    error = ask(card, "no barriers")["error"].splitlines()[-1]
    assert error.startswith("amd.run.ExecutionError: ds_")
    assert "a race:" in error
