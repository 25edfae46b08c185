"""Makes the checkpoints and logits that crates/model/tests/golden.rs compares with.

    python -m venv venv && venv/bin/pip install torch transformers safetensors
    venv/bin/python tests/golden/make_llama.py

Random LLaMA-family checkpoints, small but with every branch of the geometry used, run by
transformers' eager attention in f32 on the CPU. They are read from the files that were written, so
that the expected logits belong to the stored numbers, rounded to half types for some. Each folder has
`config.json` and `logits.safetensors` (`ids [200]`, `logits [200, vocab]`, f32); the variants of
`llama3` share its weights, which differ from theirs in nothing but the configuration.

Made with torch 2.15.0 and transformers 5.23.0. Another version may change the last digits.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
    Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
VOCAB, POSITIONS = 110, 200  # no multiple of a kernel's tile on purpose
GEOMETRY = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
)


def randomise(model, seed):
    """Weights of a size that makes logits differ by several units and every branch matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            value = 0.6 * noise
        else:
            value = 1.2 * noise / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value)


def make(folder, model, dtype, weights_of=None, seed=0, rope_v4=None, **save):
    """Saves one variant; `weights_of` is a model whose weights it shares instead of own ones.

    `rope_v4`: write the rope settings as transformers 4 did, as (theta, rope_scaling).
    """
    path = HERE / folder
    path.mkdir(exist_ok=True)
    if weights_of is None:
        randomise(model, seed)
        model.to(dtype).save_pretrained(path, **save)
        (path / "generation_config.json").unlink(missing_ok=True)
    else:
        model.load_state_dict(weights_of.state_dict())
        model.config.save_pretrained(path)
    config_path = path / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("transformers_version", None)
    if rope_v4 is not None:
        config.pop("rope_parameters")
        config["rope_theta"], config["rope_scaling"] = rope_v4
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if weights_of is None:
        # Read anew rather than widened in place: `to` has rounded the rotary frequencies too.
        model = type(model).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    ids = torch.randint(0, VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0]
    save_file({"ids": ids.to(torch.int64), "logits": logits.contiguous()}, path / "logits.safetensors")
    top = logits.topk(2).values
    print(f"{folder:12} logits std {logits.std():.2f}, smallest top-2 gap {(top[:, 0] - top[:, 1]).min():.1e}")
    return model


def main():
    torch.set_num_threads(1)
    llama3_rope = dict(
        rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    tied = dict(tie_word_embeddings=True, attn_implementation="eager")
    untied = dict(tie_word_embeddings=False, attn_implementation="eager")
    shared = make(
        "llama3", LlamaForCausalLM(LlamaConfig(**GEOMETRY, **tied, rope_parameters=llama3_rope)),
        torch.float32, seed=1,
    )
    linear = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
    make(
        "linear", LlamaForCausalLM(LlamaConfig(**GEOMETRY, **tied, rope_parameters=linear)), torch.float32,
        weights_of=shared, rope_v4=(10000.0, dict(type="linear", factor=4.0)),
    )
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    make(
        "yarn", LlamaForCausalLM(LlamaConfig(**GEOMETRY, **tied, rope_parameters=yarn | dict(rope_theta=10000.0))),
        torch.float32, weights_of=shared, rope_v4=(10000.0, yarn),
    )
    make(
        "mistral", MistralForCausalLM(MistralConfig(
            **GEOMETRY, **tied, sliding_window=32, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        )),
        torch.float32, weights_of=shared,
    )
    plain = dict(rope_type="default", rope_theta=10000.0)
    make(
        "llama_bias", LlamaForCausalLM(LlamaConfig(
            **GEOMETRY, **untied, attention_bias=True, mlp_bias=True, rope_parameters=plain,
        )),
        torch.bfloat16, seed=2, rope_v4=(10000.0, None), max_shard_size="60KB",
    )
    make(
        "qwen2", Qwen2ForCausalLM(Qwen2Config(**GEOMETRY, **untied, rope_parameters=plain)),
        torch.float16, seed=3, rope_v4=(10000.0, None),
    )
    make(
        "qwen3", Qwen3ForCausalLM(Qwen3Config(**GEOMETRY, **tied, head_dim=32, rope_parameters=plain)),
        torch.bfloat16, seed=4,
    )
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
        pre_tokenizer=dict(type="WhitespaceSplit"), post_processor=None, decoder=None,
        model=dict(type="WordLevel", vocab=words, unk_token="w0"),
    )
    (HERE / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")


if __name__ == "__main__":
    main()
