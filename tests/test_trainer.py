"""The trainer end to end on a CPU: one process and two, killed and continued, refused and exported."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from forked_runs import Forked, flag_words, program
from trainer_runs import STEPS, curve, is_saved, one_line, slow, small_flags, train
from transformers import AutoModelForCausalLM, AutoTokenizer

import flame.models  # noqa: F401  # teaches transformers the model
from flame.base.errors import UsageError
from flame.config.sections import JobConfig
from flame.run.fingerprint import claim_run_folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_flags(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, train(small | {"job.dump_folder": folder}).stdout


def test_run_learns_and_reports(finished):
    folder, output = finished
    losses = curve(folder)
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.5
    assert list(curve(folder, "validation_loss")) == [4, STEPS]
    for name in ("lr", "grad_norm", "tokens_per_s"):
        assert len(curve(folder, name)) == STEPS
    assert f"step {STEPS}/{STEPS} 100%" in output
    assert "tokens/s" in output
    assert max(len(line) for line in output.splitlines() if "  step " in line) <= 80
    assert "left" in output
    assert f"checkpoint      {folder / 'checkpoint' / f'step-{STEPS}'}" in output
    assert f"exported model  {folder / 'hf'}" in output
    assert "the model writes:\nThe " in output
    assert "softmax_small.json" in output.split("its twin")[1]
    assert "every document begins with <|bos|> (--training.bos tokenizer)" in output
    run = json.loads((folder / "run.json").read_text())
    assert run["--training.bos"] == "tokenizer"
    assert "the sha256 of the tokenizer (--model.tokenizer_path)" in run


def test_old_checkpoints_are_deleted(finished):
    folder, _ = finished
    names = sorted(path.name for path in (folder / "checkpoint").iterdir())
    assert names == [f"step-{STEPS - 2}", f"step-{STEPS}"]


def test_export_is_the_trained_model(finished):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    assert model.config.attn_impl == "naive_softpick_attn"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer("a").input_ids == [tokenizer.bos_token_id, ord("a")]
    card = (folder / "hf" / "README.md").read_text()
    assert f"| training | step {STEPS}, " in card
    assert "| validation loss | " in card
    assert "| command | `" in card
    text = "".join(f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}.\n" for i in range(9))
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert abs(loss - curve(folder)[STEPS]) < 0.5


@slow
def test_repeating_a_finished_command_trains_nothing(finished, small):
    folder, _ = finished
    before = curve(folder)
    train(small | {"job.dump_folder": folder})
    assert curve(folder) == before


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=slow), signal.SIGTERM])
def test_interrupted_and_repeated_gives_the_same_losses(finished, small, tmp_path, how):
    flags = small | {"job.dump_folder": tmp_path / "run"}
    with Forked(program("flame.train", flag_words(flags))) as run:
        run.wait_for(is_saved(flags))
        run.send(how)
        assert run.wait() == (128 + how if how == signal.SIGTERM else -how)
    assert len(list((tmp_path / "run" / "checkpoint").glob("step-*"))) < STEPS
    train(flags)
    expected = curve(finished[0])
    got = curve(tmp_path / "run")
    # a step that a kill kept from TensorBoard was trained before the last checkpoint
    assert got == {step: expected[step] for step in got}
    assert max(got) == STEPS
    assert (
        curve(tmp_path / "run", "validation_loss")[STEPS]
        == curve(finished[0], "validation_loss")[STEPS]
    )


@pytest.fixture(scope="module")
def half_done(small, tmp_path_factory):
    """A run of one process that ended after half of the steps, and the same continued to the end."""
    folder = tmp_path_factory.mktemp("half")
    train(small | {"job.dump_folder": folder / "run", "training.steps": STEPS // 2})
    shutil.copytree(folder / "run", folder / "alone")
    train(small | {"job.dump_folder": folder / "alone"})
    return folder


@slow
@pytest.mark.parametrize("replicas", [1, 2], ids=["fsdp", "ddp"])
def test_two_processes_continue_a_run_of_one(half_done, small, tmp_path, replicas):
    alone = half_done / "alone"
    shutil.copytree(half_done / "run", tmp_path / "run")
    flags = small | {"job.dump_folder": tmp_path / "run"}
    halves = {"training.batch_size": 2, "training.data_parallel_replicate_degree": replicas}
    run = train(flags | halves, processes=2)
    # of torch and torchtitan, about what is not the user's
    assert "Warning" not in run.stderr
    assert list(curve(tmp_path / "run")) == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "validation_loss"):
        expected, got = curve(alone, name), curve(tmp_path / "run", name)
        for step, value in expected.items():
            assert got[step] == pytest.approx(value, rel=1e-5), (name, step)


@slow
def test_accumulated_micro_batches_are_one_batch(finished, small, tmp_path):
    flags = small | {"job.dump_folder": tmp_path / "run"}
    train(flags | {"training.batch_size": 2, "training.gradient_accumulation_steps": 2})
    expected = curve(finished[0])
    for step, value in curve(tmp_path / "run").items():
        assert value == pytest.approx(expected[step], rel=1e-5)


def refused(flags):
    return one_line(train(flags, code=2).stderr)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param({"training.stepz": 3}, ["--training.stepz", "--training.steps"], id="flag"),
        pytest.param(
            {"model.config": "missing.json"},
            ["--model.config", "missing.json", "does not exist"],
            id="config",
        ),
        pytest.param(
            {"training.dataset": "./missing.txt"},
            ["--training.dataset", "missing.txt"],
            id="dataset",
        ),
        pytest.param(
            {"training.seq_len": 500, "validation.share": 0.99},
            ["--training.seq_len 500", "tokens"],
            id="sequence",
        ),
        pytest.param(
            {"model.config": "configs/softpick_transformer_340M.json"},
            ["parallel_softpick_attn", "GPU", "naive_softpick_attn"],
            id="triton",
        ),
        pytest.param(
            {"training.data_parallel_shard_degree": 2},
            ["--training.data_parallel_shard_degree", "1"],
            id="degree",
        ),
        pytest.param(
            {"checkpoint.load_step": 7}, ["--checkpoint.load_step 7", "newest", "none"], id="step"
        ),
        pytest.param(
            {"training.seq_len": 1000},
            ["--training.seq_len 1000", "max_position_embeddings 512"],
            id="positions",
        ),
        pytest.param(
            {"job.dump_folder": "/dev/null/run"},
            ["--job.dump_folder", "/dev/null/run"],
            id="folder",
        ),
    ],
)
def test_a_mistake_ends_before_training(small, tmp_path, flags, words):
    folder = tmp_path / "run"
    line = refused(small | {"job.dump_folder": folder} | flags)
    for word in words:
        assert word in line
    assert not folder.exists()


@slow
def test_folder_of_another_run_is_refused_and_kept(finished, small, tmp_path):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other = {"model.config": small["model.config"].with_name("softmax_small.json")}
    line = refused(small | other | {"job.dump_folder": folder})
    assert "attn_impl was 'naive_softpick_attn', is now 'naive_softmax_attn'" in line
    line = refused(small | {"job.dump_folder": folder, "optimizer.lr": 1})
    assert "--optimizer.lr was 0.003, is now 1.0" in line
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    line = refused(small | {"job.dump_folder": tmp_path / "mine"})
    assert "holds files but no run" in line
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_claimed_folder(tmp_path):
    folder = tmp_path / "run"
    config = JobConfig()
    config.job.dump_folder = str(folder)
    folder.mkdir()
    # what a run leaves that was killed before it wrote its first file
    (folder / "run.json.tmp").write_text("{")
    (folder / "lock").touch()
    lock = claim_run_folder(config, {"a": 1})
    code = (
        f"import fcntl; fcntl.flock(open({str(folder / 'lock')!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    assert (
        "BlockingIOError"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    )
    lock.close()
    claim_run_folder(config, {"a": 1}).close()
    with pytest.raises(UsageError, match="a was 1, is now 2"):
        claim_run_folder(config, {"a": 2})
    for step in (2, 4):
        (folder / "checkpoint" / f"step-{step}").mkdir(parents=True)
        (folder / "checkpoint" / f"step-{step}" / ".metadata").touch()
    config.checkpoint.load_step = 2
    with pytest.raises(UsageError, match=r"load_step 2 must be the newest.*step-4"):
        claim_run_folder(config, {"a": 1})
    config.checkpoint.load_step = 4
    claim_run_folder(config, {"a": 1}).close()
    config.checkpoint.enable_checkpoint = False
    with pytest.raises(UsageError, match="no_enable_checkpoint"):
        claim_run_folder(config, {"a": 1})
    config.job.dump_folder = str(folder / "run.json")
    with pytest.raises(UsageError, match="is a file"):
        claim_run_folder(config, {"a": 1})


@slow
def test_changed_data_is_another_run(finished, small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    changed = tmp_path / "text.txt"
    changed.write_text(small["training.dataset"].read_text().replace("times", "TIMES"))
    (folder / "run.json").write_text(
        (folder / "run.json").read_text().replace(str(small["training.dataset"]), str(changed))
    )
    line = refused(small | {"job.dump_folder": folder, "training.dataset": changed})
    assert "the checksum of the tokens (--training.dataset) was" in line
