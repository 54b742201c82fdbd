"""The Hopper kernels at every launch configuration, compiled for sm_90 without a GPU: `pytest -m compile -s` prints
what each takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from offline_compilation import CARDS

SCRIPT = Path(__file__).with_name("offline_hopper.py")
# By version of Triton, head dimension and case, or for all other cases (README.md and BACKWARD.md). The newest has another
# major version of ptxas.
MAX_FORWARD_SPILLS = {
    "3.6": {64: {"others": 0}, 128: {"others": 0}},
    "3.9": {64: {"everything": 14, "others": 8}, 128: {"others": 10}},
}
MAX_BACKWARD_SPILLS = {
    "3.6": {
        64: {"packed": 20, "everything": 18, "others": 4},
        128: {"packed": 22, "everything": 24, "others": 18},
    },
    "3.8": {
        64: {"packed": 6, "everything": 14, "float16": 4, "others": 0},
        128: {"packed": 4, "everything": 30, "float16": 12, "rectified": 8, "others": 0},
    },
    "3.9": {
        64: {"packed": 14, "everything": 14, "others": 6},
        128: {"packed": 28, "everything": 32, "others": 20},
    },
}


def _limit(limits, row):
    """Of a row's spills: that of the last version of Triton that is not above the row's."""

    def numbers(x):
        return [int(n) for n in x.split(".")[:2]]

    version = max((x for x in limits if numbers(x) <= numbers(row["triton"])), key=numbers)
    of_cases = limits[version][row["D"]]
    return of_cases.get(row["case"], of_cases["others"])


def compiled(what):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, what]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.compile
def test_forward_fits(capsys):
    rows = compiled("forward")
    with capsys.disabled():
        for row in rows:
            shape = " ".join(f"{name} {x}" for name, x in row["shape"].items())
            sys.stdout.write(
                f"Triton {row['triton']} D {row['D']:3} {row['case']:16} {shape} registers at launch "
                f"{row['launch_registers']} spills {row['spills']} shared {row['shared']}\n"
            )
    assert len(rows) == 2 * 4 + 5
    for row in rows:
        assert row["is_examined"], row
        assert row["ptxas"] == [], row
        assert row["shared"] <= CARDS["sm_90"].shared, row
        assert row["spills"] <= _limit(MAX_FORWARD_SPILLS, row), row
        assert max(row["barriers"]) < 9, row
        assert row["early_arrivals"] == [], row


@pytest.mark.compile
def test_backward_fits(capsys):
    rows = compiled("backward")
    with capsys.disabled():
        for row in rows:
            sys.stdout.write(
                f"Triton {row['triton']} D {row['D']:3} {row['case']:16} {row['kernel']:33} registers at launch "
                f"{row['launch_registers']:3} spills {row['spills']} shared {row['shared']}\n"
            )
    # softpick's five cases and two of its relatives have the delta kernel too
    assert len(rows) == 2 * (10 * 3 + 7)
    for row in rows:
        assert row["is_examined"], row
        assert row["ptxas"] == [], row
        assert row["shared"] <= CARDS["sm_90"].shared, row
        assert row["spills"] <= _limit(MAX_BACKWARD_SPILLS, row), row
        if row["kernel"] == "normalized_attn_bwd_kernel_hopper":
            assert max(row["barriers"]) < 9, row
            assert row["early_arrivals"] == [], row
