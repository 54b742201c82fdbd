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
# packing, a window and a sink at once, at head dimension 64: 0 with Triton 3.6, 2 with 3.8, 28 with 3.9, whose ptxas
# is another major version
MAX_SPILLS = {"everything": 28}


@pytest.mark.compile
def test_forward_fits(capsys):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "forward"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    with capsys.disabled():
        for row in rows:
            shape = " ".join(f"{name} {x}" for name, x in row["shape"].items())
            sys.stdout.write(
                f"Triton {row['triton']} D {row['D']:3} {row['case']:16} {shape} registers at launch "
                f"{row['launch_registers']} spills {row['spills']} shared {row['shared']}\n"
            )
    assert len(rows) == 4 * 4 + 5
    for row in rows:
        assert row["is_examined"], row
        assert row["ptxas"] == [], row
        assert row["shared"] <= CARDS["sm_90"].shared, row
        assert row["spills"] <= MAX_SPILLS.get(row["case"], 0), row
        assert max(row["barriers"]) < 9, row
