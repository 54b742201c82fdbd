"""What a launch does with AMD's variables, partitions, containers and broken tools, on machines that are folders."""

import os
import re
import shutil
import subprocess
import sys

import machine
import pytest
import torch
from machine import EIGHT, TWO_SOCKETS, numbers, place

from flame.base.errors import UsageError
from flame.machine import list_gpus, numa, placement

UUID = [f"GPU-{machine.unique_id(i):016x}" for i in range(8)]
MODES = {"DPX": 2, "QPX": 4, "CPX": 8}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Makes a machine of 8 AMD GPUs the one that is read, by HIP as well."""

    def build(**kind):
        shutil.rmtree(tmp_path / "machine", ignore_errors=True)
        root = machine.build(tmp_path / "machine", **{"nodes": TWO_SOCKETS, "gpus": EIGHT} | kind)
        monkeypatch.setattr(numa, "ROOT", root)
        monkeypatch.setattr(list_gpus, "addresses", lambda env: machine.hip(root, env))
        return root

    return build


@pytest.mark.parametrize(
    ("env", "gpus"),
    [
        # HIP counts what ROCr leaves
        ({"ROCR": "4,5,6,7", "HIP": "0,1,2,3"}, [4, 5, 6, 7]),
        ({"ROCR": "7,6,5", "HIP": "2,0"}, [5, 7]),
        ({"ROCR": ",".join(UUID[5:])}, [5, 6, 7]),
        ({"ROCR": f"0,{UUID[3]},1", "HIP": f"2,{UUID[3]}"}, [1, 3]),
        # HIP honours CUDA's variable unless it has its own
        ({"CUDA": "6,7"}, [6, 7]),
        ({"ROCR": "4,5", "CUDA": "1"}, [5]),
        ({"CUDA": "6,7", "HIP": "1"}, [1]),
    ],
)
def test_the_variables_mean_what_hip_takes_them_for(build, env, gpus):
    build()
    env = {f"{name}_VISIBLE_DEVICES": value for name, value in env.items()}
    assert [number for number, _ in numbers(place(len(gpus), **env))] == gpus


def test_indices_that_rocr_renumbered_are_refused(build):
    # the user means GPUs 2 and 3, HIP would take 4 and 5
    build()
    both = {"ROCR_VISIBLE_DEVICES": "2,3,4,5", "HIP_VISIBLE_DEVICES": "2,3,4,5"}
    with pytest.raises(UsageError) as error:
        place(2, **both)
    assert str(error.value) == (
        "HIP_VISIBLE_DEVICES names 4 GPUs, of which torch sees 2 (ROCR_VISIBLE_DEVICES=2,3,4,5, "
        "HIP_VISIBLE_DEVICES=2,3,4,5; HIP counts from 0 what ROCR_VISIBLE_DEVICES leaves): name GPUs of this "
        "machine, each once and without spaces"
    )


@pytest.mark.parametrize(
    ("variable", "value", "named", "seen"),
    [
        ("HIP", "0, 1", 2, 1),
        ("CUDA", "0,0", 2, 1),
        ("ROCR", "0,1,8", 3, 2),
        ("ROCR", f"{UUID[0]},GPU-0", 2, 1),
    ],
)
def test_a_name_that_is_no_gpu_is_refused(build, variable, value, named, seen):
    build()
    with pytest.raises(
        UsageError, match=f"{variable}_V.* names {named} GPUs, of which torch sees {seen}"
    ):
        place(1, **{f"{variable}_VISIBLE_DEVICES": value})


@pytest.mark.parametrize("variable", ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"])
def test_how_gpus_are_hidden(build, monkeypatch, variable):
    root = build()
    for value in ("", "-1", "NoDevFiles"):
        assert place(1, **{variable: value}) == place(1, ROCR_VISIBLE_DEVICES=value) == []
    monkeypatch.setattr(list_gpus, "addresses", lambda env: machine.hip(root, env, old=True))
    assert place(1, **{variable: "-1"}) == []
    with pytest.raises(UsageError, match=f"{variable} must not be empty: .* set {variable}=-1"):
        place(1, **{variable: ""})


def test_an_empty_variable_that_hip_does_not_read(build):
    build()
    with pytest.raises(UsageError, match="no GPU with HIP_V.*=9, CUDA_V.*HIP_V.*=-1 to train on"):
        place(1, HIP_VISIBLE_DEVICES="9", CUDA_VISIBLE_DEVICES="")
    assert numbers(place(1, HIP_VISIBLE_DEVICES="6", CUDA_VISIBLE_DEVICES="")) == [(6, "B")]


def test_a_proposal_counts_what_rocr_leaves(build):
    build()
    with pytest.raises(UsageError, match="mixes NUMA groups") as error:
        place(4, ROCR_VISIBLE_DEVICES="2,3,4,5")
    commands = re.findall(r"((?:\w+=\S+ )+)bash train.sh", str(error.value))
    chosen = []
    for command in commands:
        env = dict(word.split("=") for word in command.split())
        chosen.append([number for number, _ in numbers(place(int(env.pop("NGPU")), **env))])
    assert chosen == [[2, 3], [4, 5]]


@pytest.mark.parametrize("mode", MODES)
def test_partitions_of_one_gpu_are_not_a_group_of_gpus(build, mode, caplog):
    parts = MODES[mode]
    build(mode=(mode, "NPS1"))
    with pytest.raises(UsageError) as error:
        place(4, "0,1,2,3")
    num_gpus = max(1, 4 // parts)
    assert str(error.value) == (
        f"NGPU=4 with HIP_VISIBLE_DEVICES=0,1,2,3 takes 4 devices of {num_gpus} GPU{'s' if num_gpus > 1 else ''}: "
        f"{4 // num_gpus} are partitions of the GPU at 0000:01:00.0 (mode {mode}, NPS1). Make the GPUs whole again "
        "with amd-smi set --gpu all --compute-partition SPX, choose one partition of each GPU with "
        f"HIP_VISIBLE_DEVICES (the first of each: {','.join(str(i * parts) for i in range(8))}), or give "
        "--job.allow_cross_numa to train on partitions"
    )
    with pytest.raises(UsageError, match="NGPU=2 with no HIP_VISIBLE_DEVICES takes 2 devices of 1"):
        place(2)
    assert not caplog.records
    # one partition, and one of each GPU of a group, are what they seem to be
    assert numbers(place(1, str(5 * parts))) == [(5, "B")]
    assert f"a partition, not a whole GPU, of 0000:06:00.0 ({mode})" in caplog.text
    first = ",".join(str(i * parts) for i in range(4, 8))
    assert numbers(place(4, first)) == [(i, "B") for i in range(4, 8)]
    # half of the node
    places = place(4 * parts, ",".join(str(i) for i in range(4 * parts)), allow=True)
    assert numbers(places) == [(i // parts, "A") for i in range(4 * parts)]
    assert placement.threads(places) == 24 // parts


def test_whole_gpus_are_not_called_partitions(build, caplog):
    build()
    assert len(place(4)) == 4
    assert "partition" not in caplog.text


def test_gpus_in_nps4_are_made_whole_memory_first(build):
    build(mode=("CPX", "NPS4"))
    with pytest.raises(
        UsageError,
        match="CPX, NPS4.*--memory-partition NPS1 and amd-smi set --gpu all --compute-partition",
    ):
        place(2)


def test_groups_of_partitions(build):
    # four nodes a socket, with two GPUs of the first and two of the third
    nodes = [(n // 4, f"{24 * n}-{24 * n + 23}") for n in range(8)]
    build(nodes=nodes, gpus=[0, 0, 2, 2, 4, 4, 6, 6], mode=("CPX", "NPS4"))
    places = place(4, "0,8,16,24")
    assert numbers(places) == [(i, "A") for i in range(4)]
    assert {p.group.nodes for p in places} == {frozenset(range(4))}
    with pytest.raises(UsageError, match="mixes NUMA groups") as error:
        place(2, "24,32")
    assert "GPU 24-31 in group A (GPU 0-31, NUMA node 0-3), GPU 32-39 in group B" in str(
        error.value
    )
    assert "run HIP_VISIBLE_DEVICES=0,8 NGPU=2 bash" in str(error.value)
    assert " or HIP_VISIBLE_DEVICES=32,40 NGPU=2 bash" in str(error.value)


def test_a_container_of_some_gpus_has_their_indices(build):
    # /dev/dri/renderD129 and renderD131; /sys lists all eight
    root = build(shown=(1, 3))
    assert len(list((root / "sys/bus/pci/devices").iterdir())) == 8
    assert numbers(place(2)) == [(1, "A"), (3, "A")]
    assert numbers(place(1, "1")) == [(3, "A")]
    with pytest.raises(UsageError, match="NGPU=3 must be at most the number of visible GPUs, 2"):
        place(3)
    with pytest.raises(UsageError, match="torch sees no GPU with HIP_VISIBLE_DEVICES=3: name GPUs"):
        place(1, "3")


def test_a_proposal_in_a_container_has_its_indices(build):
    build(shown=(1, 3, 4, 6))
    with pytest.raises(UsageError, match=r"GPU 0-1 in group A .*GPU 2-3 in group B .*=2,3 NGPU=2"):
        place(4)
    assert numbers(place(2, "2,3")) == [(4, "B"), (6, "B")]


def test_a_container_of_partitions(build):
    # /dev/dri/renderD128 and renderD129
    build(shown=(0, 1), mode=("CPX", "NPS1"))
    with pytest.raises(UsageError, match=r"2 devices of 1 GPU: .*\(the first of each: 0\)"):
        place(2)


def test_gpus_that_cannot_be_used_do_not_become_a_cpu_run(build, monkeypatch):
    root = build()
    (root / "dev/kfd").unlink()
    missing = r"but the kernel lists 8 AMD GPUs: \S*/dev/kfd does not exist here; a container needs"
    for env in ({}, {"HIP_VISIBLE_DEVICES": "0,1"}):
        with pytest.raises(UsageError, match=missing):
            place(1, **env)
    # which is how to train on the CPU there
    assert place(1, HIP_VISIBLE_DEVICES="-1") == []
    (root / "dev/kfd").touch()
    for file in (root / "dev/dri").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match=r"dev/dri/renderD\* does not exist here"):
        place(1)
    (root / "dev/dri/renderD128").touch()
    monkeypatch.setattr(list_gpus, "addresses", lambda env: [])
    with pytest.raises(UsageError, match="lists 8 AMD GPUs: `rocminfo` may say why; or set HIP_V"):
        place(1)
    # the devices are fine, so the variable is wrong
    with pytest.raises(UsageError, match="no GPU with HIP_VISIBLE_DEVICES=8: name GPUs of this"):
        place(1, "8")
    for name in ("kfd", "dri/renderD128"):
        monkeypatch.setattr(os, "access", lambda path, _, name=name: path != root / "dev" / name)
        with pytest.raises(UsageError, match=f"may not open \\S*/dev/{name}; join its group"):
            place(1)


def test_a_container_that_shows_no_gpu(build):
    build(shown=())
    with pytest.raises(UsageError, match=r"lists 8 AMD GPUs: \S*/dev/dri/renderD\* does not exist"):
        place(1)


def test_a_build_for_another_vendor_warns(build, monkeypatch, caplog):
    build()
    monkeypatch.setattr(list_gpus, "addresses", lambda env: [])
    assert place(1, is_rocm=False) == []
    assert "the kernel lists 8 AMD GPUs, which this build of torch cannot use" in caplog.text
    caplog.clear()
    build(gpus=[])
    assert place(1, is_rocm=False) == place(1) == []
    assert not caplog.text


def test_a_runtime_that_hangs(tmp_path, monkeypatch):
    popen = subprocess.Popen
    killed = []

    class Stuck(popen):
        """In the driver, where it cannot be killed."""

        def kill(self):
            killed.append(self)

        def wait(self, timeout=None):
            assert timeout is not None, "waits for ever"
            return super().wait(timeout)

    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(subprocess, "Popen", Stuck)
    monkeypatch.setattr(list_gpus, "TIMEOUT_S", 0.1)
    with pytest.raises(UsageError, match="did not list the GPUs within 0.1 s: .*`rocminfo`"):
        list_gpus.addresses({})
    (process,) = killed
    popen.kill(process)
    process.communicate(timeout=10)
