"""Finds the data files of a folder: its splits, files that only describe the data, folders saved by `datasets`.

Splits are those of the Hugging Face Hub: what the dataset card README.md configures, else those in the
names of files and folders, such as ``data/train-00000-of-00001.parquet`` or ``test/``.
"""

import glob
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flame.data.files import compressions, endings, fail, is_readable, split_ending
from flame.data.locate import first_line

logger = logging.getLogger(__name__)

_FLAG = "--training.dataset"
_SPLIT_FLAG = "--training.dataset_split"
_FILES_FLAG = "--training.data_files"
_CARD = "README.md"
ALL = "all"
# data in a format that is not read: such files raise an error
_OTHER_DATA = {
    *(
        ".csv",
        ".tsv",
        ".feather",
        ".orc",
        ".avro",
        ".npy",
        ".npz",
        ".h5",
        ".hdf5",
        ".warc",
        ".text",
    ),
    *(".raw", ".tokens", ".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4", ".lzma", ".zstd"),
}


def folder_files(dataset: str, folder: Path, name: str | None, split: str) -> list[Path]:
    """The files of a split of a folder, of all of it where it has no splits.

    Args:
        dataset: The user's name for the folder, for messages.
        folder: The folder.
        name: Configuration, for a folder whose card has some.
        split: Name of a split, several joined by ``+``, or ``"all"``.

    Raises:
        ValueError: There is no such split or configuration, a file is in no split, or is data of a kind
            that is not read.
    """
    if is_saved(folder):
        _refuse_name(dataset, name)
        return _saved_files(dataset, folder, split)
    files = _list(folder)
    if _has_configurations(folder, files):
        splits = _configured_splits(dataset, folder, name)
        chosen = _choose(dataset, splits, split)
    else:
        _refuse_name(dataset, name)
        splits = _named_splits(folder, files)
        if split == ALL:
            return files
        if not splits:
            if split != "train":
                raise ValueError(
                    f"{_SPLIT_FLAG} {split!r}: does not apply to {_FLAG} {dataset!r}, which has no splits; "
                    "leave it out"
                )
            return files
        chosen = _choose(dataset, splits, split)
        rest = sorted(set(files).difference(*splits.values()))
        if rest:
            raise ValueError(
                f"{_FLAG} {dataset!r}: {len(rest)} files, the first {rest[0].relative_to(folder)}, belong "
                f"to none of the splits found in names ({', '.join(splits)}); choose files with "
                f"{_FILES_FLAG}, or take them all with {_SPLIT_FLAG} {ALL}"
            )
    if len(splits) > 1:
        logger.info("%s: split %s of %s", dataset, split, ", ".join(splits))
    return chosen


def has_splits(dataset: str, folder: Path) -> bool:
    """Whether `folder_files` would have to choose among the files of a folder.

    Raises:
        ValueError: As `folder_files`.
    """
    if is_saved(folder):
        return (folder / "dataset_dict.json").is_file()
    files = _list(folder)
    return _has_configurations(folder, files) or bool(_named_splits(folder, files))


def matching_files(folder: Path, patterns: str | Sequence[str]) -> list[Path]:
    """The files below the folder that match at least one pattern, sorted by path. Wildcards do not
    match files that only describe the data.

    Raises:
        ValueError: A pattern matches nothing.
    """
    files: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True)}
        found = {path for path in found if path.is_file()}
        if glob.has_magic(os.path.basename(pattern)):
            found -= _descriptions(found)
        if not found:
            raise ValueError(
                f"{_FILES_FLAG} {pattern!r}: matches no file below {str(folder)!r}; "
                "give glob patterns relative to it, such as '**/*.parquet'"
            )
        files |= found
    return sorted(files)


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    is_one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_one or (folder / "dataset_dict.json").is_file()


def _saved_files(dataset: str, folder: Path, split: str) -> list[Path]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    # it raises whatever it likes on a damaged folder
    except Exception as error:
        raise ValueError(
            f"{_FLAG} {dataset!r}: was written by save_to_disk of datasets, which cannot load it "
            f"({first_line(error)}); save or copy it again"
        ) from error

    def files(part: Any) -> list[Path]:
        return [Path(file["filename"]) for file in part.cache_files]

    if isinstance(saved, datasets.DatasetDict):
        chosen = _choose(dataset, {key: files(part) for key, part in saved.items()}, split)  # pyright: ignore[reportArgumentType]  # splits that were read from a folder have names of type str
    elif split in ("train", ALL, str(saved.split)):
        chosen = files(saved)
    else:
        raise ValueError(
            f"{_SPLIT_FLAG} {split!r}: does not apply to {_FLAG} {dataset!r}, which save_to_disk wrote "
            "without splits; leave it out"
        )
    if not chosen:
        raise ValueError(f"{_FLAG} {dataset!r}: holds no text; save a dataset that has rows")
    return chosen


def _refuse_name(dataset: str, name: str | None) -> None:
    if name is not None:
        raise ValueError(
            f"--training.dataset_name {name!r}: does not apply to {_FLAG} {dataset!r}, whose {_CARD} has no "
            "configurations; leave it out"
        )


