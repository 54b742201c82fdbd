"""What a run starts from: a seed, another run, a damaged checkpoint; and what it exports."""

import json
import os
import shutil
import signal
from functools import partial

import pytest
from checkpoint_runs import STEPS, curve, die, slow, steps, train
from forked_runs import Run

from flame.checkpoints.step_folder import (
    has_weights_only,
    read_contents,
)


def test_weights_only_at_the_end(flags, tmp_path):
    flags = flags | {
        "checkpoint.last_save_model_weights_only": True,
        "checkpoint.export_dtype": "bfloat16",
        "checkpoint.keep_latest_k": 1,
    }
    # the signal's checkpoint is a full one
    with Run(flags | {"job.dump_folder": tmp_path / "run"}, pace=0.05) as run:
        run.wait_for_step(4)
        run.send(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    train(flags, tmp_path / "run")
    assert steps(tmp_path / "run") == [STEPS]
    assert has_weights_only(read_contents(tmp_path / "run" / "checkpoint" / f"step-{STEPS}"))
    exported = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert exported["dtype"] == "bfloat16"
    assert "is done already" in train(flags, tmp_path / "run").output()
    longer = train(flags | {"training.steps": 20}, tmp_path / "run", code=2)
    assert "--training.steps 20" in longer.output()
    assert "holds weights only" in longer.output()


def test_arms_start_from_one_seed_checkpoint(flags, whole, seed, tmp_path):
    path = seed.folder / "checkpoint" / "step-0"
    assert f"--checkpoint.initial_load_path {path}" in seed.output()
    assert os.listdir(path.parent) == ["step-0"]
    again = train(flags | {"checkpoint.create_seed_checkpoint": True}, seed.folder, code=2)
    assert "step-0 exists already" in again.output()
    start = {
        "checkpoint.initial_load_path": path,
        "training.steps": 1,
        "checkpoint.convert_to_hf_on_save": True,
    }
    other = {"model.config": flags["model.config"].with_name("softmax_small.json")}
    softpick = train(flags | start, tmp_path / "softpick")
    train(flags | start | other, tmp_path / "softmax")
    assert curve(softpick.folder)[1] == curve(whole.folder)[1]
    assert curve(tmp_path / "softmax")[1] != curve(whole.folder)[1]
    exported = tmp_path / "softmax" / "checkpoint" / "step-1" / "hf" / "config.json"
    assert json.loads(exported.read_text())["attn_impl"] == "naive_softmax_attn"


def test_all_of_another_run_but_what_is_excluded(flags, whole, tmp_path):
    path = whole.folder / "checkpoint" / "step-9"
    start = {
        "checkpoint.initial_load_path": path,
        "checkpoint.initial_load_model_weights_only": False,
    }
    branch = train(flags | start, tmp_path / "branch")
    assert curve(branch.folder) == {x: y for x, y in curve(whole.folder).items() if x > 9}
    assert branch.drawn() == {x: y for x, y in whole.drawn().items() if x > 9}
    anew = start | {"checkpoint.exclude_from_loading": "train_state,lr_scheduler,dataloader"}
    # killed before it has a checkpoint of its own, it starts from the other again
    with Run(
        flags | anew | {"job.dump_folder": tmp_path / "anew"}, tamper=partial(die, "metadata", 3)
    ) as run:
        assert run.wait() == -signal.SIGKILL
    anew = train(flags | anew, tmp_path / "anew")
    got = curve(anew.folder)
    assert list(got) == list(range(1, STEPS + 1))
    assert got[1] < curve(whole.folder)[1] - 0.5
    assert curve(anew.folder, "lr")[1] == curve(whole.folder, "lr")[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"initial_load_path": "/nowhere"}, ["/nowhere is not a checkpoint", "step-N"]),
        ({"initial_load_path": "{run}/checkpoint"}, ["name a checkpoint in it", "step-12"]),
        ({"initial_load_path": "{run}/hf"}, ["flame.convert hf-to-dcp --model"]),
        ({"initial_load_path": "{run}/checkpoint/step-9"}, ["embed_tokens.weight must have the shape [259, 128], got [259, 32]"]),
        ({"async_mode": "async_with_pinned_mem"}, ["for GPUs"]),
        ({"create_seed_checkpoint": True}, ["takes one process, got 2"]),
    ],
)  # fmt: skip
def test_a_wrong_start_is_refused(whole, tmp_path, monkeypatch, changed, words):
    from flame.base.errors import UsageError
    from flame.checkpoints.checkpointer import check_start
    from flame.config.parse import parse_args
    from flame.models import read_config

    monkeypatch.setenv("WORLD_SIZE", "2")
    config = parse_args([f"--job.dump_folder={tmp_path / 'new'}"])
    for name, value in changed.items():
        value = value.format(run=whole.folder) if isinstance(value, str) else value
        setattr(config.checkpoint, name, value)
    with pytest.raises(UsageError) as error:
        check_start(config, read_config(config.model.config), "cpu")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_start_that_is_over_is_refused(flags, whole, tmp_path):
    initial = whole.folder / "checkpoint" / f"step-{STEPS}"
    start = {
        "checkpoint.initial_load_path": initial,
        "checkpoint.initial_load_model_weights_only": False,
    }
    run = train(flags | start, tmp_path / "over", code=2)
    error = f"--training.steps {STEPS} must be more than the {STEPS} that"
    assert error in run.output().splitlines()[-1]
    assert not run.folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty", marks=slow),
        pytest.param(b"junk", id="junk", marks=slow),
        pytest.param(None, id="cut"),
    ],
)
def test_damaged_metadata_is_one_line_that_says_what_to_do(flags, whole, tmp_path, damage):
    shutil.copytree(whole.folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint" / f"step-{STEPS}"
    file = newest / ".metadata"
    file.write_bytes(file.read_bytes()[:100] if damage is None else damage)
    run = train(flags, tmp_path / "run", code=2)
    line = run.output().splitlines()[-1]
    assert line.startswith(f"flame: error: checkpoint {newest} is damaged: its .metadata")
    assert line.endswith("delete the folder, or copy it again")
    shutil.rmtree(newest)
    train(flags, tmp_path / "run")
    assert curve(tmp_path / "run") == curve(whole.folder)


def test_damaged_data_is_one_line_that_says_what_to_do(flags, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint" / f"step-{STEPS}"
    os.truncate(next(newest.glob("*.distcp")), 100)
    line = train(flags, tmp_path / "run", code=2).output().splitlines()[-1]
    assert line.startswith(f"flame: error: checkpoint {newest} cannot be loaded (EOFError")
    assert line.endswith("if it is damaged, delete the folder, or copy it again")


def test_a_file_in_the_place_of_the_checkpoints_is_refused(flags, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / "checkpoint").touch()
    line = train(flags, tmp_path / "run", code=2).output().splitlines()[-1]
    assert line.endswith("checkpoint is a file; move it away")


@pytest.mark.parametrize("kind", ["link", pytest.param("file", marks=slow)])
def test_an_export_replaces_what_has_its_name(flags, whole, tmp_path, kind):
    shutil.copytree(whole.folder, tmp_path / "run")
    hf = tmp_path / "run" / "hf"
    hf.rename(tmp_path / "elsewhere")
    if kind == "link":
        hf.symlink_to(tmp_path / "elsewhere")
    else:
        hf.touch()
    train(flags, tmp_path / "run")
    assert (hf / "model.safetensors").is_file()
    assert not hf.is_symlink()
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert not list((tmp_path / "run").glob("hf.*"))


def test_weights_that_are_not_finite_write_no_sample(flags, tmp_path):
    # 0 / 0 in Adam's step, whose own loss is that of before
    broken = {"optimizer.eps": 0.0, "optimizer.beta2": 0.0, "optimizer.lr": 1e-300}
    flags = flags | broken | {"training.steps": 1, "sample.max_new_tokens": 3}
    line = train(flags, tmp_path / "run", code=2).output().splitlines()[-1]
    assert line.startswith(f"flame: error: the model in {tmp_path / 'run' / 'hf'} cannot be used: ")
    assert line.endswith("is not finite")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint.exclude_from_loading=model"], r"some of optimizer, lr_scheduler"),
        (["--checkpoint.exclude_from_loading=rng"], r"no_initial_load_model_weights_only"),
        (
            [
                "--checkpoint.initial_load_path=x",
                "--checkpoint.no_initial_load_model_weights_only",
                "--checkpoint.exclude_from_loading=train_state",
            ],
            "lr_scheduler together with train_state",
        ),
        (["--checkpoint.async_mode=fast"], r"--checkpoint\.async_mode"),
        (["--checkpoint.no_enable_checkpoint", "--checkpoint.initial_load_path=x"], "left out"),
        (["--checkpoint.no_enable_checkpoint", "--checkpoint.create_seed_checkpoint"], "left out"),
    ],
)
def test_a_wrong_flag_is_refused(argv, message):
    from flame.base.errors import UsageError
    from flame.config.parse import parse_args

    with pytest.raises(UsageError, match=message):
        parse_args(argv)
