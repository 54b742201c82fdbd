"""The trainer on streamed, mixed and packed documents: stopped with its workers, continued elsewhere."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from forked_runs import Run
from small_model import write_model
from test_trainer import FLAGS, ROOT, STEPS, command, curve, environment, train, wait_for

from flame.config import parse_args
from flame.errors import UsageError
from flame.run_folder import identity
from flame.train import read_inputs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small run on two sources, packed, with workers."""
    folder = tmp_path_factory.mktemp("small")
    for name, sign in (("times", "*"), ("plus", "+")):
        lines = (json.dumps({"text": f"{i} {sign} {i} is {name} " * (i % 5)}) for i in range(400))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return FLAGS | {
        "model.config": write_model(folder),
        "training.dataset": f"{folder / 'times.jsonl'},{folder / 'plus.jsonl'}",
        "training.data_probs": "0.6,0.4",
        "sample.max_new_tokens": 0,
    }


def test_stopped_with_workers_and_continued_on_two_processes(small, tmp_path):
    flags = small | {"validation.share": 0, "validation.sequences": 8}
    flags |= {"training.context_len": 24, "training.varlen": "True", "training.streaming": "True"}
    workers = {"training.num_workers": 2, "training.prefetch_factor": 1}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[training]\nvarlen = true\nstreaming = true\n")
    flags = {k: v for k, v in flags.items() if v != "True"} | {"job.config_file": recipe}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(flags | {"job.dump_folder": whole})
    with subprocess.Popen(
        command(flags | workers | {"job.dump_folder": stopped}),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for(stopped / "checkpoint" / "step-2" / ".metadata", process)
        # as schedulers do: the workers too, which must not die of it while the run saves
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    assert "SIGTERM after step" in output
    # the group's last process has gone
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    halves = {"job.dump_folder": stopped, "training.batch_size": FLAGS["training.batch_size"] // 2}
    train(flags | workers | halves, processes=2)
    for name in ("loss", "grad_norm", "validation_loss"):
        expected, got = curve(whole, name), curve(stopped, name)
        assert max(got) == STEPS
        for step, value in got.items():
            assert value == pytest.approx(expected[step], rel=1e-5), (name, step)


def test_damaged_shard_of_a_stream_is_one_line_when_it_is_reached(small, tmp_path):
    lines = [json.dumps({"text": f"{i} is a number"}) for i in range(4000)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, "{damaged"]))
    flags = {k: v for k, v in small.items() if k != "training.data_probs"}
    flags |= {"training.dataset": tmp_path / "text.jsonl", "validation.share": 0}
    flags |= {"training.steps": 1000, "metrics.log_freq": 1000}
    flags |= {"training.streaming": True, "job.dump_folder": tmp_path / "run"}
    with Run(flags) as run:
        assert run.wait() == 2, run.output()
    line = run.output().splitlines()[-1]
    assert line.startswith("flame: error: step ")
    assert "text.jsonl': line 4001 is not JSON" in line
    assert "Traceback" not in run.output()
    assert list((tmp_path / "run" / "checkpoint").glob("step-*[0-9]"))


def inputs_of(flags, *more):
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    config = parse_args([*words, *more])
    return config, read_inputs(config)


def test_what_makes_another_run(small, tmp_path):
    def run(flags, *more):
        config, inputs = inputs_of(small | flags, *more)
        return identity(config, model=inputs.model, data=inputs.data.identity, global_batch_size=1)

    def changed(flags, *more):
        other = run(flags, *more)
        return {key for key in {**own, **other} if own.get(key) != other.get(key)}

    own = run({})
    assert not changed({"training.num_workers": 3, "training.prefetch_factor": 4})
    assert changed({"training.data_probs": "0.5,0.5"}) == {"--training.data_probs"}
    assert changed({}, "--training.varlen") == {"--training.varlen"}
    assert "--training.streaming" in changed({"validation.share": 0}, "--training.streaming")
    first, second = small["training.dataset"].split(",")
    copy = tmp_path / "copy.jsonl"
    text = Path(second).read_text()
    copy.write_text(text.replace("plus", "sulp"))
    assert changed({"training.dataset": f"{first},{copy}"}) == {
        "--training.dataset",
        "the checksum of the tokens of source 2 (--training.dataset)",
    }
    # of a stream the sizes alone are known
    stream = {"validation.share": 0}
    own = run(stream, "--training.streaming")
    copy.write_text(text + '\n{"text": "more"}')
    assert changed(stream | {"training.dataset": f"{first},{copy}"}, "--training.streaming") == {
        "--training.dataset",
        "the files of source 2 (--training.dataset)",
    }


def test_reference_operator_is_not_compiled_with_packed_documents(small):
    with pytest.raises(
        UsageError, match=r"--training\.varlen with --training\.compile needs a Triton"
    ):
        inputs_of(small, "--training.varlen", "--training.compile")
