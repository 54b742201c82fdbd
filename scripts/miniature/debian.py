"""Packages by name from the index that apt is set up with: versions, download, files. Nothing is installed."""

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from flame.base.errors import UsageError


def candidates(names: list[str]) -> dict[str, str | None]:
    """The version of each package that apt would take; None where its index has none.

    Raises:
        UsageError: There is no apt here.
    """
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UsageError(
                f"{tool} is not there: the packages are Debian's; run this on Debian, or in a container of it"
            )
    versions: dict[str, str | None] = dict.fromkeys(names)
    name = ""
    for line in _run(["apt-cache", "policy", *names]).splitlines():
        if not line.startswith(" "):
            name = line.rstrip(":")
        elif line.startswith("  Candidate: ") and name in versions:
            version = line.removeprefix("  Candidate: ")
            versions[name] = None if version == "(none)" else version
    return versions


def download(versions: dict[str, str], folder: Path) -> dict[str, Path]:
    """Fetches the packages into a folder, in which apt checks and keeps what is there; paths by name.

    Raises:
        UsageError: apt fails, with what it says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _run(
        ["apt-get", "download", *(f"{name}={version}" for name, version in versions.items())],
        folder,
    )
    paths = {}
    for name, version in versions.items():
        # as apt writes file names: the colon of an epoch is escaped
        (paths[name],) = folder.glob(f"{name}_{version.replace(':', '%3a')}_*.deb")
    return paths


def files(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each regular file of a package, in its order; links are left out."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE
    ) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isreg():
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
        process.stdout.read()
    if process.returncode:
        raise UsageError(f"{deb} is damaged: dpkg-deb ended with {process.returncode}; delete it")


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise UsageError(
            f"{' '.join(command[:2])} failed: {'; '.join(errors) or done.stderr.strip()}"
        )
    return done.stdout
