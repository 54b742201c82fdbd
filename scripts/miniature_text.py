"""``python scripts/miniature_text.py --out data/miniature``: Debian's documentation packages to English prose.

Writes ``train.jsonl`` and ``heldout.jsonl``, one document per line, and ``manifest.json``, which says what is in
them. The same packages give the same bytes. docs/softpick/MINIATURE_DATA.md tells what the text is.
"""

import hashlib
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

from miniature.debian import candidates, download, files
from miniature.dedup import Seen, is_held_out, position
from miniature.formats import documents, sword_documents
from miniature.hypertext import Block
from miniature.prose import prose

from flame.base.command_line import Parser
from flame.base.errors import UsageError, exit_on_usage_error
from flame.base.log import init_logger, logger

PACKAGES = Path(__file__).parent / "miniature" / "packages.toml"
HELD_OUT = 0.015


class Package(NamedTuple):
    """A package of the list."""

    name: str
    genre: str
    only: list[str]
    """Patterns of the paths that are read; empty for all."""
    skip: list[str]
    """Patterns of the paths that are not read."""


class Document(NamedTuple):
    """A document before repeated text is taken out."""

    name: str
    blocks: list[Block]


def read_list(path: Path) -> list[Package]:
    """The packages of a list, in its order: earlier ones keep what later ones repeat.

    Raises:
        UsageError: The file is missing, no TOML, or names a package twice or only in its patterns.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--packages {path}: {error}") from None
    only, skip = table.get("only", {}), table.get("skip", {}).get("paths", [])
    genres = table.get("genres")
    if not isinstance(genres, dict) or not all(isinstance(x, list) for x in genres.values()):
        raise UsageError(f"--packages {path}: [genres] must have a list of packages for each genre")
    packages = [
        Package(name, genre, only.get(name, []), skip)
        for genre, names in genres.items()
        for name in names
    ]
    names = Counter(package.name for package in packages)
    for name, count in names.items():
        if count > 1:
            raise UsageError(f"--packages {path}: {name} is listed {count} times")
    for name in only:
        if name not in names:
            raise UsageError(f"--packages {path}: [only] names {name}, which is in no genre")
    return packages


def read_package(package: Package, deb: Path) -> list[Document]:
    """The prose of a package, document by document, sorted by path."""
    found: list[Document] = []
    modules: dict[str, bytes] = {}
    for path, data in files(deb):
        if package.only and not any(fnmatchcase(path, pattern) for pattern in package.only):
            continue
        if any(fnmatchcase(path, pattern) for pattern in package.skip):
            continue
        # SWORD: an index and the data, two files that belong together
        if path.endswith(("bzs", "bzz", "czs", "czz")):
            modules[path] = data
        elif (parts := documents(path, data)) is not None:
            found += _prose(f"{package.name}/{path}", parts)
    for path, index in modules.items():
        if path.endswith("s"):
            data = modules[path[:-1] + "z"]
            found += _prose(f"{package.name}/{path}", sword_documents(index, data))
    return sorted(found)


def _prose(name: str, parts: Iterator[list[Block]]) -> Iterator[Document]:
    for number, blocks in enumerate(parts):
        if kept := prose(blocks):
            yield Document(f"{name}#{number:05}", kept)


def write(
    packages: list[Package],
    debs: dict[str, Path],
    versions: dict[str, str],
    out: Path,
    num_proc: int,
) -> None:
    """Writes train.jsonl, heldout.jsonl and manifest.json into ``out``, which exists."""
    seen = Seen()
    rows: dict[bool, list[tuple[int, str]]] = {False: [], True: []}
    entries = []
    with Pool(num_proc) as pool:
        results = [
            (package, pool.apply_async(read_package, (package, debs[package.name])))
            for package in packages
        ]
        for package, result in results:
            counts: Counter[str] = Counter()
            for name, blocks in result.get():
                kept = seen.new_part(blocks)
                if not kept:
                    counts["repeated_documents"] += 1
                    continue
                text = "\n\n".join(block.text for block in kept)
                row = {"text": text, "package": package.name, "genre": package.genre}
                held_out = is_held_out(name, HELD_OUT)
                rows[held_out].append((position(name), json.dumps(row, ensure_ascii=False)))
                part = "heldout" if held_out else "train"
                counts[f"{part}_documents"] += 1
                counts[f"{part}_characters"] += len(text)
            logger.info(
                f"{package.name} {versions[package.name]}: {counts['train_characters']:,} characters"
            )
            entries.append(
                {
                    "package": package.name,
                    "version": versions[package.name],
                    "genre": package.genre,
                    **counts,
                }
            )
    empty = [
        f"{entry['package']} {entry['version']}"
        for entry in entries
        if not entry.keys() & {"train_documents", "heldout_documents"}
    ]
    if empty:
        raise UsageError(
            f"--packages: nothing is left of {', '.join(empty)}: not prose, skipped or repeated; take them off the list"
        )
    manifest = {"packages": entries, "files": {}}
    for held_out, name in ((False, "train.jsonl"), (True, "heldout.jsonl")):
        # shuffled, so that the end of the file, which a run may hold out, is of every package
        data = "".join(f"{row}\n" for _, row in sorted(rows[held_out])).encode()
        (out / name).write_bytes(data)
        manifest["files"][name] = {
            "documents": len(rows[held_out]),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        logger.info(f"{out / name}: {manifest['files'][name]}")
    text = json.dumps(manifest, indent=1) + "\n"
    (out / "manifest.json").write_text(text, encoding="utf-8")


def _parser() -> Parser:
    parser = Parser(
        prog="python scripts/miniature_text.py",
        description="Gathers English prose from Debian's documentation packages, which are not installed.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; packages are kept in its debs/"
    )
    parser.add_argument(
        "--packages", type=Path, default=PACKAGES, help="list of packages (default: %(default)s)"
    )
    parser.add_argument(
        "--allow_missing",
        action="store_true",
        help="do without packages that apt's index does not have",
    )
    parser.add_argument(
        "--num_proc",
        type=int,
        default=2,
        help="processes that read packages (default: %(default)s)",
    )
    return parser


def main() -> None:
    init_logger()
    with exit_on_usage_error():
        args = _parser().parse_args()
        if args.num_proc < 1:
            raise UsageError(f"--num_proc must be at least 1, got {args.num_proc}")
        packages = read_list(args.packages)
        versions = candidates([package.name for package in packages])
        missing = [name for name, version in versions.items() if version is None]
        if missing and not args.allow_missing:
            raise UsageError(
                f"apt's index has no {', '.join(missing)}; run apt-get update, or leave them out with --allow_missing"
            )
        if missing:
            logger.info(f"left out, since apt's index has none: {', '.join(missing)}")
        packages = [package for package in packages if versions[package.name] is not None]
        if not packages:
            raise UsageError("--allow_missing: no package is left")
        present = {package.name: versions[package.name] for package in packages}
        try:
            debs = download(present, args.out / "debs")
            write(packages, debs, present, args.out, args.num_proc)
        except OSError as error:
            raise UsageError(f"--out {args.out} cannot be written: {error}") from None


if __name__ == "__main__":
    main()
    sys.exit(0)
