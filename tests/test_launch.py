"""`bash train.sh` as a process: on a machine of two NUMA groups that is a folder, over two machines, under Slurm."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import machine
import pytest
from small_model import write_model

from flame.base import folder_lock
from flame.base.errors import UsageError
from flame.machine import master_port
from flame.machine.numa import parse_ranges

ROOT = Path(__file__).parent.parent
# the two groups of the machine that the tests make up get the CPUs of this one
CPUS = sorted(os.sched_getaffinity(0))
HALVES = (CPUS[: len(CPUS) // 2], CPUS[len(CPUS) // 2 :])
needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="two groups need two CPUs")

# what `python` is for train.sh: the launcher itself, on that machine with 8 AMD GPUs
LAUNCHER = """
import runpy, sys
from pathlib import Path
from flame.base import folder_lock
from flame.machine import list_gpus, numa
sys.path.insert(0, {tests!r})
import machine
list_gpus.addresses = lambda env: machine.hip(numa.ROOT, env)
numa.ROOT = Path({root!r})
folder_lock.WAIT_S = 1
assert sys.argv[1:3] == ["-m", "flame.launch"]
del sys.argv[1:3]
import torch
torch.version.hip = "6.4"
runpy.run_module("flame.launch", run_name="__main__", alter_sys=True)
"""

# what the processes of a run are where training would take long: flame.machine.bind_and_train without flame.train
WORKER = """
import json, os, runpy, sys
assert sys.argv[1:4] == ["-u", "-m", "flame.machine.bind_and_train"]
del sys.argv[1:4]
def train(name, **_):
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    rank = torch.tensor(dist.get_rank())
    dist.all_reduce(rank)
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    seen = {name: int(os.environ[name]) for name in names}
    seen |= {"module": name, "argv": sys.argv[1:], "sum": rank.item(), "cpus": sorted(os.sched_getaffinity(0))}
    # in one write, so that lines of several processes do not mix
    sys.stdout.write(json.dumps(seen) + chr(10))
    sys.stdout.flush()
    dist.destroy_process_group()
runpy.run_module = train
from flame.machine import bind_and_train
bind_and_train.main()
"""


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder with the machine, and with `bin/python` and `bin/worker` for it."""
    folder = tmp_path_factory.mktemp("machine")
    nodes = [(i, ",".join(map(str, half))) for i, half in enumerate(HALVES)]
    machine.build(folder / "root", nodes=nodes, gpus=[0, 0, 0, 0, 1, 1, 1, 1])
    (folder / "bin").mkdir()
    (folder / "launcher.py").write_text(
        LAUNCHER.format(root=str(folder / "root"), tests=str(ROOT / "tests"))
    )
    (folder / "worker.py").write_text(WORKER)
    for name, program in (("python", "launcher.py"), ("worker", "worker.py")):
        script(
            folder / "bin" / name,
            f'#!/usr/bin/env bash\nexec {sys.executable} {folder / program} "$@"\n',
        )
    return folder


def start(fake, flags=(), *, worker=None, **env):
    kept = ("RANK", "TRITON_INTERPRET", "OMP_NUM_THREADS", "HIP_VISIBLE_DEVICES", "MASTER_PORT")
    full = {k: v for k, v in os.environ.items() if k not in kept}
    full |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **env}
    full["PATH"] = f"{fake / 'bin'}{os.pathsep}{full['PATH']}"
    if worker is not None:
        # torchrun's own variable for the interpreter of its processes
        full["PYTHON_EXEC"] = str(worker)
    return subprocess.Popen(
        ["bash", "train.sh", *map(str, flags)],
        cwd=ROOT,
        env=full,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, code):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out, err


def error_of(process):
    lines = end(process, 2)[1].splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("flame: error: ")
    return lines[0]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a run that would take hours, of which a second matters."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(600)))
    flags = {
        "model.config": write_model(folder, num_hidden_layers=1),
        "training.dataset": folder / "text.txt",
        "training.seq_len": 32,
        "training.batch_size": 2,
        "training.steps": 100000,
        "validation.share": 0,
    }
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


