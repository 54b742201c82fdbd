"""Documents from the built-in text, local files and folders, or a Hugging Face dataset.

Every source gives whole documents, a list-like of str, in an order that depends on the data alone.
Nothing is skipped in silence: what cannot be read is an error that names the file and the place.
"""

import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flame.data.locate import first_line, local_path

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

PYTHON_DOCS = "python-docs"
# the column of a table, or the key of a JSON object, that holds the document
TEXT = "text"

_FLAG = "--training.dataset"
_FILES_FLAG = "--training.data_files"
_EXPECTED = (
    f"{PYTHON_DOCS!r}, a file or folder of .txt, .md, .jsonl, .json or .parquet, a folder written by "
    "flame.data.prepare, or a Hugging Face dataset name"
)


def load_documents(
    dataset: str,
    *,
    name: str | None = None,
    split: str = "train",
    data_dir: str | None = None,
    data_files: str | Sequence[str] | None = None,
) -> Sequence[str]:
    """Load every document of a dataset.

    Args:
        dataset: One of

            - ``"python-docs"``, see :func:`python_docs`;
            - a local file or folder. ``.txt`` and ``.md``: one document a file, UTF-8. ``.jsonl``: one
              object with a string ``"text"`` a line; ``.json``: the same, or one array of such objects.
              ``.parquet``: a string column ``text``. A folder is read recursively, sorted by path;
              hidden files, linked folders and other endings are left out, and named in a warning
              unless hidden;
            - a Hugging Face dataset with a string column ``text``.

            The built-in name wins over a local path (``./python-docs``), which wins over the hub.
        name: Configuration of a Hugging Face dataset.
        split: Split of a Hugging Face dataset.
        data_dir: Subfolder within a Hugging Face dataset.
        data_files: Files within a Hugging Face dataset, or glob patterns within a local folder.

    Returns:
        The documents, a sequence of str; lazy for a Hugging Face dataset.

    Raises:
        ValueError: There is no such data, it is empty, unreadable or has no text, or an option does not
            apply to this kind of dataset. One line that names flag, value and what would be right.
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
        _check_column(dataset, table.data.column(TEXT))
        return table[TEXT]
    documents = [document for file in files for document in read_file(file)]
    endings = Counter(file.suffix.lower() for file in files)
    logger.info(
        "%s: %d documents from %s",
        dataset,
        len(documents),
        ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items())),
    )
    return documents


def local_files(
    dataset: str,
    name: str | None,
    split: str,
    data_dir: str | None,
    data_files: str | Sequence[str] | None,
) -> list[Path] | None:
    """The files that a dataset is, or None where its name can only be one of the hub.

    Raises:
        ValueError: As `load_documents`, as far as names go.
    """
    path = local_path(_FLAG, dataset, _EXPECTED)
    if path is None:
        return None
    if path.is_dir():
        refuse_hub_options(dataset, name=name, split=split, data_dir=data_dir)
        return _list_folder(path) if data_files is None else _match(path, data_files)
    refuse_hub_options(dataset, name=name, split=split, data_dir=data_dir, data_files=data_files)
    return [path]


def python_docs() -> list[str]:
    """The topics of Python's language reference that ``help()`` shows, sorted by key.

    They ship with the interpreter, so the text differs between Python versions: 79 topics and
    466,117 bytes in 3.11.7, 493,344 bytes in 3.12.1, 511,791 bytes in 3.13.0, nearly all ASCII. Losses
    compare only between runs on the same Python.
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
    """Reject hub options given with a source that would ignore them."""
    flags = {"name": "--training.dataset_name", "split": "--training.dataset_split"}
    unused = {"name": None, "split": "train", "data_dir": None, "data_files": None}
    for option, value in options.items():
        if value != unused[option]:
            flag = flags.get(option, f"--training.{option}")
            raise ValueError(
                f"{flag} {value!r}: does not apply to {_FLAG} {dataset!r}; leave it out, "
                "or give a Hugging Face dataset name"
            )


def _fail(file: Path, problem: object, remedy: str) -> NoReturn:
    raise ValueError(f"{_FLAG} {str(file)!r}: {problem}; {remedy}")


def _list_folder(folder: Path) -> list[Path]:
    """Every usable file below the folder, sorted by path."""
    usable: list[Path] = []
    ignored: list[Path] = []

    def stop(error: OSError) -> NoReturn:
        _fail(Path(error.filename), error.strerror, "make the folder readable")

    for root, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # os.walk does not enter linked folders
        ignored += [Path(root, name) for name in folders if Path(root, name).is_symlink()]
        for file in (Path(root, name) for name in names if not name.startswith(".")):
            (usable if file.suffix.lower() in _READERS else ignored).append(file)
    if not usable:
        _fail(folder, f"no {_endings()} file in this folder", f"expected {_EXPECTED}")
    if ignored:
        logger.warning(
            "%s: %d entries are neither %s nor hidden and were left out, %s the first",
            folder,
            len(ignored),
            _endings(),
            min(ignored),
        )
    return sorted(usable)