def _choose(dataset: str, splits: dict[str, list[Path]], wanted: str) -> list[Path]:
    names = list(splits) if wanted == ALL else wanted.split("+")
    if not set(names) <= set(splits):
        raise ValueError(
            f"{_SPLIT_FLAG} {wanted!r}: {_FLAG} {dataset!r} has the splits {', '.join(splits)}; give one of "
            f"them, several joined by +, or {ALL}"
        )
    return [file for name in dict.fromkeys(names) for file in splits[name]]


def _has_configurations(folder: Path, files: list[Path]) -> bool:
    card = folder / _CARD
    if (folder / ".huggingface.yaml").is_file():
        return True
    # a card that is listed among the files is text
    if card in files or not card.is_file():
        return False
    from huggingface_hub import DatasetCard

    try:
        return bool(DatasetCard.load(card).data.get("configs"))
    # of the parser of YAML, too
    except Exception as error:
        fail(card, f"is no dataset card ({first_line(error)})", "correct its head, or remove it")


def _configured_splits(dataset: str, folder: Path, name: str | None) -> dict[str, list[Path]]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), name)
        return {
            str(split): [Path(file) for file in files]
            for split, files in builder.config.data_files.items()  # pyright: ignore[reportOptionalMemberAccess]  # a builder of local files has data_files
        }
    # builders raise whatever they like
    except Exception as error:
        flag = _FLAG if name is None else f"--training.dataset_name {name!r}, {_FLAG}"
        raise ValueError(
            f"{flag} {dataset!r}: the configurations of {_CARD} cannot be read ({first_line(error)}); name "
            "one with --training.dataset_name, or correct the file"
        ) from error


def _named_splits(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Splits found in names, by the first of the Hub's sets of patterns that any file matches."""
    from datasets.data_files import (
        DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
        SPLIT_PATTERN_SHARDED,
    )

    # datasets' own resolver walks the folder once per pattern, which takes seconds for some thousand files
    names = {file.relative_to(folder).as_posix(): file for file in files}
    splits: dict[str, list[Path]] = {}
    any_split = _expression([SPLIT_PATTERN_SHARDED.format(split="*")])
    for name, file in names.items():
        if any_split.fullmatch(name):
            splits.setdefault(re.split(r"-\d{5}-of-", file.name)[0], []).append(file)
    for patterns in (DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, DEFAULT_PATTERNS_SPLIT_IN_FILENAME):
        for split, wanted in () if splits else patterns.items():
            expression = _expression(wanted)
            if found := [file for name, file in names.items() if expression.fullmatch(name)]:
                splits[str(split)] = found
        if splits:
            break
    return splits


def _expression(patterns: Iterable[str]) -> re.Pattern[str]:
    from fsspec.utils import glob_translate

    return re.compile("|".join(glob_translate(pattern) for pattern in patterns))


def _list(folder: Path) -> list[Path]:
    """Every readable file below the folder, sorted by path, without what describes it."""
    readable: list[Path] = []
    ignored: list[Path] = []

    def stop(error: OSError) -> NoReturn:
        fail(Path(error.filename), error.strerror, "make the folder readable")

    for root, folders, names in os.walk(folder, onerror=stop):
        if is_saved(Path(root)):
            fail(Path(root), "was written by save_to_disk of datasets", "name this folder itself")
        folders[:] = [name for name in folders if not name.startswith(".")]
        # os.walk does not enter linked folders
        ignored += [Path(root, name) for name in folders if Path(root, name).is_symlink()]
        for file in (Path(root, name) for name in names if not name.startswith(".")):
            (readable if is_readable(file) else ignored).append(file)
    descriptions = _descriptions(readable)
    files = sorted(set(readable) - descriptions)
    if not files:
        fail(
            folder,
            f"no {endings()} file in this folder",
            f"give text of such a kind, which may be compressed: {compressions()}",
        )
    other = [
        file for file in ignored if any(e in _OTHER_DATA or c for e, c in [split_ending(file)])
    ]
    if other:
        fail(
            min(other),
            f"is data of a kind that is not read, one of {len(other)} such files",
            f"convert it to {endings()} (text may be compressed: {compressions()}), or choose files with "
            f"{_FILES_FLAG}",
        )
    if descriptions:
        logger.info("%s: %s describes the data and is no text of it", folder, min(descriptions))
    if ignored:
        logger.warning(
            "%s: %d entries are neither %s nor hidden and were left out, %s the first",
            folder,
            len(ignored),
            endings(),
            min(ignored),
        )
    return files


def _descriptions(files: Iterable[Path]) -> set[Path]:
    """The files that describe the data and are not part of it: a card, and files that `datasets` adds.

    A README.md is text if all files below its folder are .md.
    """
    from datasets.data_files import FILES_TO_IGNORE

    found = {file for file in files if file.name in FILES_TO_IGNORE}
    with_data: set[Path] = set()
    for file in files:
        if file not in found and split_ending(file)[0] != ".md":
            with_data.update(file.parents)
    return {file for file in found if file.name != _CARD or file.parent in with_data}
