"""Compiles the Hopper kernels for sm_90 without a GPU, with the installed Triton.

    python tests/offline_hopper.py forward       # one JSON object per configuration and case
    python tests/offline_hopper.py backward
    python tests/offline_hopper.py launch        # the host's time for descriptors, launches and passes, the driver's left out

A process of its own, since one that interprets kernels cannot compile them.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_resources import resources
from offline_compilation import (
    CARDS,
    EVERYTHING,
    compiled_launches,
    launch_times,
    launches_without_driver,
    least_time,
)
from triton.backends.nvidia.compiler import get_ptxas

from fla.ops.attn.softpick import kernel_choice
from fla.ops.attn.softpick.hopper import backward, forward
from fla.ops.attn.softpick.hopper.launch import FORWARD_SHAPES, block_descriptor
from fla.ops.attn.softpick.normalizers import KERNEL_NORMALIZERS

BF16, FP16 = torch.bfloat16, torch.float16
# name -> dtype, safe, normalizer, further arguments
FORWARD_CASES: dict[str, tuple[torch.dtype, bool, str, dict[str, Any]]] = {
    "safe": (BF16, True, "softpick", {}),
    "unsafe": (BF16, False, "softpick", {}),
    "float16": (FP16, True, "softpick", {}),
    "everything": (BF16, True, "softpick", EVERYTHING),
}
# the other normalisers at one configuration
NORMALIZER_CASES: dict[str, tuple[torch.dtype, bool, str, dict[str, Any]]] = {
    name: (BF16, True, name, {}) for name in KERNEL_NORMALIZERS if name != "softpick"
}
# what ptxas says of a loop whose products it runs one at a time, and of a spill
_COMPLAINT = re.compile(r"C75\d\d|serializ|warning", re.I)


def ptxas_log(ptx: str) -> str:
    """What ptxas says of this kernel."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def foreign_barriers(ptx: str) -> list[int]:
    """Numbers of the hardware barriers that Triton itself uses; the kernels' own are from 9 on, with 256 threads."""
    found = re.findall(
        r"\bbar(?:rier)?(?:\.cta)?\.(?:sync|arrive)(?:\.aligned)?\s+(\d+)(?:,\s*(\d+))?", ptx
    )
    return sorted({int(number) for number, threads in found if threads != "256"})


def forward_call(D: int, case: tuple) -> None:
    dtype, safe, normalizer, arguments = case
    q = torch.empty(1, 256, 4, D, dtype=dtype)
    options = {"sink_bias": None, "cu_seqlens": None, "window_size": None} | arguments
    forward.hopper_normalized_attn_fwd(
        q,
        q,
        q,
        scale=1.0,
        head_first=False,
        safe=safe,
        normalizer=normalizer,
        **options,
    )


def early_arrivals(ptx: str) -> list[str]:
    """Arrivals at mbarriers, of one thread for all, with another memory operation since the threads met."""
    meets = re.compile(r"\bbar(?:rier)?\.(?:sync|warp\.sync|cta\.sync)")
    memory = re.compile(
        r"\b(?:wgmma|st\.shared|ld\.shared|stmatrix|ldmatrix|cp\.async|mbarrier|fence)\b"
    )
    early, have_met = [], False
    for line in ptx.splitlines():
        if meets.search(line):
            have_met = True
        elif "mbarrier.arrive" in line and ".expect_tx" not in line and not have_met:
            early.append(line.strip())
        elif memory.search(line):
            have_met = False
    return early


def report(launch) -> dict[str, Any]:
    """What a compiled kernel takes, and what ptxas says of it."""
    ptx = launch.kernel.asm["ptx"]
    log = ptxas_log(ptx)
    used = resources(launch.kernel)
    return {
        "launch_registers": used.registers,
        "spills": used.spills,
        "shared": used.shared,
        "ptxas": [x for x in log.splitlines() if _COMPLAINT.search(x)],
        "is_examined": "registers" in log,
        "barriers": foreign_barriers(ptx),
        "early_arrivals": early_arrivals(ptx),
    }


def forward_rows():
    for D, shape in FORWARD_SHAPES.items():
        for name, case in (FORWARD_CASES | (NORMALIZER_CASES if D == 128 else {})).items():
            (launch,) = compiled_launches(CARDS["sm_90"], partial(forward_call, D, case))
            row = {"triton": triton.__version__, "D": D, "shape": shape._asdict(), "case": name}
            yield row | report(launch)


# name -> dtype, normalizer, further arguments
BACKWARD_CASES: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    "dense": (BF16, "softpick", {}),
    "float16": (FP16, "softpick", {}),
    "window": (BF16, "softpick", {"window_size": 100}),
    "packed": (BF16, "softpick", {"cu_seqlens": EVERYTHING["cu_seqlens"]}),
    "everything": (
        FP16,
        "softpick",
        {"cu_seqlens": EVERYTHING["cu_seqlens"], "window_size": 100, "scale": -1.0},
    ),
    **{name: (BF16, name, {}) for name in KERNEL_NORMALIZERS if name != "softpick"},
}


def backward_call(D: int, case: tuple) -> None:
    dtype, normalizer, arguments = case
    q = torch.empty(1, 256, 4, D, dtype=dtype)
    lse = torch.empty(1, 4, 256)
    options = {"cu_seqlens": None, "window_size": None, "scale": 1.0} | arguments
    backward.hopper_normalized_attn_bwd(
        q,
        q,
        q,
        None,
        o=q,
        lse=lse,
        do=q,
        dlse=lse,
        head_first=False,
        normalizer=normalizer,
        **options,
    )


def backward_rows():
    for D in 64, 128:
        for name, case in BACKWARD_CASES.items():
            for launch in compiled_launches(CARDS["sm_90"], partial(backward_call, D, case)):
                row = {"triton": triton.__version__, "D": D, "kernel": launch.name, "case": name}
                yield row | report(launch)


def launch_rows():
    def row(step, time):
        return {"triton": triton.__version__, "step": step, "us": round(time, 1)}

    q = torch.empty(1, 256, 4, 128, dtype=BF16)
    yield row("a descriptor", least_time(partial(block_descriptor, q, False, 64, 128)))

    def call():
        forward_call(128, FORWARD_CASES["safe"])
        backward_call(128, BACKWARD_CASES["dense"])

    def both_passes(serving):
        inputs = q, q, q, None, None
        choose = kernel_choice.normalized_attn_fwd
        attend = partial(choose, *inputs, 1.0, None, False, True, "softpick")
        choose = kernel_choice.normalized_attn_bwd
        differentiate = partial(choose, *inputs, *attend(), q, None, 1.0, None, False, "softpick")
        yield row(f"forward, {serving}", least_time(attend))
        yield row(f"backward, {serving}", least_time(differentiate))

    for name, time in launch_times(CARDS["sm_90"], call).items():
        yield row(name, time)
    with launches_without_driver(CARDS["sm_90"]):
        for serving, whose in {"none": "Triton's kernels", "all": "Gluon's kernels"}.items():
            with kernel_choice.hopper_serving(serving):
                yield from both_passes(f"choosing and launching {whose}")


def processors_of_an_h100(device: int | None) -> int:
    return 132


if __name__ == "__main__":
    rows = {"forward": forward_rows, "backward": backward_rows, "launch": launch_rows}
    if len(sys.argv) != 2 or sys.argv[1] not in rows:
        sys.exit(f"usage: {Path(sys.argv[0]).name} {'|'.join(rows)}")
    # no mock, which would take longer than a launch
    forward.num_processors = backward.num_processors = processors_of_an_h100
    for row in rows[sys.argv[1]]():
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
