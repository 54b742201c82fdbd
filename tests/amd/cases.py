"""Attention through the public operators on an emulated card, compared with float64. `__main__.py` runs the cases."""

import itertools
from collections.abc import Callable
from functools import partial

import numerics
import test_decoding as decoding_tests
import torch

from amd.offline_launches import emulated
from amd.planted import PLANTED_FAULTS, run_planted, run_without_barriers
from fla.ops.attn.softpick import naive_normalized_attn, parallel_normalized_attn
from fla.ops.attn.softpick.decoding import normalized_attn_decode

CARDS = "gfx90a", "gfx942", "gfx950"
DTYPES = "bfloat16", "float16", "float32"
DIMENSIONS = 64, 128, 61
# the third level takes one of four names in turn
NORMALIZERS = ("softpick",), ("softmax",), ("abs_softpick", "relu_softpick", "rectified", "softmax_plus_one")  # fmt: skip

# name -> sizes, arguments of the operator; tiles have 128, 64, 32 or 16 rows
ATTENTION = {
    "causal": ({"T": 129}, {}),
    "window": ({"T": 130}, {"window_size": 40}),
    "packed": ({"T": 130}, {"cu_seqlens": torch.tensor([0, 31, 31, 130])}),
    "sink": ({"T": 64, "HQ": 2}, {"sink_bias": torch.tensor([0.5, -2.0])}),
    "grouped heads": ({"T": 65, "HQ": 4, "H": 2}, {}),
    "more keys than queries": ({"T": 33, "S": 130}, {}),
    "values of another size": ({"T": 127, "V": 48}, {}),
    "heads first": ({"T": 63, "B": 2, "HQ": 2, "H": 1, "head_first": True}, {"head_first": True}),
    "all at once": (
        {"T": 128, "HQ": 4, "H": 2},
        {"cu_seqlens": torch.tensor([0, 100, 128]), "window_size": 70, "sink_bias": torch.tensor([1.0, 0.0, -1.0, 3.0])},
    ),
}  # fmt: skip
DECODING = {
    "one token": ({"lengths": [70, 300]}, {}),
    "grouped heads": ({"lengths": [90, 33], "HQ": 8, "H": 2}, {}),
    "empty sequence": ({"lengths": [0, 5]}, {}),
    "several tokens": ({"lengths": [40, 3, 100], "T": 3}, {}),
    "tiles of rows": ({"lengths": [150, 31], "T": 11, "HQ": 8, "H": 1}, {}),
    "splits": ({"lengths": [1030], "HQ": 2, "H": 1}, {}),
    "window": ({"lengths": [100, 30], "T": 2}, {"window_size": 7}),
    "sink": ({"lengths": [65, 64], "HQ": 2}, {"sink_bias": torch.tensor([0.5, -2.0])}),
    "pages": ({"lengths": [90, 0, 33], "HQ": 4, "H": 2}, {"page_size": 20}),
}


def check_attention(card: str, dtype: str, D: int, normalizer: str, case: str) -> list[str]:
    """Forward and backward against float64; returns the kernels that ran."""
    sizes, arguments = ATTENTION[case]
    inputs = numerics.draw(K=D, dtype=getattr(torch, dtype), **sizes)
    with emulated(card) as kernels:
        numerics.check_attention(
            parallel_normalized_attn, inputs, normalizer=normalizer, **arguments
        )
    return kernels


def check_reduced_precision(card: str, D: int) -> list[str]:
    """Products of XF32: their fractions have the 10 bits of float16, so eager PyTorch in float16 is the measure."""
    inputs = numerics.draw(65, D, HQ=2)
    run = partial(numerics.outputs_and_gradients, normalizer="softpick")
    torch.set_float32_matmul_precision("high")
    with emulated(card) as kernels, numerics.poisoned_memory():
        got = run(parallel_normalized_attn, inputs)
    torch.set_float32_matmul_precision("highest")
    eager = run(naive_normalized_attn, inputs.to(torch.float16))
    gold = run(naive_normalized_attn, inputs.to(torch.float64))
    sizes = numerics.by_formula(inputs, normalizer="softpick").sizes
    for name, x in got.items():
        numerics.assert_no_worse_than_eager(
            name, x, eager[name].float(), gold[name], sizes[name], dtype=torch.float16
        )
    return kernels


def check_decoding(card: str, dtype: str, D: int, normalizer: str, case: str) -> list[str]:
    sizes, arguments = DECODING[case]
    arguments = {"normalizer": normalizer} | arguments
    inputs = q, k, v, lengths = decoding_tests.draw(K=D, dtype=getattr(torch, dtype), **sizes)
    page_size, table = arguments.pop("page_size", None), None
    if page_size is not None:
        (k, table), (v, _) = (decoding_tests.paged(x, lengths, page_size) for x in (k, v))
    with emulated(card) as kernels, numerics.poisoned_memory():
        got = normalized_attn_decode(q, k, v, lengths, block_table=table, **arguments)
    decoding_tests.check(inputs, got, **arguments)
    return kernels


def levels() -> list[tuple[int, int, int, int, int]]:
    """Rows of card, dtype, head dimension, normaliser and options, by number.

    An orthogonal array: any two values of two columns meet once in the first four. Each set of options comes once.
    """
    return [
        (a, b, (a + b) % 3, (a + 2 * b) % 3, 3 * a + b)
        for a, b in itertools.product(range(3), repeat=2)
    ]


def _pairwise() -> dict[str, dict[str, Callable[[], list[str]]]]:
    cases: dict[str, dict[str, Callable[[], list[str]]]] = {card: {} for card in CARDS}
    kinds = (check_attention, ATTENTION, ""), (check_decoding, DECODING, "decode ")
    for shift, (check, options, prefix) in enumerate(kinds):
        for card, dtype, dimension, normalizer, case in levels():
            choices = NORMALIZERS[normalizer]
            name = choices[(card + shift) % len(choices)]
            row = DTYPES[dtype], DIMENSIONS[dimension], name, list(options)[case]
            key = prefix + " ".join(map(str, row))
            cases[CARDS[card]][key] = partial(check, CARDS[card], *row)
    # the array has it on gfx950
    for card, name in ("gfx90a", "softpick"), ("gfx942", "softmax_plus_one"):
        row = "bfloat16", 64, name, "all at once"
        cases[card][" ".join(map(str, row))] = partial(check_attention, card, *row)
    return cases


# the cases of the default run, of which every kernel is part
BRIEF = {
    card: {
        "softpick attention": partial(
            check_attention, card, "bfloat16", 16, "softpick", "grouped heads"
        ),
        "decode": partial(check_decoding, card, "bfloat16", 16, "softpick", "grouped heads"),
    }
    for card in CARDS
}
PAIRWISE = _pairwise()
PAIRWISE["gfx942"] |= {
    "XF32 64 softpick causal": partial(check_reduced_precision, "gfx942", 64),
    "bfloat16 256 softpick causal": partial(
        check_attention, "gfx942", "bfloat16", 256, "softpick", "causal"
    ),
}
PLANTED = {
    card: {name: partial(run_planted, card, name) for name in PLANTED_FAULTS}
    | {"no barriers": partial(run_without_barriers, card)}
    for card in CARDS
}
