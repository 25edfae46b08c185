#!/usr/bin/env python3
"""Many long conversations at once: memory and time per token as they grow.

Starts the server, lets some conversations grow to several lengths side by side (each goes on from its own
snapshot, so that every token is run once), and at each length lets all of them generate at the same
time. Written down: the memory that the server planned, its resident memory, and the gaps between the
tokens of one answer while all conversations generate. `full` keeps every token, for comparison; it needs
room for snapshots as large as its blocks.

    cargo build --release
    benches/long_conversations.py --text corpus/test.jsonl --out results

Text is JSONL with `text`, as benches/corpus/fetch_corpus.py makes it. Needs Linux, Python 3.9 and nothing
else.
"""

import argparse
import concurrent.futures
import json
import pathlib
import re
import statistics
import subprocess
import threading
import time
import urllib.request

# Tokens after a multiple of the snapshot interval: a prompt goes on from the snapshot before it.
BEYOND = 8
START_TIMEOUT_S = 120


def main():
    args = arguments()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = [run(args, "learned", args.lengths, args.memory_budget, args.snapshots_memory)]
    if args.full_lengths:
        runs.append(run(args, "full", args.full_lengths, args.full_memory_budget, args.full_snapshots_memory))
    (out / "long_conversations.json").write_text(json.dumps(runs, indent=1) + "\n")
    table = "\n\n".join(describe(one) for one in runs) + "\n"
    (out / "long_conversations.md").write_text(table)
    print(table)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="JSONL with `text`")
    parser.add_argument("--out", required=True, help="folder for results")
    parser.add_argument("--locket", default="target/release/locket")
    parser.add_argument("--model", default=None, help="as in `locket serve`; without it the default model")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--lengths", type=lengths, default=lengths("2048,8192,16384,32768"))
    parser.add_argument("--full-lengths", type=lengths, default=lengths("2048,8192"), help="empty: not run")
    parser.add_argument("--decode", type=int, default=64, help="tokens of each answer that is timed")
    parser.add_argument("--rounds", type=int, default=3, help="timed answers per length")
    parser.add_argument("--memory-budget", default="1GiB")
    parser.add_argument("--snapshots-memory", default="300MiB")
    parser.add_argument("--full-memory-budget", default="9GiB")
    parser.add_argument("--full-snapshots-memory", default="4GiB")
    return parser.parse_args()


def lengths(text):
    values = [int(part) for part in text.split(",") if part]
    if any(value % 1024 for value in values) or values != sorted(values):
        raise argparse.ArgumentTypeError("lengths ascend and are multiples of 1024")
    return values


def run(args, method, at_lengths, budget, snapshots):
    with Server(args, method, at_lengths[-1], budget, snapshots) as server:
        conversations = server.conversations(args.text, args.conversations, at_lengths[-1] + BEYOND)
        rows = []
        for length in at_lengths:
            began = time.monotonic()
            server.together(conversations, lambda ids: server.complete(ids[: length + BEYOND], 1))
            grown = time.monotonic() - began
            gaps, cached = [], []
            for _ in range(args.rounds):
                answers = server.together(
                    conversations, lambda ids: server.stream(ids[: length + BEYOND], args.decode)
                )
                gaps += common_gaps([times for times, _ in answers])
                cached += [usage["prompt_tokens_details"]["cached_tokens"] for _, usage in answers]
            rows.append(
                {
                    "tokens": length,
                    "grown_s": grown,
                    "gap_ms_median": statistics.median(gaps) * 1e3,
                    "gap_ms_p90": statistics.quantiles(gaps, n=10)[-1] * 1e3,
                    "gaps": len(gaps),
                    "cached_tokens_least": min(cached),
                    "rss_mib": server.memory("VmRSS"),
                    "rss_peak_mib": server.memory("VmHWM"),
                }
            )
            print(method, rows[-1], flush=True)
        return {
            "method": method,
            "conversations": args.conversations,
            "slots": args.slots if method != "full" else None,
            "plan": server.plan(),
            "rows": rows,
        }


