"""What ran, when, with which code and where: ``record/001.json`` of a run folder, one more for each continuation."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flame.base.files import write_atomically
from flame.config.sections import JobConfig

RECORD_FOLDER = "record"
PACKAGES = (
    "torch",
    "triton",
    "torchtitan",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "torchdata",
    "fla-core",
    "flash-linear-attention",
    "numpy",
    "tensorboard",
    "wandb",
)
"""Packages whose version is recorded; null where one is not installed."""
# variables that change where or how a run runs
_ENVIRONMENT = (
    "CUDA",
    "CUBLAS",
    "GLOO",
    "GPU_",
    "HF_",
    "HIP",
    "HSA",
    "LOCAL_",
    "MASTER_",
    "MIOPEN",
    "NCCL",
    "NGPU",
    "NNODE",
    "NODE_RANK",
    "NUMEXPR",
    "OMP",
    "PYTHONHASHSEED",
    "PYTORCH",
    "RANK",
    "RCCL",
    "ROCM",
    "ROCR",
    "SLURM_JOB",
    "SLURM_NODELIST",
    "SLURM_NNODES",
    "TOKENIZERS",
    "TORCH",
    "TRITON",
    "WANDB",
    "WORLD_SIZE",
)
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
# paths whose untracked files also decide what a run computes
_CODE = ("flame", "fla", "configs", "train.sh", "setup.py", "pyproject.toml")


def write_record(config: JobConfig, argv: list[str]) -> Path:
    """Adds a record of this start to the run folder, which the caller has claimed.

    Args:
        config: The resolved flags.
        argv: The flags as they were given.

    Returns:
        The file ``record/NNN.json``. The same folder gets ``NNN.toml``, the resolved flags, and ``NNN.patch`` if the
        checkout differs from its commit.
    """
    folder = config.dump_folder / RECORD_FOLDER
    folder.mkdir(exist_ok=True)
    number = 1 + max((int(p.stem) for p in folder.glob("*.json") if p.stem.isdecimal()), default=0)
    name = f"{number:03}"
    git, patch = _git(Path(__file__).resolve().parents[2])
    record = {
        "start": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command(argv),
        "directory": os.getcwd(),
        "description": config.job.description,
        "host": socket.gethostname(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "device": _device(),
        "environment": _environment(),
        "git": git | {"patch": f"{name}.patch" if patch else None},
        "versions": _versions(),
    }
    if patch:
        (folder / f"{name}.patch").write_bytes(patch)
    (folder / f"{name}.toml").write_text(config.to_toml(), encoding="utf-8")
    # last, since its name counts the records
    file = folder / f"{name}.json"
    write_atomically(file, json.dumps(record, indent=2) + "\n")
    return file


def command(argv: list[str]) -> str:
    """The command that was typed, as a line for a shell."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join([os.path.basename(sys.executable), "-m", "flame.train", *argv])
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return f"NGPU={processes} {shlex.join(['bash', 'train.sh', *argv])}"


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_ENVIRONMENT) and not any(word in name for word in _SECRET)
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # with the build, such as +cu130, which the package's metadata may lack
    versions["torch"] = str(torch.__version__)
    versions |= {"torch git": torch.version.git_version, "cuda": torch.version.cuda}
    versions["hip"] = torch.version.hip
    if torch.cuda.is_available():
        # RCCL on ROCm
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]  # torch imports this submodule itself
    return versions


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} x {platform.processor() or platform.machine()}"


def _git(root: Path) -> tuple[dict[str, Any], bytes]:
    """Commit, branch and changed files of the checkout at ``root``, and the patch from the commit to this code.

    `git apply` takes the patch. Code that was installed rather than checked out has no commit; its entry says why.
    """

    def git(*words: str, **kwargs: Any) -> bytes:
        return subprocess.run(
            ["git", "-C", str(root), *words], check=True, capture_output=True, timeout=60, **kwargs
        ).stdout

    try:
        top = Path(git("rev-parse", "--show-toplevel").decode().strip())
        if top.resolve() != root:
            return {"commit": None, "reason": f"{root} is not a checkout of its own"}, b""
        commit = git("rev-parse", "HEAD").decode().strip()
        branch = git("rev-parse", "--abbrev-ref", "HEAD").decode().strip()
        changed = git("status", "--porcelain").decode(errors="replace").splitlines()
        patch = git("diff", "--binary", "HEAD")
        listing = git("ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE)
        for file in filter(None, listing.decode(errors="surrogateescape").split("\0")):
            # exit code 1 says that the files differ
            words = ["git", "-C", str(root), "diff", "--binary", "--no-index", "/dev/null", file]
            patch += subprocess.run(words, capture_output=True, timeout=60).stdout
    except FileNotFoundError:
        return {"commit": None, "reason": "git is not installed"}, b""
    except subprocess.TimeoutExpired:
        return {"commit": None, "reason": "git did not answer within 60 s"}, b""
    except subprocess.CalledProcessError as error:
        return {"commit": None, "reason": error.stderr.decode(errors="replace").strip()}, b""
    return {"commit": commit, "branch": branch, "changed": changed}, patch
