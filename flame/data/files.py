"""Reads the documents of one file, starting at any of them.

The ending of the name decides the format. What cannot be read is an error that names the file and the position.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from flame.data.locate import first_line

if TYPE_CHECKING:
    import pyarrow as pa

# the column of a table, or the key of a JSON object, that holds the document
TEXT = "text"

_FLAG = "--training.dataset"


def is_readable(file: Path) -> bool:
    """Whether the ending is one that `read_file` knows."""
    ending, compression = split_ending(file)
    return ending in (_TEXT_READERS if compression else _READERS)


def split_ending(file: Path) -> tuple[str, str]:
    """The ending of a name and that of its compression, in lower case, each possibly empty."""
    name = Path(file.name.lower())
    compression = name.suffix if name.suffix in _COMPRESSIONS else ""
    return Path(name.name.removesuffix(compression)).suffix, compression


def endings() -> str:
    """The endings that `read_file` knows, as text for messages."""
    *first, last = _READERS
    return f"{', '.join(first)} or {last}"


def compressions() -> str:
    """The compressions that `read_file` knows, as text for messages."""
    *first, last = _COMPRESSIONS
    return f"{', '.join(first)} or {last}"


def fail(file: Path, problem: object, remedy: str) -> NoReturn:
    """Raises ValueError: what is wrong with the file, and what to do."""
    raise ValueError(f"{_FLAG} {str(file)!r}: {problem}; {remedy}")


def read_file(file: Path, start: int = 0) -> Iterator[str]:
    """The documents of one file one by one, from the ``start``-th on.

    Raises:
        ValueError: As `load_documents`; a file without text raises at its end.
    """
    ending, compression = split_ending(file)
    if not is_readable(file):
        if compression and ending in _READERS:
            fail(file, f"a compressed {ending} file is not read", "decompress it")
        fail(
            file,
            f"its name does not end in {endings()}",
            f"convert or rename it (text may be compressed: {compressions()})",
        )
    if file.exists() and not file.is_file():
        # reading a pipe would block until something is written
        fail(file, "is no regular file", "give a file that can be read")
    is_empty = start == 0
    try:
        for document in _READERS[ending](file, start):
            is_empty = is_empty and not document
            yield document
    except OSError as error:
        fail(file, error.strerror or first_line(error), "give a file that can be read")
    if is_empty:
        fail(file, "holds no text", "remove it or give a file with text")


@contextlib.contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if need be."""
    _, compression = split_ending(file)
    if not compression:
        with file.open("rb") as opened:
            yield opened
        return
    with file.open("rb"):
        # errors of the file itself keep their message
        pass
    try:
        with _COMPRESSIONS[compression](file) as opened:
            yield opened
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        fail(file, f"cannot be decompressed ({first_line(error)})", "write or fetch it again")


def _open_zstd(file: Path) -> BinaryIO:
    # Python has zstd from 3.14 on
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        fail(file, "this build of pyarrow cannot read zstd", "decompress it with the program zstd")
    return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))


def _read_text(file: Path, start: int) -> Iterator[str]:
    if start == 0:
        with _open(file) as opened:
            yield _decode(file, opened.read(), "")


def _read_jsonl(file: Path, start: int) -> Iterator[str]:
    # split on the newline byte alone: str.splitlines also breaks at characters that JSON allows
    with _open(file) as lines:
        filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for number, line in islice(filled, start, None):
            where = f"line {number} "
            yield _text_of(file, _parse(file, _decode(file, line, where), where), where)


def _read_json(file: Path, start: int) -> Iterator[str]:
    with _open(file) as opened:
        is_array = opened.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from _read_jsonl(file, start)
        return
    with _open(file) as opened:
        records = _parse(file, _decode(file, opened.read(), ""), "")
    for number, record in enumerate(records[start:], start + 1):
        yield _text_of(file, record, f"record {number} ")


