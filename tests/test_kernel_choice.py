"""Which kernels the operators launch: those of Triton, or those for Hopper where these are enabled and take the input."""

import pytest
import torch
from numerics import draw, outputs_and_gradients

from fla.ops.attn.softpick import kernel_choice, kernel_table, parallel_softpick_attn
from fla.ops.attn.softpick.hopper import backward, forward


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
    monkeypatch.setattr(kernel_choice, "num_processors", lambda device: 0)
    return names


def launches(names, inputs, **options):
    """Which of forward and backward a call launches for Hopper."""
    names.clear()
    outputs_and_gradients(parallel_softpick_attn, inputs, **options)
    return names


@pytest.mark.parametrize(("what", "expected"), [("none", []), ("all", ["fwd", "bwd"])])
def test_all_or_none(what, expected, launched, device):
    inputs = draw(20, 64, HQ=2, H=1, dtype=torch.float16, device=device)
    with kernel_choice.hopper_serving(what):
        got = outputs_and_gradients(parallel_softpick_attn, inputs)
    assert launched == expected
    for name, x in outputs_and_gradients(parallel_softpick_attn, inputs).items():
        assert torch.equal(got[name], x), name


def test_nothing_else_can_be_served():
    with (
        pytest.raises(ValueError, match="what must be .*, got 'some'"),
        kernel_choice.hopper_serving("some"),
    ):
        pass


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
def test_other_inputs_go_to_triton(sizes, expected, launched, device):
    inputs = draw(5, **{"dtype": torch.float16, **sizes}, device=device)
    with kernel_choice.hopper_serving("all"):
        assert launches(launched, inputs, head_first=sizes.get("head_first", False)) == expected


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ({}, {}, ["fwd", "bwd"]),
        ({"B": 8, "T": 10}, {}, ["fwd", "bwd"]),
        ({"B": 10, "T": 9}, {}, []),
        ({"head_first": True, "T": 160}, {"head_first": True}, ["fwd", "bwd"]),
        ({"H": 1}, {}, ["fwd", "bwd"]),
        ({"H": 1, "D": 128}, {}, ["fwd", "bwd"]),
        ({"B": 4, "D": 128, "T": 10}, {}, ["fwd", "bwd"]),
        ({"B": 10, "D": 96, "T": 9}, {}, []),
        ({"B": 6, "D": 96, "T": 10}, {}, ["fwd", "bwd"]),
        ({"D": 48, "T": 38}, {}, ["fwd", "bwd"]),
        ({"D": 32, "T": 40}, {}, []),
        ({"D": 64, "V": 128, "T": 40}, {}, []),
        ({"dtype": torch.float16, "D": 128}, {}, ["fwd", "bwd"]),
        ({"dtype": torch.float32}, {}, []),
        ({"B": 1}, {}, []),
        ({"S": 30}, {}, []),
        ({}, {"window_size": 10}, ["fwd", "bwd"]),
        ({"D": 128}, {"window_size": 10}, ["fwd", "bwd"]),
        ({"B": 8}, {"window_size": 9}, []),
        # 8 on average are enough for forward, which asks for 5, and too few for backward, which asks for 10
        ({"B": 1, "T": 80}, {"cu_seqlens": [0, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80]}, ["fwd"]),
        ({"B": 1, "T": 75}, {"cu_seqlens": [0, 10, 70, 75]}, ["fwd", "bwd"]),
        ({"B": 1, "T": 75, "D": 128}, {"cu_seqlens": [0, 10, 70, 75]}, ["fwd", "bwd"]),
        ({"B": 1, "T": 40, "D": 128}, {"cu_seqlens": [0, 10, 20, 25, 30, 40]}, ["fwd", "bwd"]),
        ({"B": 1, "T": 40, "D": 128}, {"cu_seqlens": [*range(0, 40, 4), 40]}, []),
        ({"B": 1, "T": 120}, {"cu_seqlens": [0, 10, 70, 120], "window_size": 50}, []),
    ],
)
def test_choice(sizes, options, expected, launched, monkeypatch, device):
    sizes = {"T": 20, "D": 64, "HQ": 2, "B": 2, "dtype": torch.bfloat16} | sizes
    monkeypatch.setattr(kernel_choice, "MIN_HOPPER_WORK", 2 * 2 * 20 * 64 * 10)
    # about a hundredth of the lengths: 5 for 512, 10 for 1,024
    shortest = {
        kind: {D: length // 102 for D, length in lengths.items()}
        for kind, lengths in kernel_choice.SHORTEST.items()
    }
    monkeypatch.setattr(kernel_choice, "SHORTEST", shortest)
    if "cu_seqlens" in options:
        options = options | {"cu_seqlens": torch.tensor(options["cu_seqlens"], device=device)}
    inputs = draw(sizes.pop("T"), sizes.pop("D"), **sizes, device=device)
    with kernel_choice.hopper_serving("faster"):
        assert launches(launched, inputs, **options) == expected


def test_too_few_programs_for_a_card_go_to_triton(launched, monkeypatch, device):
    monkeypatch.setattr(kernel_choice, "MIN_HOPPER_WORK", 0)
    monkeypatch.setattr(kernel_choice, "SHORTEST", dict.fromkeys(kernel_choice.SHORTEST, {64: 1}))
    # 3 times 192 queries, and 1.5 times 192 keys
    inputs = draw(288, 64, HQ=2, H=1, dtype=torch.bfloat16, device=device)
    expected = {1: ["fwd", "bwd"], 2: ["fwd"], 3: ["fwd"], 4: []}
    with kernel_choice.hopper_serving("faster"):
        for processors, names in expected.items():
            monkeypatch.setattr(kernel_choice, "num_processors", lambda device, n=processors: n)
            assert launches(launched, inputs) == names


def test_unaligned_rows_rows_without_keys_and_other_cards_go_to_triton(
    launched, monkeypatch, device
):
    inputs = draw(5, 68, dtype=torch.float16, device=device)
    with kernel_choice.hopper_serving("all"):
        assert (
            launches(launched, draw(5, 64, dtype=torch.float16, device=device), window_size=0) == []
        )
        assert launches(launched, draw(5, 64, S=3, dtype=torch.float16, device=device)) == []
        parallel_softpick_attn(*(x[..., :64] for x in inputs[:3]))
        assert launched == []
        monkeypatch.setattr(kernel_choice, "architecture", lambda device: "sm_100")
        assert launches(launched, draw(5, 64, dtype=torch.float16, device=device)) == []


def test_what_hopper_kernels_refuse_is_named(monkeypatch):
    monkeypatch.setattr(kernel_choice, "architecture", lambda device: "sm_90")
    x = torch.zeros(1, 10, 2, 64, dtype=torch.bfloat16)

    def refusal(window_size=None, head_first=False, **changes):
        tensors = {"q": x, "k": x, "v": x, "do": x} | changes
        return kernel_choice.hopper_refusal("dkv", window_size, head_first, **tensors) or "nothing"

    for message, change in {
        "float16 or bfloat16": x.float(),
        "multiples of 16 up to 128, got K = 144": torch.zeros(1, 10, 2, 144, dtype=x.dtype),
        "multiples of 16 up to 128, got K = 40": torch.zeros(1, 10, 2, 40, dtype=x.dtype),
        "at least one element": x[:, :0],
        "multiples of 16 bytes": torch.zeros(1, 10, 2, 65, dtype=x.dtype)[..., :64],
    }.items():
        assert message in refusal(q=change, k=change, v=change, do=change)
    assert "a window of at least one key, got 0" in refusal(window_size=0)
    assert "as many keys as queries, got 9 and 10" in refusal(k=x[:, :9], v=x[:, :9])
    apart = torch.zeros(1, 10, 2, 128, dtype=x.dtype)[..., ::2]
    assert "do with a contiguous last dimension" in refusal(do=apart)
    offset = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    assert "k with rows that start at multiples of 16 bytes" in refusal(k=offset)
    unaligned = torch.zeros(1, 10, 2, 68, dtype=x.dtype)[..., :64]
    assert "k with rows that start at multiples of 16 bytes" in refusal(k=unaligned)
    assert "k with rows that start at multiples of 16 bytes" in refusal(k=x.expand(2, -1, -1, -1))
    assert refusal() == refusal(head_first=True) == "nothing"
    narrow = kernel_choice.hopper_refusal("fwd", None, False, q=x, k=x, v=x[..., :32])
    assert narrow == "K = V, got K = 64 and V = 32"


def test_the_table_names_every_choice(capsys):
    kernel_table.main()
    table, choice = capsys.readouterr().out.split("\n\n")
    assert "at least 8,589,934,592,\n" in choice
    for line in choice.splitlines()[1:7]:
        assert " at 128" in line
    assert sum("Gluon" in row for row in table.splitlines()) == 12
    served = {x[:4] for x in kernel_table.choices() if x[4] == "Gluon"}
    assert served == {
        ("sm_90", kernel, "bfloat16, float16", D)
        for kernel in ("fwd", "dq", "dkv")
        for D in ("48", "64", "80, 96, 112", "128")
    }