def _match(folder: Path, patterns: str | Sequence[str]) -> list[Path]:
    """The files below the folder that match at least one pattern, sorted by path."""
    files: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True)}
        found = {path for path in found if path.is_file()}
        if not found:
            raise ValueError(
                f"{_FILES_FLAG} {pattern!r}: matches no file below {str(folder)!r}; "
                "give glob patterns relative to it, such as '**/*.parquet'"
            )
        files |= found
    return sorted(files)


def read_file(file: Path, start: int = 0) -> Iterator[str]:
    """The documents of one file one by one, from the ``start``-th on.

    Raises:
        ValueError: As `load_documents`; that the file holds no text is known at its end.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        _fail(file, f"its name does not end in {_endings()}", "convert or rename it")
    if file.exists() and not file.is_file():
        # reading a pipe would wait for somebody to write
        _fail(file, "is no regular file", "give a file that can be read")
    is_empty = start == 0
    try:
        for document in reader(file, start):
            is_empty = is_empty and not document
            yield document
    except OSError as error:
        _fail(file, error.strerror or first_line(error), "give a file that can be read")
    if is_empty:
        _fail(file, "holds no text", "remove it or give a file with text")


def _read_text(file: Path, start: int) -> Iterator[str]:
    if start == 0:
        yield _decode(file, file.read_bytes(), "")


def _read_jsonl(file: Path, start: int) -> Iterator[str]:
    # split on the newline byte alone: str.splitlines also breaks at characters that JSON allows
    with file.open("rb") as lines:
        filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for number, line in islice(filled, start, None):
            where = f"line {number} "
            yield _text_of(file, _parse(file, _decode(file, line, where), where), where)


def _read_json(file: Path, start: int) -> Iterator[str]:
    with file.open("rb") as opened:
        is_array = opened.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from _read_jsonl(file, start)
        return
    records = _parse(file, _decode(file, file.read_bytes(), ""), "")
    for number, record in enumerate(records[start:], start + 1):
        yield _text_of(file, record, f"record {number} ")


def _read_parquet(file: Path, start: int) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    try:
        # ParquetFile, not read_table, which would take columns from folder names such as year=2024
        with pq.ParquetFile(file) as parquet:
            _check_columns(str(file), parquet.schema_arrow.names)
            # a file without rows may have no group either
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if first + rows > start:
                    column = parquet.read_row_group(group, columns=[TEXT]).column(TEXT)
                    # the values too: text that is not UTF-8 would fail later, without the file's name
                    column.validate(full=True)
                    _check_column(str(file), column, first)
                    yield from column.slice(max(0, start - first)).to_pylist()
                first += rows
    except (pa.ArrowException, OSError) as error:
        _fail(file, f"not a sound parquet file ({first_line(error)})", "write or fetch it again")


_READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _endings() -> str:
    return " or ".join([", ".join(list(_READERS)[:-1]), list(_READERS)[-1]])


def _decode(file: Path, raw: bytes, where: str) -> str:
    """UTF-8 text without a leading byte-order mark; line ends stay as they are."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        _fail(file, f"{where}byte {error.start} is not UTF-8", "convert the file to UTF-8")


def _parse(file: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _fail(file, f"{where}is not JSON ({first_line(error)})", "mend the line or write it again")


def _text_of(file: Path, record: object, where: str) -> str:
    """The string under "text" of one JSON record."""
    if not isinstance(record, dict):
        _fail(
            file, f"{where}is not a JSON object", f'each must be an object with a "{TEXT}" string'
        )
    if TEXT not in record:
        _check_columns(str(file), list(record), where)
    text = record[TEXT]
    if not isinstance(text, str):
        kind = type(text).__name__
        _fail(file, f'{where}has {kind} under "{TEXT}"', "each must be a string")
    try:
        # JSON can escape half a surrogate pair, which is no text and no tokenizer takes
        text.encode()
    except UnicodeEncodeError:
        _fail(file, f"{where}has a lone surrogate", "write the character as UTF-8")
    return text


def _check_columns(source: str, columns: list[str], where: str = "") -> None:
    if TEXT not in columns:
        raise ValueError(
            f"{_FLAG} {source!r}: {where}has no {TEXT!r} column, only {sorted(map(str, columns))}; "
            f"rename the column that holds the documents to {TEXT!r}"
        )


def _check_column(source: str, column: "pa.ChunkedArray", first: int = 0) -> None:
    """An Arrow column, which begins with row ``first``, must be strings without a null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise ValueError(
            f"{_FLAG} {source!r}: column {TEXT!r} holds {column.type}; it must hold strings"
        )
    if column.null_count:
        row = first + pc.index(column.is_null(), True).as_py()
        raise ValueError(
            f"{_FLAG} {source!r}: column {TEXT!r} is null in {column.null_count} rows, row {row} the "
            "first; remove them or put an empty string"
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
    # seconds to import, and needed here alone
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
            f"{_FLAG} {dataset!r}: no local path, and Hugging Face datasets could not load it "
            f"({first_line(error)}); expected {_EXPECTED}"
        ) from error
    # a stream may not know its columns before its first row, which is checked when it is read
    if table.column_names is not None:
        _check_columns(dataset, table.column_names)
    return table
