"""Our files and upstream flash-linear-attention's share the namespace ``fla.ops.attn``, and neither harms the other.

The environment that runs the tests is tried as it is, usually an editable installation. A wheel, built from
a copy of the sources, is tried in a throw-away environment that holds its own copy of upstream, sees
all other packages of this one, and none of its editable links. Nothing here needs a network.
"""

import ast
import base64
import functools
import hashlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from fla.ops.attn import parallel_softpick_attn
from flame.machine import versions
from flame.machine.versions import NEWEST

ROOT = Path(__file__).resolve().parents[1]

# Every spelling is tried with the module of the same name not yet imported, as if it were the first one.
PROBE = """
import inspect, json, sys, time
import fla.ops.attn

before, start = set(sys.modules), time.process_time()
from fla.ops.attn.softpick import parallel_softpick_attn as expected
import fla.ops.attn.parallel_softpick_attn
seconds, added = time.process_time() - start, sorted(set(sys.modules) - before)

SPELLINGS = (
    "from fla.ops.attn import parallel_softpick_attn as got",
    "import fla.ops.attn.parallel_softpick_attn; got = fla.ops.attn.parallel_softpick_attn",
    "import fla.ops.attn.parallel_softpick_attn as got",
    "from fla.ops.attn.parallel_softpick_attn import parallel_softpick_attn as got",
    "from fla.ops.attn.softpick import parallel_softpick_attn as got",
)
for spelling in SPELLINGS:
    sys.modules.pop("fla.ops.attn.parallel_softpick_attn")
    del fla.ops.attn.parallel_softpick_attn
    names = {}
    exec(spelling, names)
    assert names["got"] is expected, spelling
    import fla.ops.attn.parallel_softpick_attn

from fla.ops import chunk_gla
from fla.ops.attn import parallel_attn
from fla.ops.attn.naive import naive_parallel_attn

file = inspect.getsourcefile(expected)
print(json.dumps({"file": file, "seconds": seconds, "added": added}))
"""


