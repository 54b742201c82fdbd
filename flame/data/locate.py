"""Tells a local path from a hub name, and puts the cause of an error on one line."""

from pathlib import Path

from flame.base.paths import expand

# a value that ends like this means a file, whether or not it exists
_FILE_ENDINGS = {
    ".txt",
    ".md",
    ".jsonl",
    ".json",
    ".parquet",
    ".arrow",
    ".ndjson",
    ".csv",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".model",
}


def local_path(flag: str, value: str, expected: str) -> Path | None:
    """The existing local path that ``value`` names, or None where it can only be a hub name.

    Args:
        flag: The flag that carried the value, for the message.
        value: A path, ``~`` allowed, or a hub name, ``name`` or ``owner/name``.
        expected: Valid values, for the message.

    Raises:
        ValueError: The value is empty, a URL, or reads as a path and does not exist.
    """
    if not value.strip():
        # Path("") would be the working directory
        raise ValueError(f"{flag} {value!r}: empty; expected {expected}")
    path = Path(expand(flag, value))
    if path.exists():
        return path
    is_path = value.startswith((".", "/", "~")) or value.count("/") > 1 or "\\" in value
    if is_path or path.suffix.lower() in _FILE_ENDINGS:
        raise ValueError(f"{flag} {value!r}: no such file or folder; expected {expected}")
    return None


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error's type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
