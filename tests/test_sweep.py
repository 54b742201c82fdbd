"""`python -m flame.sweep`: the file, the slots, what is started when, interruption, the table of losses."""

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
import torch
from small_model import write_model, write_text

from flame import gpus, placement, sweep, topology
from flame.data import open_data
from flame.errors import UsageError
from flame.folder_lock import hold
from flame.sweeps import check, report, runner
from flame.sweeps.cost import estimate, require_disk
from flame.sweeps.plan import read_sweep
from flame.sweeps.report import best_runs, loss_table
from flame.sweeps.slots import find_slots, require_own_variables
from flame.sweeps.state import State, read_state
from flame.titan import ModelArgs, TitanModel
from flame.train import read_model, read_tokenizer

ROOT = Path(__file__).parent.parent

FILE = """
name = "small"
out = "{folder}/out"
seeds = [1, 2]
learning_rates = [2e-3]

[base]
model.config = "{model}"
training.dataset = "{text}"
training.seq_len = 32
training.batch_size = 2
training.steps = 300
training.mixed_precision_param = "float32"
metrics.log_freq = 1
metrics.enable_tensorboard = false
sample.max_new_tokens = 0

[arms.softmax]
attn_impl = "naive_softmax_attn"

[arms.softpick]
attn_impl = "naive_softpick_attn"
seeds = [1]

[run]
ngpu = 1

[analyze]
data = "{text}"
"""


@pytest.fixture
def write(tmp_path):
    """Writes the file above, with pairs of texts replaced, and returns its path."""
    model, text = write_model(tmp_path, num_hidden_layers=1), write_text(tmp_path)
    content = FILE.format(folder=tmp_path, model=model, text=text)

    def write(*changes):
        changed = content
        for old, new in changes:
            assert old in changed
            changed = changed.replace(old, new, 1)
        file = tmp_path / "sweep.toml"
        file.write_text(changed)
        return file

    return write


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    # a sweep says what GPUs its runs see; here they see none
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "addresses", lambda env: [])


@pytest.fixture
def standins(tmp_path, monkeypatch):
    """Stand-ins in the place of training and analysis; their log is in the folder returned."""
    folder = tmp_path / "standins"
    folder.mkdir()
    launcher, analyzer = sweep_standins.write(folder)
    monkeypatch.setattr(runner, "LAUNCHER", launcher)
    monkeypatch.setattr(report, "ANALYZER", analyzer)
    # whose folders are no runs'
    monkeypatch.setattr(check, "check_runs", lambda sweep: None)
    return folder


def said(folder):
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [json.loads(line) for line in lines]


def starts(folder):
    return [line["run"] for line in said(folder) if line["what"] == "start"]


def run_main(monkeypatch, file, *flags):
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["flame.sweep", str(file), *flags])
    with pytest.raises(SystemExit) as end:
        sweep.main()
    return end.value.code