def output_of(*command: str | Path, cwd: Path) -> str:
    """What the command prints, run with no setting of ours that would help it or hinder it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHONPATH"))}
    # no index, no user's configuration: what is not on this machine is not needed
    env |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@functools.cache
def probe(python: Path, cwd: Path) -> dict:
    return json.loads(output_of(python, "-c", PROBE, cwd=cwd).splitlines()[-1])


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An environment with upstream and without softpick: its interpreter and its site-packages."""
    folder = tmp_path_factory.mktemp("fresh")
    output_of(sys.executable, "-m", "venv", folder, cwd=folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    upstream = distribution("fla-core")
    for name in upstream.files:
        if ".." not in name.parts:
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(upstream.locate_file(name), site / name)
    # a path added by a .pth file comes last, and .pth files in it are not read
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    return Path(sysconfig.get_path("scripts", "venv", paths)) / "python", site


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    for name in ("fla", "flame"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    # what pip and build call, without the isolated environment that they would have to download
    hook = "import setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    return folder / "dist" / output_of(sys.executable, "-c", hook, cwd=folder).splitlines()[-1]


@pytest.fixture(scope="module")
def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=False).requires_dist


def upstream_files() -> Iterator[str]:
    for name in ("fla-core", "flash-linear-attention"):
        try:
            yield from map(str, distribution(name).files)
        except ModuleNotFoundError:
            assert name != "fla-core"


@pytest.mark.parametrize("is_here", [pytest.param(True, marks=pytest.mark.slow), False])
def test_every_spelling_gives_the_function_installed_as_here(outside: Path, is_here: bool) -> None:
    file = probe(Path(sys.executable), ROOT if is_here else outside)["file"]
    assert file == inspect.getsourcefile(parallel_softpick_attn)


@pytest.mark.slow
def test_every_spelling_gives_the_function_of_a_wheel_and_upstream_survives_it(
    fresh: tuple[Path, Path], wheel: Path, outside: Path
) -> None:
    python, site = fresh
    # the softpick of the outer environment is visible there, in the same version
    output_of(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel, cwd=outside)
    for cwd in (ROOT, outside):
        assert Path(probe(python, cwd)["file"]).is_relative_to(site), cwd

    output_of(python, "-m", "pip", "uninstall", "--yes", "softpick", cwd=outside)
    upstream = output_of(python, "-c", "import fla.ops.attn as x; print(x.__file__)", cwd=outside)
    assert Path(upstream.splitlines()[-1]).is_relative_to(site)
    assert [path for path in site.rglob("*softpick*") if path.suffix != ".pyc"] == []
    assert not (site / "flame").exists()
    for name in distribution("fla-core").files:
        if name.hash is not None and ".." not in name.parts:
            digest = hashlib.new(name.hash.mode, (site / name).read_bytes()).digest()
            assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == name.hash.value, name


def test_wheel_holds_our_modules_and_nothing_of_upstream(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = (path for folder in ("fla", "flame") for path in (ROOT / folder).rglob("*.py"))
    assert names == {path.relative_to(ROOT).as_posix() for path in sources}
    assert not names & set(upstream_files())
    # these make the folders upstream's, whoever has them last
    assert not names & {"fla/__init__.py", "fla/ops/__init__.py", "fla/ops/attn/__init__.py"}


def test_function_can_be_pickled_and_read() -> None:
    assert pickle.loads(pickle.dumps(parallel_softpick_attn)) is parallel_softpick_attn
    assert "def parallel_softpick_attn(" in inspect.getsource(parallel_softpick_attn)


def test_import_adds_nothing_measurable(outside: Path) -> None:
    result = probe(Path(sys.executable), outside)
    ours = ("fla.ops.attn.softpick", "fla.ops.attn.parallel_softpick_attn")
    assert [name for name in result["added"] if not name.startswith(ours)] == []
    # seconds of CPU, so that a busy machine does not matter: 0.05 measured, upstream takes 4
    assert result["seconds"] < 0.5


def test_references_import_no_triton() -> None:
    package = "fla.ops.attn.softpick"
    pending, imported = [f"{package}.naive"], set()
    while pending:
        source = ROOT.joinpath(*pending.pop().split(".")).with_suffix(".py")
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                assert node.module != package, "the package itself imports the kernels"
                found = {node.module}
            else:
                continue
            pending += [name for name in found - imported if name.startswith(package)]
            imported |= found
    others = {name for name in imported if not name.startswith(package)}
    assert {name.partition(".")[0] for name in others} - sys.stdlib_module_names == {"torch"}


def bounds_of(requirements: list[Requirement], extra: str) -> dict[str, SpecifierSet]:
    """What an extra, or the base as ``""``, asks for."""
    return {
        canonicalize_name(r.name): r.specifier
        for r in requirements
        if (r.marker.evaluate({"extra": extra}) if r.marker else not extra)
    }


def test_torch_and_triton_are_left_to_the_user(requirements: list[Requirement]) -> None:
    base, cpu = bounds_of(requirements, ""), bounds_of(requirements, "cpu")
    assert base["torch"] == SpecifierSet(">=2.11")
    for extra in ("", "test", "dev", "baselines", "eval"):
        assert "triton" not in bounds_of(requirements, extra)
        assert not extra or "torch" not in bounds_of(requirements, extra)
    # what a machine without a torch gets has been tried
    for name, newest in NEWEST.items():
        major, minor = map(int, newest.split("."))
        assert f"{newest}.9" in cpu[name]
        assert f"{major}.{minor + 1}" not in cpu[name]


def test_all_else_is_bounded_at_what_was_tried(requirements: list[Requirement]) -> None:
    exact = {"fla-core", "torchtitan", "flash-linear-attention"}
    for requirement in requirements:
        name, operators = (
            canonicalize_name(requirement.name),
            {s.operator for s in requirement.specifier},
        )
        if name not in {"torch"}:
            assert operators == ({"=="} if name in exact else {">=", "<"}), requirement


@pytest.mark.slow
def test_installing_leaves_a_torch_that_is_too_new_alone(
    fresh: tuple[Path, Path], wheel: Path, outside: Path
) -> None:
    python, site = fresh
    # a torch in name alone, before the real one on the path; no index to replace it from
    metadata = site / "torch-0.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.16.0+rocm7.9\n")
    try:
        report = output_of(
            python,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--quiet",
            "--report",
            "-",
            wheel,
            cwd=outside,
        )
    finally:
        shutil.rmtree(metadata.parent)
    names = [item["metadata"]["name"] for item in json.loads(report)["install"]]
    assert "torch" not in names


def test_a_torch_that_was_never_tried_is_named(monkeypatch, caplog) -> None:
    found = {"torch": "2.15.0+rocm7.9", "pytorch-triton-rocm": "3.9.1"}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.setattr(versions.logger, "propagate", True)
    versions.warn_of_untested()
    assert [r.getMessage() for r in caplog.records] == [
        "torch 2.15.0+rocm7.9 has not been tried with this repository; the newest that has is 2.14"
    ]


def pins_of(name: str) -> dict[str, Version]:
    lines = (ROOT / "3rdparty" / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def test_constraints_lie_in_the_ranges(requirements: list[Requirement]) -> None:
    pins = pins_of("constraints.txt")
    for requirement in requirements:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    # a pin with a local tag would refuse every other build of the same torch
    assert not any(version.local for version in pins.values())


def test_oldest_is_the_lower_end_of_every_range(requirements: list[Requirement]) -> None:
    lowest = {
        name: Version(specifier.version)
        for extra in ("", "cpu", "test")
        for name, specifiers in bounds_of(requirements, extra).items()
        for specifier in specifiers
        if specifier.operator in (">=", "==")
    }
    assert pins_of("oldest.txt") == lowest
