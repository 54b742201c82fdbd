"""scripts/miniature_text.py: formats to prose, no repeated text, held-out documents, the same bytes twice."""

import gzip
import hashlib
import io
import json
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import miniature_text  # noqa: E402
from miniature.dedup import Seen, is_held_out  # noqa: E402
from miniature.formats import documents, sword_documents  # noqa: E402
from miniature.hypertext import Block, html_blocks  # noqa: E402
from miniature.prose import clean, is_prose, is_title, prose  # noqa: E402

SENTENCE = (
    "The kettle in the kitchen of the old house was the first thing that she heard in the morning. "
)


def texts(blocks):
    return [("# " if block.is_heading else "") + block.text for block in blocks]


def read(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    return [texts(blocks) for blocks in documents(path, data)]


def test_html_keeps_text_and_headings_alone():
    page = """<!DOCTYPE html><html><head><title>Site</title><style>p{}</style></head><body>
      <nav><p>Home</p></nav><div class="sphinxsidebar"><div><p>Contents</p></div><p>Side</p></div>
      <h1>Lists<a class="headerlink" href="#l">\u00b6</a></h1>
      <p>A <code>list</code> holds<br>items &amp; <b>more</b>.
      <p>An unclosed paragraph.
      <pre>x = [1]</pre><div class="highlight-python3 notranslate"><p>y = 2</p></div>
      <ul><li><a href="a">first page</a></li><li>see <a href="b">b</a>, which is about it</ul>
      <table><tr><td>One cell.<td>Another.</table><script>var p = "<p>no</p>";</script>
      <div role="navigation">next</div><footer>(c)</footer><p>The end.</p></body></html>"""
    assert texts(html_blocks(page)) == [
        "# Lists",
        "A list holds items & more.",
        "An unclosed paragraph.",
        "see b, which is about it",
        "One cell.",
        "Another.",
        "The end.",
    ]


def test_docbook_and_mallard():
    page = """<page><info><desc>x</desc></info><title>Print</title><p>Press <key>P</key>.</p>
      <steps><item><p>Choose <gui>File</gui>.</p></item></steps><media type="image"/>
      <programlisting>code</programlisting><para>Last &amp; least.</para></page>"""
    assert texts(html_blocks(page)) == ["# Print", "Press P.", "Choose File.", "Last & least."]


def test_manual_page():
    page = r""".\" comment
.TH CAT 1
.SH NAME
cat \- join
.SH SYNOPSIS
.B cat
.SH DESCRIPTION
The \fIcat\fP program reads
.BR files (5)
and \(lqwrites\(rq them.
.PP
.nf
int main;
.fi
.TP
.B \-n
Number lines.
.SS See also
Read \fBtac\fR(1)."""
    assert read("usr/share/man/man1/cat.1.gz", gzip.compress(page.encode())) == [
        [
            "# Description",
            "The cat program reads files(5) and “writes” them.",
            "-n Number lines.",
            "# See also",
            "Read tac(1).",
        ]
    ]


def test_restructured_text_and_markdown():
    page = """Title
=====

See :ref:`the guide <guide>` and ``code``, *now*::

    x = 1

    y = 2

.. note::

   Hidden.

- A `link <http://x>`_ here.

## Part

[Text](http://y) of **two**
lines.

```
z = 3
```
"""
    assert read("a/b.rst", page) == read("a/b.md", page)
    assert read("a/b.rst", page) == [
        ["# Title", "See the guide and code, now:", "A link here.", "# Part", "Text of two lines."]
    ]


def test_plain_text_and_pod():
    page = "TITLE\n\nTwo\nlines.\n\na    b    c\nd    e    f\n"
    assert read("a.txt", page) == [["# TITLE", "Two lines."]]
    page = "=head1 The B<name>\n\nUse L<perlre|x> or C<< a->b >>X<i>.\n\n    code\n\n=over 4\n\n=item *\n\nOne.\n"
    assert read("a.pod", page) == [["# The name", "Use perlre or a->b.", "One."]]


def test_dictionary_fortunes_and_catalogue():
    page = "00-database-info\n   about\nkettle n 1: a\n   pot\nkey n 1: of {locks}\n"
    assert read("d.dict.dz", gzip.compress(page.encode())) == [
        ["kettle n 1: a pot", "key n 1: of locks"]
    ]
    assert read("games/fortunes/art", "One.\n%\nTwo\nlines.\n%\n") == [["One.", "Two lines."]]
    ids = [b"", b"ctx\x04A <b>wolf</b>.\n\nIt howls.", b"ship\x00ships"]
    at, table, body = 28 + 8 * len(ids), b"", b""
    for item in ids:
        table += struct.pack("<2I", len(item), at + len(body))
        body += item + b"\0"
    catalogue = struct.pack("<7I", 0x950412DE, 0, len(ids), 28, 0, 0, 0) + table + body
    assert read("x.mo", catalogue) == [["A wolf.", "It howls.", "ship"]]
    assert documents("x.png", b"") is None


def test_sword_module():
    books = [b"<verse/>In the <w>beginning</w>.<p/>And then.", b"<title>no</title>Second."]
    packed = [zlib.compress(book) for book in books]
    index = struct.pack("<6I", 0, len(packed[0]), 9, len(packed[0]), len(packed[1]), 9)
    found = [texts(blocks) for blocks in sword_documents(index, b"".join(packed))]
    assert found == [["In the beginning.", "And then."], ["Second."]]


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE,
        "Use the -v flag of the program (see page 7) if you want to see what it does with the file.",
    ],
)
def test_prose_is_kept(text):
    assert is_prose(text)


