"""Turns the files of a package into clean text: HTML, reStructuredText, POD, Markdown, R data and others.

Every reader takes the bytes of one file and returns its text: markup and navigation gone, blank lines
collapsed, lines otherwise as the author set them. A reader raises `ValueError` on a file it cannot read.
"""

import gzip
import html.parser
import json
import lzma
import re
import struct
import zlib

VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
BLOCK = frozenset(
    "address article aside blockquote body caption dd div dl dt fieldset figcaption figure form h1 h2 h3 h4"
    " h5 h6 header hr item li main note ol p page pre screen code-block section steps subtitle summary table"
    " tbody td th thead title tr ul".split()
)
SKIP = frozenset("script style head nav footer noscript svg math info form button select".split())
# Navigation and permalinks of Sphinx, DocBook, texi2html, mdBook, Doxygen and others.
SKIP_CLASS = re.compile(
    r"sphinxsidebar\w*|related|headerlink|\w*nav|nav\w*|nav-\w+|toc\w*|contents|breadcrumbs?|sidebar\w*|"
    r"footer\w*|header|node-header|genindextable|indextable|lineno|linenos|menu\w*|permalink|header-link|"
    r"anchorlink|printindex"
)
# What is left of it where it carries no class: lines of nothing but these words.
NAVIGATION_LINE = re.compile(
    r"(?mi)^(?:[-\s|\[\]<>«»]*\b(?:(?:prev|previous|next|up|home|top|contents|index|download the"
    r" ebook)\b[-\s|,:\[\]<>«»]*)+"
    r"|(?:\[ ?(?:<<|<|>|>>|up|top|contents|index|\?) ?\]\s*)+|<-previous.*|.*next->|(?:next|previous|up):"
    r" .*\[(?:contents|index)\].*"
    r"|This document was generated .*|LibreOffice [\d.]+ Help|Index \W+"
    r"|- (?:prev|next)(?:chapter|appendix)? ?[\w.]+ .*)$"
)


class Text(html.parser.HTMLParser):
    """Collects the readable text of one HTML (or simple XML) page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open = []  # (tag, skipped, preformatted, main)
        self.all, self.main = [], []

    def handle_starttag(self, tag, attributes):
        if tag in ("br", "hr"):
            self.add("\n")
        if tag in VOID:
            return
        attributes = dict(attributes)
        classes = f"{attributes.get('class') or ''} {attributes.get('id') or ''}".lower().split()
        role = attributes.get("role") or ""
        parent = self.open[-1] if self.open else ("", False, False, False)
        main = parent[3] or tag == "main" or role == "main"
        if tag in ("li", "p", "dt", "dd", "tr", "option"):
            # Old HTML leaves these open; one that starts again at the same level ends the one before.
            if parent[0] == tag:
                self.open.pop()
                parent = self.open[-1] if self.open else ("", False, False, False)
        skipped = tag in SKIP or role in ("navigation", "search") or any(map(SKIP_CLASS.fullmatch, classes))
        # `body` and `html` carry theme names; they never are navigation.
        skipped = parent[1] or (skipped and tag not in ("html", "body", "main"))
        self.open.append((tag, skipped, parent[2] or tag in ("pre", "screen", "code-block"), main))
        if tag in BLOCK:
            self.add("\n" if tag in ("tr", "li", "item", "dt", "dd", "td", "th") else "\n\n")
        if tag in ("li", "item"):
            self.add("- ")

    def handle_endtag(self, tag):
        for at in range(len(self.open) - 1, -1, -1):
            if self.open[at][0] == tag:
                if tag in BLOCK:
                    self.add(" " if tag in ("td", "th") else "\n" if tag in ("tr", "li", "dt") else "\n\n")
                del self.open[at:]
                return

    def handle_data(self, data):
        preformatted = bool(self.open) and self.open[-1][2]
        self.add(data if preformatted else re.sub(r"\s+", " ", data))

    def add(self, piece):
        if self.open and self.open[-1][1]:
            return
        self.all.append(piece)
        if self.open and self.open[-1][3]:
            self.main.append(piece)

    def text(self):
        main = "".join(self.main)
        return main if len(main) > 400 else "".join(self.all)


def decompressed(data):
    """The bytes of a file that may be compressed with gzip, dictzip or xz."""
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    if data[:6] == b"\xfd7zXZ\x00":
        return lzma.decompress(data)
    return data


def decoded(data):
    data = decompressed(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text):
    """Same text with Unix line ends, no control characters, no runs of blank lines or trailing spaces."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").replace("\u200b", "")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u00b6\uf000-\uf8ff\ufeff]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_html(data):
    page = Text()
    page.feed(decoded(data))
    page.close()
    text = re.sub(r"(?m)^ ?-\s+(?=\S)", "- ", page.text())
    text = re.sub(r"\n (?=\S)", "\n", text)
    return tidy(NAVIGATION_LINE.sub("", text))


