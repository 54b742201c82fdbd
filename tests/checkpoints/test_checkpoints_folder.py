"""Folders of checkpoints: written whole, deleted, never written over."""

import errno
import os
import resource

import pytest

from flame.checkpoints.step_folder import (
    AtomicWriter,
    complete_checkpoints,
    is_complete,
    purge,
    remove_leftovers,
    step_of,
)


def test_copies_in_pinned_memory_are_kept_and_renewed(monkeypatch):
    import torch

    from flame.checkpoints.checkpointer import _Stager

    # which only a GPU's driver can pin
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    stager = _Stager(cache_staged_state_dict=True, others=("dataloader",))
    weight, buffer = torch.ones(3), [1]
    state = {"w": weight, "optimizer": {"step": torch.tensor(1)}, "dataloader": {"buffer": buffer}}
    first = stager.stage(state)
    weight += 1
    buffer += [2, 3]
    assert first["w"].tolist() == [1, 1, 1]
    assert first["dataloader"]["buffer"] == [1]
    second = stager.stage(state)
    assert second["w"] is first["w"]
    assert second["w"].tolist() == [2, 2, 2]
    assert second["optimizer"]["step"] == 1
    assert second["dataloader"]["buffer"] == [1, 2, 3]


def _checkpoint(folder, name, *, complete=True):
    (folder / name).mkdir(parents=True)
    (folder / name / "__0_0.distcp").touch()
    if complete:
        (folder / name / ".metadata").touch()


def test_what_is_purged(tmp_path):
    for step in (0, 2, 10, 4):
        _checkpoint(tmp_path, f"step-{step}")
    _checkpoint(tmp_path, "step-12.saving")
    _checkpoint(tmp_path, "step-11", complete=False)
    _checkpoint(tmp_path, "step-best")
    purge(tmp_path, 0)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [0, 2, 4, 10]
    purge(tmp_path, 2)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [4, 10]
    # a save under way is not touched
    assert (tmp_path / "step-12.saving").exists()
    _checkpoint(tmp_path, "step-2.deleting")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-4", "step-best"]


def test_links_are_deleted_and_not_what_they_lead_to(tmp_path):
    folder, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    folder.mkdir()
    _checkpoint(elsewhere, "old")
    _checkpoint(elsewhere, "half", complete=False)
    (folder / "step-1").symlink_to(elsewhere / "old")
    (folder / "step-2").symlink_to(elsewhere / "half")
    (folder / "step-3").symlink_to(tmp_path / "nowhere")
    (folder / "step-4").touch()
    _checkpoint(folder, "step-5")
    remove_leftovers(folder)
    assert sorted(os.listdir(folder)) == ["step-1", "step-5"]
    purge(folder, 1)
    assert os.listdir(folder) == ["step-5"]
    assert sorted(os.listdir(elsewhere)) == ["half", "old"]
    assert is_complete(elsewhere / "old")


def test_a_complete_checkpoint_is_never_written_over(tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    path = tmp_path / "step-1"
    _checkpoint(tmp_path, "step-1", complete=False)
    dcp.save({"x": torch.ones(2)}, storage_writer=AtomicWriter(path), no_dist=True)
    assert (path / "__0_0.distcp").stat().st_size > 0
    with pytest.raises((FileExistsError, CheckpointException), match="complete checkpoint already"):
        dcp.save({"x": torch.zeros(2)}, storage_writer=AtomicWriter(path), no_dist=True)
    loaded = {"x": torch.zeros(2)}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    assert loaded["x"].tolist() == [1, 1]


def test_a_full_disk_is_named_wherever_it_is_hit(tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from flame.checkpoints.step_folder import first_failure

    # objects and tensors; torch writes a tensor as a zip file, which ends with an error of its own
    state = {"x": torch.ones(40_000), "y": "y" * 9000}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(5000, 160_000, 15_000):
        path = tmp_path / f"step-{size}"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(CheckpointException) as error:
                dcp.save(state, storage_writer=AtomicWriter(path), no_dist=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert isinstance(first_failure(error.value), OSError), (size, first_failure(error.value))
        assert first_failure(error.value).errno == errno.EFBIG
        assert not path.exists()
