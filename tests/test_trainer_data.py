"""The trainer on streamed, mixed and packed documents: stopped with its workers, continued elsewhere."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked_runs import Run, environment, flag_words
from small_model import write_model
from torch.nn.functional import cross_entropy
from trainer_runs import FLAGS, ROOT, STEPS, curve, is_saved, train, wait_for

from flame.base.errors import UsageError
from flame.checkpoints.step_folder import newest_checkpoint
from flame.config.parse import parse_args
from flame.run.fingerprint import fingerprint, require_same_run
from flame.run.inputs import read_inputs, set_precision
from flame.training import memory_estimation
from flame.training.memory_estimation import estimate_memory


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


@pytest.mark.slow
def test_stopped_with_workers_and_continued_on_two_processes(small, tmp_path):
    flags = small | {"validation.share": 0, "validation.sequences": 8}
    flags |= {"training.context_len": 24, "training.varlen": "True", "training.streaming": "True"}
    workers = {"training.num_workers": 2, "training.prefetch_factor": 1}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[training]\nvarlen = true\nstreaming = true\n")
    flags = {k: v for k, v in flags.items() if v != "True"} | {"job.config_file": recipe}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(flags | {"job.dump_folder": whole})
    flags |= {"job.dump_folder": stopped}
    with subprocess.Popen(
        [sys.executable, "-m", "flame.train", *flag_words(flags | workers)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for(is_saved(flags), process)
        # as schedulers do: the workers too, which must not die of it while the run saves
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    assert "SIGTERM after step" in output
    # the group's last process has gone
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    halves = {"training.batch_size": FLAGS["training.batch_size"] // 2}
    train(flags | workers | halves, processes=2)
    for name in ("loss", "grad_norm", "validation_loss"):
        expected, got = curve(whole, name), curve(stopped, name)
        assert max(got) == STEPS
        for step, value in got.items():
            assert value == pytest.approx(expected[step], rel=1e-4), (name, step)


def test_a_damaged_stream_ends_with_a_checkpoint_and_continues_when_it_is_corrected(
    small, tmp_path
):
    file = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{i} is a number"}) for i in range(200)]
    flags = {k: v for k, v in small.items() if k != "training.data_probs"}
    flags |= {"training.dataset": file, "validation.share": 0, "training.streaming": True}
    flags |= {"training.steps": 20, "checkpoint.interval": 8}
    file.write_text("\n".join(lines))
    with Run(flags | {"job.dump_folder": tmp_path / "whole"}) as whole:
        assert whole.wait() == 0, whole.output()
    file.write_text("\n".join([*lines[:125], "{cut", *lines[126:]]))
    flags |= {"job.dump_folder": tmp_path / "run"}
    halves = {"training.batch_size": FLAGS["training.batch_size"] // 2}
    with Run(flags | halves, processes=2) as run:
        assert run.wait() == 2, run.output()
    assert "Traceback" not in run.output()
    errors = [line for line in run.output().splitlines() if line.startswith("flame: error: ")]
    # both processes say the same, at the same step
    assert len(set(errors)) == 1, run.output()
    match = re.fullmatch(
        r"flame: error: step (\d+): --training\.dataset '.*text\.jsonl': line 126 is not JSON \(.*\); "
        r"correct or remove the line; then the same command continues from step-(\d+)",
        errors[0],
    )
    step = int(match[2])
    # what had no multiple of the interval
    assert step == int(match[1]) - 1
    assert step % 8
    assert newest_checkpoint(tmp_path / "run" / "checkpoint").name == f"step-{step}"
    file.write_text("\n".join(lines) + "\n")
    with Run(flags) as run:
        assert run.wait() == 0, run.output()
    expected, got = curve(tmp_path / "whole"), curve(tmp_path / "run")
    assert sorted(got) == sorted(expected) == list(range(1, 21))
    # two processes add gradients in another order, a difference that grows with the steps
    assert got == pytest.approx(expected, rel=1e-4)


def inputs_of(flags, *more):
    config = parse_args([*flag_words(flags), *more])
    return config, read_inputs(config)


def test_what_makes_another_run(small, tmp_path):
    def run(flags, *more):
        config, inputs = inputs_of(small | flags, *more)
        return fingerprint(
            config, model=inputs.model, data=inputs.data.fingerprint, global_batch_size=1
        )

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
    # which files of a stream may change is known to its checkpoints
    stream = {"validation.share": 0, "training.dataset": f"{copy.parent},{second}"}
    own = run(stream, "--training.streaming")
    copy.write_text(text + '\n{"text": "more"}')
    assert not changed(stream | {"training.data_files": "c*,"}, "--training.streaming")
    # with a checkpoint, for a run that saved none is nobody's
    step = tmp_path / "exp" / own["--checkpoint.folder"] / "step-1"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    earlier = own | {
        "--training.data_files": None,
        "the files of source 1 (--training.dataset)": "x",
        # a flag of earlier versions that took this value alone
        "--training.mixed_precision_reduce": "float32",
    }
    (tmp_path / "exp" / "run.json").write_text(json.dumps(earlier))
    require_same_run(tmp_path / "exp", own)
    with pytest.raises(UsageError, match="--training.seed was"):
        require_same_run(tmp_path / "exp", own | {"--training.seed": 1})


def test_memory_is_estimated_of_the_run_that_was_asked_for(small, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def estimate(*more):
        config, inputs = inputs_of(small, "--memory_estimation.enabled", *more)
        set_precision(config)
        return estimate_memory(config, inputs)["Activation"]

    real = "--memory_estimation.disable_fake_mode"
    with pytest.raises(UsageError, match=rf"--training\.varlen with attn_impl naive.*; {real} est"):
        estimate("--training.varlen")
    # bounds and positions, which the plain run does not have
    assert estimate("--training.varlen", real) != estimate(real)
    called = []

    def kernel(hidden, weight, labels):
        called.append(len(labels))
        return cross_entropy(hidden @ weight.T, labels, reduction="sum")

    monkeypatch.setattr(memory_estimation, "linear_loss", lambda *_: kernel)
    with pytest.raises(UsageError, match=rf"--training\.loss cross_entropy is a kernel .*; {real}"):
        estimate()
    estimate(real)
    assert called == [4 * 32] * 2


def test_reference_operator_is_not_compiled_with_packed_documents(small):
    with pytest.raises(
        UsageError, match=r"--training\.varlen with --training\.compile needs a Triton"
    ):
        inputs_of(small, "--training.varlen", "--training.compile")
