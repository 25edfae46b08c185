#!/usr/bin/env python3
"""Writes fingerprint.json: the likelihood of a short text under every cache method, by PyTorch in f32.

Token by token, layer by layer, as plainly as the specification says it: a layer that is full ranks its
slots, the best M of each head stay, the rest is dropped. Nothing is shared with the Rust code. Run it when
the fingerprint's text, the shipped side-car or a method changes:

    pip install torch numpy safetensors tokenizers gguf
    benches/tokenizer_json.py MODEL.gguf tokenizer.json
    tests/golden/make_fingerprint.py MODEL.gguf tokenizer.json SIDE_CAR.safetensors [METHOD ...]
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from tokenizers import Tokenizer

HERE = Path(__file__).parent
TEXT = HERE / "../../crates/eval/src/fingerprint.txt"
TOKENS, M, B = 1024, 64, 64
LAYERS, HEADS, KV, D, EPS, THETA = 30, 9, 3, 64, 1e-5, 1e5
G = HEADS // KV
SINKS = {"window": 4, "h2o": 4, "tova": 0, "expected": 4, "keydiff": 4, "observed": 4, "learned": 4}
RECENT = {"window": M // 4, "h2o": M // 2, "tova": 0, "expected": M // 2, "keydiff": M // 2, "observed": M // 4}


class Model:
    def __init__(self, path):
        tensors = {t.name: t for t in GGUFReader(path).tensors}

        def load(name):
            t = tensors[name]
            return torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))

        self.embedding, self.norm = load("token_embd.weight"), load("output_norm.weight")
        names = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
        self.layers = [{n: load(f"blk.{i}.{n}.weight") for n in names} for i in range(LAYERS)]
        self.inv_freq = THETA ** (-torch.arange(0, D // 2, dtype=torch.float64) / (D // 2))

    def rms(self, x, w):
        return F.rms_norm(x, (x.shape[-1],), w, EPS)

    def rope(self, x, position):
        """Adjacent pairs, as the file's rows are stored. `x [heads, d]`, `position` a number or one per head."""
        angle = torch.as_tensor(position, dtype=torch.float64)[..., None] * self.inv_freq
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class Scorer:
    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.w = {k: file.get_tensor(k).float() for k in file.keys()}
            meta = file.metadata()
        self.beta = float(meta.get("beta", 1))
        self.recent = M * int(float(meta.get("recent_permille", 250))) // 1000
        self.recall = float(meta.get("recall_permille", 500)) / 1000
        self.taps = self.w["dw"].shape[2]

    def score(self, layer, features):
        """`features`: the rows so far, the newest last. Returns `[kv, 2]` for it."""
        w = {k: v[layer] for k, v in self.w.items()}
        rows = torch.stack(features[-self.taps :]) * w["scale"]
        conv = (rows * w["dw"].T[-len(rows) :]).sum(0)
        hidden = F.gelu(w["p1"] @ torch.cat([rows[-1], conv]) + w["b1"])
        return (w["p2"] @ hidden + w["b2"]).view(KV, 2)


def best(rank, count):
    """Slots are in time order, so a stable sort lets ties keep the older one."""
    return rank.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def half_split(key):
    return torch.cat([key[..., 0::2], key[..., 1::2]], -1)


