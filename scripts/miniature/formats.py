"""Other formats of documentation to blocks of running text, and which reader a file takes."""

import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from miniature.hypertext import Block, html_blocks

# characters of a document that is made of short entries
_GROUP = 8_000


def plain_blocks(text: str) -> list[Block]:
    """Plain text: paragraphs are parted by empty lines; columns and drawings are left out."""
    blocks = []
    for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\f", "\n\n")):
        lines = [line.strip() for line in paragraph.split("\n") if line.strip()]
        columns = sum(bool(re.search(r"\S(?: {3,}|\t)\S", line)) for line in lines)
        if lines and columns <= 0.3 * len(lines):
            blocks.append(Block(" ".join(" ".join(lines).split()), _is_title(lines)))
    return blocks


def _is_title(lines: list[str]) -> bool:
    return (
        len(lines) == 1 and len(lines[0]) < 70 and not lines[0].endswith((".", "!", "?", ":", ","))
    )


def markup_blocks(text: str) -> list[Block]:
    """reStructuredText or Markdown: without directives, code, tables and the marks of inline markup."""
    text = re.sub(r"\r\n?", "\n", text)
    text = re.sub(r"(?ms)^(```|~~~).*?^\1[ \t]*$", "", text)
    blocks: list[Block] = []
    literal: int | None = None
    for paragraph in re.split(r"\n[ \t]*\n", text):
        lines = [line.rstrip() for line in paragraph.split("\n") if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if literal is not None and indent > literal:
            continue
        literal = None
        # a directive, a comment or a target, with what is indented below it
        if re.match(r"\s*(?:\.\. |\|.*\||[+|][-=|])", lines[0]):
            literal = indent
            continue
        if indent >= 4 and not blocks:
            continue
        title = lines[0].strip()
        is_heading = len(lines) == 2 and re.fullmatch(r"([=\-~^\"'`*+#])\1{2,}", lines[1].strip())
        if is_heading or re.match(r"#{1,6} ", title):
            blocks.append(Block(_inline(re.sub(r"^#+ *| *#+$", "", title)), True))
            continue
        joined = " ".join(" ".join(line.strip() for line in lines).split())
        if joined.endswith("::"):
            literal, joined = indent, joined[:-1]
        joined = re.sub(r"^(?:[-*+]|\d+[.)]|#\.) +", "", joined)
        blocks.append(Block(_inline(joined)))
    return [block for block in blocks if block.text]


def _inline(text: str) -> str:
    text = re.sub(r":[a-z:]+:`[~!]?([^`<]+?)(?: *<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`([^`<]*?) *<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"``?([^`]+)``?_*", r"\1", text)
    return re.sub(r"(\*\*|__|\*)(?=\S)(.+?)(?<=\S)\1", r"\2", text).strip()


def man_blocks(text: str) -> list[Block]:
    """A manual page of the man macros; tables, examples in fixed width and the synopsis are left out."""
    blocks: list[Block] = []
    words: list[str] = []
    skipping = section_skipped = False

    def flush() -> None:
        if words:
            blocks.append(Block(" ".join(" ".join(words).split())))
            words.clear()

    for line in text.split("\n"):
        line = line.rstrip()
        if not line.startswith((".", "'")):
            if not line:
                flush()
            elif not skipping and not section_skipped:
                words.append(_roff(line))
            continue
        if line.startswith(('.\\"', "'\\\"")):
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        rest = _roff(" ".join(re.findall(r'"[^"]*"|\S+', rest)))
        if macro in ("nf", "EX", "TS", "EQ", "SY"):
            flush()
            skipping = True
        elif macro in ("fi", "EE", "TE", "EN", "YS"):
            skipping = False
        elif macro in ("SH", "SS"):
            flush()
            section_skipped = rest.upper() in ("SYNOPSIS", "COLOPHON", "AUTHOR", "AUTHORS", "NAME")
            skipping = False
            if not section_skipped:
                blocks.append(Block(rest.capitalize() if rest.isupper() else rest, True))
        elif macro in ("PP", "P", "LP", "TP", "IP", "HP", "RS", "RE", "br", "sp"):
            flush()
        elif macro in _FONTS and not skipping and not section_skipped:
            parts = re.findall(r'"[^"]*"|\S+', line[1:].strip().partition(" ")[2])
            glue = " " if macro in ("B", "I", "R", "SM", "SB") else ""
            words.append(_roff(glue.join(part.strip('"') for part in parts)))
    flush()
    return blocks


_FONTS = ("B", "I", "R", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB")
_ROFF = {
    **{
        r"\-": "-",
        r"\(aq": "'",
        r"\(dq": '"',
        r"\(lq": "“",
        r"\(rq": "”",
        r"\(em": "—",
        r"\(en": "–",
    },
    **{
        r"\(bu": "",
        r"\(cq": "’",
        r"\(oq": "‘",
        r"\(ha": "^",
        r"\(ti": "~",
        r"\e": "\\",
        r"\ ": " ",
    },
    **{r"\&": "", r"\|": "", r"\^": "", r"\/": "", r"\,": "", r"\:": "", r"\%": "", r"\c": ""},
}


def _roff(text: str) -> str:
    text = re.sub(
        r"\\f(?:\[[^]]*\]|\(..|.)|\\\*(?:\[[^]]*\]|\(..|.)|\\s[-+]?\d|\\m\[[^]]*\]", "", text
    )
    text = re.sub(r"\\\[(\w\w)\]", r"\\(\1", text)
    text = re.sub(r'\\".*', "", text)
    return re.sub(r"\\(?:\(..|.)", lambda m: _ROFF.get(m[0], ""), text).replace('"', "")


def pod_blocks(text: str) -> list[Block]:
    """Perl's documentation; indented paragraphs are code."""
    blocks = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        paragraph = paragraph.strip("\n")
        if not paragraph or paragraph[0] in " \t":
            continue
        command = re.match(r"=(\w+)\s*(.*)", paragraph, re.DOTALL)
        if command:
            if command[1].startswith("head") or (command[1] == "item" and len(command[2]) > 1):
                blocks.append(Block(" ".join(_pod(command[2]).split()), True))
            continue
        blocks.append(Block(" ".join(_pod(paragraph).split())))
    return blocks


def _pod(text: str) -> str:
    # C<< a->b >>: as many brackets as the code within needs
    text = re.sub(
        r"[BCFIS](<<+)\s+(.*?)\s+>>+",
        lambda m: m[2].replace("<", "E<lt>").replace(">", "E<gt>"),
        text,
    )
    previous = None
    while text != previous:
        previous = text
        text = re.sub(r"[XZ]<[^<>]*>", "", text)
        text = re.sub(r"L<(?:([^<>|]+)\|)?([^<>]+)>", lambda m: m[1] or m[2], text)
        text = re.sub(r"[BCFIS]<([^<>]*)>", r"\1", text)
        text = text.replace("E<gt>", "\0gt").replace("E<lt>", "\0lt")
    return text.replace("\0gt", ">").replace("\0lt", "<")


def fortune_documents(text: str) -> Iterator[list[Block]]:
    """Sayings parted by lines of one percent sign, several to a document."""
    sayings = (Block(" ".join(saying.split())) for saying in re.split(r"(?m)^%\s*$", text))
    yield from _groups(sayings)


def quoted_blocks(text: str) -> list[Block]:
    """The story of Endless Sky, from its data files, which hold it in backquotes."""
    passages = (re.sub(r"<[^<>]*>", "", passage) for passage in re.findall(r"`([^`]*)`", text))
    return [Block(" ".join(passage.split())) for passage in passages if passage.strip()]


def catalogue_documents(data: bytes) -> Iterator[list[Block]]:
    """The English strings of a catalogue of translations (``.mo``) in its order, several to a document."""
    magic = struct.unpack_from("<I", data)[0]
    order = "<" if magic == 0x950412DE else ">"
    count, start = struct.unpack_from(f"{order}2I", data, 8)
    places = (struct.unpack_from(f"{order}2I", data, start + 8 * i) for i in range(1, count))
    # a context before \4 and plural forms behind \0 are not running text; nor are marks like <b>
    strings = (data[at : at + size].partition(b"\0")[0].rpartition(b"\4")[2] for size, at in places)
    texts = (re.sub(r"<[^<>]*>", "", _text(string)) for string in strings)
    yield from _groups(
        Block(" ".join(part.split())) for text in texts for part in text.split("\n\n")
    )


def dictd_documents(data: bytes) -> Iterator[list[Block]]:
    """A database of dictd, in its own order: entries begin at the margin, several to a document."""
    text = re.sub(
        r"\[(?:1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5|Century Dict\.[^]]*)\]|[{}\\]",
        "",
        _text(data),
    )
    entries = re.split(r"\n(?=\S)", text)
    # what is before the first entry of the alphabet tells of the database itself
    bodies = (entry for entry in entries if not entry.startswith("00-"))
    yield from _groups(Block(" ".join(entry.split())) for entry in bodies)


def _groups(entries: Iterator[Block]) -> Iterator[list[Block]]:
    group: list[Block] = []
    size = 0
    for entry in entries:
        if not entry.text:
            continue
        group.append(entry)
        size += len(entry.text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def sword_documents(index: bytes, data: bytes) -> Iterator[list[Block]]:
    """A compressed module of SWORD: one document a compressed block, that is, a book or a chapter.

    Args:
        index: The file that ends in ``zs``: offset, size and unpacked size of each block, uint32.
        data: The file that ends in ``zz``.
    """
    for offset, size, _ in struct.iter_unpack("<III", index):
        if size:
            text = _text(zlib.decompress(data[offset : offset + size]))
            text = re.sub(r"<(note|title|RF)\b.*?</\1>", "", text, flags=re.DOTALL)
            text = re.sub(
                r"<(?:p|br|lb|l|lg|div|verse|chapter)\b[^>]*>|</(?:p|l|lg|div)>", "\n\n", text
            )
            paragraphs = re.sub(r"<[^>]*>", "", text).replace("\0", "\n\n").split("\n\n")
            yield [Block(" ".join(part.split())) for part in paragraphs if part.strip()]


_MAN = re.compile(r"\.[1-9][a-z]*$")
_BY_ENDING: dict[str, Callable[[str], list[Block]]] = {
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml", ".page", ".docbook"), html_blocks),
    **dict.fromkeys((".rst", ".md"), markup_blocks),
    ".txt": plain_blocks,
    ".pod": pod_blocks,
}


def documents(path: str, data: bytes) -> Iterator[list[Block]] | None:
    """The documents of a file, by its ending, or None where it is of no kind that is read.

    Args:
        path: Within its package; ``.gz`` and ``.dz`` are unpacked.
        data: Its bytes.
    """
    name = PurePosixPath(path)
    if name.suffix in (".gz", ".dz"):
        data, name = gzip.decompress(data), name.with_suffix("")
    if name.suffix == ".dict":
        return dictd_documents(data)
    if "fortunes" in name.parts and not name.suffix:
        return fortune_documents(_text(data))
    if name.suffix == ".mo":
        return catalogue_documents(data)
    if "endless-sky" in name.parts and name.suffix == ".txt":
        return iter([quoted_blocks(_text(data))])
    if _MAN.search(name.name) and "man" in name.parts:
        return iter([man_blocks(_text(data))])
    read = _BY_ENDING.get(name.suffix.lower())
    return None if read is None else iter([read(_text(data))])


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
