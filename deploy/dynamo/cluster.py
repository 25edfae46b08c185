"""Replicas of locket behind one gateway on this machine, for tries and tests.

    python cluster.py --locket ../../target/release/locket --replicas 2 --port 8000 -- MODEL --threads 1

starts replicas, one worker beside each, and Dynamo's frontend; what follows `--` goes to `locket serve`.
Ctrl-C drains. No etcd, NATS or containers: discovery is a folder, requests go over TCP.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
LISTENING = "locket listening on "


class Process:
    """A child process whose output goes to a file."""

    def __init__(self, name: str, command: list[str], logs: Path, environment: dict[str, str]):
        self.name = name
        self.log = logs / f"{name}.log"
        with self.log.open("wb") as out:
            self.child = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=os.environ | environment
            )

    def until(self, what: str, is_there, seconds: float = 120):
        """What `is_there` returns once it is true; the process must live until then."""
        deadline = time.monotonic() + seconds
        while not (value := is_there()):
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name}: no {what}; its log:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)
        return value

    def terminate(self) -> None:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.child.poll() is None:
            self.child.kill()

    def wait(self, seconds: float) -> int | None:
        """The exit status; killed, and none, if it takes longer."""
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self.child.wait()
            return None


class Replica:
    """A locket and, behind Dynamo, its worker."""

    def __init__(self, number: int, locket: Path, arguments: list[str], logs: Path):
        self._command = [str(locket), "serve", *arguments, "--host", "127.0.0.1", "--port"]
        self._logs = logs
        self._starts = 0
        self.number = number
        self.server = self._start("0")
        self.worker: Process | None = None
        self.url = ""

    def _start(self, port: str) -> Process:
        name = f"locket-{self.number}-{self._starts}"
        self._starts += 1
        return Process(name, [*self._command, port], self._logs, {"LOCKET_LOG_FILTER": "warn"})

    def start_again(self) -> None:
        """A new locket at the address of the one that ended."""
        self.server = self._start(self.url.rsplit(":", 1)[1])

    def wait_until_ready(self) -> None:
        def line() -> str | None:
            lines = self.server.log.read_text().splitlines()
            return next((line for line in lines if line.startswith(LISTENING)), None)

        self.url = self.server.until("address", line).removeprefix(LISTENING)
        self.server.until("readiness", lambda: answers(f"{self.url}/ready"))

    def start_worker(self, logs: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, str(HERE / "worker.py"), "--url", self.url]
        self.worker = Process(f"worker-{self.number}", command, logs, environment)


class Cluster:
    """Replicas, their workers and Dynamo's frontend; stops all of them at the end of a `with`."""

    def __init__(
        self,
        locket: Path,
        replicas: int,
        arguments: list[str],
        port: int = 0,
        environment: dict[str, str] | None = None,
        logs: Path | None = None,
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="locket-cluster-")
        self.logs = logs or Path(self._folder.name)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = dynamo_environment(Path(self._folder.name) / "discovery") | (environment or {})
        self._gateway: Process | None = None
        self.replicas = [Replica(number, locket, arguments, self.logs) for number in range(replicas)]

    def start(self) -> None:
        """Returns when the frontend knows every replica."""
        for replica in self.replicas:
            replica.wait_until_ready()
            replica.start_worker(self.logs, self.environment)
        command = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(self.port)]
        command += ["--router-mode", "least-loaded"]
        self._gateway = Process("frontend", command, self.logs, self.environment)
        # Each worker has one instance per kind of request.
        expected = 3 * len(self.replicas)
        self._gateway.until("replicas", lambda: answers(f"{self.url}/health").count('"instance_id"') == expected)
        # Routes come one by one, each with the first worker that the frontend has taken in.
        for route in ("chat/completions", "completions", "embeddings"):
            self._gateway.until(route, lambda: refuses(f"{self.url}/v1/{route}") not in (0, 404))

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for stage in (
            [replica.worker for replica in self.replicas],
            [self._gateway],
            [r.server for r in self.replicas],
        ):
            alive = [process for process in stage if process]
            for process in alive:
                process.terminate()
            for process in alive:
                process.wait(45)
        self._folder.cleanup()


def dynamo_environment(discovery: Path) -> dict[str, str]:
    """What frontend and workers must have in common, and what makes the frontend pass errors on."""
    return {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(discovery),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        # Trace context and request ids reach the workers only with this.
        "DYN_LOGGING_JSONL": "1",
        # An error before the first event of a stream gets its HTTP status instead of a 200.
        "DYN_HTTP_PRE_COMMIT_ERROR_PEEK_MS": "30000",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(url: str) -> str:
    """The body of a 200; empty without one."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


def refuses(url: str) -> int:
    """The status with which an empty request is refused; 0 without an answer."""
    request = urllib.request.Request(url, b"{}", {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--locket", type=Path, default=HERE / "../../target/release/locket", help="the binary")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000, help="of the frontend")
    parser.add_argument("--logs", type=Path, help="folder for log files")
    parser.add_argument("serve", nargs="*", help="arguments of locket serve, after --")
    options = parser.parse_args()
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    with Cluster(options.locket, options.replicas, options.serve, options.port, logs=options.logs) as cluster:
        cluster.start()
        print(f"{options.replicas} replicas behind {cluster.url}; logs in {cluster.logs}", flush=True)
        asked.wait()


if __name__ == "__main__":
    main()
