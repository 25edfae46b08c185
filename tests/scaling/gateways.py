"""The gateways under test: each with two replicas of locket behind it."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "deploy/dynamo"))

from cluster import Cluster, Process, Replica, answers, free_port  # noqa: E402


class Dynamo(Cluster):
    """NVIDIA Dynamo's frontend, with a worker beside each replica."""

    name = "dynamo"
    # The official client's default. The frontend gives up a request that it has handed to a replica, which
    # has not taken it yet, at the moment when the replica leaves: some milliseconds, and a 503.
    retries = 2

    def end(self, replica: Replica, how: str) -> None:
        """Ends a replica as a pod ends: all its processes at once."""
        for process in (replica.worker, replica.server):
            getattr(process, how)()

    def processes(self, replica: Replica) -> list[Process]:
        return [replica.worker, replica.server]


class VllmRouter(Cluster):
    """The vLLM project's router: a plain HTTP proxy that looks at health."""

    name = "vllm-router"
    # None: the router itself tries the other replica.
    retries = 0

    def start(self) -> None:
        for replica in self.replicas:
            replica.wait_until_ready()
        command = [str(Path(sys.executable).parent / "vllm-router"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--worker-urls", *(replica.url for replica in self.replicas)]
        command += ["--prometheus-port", str(free_port()), "--policy", "round_robin"]
        command += ["--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"]
        command += ["--health-failure-threshold", "1", "--health-success-threshold", "1"]
        command += ["--worker-startup-check-interval", "1", "--cb-timeout-duration-secs", "5"]
        self._gateway = Process("vllm-router", command, self.logs, {})
        healthy = f'"healthy_workers":{len(self.replicas)},'
        self._gateway.until("replicas", lambda: healthy in answers(f"{self.url}/readiness"))

    def end(self, replica: Replica, how: str) -> None:
        getattr(replica.server, how)()

    def processes(self, replica: Replica) -> list[Process]:
        return [replica.server]


GATEWAYS = {gateway.name: gateway for gateway in (Dynamo, VllmRouter)}


def running(replica: Replica) -> int:
    """Sequences that the replica works on."""
    series = "vllm:num_requests_running{"
    lines = [line for line in answers(f"{replica.url}/metrics").splitlines() if line.startswith(series)]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))
