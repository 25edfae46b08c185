#!/usr/bin/env python3
"""Measures locket and llama.cpp's server on the same GGUF with the same loads.

Both servers run one after the other on the same machine with the same number of threads; each load
starts each server afresh, sends the same prompts with `locket bench`, and stops it. The order of the
two alternates from round to round, so that a machine that warms up or slows down favours neither.
Written out: every report of `locket bench`, their medians as `comparison.json`, and the tables of
docs/performance.md as `comparison.md`.

llama.cpp gets what its documentation recommends for this use: as many slots (-np) as clients, context
for all of them, continuous batching and flash attention as by default, f16 cache, no reuse of prompts.

    cargo build --release
    benches/build_llama_server.sh llama.cpp-build      # once
    benches/compare_llama_cpp.py --model MODEL.gguf --llama-server llama.cpp-build/llama-server --out results

Needs Python 3.9 and nothing else.
"""

import argparse
import json
import os
import pathlib
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

# (prompt tokens, clients, requests): enough requests for several full turns of all clients.
LOADS = [
    (200, 1, 12),
    (200, 4, 24),
    (200, 16, 64),
    (200, 64, 192),
    (4000, 1, 3),
    (4000, 4, 8),
    (4000, 16, 32),
]
# Room for the chat template, special tokens and rounding.
MARGIN_TOKENS = 64
START_TIMEOUT_S = 120
FIGURES = {
    "output tokens/s": lambda r: r["output_tokens_per_s"],
    "TTFT median ms": lambda r: r["time_to_first_token_ms"]["median"],
    "TTFT p99 ms": lambda r: r["time_to_first_token_ms"]["p99"],
    "token median ms": lambda r: r["time_per_output_token_ms"]["median"],
    "gap p99 ms": lambda r: r["chunk_gap_ms"]["p99"],
    "peak MiB": lambda r: r["peak_memory"]["peak_bytes"] / 2**20,
}


def locket_command(args, port, clients, context):
    # fmt: off
    return [
        args.locket, "serve", args.model, "--host", "127.0.0.1", "--port", str(port),
        "--threads", str(args.threads), "--max-model-len", str(context),
        "--cache-capacities", str(context), "--max-running", str(clients), "--queue-timeout-s", "3600",
        *shlex.split(args.locket_args),
    ]
    # fmt: on


def llama_command(args, port, clients, context):
    # fmt: off
    return [
        args.llama_server, "-m", args.model, "--host", "127.0.0.1", "--port", str(port),
        "-t", str(args.threads), "-tb", str(args.threads), "-c", str(clients * context), "-np", str(clients),
        "-ctk", "f16", "-ctv", "f16", "--no-cache-prompt", "--cache-ram", "0", "--no-webui",
        *shlex.split(args.llama_args),
    ]
    # fmt: on


SERVERS = {"locket": locket_command, "llama.cpp": llama_command}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(process, port, log):
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode} while starting; see {log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.1)
    sys.exit(f"the server was not ready within {START_TIMEOUT_S} s; see {log}")


