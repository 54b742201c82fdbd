"""Who sits where, and what a launch may take, on machines that are folders."""

import json
import os
import sys

import machine
import pytest
import torch
from machine import ALL_CPUS, EIGHT, TWO_SOCKETS, numbers, place

from flame.base.errors import UsageError
from flame.machine import list_gpus, numa, placement
from flame.machine.numa import format_ranges, parse_ranges


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Makes a machine the one that is read, by HIP as well."""

    def build(nodes=TWO_SOCKETS, gpu_nodes=EIGHT):
        root = machine.build(tmp_path, nodes=nodes, gpus=gpu_nodes)
        monkeypatch.setattr(numa, "ROOT", root)
        monkeypatch.setattr(list_gpus, "addresses", lambda env: machine.hip(root, env))
        return root

    return build


@pytest.mark.parametrize("text", ["", "0", "0-3", "0-3,8,10-11", "5,7"])
def test_ranges_of_the_kernel(text):
    assert format_ranges(parse_ranges(text + "\n")) == text
    assert len(parse_ranges("0-3,8")) == 5


def test_each_half_of_the_node_is_a_run(build):
    build()
    for first, name, node, cpus in [(0, "A", 0, "0-47,96-143"), (4, "B", 1, "48-95,144-191")]:
        places = place(4, ",".join(str(first + i) for i in range(4)))
        assert numbers(places) == [(first + i, name) for i in range(4)]
        assert {format_ranges(p.cpus) for p in places} == {cpus}
        assert {p.group.nodes for p in places} == {frozenset({node})}
        assert placement.threads(places) == 24
        addresses = " ".join(machine.address(first + i) for i in range(4))
        assert placement.describe(places) == [
            f"group {name}: {addresses}, bound to NUMA node {node}, CPUs {cpus}"
        ]
        assert json.loads(placement.to_json(places)) == [{"cpus": cpus, "nodes": str(node)}] * 4


def test_fewer_processes_take_the_first_gpus(build):
    build()
    assert numbers(place(3)) == [(0, "A"), (1, "A"), (2, "A")]
    assert numbers(place(1, "6,1")) == [(6, "B")]


def test_a_mixture_is_refused_with_who_is_where_and_the_right_command(build):
    build()
    with pytest.raises(UsageError) as error:
        place(4, "2,3,4,5", MASTER_PORT="29501", argv=["--job.dump_folder", "exp/a b"])
    assert str(error.value) == (
        "NGPU=4 with HIP_VISIBLE_DEVICES=2,3,4,5 mixes NUMA groups: GPU 2-3 in group A (GPU 0-3, NUMA node 0), "
        "GPU 4-5 in group B (GPU 4-7, NUMA node 1); run HIP_VISIBLE_DEVICES=0,1,2,3 "
        "MASTER_PORT=29501 NGPU=4 bash train.sh --job.dump_folder 'exp/a b' or HIP_VISIBLE_DEVICES=4,5,6,7 "
        "MASTER_PORT=29501 NGPU=4 bash train.sh --job.dump_folder 'exp/a b'; or give --job.allow_cross_numa "
        "to mix them"
    )
    with pytest.raises(UsageError, match="NGPU=8 with no HIP_VISIBLE_DEVICES mixes"):
        place(8)
    places = place(4, "2,3,4,5", allow=True)
    assert numbers(places) == [(2, "A"), (3, "A"), (4, "B"), (5, "B")]
    # 96 CPUs of a group for two processes of it
    assert placement.threads(places) == 48
    assert len(placement.describe(places)) == 2
    assert len(place(8, allow=True)) == 8


def test_the_command_for_nvidia(build):
    build()
    with pytest.raises(UsageError, match=r"; run CUDA_VISIBLE_DEVICES=0,1 NGPU=2 bash"):
        place(2, "3,4", is_rocm=False)


def test_the_groups_are_read_and_not_assumed(build):
    # even GPUs on socket 0, odd ones on socket 1
    build(gpu_nodes=[0, 1, 0, 1, 0, 1, 0, 1])
    with pytest.raises(UsageError, match=r"GPU 0,2 in group A \(GPU 0,2,4,6, .*=0,2,4,6 NGPU=4"):
        place(4)
    assert numbers(place(4, "1,3,5,7"))[0] == (1, "B")


def test_the_nodes_of_a_socket_are_one_group(build):
    # NPS4: four nodes a socket, and a node of memory alone
    build(
        nodes=[(n // 4, f"{12 * n}-{12 * n + 11}") for n in range(8)] + [(0, "")],
        gpu_nodes=list(range(8)),
    )
    places = place(4)
    assert {p.group.nodes for p in places} == {frozenset({0, 1, 2, 3})}
    assert {format_ranges(p.cpus) for p in places} == {"0-47"}
    with pytest.raises(UsageError, match=r"GPU 3 in group A .*NUMA node 0-3\), GPU 4 in group B"):
        place(2, "3,4")


def test_nodes_of_which_the_kernel_knows_no_socket(build):
    build(nodes=[(-1, "0-3"), (-1, "4-7")])
    with pytest.raises(UsageError, match="GPU 3 in group A .*, GPU 4 in group B"):
        place(2, "3,4")


def test_a_machine_of_one_group_needs_no_addresses(build, tmp_path, monkeypatch):
    # numa_node is -1 there
    build(nodes=[(0, "0-7")], gpu_nodes=[-1] * 8)
    assert place(4) == []
    with pytest.raises(UsageError, match="NGPU=5 must be at most 4"):
        place(5)
    assert place(8, allow=True) == []
    # a kernel without NUMA
    monkeypatch.setattr(numa, "ROOT", tmp_path / "plain")
    (tmp_path / "plain/sys/devices/system/cpu").mkdir(parents=True)
    assert place(4) == []


def test_a_machine_without_a_gpu_has_no_rules(build):
    build(gpu_nodes=[])
    assert place(16) == []


def test_more_processes_than_gpus(build):
    build()
    with pytest.raises(UsageError, match=r"NGPU=4 .* visible GPUs, 2 \(HIP_VISIBLE_DEVICES=0,1\)"):
        place(4, "0,1")
    with pytest.raises(UsageError, match=r"NGPU=9 .* 8 \(no HIP_VISIBLE_DEVICES\)"):
        place(9, allow=True)


def test_variables_that_leave_no_gpu_are_named_together(build, monkeypatch):
    build()
    both = (
        "torch sees no GPU with ROCR_VISIBLE_DEVICES=4,5, HIP_VISIBLE_DEVICES=4; HIP counts from 0"
    )
    with pytest.raises(UsageError, match=both):
        place(1, "4", ROCR_VISIBLE_DEVICES="4,5")
    assert place(1, "1", ROCR_VISIBLE_DEVICES="4,5")
    monkeypatch.setattr(list_gpus, "addresses", lambda env: [])
    with pytest.raises(UsageError, match="no GPU with CUDA_VISIBLE_DEVICES=0: name GPUs"):
        placement.bind_processes(
            ngpu=1,
            is_rocm=False,
            allow_cross_numa=False,
            allowed_cpus=ALL_CPUS,
            env={"CUDA_VISIBLE_DEVICES": "0"},
            argv=[],
        )
    # hidden on purpose
    for mask in ("", "-1"):
        assert place(1, ROCR_VISIBLE_DEVICES="4", CUDA_VISIBLE_DEVICES=mask) == []


def test_what_cannot_be_read_stops_the_run_unless_allowed(build, tmp_path, monkeypatch):
    build(gpu_nodes=[-1] * 8)
    with pytest.raises(UsageError, match=r"0000:01:00.0/numa_node says -1, .*--job.allow_cross"):
        place(4)
    assert place(4, allow=True) == []
    root = build()
    (root / "sys/bus/pci/devices/0000:03:00.0/numa_node").unlink()
    assert len(place(2)) == 2
    with pytest.raises(UsageError, match="0000:03:00.0/numa_node cannot be read"):
        place(4)
    # when the whole machine is to be described
    with pytest.raises(UsageError, match="0000:03:00.0/numa_node cannot be read"):
        place(2, "3,4")
    monkeypatch.setattr(numa, "ROOT", tmp_path / "nothing")
    with pytest.raises(UsageError, match="do not exist; --job.allow_cross_numa"):
        place(4)


def test_cpus_that_the_process_may_not_use(build):
    build()
    assert {format_ranges(p.cpus) for p in place(4, cpus=frozenset(range(40, 60)))} == {"40-47"}
    with pytest.raises(UsageError, match="0000:05:00.0 is in group B with .* CPUs 0-9 "):
        place(2, "4,5", cpus=frozenset(range(10)))


@pytest.mark.skipif(not os.path.isdir("/sys/devices/system/cpu"), reason="no /sys")
def test_this_machine_can_be_read():
    groups = numa.groups()
    assert groups
    assert len(groups) == 1 or all(group.cpus for group in groups)


@pytest.mark.parametrize("counted", [0, 8])
def test_torch_is_asked_for_the_gpus(monkeypatch, capsys, counted):
    # a container of one GPU, in which the library amdsmi, which torch asks before HIP starts, counts others
    counts = [counted]

    class Properties:
        pci_domain_id, pci_bus_id, pci_device_id = 2, 0xC1, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: counts.append(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counts[-1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", [Properties].__getitem__)
    list_gpus.main()
    assert json.loads(capsys.readouterr().out) == ["0002:c1:00.0"]


def test_the_answer_of_the_process_that_asks(tmp_path, monkeypatch):
    def answer(script):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    # a torch without a GPU runtime is not asked
    answer("exit 1")
    assert list_gpus.addresses({}) == []
    monkeypatch.setattr(torch.version, "hip", "6.4")
    answer("""echo a warning; echo '["0000:01:00.0"]'""")
    assert list_gpus.addresses({}) == ["0000:01:00.0"]
    # the arguments and the environment of a run
    answer("""[ "$*" = "-m flame.machine.list_gpus" ] && echo "[\\"$HIP_VISIBLE_DEVICES\\"]" """)
    assert list_gpus.addresses({"HIP_VISIBLE_DEVICES": "4"}) == ["4"]
    answer("echo Traceback >&2; echo RuntimeError: HIP is broken >&2; exit 1")
    with pytest.raises(UsageError, match="cannot list the GPUs: RuntimeError: HIP is broken"):
        list_gpus.addresses({})


@pytest.mark.gpu
def test_the_gpus_of_this_machine():
    assert len(list_gpus.addresses(os.environ)) == torch.cuda.device_count()
