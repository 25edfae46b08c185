#!/usr/bin/env python3
"""Writes the corpus of image files that tests/image_fuzz.rs starts from. Needs Pillow; made with 13.0.

    python3 crates/server/tests/fuzz/make_corpus.py crates/server/tests/fuzz/images
"""

import io
import struct
import sys
import zlib
from pathlib import Path

from PIL import Image


def picture(mode, width=23, height=17):
    image = Image.new("RGBA", (width, height))
    for y in range(height):
        for x in range(width):
            image.putpixel((x, y), (x * 11 % 256, y * 15 % 256, (x * y) % 256, (x * 31) % 256))
    return image.convert(mode)


def saved(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def hostile_exif(tail):
    """A JPEG whose EXIF block claims entries, offsets or a length that are not there."""
    body = saved(picture("RGB"), "JPEG")
    block = b"Exif\0\0" + tail
    return body[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + body[2:]


def png(width, height, data=b"", depth=8, colour=2, palette=None):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    colours = b"" if palette is None else chunk(b"PLTE", palette)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + colours + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def corpus():
    yield "rgb.png", saved(picture("RGB"), "PNG")
    yield "rgba.png", saved(picture("RGBA"), "PNG")
    yield "palette.png", saved(picture("RGB").quantize(16), "PNG")
    yield "grey.png", saved(picture("L"), "PNG")
    yield "one_bit.png", saved(picture("1"), "PNG")
    yield "sixteen_bit.png", saved(picture("L").convert("I;16"), "PNG")
    yield "turned.png", saved(picture("RGB"), "PNG", exif=exif(6))
    yield "rgb.jpg", saved(picture("RGB"), "JPEG")
    yield "progressive.jpg", saved(picture("RGB"), "JPEG", progressive=True)
    yield "cmyk.jpg", saved(picture("CMYK"), "JPEG")
    yield "grey.jpg", saved(picture("L"), "JPEG", quality=30)
    for orientation in range(1, 9):
        yield f"turned_{orientation}.jpg", saved(picture("RGB"), "JPEG", exif=exif(orientation), quality=20)
    yield "palette.gif", saved(picture("P"), "GIF")
    frames = [picture("P").rotate(90 * turn) for turn in range(3)]
    yield "animated.gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "rgb.bmp", saved(picture("RGB"), "BMP")
    yield "palette.bmp", saved(picture("P"), "BMP")
    yield "lossy.webp", saved(picture("RGB"), "WEBP", quality=20)
    yield "lossless.webp", saved(picture("RGBA"), "WEBP", lossless=True)
    yield "animated.webp", saved(picture("RGB"), "WEBP", save_all=True, append_images=[picture("RGB").rotate(180)])
    yield "one_pixel.png", saved(picture("RGB", 1, 1), "PNG")
    yield "narrow.png", saved(Image.new("L", (20000, 1)), "PNG")
    yield "bomb.png", png(60000, 60000)
    yield "bomb_one_bit.png", png(6000, 6000, b"\0" * (751 * 6000), depth=1, colour=0)
    yield "empty_data.png", png(23, 17)
    # The png crate (0.18.1) panics at a palette that ends inside a colour.
    yield "short_palette.png", png(4, 2, b"\0\0\0\0\0" * 2, colour=3, palette=b"\x07\x07\x07\x07")
    yield "no_pixels.png", png(0, 17)
    yield "exif_endless.jpg", hostile_exif(b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" * 20)
    yield "exif_loop.jpg", hostile_exif(b"II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x03\0\xff\xff\xff\xff\x08\0\0\0" + b"\x08\0\0\0")
    yield "exif_outside.jpg", hostile_exif(b"MM\0*\xff\xff\xff\xf0")
    yield "exif_wrong_value.jpg", hostile_exif(b"II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\xff\xff\0\0" + b"\0\0\0\0")
    yield "exif_cut.jpg", saved(picture("RGB"), "JPEG")[:2] + b"\xff\xe1\xff\xffExif\0\0II*\0"
    whole = saved(picture("RGB"), "PNG")
    yield "truncated.png", whole[: len(whole) // 2]
    whole = saved(picture("RGB"), "JPEG")
    yield "truncated.jpg", whole[: len(whole) * 2 // 3]
    yield "nothing.bin", b""
    yield "page.html", b"<html><body>not an image</body></html>"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in corpus():
        (folder / name).write_bytes(content)