def test_runs_of_a_file(write, tmp_path):
    found = read_sweep(write(("[2e-3]", "[2e-3, 0.01]")))
    names = [run.name for run in found.runs]
    assert names == [
        "softmax/lr0.002-seed1",
        "softmax/lr0.002-seed2",
        "softmax/lr0.01-seed1",
        "softmax/lr0.01-seed2",
        "softpick/lr0.002-seed1",
        "softpick/lr0.01-seed1",
    ]
    run = found.runs[3]
    assert run.folder == run.config.dump_folder == tmp_path / "out/softmax/lr0.01-seed2"
    assert (run.config.optimizer.lr, run.config.training.seed) == (0.01, 2)
    assert run.config.training.seq_len == 32
    assert run.config.model.config == str(tmp_path / "out/models/softmax.json")
    assert found.model_keys(found.arms[0])["attn_impl"] == "naive_softmax_attn"
    assert found.model_keys(found.arms[1])["attn_impl"] == "naive_softpick_attn"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "small"', "name =", "is not the TOML file of a sweep: "),
        ('name = "small"', "", "at the top: name is missing; it must be the sweep's name"),
        (
            "seeds = [1, 2]",
            "seed = [1, 2]",
            "at the top: seeds is missing; it must be a list, without",
        ),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds must be a list, without repetition, of "),
        ("seeds = [1, 2]", "seeds = [-1]", "integers of at least 0, got [-1]"),
        ("seeds = [1, 2]", "seeds = []", "integers of at least 0, got []"),
        ("seeds = [1, 2]", "seeds = [true]", "integers of at least 0, got [True]"),
        ("[2e-3]", "[0]", "learning_rates must be a list, without repetition, of positive"),
        ("[2e-3]", "0.1", "of positive numbers, got 0.1"),
        ("[2e-3]", "[inf]", "of positive numbers, got [inf]"),
        ("[run]", "[runs]", "at the top: unknown key 'runs'; there are name, out, seeds, "),
        ("ngpu = 1", "ngpu = 5", "[run]: ngpu must be an integer from 1 to 4, got 5"),
        ("ngpu = 1", "parallel = 1", "[run]: parallel must be true or false, got 1"),
        ("ngpu = 1", "gpus = 1", "[run]: unknown key 'gpus'; there are ngpu, parallel"),
        ("[analyze]", "[analyze]\nbits = [5]", "[analyze]: bits must be a list, without "),
        ("[analyze]", "[analyze]\nheld_out = 1", "held_out must be true or false, got 1"),
        ("[analyze]", "[analyze]\nsamples = 0", "samples must be an integer of at least 1, got 0"),
        ("[arms.softpick]", "[arms.models]", "[arms.models]: an arm's name must be"),
        ('attn_impl = "naive_softpick_attn"', "", "[arms.softpick]: attn_impl is missing; each"),
        ("[arms.softpick]", '[arms."a/b"]', "[arms.a/b]: an arm's name must be letters"),
        ("seeds = [1]\n", "seeds = 1\n", "[arms.softpick]: seeds"),
        (
            "training.steps = 300",
            "training.stepz = 300",
            "[base]: Unrecognized options: --training.stepz=300",
        ),
        (
            "training.steps = 300",
            "training.steps = 0",
            "--training.steps must be at least 1, got 0",
        ),
        ("training.steps = 300", "steps = 300", "[base]: key 'steps' stands outside a [section]"),
        (
            "training.steps = 300",
            "training.seed = 3",
            "[base]: training.seed must be left out: `seeds` lists them",
        ),
        (
            "training.steps = 300",
            'job.dump_folder = "x"',
            "[base]: job.dump_folder must be left out: each run has a folder",
        ),
        (
            "training.steps = 300",
            "optimizer.lr = 0.1",
            "optimizer.lr must be left out: `learning_rates`",
        ),
        ("training.steps = 300", "validation.share = 0", "[base]: validation.share must be above"),
        (
            "training.steps = 300",
            "checkpoint.enable_checkpoint = false",
            "[base]: checkpoint.enable_checkpoint must be true, its default, in a sweep, got false",
        ),
        ("model.config = ", "model.tokenizer_path = ", "[base]: model.config must name the JSON"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(write, old, new, words):
    file = write((old, new))
    with pytest.raises(UsageError) as error:
        read_sweep(file)
    assert words in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            'attn_impl = "naive_softmax_attn"',
            "attn_impl = 3",
            "[arms.softmax]: {out}/models/softmax.json",
        ),
        ("[arms.softpick]", "[arms.softpick]\nsink = 1", "softpick.json has an unknown key 'sink'"),
        (
            "[analyze]",
            "[analyze]\nlengths = [32, 1024]",
            "must be at most max_position_embeddings 512",
        ),
        ("[analyze]", "[analyze]\nlengths = [1]", "[analyze]: --lengths must be at least 2, got 1"),
    ],
)
def test_a_mistake_in_an_arm_is_one_line(write, tmp_path, old, new, words):
    file = write((old, new))
    with pytest.raises(UsageError) as error:
        check.measure_arms(read_sweep(file))
    assert words.format(out=tmp_path / "out") in str(error.value)
    assert str(error.value).startswith(str(file))
    assert not (tmp_path / "out").exists()


