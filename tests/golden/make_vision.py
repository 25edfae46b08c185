"""Makes the fixtures of crates/vision: tests/golden/llava.

    python -m venv venv && venv/bin/pip install torch torchvision transformers safetensors pillow
    venv/bin/python tests/golden/make_vision.py

One small random model, stored once (f16, Hugging Face's newer tensor names), is run by transformers as
LlavaNextForConditionalGeneration and as LlavaForConditionalGeneration, in f32 with eager attention on the CPU,
behind transformers' Pillow image processors. The tests rename its tensors into the two other layouts.

* `model.safetensors`, `next.json`, `llava.json`, `next.old.json`: weights and configurations (the last as
  transformers 4 wrote it: `image_token_index`, without what equals a class's default).
* `images.safetensors`: `NAME.file`, a PNG file's bytes; `NAME.{next,crop,pad}`, the levels (0 to 255)
  [tiles, side, side, 3] of its tiles under each preprocessing. The levels are the pixel values before rescaling;
  that normalising them gives transformers' pixel values bit for bit is asserted here, with the table `levels`.
* `expected.safetensors`: `NAME.{next,llava}.{features,cls_initial,cls_final,logits}`; features packed, attention
  rows of the class token summed over heads without its own column, logits of the last 8 positions of
  `NAME.{next,llava}.ids`.
* `formats.safetensors`: `NAME.file` and `NAME.rgb` of small files of many kinds, upright and on white.

Made with torch 2.15.0, transformers 5.23.0, Pillow 13.0.0. Another version may change the last digits.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.image_transforms import convert_to_rgb
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

HERE = Path(__file__).parent / "llava"
TILE, PATCH, VOCAB, IMAGE_ID = 24, 4, 60, 57
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
VISION = dict(
    hidden_size=32, image_size=TILE, patch_size=PATCH, num_hidden_layers=4, num_attention_heads=2,
    intermediate_size=64,
)
TEXT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False,
)
SIZES = {"square": (40, 40), "wide": (30, 81), "high": (130, 37), "tiny": (7, 5), "odd": (53, 61), "strip": (9, 200)}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed" in name or "lm_head" in name or "newline" in name:
            value = 0.6 * noise
        else:
            value = 1.2 * noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def picture(height, width, seed):
    """Smooth colours, hard edges and noise, so that every weight of a resize matters."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / 7 + seed), np.cos(y / 5), np.sin((x + y) / 9)]
    image = np.stack([127 + 110 * channel for channel in channels], -1)
    image[height // 3: height // 2, width // 4: width // 2] = [255, 0, 40]
    image[::6] += rng.normal(0, 40, image[::6].shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def processors():
    sizes = dict(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    return {
        "next": LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS),
        "crop": LlavaImageProcessorPil(**sizes),
        "pad": LlavaImageProcessorPil(**sizes, do_pad=True),
    }


def level_table(processor):
    """[3, 256]: what each level becomes."""
    levels = np.arange(256, dtype=np.uint8)
    image = np.stack([np.stack([levels] * 2)] * 3)
    image = processor.rescale(image=image, scale=processor.rescale_factor)
    image = processor.normalize(image=image, mean=processor.image_mean, std=processor.image_std)
    return torch.tensor(np.asarray(image)[:, 0]).float()


def levels_of(pixel_values, table):
    """Pixel values [tiles, 3, side, side] back to levels, each bit for bit one of the table."""
    out = torch.zeros(pixel_values.shape, dtype=torch.uint8)
    for channel in range(3):
        hit = pixel_values[:, channel, ..., None] == table[channel]
        assert hit.any(-1).all(), "a pixel value is none of the table's"
        out[:, channel] = hit.float().argmax(-1).to(torch.uint8)
    return out.permute(0, 2, 3, 1).contiguous()


def prompt(tokens):
    head, tail = [1, 5, 9, 11], [13, 7, 22, 31, 3, 40, 17]
    return torch.tensor(head + [IMAGE_ID] * tokens + tail)


def run(model, pixel_values, sizes=None):
    """Everything that is compared, of one image."""
    extra = {} if sizes is None else dict(image_sizes=sizes)
    tiles = pixel_values[0] if pixel_values.dim() == 5 else pixel_values
    with torch.no_grad():
        tower = model.model.vision_tower(tiles, output_attentions=True)
        features = model.model.get_image_features(pixel_values=pixel_values, **extra).pooler_output
        features = features[0] if isinstance(features, (list, tuple)) else features
        features = features.reshape(-1, features.shape[-1])
        ids = prompt(len(features))
        logits = model(input_ids=ids[None], pixel_values=pixel_values, use_cache=False, **extra).logits[0]
    row = lambda layer: tower.attentions[layer][:, :, 0, 1:].sum(1)
    last = VISION["num_hidden_layers"] - 2
    values = dict(features=features, cls_initial=row(0), cls_final=row(last), logits=logits[-8:], ids=ids.int())
    return {key: value.contiguous() for key, value in values.items()}


def models():
    common = dict(
        text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_ID, vision_feature_layer=-2,
        tie_word_embeddings=False, attn_implementation="eager",
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), image_grid_pinpoints=PINPOINTS, **common,
    )
    following = LlavaNextForConditionalGeneration(config)
    randomise(following, 11)
    for parameter in following.parameters():  # what is stored; the rotary frequencies stay
        parameter.data.copy_(parameter.data.half().float())
    state = following.state_dict()
    save_file({name: value.half().contiguous() for name, value in state.items()}, HERE / "model.safetensors")
    single = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**VISION), **common))
    missing = single.load_state_dict(
        {name: value for name, value in state.items() if "image_newline" not in name})
    print("single:", missing)
    for name, model in [("next", following), ("llava", single)]:
        config = json.loads(model.config.to_json_string(use_diff=True))
        config.pop("transformers_version", None)
        (HERE / f"{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    old = dict(
        model_type="llava_next", image_token_index=IMAGE_ID, image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
        vision_config=dict(model_type="clip_vision_model", **VISION),
        text_config={key: value for key, value in TEXT.items() if key not in ("bos_token_id", "eos_token_id")},
    )
    (HERE / "next.old.json").write_text(json.dumps(old, indent=1, sort_keys=True) + "\n")
    return following.eval(), single.eval()


