#!/usr/bin/env python3
"""Held-out pages with questions for `locket eval vqa`: PNG files and one JSONL.

    pip install numpy pillow scikit-image scikit-learn
    benches/vqa/fetch_assets.py --out vqa-assets
    benches/vqa/make_pages.py --assets vqa-assets --pages 400 --questions 3 --out vqa-pages
    locket eval vqa --pages vqa-pages/pages.jsonl --out vqa.json --picture vqa.svg

Each line of `pages.jsonl` is a page: {"image": file beside the JSONL, "kind": "form", "questions":
[{"question": "What is the total?", "answer": "12.50"}]}. Pages have seeds, words and handwritten digits that
training (`split="train"` of pages.py) never has; `--held-out-fonts` takes fonts it never has either. All
depends on the seed, the assets and the versions of the libraries alone.
"""

import argparse
import json
import pathlib

import numpy
import pages


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--assets", required=True, help="folder of fetch_assets.py")
    parser.add_argument("--out", required=True, help="the folder to fill")
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--questions", type=int, default=3, help="per page, at most")
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--kinds", default=",".join(pages.KINDS), help="kinds of pages, comma-separated")
    parser.add_argument("--size", default="448x448", help="width x height, or 'any' for sizes as in training")
    parser.add_argument("--held-out-fonts", action="store_true")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    assets = pages.Assets(args.assets)
    size = None if args.size == "any" else tuple(int(side) for side in args.size.split("x"))
    kinds = args.kinds.split(",")
    weights = numpy.array([pages.WEIGHTS[pages.KINDS.index(kind)] for kind in kinds])
    with open(out / "pages.jsonl", "w") as lines:
        for number in range(args.pages):
            rng = numpy.random.default_rng([args.seed, number])
            kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
            made = pages.make(rng, assets, "test", size, kind, args.held_out_fonts)
            if not made.questions:
                continue
            name = f"{number:05}.png"
            made.image.save(out / name)
            asked = [made.questions[at] for at in rng.permutation(len(made.questions))[: args.questions]]
            questions = [{"question": question, "answer": answer} for question, answer in asked]
            line = {"image": name, "kind": made.kind, "questions": questions}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
