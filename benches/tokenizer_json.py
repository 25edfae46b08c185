#!/usr/bin/env python3
"""Writes the tokenizer of a GGUF file as a Hugging Face tokenizer.json.

Benchmark clients that count tokens themselves (`vllm-rs bench serve`) want a tokenizer on disk, and the
default model is one GGUF file. Byte-pair vocabularies whose pre-tokenizer is listed below only: a
wrong split would count wrongly without anyone noticing.

    benches/tokenizer_json.py MODEL.gguf FOLDER        # writes FOLDER/tokenizer.json

Needs Python 3.9 and nothing else.
"""

import json
import pathlib
import struct
import sys

# GGUF value types, ggml/docs/gguf.md.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    },
}
SPECIAL_TYPES = (3, 4)  # control, user defined


class Reader:
    def __init__(self, file):
        self.file = file

    def scalar(self, code):
        data = self.file.read(struct.calcsize("<" + code))
        return struct.unpack("<" + code, data)[0]

    def text(self):
        return self.file.read(self.scalar("Q")).decode("utf-8")

    def value(self, kind):
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            item_kind, length = self.scalar("I"), self.scalar("Q")
            return [self.value(item_kind) for _ in range(length)]
        return self.scalar(SCALARS[kind])


def metadata(path):
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            sys.exit(f"{path} is not a GGUF file")
        reader = Reader(file)
        reader.scalar("I")  # version
        reader.scalar("Q")  # number of tensors
        count = reader.scalar("Q")
        pairs = {}
        for _ in range(count):
            key = reader.text()
            pairs[key] = reader.value(reader.scalar("I"))
        return pairs


def tokenizer(pairs):
    model, pre = pairs.get("tokenizer.ggml.model"), pairs.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        sys.exit(f"tokenizer {model}, pre-tokenizer {pre}: known are gpt2 with {', '.join(PRE_TOKENIZERS)}")
    tokens, types = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    added = [
        {"id": id, "content": text, "special": kind == 3}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for id, (text, kind) in enumerate(zip(tokens, types))
        if kind in SPECIAL_TYPES
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: id for id, text in enumerate(tokens)},
            "merges": pairs["tokenizer.ggml.merges"],
        },
    }


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "tokenizer.json"
    target.write_text(json.dumps(tokenizer(metadata(sys.argv[1])), ensure_ascii=False), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