def formats():
    """Files of many kinds and what transformers makes of them, turned upright as `load_image` does."""
    base = picture(9, 12, 5)
    alpha = Image.fromarray((np.mgrid[0:9, 0:12][1] * 23).astype(np.uint8))
    clear = base.copy()
    clear.putalpha(alpha)
    grey = base.convert("L")
    grey_alpha = grey.copy()
    grey_alpha.putalpha(alpha)
    palette = base.quantize(16)
    see_through = base.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    mirrored = Image.Exif()
    mirrored[0x0112] = 5
    kinds = {
        "rgb.png": encode(base, "PNG"),
        "rgba.png": encode(clear, "PNG"),
        "grey.png": encode(grey, "PNG"),
        "grey_alpha.png": encode(grey_alpha, "PNG"),
        "one_bit.png": encode(grey.convert("1"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette_transparent.png": encode(see_through, "PNG", transparency=3),
        "turned.png": encode(base, "PNG", exif=turned),
        "turned.jpeg": encode(base, "JPEG", quality=95, subsampling=0, exif=turned),
        "mirrored.jpeg": encode(base, "JPEG", quality=95, subsampling=0, exif=mirrored),
        "plain.jpeg": encode(base, "JPEG", quality=90),
        "grey.jpeg": encode(grey, "JPEG", quality=95),
        "progressive.jpeg": encode(base, "JPEG", quality=95, progressive=True, subsampling=0),
        "cmyk.jpeg": encode(base.convert("CMYK"), "JPEG", quality=95),
        "lossless.webp": encode(clear, "WEBP", lossless=True, exact=True),
        "lossy.webp": encode(base, "WEBP", quality=90),
        "animated.webp": encode(base, "WEBP", lossless=True, save_all=True, append_images=[base.rotate(180)]),
        "animated.gif": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
        "animated.png": encode(base, "PNG", save_all=True, append_images=[base.rotate(180)]),
        "rgb.bmp": encode(base, "BMP"),
        "palette.bmp": encode(palette, "BMP"),
    }
    tensors = {}
    for name, data in kinds.items():
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data.numpy().tobytes())))
        tensors[f"{name}.file"] = data
        tensors[f"{name}.rgb"] = torch.tensor(convert_to_rgb(image, return_numpy=True))
    return tensors


def main():
    HERE.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    following, single = models()
    images, expected = {}, {}
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        image = picture(height, width, seed)
        images[f"{name}.file"] = encode(image, "PNG", optimize=True)
        for kind, processor in processors().items():
            batch = processor(image, return_tensors="pt")
            pixel_values = batch["pixel_values"]
            tiles = pixel_values[0] if pixel_values.dim() == 5 else pixel_values
            table = level_table(processor)
            images["levels"] = table
            images[f"{name}.{kind}"] = levels_of(tiles, table)
            if name in ("wide", "odd") and kind == "next":
                values = run(following, pixel_values, batch["image_sizes"])
                expected |= {f"{name}.next.{key}": value for key, value in values.items()}
            if name == "wide" and kind == "crop":
                expected |= {f"{name}.llava.{key}": value for key, value in run(single, pixel_values).items()}
    save_file(images, HERE / "images.safetensors")
    save_file(expected, HERE / "expected.safetensors")
    save_file(formats(), HERE / "formats.safetensors")
    print({path.name: path.stat().st_size for path in sorted(HERE.iterdir())})


if __name__ == "__main__":
    main()