def status(pid, name):
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for line in (thread / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                yield line.split()[1]


@pytest.mark.slow
@needs_two_cpus
def test_two_runs_side_by_side(fake, small, tmp_path):
    ports = [free_port(), free_port()]
    runs, memory = [], []
    with contextlib.ExitStack() as stack:
        for half, visible in enumerate(["0,1,2,3", "4,5,6,7"]):
            env = {"HIP_VISIBLE_DEVICES": visible, "MASTER_PORT": ports[half], "NGPU": "1"}
            process = start(fake, [*small, "--job.dump_folder", tmp_path / f"{half}"], **env)
            runs.append(stack.enter_context(process))
            # a failed assertion must not leave it running
            stack.callback(process.kill)
        deadline = time.monotonic() + 300
        curves = [tmp_path / f"{half}" / "tb" for half in range(2)]
        while not all(curve.exists() for curve in curves):
            assert all(run.poll() is None for run in runs), [run.communicate() for run in runs]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for half, run in enumerate(runs):
            holder = (tmp_path / f"{half}" / "lock").read_text().split()[1]
            # every thread, those of torch as well
            seen = [parse_ranges(cpus) for cpus in status(holder, "Cpus_allowed_list")]
            assert len(seen) > 1
            assert set(seen) == {frozenset(HALVES[half])}
            environ = Path(f"/proc/{holder}/environ").read_text().split("\0")
            assert f"OMP_NUM_THREADS={len(HALVES[half])}" in environ
            assert next(iter(status(holder, "PPid"))) == str(run.pid)
            memory.append(f"bind:{half}" in Path(f"/proc/{holder}/numa_maps").read_text())
        # a third run gets neither the port nor the folder of a living one
        third = {"HIP_VISIBLE_DEVICES": "4,5,6,7", "NGPU": "1", "worker": fake / "bin" / "worker"}
        refused = [
            start(
                fake, [*small, "--job.dump_folder", tmp_path / "2"], MASTER_PORT=ports[0], **third
            ),
            start(fake, [*small, "--job.dump_folder", tmp_path / "0"], **third),
        ]
        holder = (tmp_path / "0" / "lock").read_text().strip()
        assert (
            f"MASTER_PORT must be a free port, one for each run, got {ports[0]}: the run of pid "
            f"{runs[0].pid} on {socket.gethostname()} has it" in error_of(refused[0])
        )
        out, err = end(refused[1], 2)
        assert f"{tmp_path / '0'} is in use by another run ({holder}), waiting" in out
        assert f"--job.dump_folder {tmp_path / '0'} is in use by another run ({holder});" in err
        assert not (tmp_path / "2").exists()
        for run in runs:
            run.send_signal(signal.SIGTERM)
        outputs = [end(run, 128 + signal.SIGTERM) for run in runs]
    assert "group A: 0000:01:00.0, bound to NUMA node 0" in outputs[0][0]
    assert "group B: 0000:05:00.0, bound to NUMA node 1" in outputs[1][0]
    for half, (_, err) in enumerate(outputs):
        # this machine may lack the second node, or the right to bind
        assert memory[half] != (f"memory is not bound to NUMA node {half} (set_mempolicy: " in err)
    # the port and the folder are free again
    master_port.reserve_port(int(ports[0])).close()
    folder_lock.wait_until_free(tmp_path / "0")


@pytest.mark.slow
@needs_two_cpus
def test_two_machines_with_processes_of_both_groups(fake, tmp_path):
    env = {"HIP_VISIBLE_DEVICES": "3,4", "NGPU": "2", "NNODE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": free_port()}
    flags = ["--job.dump_folder", tmp_path / "run", "--job.allow_cross_numa"]
    with contextlib.ExitStack() as stack:
        nodes = []
        for rank in ("1", "0"):
            process = start(fake, flags, worker=fake / "bin" / "worker", NODE_RANK=rank, **env)
            nodes.append(stack.enter_context(process))
            stack.callback(process.kill)
        outputs = [end(node, 0)[0] for node in nodes]
    for rank, output in zip((1, 0), outputs, strict=True):
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert sorted((x["RANK"], x["LOCAL_RANK"]) for x in lines) == [
            (2 * rank, 0),
            (2 * rank + 1, 1),
        ]
        for x in lines:
            assert x["WORLD_SIZE"] == 4
            assert x["sum"] == 6
            # each next to its GPU
            assert x["cpus"] == HALVES[x["LOCAL_RANK"]]
            assert x["OMP_NUM_THREADS"] == len(HALVES[0])
            assert x["module"] == "flame.train"
            assert x["argv"] == [str(flag) for flag in flags]


def test_a_mixture_is_refused_before_anything_starts(fake, tmp_path):
    flags = ["--job.dump_folder", tmp_path / "run"]
    env = {"HIP_VISIBLE_DEVICES": "3,4", "NGPU": "2", "MASTER_PORT": free_port()}
    assert (
        f"run HIP_VISIBLE_DEVICES=0,1 MASTER_PORT={env['MASTER_PORT']} NGPU=2 bash train.sh "
        f"--job.dump_folder {tmp_path / 'run'} or HIP_VISIBLE_DEVICES=4,5 "
        in error_of(start(fake, flags, **env))
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NGPU": "0"}, "NGPU must be a positive integer, got '0'"),
        ({"NNODE": "x"}, "NNODE must be a positive integer, got 'x'"),
        ({"NODE_RANK": "1"}, "NODE_RANK must be below NNODE=1, got 1"),
        (
            {"PET_NNODES": "2"},
            "PET_NNODES=2: torchrun would read this instead of what train.sh",
        ),
        ({"NNODE": "2"}, "MASTER_ADDR must be set for NNODE=2, the same on every machine"),
        ({"NNODE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT must be set for NNODE=2"),
        (
            {"NNODE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "NODE_RANK must be set for NNODE=2: 0 to 1, one each",
        ),
    ],
)
def test_variables_that_are_wrong(monkeypatch, capsys, env, words):
    from flame import launch

    for name in ("NGPU", "NNODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.sh"])
    with pytest.raises(SystemExit):
        launch.main()
    assert words in capsys.readouterr().err


def test_more_processes_than_cores_are_told(monkeypatch, capsys, tmp_path):
    from flame import launch

    started = []
    for name in ("NGPU", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", launch.LAUNCHER_PID):
        # set, so that what `main` sets is taken back
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(launch.placement, "bind_processes", lambda **_: [])
    monkeypatch.setattr(launch, "_run", started.append)
    monkeypatch.setattr(sys, "argv", ["train.sh", "--job.dump_folder", str(tmp_path / "run")])
    launch.main()
    assert "NGPU=2 processes share 1 CPU core and wait for one another" in capsys.readouterr().out
    assert started[0][:1] == ["--nproc-per-node=2"]


def test_machines_that_do_not_meet(monkeypatch, capsys, tmp_path):
    from flame import launch

    env = {"NNODE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch, "RENDEZVOUS_TIMEOUT_S", 1)
    monkeypatch.setattr(sys, "argv", ["train.sh", "--job.dump_folder", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        launch.main()
    assert stop.value.code == 2
    place = f"127.0.0.1:{env['MASTER_PORT']}"
    assert f"error: the 2 machines (NNODE) did not meet at {place}" in capsys.readouterr().err


def test_the_first_failure_is_named_when_the_clock_is_set_back(monkeypatch, capsys):
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from flame import launch

    # torchrun ended the second with SIGTERM after the first was killed
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="none")
        for rank, code in ((0, -signal.SIGKILL), (1, 128 + signal.SIGTERM))
    }
    failures[1].timestamp = failures[0].timestamp - 1

    def run(args):
        raise ChildFailedError("flame.train", failures)

    monkeypatch.setattr(torchrun, "run", run)
    with pytest.raises(SystemExit) as ended:
        launch._run(["--nproc-per-node=2", "-m", "flame.train"])
    assert ended.value.code == 128 + signal.SIGKILL
    assert "flame: error: SIGKILL killed rank 0" in capsys.readouterr().err


def test_a_port_is_one_runs(tmp_path):
    number = int(free_port())
    claimed = master_port.reserve_port(number)
    with pytest.raises(UsageError, match=f"got {number}: the run of pid {os.getpid()} on "):
        master_port.reserve_port(number)
    claimed.close()
    # a claim dies with its process
    code = f"from flame.machine import master_port; claimed = master_port.reserve_port({number}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with pytest.raises(UsageError, match=f"the run of pid {process.pid} on "):
            master_port.reserve_port(number)
        process.kill()
    master_port.reserve_port(number).close()
    with socket.socket() as other:
        other.bind(("", number))
        other.listen()
        with pytest.raises(
            UsageError, match=f"got {number}: Address already in use; [0-9]+ is free"
        ):
            master_port.reserve_port(number)
    with pytest.raises(UsageError, match="at most 65535, got 70000"):
        master_port.reserve_port(70000)


def test_a_folder_is_free_when_its_run_ends(tmp_path, monkeypatch):
    folder_lock.wait_until_free(tmp_path / "none")
    lock = folder_lock.lock_folder(tmp_path)
    monkeypatch.setattr(folder_lock, "WAIT_S", 0)
    with pytest.raises(UsageError, match=f"in use by another run .pid {os.getpid()} on "):
        folder_lock.wait_until_free(tmp_path)
    monkeypatch.setattr(folder_lock, "WAIT_S", 30)
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: lock.close())
    folder_lock.wait_until_free(tmp_path)


def test_memory_is_bound(tmp_path):
    code = """
    from pathlib import Path
    from flame.machine.bind_and_train import bind_memory
    bind_memory(frozenset({0}))
    block = bytearray(1 << 26)
    print("bind:0" in Path("/proc/self/numa_maps").read_text())
    try:
        bind_memory(frozenset({1000}))
    except OSError as error:
        print(error.strerror)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    if "Operation not permitted" in run.stderr:
        pytest.skip("this container may not bind memory")
    assert run.stdout.splitlines() == ["True", "Invalid argument"], run.stderr
