"""`python -m flame.sweep`: the slots, what is started when, interruption."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import machine
import pytest
import sweep_standins
from sweep_standins import run_main, said, starts

from flame.base.errors import UsageError
from flame.base.folder_lock import lock_folder
from flame.machine import placement
from flame.sweeps import report, runner
from flame.sweeps.plan import read_sweep
from flame.sweeps.slots import find_slots, refuse_per_run_variables
from flame.sweeps.state import read_state

ROOT = Path(__file__).parents[2]


# slots


@pytest.mark.parametrize(
    ("ngpu", "visible", "groups"),
    [
        (4, None, ["0,1,2,3", "4,5,6,7"]),
        (3, None, ["0,1,2", "4,5,6"]),
        (2, None, ["0,1", "2,3", "4,5", "6,7"]),
        (1, None, list("01234567")),
        (2, "2,3,4,5,6", ["2,3", "4,5"]),
        (2, "7,3,6,1", ["3,1", "7,6"]),
        (2, "3,4,5", ["4,5"]),
    ],
)
def test_slots_are_disjoint_and_within_a_group(build, ngpu, visible, groups):
    build()
    env = {} if visible is None else {"HIP_VISIBLE_DEVICES": visible}
    slots = find_slots(ngpu=ngpu, parallel=True, allow_cross_numa=False, env=env)
    assert [slot.env["HIP_VISIBLE_DEVICES"] for slot in slots] == groups
    (one,) = find_slots(ngpu=ngpu, parallel=False, allow_cross_numa=False, env=env)
    # which has the cores of the group for itself
    assert one.env == {"HIP_VISIBLE_DEVICES": groups[0]}
    for slot in slots:
        # what the launch of a run says to them; on the CPUs of their group, all together
        places = placement.bind_processes(
            ngpu=ngpu,
            is_rocm=True,
            allow_cross_numa=False,
            allowed_cpus=frozenset(range(96)),
            env=env | slot.env,
            argv=[],
        )
        assert len(places) == ngpu
        same = sum(other.name.split(",")[0] == slot.name.split(",")[0] for other in slots)
        threads = int(slot.env.get("OMP_NUM_THREADS", placement.threads(places)))
        assert threads == 48 // (ngpu * same)


def test_runs_share_a_gpu(build):
    build()
    known = {"ngpu": 1, "parallel": True, "allow_cross_numa": False, "runs_per_gpu": 3}
    slots = find_slots(**known, env={"HIP_VISIBLE_DEVICES": "1,6,7"})
    # every GPU once before any GPU twice
    assert [slot.env["HIP_VISIBLE_DEVICES"] for slot in slots] == ["1", "6", "7"] * 3
    assert len({slot.name for slot in slots}) == 9
    assert slots[3].name == "group A, HIP_VISIBLE_DEVICES=1, run 2 of 3"
    # 48 cores a group, for three runs in the first and six in the second
    assert [slot.env["OMP_NUM_THREADS"] for slot in slots] == ["16", "8", "8"] * 3


def test_no_slot(build):
    build(gpu_nodes=(0, 0, 1, 1, 1))
    with pytest.raises(UsageError, match="got 4: there are 2 in group A, 3 in group B"):
        find_slots(ngpu=4, parallel=True, allow_cross_numa=False, env={})
    (build() / "sys/bus/pci/devices" / machine.address(5) / "numa_node").unlink()
    with pytest.raises(UsageError, match="NUMA groups of the GPUs are not known: .* cannot be"):
        find_slots(ngpu=4, parallel=True, allow_cross_numa=False, env={})
    assert len(find_slots(ngpu=4, parallel=True, allow_cross_numa=True, env={})) == 2


def test_one_group_needs_no_numa_nodes(build):
    build(nodes=[(0, "0-95")], gpu_nodes=(-1, -1))
    slots = find_slots(ngpu=1, parallel=True, allow_cross_numa=False, env={})
    assert [slot.env["HIP_VISIBLE_DEVICES"] for slot in slots] == ["0", "1"]


def test_visible_gpus_keep_their_names(build):
    build()
    known = {"ngpu": 1, "parallel": True, "allow_cross_numa": False}
    # HIP reads CUDA's variable where its own is not set
    slots = find_slots(**known, env={"CUDA_VISIBLE_DEVICES": "5,2"})
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2", "5"]
    with pytest.raises(UsageError, match="HIP_VISIBLE_DEVICES names 2 GPUs, of which torch sees 1"):
        find_slots(**known, env={"HIP_VISIBLE_DEVICES": "5,9"})


def test_partitions_of_a_gpu_are_slots_of_their_own(build):
    build(mode=("CPX", "NPS1"))
    known = {"parallel": True, "env": {}}
    assert len(find_slots(ngpu=1, allow_cross_numa=False, **known)) == 64
    with pytest.raises(
        UsageError, match=r"\[run\] ngpu = 4 takes 4 devices of 1 GPU: .*cross_numa in \[base\]"
    ):
        find_slots(ngpu=4, allow_cross_numa=False, **known)
    assert len(find_slots(ngpu=4, allow_cross_numa=True, **known)) == 16
    # the first partition of each GPU of a group
    first = {"HIP_VISIBLE_DEVICES": "0,8,16,24"}
    (slot,) = find_slots(ngpu=4, parallel=True, allow_cross_numa=False, env=first)
    assert slot.env["HIP_VISIBLE_DEVICES"] == "0,8,16,24"


def test_variables_of_another_launch_are_refused(monkeypatch, capsys, write):
    refuse_per_run_variables({"HIP_VISIBLE_DEVICES": "0"})
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert run_main(monkeypatch, write()) == 2
    assert "flame: error: MASTER_PORT=29501 must be unset: " in capsys.readouterr().err


# processes


def test_one_run_a_slot_at_a_time(build, write, standins, monkeypatch, capsys, tmp_path):
    build()
    file = write(("ngpu = 1", "ngpu = 4\nparallel = true"), ("[1, 2]", "[1, 2, 3]"))
    assert run_main(monkeypatch, file, "--summary_seconds", "0.1") == 0
    lines = said(standins)
    assert sorted(starts(standins)) == sorted(run.name for run in read_sweep(file).runs)
    assert {line["env"]["NGPU"] for line in lines} == {"4"}
    busy = {}
    for line in lines:
        gpus = line["env"]["HIP_VISIBLE_DEVICES"]
        assert gpus in ("0,1,2,3", "4,5,6,7")
        if line["what"] == "start":
            assert gpus not in busy
            busy[gpus] = line["run"]
        else:
            assert busy.pop(gpus) == line["run"]
    # both at work at the same time
    assert [line["what"] for line in lines[:2]] == ["start", "start"]
    out = capsys.readouterr().out
    assert "softmax/lr0.002-seed1: starts on group A, HIP_VISIBLE_DEVICES=0,1,2,3" in out
    assert "0 finished, 2 running, 2 waiting | softmax/lr0.002-seed1 step 0/300 | " in out
    assert re.search(r"[1-3] finished, \d running, \d waiting, about 0:00:\d\d left", out)


def test_runs_side_by_side_on_one_gpu(build, write, standins, monkeypatch, capsys, tmp_path):
    build(nodes=[(0, "0-95")], gpu_nodes=(-1,))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    file = write(("ngpu = 1", "ngpu = 1\nparallel = true\nruns_per_gpu = 2"))
    flags = ("--dry_run", "--tokens_per_second", "1000")
    assert run_main(monkeypatch, file, *flags) == 0
    out = capsys.readouterr().out
    assert "3 runs of 2 arms, 0 finished, 3 to do, 2 at a time" in out
    # 19,200 tokens a run, and two runs one after the other in a slot
    assert f"{2 * 300 * 2 * 32 / 1000 / 3600:.2f} hours of training to come" in out
    assert run_main(monkeypatch, file) == 0
    lines = said(standins)
    assert len(starts(standins)) == 3
    assert {(x["env"]["HIP_VISIBLE_DEVICES"], x["env"]["OMP_NUM_THREADS"]) for x in lines} == {
        ("0", "48")
    }
    running, most = set(), 0
    for line in lines:
        (running.add if line["what"] == "start" else running.remove)(line["run"])
        most = max(most, len(running))
    assert most == 2
    assert "starts on group A, HIP_VISIBLE_DEVICES=0, run 2 of 2" in capsys.readouterr().out


def test_a_machine_without_a_gpu_runs_one_at_a_time(write, standins, monkeypatch, capsys):
    file = write(("ngpu = 1", "ngpu = 1\nparallel = true\nruns_per_gpu = 6"))
    assert run_main(monkeypatch, file, "--dry_run") == 0
    assert "3 to do, 1 at a time" in capsys.readouterr().out


def test_a_failed_run_stops_no_other(write, standins, monkeypatch, capsys, tmp_path):
    file = write(
        ("[arms.softpick]", "[arms.fails]"),
        (
            "[analyze]",
            "[analyze]\nheld_out = true\ninterventions = true\nlengths = [8, 16]\nsamples = 3\nbits = [2]",
        ),
    )
    out = tmp_path / "out"
    assert run_main(monkeypatch, file) == 1
    log = out / "fails/lr0.002-seed1.log"
    err = capsys.readouterr().err
    assert (
        f"error: run fails/lr0.002-seed1 failed, exit code 1: something is wrong with it; log {log}\n"
        in err
    )
    assert log.read_text().startswith("# NGPU=1 bash train.sh --model.config=")
    assert starts(standins)[:2] == ["softmax/lr0.002-seed1", "softmax/lr0.002-seed2"]
    table = (out / "report/losses.md").read_text()
    assert "| softmax | 0.002 | 2 | 2.1500 | 0.0707 | – | – |" in table
    assert "| fails | no rate with all seeds finished | | | | | |" in table
    assert "| fails | 0.002 | 1 | unfinished, step 0 |" in table
    # again: that one alone, and the report with it
    (standins / "mended").touch()
    assert run_main(monkeypatch, file) == 0
    assert starts(standins)[2:] == ["fails/lr0.002-seed1", "fails/lr0.002-seed1"]
    assert "2 of 3 runs are finished and skipped" in capsys.readouterr().out
    table = (out / "report/losses.md").read_text()
    assert "| fails | 0.002 | 1 | 2.6000 | – | +0.5000 | – |" in table
    analyses = [json.loads(x) for x in (out / "report/records.jsonl").read_text().splitlines()]
    hf = [str(out / f"{name}/hf") for name in ("softmax/lr0.002-seed1", "softmax/lr0.002-seed2")]
    assert analyses[0][:6] == ["--model", *hf, "--label", "softmax", "softmax"]
    data = ["--data", str(tmp_path / "text.txt"), "--out", str(out / "report"), "--held_out"]
    data.append("--interventions")
    flags = ["--samples", "3", "--lengths", "8", "16", "--bits", "2"]
    assert analyses[0][-len(data + flags) :] == data + flags
    assert analyses[1][4:8] == ["--label", "softmax", "softmax", "fails"]
    # and nothing at all once more
    assert run_main(monkeypatch, file) == 0
    assert len(starts(standins)) == 4
    assert len((out / "report/records.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().out.endswith(f"report {out}/report/report.html\n")
    # a run that is made anew is measured anew
    shutil.rmtree(out / "fails/lr0.002-seed1")
    assert run_main(monkeypatch, file) == 0
    assert len((out / "report/records.jsonl").read_text().splitlines()) == 3


def test_a_failed_analysis_is_tried_again(write, standins, monkeypatch, capsys, tmp_path):
    (standins / "broken").touch()
    assert run_main(monkeypatch, write()) == 1
    log = tmp_path / "out/report.log"
    words = f"error: the analysis failed, exit code 1: no analysis today; log {log}"
    assert words in capsys.readouterr().err
    (standins / "broken").unlink()
    assert run_main(monkeypatch, write()) == 0
    assert len(starts(standins)) == 3
    assert (tmp_path / "out/report/losses.md").exists()


def test_a_second_sweep_in_the_same_folder_is_refused(write, standins, monkeypatch, capsys):
    found = read_sweep(write())
    found.out.mkdir()
    with lock_folder(found.out, who="sweep"):
        assert run_main(monkeypatch, found.file) == 2
    assert f"is in use by another sweep (pid {os.getpid()} on " in capsys.readouterr().err
    assert starts(standins) == []


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_ends_the_sweep_ends_its_runs(write, standins, number):
    file = write(("[arms.softmax]", "[arms.waits]"), ("seeds = [1]", ""))
    code = """
    import sys
    from pathlib import Path
    from flame.base.log import init_logger
    from flame.sweeps import runner
    from flame.sweeps.plan import read_sweep
    from flame.sweeps.slots import Slot
    init_logger()
    runner.LAUNCHER = sys.argv[2:]
    sweep = read_sweep(Path(sys.argv[1]))
    r = runner.Runner(sweep, list(sweep.runs), [Slot("a"), Slot("b")], done=0, summary_s=60)
    r.run()
    sys.exit(128 + r.stopped)
    """
    words = [sys.executable, "-c", textwrap.dedent(code), str(file), *runner.LAUNCHER]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            wait_for(lambda: len(starts(standins)) == 2)
            pids = [line["pid"] for line in said(standins)]
            # as a terminal's Ctrl-C, which reaches the whole group
            os.killpg(process.pid, number)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids))
    ends = [line["what"] for line in said(standins)[2:]]
    if number == signal.SIGKILL:
        # the kernel's word for the sweep's
        assert ends == ["SIGTERM", "SIGTERM"]
    else:
        # once each, and no third run after that
        assert ends == ["SIGINT", "SIGINT"]
        assert process.returncode == 130
        assert "waits/lr0.002-seed1: stopped at step 0" in out


@pytest.mark.slow
def test_interrupted_continued_and_equal(write, monkeypatch, capsys, tmp_path):
    """Two arms that are the same: the one that was interrupted goes as the one that was not, to the bit."""
    launcher, analyzer = sweep_standins.write(tmp_path)
    monkeypatch.setattr(report, "ANALYZER", analyzer)
    changes = [
        ("[1, 2]", "[1]"),
        ("[arms.softpick]", "[arms.control]"),
        ('"naive_softpick_attn"', '"naive_softmax_attn"'),
    ]
    file, out = write(*changes), tmp_path / "out"
    runs = read_sweep(file).runs
    metrics = runs[0].folder / "metrics.jsonl"

    def interrupt():
        wait_for(lambda: metrics.exists() and read_state(runs[0]).step >= 5, timeout=300)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_main(monkeypatch, file) == 128 + signal.SIGTERM
    thread.join()
    printed = capsys.readouterr().out
    stopped = read_state(runs[0])
    assert f"softmax/lr0.002-seed1: stopped at step {stopped.step}" in printed
    assert 5 <= stopped.step < 300
    assert not runs[1].folder.exists()

    assert run_main(monkeypatch, file) == 0
    printed = capsys.readouterr().out
    assert "softmax/lr0.002-seed1: continues, it had logged step" in printed
    words = (
        f"SIGTERM after step {stopped.step}: the same command continues from step-{stopped.step}"
    )
    assert words in runs[0].log.read_text()
    curves = []
    for run in runs:
        records = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
        curves.append([(x["step"], x["loss"], x["grad_norm"]) for x in records if "loss" in x])
    # the same initial weights, the same batches, nothing repeated or lost
    assert [step for step, *_ in curves[0]] == list(range(1, 301))
    assert curves[0] == curves[1]
    assert "| control | 0.002 | 1 | " in (out / "report/losses.md").read_text()
    assert "| +0.0000 | – |" in (out / "report/losses.md").read_text()

    # what is finished is neither started nor measured again
    before = metrics.stat().st_mtime_ns
    assert run_main(monkeypatch, file) == 0
    assert "2 of 2 runs are finished and skipped" in capsys.readouterr().out
    assert metrics.stat().st_mtime_ns == before
    operator = 'attn_impl = "naive_softpick_attn"'
    # another arm may join; what would make another run of a finished one may not
    joined = write(*changes, ("[arms.softmax]", f"[arms.softpick]\n{operator}\n\n[arms.softmax]"))
    assert run_main(monkeypatch, joined, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "3 runs of 3 arms, 2 finished, 1 to do, 1 at a time" in printed
    assert "as measured in 2 finished runs" in printed
    assert printed.count("# finished: NGPU=1 bash train.sh ") == 2
    assert "nothing was written or started" in printed
    assert not (out / "softpick").exists()
    for change, words in [
        (("seq_len = 32", "seq_len = 64"), "--training.seq_len was 32, is now 64"),
        (("steps = 300", "steps = 400"), "training.steps in [base] must be 300, with which "),
        (("[arms.control]", "[arms.control]\nhidden_act = 'gelu'"), "hidden_act was "),
    ]:
        assert run_main(monkeypatch, write(*changes, change)) == 2
        error = capsys.readouterr().err
        assert words in error
        assert str(runs[0].folder) in error or str(runs[1].folder) in error
