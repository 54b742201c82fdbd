"""Warns of versions of torch and Triton that are newer than those tested; setup.py sets no upper bound.

An upper bound would make pip silently replace a newer torch, even a ROCm build, by an older CUDA build.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from flame.base.log import logger

NEWEST = {"torch": "2.14", "triton": "3.9"}
"""The newest release series that the tests have run with, as the extra ``cpu`` in setup.py bounds them."""

# names of the distributions: builds of Triton have several
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"),
}


def warn_of_untested() -> None:
    """Logs a warning for each package of `NEWEST` whose installed release series is newer."""
    for name, newest in NEWEST.items():
        for distribution in _DISTRIBUTIONS[name]:
            try:
                found = version(distribution)
            except PackageNotFoundError:
                continue
            if Version(found).release[:2] > Version(newest).release:
                logger.warning(
                    "%s %s has not been tried with this repository; the newest that has is %s",
                    name,
                    found,
                    newest,
                )
            break
