"""Copies of the forward kernel with a fault each, in its source or its machine code: the emulator must find it."""

import importlib
import sys
import tempfile
from pathlib import Path

import numerics
import numpy as np
import torch

import fla.ops.attn.softpick as original
from amd.offline_launches import emulated
from fla.ops.attn.softpick import naive_normalized_attn, parallel_fwd

# name -> file, text, replacement
PLANTED_FAULTS = {
    "a query sees the next key": ("tiles.py", "m_s = o_k <= o_q\n", "m_s = o_k <= o_q + 1\n"),
    "a row past the end is read": (
        "tiles.py",
        "return tl.load(p_x, mask=(i_t + o_t < T)[:, None], other=0.0)",
        "return tl.load(p_x, mask=(i_t + o_t <= T)[:, None], other=0.0)",
    ),
    "a row past the end is written": ("parallel_fwd.py", "m_t = o_t < T\n", "m_t = o_t <= T\n"),
}


_OPTIONS = {
    "sink_bias": None, "cu_seqlens": None, "scale": 16**-0.5, "window_size": None, "head_first": False, "safe": True,
    "normalizer": "softpick",
}  # fmt: skip


def _inputs() -> numerics.Inputs:
    # those of the default run, for which the kernel without a fault is compiled
    return numerics.draw(65, 16, HQ=4, H=2, dtype=torch.bfloat16)


def run_without_barriers(card: str) -> list[str]:
    """Runs the forward kernel with each s_barrier replaced by s_nop."""

    def change(code: bytes) -> bytes:
        words = np.frombuffer(code[: len(code) // 4 * 4], np.uint32)
        assert (words == 0xBF8A0000).any(), "there is no barrier"
        return np.where(words == 0xBF8A0000, np.uint32(0xBF800000), words).tobytes()

    with emulated(card, change) as kernels:
        parallel_fwd.parallel_normalized_attn_fwd(*_inputs()[:3], **_OPTIONS)
    return kernels


def _copy(folder: str, name: str) -> str:
    """Writes the package with the fault into the folder; returns the name of the copy."""
    package = f"planted_{list(PLANTED_FAULTS).index(name)}"
    file, text, replacement = PLANTED_FAULTS[name]
    into = Path(folder, package)
    into.mkdir()
    for source in Path(original.__file__).parent.glob("*.py"):
        code = source.read_text().replace("fla.ops.attn.softpick", package)
        if source.name == file:
            assert code.count(text) == 1, f"{file} has {code.count(text)} times {text}"
            code = code.replace(text, replacement)
        # without the operators, whose names are registered once a process
        (into / source.name).write_text("" if source.name == "__init__.py" else code)
    return package


def run_planted(card: str, name: str) -> list[str]:
    """Runs the copy and compares it as any kernel: one of the two fails."""
    inputs = _inputs()
    with tempfile.TemporaryDirectory() as folder:
        package = _copy(folder, name)
        sys.path.insert(0, folder)
        try:
            launcher = importlib.import_module(f"{package}.parallel_fwd")
            with emulated(card) as kernels, numerics.poisoned_memory():
                o, _ = launcher.parallel_normalized_attn_fwd(*inputs[:3], **_OPTIONS)
        finally:
            sys.path.remove(folder)
    eager = naive_normalized_attn(*inputs[:3], normalizer="softpick")
    gold = naive_normalized_attn(*(x.double() for x in inputs[:3]), normalizer="softpick")
    numerics.assert_no_worse_than_eager("o", o, eager, gold)
    return kernels
