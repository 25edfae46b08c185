#!/usr/bin/env python3
"""Fonts and words for the generated pages, from Debian packages.

    benches/vqa/fetch_assets.py --out vqa-assets

Downloads the packages with apt-get, unpacks them (nothing is installed, no root is needed) and leaves
`fonts/*.ttf` and `words.txt` in the folder, the words in an order that depends on nothing but the package.
Needs Debian 12 or newer with dpkg-deb, and package lists (`apt-get update`).
"""

import argparse
import pathlib
import random
import re
import shutil
import subprocess
import tempfile

# The first fonts are for training, those of HELD_OUT in pages.py are never trained on.
FONTS = {
    "fonts-dejavu-core": ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf"],
    "fonts-liberation": [
        "LiberationSans-Regular.ttf",
        "LiberationSans-Bold.ttf",
        "LiberationSerif-Regular.ttf",
        "LiberationMono-Regular.ttf",
    ],
    "fonts-lato": ["Lato-Regular.ttf", "Lato-Bold.ttf"],
    "fonts-roboto-unhinted": ["Roboto-Regular.ttf", "Roboto-Bold.ttf"],
    "fonts-open-sans": ["OpenSans-Regular.ttf", "OpenSans-Bold.ttf"],
    "fonts-comic-neue": ["ComicNeue-Regular.ttf", "ComicNeue-Regular.otf"],
    "fonts-hack": ["Hack-Regular.ttf"],
    "fonts-crosextra-carlito": ["Carlito-Regular.ttf"],
    "fonts-crosextra-caladea": ["Caladea-Regular.ttf"],
}
WORDS = "wamerican-small"
NUM_WORDS = 6000
# Parts of words that nobody wants on a demo's page.
CRUDE = re.compile(
    "shag|fuck|shit|cunt|whor|slut|nig|rape|bastard|bitch|turd|piss|cock|dick|tit|porn|orgas|genital|pubic|"
    "penis|vagin|anal|fag|dyke|spic|coon|negro|heroin|sperm|semen|cum|tart|homo|paki|kike|jap|sex|nude|nazi|pimp|sadis|sleaz"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="the folder to fill")
    out = pathlib.Path(parser.parse_args().out)
    (out / "fonts").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = unpack([*FONTS, WORDS], pathlib.Path(scratch))
        files = {path.name: path for path in unpacked.rglob("*") if path.is_file()}
        for package, names in FONTS.items():
            found = [name for name in names if name in files]
            if not found:
                raise SystemExit(f"{package} has none of {', '.join(names)}")
            for name in found:
                shutil.copy(files[name], out / "fonts" / name)
        words = chosen((unpacked / "usr/share/dict/american-english-small").read_text())
    (out / "words.txt").write_text("\n".join(words) + "\n")
    print(f"{len(list((out / 'fonts').iterdir()))} fonts and {len(words)} words in {out}")


def unpack(packages, scratch):
    subprocess.run(["apt-get", "download", *packages], cwd=scratch, check=True)
    unpacked = scratch / "unpacked"
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
    return unpacked


def chosen(text):
    """Plain words of three to nine letters, shuffled the same way every time."""
    words = sorted(set(re.findall(r"^[a-z]{3,9}$", text, flags=re.MULTILINE)))
    words = [word for word in words if not CRUDE.search(word)]
    random.Random(0).shuffle(words)
    return words[:NUM_WORDS]


if __name__ == "__main__":
    main()
