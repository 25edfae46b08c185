"""Trains a small SentencePiece model with LLaMA's settings and records its vocabulary and ids.

The ids are those of the sentencepiece library itself, the origin of LLaMA 1 and 2's tokenizer.

    pip install sentencepiece protobuf
    python sentencepiece_llama.py > sentencepiece.json
"""
import io
import json
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

WORDS = (
    "the of and to in a is that it was for on are with as his they be at one have this from or had by hot but some "
    "what there we can out other were all your when up use word how said an each she which do their time if will way "
    "about many then them would write like so these her long make thing see him two has look more day could go come "
    "did my sound no most number who over know water than call first people may down side been now find banana aaaa "
    "bookkeeper mississippi committee addressee whatsoever fn let mut return while naïve café über 12 345 x1 y_2"
).split()
rng = random.Random(7)
corpus = [" ".join(rng.choices(WORDS, k=rng.randint(3, 14))) + rng.choice([".", "?", "!", ";", "  ok", "\tend"]) for _ in range(3000)]

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus), model_writer=model, vocab_size=700, model_type="bpe", byte_fallback=True,
    split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, add_dummy_prefix=True, character_coverage=0.9995, minloglevel=2,
)
processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
parsed = proto.ModelProto()
parsed.ParseFromString(model.getvalue())
KINDS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6}

texts = [
    "Hello world", "the water", " the", "  the", "the ", "a", "aaaaaaaa banana aaa", "bookkeeper  bookkeeper",
    "committeemississippiaddressee", "12345 x1 y_2", "日本語 😀 café naïve ñ", "line\nline\n\n\tend", "\n", " ", "   ",
    "<0x0A> <s> literal?".replace("<s>", "< s>"), "What? Who! the;way", "ZZZ qqq", "é\u0301 \u00a0x", "\u2581 under",
] + [" ".join(rng.choices(WORDS, k=30)) for _ in range(20)] + ["".join(rng.choices("abeomnst ", k=60)) for _ in range(20)]

out = {
    "tokens": [piece.piece for piece in parsed.pieces],
    "scores": [piece.score for piece in parsed.pieces],
    "types": [KINDS[piece.type] for piece in parsed.pieces],
    "cases": [{"text": text, "ids": processor.encode(text)} for text in texts],
}
lines = [f'"{key}": ' + json.dumps(out[key]) for key in ("tokens", "scores", "types")]
cases = ",\n".join(json.dumps(case) for case in out["cases"])
print("{\n" + ",\n".join(lines) + ',\n"cases": [\n' + cases + "\n]}")
