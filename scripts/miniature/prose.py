"""Which blocks are English prose, and which documents are worth reading."""

import re
import unicodedata

from miniature.hypertext import Block

# the most frequent words of English that say nothing by themselves, and are rare in code, names and tables
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about after all also an and any are as at be because been before between but by can
        could do does each for from had has have he her his how i if in into is it its like made
        make many may more most must no not of on one only or other our out over should since so
        some such than that the their them then there these they this those through to two under
        up use used was we were what when where which while who will with would you your my she
        him me us did being here very just
        """,
    )
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'’]*")
_ODD = re.compile(r"[^A-Za-z\s.,;:'\"’‘“”()!?\-–—]")
# symbols of code that running text has no use for
_CODE = re.compile(r"[{}=<>\\|_$#@^~\[\]+*/&%]")
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202f\ufffd¶]")
# soft hyphens and their like, within words
_WITHIN = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")

MIN_CHARACTERS = 300


def clean(text: str) -> str:
    """Composed characters, none that cannot be seen, single spaces, entities that no parser knew by their names."""
    text = re.sub(r"&(\w{2,20});", r"\1", text)
    text = _WITHIN.sub("", text)
    text = _UNSEEN.sub(" ", unicodedata.normalize("NFC", text))
    # the link to itself that a heading ends with
    text = re.sub(r"(?<=\w)[#§]\s*$", "", text)
    return re.sub(r" (?=[.,;:!?)](?:\s|$))", "", " ".join(text.split()))


def is_prose(text: str) -> bool:
    """Whether a paragraph is English running text: words that make sentences, hardly any code or numbers."""
    words = _WORD.findall(text)
    if len(words) < 5 or len(text) > 12 * len(words):
        return False
    functional = sum(word.lower() in _FUNCTION_WORDS for word in words)
    if functional < (0.25 if len(words) >= 12 else 0.2) * len(words):
        return False
    return len(_CODE.findall(text)) <= 0.03 * len(text) and len(_ODD.findall(text)) <= 0.1 * len(
        text
    )


def is_title(text: str) -> bool:
    """Whether a heading is words: no signature, path or number alone."""
    words = _WORD.findall(text)
    if not 0 < len(words) <= 14 or re.search(r"\w\(|[=_{}<>\\]", text):
        return False
    return len(_ODD.findall(text)) <= 0.2 * len(text)


def prose(blocks: list[Block]) -> list[Block]:
    """The blocks that are prose, with the headings above them; none where the document is not worth it.

    A document is dropped if less than 300 characters or two fifths of its text are prose, or if its
    paragraphs are shorter than 80 characters on average: lists of names, references of one-liners.
    """
    blocks = [Block(clean(text), is_heading) for text, is_heading in blocks]
    kept: list[Block] = []
    for block in blocks:
        if block.is_heading:
            if is_title(block.text):
                kept.append(block)
        elif is_prose(block.text):
            kept.append(block)
    kept = without_empty_headings(kept)
    paragraphs = [len(block.text) for block in kept if not block.is_heading]
    total = sum(len(block.text) for block in blocks if not block.is_heading)
    size = sum(paragraphs)
    if size < MIN_CHARACTERS or size < 0.4 * total or size < 80 * len(paragraphs):
        return []
    return kept


def without_empty_headings(blocks: list[Block]) -> list[Block]:
    """Leaves out headings with no paragraph before the next one; the innermost stays."""
    return [
        block
        for i, block in enumerate(blocks)
        if not block.is_heading or (i + 1 < len(blocks) and not blocks[i + 1].is_heading)
    ]
