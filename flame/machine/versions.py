"""Versions that nothing bounds when the package is installed: torch and its Triton.

An upper bound would make pip replace a torch that is too new, a ROCm build too, by an older CUDA build without a word.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from flame.base.log import logger

NEWEST = {"torch": "2.14", "triton": "3.9"}
"""The newest release series that the tests have run with, as the extra ``cpu`` in setup.py bounds them."""

# builds of Triton come under several names
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"),
}


def warn_of_untested() -> None:
    """Logs a line for each of `NEWEST` of which a newer series is installed."""
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