@pytest.mark.parametrize(
    "text",
    [
        "Home Contents Index Previous Next Search Download Login About Contact Imprint",
        "for (i = 0; i < n; i++) { the[i] += of * in[i]; } while (is_a || to_b) { *p++ = the; }",
        "Die Katze sitzt auf dem Dach und schaut in den Garten, in dem die Vögel singen.",
        "0.25 1.75 and 3.5 of 9.125 the 4.0 in 12.75 to 88.5 is 19.25",
        "Short one.",
    ],
)
def test_what_is_no_prose_is_left_out(text):
    assert not is_prose(text)


def test_titles_and_characters():
    assert is_title("3.2 How to read a map")
    assert not is_title("numpy.foo(a, b=None)")
    assert not is_title("3.2.1")
    assert clean("domain.members#") == "domain.members"
    assert clean("soft\u00adly  e\u0301 \u00b6 &gnum; , x") == "softly \u00e9 gnum, x"


def test_documents_worth_reading():
    title, empty = Block("A story", True), Block("An empty part", True)
    good = [title, *(Block(f"{SENTENCE}{i}") for i in range(4)), empty]
    assert prose(good) == [Block(clean(text), heading) for text, heading in good[:-1]]
    assert prose([]) == []
    # too short; mostly tables; one-liners
    assert prose(good[:3]) == []
    assert prose([*good, Block("12 34 56 78 " * 100)]) == []
    assert prose([Block("It is one of the best. ")] * 40) == []


def passage(topic, count=4):
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    return [
        Block(
            f"In the {topic} there was a {number} that nobody in the whole of the village had ever seen before, and it was called the {topic} {number}."
        )
        for number in numbers[:count]
    ]


def test_repeated_text_is_left_out():
    seen = Seen()
    first = [Block("Wood", True), *passage("forest")]
    assert seen.new_part(first) == first
    # again, in capitals, with other numbers and punctuation
    assert seen.new_part([Block(f"{text.upper()} 17!") for text, _ in first]) == []
    # a new document with an old paragraph under a heading of its own: both go
    mixed = [
        *passage("river"),
        Block("Licence", True),
        first[1],
        Block("Sea", True),
        *passage("sea"),
    ]
    assert seen.new_part(mixed) == [*passage("river"), Block("Sea", True), *passage("sea")]
    # another version: most of it known, so all of it goes, and what was new in it does not count as seen
    assert seen.new_part([*passage("river"), *passage("lake", 3)]) == []
    assert seen.new_part(passage("lake")) == passage("lake")
    # within one document
    assert seen.new_part([*passage("moor"), *passage("moor", 2)]) == passage("moor")


def test_held_out_share():
    names = [f"package/{i}.html" for i in range(4000)]
    held_out = sum(is_held_out(name, 0.1) for name in names)
    assert 320 < held_out < 480
    assert not any(is_held_out(name, 0) for name in names)


LIST = '[genres]\nbooks = ["a-doc"]\nmanuals = ["b-doc"]\n[only]\nb-doc = ["*/en/*"]\n[skip]\npaths = ["*skipped*"]\n'


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Stand-ins for Debian's tools: a package is a plain tar, and apt has the versions of a-doc and b-doc."""
    packages = {"a-doc": [], "b-doc": []}
    for i in range(300):
        page = "".join(f"<p>{text}</p>" for text, _ in passage(word(i)))
        packages["a-doc"].append((f"./usr/a/{i}.html", page))
    page = "".join(f"<p>{text}</p>" for text, _ in [*passage("harbour"), *passage(word(7), 2)])
    packages["b-doc"] += [
        ("./usr/b/en/page.html", page),
        ("./usr/b/de/page.html", "".join(f"<p>{text}</p>" for text, _ in passage("boot"))),
        ("./usr/b/en/skipped.html", "".join(f"<p>{text}</p>" for text, _ in passage("anchor"))),
    ]
    for name, files in packages.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for path, text in files:
                member = tarfile.TarInfo(path)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    policy = "".join(
        f"{name}:\n  Installed: (none)\n  Candidate: 1:2-3\n  Version table:\n" for name in packages
    )
    (tmp_path / "policy").write_text(policy)
    (tmp_path / "bin").mkdir()
    for tool, lines in {
        "apt-cache": f"cat {tmp_path}/policy",
        "apt-get": f'shift; for p; do cp {tmp_path}/"${{p%%=*}}".tar "${{p%%=*}}_1%3a2-3_all.deb" || {{ echo "E: no $p" >&2; exit 100; }}; done',
        "dpkg-deb": 'cat "$2"',
    }.items():
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "list.toml").write_text(LIST)
    return tmp_path


