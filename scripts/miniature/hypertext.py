"""HTML, DocBook and Mallard to blocks of running text: headings and paragraphs, without what surrounds them."""

from html.parser import HTMLParser
from typing import NamedTuple


class Block(NamedTuple):
    """A paragraph, list item, table cell or heading, on one line."""

    text: str
    is_heading: bool = False


_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "wbr"}
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6", "title", "dt", "term"}
_BLOCKS = _HEADINGS | {
    *(
        "p",
        "div",
        "section",
        "article",
        "main",
        "body",
        "blockquote",
        "center",
        "dd",
        "li",
        "ul",
        "ol",
    ),
    *("dl", "table", "tbody", "thead", "tr", "td", "th", "caption", "figcaption", "hr", "details"),
    *("para", "simpara", "chapter", "sect1", "sect2", "sect3", "sect4", "listitem", "varlistentry"),
    *(
        "note",
        "tip",
        "warning",
        "caution",
        "important",
        "entry",
        "row",
        "item",
        "steps",
        "list",
        "terms",
    ),
}
# code and what is not text, and DocBook's and Mallard's words for them
_SKIPPED = {
    *("script", "style", "head", "nav", "header", "footer", "form", "button", "select", "textarea"),
    *("noscript", "svg", "object", "iframe", "pre", "template"),
    *("programlisting", "screen", "synopsis", "cmdsynopsis", "funcsynopsis", "literallayout"),
    *(
        "info",
        "bookinfo",
        "articleinfo",
        "indexterm",
        "equation",
        "informalequation",
        "media",
        "links",
    ),
    *("remark", "toc", "index", "bibliography", "legalnotice", "revhistory"),
}
# by class or id, of the tools that make documentation
_SURROUNDING = {
    *("related", "sidebar", "contents", "local-toc", "breadcrumb", "breadcrumbs", "menu", "footer"),
    *(
        "headerlink",
        "headerLink",
        "copyright",
        "code",
        "codehilite",
        "sourcecode",
        "source",
        "listing",
    ),
    *(
        "listingblock",
        "viewcode-link",
        "linkback",
        "bottom",
        "page-tools",
        "memproto",
        "fragment",
        "synopsis",
    ),
    *("admonition-title", "searchbox", "SIntrapara", "RktBlk", "refpara", "versionbox"),
    *(
        "minitoc",
        "programlisting",
        "screen",
        "qmlproto",
        "flags",
        "TITLE",
        "indexterm",
        "example-code",
        "literal-block",
    ),
    *(
        "summary",
        "memitem-toc",
        "edit",
        "mini-toc",
        "docutils-footer",
        "permalink",
        "anchor",
        "doctools",
        "lineno",
    ),
}
_SURROUNDING_STARTS = ("nav", "highlight", "toc", "sphinxsidebar", "footer", "header-")
_CLASS_TAGS = {"div", "section", "ul", "ol", "dl", "table", "span", "a", "aside", "td", "tr"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._parts: list[str] = []
        self._is_heading = False
        # characters of the block, and those of them within links
        self._size = self._linked = 0
        self._links = 0
        # the element that is being left out, and how often it is open within itself
        self._skipped: str | None = None
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped is not None:
            if tag == self._skipped:
                self._depth += 1
            return
        if tag in _SKIPPED or (tag in _CLASS_TAGS and _is_surrounding(attrs)):
            if tag in _BLOCKS or tag == "pre":
                self.flush()
            self._skipped, self._depth = tag, 1
        elif tag in _BLOCKS:
            self.flush()
            self._is_heading = tag in _HEADINGS
        elif tag == "br":
            self._parts.append(" ")
        elif tag == "a":
            self._links += 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # an empty element of XML leaves nothing open
        if self._skipped is None and tag in _BLOCKS | {"br"}:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._skipped is not None:
            if tag == self._skipped:
                self._depth -= 1
                if not self._depth:
                    self._skipped = None
        elif tag in _BLOCKS:
            self.flush()
        elif tag == "a":
            self._links = max(0, self._links - 1)

    def handle_data(self, data: str) -> None:
        if self._skipped is None:
            self._parts.append(data)
            size = len(data.strip())
            self._size += size
            self._linked += size * (self._links > 0)

    def flush(self) -> None:
        text = " ".join("".join(self._parts).split())
        # a block of links leads elsewhere: a table of contents, an index, "see also"
        if text and self._linked <= 0.6 * self._size:
            self.blocks.append(Block(text, self._is_heading))
        self._parts.clear()
        self._size = self._linked = self._links = 0
        self._is_heading = False


def _is_surrounding(attrs: list[tuple[str, str | None]]) -> bool:
    for name, value in attrs:
        if name == "role" and value in ("navigation", "search", "banner", "contentinfo"):
            return True
        if name in ("class", "id") and value:
            for word in value.split():
                if word in _SURROUNDING or word.startswith(_SURROUNDING_STARTS):
                    return True
    return False


def html_blocks(text: str) -> list[Block]:
    """Blocks of an HTML, DocBook or Mallard page in their order.

    Left out are navigation, code, formulas, forms, and blocks that are links for the most part. Table cells
    and list items are blocks of their own.
    """
    reader = _Reader()
    reader.feed(text)
    reader.close()
    reader.flush()
    return reader.blocks
