"""How a run ends that has saved nothing yet, or that this machine cannot carry: by signals, memory, a full disk."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from forked_runs import Run
from small_model import write_model, write_text

from flame.base.errors import UsageError
from flame.config.sections import JobConfig
from flame.run import fingerprint
from flame.run.metrics_file import JsonLines, TensorBoard

ROOT = Path(__file__).parent.parent
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def python(code, **env):
    """A program that has not imported torch, and that is on its way."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gone(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return True
        time.sleep(0.02)
    return False


# what a process of a run does first, and then a wait that nobody ends
CHILD = """
import sys
from flame.base.stop_signals import end_with_launcher
end_with_launcher()
assert "torch" not in sys.modules
sys.stdout.write("waits" + chr(10))
sys.stdout.flush()
import time
time.sleep(60)
"""


@pytest.mark.parametrize(
    "program",
    [
        "train",
        "analyze",
        "convert",
        "generate",
        "lm_eval",
        "sweep",
        "data.prepare",
        "data.train_tokenizer",
    ],
)
def test_an_interrupt_while_python_starts_shows_no_traceback(program):
    # as the launcher starts a process
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", f"flame.{program}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert (process.returncode, output) == (-signal.SIGINT, b"")


def test_the_package_of_two_programs_imports_nothing_slow():
    # it is imported before they take Ctrl-C
    code = "import sys, flame.data; print({'numpy', 'torch', 'transformers'} & set(sys.modules))"
    assert python(code).communicate(timeout=60)[0] == "set()\n"


def test_processes_of_the_launcher_start_with_sigint_blocked():
    code = """
        import signal, subprocess, sys
        from flame.launch import _passing_signals_on
        program = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        with _passing_signals_on():
            subprocess.run([sys.executable, "-c", program])
        subprocess.run([sys.executable, "-c", program])
    """
    blocked, free = python(code).communicate(timeout=60)[0].splitlines()
    assert "SIGINT" in blocked
    assert "SIGINT" not in free


