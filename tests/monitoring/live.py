"""A real server under load, a real Prometheus that scrapes it, and every expression put to it."""

import contextlib
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

import yaml

import expressions
import load

# How long something may take to be true. On a quiet machine it takes seconds.
PATIENCE_S = 120
# Alerts of the test fire this soon; promtool's tests prove the real times.
ALERT_FOR = "2s"
# Another file than the default model's; the Rust tests have the same variable.
TEST_MODEL = "LOCKET_TEST_MODEL"
# vLLM's names break these two rules of Prometheus's, and only these.
VLLMS_FAULTS = ("metric names should not contain ':'", 'non-counter metrics should not have "_total" suffix')


class Missing(Exception):
    """Something did not become true in time."""


def until(what, check):
    """Asks `check` until it returns something true, which is returned."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Missing(what)
        time.sleep(0.1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(arguments, log, **options):
    """Runs a program, and ends it in any case."""
    with open(log, "wb") as errors:
        child = subprocess.Popen(arguments, stderr=errors, stdout=subprocess.PIPE, text=True, **options)
    try:
        yield child
    except BaseException:
        print(f"--- {log}\n{pathlib.Path(log).read_text()[-3000:]}")
        raise
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


class Prometheus:
    """The HTTP interface."""

    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}"

    def get(self, path, **fields):
        url = f"{self.base}/api/v1/{path}?{urllib.parse.urlencode(fields, doseq=True)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            # 503 is plain text: it listens, and reads its files.
            return {"status": "starting"} if error.code == 503 else json.load(error)
        except OSError:
            return {"status": "starting"}

    def query(self, expression):
        """Finite values. Raises if Prometheus does not understand the expression."""
        answer = self.get("query", query=expression)
        if answer["status"] == "error":
            raise ValueError(f"{expression}: {answer['error']}")
        result = answer.get("data", {}).get("result", [])
        return [v for v in (float(sample["value"][1]) for sample in result) if math.isfinite(v)]

    def firing(self):
        """Names of the alerts that fire."""
        alerts = self.get("alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def configure(folder, locket_address, own_address):
    """The deployed configuration, with these addresses, scrapes every second and impatient alerts."""
    config = yaml.safe_load((expressions.PROMETHEUS / "prometheus.yml").read_text())
    config["global"].update({"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"})
    addresses = {"locket": locket_address, "prometheus": own_address}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [addresses[job["job_name"]]]}]
    for name in config["rule_files"]:
        text = (expressions.PROMETHEUS / name).read_text()
        (folder / name).write_text(re.sub(r"(?m)^(\s+for:) \S+$", rf"\1 {ALERT_FOR}", text))
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def lint(promtool, host, port):
    """Names, units and help of every series."""
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    told = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    complaints = [line for line in (told.stdout + told.stderr).splitlines() if line.strip()]
    faults = [c for c in complaints if not (c.startswith("vllm:") and c.endswith(VLLMS_FAULTS))]
    assert not faults, "\n".join(faults)
    return len(complaints)


def wanted(expression, has_vision):
    """Whether this server must have an answer."""
    # Thoughts need a model that has them.
    return "locket_reasoning_" not in expression and (has_vision or "locket_visual_" not in expression)


def all_answer(prometheus, questions, traffic):
    """Waits until each (where, expression) has returned a number once."""
    open_questions = list(questions)

    def left():
        if traffic.failure:
            raise traffic.failure
        open_questions[:] = [q for q in open_questions if not prometheus.query(q[1])]
        return not open_questions

    try:
        until("answers", left)
    except Missing:
        text = "\n".join(f"  {where}\n    {expression}" for where, expression in open_questions)
        raise Missing(f"these return nothing ({traffic.statuses}):\n{text}") from None


def questions(has_vision):
    """Everything that must return something."""
    for where, expression in expressions.of_boards():
        if wanted(expression, has_vision):
            yield where, expression
    for query in expressions.of_vllm():
        yield "vLLM's boards", query
    for rule in expressions.rules():
        if "record" in rule:
            yield "rule", f"last_over_time({rule['record']}[2m])"
        # An alert is silent while all is well; what it looks at must be there.
        for selector in expressions.selectors(rule["expr"]):
            yield rule.get("alert") or rule["record"], f"last_over_time({selector}[2m])"


def check(programs, has_vision):
    """Raises if an expression is broken or empty, or a killed server is not told of."""
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keys = folder / "keys.toml"
        keys.write_text(load.key_file())
        keys.chmod(0o600)
        model = [os.environ[TEST_MODEL]] if TEST_MODEL in os.environ else []
        serve = [pathlib.Path(programs["locket"]).resolve(), "serve", *model, "--port", "0",
                 "--api-key-file", keys, *load.FLAGS]
        # The settings above, whatever the environment has.
        clean = {k: v for k, v in os.environ.items() if not k.startswith("LOCKET_") or k == "LOCKET_CACHE_DIR"}
        locket = stack.enter_context(process(serve, folder / "locket.log", cwd=folder, env=clean))
        line = locket.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)", line)
        assert found, f"the server did not start: {line!r}"
        host, port = found.group(1), int(found.group(2))
        own_port = free_port()
        config = configure(folder, f"{host}:{port}", f"127.0.0.1:{own_port}")
        start = [programs["prometheus"], f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{own_port}", "--storage.tsdb.retention.time=1h"]
        stack.enter_context(process(start, folder / "prometheus.log", cwd=folder))
        prometheus = Prometheus(own_port)
        # Before the load, so that rates see each counter's first step.
        until("a scrape", lambda: prometheus.query('up{job="locket"}') == [1.0])
        asked = list(questions(has_vision))
        with load.Load(host, port) as traffic:
            all_answer(prometheus, asked, traffic)
            until("LocketRejections", lambda: "LocketRejections" in prometheus.firing())
            for where, series, label in expressions.label_queries():
                values = prometheus.get(f"label/{label}/values", **{"match[]": series})["data"]
                assert values, f"{where} has no values"
        for status in (200, 400, 401, 404, 429, 503):
            assert traffic.statuses.get(status), f"no answer was {status}: {traffic.statuses}"
        groups = prometheus.get("rules")["data"]["groups"]
        faults = [rule for group in groups for rule in group["rules"] if rule["health"] != "ok"]
        assert not faults, faults
        assert not prometheus.firing() & {"LocketDown", "LocketNotReady"}, prometheus.firing()
        complaints = lint(programs["promtool"], host, port)
        locket.kill()
        until("LocketDown", lambda: "LocketDown" in prometheus.firing())
        return len(asked), traffic.rounds, complaints