def test_what_the_runs_would_refuse_is_refused_before_the_first(write, tmp_path, monkeypatch):
    for change, words in [
        (("training.seq_len = 32", "training.seq_len = 1024"), "--training.seq_len 1024 must be"),
        (("training.seq_len", "training.tensor_parallel_degree = 3\ntraining.seq_len"), "degree"),
        (("text.txt", "none.txt"), "none.txt"),
        (
            (f'data = "{tmp_path}/text.txt"', 'data = "./none"'),
            "[analyze]: --data './none': no such",
        ),
        (("[analyze]", "[analyze]\nsamples = 9999"), "[analyze]: --samples 9999: --data"),
        (("[analyze]", "[analyze]\npasskey_lengths = [50]"), "--passkey_lengths 50: length must"),
    ]:
        file = write(change)
        with pytest.raises(UsageError) as error:
            check.check_runs(read_sweep(file))
        assert words in str(error.value)
        assert str(file) in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "/out"])
def test_out_that_is_no_folder_is_refused(write, tmp_path, monkeypatch, capsys, below):
    (tmp_path / "file").touch()
    file = write((f'out = "{tmp_path}/out"', f'out = "{tmp_path}/file{below}"'))
    assert run_main(monkeypatch, file, "--dry_run") == 2
    words = f"{file}: out {tmp_path}/file{below} must be a folder, but {tmp_path}/file is none"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.jsonl", "[1]\n"), ("metrics.jsonl", "{}\n"), ("record/001.json", "")],
)
def test_a_damaged_run_folder_is_one_line(write, name, content):
    run = read_sweep(write()).runs[0]
    (run.folder / "record").mkdir(parents=True)
    (run.folder / name).write_text(content)
    with pytest.raises(UsageError, match=f"{name}(, line 1 is damaged| cannot be read)"):
        read_state(run)


