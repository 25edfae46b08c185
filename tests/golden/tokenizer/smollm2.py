"""Records token ids of SmolLM2's tokenizer, built from the GGUF file with Hugging Face's library.

    pip install gguf tokenizers
    python smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf > smollm2.json
"""
import json
import sys

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEXTS = [
    "", " ", "  ", "\n", "\t\t x", "a", "Hello, world!", " leading and trailing  ",
    "The pass key is 48213. Remember it.", "1234567890 3.14159 1e-9 0x7f ١٢٣ ½ ²",
    "It's we've I'll they'd can't I'M YOU'RE", "don’t “quote” — dash…",
    "fn main() {\n    let x: Vec<u32> = (0..10).map(|i| i * 2).collect();\n\n\n\tprintln!(\"{x:?}\");\n}\n",
    "def f(x):\n        return x ** 2   # square\r\n\r\n",
    "SELECT * FROM t WHERE a <= 10 AND b != 'x';", "https://example.org/a/b?c=d&e=%20#f",
    "日本語の文章です。", "中文，标点！", "한국어 문장", "Привет, мир", "مرحبا بالعالم", "नमस्ते दुनिया", "ภาษาไทย",
    "😀😃👨‍👩‍👧‍👦🏳️‍🌈 emoji", "e\u0301 é \u00a0nbsp\u3000wide\u200bzero", "\ufeffbom \ufffd \u0000nul \u0007bell",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b <|endoftext|> c<|im_start|><|im_start|>",
    "<|im_start |> <|im_end", "<repo_name>x<reponame>y<file_sep>z<issue_start>", "word" * 60, "=" * 100, " " * 70 + "x",
    "supercalifragilisticexpialidocious antidisestablishmentarianism", "\n\n\n  \n \t\n", "a\u2028b\u2029c\u0085d",
]

reader = GGUFReader(sys.argv[1])


def strings(key):
    field = reader.fields[key]
    return [bytes(field.parts[i]).decode() for i in field.data]


tokens = strings("tokenizer.ggml.tokens")
merges = [tuple(merge.split(" ")) for merge in strings("tokenizer.ggml.merges")]
types = reader.fields["tokenizer.ggml.token_type"]
types = [int(types.parts[i][0]) for i in types.data]

tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, types) if kind == 3])

cases = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids} for text in TEXTS]
print("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]")
