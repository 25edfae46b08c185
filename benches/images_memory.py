#!/usr/bin/env python3
"""Sends many different images to a running server and watches its memory.

    python3 benches/images_memory.py --url http://127.0.0.1:8080 --pid PID [--images 10000]

The server must see (visual.model). Each image is another PNG file of another size, so the tower runs for every
one and the image cache turns over. Resident memory is read after every hundredth of the run; the second half may
not need more than the first half's most by --tolerance. Standard library only.
"""

import argparse
import base64
import concurrent.futures
import json
import random
import struct
import sys
import time
import urllib.request
import zlib


def png(index):
    """A PNG of noise and stripes, different for each index."""
    generator = random.Random(index)
    # One side may be at most 200 times as long as the other.
    width, height = generator.randint(4, 700), generator.randint(4, 700)
    if index % 50 == 0:
        width, height = generator.randint(1000, 1600), generator.randint(1000, 1600)
    stripe = bytes(generator.randrange(256) for _ in range(3 * min(width, 64)))
    row = (stripe * (3 * width // len(stripe) + 1))[: 3 * width]
    data = zlib.compress(b"".join(b"\0" + row for _ in range(height)), 1)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def ask(url, index):
    image = "data:image/png;base64," + base64.b64encode(png(index)).decode()
    body = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image, "detail": "low" if index % 3 else "auto"}},
                    {"type": "text", "text": "?"},
                ],
            }
        ],
        "max_tokens": 1,
        "temperature": 0,
        # A tower's time, not the decoder's, is what is wanted here.
        "locket": {"visual": {"budget": 8}},
    }
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    return answer["usage"]["prompt_tokens_details"]["image_tokens_kept"]


def resident_kib(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server, for its resident memory")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--json", help="write the samples to this file")
    arguments = parser.parse_args()
    step = max(1, arguments.images // 100)
    start, samples = time.monotonic(), []
    with concurrent.futures.ThreadPoolExecutor(arguments.at_once) as pool:
        for begin in range(0, arguments.images, step):
            indices = range(begin, min(begin + step, arguments.images))
            list(pool.map(lambda index: ask(arguments.url, index), indices))
            samples.append(resident_kib(arguments.pid))
    half = len(samples) // 2
    first, second = max(samples[:half]), max(samples[half:])
    growth = second / first - 1
    seconds = time.monotonic() - start
    print(f"{arguments.images} images in {seconds:.0f} s: at most {first / 1024:.1f} MiB in the first half,")
    print(f"{second / 1024:.1f} MiB in the second ({growth:+.2%}); at the end {samples[-1] / 1024:.1f} MiB")
    if arguments.json:
        with open(arguments.json, "w") as out:
            json.dump({"images": arguments.images, "seconds": seconds, "resident_kib": samples}, out)
    if growth > arguments.tolerance:
        sys.exit("memory grows")


if __name__ == "__main__":
    main()
