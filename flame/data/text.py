"""Documents from the built-in text, local files and folders, or a Hugging Face dataset.

Every source gives whole documents, a sequence of str, in an order that depends on the data alone.
Nothing is skipped silently: what cannot be read is an error that names the file and the position in it.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flame.data.files import TEXT, check_column, check_columns, endings, read_file, split_ending
from flame.data.folder import folder_files, matching_files
from flame.data.locate import first_line, local_path

logger = logging.getLogger(__name__)

PYTHON_DOCS = "python-docs"

_FLAG = "--training.dataset"
_EXPECTED = (
    f"{PYTHON_DOCS!r}, a file or folder of {endings()}, a folder written by flame.data.prepare or by "
    "save_to_disk of datasets, or a Hugging Face dataset name"
)


def load_documents(
    dataset: str,
    *,
    name: str | None = None,
    split: str = "train",
    data_dir: str | None = None,
    data_files: str | Sequence[str] | None = None,
) -> Sequence[str]:
    """Loads every document of a dataset.

    Args:
        dataset: One of

            - ``"python-docs"``, see :func:`python_docs`;
            - a local file or folder. ``.txt`` and ``.md``: one document per file, UTF-8. ``.jsonl`` and
              ``.ndjson``: one object with a string ``"text"`` a line; ``.json``: the same, or one array of
              such objects; all of these also compressed, ``.gz``, ``.bz2``, ``.xz`` or ``.zst``.
              ``.parquet`` and ``.arrow``: a string column ``text``. A folder is read recursively, sorted
              by path, and only its split if it has splits (see `folder_files`); hidden files, linked
              folders and files that are not data are left out, and named in a warning unless hidden;
            - a folder that ``save_to_disk`` of Hugging Face datasets wrote, with a string column ``text``;
            - a Hugging Face dataset with a string column ``text``.

            The built-in name wins over a local path (``./python-docs``), which wins over the hub.
        name: Configuration of a Hugging Face dataset, or of a folder whose README.md has some.
        split: Split of a Hugging Face dataset, or of a folder that has splits.
        data_dir: Subfolder within a Hugging Face dataset.
        data_files: Files within a Hugging Face dataset, or glob patterns within a local folder.

    Returns:
        The documents, a sequence of str; lazy for a Hugging Face dataset.

    Raises:
        ValueError: There is no such data, it is empty, unreadable or has no text, or an option does not
            apply to this kind of dataset. The message is one line with flag, value and what is expected.
    """
    if dataset == PYTHON_DOCS:
        refuse_hub_options(
            dataset, name=name, split=split, data_dir=data_dir, data_files=data_files
        )
        return python_docs()
    files = local_files(dataset, name, split, data_dir, data_files)
    if files is None:
        table = load_from_hub(dataset, name, split, data_dir, data_files)
        if not len(table):
            raise ValueError(f"{_FLAG} {dataset!r}: split {split!r} is empty; choose another split")
        check_column(dataset, table.data.column(TEXT))
        return table[TEXT]
    documents = [document for file in files for document in read_file(file)]
    kinds = Counter("".join(split_ending(file)) for file in files)
    logger.info(
        "%s: %d documents from %s",
        dataset,
        len(documents),
        ", ".join(f"{count} {ending}" for ending, count in sorted(kinds.items())),
    )
    return documents


def local_files(
    dataset: str,
    name: str | None,
    split: str,
    data_dir: str | None,
    data_files: str | Sequence[str] | None,
) -> list[Path] | None:
    """The files of a local dataset; None if the name can only be one of the hub.

    Raises:
        ValueError: As `load_documents`, as far as names go.
    """
    path = local_path(_FLAG, dataset, _EXPECTED)
    if path is None:
        return None
    if path.is_dir():
        refuse_hub_options(dataset, data_dir=data_dir)
        if data_files is None:
            return folder_files(dataset, path, name, split)
        refuse_hub_options(dataset, name=name, split=split)
        return matching_files(path, data_files)
    refuse_hub_options(dataset, name=name, split=split, data_dir=data_dir, data_files=data_files)
    return [path]


def python_docs() -> list[str]:
    """The topics of Python's language reference that ``help()`` shows, sorted by key.

    They ship with the interpreter, so the text differs between Python versions: 79 topics and
    466,117 bytes in 3.11.7, 493,344 bytes in 3.12.1, 511,791 bytes in 3.13.0, nearly all ASCII. Losses
    compare only between runs on the same Python.

    Raises:
        ValueError: This Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            f"{_FLAG} {PYTHON_DOCS!r}: this Python comes without pydoc_data; install Python's full "
            "standard library, or give a text file of your own"
        ) from error
    return [topics[key] for key in sorted(topics)]


def refuse_hub_options(dataset: str, **options: str | Sequence[str] | None) -> None:
    """Raises ValueError for options of the hub that the source would ignore."""
    flags = {"name": "--training.dataset_name", "split": "--training.dataset_split"}
    unused = {"name": None, "split": "train", "data_dir": None, "data_files": None}
    for option, value in options.items():
        if value != unused[option]:
            flag = flags.get(option, f"--training.{option}")
            raise ValueError(
                f"{flag} {value!r}: does not apply to {_FLAG} {dataset!r}; leave it out, "
                "or give a Hugging Face dataset name"
            )


def load_from_hub(
    dataset: str,
    name: str | None,
    split: str,
    data_dir: str | None,
    data_files: str | Sequence[str] | None,
    streaming: bool = False,
) -> Any:
    """The ``Dataset``, or with streaming ``IterableDataset``, of a hub name, with a column ``text``.

    Raises:
        ValueError: As `load_documents`.
    """
    # takes seconds to import, and is needed only here
    import datasets

    try:
        table = datasets.load_dataset(
            dataset,
            name,
            split=split,
            data_dir=data_dir,
            data_files=data_files,
            streaming=streaming,
        )
    # builders raise whatever they like, StopIteration included
    except Exception as error:
        raise ValueError(
            f"{_FLAG} {dataset!r}: not a local path, and Hugging Face datasets could not load it "
            f"({first_line(error)}); expected {_EXPECTED}"
        ) from error
    # a stream may not know its columns before its first row; rows are checked when they are read
    if table.column_names is not None:
        check_columns(dataset, table.column_names)
    return table
