"""What a gateway costs: `locket bench` against a replica alone and through gateways.

Every process shares this machine, so two replicas with one thread each are compared with one replica with
two threads: nothing here is a speed-up by more machines.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from gateways import GATEWAYS, Cluster
from load import MODEL

CLIENTS = (1, 8)


class Alone(Cluster):
    """One replica, asked directly."""

    def start(self) -> None:
        [replica] = self.replicas
        replica.wait_until_ready()
        self.url = replica.url


def measure(locket: Path, gateways: list[str]) -> None:
    """Prints a table for docs/scaling.md; each row is the median of three runs by throughput."""
    rows = [("no gateway", Alone, 1, 1), ("no gateway", Alone, 1, 2)]
    for name in gateways:
        rows += [(name, GATEWAYS[name], 1, 1), (name, GATEWAYS[name], 2, 1)]
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} before")
    print("| gateway | replicas x threads | clients | output tokens/s | first token, ms, median (p99) | failed |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, gateway, replicas, threads in rows:
        serve = ["--served-model-name", MODEL, "--memory-budget", "1GiB", "--threads", str(threads)]
        with gateway(locket, replicas, serve) as cluster:
            cluster.start()
            for clients in CLIENTS:
                runs = [bench(locket, cluster.url, clients, seed) for seed in range(3)]
                run = sorted(runs, key=lambda run: run["output_tokens_per_s"])[1]
                first = run["time_to_first_token_ms"]
                print(
                    f"| {name} | {replicas} x {threads} | {clients} | {run['output_tokens_per_s']:.0f}"
                    f" | {first['median']:.0f} ({first['p99']:.0f}) | {sum(run['requests_failed'] for run in runs)} |",
                    flush=True,
                )


def bench(locket: Path, url: str, clients: int, seed: int) -> dict:
    """Results of one run: prompts of 100 tokens, answers of 64."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(locket), "bench", "--url", url, "--model", MODEL, "--concurrency", str(clients)]
        command += ["--num-requests", str(8 * clients if clients > 1 else 12), "--warmup", "2", "--seed", str(seed)]
        command += ["--prompt-tokens", "100", "--output-tokens", "64", "--json", str(report)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(report.read_text())["results"]