def shipped():
    return sorted((ROOT / "configs/sweeps").glob("*.toml"))


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.stem)
def test_every_shipped_sweep_can_be_built(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    sizes = check.measure_arms(read_sweep(file.relative_to(ROOT)))
    # the arms differ in parameters by what an arm adds alone
    assert max(s.parameters for s in sizes.values()) <= 1.1 * min(
        s.parameters for s in sizes.values()
    )


# slots


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Makes a machine of 8 AMD GPUs on two sockets, or another one, the one that is read."""

    def build(nodes=((0, "0-47"), (1, "48-95")), gpu_nodes=(0, 0, 0, 0, 1, 1, 1, 1)):
        def addresses(env):
            visible = env.get("HIP_VISIBLE_DEVICES") or env.get("CUDA_VISIBLE_DEVICES")
            every = range(len(gpu_nodes))
            return [machine.address(int(i)) for i in (visible.split(",") if visible else every)]

        root = machine.build(tmp_path / "machine", nodes=list(nodes), gpus=list(gpu_nodes))
        monkeypatch.setattr(topology, "ROOT", root)
        monkeypatch.setattr(gpus, "addresses", addresses)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return root

    return build


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
        places = placement.place(
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


def test_visible_gpus_keep_their_names(build, monkeypatch):
    build()
    known = {"ngpu": 1, "parallel": True, "allow_cross_numa": False}
    # HIP reads CUDA's variable where its own is not set
    slots = find_slots(**known, env={"CUDA_VISIBLE_DEVICES": "5, 2"})
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2", "5"]
    monkeypatch.setattr(gpus, "addresses", lambda env: [machine.address(5)])
    with pytest.raises(UsageError, match="must name GPUs of this machine, got '5,9', of which"):
        find_slots(**known, env={"HIP_VISIBLE_DEVICES": "5,9"})


def test_variables_of_another_launch_are_refused(monkeypatch, capsys, write):
    require_own_variables({"HIP_VISIBLE_DEVICES": "0"})
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


def test_a_failed_run_stops_no_other(write, standins, monkeypatch, capsys, tmp_path):
    file = write(
        ("[arms.softpick]", "[arms.fails]"),
        ("[analyze]", "[analyze]\nheld_out = true\nlengths = [8, 16]\nsamples = 3\nbits = [2]"),
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
    flags = ["--samples", "3", "--lengths", "8", "16", "--bits", "2"]
    assert analyses[0][-len(data + flags) :] == data + flags
    assert analyses[1][4:8] == ["--label", "softmax", "softmax", "fails"]
    # and nothing at all once more
    assert run_main(monkeypatch, file) == 0
    assert len(starts(standins)) == 4
    assert len((out / "report/records.jsonl").read_text().splitlines()) == 2
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
    with hold(found.out, who="sweep"):
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
    from flame.log import init_logger
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
        (("steps = 300", "steps = 400"), "training.steps in [base] is 400, but "),
        (("[arms.control]", "[arms.control]\nhidden_act = 'gelu'"), "hidden_act was "),
    ]:
        assert run_main(monkeypatch, write(*changes, change)) == 2
        error = capsys.readouterr().err
        assert words in error
        assert str(runs[0].folder) in error or str(runs[1].folder) in error


def test_arms_of_a_seed_start_alike(write, tmp_path):
    """The weights of step 0 to the bit, those aside that an arm adds, and the batches."""
    fields = 'attn_impl = "naive_softmax_attn"\nattn_gate = true\nattn_sink = true'
    file = write(("seeds = [1]\n", f"[arms.more]\n{fields}\n"))
    found = read_sweep(file)
    weights, batches = {}, {}
    (tmp_path / "out/models").mkdir(parents=True)
    for arm in found.arms:
        found.model_file(arm.name).write_text(check.model_json(found, arm))
    for run in found.runs:
        config = read_model(run.config, 1)
        with torch.device("meta"):
            model = TitanModel(ModelArgs(config, run.config.training.seed))
        model.to_empty(device="cpu")
        model.init_weights()
        data = open_data(run.config, read_tokenizer(run.config, config))
        loader = iter(data.loader(dp_rank=0, dp_world_size=1))
        key = run.arm, run.seed
        weights[key] = {name: p.detach().clone() for name, p in model.named_parameters()}
        batches[key] = [next(loader)[0]["input"] for _ in range(3)]
    for seed in (1, 2):
        one = weights["softmax", seed]
        assert one.keys() == weights["softpick", seed].keys() < weights["more", seed].keys()
        for arm in ("softpick", "more"):
            assert all(torch.equal(one[name], weights[arm, seed][name]) for name in one)
            pairs = zip(batches["softmax", seed], batches[arm, seed], strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)
    name = "lm_head.weight"
    assert not torch.equal(weights["softmax", 1][name], weights["softmax", 2][name])
    assert not torch.equal(batches["softmax", 1][0], batches["softmax", 2][0])


# what is reckoned


def state_of(loss, **keys):
    values = {"step": 300, "loss": loss, "validation_loss": loss, "is_exported": True}
    return State(**values | {"seconds_per_step": None} | keys)


def test_losses_of_several_rates_and_seeds(write):
    file = write(
        ("[2e-3]", "[1e-3, 2e-3, 4e-3]"), ("[1, 2]", "[1, 2, 3]"), ("seeds = [1]", "seeds = [2, 3]")
    )
    found = read_sweep(file)
    losses = {
        ("softmax", 1e-3): [2.0, 2.2, 2.4],
        ("softmax", 2e-3): [2.1, 2.1, 2.1],
        # the lowest, but not whole
        ("softmax", 4e-3): [1.0, 1.0, None],
        ("softpick", 1e-3): [2.5, 2.7],
        ("softpick", 2e-3): [2.6, 2.8],
        ("softpick", 4e-3): [2.3, 2.7],
    }
    states = {}
    for run in found.runs:
        seeds = next(arm.seeds for arm in found.arms if arm.name == run.arm)
        loss = losses[run.arm, run.learning_rate][seeds.index(run.seed)]
        states[run.name] = state_of(loss, is_exported=loss is not None)
    best = best_runs(found, states)
    assert {arm: runs[0].learning_rate for arm, runs in best.items()} == {
        "softmax": 2e-3,
        "softpick": 4e-3,
    }
    table = loss_table(found, states)
    assert "| softmax | 0.002 | 3 | 2.1000 | 0.0000 | – | – |" in table
    # gaps by seed: 0.2 and 0.6
    assert "| softpick | 0.004 | 2 | 2.5000 | 0.2828 | +0.4000 | 0.2828 |" in table
    assert "| softmax | 0.004 | 2 of 3 | 1.0000 | 0.0000 |" in table


def test_cost(write, monkeypatch):
    found = read_sweep(write())
    states = {run.name: state_of(None, step=0, is_exported=False) for run in found.runs}
    parameters = {"softmax": 10**6, "softpick": 10**6}

    def cost(slots=1, speed=None):
        flops = {"softmax": 10, "softpick": 20}
        known = {"sequences": 4, "slots": slots, "tokens_per_second": speed}
        return estimate(found, states, parameters, flops, **known)

    text = "\n".join(cost(speed=1.0).lines)
    tokens = 300 * 4 * 32
    assert f"{tokens:,} a run (300 steps of 4 x 32), {3 * tokens:,} in all" in text
    assert f"FLOPs   {tokens * (10 + 10 + 20):.2e} in all" in text
    assert f"{3 * tokens / 3600:.2f} hours of training to come at 1 tokens/s a run" in text
    # two at a time: the third starts when the first has ended
    assert f"{2 * tokens / 3600:.2f} hours" in "\n".join(cost(slots=2, speed=1.0).lines)
    assert "unknown until the first run has finished" in "\n".join(cost().lines)
    # a run leaves 2 checkpoints and an export, and one more checkpoint is written at a time
    assert f"{(3 * (2 * 12 + 4) + 12) * 10**6 / 2**30:.2f} GiB to come" in text
    require_disk(found, cost())
    states[found.runs[0].name] = state_of(2.0, seconds_per_step=64.0)
    text = "\n".join(cost().lines)
    assert "at 2 tokens/s a run, as measured in 1 finished runs" in text
    assert f"{2 * tokens / 2 / 3600:.2f} hours" in text
    parameters["softpick"] = 10**15
    with pytest.raises(UsageError, match="GiB more than its disk has free"):
        require_disk(found, cost())


def test_the_speed_of_a_run_leaves_out_its_pauses(write):
    run = read_sweep(write()).runs[0]
    (run.folder / "record").mkdir(parents=True)
    for number, start in ((1, 90), (2, 500)):
        when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(start))
        (run.folder / f"record/{number:03}.json").write_text(json.dumps({"start": when}))
    lines = [{"step": s, "time": t, "loss": 3.0} for s, t in ((1, 100), (11, 120), (21, 600))]
    lines += [{"step": 31, "time": 640, "loss": 2.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "metrics.jsonl").write_text(text + '{"step": 41, "ti')
    state = read_state(run)
    assert (state.step, state.loss, state.is_finished) == (31, 2.5, False)
    assert state.seconds_per_step == pytest.approx((20 + 40) / 20)
    assert read_state(run, since=550).seconds_per_step == pytest.approx(4)