def word(number):
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:04}") + "ton"


def run(monkeypatch, capsys, *argv):
    """The command in this process: exit code and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["miniature_text", *map(str, argv)])
    try:
        miniature_text.main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def test_the_whole_recipe_twice(debian, monkeypatch, capsys):
    monkeypatch.setattr(miniature_text, "HELD_OUT", 0.1)
    for out, num_proc in (("one", 1), ("two", 2)):
        argv = ["--packages", debian / "list.toml", "--out", debian / out, "--num_proc", num_proc]
        assert run(monkeypatch, capsys, *argv) == (0, "")
    names = ("train.jsonl", "heldout.jsonl", "manifest.json")
    for name in names:
        assert (debian / "one" / name).read_bytes() == (debian / "two" / name).read_bytes()
    train, held_out = (
        [json.loads(line) for line in (debian / "one" / name).read_text().splitlines()]
        for name in names[:2]
    )
    assert 10 < len(held_out) < 60
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    rows = train + held_out
    assert len(rows) == 301
    # neither the other language, nor the skipped page, nor what a-doc has said already
    (b,) = [row for row in rows if row["package"] == "b-doc"]
    assert b == {
        "text": "\n\n".join(text for text, _ in passage("harbour")),
        "package": "b-doc",
        "genre": "manuals",
    }
    manifest = json.loads((debian / "one" / "manifest.json").read_text())
    assert [entry["version"] for entry in manifest["packages"]] == ["1:2-3", "1:2-3"]
    for part, rows in (("train", train), ("heldout", held_out)):
        counts = [entry.get(f"{part}_documents", 0) for entry in manifest["packages"]]
        assert counts == [
            sum(row["package"] == name for row in rows) for name in ("a-doc", "b-doc")
        ]
    data = (debian / "one" / "train.jsonl").read_bytes()
    assert manifest["files"]["train.jsonl"] == {
        "documents": len(train),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_a_missing_package_is_an_error_unless_allowed(debian, monkeypatch, capsys):
    (debian / "list.toml").write_text(LIST.replace('["b-doc"]', '["b-doc", "c-doc", "d-doc"]'))
    argv = ["--packages", debian / "list.toml", "--out", debian / "out"]
    code, error = run(monkeypatch, capsys, *argv)
    assert (code, error) == (
        2,
        "flame: error: apt's index has no c-doc, d-doc; run apt-get update, or leave them out with --allow_missing\n",
    )
    assert not (debian / "out").exists()
    assert run(monkeypatch, capsys, *argv, "--allow_missing") == (0, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LIST.replace('["b-doc"]', '["b-doc", "a-doc"]'), "a-doc is listed 2 times"),
        (LIST.replace("b-doc = ", "e-doc = "), "[only] names e-doc, which is in no genre"),
        ("genres", "list.toml: "),
        ("other = 1", "list.toml: [genres] must have a list of packages for each genre"),
        ('[genres]\nbooks = "a-doc"', "[genres] must have a list of packages for each genre"),
        # Debian's page is all that there is of b-doc
        (LIST.replace("*/en/*", "*/fr/*"), "nothing is left of b-doc 1:2-3: "),
    ],
)
def test_errors_of_the_list(debian, monkeypatch, capsys, text, message):
    (debian / "list.toml").write_text(text)
    argv = ["--packages", debian / "list.toml", "--out", debian / "out"]
    code, error = run(monkeypatch, capsys, *argv)
    assert code == 2
    assert error.startswith("flame: error: --packages")
    assert message in error


def test_errors_of_the_machine(debian, monkeypatch, capsys):
    argv = ["--packages", debian / "list.toml", "--out", debian / "out"]
    assert run(monkeypatch, capsys, *argv, "--num_proc", "0")[1].startswith(
        "flame: error: --num_proc must be"
    )
    (debian / "b-doc.tar").unlink()
    assert "apt-get download failed: E: no b-doc=1:2-3" in run(monkeypatch, capsys, *argv)[1]
    monkeypatch.setenv("PATH", str(debian))
    assert "apt-get is not there" in run(monkeypatch, capsys, *argv)[1]


def test_the_shipped_list_is_well_formed():
    packages = miniature_text.read_list(miniature_text.PACKAGES)
    assert len(packages) > 150
    assert all(package.skip for package in packages)
