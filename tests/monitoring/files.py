"""What can be checked without a server: shape, grammar, names, documentation."""

import json
import re
import subprocess
import sys

from grafana_foundation_sdk.models.dashboard import Dashboard
import yaml

import expressions
from expressions import PROMETHEUS, ROOT

# Those of Prometheus itself, and of every client.
FOREIGN = {"up", "ALERTS"}
SUFFIXES = ("_bucket", "_sum", "_count")


def check_board(path):
    board = json.loads(path.read_text())
    Dashboard.from_json(board)
    panels = list(expressions.panels(board))
    identifiers = [panel["id"] for panel in panels]
    assert len(set(identifiers)) == len(identifiers), f"{path.name}: two panels have one id"
    provisioned = ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml"
    sources = {source["uid"] for source in yaml.safe_load(provisioned.read_text())["datasources"]}
    chosen = {v["current"]["value"] for v in board["templating"]["list"] if v["type"] == "datasource"}
    assert chosen and chosen <= sources, f"{path.name}: {chosen} is not provisioned"
    for panel in panels:
        at = f"{path.name}: {panel['title']}"
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24, f"{at} is outside of the grid"
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"].get("unit"), f"{at} has no unit"
            assert panel["description"] and panel["targets"], f"{at} says nothing"
            assert panel["datasource"]["uid"] == "${datasource}", f"{at} has a data source of its own"
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references), f"{at}: two queries have one refId"
    return board["uid"]


def check_names(documented, recorded, where, expression):
    for name in expressions.names(expression):
        base = next((name.removesuffix(s) for s in SUFFIXES if name.removesuffix(s) in documented), name)
        known = base in documented or name in recorded or name in FOREIGN or name.startswith("process_")
        assert known, f"{where} reads {name}, which docs/metrics.md does not have"


def check_alerts(alerts):
    manual = (ROOT / "docs/monitoring.md").read_text()
    tested = "".join(path.read_text() for path in (PROMETHEUS / "tests").glob("*.yml"))
    for alert in alerts:
        name, notes = alert["alert"], alert["annotations"]
        assert f"\n### {name}\n" in manual, f"docs/monitoring.md has no section {name}"
        assert notes["runbook_url"] == f"docs/monitoring.md#{name.lower()}", f"{name} has another runbook"
        assert notes["summary"] and notes["description"] and alert["labels"]["severity"], name
        assert re.search(rf"alertname: {name}\n\s+exp_alerts", tested), f"no test sees {name} fire"


def check(promtool):
    """Raises if a file is wrong."""
    subprocess.run([sys.executable, ROOT / "deploy/grafana/make_dashboards.py", "--check"], check=True)
    uids = [check_board(path) for path in expressions.BOARDS]
    assert len(set(uids)) == len(uids) > 0
    run = lambda *arguments: subprocess.run([promtool, *arguments], check=True, stdout=subprocess.DEVNULL)
    run("check", "config", PROMETHEUS / "prometheus.yml")
    run("test", "rules", *sorted((PROMETHEUS / "tests").glob("*.yml")))
    rules = list(expressions.rules())
    check_alerts([rule for rule in rules if "alert" in rule])
    documented = set(re.findall(r"^\| `([a-z_:0-9]+)` \|", (ROOT / "docs/metrics.md").read_text(), re.M))
    recorded = {rule["record"] for rule in rules if "record" in rule}
    read = [*expressions.of_boards()]
    read += [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules]
    read += [("vLLM's boards", query) for query in expressions.of_vllm()]
    for where, expression in read:
        check_names(documented, recorded, where, expression)
    return len(uids), len(rules), len(read)
