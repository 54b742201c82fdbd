"""benchmarks/bench_choice.py: what it times covers the table that rests on it, and what it counts is what the kernels compute."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from bench_choice import Call, calls

from fla.ops.attn.softpick.kernel_choice import SHORTEST


def test_every_length_of_the_table_is_timed():
    timed = {(call.kind, call.D, call.length) for call in calls() if call.G == 1}
    for (kind, _), lengths in SHORTEST.items():
        for D, length in lengths.items():
            assert (kind, D, length) in timed


@pytest.mark.parametrize(("kind", "length"), [("dense", 16), ("window", 5), ("packed", 8)])
def test_pairs_are_those_that_are_visible(kind, length):
    call = Call(kind=kind, D=64, length=length, tokens=64)
    bounds = call.bounds()
    # mean length
    assert len(bounds) - 1 == (64 // length if kind == "packed" else 1)
    assert (bounds[0], bounds[-1]) == (0, call.row_length)
    position = torch.arange(call.row_length)
    sequence = torch.bucketize(position, torch.tensor(bounds), right=True)
    seen = (sequence[:, None] == sequence) & (position[:, None] >= position)
    if kind == "window":
        seen &= position[:, None] - position < length
    assert call.pairs() == seen.sum() * (64 // call.row_length)