class Layer:
    """One layer's slots; everything `[kv, n, ...]`."""

    def __init__(self, model, index, method, scorer):
        self.model, self.index, self.method, self.scorer = model, index, method, scorer
        self.k = self.v = self.raw = torch.zeros(KV, 0, D)
        self.position = torch.zeros(KV, 0, dtype=torch.long)
        self.received = self.last = torch.zeros(KV, 0)
        self.score = torch.zeros(KV, 0, 2)
        self.queries, self.features, self.has_folded = [], [], False

    def step(self, q, k, v, position):
        """`q [heads, d]`, `k, v [kv, d]` before rotation."""
        full_at = M + B if self.has_folded else M + B - self.index * B // LAYERS
        if self.method != "full" and self.k.shape[1] == full_at:
            self.fold(position)
        cat = lambda old, new: torch.cat([old, new[:, None]], 1)
        self.k, self.v, self.raw = cat(self.k, self.model.rope(k, position)), cat(self.v, v), cat(self.raw, k)
        self.position = cat(self.position, torch.full((KV,), position))
        self.received = cat(self.received, torch.zeros(KV))
        if self.method == "learned":
            self.features.append(torch.cat([half_split(k), v], -1).flatten())
            self.score = cat(self.score, self.scorer.score(self.index, self.features))
        if position % 2 == 0:
            self.queries.append(q)
        query = self.model.rope(q, position).view(KV, G, D)
        p = (query @ self.k.transpose(1, 2) / math.sqrt(D)).softmax(-1)
        self.last = p.sum(1)
        self.received = self.received + self.last
        return (p @ self.v).reshape(HEADS * D)

    def fold(self, now):
        n = self.k.shape[1]
        age = (now - self.position).float()
        mean = self.received / (G * age)
        second, share = None, 0
        if self.method == "window":
            rank = -age
        elif self.method == "h2o":
            rank = self.received
        elif self.method == "tova":
            rank = self.last.sum(0, keepdim=True).expand(KV, n)
        elif self.method == "observed":
            rank = mean
        elif self.method == "keydiff":
            unit = F.normalize(self.raw, dim=-1)
            # Keys of one token are equal but for rounding: such ties keep the older one.
            rank = (-(unit * F.normalize(unit.mean(1, keepdim=True), dim=-1)).sum(-1) * 65536).round()
        elif self.method == "expected":
            # The mean rotation over the next 512 positions, applied to the latest 64 kept queries.
            angle = torch.arange(now, now + 512, dtype=torch.float64)[:, None] * self.model.inv_freq
            cos, sin = angle.cos().mean(0).float(), angle.sin().mean(0).float()
            x = torch.stack(self.queries[-64:])
            a, b = x[..., 0::2], x[..., 1::2]
            x = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).view(-1, KV, G, D)
            s = torch.einsum("rkgd,knd->rkgn", x, self.k) / math.sqrt(D)
            e = (s.mean(0) + s.var(0, unbiased=False) / 2).logsumexp(1)
            rank = (e.softmax(-1) + 0.02 / n).log() + (self.v.norm(dim=-1) + 1e-6).log()
        else:
            log_mean = (mean + 1e-5).log()
            a = self.scorer.beta * self.scorer.w["a"][self.index]
            rank, second = (self.score + a[:, None] * log_mean[..., None]).unbind(-1)
        recent = self.scorer.recent if self.method == "learned" else RECENT[self.method]
        if second is not None:
            share = int((M - recent) * self.scorer.recall)
        rank = rank.masked_fill(age <= recent, 1e30).masked_fill(self.position < SINKS[self.method], 1e31)
        kept = best(rank, M - share)
        if share:
            kept = torch.cat([kept, best(second.scatter(1, kept, -1e30), share)], 1)
        kept = kept.sort(-1).values
        take = lambda x: x.gather(1, kept if x.dim() == 2 else kept[..., None].expand(-1, -1, x.shape[-1]))
        self.k, self.v, self.raw = take(self.k), take(self.v), take(self.raw)
        self.position, self.received, self.score = take(self.position), take(self.received), (
            take(self.score) if self.method == "learned" else self.score
        )
        self.has_folded = True


@torch.no_grad()
def nll(model, ids, method, scorer):
    layers = [Layer(model, i, method, scorer) for i in range(LAYERS)]
    total = 0.0
    for position, (token, target) in enumerate(zip(ids, ids[1:])):
        x = model.embedding[token]
        for layer, w in zip(layers, model.layers):
            h = model.rms(x, w["attn_norm"])
            q, k, v = (w[n] @ h for n in ("attn_q", "attn_k", "attn_v"))
            x = x + w["attn_output"] @ layer.step(q.view(HEADS, D), k.view(KV, D), v.view(KV, D), position)
            h = model.rms(x, w["ffn_norm"])
            x = x + w["ffn_down"] @ (F.silu(w["ffn_gate"] @ h) * (w["ffn_up"] @ h))
        logits = model.embedding @ model.rms(x, model.norm)
        total -= logits.log_softmax(-1)[target].item()
    return total / (len(ids) - 1)


def main(model_path, tokenizer_path, side_car, *methods):
    ids = Tokenizer.from_file(tokenizer_path).encode(TEXT.read_text()).ids[:TOKENS]
    assert len(ids) == TOKENS
    model, scorer = Model(model_path), Scorer(side_car)
    out = HERE / "fingerprint.json"
    nlls = json.loads(out.read_text())["nll"] if methods and out.exists() else {}
    for method in methods or ["full", *SINKS]:
        nlls[method] = round(nll(model, ids, method, scorer), 6)
        print(method, nlls[method], flush=True)
    out.write_text(json.dumps({"ids": ids, "nll": nlls}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