def common_gaps(streams):
    """Gaps between tokens, of the time in which every stream runs."""
    start, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    gaps = []
    for times in streams:
        inside = [at for at in times if start <= at <= end]
        gaps += [b - a for a, b in zip(inside, inside[1:])]
    return gaps


def describe(one):
    slots = f", {one['slots']} slots" if one["slots"] else ""
    lines = [f"`{one['method']}`{slots}, {one['conversations']} conversations", ""]
    lines += [f"    {line}" for line in one["plan"]]
    lines += ["", "| tokens each | resident MiB | peak MiB | ms per token, median | p90 |", "|---|---|---|---|---|"]
    for row in one["rows"]:
        lines.append(
            f"| {row['tokens']:,} | {row['rss_mib']:.0f} | {row['rss_peak_mib']:.0f} "
            f"| {row['gap_ms_median']:.1f} | {row['gap_ms_p90']:.1f} |"
        )
    return "\n".join(lines)


class Server:
    """A running server; stopped when left."""

    def __init__(self, args, method, longest, budget, snapshots):
        # fmt: off
        command = [
            args.locket, "serve", *([args.model] if args.model else []), "--port", "0",
            "--cache-method", method, "--memory-budget", budget, "--snapshots-memory", snapshots,
            "--max-running", str(args.conversations), "--prefault",
        ]
        # fmt: on
        longest += 2 * BEYOND + args.decode
        if method == "full":
            # One size of block, so that all memory is for conversations of this length.
            command += ["--max-model-len", str(min(longest, 8192)), "--cache-capacities", str(min(longest, 8192))]
        else:
            block = args.slots + 128
            command += ["--cache-slots", str(args.slots), "--cache-ring", "128", "--cache-capacities", str(block)]
            command += ["--max-model-len", str(longest)]
        self.log = []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()
        line = self.process.stdout.readline()
        if not line.startswith("locket listening on "):
            self.process.wait()
            raise SystemExit(f"the server did not start: {line}{''.join(self.log)}")
        self.url = line.split()[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def plan(self):
        """What the server said about memory when it started."""
        words = ("planned", "method", "sequence", "cache", "snapshots")
        lines = [re.sub(r"^.*?INFO\s+(\S+:\s+)?", "", line.rstrip()) for line in self.log]
        return [line for line in lines if line.startswith(words)]

    def memory(self, name):
        """A figure of the process in MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+) kB", status, re.M).group(1)) / 1024

    def conversations(self, path, count, length):
        """`count` lists of `length` token ids, each from documents of its own where there are enough."""
        ids = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                prompt = json.loads(line)["text"][:400_000]
                ids += self.post("/tokenize", {"prompt": prompt, "add_special_tokens": False})["tokens"]
                if len(ids) >= count * length:
                    break
        if len(ids) < length + count:
            raise SystemExit(f"{path} has {len(ids)} tokens; {length + count} are the least")
        step = (len(ids) - length) // max(count - 1, 1)
        return [ids[i * step : i * step + length] for i in range(count)]

    def together(self, items, work):
        with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
            return list(pool.map(work, items))

    def request(self, path, body):
        data = json.dumps(body).encode()
        head = {"content-type": "application/json"}
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, head), timeout=3600)

    def post(self, path, body):
        with self.request(path, body) as response:
            return json.load(response)

    def complete(self, ids, max_tokens):
        return self.post("/v1/completions", {"prompt": ids, "max_tokens": max_tokens, "temperature": 0})

    def stream(self, ids, max_tokens):
        """Times of the tokens, and the usage."""
        body = {"prompt": ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        # One event per token, also where a token is a part of a character.
        body |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
        times, usage = [], None
        with self.request("/v1/completions", body) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event["choices"] and event["choices"][0].get("token_ids"):
                    times.append(time.monotonic())
                usage = event.get("usage") or usage
        return times, usage


if __name__ == "__main__":
    main()
