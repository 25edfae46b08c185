#!/usr/bin/env python3
"""What constrained requests cost their neighbours.

One unconstrained stream is timed beside eight others, which are unconstrained or follow JSON schemas, in
turns. All nine have the same number of tokens: the schemas ask for more objects than fit, and `ignore_eos`
keeps the others going. Of the timed stream count the gaps between two tokens while all eight run. Printed
are the medians over the rounds of the 50th, 90th and 99th percentile, and the median of the rounds' ratios.

    locket serve --memory-budget 2GiB --max-running 16 &
    python3 benches/structured_neighbour.py --rounds 9

Needs nothing but Python 3.9 and a running server. Exits with 1 if the median ratio of the 99th percentile
is above --limit.
"""

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
import urllib.parse

PROMPT = "Write a list of people, their ages, their jobs and what they like to do on a rainy day."


def schema(index):
    """A schema of its own for each request: nested, with strings, numbers, choices and a pattern."""
    person = {
        "type": "object",
        "properties": {
            f"name{index}": {"type": "string", "minLength": 2, "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "job": {"enum": ["smith", "baker", "teacher", "pilot"]},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
            "likes": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
            "boss": {"anyOf": [{"type": "null"}, {"type": "object", "additionalProperties": {"type": "number"}}]},
        },
        "required": [f"name{index}", "age", "job", "code", "likes"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": person, "minItems": 1000}


def stream(server, body):
    """The times at which events with text arrive."""
    connection = http.client.HTTPConnection(server.hostname, server.port, timeout=600)
    path = server.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read().decode()}")
    times = []
    for line in response:
        if line.startswith(b"data: ") and b'"choices":[{' in line:
            times.append(time.perf_counter())
    connection.close()
    return times


def body(options, seed, constraint=None):
    request = {
        "prompt": PROMPT, "max_tokens": options.tokens, "temperature": 1.0, "seed": seed, "stream": True,
        "ignore_eos": True, "return_token_ids": True,
    }
    if options.model:
        request["model"] = options.model
    if constraint is not None:
        request["structured_outputs"] = {"json": constraint}
    return request


def gaps(options, server, seed, constrained):
    """Gaps of the neighbour while all others run, in milliseconds."""
    results = [None] * (options.others + 1)
    errors = []

    def run(index):
        try:
            constraint = schema(index) if constrained and index > 0 else None
            results[index] = stream(server, body(options, seed + index, constraint))
        except Exception as error:  # told by the main thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(options.others + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    start = max(times[0] for times in results)
    end = min(times[-1] for times in results)
    own = [at for at in results[0] if start <= at <= end]
    return sorted(1000 * (after - before) for before, after in zip(own, own[1:]))


def percentile(values, share):
    return values[min(len(values) - 1, int(share * len(values)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", help="served name; needed for other servers only")
    parser.add_argument("--others", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=1.10)
    options = parser.parse_args()
    server = urllib.parse.urlsplit(options.url)

    # Compiles the grammars and warms the caches of both kinds.
    for constrained in (False, True):
        gaps(options, server, 0, constrained)
    shares = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
    rows = {name: ([], []) for name in shares}
    for turn in range(options.rounds):
        # Each kind is first in every second round.
        order = (False, True) if turn % 2 == 0 else (True, False)
        measured = {constrained: gaps(options, server, 1000 * (turn + 1), constrained) for constrained in order}
        for name, share in shares.items():
            free, constrained = (percentile(measured[kind], share) for kind in (False, True))
            rows[name][0].append(free)
            rows[name][1].append(constrained)
        print(f"round {turn + 1}: p99 {rows['p99'][0][-1]:.2f} ms free, {rows['p99'][1][-1]:.2f} ms constrained",
              file=sys.stderr)
    print("| gap | beside unconstrained, ms | beside constrained, ms | ratio |")
    print("| --- | --- | --- | --- |")
    for name, (free, constrained) in rows.items():
        ratio = statistics.median(after / before for before, after in zip(free, constrained))
        print(f"| {name} | {statistics.median(free):.2f} | {statistics.median(constrained):.2f} | {ratio:.3f} |")
    sys.exit(ratio > options.limit)


if __name__ == "__main__":
    main()