def _read_parquet(file: Path, start: int) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    try:
        # ParquetFile, not read_table, which would take columns from folder names such as year=2024
        with pq.ParquetFile(file) as parquet:
            check_columns(str(file), parquet.schema_arrow.names)
            # a file without rows may have no group either
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if first + rows > start:
                    column = parquet.read_row_group(group, columns=[TEXT]).column(TEXT)
                    yield from _texts_of(file, column, first, start)
                first += rows
    except (pa.ArrowException, OSError) as error:
        fail(file, f"not a sound parquet file ({first_line(error)})", "write or fetch it again")


def _read_arrow(file: Path, start: int) -> Iterator[str]:
    import pyarrow as pa

    first = 0
    try:
        with pa.memory_map(str(file)) as source:
            # datasets writes streams, feather files are the other format
            try:
                reader = pa.ipc.open_stream(source)
                batches = iter(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            check_columns(str(file), reader.schema.names)
            for batch in batches:
                if first + batch.num_rows > start:
                    column = pa.chunked_array([batch.column(TEXT)])
                    yield from _texts_of(file, column, first, start)
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        fail(file, f"not a sound arrow file ({first_line(error)})", "write or fetch it again")


_TEXT_READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
}
# these two formats compress their columns themselves
_READERS = {**_TEXT_READERS, ".arrow": _read_arrow, ".parquet": _read_parquet}

_COMPRESSIONS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _decode(file: Path, raw: bytes, where: str) -> str:
    """UTF-8 text without a leading byte-order mark; line ends stay as they are."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        fail(file, f"{where}byte {error.start} is not UTF-8", "convert the file to UTF-8")


def _parse(file: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(
            file,
            f"{where}is not JSON ({first_line(error)})",
            f"correct or remove the {'line' if where else 'file'}",
        )


def _text_of(file: Path, record: object, where: str) -> str:
    """The string under "text" of one JSON record."""
    if not isinstance(record, dict):
        fail(file, f"{where}is not a JSON object", f'each must be an object with a "{TEXT}" string')
    if TEXT not in record:
        check_columns(str(file), list(record), where)
    text = record[TEXT]
    if not isinstance(text, str):
        kind = type(text).__name__
        fail(file, f'{where}has {kind} under "{TEXT}"', "each must be a string")
    try:
        # JSON can escape half a surrogate pair, which is not valid text
        text.encode()
    except UnicodeEncodeError:
        fail(file, f"{where}has a lone surrogate", "write the character as UTF-8")
    return text


def _texts_of(file: Path, column: "pa.ChunkedArray", first: int, start: int) -> list[str]:
    """The strings of a column that begins with row ``first``, from row ``start`` on."""
    column = check_column(str(file), column, first)
    # the values too: text that is not UTF-8 would fail later, without the file's name
    column.validate(full=True)
    return column.slice(max(0, start - first)).to_pylist()


def check_columns(source: str, columns: list[str], where: str = "") -> None:
    """Raises ValueError unless there is a column for the documents."""
    if TEXT not in columns:
        raise ValueError(
            f"{_FLAG} {source!r}: {where}has no {TEXT!r} column, only {sorted(map(str, columns))}; "
            f"rename the column that holds the documents to {TEXT!r}"
        )


def check_column(source: str, column: "pa.ChunkedArray", first: int = 0) -> "pa.ChunkedArray":
    """An Arrow column, which begins with row ``first``, as strings.

    Raises:
        ValueError: It holds something else, or a null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, is_string = column.type, False
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view):
        is_string = is_string or test(kind)
    if not is_string:
        raise ValueError(
            f"{_FLAG} {source!r}: column {TEXT!r} holds {column.type}; it must hold strings"
        )
    if column.type != kind:
        # decodes a dictionary column; 64-bit offsets, since repeated texts are written out
        column = column.cast(pa.large_string())
    if column.null_count:
        row = first + pc.index(column.is_null(), True).as_py()
        raise ValueError(
            f"{_FLAG} {source!r}: column {TEXT!r} is null in {column.null_count} rows, row {row} the "
            "first; remove them or put an empty string"
        )
    return column