def read_rst(data):
    text = decoded(data)
    text = re.sub(
        r"(?m)^\.\."
        r" (index|toctree|image|figure|highlight|sectionauthor|moduleauthor|_[^:]+|\|[^|]+\|).*\n(?:["
        r" \t]+\S.*\n)*",
        "",
        text,
    )
    text = re.sub(r"(?m)^\.\. (SPDX|Copyright|This work|http|comment).*\n", "", text)
    text = re.sub(r":[\w:+-]+:`~?([^`<]*?)(?: ?<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?) ?<[^`>]*>`__?", r"\1", text)
    return tidy(text)


def read_pod(data):
    text = decoded(data)
    text = re.sub(r"(?ms)^=(?:begin|for)\b.*?(?:^=end\b.*?$|\n\n)", "", text)
    text = re.sub(r"X<[^<>]*>", "", text).replace("E<lt>", "\x01").replace("E<gt>", "\x02")
    for _ in range(3):
        text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
        text = re.sub(r"[BCEFIS](?:<< (.*?) >>|<([^<>]*)>)", lambda m: m[1] or m[2] or "", text)
    text = text.replace("\x01", "<").replace("\x02", ">")
    text = re.sub(r"(?m)^=head\d\s*", "", text)
    text = re.sub(r"(?m)^=item\s*\*?\s*", "- ", text)
    return tidy(re.sub(r"(?m)^=(over|back|cut|pod|encoding).*$", "", text))


def read_markdown(data):
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", decoded(data))
    # The foot of a page of the Anarchist FAQ: links to the pages beside it.
    text = re.sub(r"\n‹[^‹›]*›?\s*$", "", text)
    return tidy(re.sub(r"(?<!!)\[([^\]]+)\]\([^)]*\)", r"\1", text))


