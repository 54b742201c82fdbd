"""The program that examines a machine: `python -m fla.ops.attn.softpick.doctor`."""

import itertools

import pytest
import torch
from numerics import HAS_GPU, Inputs, by_formula

from fla.ops.attn.softpick import (
    doctor,
    doctor_accuracy,
    doctor_shapes,
    doctor_speed,
    kernel_choice,
    launch_shapes,
)
from fla.ops.attn.softpick.doctor_accuracy import Case, draw, sizes_of_terms
from fla.ops.attn.softpick.naive import naive_normalized_attn
from fla.ops.attn.softpick.naive_decoding import naive_normalized_attn_decode


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the program; returns its exit status and the text of its file."""

    def run(*arguments):
        file = tmp_path / "doctor.txt"
        status = doctor.main(["--quick", "--out", str(file), *arguments])
        text = file.read_text()
        assert capsys.readouterr().out == text
        assert text.splitlines()[-1].endswith(f"written to {file}")
        return status, text

    return run


@pytest.fixture
def references(monkeypatch):
    """The references take the positions of the kernels, for speed."""
    monkeypatch.setattr(doctor_accuracy, "parallel_normalized_attn", naive_normalized_attn)
    monkeypatch.setattr(doctor_accuracy, "normalized_attn_decode", naive_normalized_attn_decode)


def raises(error):
    def f(*args, **kwargs):
        raise error

    return f


def test_kernels_of_this_machine_pass(run):
    status, text = run("--only", "correctness")
    assert status == 0
    assert "0 FAILED, 0 skipped" in text
    for name in (
        "torch ",
        "triton ",
        "launch shapes of the entry",
        " fwd ",
        " dq ",
        " dkv ",
        " decode ",
    ):
        assert name in text


# the quick cases are bfloat16 on a GPU, where 1 % may be allowed, and float32 in the interpreter
@pytest.mark.parametrize("factor", [1.1 if HAS_GPU else 1.01, float("nan")])
def test_wrong_kernel_fails_and_the_rest_goes_on(run, references, monkeypatch, factor):
    monkeypatch.setattr(
        doctor_accuracy,
        "parallel_normalized_attn",
        lambda *args, **kwargs: naive_normalized_attn(*args, **kwargs) * factor,
    )
    status, text = run("--only", "correctness")
    assert status == 1
    assert "FAILED: fwd, dq, dkv too far from float64" in text
    assert " decode 0." in text
    assert "1 FAILED, 0 skipped" in text


def test_error_of_a_kernel_fails_and_the_rest_goes_on(run, references, monkeypatch):
    monkeypatch.setattr(
        doctor_accuracy, "parallel_normalized_attn", raises(RuntimeError("no such\ninstruction"))
    )
    status, text = run("--only", "correctness")
    assert status == 1
    assert "FAILED: RuntimeError: no such\n" in text
    assert " decode 0." in text


def test_too_little_memory_is_no_failure(run, references, monkeypatch):
    monkeypatch.setattr(
        doctor_accuracy, "parallel_normalized_attn", raises(torch.OutOfMemoryError("too much"))
    )
    status, text = run("--only", "correctness")
    assert status == 0
    assert "skipped: out of memory on the GPU" in text
    assert "0 FAILED, 1 skipped" in text


def test_ctrl_c_keeps_the_lines_so_far(run, references, monkeypatch):
    monkeypatch.setattr(doctor_accuracy, "normalized_attn_decode", raises(KeyboardInterrupt()))
    status, text = run()
    assert status == 130
    assert " dkv 0." in text
    assert "stopped by Ctrl-C" in text


def test_out_of_time_is_said(run, references):
    status, text = run("--only", "correctness", "--seconds", "1e-9")
    assert status == 0
    assert text.count("skipped: out of time") == len(doctor_accuracy.cases(True))


def test_no_gpu_is_one_error(monkeypatch):
    monkeypatch.setattr(doctor, "IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU that torch sees"):
        doctor.main([])


def test_file_that_cannot_be_written_is_one_error(tmp_path):
    with pytest.raises(SystemExit, match="--out must be a file that can be written"):
        doctor.main(["--quick", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "case",
    [
        Case(torch.bfloat16, 16, "", 40, H=2),
        Case(torch.float32, 16, "", 40, normalizer="softmax", window=9),
    ],
    ids=["softpick", "softmax"],
)
def test_rule_has_the_sizes_of_the_tests(case):
    inputs, do = draw(case)
    kwargs = {"normalizer": case.normalizer, "window_size": case.window}
    sizes = sizes_of_terms(inputs, do, kwargs)
    expected = by_formula(Inputs(*inputs, do), **kwargs).sizes
    for name in ("o", "dk", "dv"):
        # the tests also count numbers below the smallest normal one
        torch.testing.assert_close(sizes[name], expected[name], rtol=1e-9, atol=1e-30)
    ratio = sizes["dq"].norm() / expected["dq"].norm()
    # the keys of a row without their signs in the denominator
    torch.testing.assert_close(ratio.item(), 1.3, rtol=0.0, atol=0.4)


@pytest.mark.parametrize("entry", launch_shapes.TABLE)
def test_every_kernel_has_shapes_to_try(entry):
    for kernel in ("fwd", "dq", "dkv", "decode"):
        for D in (64, 128):
            table = launch_shapes.select_launch_shape(entry, kernel, "16bit", D, D)
            others = set(doctor_shapes.CANDIDATES[entry][kernel, D]) - {table}
            assert len(others) >= 2, (kernel, D)


def test_shapes_for_amd_are_the_three_best_ranked():
    cards = [card for card in launch_shapes.TABLE if card.startswith("gfx")]
    cases = set(itertools.product(cards, ("fwd", "dq", "dkv"), (64, 128)))
    assert set(doctor_shapes.RANKED) == cases
    for (card, kernel, D), rows in doctor_shapes.RANKED.items():
        assert len({row[:3] for row in rows}) == 3, (card, kernel, D)
        shapes = doctor_shapes.CANDIDATES[card][kernel, D]
        given = [(*x[:4], x.waves_per_eu or 0) for x in shapes]
        assert given == list(rows)


def test_on_hopper_both_kinds_of_kernels_are_checked(monkeypatch):
    monkeypatch.setattr(doctor_accuracy, "architecture", lambda device: "sm_90")
    cases = doctor_accuracy.cases(is_quick=False)
    gluon = [case for case in cases if case.is_hopper]
    kinds = {(case.dtype, case.D) for case in gluon}
    assert kinds == set(itertools.product((torch.bfloat16, torch.float16), (64, 128)))
    assert all(case.options.endswith(", Gluon") and not case.queries for case in gluon)
    # what is used most comes first, should time run out
    dtypes = [case.dtype for case in cases]
    assert max(cases.index(x) for x in gluon if x.dtype == torch.bfloat16) < dtypes.index(
        torch.float16
    )

    served = []
    monkeypatch.setattr(doctor_speed, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(doctor_speed, "check", lambda *_: served.append(kernel_choice._serving))
    doctor_speed.check_all_kernels(naive_normalized_attn, "softpick", 64)
    assert served == ["none", "all"]


def test_verdict_names_a_faster_shape():
    table, other = (launch_shapes.LaunchShape(64, BS, 4, 1) for BS in (32, 64))
    assert "is the fastest of 2" in doctor_shapes.verdict({table: 1.0, other: 0.98}, table)
    assert "1.25 times as fast" in doctor_shapes.verdict({table: 1.0, other: 0.8}, table)


@pytest.mark.gpu
def test_speed_and_shapes_of_a_gpu(run):
    status, text = run()
    assert status == 0
    assert "the fastest" in text
