"""Which kernels the operators launch: those of Triton, or those for Hopper where these are enabled and take the input."""

import pytest
import torch
from numerics import draw, outputs_and_gradients

from fla.ops.attn.softpick import kernel_choice, kernel_table, parallel_softpick_attn
from fla.ops.attn.softpick.hopper import backward, forward

ALL = kernel_choice.WRITTEN_FOR_HOPPER


@pytest.fixture
def launched(monkeypatch):
    """Names of the launches of Hopper kernels, in whose place Triton's compute."""
    names = []

    def record(name, triton):
        def launch(*args):
            names.append(name)
            return triton(*args)

        return launch

    fwd, bwd = (
        kernel_choice.parallel_normalized_attn_fwd,
        kernel_choice.parallel_normalized_attn_bwd,
    )
    monkeypatch.setattr(forward, "hopper_normalized_attn_fwd", record("fwd", fwd))
    monkeypatch.setattr(backward, "hopper_normalized_attn_bwd", record("bwd", bwd))
    monkeypatch.setattr(kernel_choice, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(kernel_choice, "MIN_HOPPER_WORK", 0)
    return names


@pytest.mark.parametrize(
    ("enabled", "expected"),
    [(frozenset(), []), (ALL, ["fwd", "bwd"]), (frozenset({"fwd"}), ["fwd"]), (ALL - {"fwd"}, ["bwd"])],
)  # fmt: skip
def test_enabled_kernels_are_launched(enabled, expected, launched, monkeypatch, device):
    monkeypatch.setattr(kernel_choice, "ENABLED_ON_HOPPER", enabled)
    inputs = draw(20, 64, HQ=2, H=1, dtype=torch.float16, device=device)
    got = outputs_and_gradients(parallel_softpick_attn, inputs)
    assert launched == expected
    monkeypatch.setattr(kernel_choice, "ENABLED_ON_HOPPER", frozenset())
    for name, x in outputs_and_gradients(parallel_softpick_attn, inputs).items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"K": 64, "dtype": torch.float32}, []),
        ({"K": 40}, []),
        ({"K": 144}, []),
        ({"K": 64, "V": 48}, ["bwd"]),
        ({"K": 64, "head_first": True}, ["fwd", "bwd"]),
    ],
)
def test_other_inputs_go_to_triton(sizes, expected, launched, monkeypatch, device):
    monkeypatch.setattr(kernel_choice, "ENABLED_ON_HOPPER", ALL)
    inputs = draw(5, **{"dtype": torch.float16, **sizes}, device=device)
    outputs_and_gradients(parallel_softpick_attn, inputs, head_first=sizes.get("head_first", False))
    assert launched == expected


def test_unaligned_rows_rows_without_keys_and_other_cards_go_to_triton(
    launched, monkeypatch, device
):
    monkeypatch.setattr(kernel_choice, "ENABLED_ON_HOPPER", ALL)
    outputs_and_gradients(
        parallel_softpick_attn, draw(5, 64, dtype=torch.float16, device=device), window_size=0
    )
    outputs_and_gradients(
        parallel_softpick_attn, draw(5, 64, S=3, dtype=torch.float16, device=device)
    )
    inputs = draw(5, 68, dtype=torch.float16, device=device)
    parallel_softpick_attn(*(x[..., :64] for x in inputs[:3]))
    assert launched == []
    monkeypatch.setattr(kernel_choice, "architecture", lambda device: "sm_100")
    parallel_softpick_attn(*draw(5, 64, dtype=torch.float16, device=device)[:3])
    assert launched == []


def test_small_calls_go_to_triton(launched, monkeypatch, device):
    inputs = draw(20, 64, HQ=2, H=1, B=3, S=30, dtype=torch.float16, device=device)
    for work, expected in (3 * 2 * 20 * 30 * 64 + 1, []), (3 * 2 * 20 * 30 * 64, ["fwd", "bwd"]):
        with kernel_choice.hopper_for_work_of(work):
            outputs_and_gradients(parallel_softpick_attn, inputs)
        assert launched == expected


def test_the_table_names_every_choice(monkeypatch, capsys):
    kernel_table.main()
    *rows, last = capsys.readouterr().out.splitlines()
    assert last.endswith("at least 68,719,476,736, Triton smaller ones")
    assert any("Gluon" in row for row in rows)
    monkeypatch.setattr(kernel_choice, "ENABLED_ON_HOPPER", frozenset())
    assert not any("Gluon" in x for x in kernel_table.choices())
    monkeypatch.setattr(kernel_choice, "ENABLED_ON_HOPPER", ALL)
    served = {x[:4] for x in kernel_table.choices() if x[4] == "Gluon"}
    assert served == {
        ("sm_90", kernel, "bfloat16, float16", f"up to {D}") for kernel in ALL for D in (64, 128)
    }