def read_book(data):
    """Plain text; what a library of public-domain books prints before and after the book goes."""
    text = decoded(data).replace("\r\n", "\n")
    start = max(
        (
            m.end()
            for m in re.finditer(
                r"(?m)^.*(\*\*\* ?START OF|\*END\*? ?THE SMALL PRINT|\*END\*).*$", text[: len(text) // 3]
            )
        ),
        default=0,
    )
    text = text[start:]
    end = re.search(r"(?mi)^[ *]*end of (the |this )?project.*$", text[len(text) // 2 :])
    return tidy(text[: len(text) // 2 + end.start()] if end else text)


def read_text(data):
    return tidy(decoded(data))


def read_fortunes(data):
    return tidy(re.sub(r"(?m)^%$", "", decoded(data)))


def read_quoted(data):
    """Prose of the game *Endless Sky*: what stands between back quotes, a paragraph each."""
    lines = re.findall(r"(?m)^\s*(?:choice|conversation)?\s*`([^`\n]*)`", decoded(data))
    return tidy("\n\n".join(line.strip() for line in lines if len(line) > 2))


def read_wml(data):
    """Prose of the game *Battle for Wesnoth*: speakers with what they say, story pages as paragraphs."""
    text, parts = decoded(data), []
    for found in re.finditer(
        r'(?m)^\s*(speaker|message|story|description|objective_text)\s*=\s*(_\s*"(?:[^"]|"")*"|\S+)', text
    ):
        key, value = found[1], found[2]
        if key == "speaker":
            speaker = value.strip('"_ ')
            parts.append("\n" if speaker in ("narrator", "unit", "second_unit") else f"\n{speaker}: ")
        elif value.startswith("_"):
            parts.append(
                re.sub(r"\s*\n\s*", "\n", value[value.index('"') + 1 : -1].replace('""', '"')) + "\n\n"
            )
    return tidy(re.sub(r"</?\w[^<>]*>", "", "".join(parts)).replace("\n\n\n", "\n\n"))


def read_factbook(data):
    """A country profile: one heading for each topic, one line for each fact."""

    def walk(node, name):
        if not isinstance(node, dict):
            return
        if node.get("text"):
            yield f"{name}: {node['text']}" if name else str(node["text"])
        for key, value in node.items():
            if key not in ("text", "note") or isinstance(value, dict):
                yield from walk(value, key)

    topics = json.loads(decoded(data))
    return tidy("\n\n".join(f"{topic}\n\n" + "\n".join(walk(facts, "")) for topic, facts in topics.items()))


def read_sword_books(index, blocks):
    """The books in a SWORD zText module with one compressed block for each book: their texts in order."""
    for start, size, _ in struct.iter_unpack("<III", index):
        if size:
            text = zlib.decompress(blocks[start : start + size]).decode("utf-8", "replace")
            text = re.sub(r"(?s)<note\b.*?</note>", " ", text)
            text = re.sub(r"<(?:lb|milestone|div|title|/p|/l|/lg|/title|chapter)\b[^>]*>", "\n", text)
            text = re.sub(r" +", " ", re.sub(r"<[^>]+>", "", text))
            yield tidy(re.sub(r" ([,.;:!?”’])", r"\1", text))


def read_r_strings(data):
    """All character vectors of a lazy-load database of R (`data/Rdata.rdb`), each joined by line ends.

    The file is a run of records: a 4-byte big-endian raw size, a byte for the method where it is not zlib
    (2 bzip2, Z xz), then the compressed XDR serialisation. Strings are records of type 9 inside vectors of
    type 16 (R Internals, 1.8), found here by their headers.
    """
    at = 0
    while at + 4 < len(data):
        unpacker = zlib.decompressobj()
        try:
            raw = unpacker.decompress(data[at + 4 :])
        except zlib.error as error:
            raise ValueError(f"record at byte {at} is not zlib: {error}") from error
        at = len(data) - len(unpacker.unused_data)
        yield from r_vectors(raw)


def r_vectors(raw):
    for found in re.finditer(rb"\x00\x00[\x00\x02]\x10(?=.{4}\x00[\x00\x04][\x00\x40\x80]\x09)", raw, re.S):
        at = found.end()
        (count,) = struct.unpack_from(">I", raw, at)
        at, lines = at + 4, []
        for _ in range(count):
            if at + 8 > len(raw) or raw[at + 3] != 9:
                break
            (size,) = struct.unpack_from(">i", raw, at + 4)
            at += 8
            lines.append(raw[at : at + max(size, 0)].decode("utf-8", "replace"))
            at += max(size, 0)
        else:
            yield tidy("\n".join(lines))


READERS = {
    "html": read_html,
    "rst": read_rst,
    "pod": read_pod,
    "markdown": read_markdown,
    "book": read_book,
    "text": read_text,
    "fortunes": read_fortunes,
    "quoted": read_quoted,
    "wml": read_wml,
    "factbook": read_factbook,
}