def measure(args, name, load, round_index):
    """One server, one load, one round: the report of `locket bench`."""
    prompt_tokens, clients, requests = load
    stem = args.out / f"{name}-{prompt_tokens}-{clients}-{round_index}"
    port = free_port()
    command = SERVERS[name](args, port, clients, prompt_tokens + args.output_tokens + MARGIN_TOKENS)
    log = stem.with_suffix(".log")
    with open(log, "w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(process, port, log)
        # fmt: off
        subprocess.run(
            [
                args.locket, "bench", "--url", f"http://127.0.0.1:{port}", "--endpoint", "completions",
                "--concurrency", str(clients), "--num-requests", str(requests), "--warmup", "1",
                "--prompt-tokens", str(prompt_tokens), "--output-tokens", str(args.output_tokens),
                "--seed", str(round_index), "--pid", str(process.pid), "--timeout-s", "3600",
                "--json", str(stem.with_suffix(".json")),
            ],
            check=True, stdout=subprocess.DEVNULL,
        )
        # fmt: on
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    report = json.loads(stem.with_suffix(".json").read_text())
    results = report["results"]
    if results["requests_failed"]:
        print(f"  {name}: {results['requests_failed']} requests failed: {results['errors']}", file=sys.stderr)
    if any(results["checks"].values()):
        print(f"  {name}: counts differ: {results['checks']}", file=sys.stderr)
    return report


def medians(reports):
    """The median of each figure over the rounds."""
    return {
        figure: statistics.median(read(report["results"]) for report in reports)
        for figure, read in FIGURES.items()
    }


def output_of(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return (done.stdout + done.stderr).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(rows):
    """Markdown: a line per load and server, and the ratio of throughputs."""
    lines = ["| prompt | clients | server | " + " | ".join(FIGURES) + " | locket / llama.cpp |"]
    lines.append("|" + " ---: |" * 2 + " --- |" + " ---: |" * (len(FIGURES) + 1))
    for row in rows:
        throughput = {name: figures["output tokens/s"] for name, figures in row["medians"].items()}
        for name, figures in row["medians"].items():
            both = name == "locket" and len(throughput) == 2
            ratio = f"{throughput['locket'] / throughput['llama.cpp']:.2f}" if both else ""
            cells = " | ".join(f"{value:.1f}" for value in figures.values())
            lines.append(f"| {row['prompt_tokens']} | {row['clients']} | {name} | {cells} | {ratio} |")
    return "\n".join(lines)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="GGUF file that both servers load")
    parser.add_argument("--llama-server", help="llama.cpp's llama-server; see build_llama_server.sh")
    parser.add_argument("--locket", default="target/release/locket")
    parser.add_argument("--locket-args", default="", help="more arguments of locket serve, as one text")
    parser.add_argument("--llama-args", default="", help="more arguments of llama-server, as one text")
    parser.add_argument("--only", choices=SERVERS, help="measure one server alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--loads", help="comma-separated PROMPT:CLIENTS[:REQUESTS] instead of the usual seven")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-results"))
    args = parser.parse_args()
    if args.only != "locket" and not args.llama_server:
        parser.error("--llama-server is needed unless --only locket")
    return args


def wanted_loads(text):
    if not text:
        return LOADS
    loads = []
    for part in text.split(","):
        prompt_tokens, clients, *requests = map(int, part.split(":"))
        loads.append((prompt_tokens, clients, requests[0] if requests else 4 * clients))
    return loads


def main():
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    names = [args.only] if args.only else list(SERVERS)
    loads = wanted_loads(args.loads)
    load_average = os.getloadavg()[0]
    if load_average > 0.3:
        print(f"warning: the machine is busy (load {load_average:.1f}): these figures compare nothing", file=sys.stderr)
    reports = {(name, load): [] for name in names for load in loads}
    for round_index in range(args.rounds):
        order = names if round_index % 2 == 0 else names[::-1]
        for load in loads:
            for name in order:
                report = measure(args, name, load, round_index)
                reports[name, load].append(report)
                rate = report["results"]["output_tokens_per_s"]
                print(f"round {round_index} prompt {load[0]} clients {load[1]} {name}: {rate:.1f} tokens/s", flush=True)

    rows = [
        {
            "prompt_tokens": load[0],
            "clients": load[1],
            "requests": load[2],
            "medians": {name: medians(reports[name, load]) for name in names},
        }
        for load in loads
    ]
    any_report = reports[names[0], loads[0]][0]
    summary = {
        "date": any_report["date"],
        "machine": any_report["machine"],
        "commit": any_report["commit"],
        "load_average_before": load_average,
        "llama_server": output_of([args.llama_server, "--version"]) if args.llama_server else None,
        "model": pathlib.Path(args.model).name,
        "threads": args.threads,
        "rounds": args.rounds,
        "output_tokens": args.output_tokens,
        "commands": {name: shlex.join(SERVERS[name](args, 0, 16, 400)[1:]) for name in names},
        "rows": rows,
    }
    (args.out / "comparison.json").write_text(json.dumps(summary, indent=2) + "\n")
    machine = summary["machine"]
    head = (
        f"{summary['date'][:10]}, {machine['cpu']}, {machine['cores']} cores, locket {summary['commit']}, "
        f"{args.threads} threads, {summary['model']}, {args.output_tokens} output tokens, "
        f"medians of {args.rounds} rounds.\n\n"
    )
    (args.out / "comparison.md").write_text(head + table(rows) + "\n")
    print("\n" + head + table(rows))


if __name__ == "__main__":
    main()
