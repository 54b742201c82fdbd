"""`bash train.sh` on a CPU: interrupted, killed, refused."""

import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from trainer_runs import is_saved, refused_by_launcher, slow, small_flags, start_launcher, wait_for


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_flags(tmp_path_factory.mktemp("small"))


def test_interrupt_of_the_launcher_saves(small, tmp_path):
    # Ctrl-C reaches the launcher alone: torchrun gives each process a session of its own
    flags = small | {"job.dump_folder": tmp_path / "run", "training.steps": 100000}
    with start_launcher(flags, processes=1) as process:
        wait_for(is_saved(flags), process)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    # of torch and torchtitan, about what is not the user's
    assert "Warning" not in output
    step = output.split("SIGINT after step ")[1].split(":")[0]
    assert (tmp_path / "run" / "checkpoint" / f"step-{step}" / ".metadata").exists()


def _is_importing_torch(pid):
    """Whether this is a process of the run, and has loaded torch's libraries.

    Each child of the launcher shows the launcher's memory and arguments until it runs a program of its own.
    """
    try:
        args = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        is_of_the_run = b"flame.train" in args or b"flame.machine.bind_and_train" in args
        return is_of_the_run and "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@slow
def test_interrupt_before_the_training_ends_at_once_without_a_traceback(small, tmp_path):
    with start_launcher(small | {"job.dump_folder": tmp_path / "run"}) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        # importing torch, so seconds before it trains
        while not any(map(_is_importing_torch, children.read_text().split())):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert "KeyboardInterrupt" not in output
    assert not (tmp_path / "run").exists()


def test_interrupt_of_the_launcher_as_it_starts_shows_no_traceback(small, tmp_path):
    with start_launcher(small | {"job.dump_folder": tmp_path / "run"}) as process:
        deadline = time.monotonic() + 60
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGINT
    (line,) = output.splitlines()
    assert line.endswith("looking at this machine's processors, for which torch is imported")


@slow
def test_killed_process_is_named_and_the_command_continues(small, tmp_path):
    flags = small | {"job.dump_folder": tmp_path / "run", "training.steps": 100000}
    with start_launcher(flags) as process:
        wait_for(is_saved(flags), process)
        # as the kernel does when memory runs out
        os.kill(int((tmp_path / "run" / "lock").read_text().split()[1]), signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGKILL, output
    lines = [line for line in output.splitlines() if line.startswith("flame: error:")]
    assert "flame: error: SIGKILL killed rank 0" in lines[-1]
    assert lines[-1].endswith("the same command continues the run")


@slow
def test_killed_launcher_takes_the_run_with_it(small, tmp_path):
    flags = small | {"job.dump_folder": tmp_path / "run", "training.steps": 100000}
    with start_launcher(flags, processes=1) as process:
        wait_for(is_saved(flags), process)
        process.kill()
    with open(tmp_path / "run" / "lock") as lock:
        deadline = time.monotonic() + 60
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the run outlived its launcher"
                time.sleep(0.1)


@slow
def test_launcher_refuses_a_port_in_use(small, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        line = refused_by_launcher(small | {"job.dump_folder": tmp_path})
    assert f"MASTER_PORT must be a free port, one for each run, got {port}" in line


@slow
def test_launcher_passes_on_the_exit_code_and_one_line(small, tmp_path):
    flags = small | {"job.dump_folder": tmp_path / "run", "training.dataset": "./missing.txt"}
    assert "--training.dataset" in refused_by_launcher(flags)
