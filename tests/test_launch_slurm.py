"""`scripts/slurm.sh`, with stand-ins for Slurm's commands and for `python`."""

import contextlib
import os
import signal
import subprocess
import textwrap
import time

import pytest
from test_launch import ROOT, script

# srun starts the tasks of two machines and waits; scancel sends the signal to tasks, as Slurm does
SLURM = {
    "srun": """
        echo "srun $*" >> "$TEST_LOG"
        trap 'echo "srun got a signal" >> "$TEST_LOG"' TERM USR1
        while [[ "$1" == --* ]]; do shift; done
        for SLURM_NODEID in 0 1; do SLURM_NODEID=$SLURM_NODEID "$@" & echo $! >> "$TEST_LOG.tasks"; done
        code=0
        for task in $(cat "$TEST_LOG.tasks"); do wait "$task" || code=$?; done
        exit "$code"
    """,
    "scontrol": """
        [ "$1" = requeue ] && { echo "scontrol $*" >> "$TEST_LOG"; exit "${TEST_REQUEUE:-0}"; }
        [ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf 'n1\\nn2\\n'
    """,
    "scancel": """
        echo "scancel $*" >> "$TEST_LOG"
        [ "$1" = --signal=TERM ] && kill -TERM $(cat "$TEST_LOG.tasks")
    """,
    "python": """
        echo "python $NODE_RANK of $NNODE x $NGPU at $MASTER_ADDR:$MASTER_PORT $*" >> "$TEST_LOG"
        [ "$TEST_CODE" = save ] || exit "$TEST_CODE"
        trap 'exit 143' TERM
        while true; do sleep 0.05; done
    """,
}


@pytest.fixture
def sbatch(tmp_path):
    for name, text in SLURM.items():
        script(tmp_path / name, "#!/usr/bin/env bash\n" + textwrap.dedent(text))
    env = {k: v for k, v in os.environ.items() if k not in ("MASTER_PORT", "NGPU", "NODE_RANK")}
    env |= {"PATH": f"{tmp_path}{os.pathsep}{env['PATH']}", "TEST_LOG": str(tmp_path / "log")}
    env |= {"SLURM_JOB_ID": "1234567", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2"}
    env |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4"}

    def sbatch(*flags, stop=False, **more):
        job = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "slurm.sh"), *flags],
            env={k: v for k, v in (env | more).items() if v},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            if stop:
                deadline = time.monotonic() + 30
                while log(tmp_path).count("python") < 2:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                # bash may not have set the trap of its `python` yet
                time.sleep(0.3)
                job.send_signal(signal.SIGUSR1)
            output = job.communicate(timeout=30)[0]
        finally:
            # the tasks too, which a broken script leaves behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
        return job.returncode, output, log(tmp_path)

    return sbatch


def log(folder):
    file = folder / "log"
    return file.read_text() if file.exists() else ""


def test_slurm_starts_a_task_on_each_machine(sbatch):
    code, _, log = sbatch("--job.description", "two words", TEST_CODE="0")
    assert code == 0
    assert "--ntasks-per-node=1" in log
    for rank in (0, 1):
        # 20000 + the last digits of the job's number
        expected = f"python {rank} of 2 x 4 at n1:24567 -m flame.launch --job.description two words"
        assert expected in log.splitlines()
    assert "requeue" not in log
    code, _, log = sbatch(TEST_CODE="2")
    assert code == 2
    assert "requeue" not in log
    code, output, _ = sbatch(SLURM_GPUS_ON_NODE="")
    assert code != 0
    assert "ask for GPUs with --gpus-per-node, or set NGPU" in output


def test_slurm_saves_and_requeues_before_the_time_limit(sbatch):
    code, output, log = sbatch(TEST_CODE="save", stop=True)
    assert code == 143
    assert "scancel --signal=TERM 1234567" in log
    # which would have killed the tasks
    assert "srun got a signal" not in log
    assert "scontrol requeue 1234567" in log
    assert "job 1234567 continues the run" in output


def test_slurm_that_may_not_requeue_tells_how_to_continue(sbatch):
    code, output, _ = sbatch("--training.steps", "9", TEST_CODE="save", TEST_REQUEUE="1", stop=True)
    assert code == 143
    assert "to continue the run: sbatch scripts/slurm.sh --training.steps 9" in output
