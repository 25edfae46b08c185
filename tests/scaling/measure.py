"""What a gateway costs: `locket bench` against a replica alone and through gateways.

Every process shares this machine, so two replicas with one thread each are compared with one replica with
two threads: nothing here is a speed-up by more machines. All set-ups are up at once and idle but the one that
is asked, and take turns, so that what else runs on the machine touches them alike.
"""

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from gateways import GATEWAYS, Cluster
from load import MODEL

# Clients at once, and requests of each run.
LOADS = {1: 10, 8: 32}
ROUNDS = 5


class Alone(Cluster):
    """One replica, asked directly."""

    def start(self) -> None:
        [replica] = self.replicas
        replica.wait_until_ready()
        self.url = replica.url


def measure(locket: Path, gateways: list[str]) -> None:
    """Prints a table for docs/scaling.md: medians over the rounds."""
    rows = [("none", Alone, 1, 1), ("none", Alone, 1, 2)]
    for name in gateways:
        rows += [(name, GATEWAYS[name], 1, 1), (name, GATEWAYS[name], 2, 1)]
    with contextlib.ExitStack() as stack:
        clusters = []
        for _, gateway, replicas, threads in rows:
            serve = ["--served-model-name", MODEL, "--memory-budget", "1GiB", "--threads", str(threads)]
            cluster = stack.enter_context(gateway(locket, replicas, serve))
            cluster.start()
            clusters.append(cluster)
        print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} before", flush=True)
        print("| gateway | replicas x threads | clients | output tokens/s | first token, ms | token gap, ms | failed |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for clients, requests in LOADS.items():
            runs = [[] for _ in clusters]
            for seed in range(ROUNDS):
                for cluster, results in zip(clusters, runs, strict=True):
                    results.append(bench(locket, cluster.url, clients, requests, seed))
            for (name, _, replicas, threads), results in zip(rows, runs, strict=True):
                print(f"| {name} | {replicas} x {threads} | {clients} | {summary(results)} |", flush=True)


def summary(runs: list[dict]) -> str:
    rate = statistics.median(run["output_tokens_per_s"] for run in runs)
    first = statistics.median(run["time_to_first_token_ms"]["median"] for run in runs)
    gap = statistics.median(run["time_per_output_token_ms"]["median"] for run in runs)
    return f"{rate:.0f} | {first:.0f} | {gap:.1f} | {sum(run['requests_failed'] for run in runs)}"


def bench(locket: Path, url: str, clients: int, requests: int, seed: int) -> dict:
    """Results of one run: prompts of 100 tokens, answers of 64."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(locket), "bench", "--url", url, "--model", MODEL, "--concurrency", str(clients)]
        command += ["--num-requests", str(requests), "--warmup", str(clients), "--seed", str(seed)]
        command += ["--prompt-tokens", "100", "--output-tokens", "64", "--json", str(report)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(report.read_text())["results"]