def test_a_process_ends_with_a_launcher_that_is_killed():
    code = """
    import os, subprocess, sys
    from flame.base.stop_signals import LAUNCHER_PID
    env = os.environ | {"TORCHELASTIC_RUN_ID": "x", LAUNCHER_PID: str(os.getpid())}
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=env, stdout=subprocess.PIPE, text=True)
    print(child.pid, child.stdout.readline(), flush=True)
    child.wait()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), CHILD],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        pid, word = launcher.stdout.readline().split()
        assert word == "waits"
        launcher.kill()
        assert gone(pid)


def test_a_process_whose_launcher_is_gone_ends_before_it_imports_torch():
    # the launcher was killed while the process was started
    module = [sys.executable, "-X", "importtime", "-m", "flame.train"]
    env = os.environ | {"TORCHELASTIC_RUN_ID": "x", "FLAME_LAUNCHER_PID": "999999999"}
    run = subprocess.run(module, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert run.returncode == -signal.SIGTERM
    assert "the launcher (pid 999999999) is gone" in run.stderr
    assert "| torch" not in run.stderr


def test_a_launcher_that_waits_in_c_hears_signals():
    # as torchrun waits for the other machines
    code = """
    import ctypes
    from flame import launch
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    with launch._passing_signals_on():
        print("waits", flush=True)
        # the second time for ever, whatever signals come
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    """
    with python(code) as launcher:
        assert launcher.stdout.readline() == "waits\n"
        launcher.terminate()
        assert launcher.wait(10) == 128 + signal.SIGTERM


def test_signals_reach_the_processes_while_they_are_passed_on():
    code = """
    import subprocess, sys
    from flame import launch
    with launch._passing_signals_on():
        child = subprocess.Popen(["sleep", "60"])
        print("waits", flush=True)
        print(child.wait(), flush=True)
    """
    with python(code) as launcher:
        launcher.stdout.readline()
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.communicate(timeout=10)[0] == f"{-signal.SIGUSR1}\n"
        assert launcher.returncode == 0


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_model(folder, normalizer="softmax")
    return {
        "training.steps": 4,
        "training.batch_size": 4,
        "training.seq_len": 32,
        "validation.share": 0.0,
        "checkpoint.interval": 2,
        "metrics.log_freq": 1,
        "sample.max_new_tokens": 0,
        "lr_scheduler.warmup_steps": 2,
        "model.config": write_model(folder),
        "training.dataset": write_text(folder),
    }


def _first_step_hangs(folder):
    from flame.training.trainer import FlameTrainer

    def hang(self, data_iterator):
        (folder / "hangs").touch()
        time.sleep(60)

    FlameTrainer.train_step = hang


def _memory_runs_out():
    import torch

    from flame.training.trainer import FlameTrainer

    def forward(self, **_):
        torch.empty(2**50)

    FlameTrainer.forward_backward_step = forward


def test_a_folder_in_which_nothing_was_saved_is_nobodys(flags, tmp_path):
    folder = tmp_path / "run"
    flags = flags | {"job.dump_folder": folder}
    # SIGTERM in the first step ends at once: there is nothing to save
    with Run(flags, tamper=partial(_first_step_hangs, tmp_path)) as run:
        run.wait_for((tmp_path / "hangs").exists)
        run.send(signal.SIGTERM)
        assert run.wait(timeout=10) == -signal.SIGTERM
    # another configuration takes the folder over, and ends for want of memory
    with Run(flags | {"training.batch_size": 6}, tamper=_memory_runs_out) as run:
        assert run.wait() == 1
    assert f"{folder} holds another run, which saved nothing: replacing it" in run.output()
    *_, line = run.output().splitlines()
    assert line.startswith("flame: error: rank 0: memory ran out (")
    assert (
        "with --training.batch_size 6, --training.seq_len 32: lower --training.batch_size" in line
    )
    assert "Traceback" not in run.output()
    # and a third one ends well, with a record of itself alone
    with Run(flags) as run:
        assert run.wait() == 0
    assert [x.name for x in (folder / "record").glob("*.json")] == ["001.json"]
    # what was saved is somebody's
    with Run(flags | {"training.batch_size": 6}) as run:
        assert run.wait() == 2
    assert "holds another run" in run.output().splitlines()[-1]


def _disk_fills_up(step):
    write = JsonLines.write

    def write_until_full(self, scalars, number):
        if number == step:
            self.stream.close()
            self.stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        write(self, scalars, number)

    JsonLines.write = write_until_full


def test_a_disk_that_fills_up_is_one_line_and_the_run_continues(flags, tmp_path):
    flags = flags | {"checkpoint.async_mode": "disabled"}
    with Run(
        flags | {"job.dump_folder": tmp_path / "run"}, tamper=partial(_disk_fills_up, 3)
    ) as run:
        assert run.wait() == 2
    *_, line = run.output().splitlines()
    assert line == (
        f"flame: error: --job.dump_folder {tmp_path / 'run'} cannot be written: No space left on device; "
        "make room, and the same command continues from step-2"
    )
    assert "Traceback" not in run.output()
    with Run(flags | {"job.dump_folder": tmp_path / "run"}) as run:
        assert run.wait() == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2, 3, 4]


def test_curves_on_a_full_disk_are_told_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    curves = TensorBoard(tmp_path, 0)

    def write():
        for step in range(1000):
            curves.write({"loss": 1.0}, step)
        curves.close()

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == ""


def test_a_log_on_a_full_disk_is_one_line():
    code = """
    from flame.base.errors import exit_on_usage_error
    from flame.base.log import init_logger, logger
    init_logger()
    with exit_on_usage_error():
        logger.info("a line")
    """
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    error = "flame: error: standard output cannot be written: No space left on device\n"
    assert (run.returncode, run.stderr) == (2, error)


def test_whose_folder_it_is(tmp_path):
    folder, config = tmp_path / "run", JobConfig()
    config.job.dump_folder = str(folder)
    run = {"--checkpoint.enable_checkpoint": True, "--checkpoint.folder": "checkpoint", "a": 1}
    fingerprint.claim_run_folder(config, run).close()
    for name in ("record", "tb"):
        (folder / name).mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "notes.txt").touch()
    # the same run again
    fingerprint.claim_run_folder(config, run).close()
    assert (folder / "record").exists()
    fingerprint.claim_run_folder(config, run | {"a": 2}).close()
    left = {path.name for path in folder.iterdir()}
    assert left == {"run.json", "config.toml", "lock", "notes.txt"}
    # a run without checkpoints has its metrics as its result
    run |= {"--checkpoint.enable_checkpoint": False}
    fingerprint.claim_run_folder(config, run).close()
    with pytest.raises(UsageError, match="a was 1, is now 3"):
        fingerprint.claim_run_folder(config, run | {"a": 3})
    shutil.rmtree(folder)
    run |= {"--checkpoint.enable_checkpoint": True}
    fingerprint.claim_run_folder(config, run).close()
    (folder / "hf").mkdir()
    with pytest.raises(UsageError, match="a was 1, is now 4"):
        fingerprint.claim_run_folder(config, run | {"a": 4})


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"},
            "the environment has RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=23456, but no LOCAL_RANK; "
            "unset RANK, WORLD_SIZE for a run of one process, or start",
        ),
        (
            {"WORLD_SIZE": "4"},
            "has WORLD_SIZE=4, but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
        ),
        (
            dict.fromkeys(GROUP, "1"),
            "RANK must be at least LOCAL_RANK and below WORLD_SIZE, got RANK=1 LOCAL_RANK=1 WORLD_SIZE=1",
        ),
        (dict.fromkeys(GROUP, "x"), "RANK must be an integer of at least 0, got 'x'"),
    ],
)
def test_a_part_of_a_group_is_refused(env, words, monkeypatch):
    from flame.train import _join_group

    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(words)):
        _join_group()
