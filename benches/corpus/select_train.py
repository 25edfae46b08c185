#!/usr/bin/env python3
"""Picks what the shipped side-car is trained on from fetch_corpus.py's train.jsonl: all prose, and a third
of the manuals, by the hash of their names, so that half of the tokens are prose.

    benches/corpus/select_train.py corpus/train.jsonl train.jsonl
"""

import hashlib
import json
import sys


def main(source, target):
    kept = 0
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for line in lines:
            document = json.loads(line)
            digest = int(hashlib.md5(document["name"].encode()).hexdigest(), 16)
            if document["kind"] != "manual" or digest % 3 == 0:
                json.dump({"name": document["name"], "text": document["text"]}, out, ensure_ascii=False)
                out.write("\n")
                kept += 1
    print(f"{kept} documents")


if __name__ == "__main__":
    main(*sys.argv[1:])
