"""Expressions of boards, rules and alerts: where they are, what is in them."""

import json
import pathlib
import re

import promql_parser
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
BOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
# Windows of boards, in a test that lives for a minute.
RATE_INTERVAL, RANGE = "1m", "5m"


def panels(board):
    """All panels, those in collapsed rows included."""
    todo = list(board["panels"])
    while todo:
        panel = todo.pop(0)
        todo.extend(panel.get("panels") or [])
        yield panel


def variables(board):
    return [variable["name"] for variable in board["templating"]["list"]]


def fill(text, names):
    """Puts values where Grafana would: windows, and `.*` for the variables."""
    text = re.sub(r"\$\{?__(rate_)?interval(_ms)?\}?", RATE_INTERVAL, text)
    text = re.sub(r"\$\{?__range(_s|_ms)?\}?", RANGE, text)
    for name in names:
        text = re.sub(r"\$\{%s(:[a-z]+)?\}|\$%s\b" % (name, name), ".*", text)
    return text


def of_boards():
    """(where, expression) of all panels."""
    for path in BOARDS:
        board = json.loads(path.read_text())
        for panel in panels(board):
            for target in panel.get("targets", []):
                yield f"{path.stem}: {panel['title']}", fill(target["expr"], variables(board))


def label_queries():
    """(where, series, label) of the variables that ask for values of a label."""
    for path in BOARDS:
        board = json.loads(path.read_text())
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                asked = fill(variable["query"]["query"], variables(board))
                series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", asked).groups()
                yield f"{path.stem}: ${variable['name']}", series, label


def rules():
    """All recording rules and alerts."""
    for name in ("rules.yml", "alerts.yml"):
        for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"]:
            yield from group["rules"]


def of_vllm():
    """What vLLM's boards ask."""
    lines = (ROOT / "tests/monitoring/vllm_queries.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def selectors(expression):
    """The selectors of series in an expression, without their windows."""
    found = []

    def walk(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node.prettify())
        elif isinstance(node, promql_parser.MatrixSelector):
            walk(node.vector_selector)
        elif isinstance(node, promql_parser.BinaryExpr):
            walk(node.lhs)
            walk(node.rhs)
        elif isinstance(node, promql_parser.Call):
            for argument in node.args:
                walk(argument)
        elif hasattr(node, "expr"):
            walk(node.expr)

    walk(promql_parser.parse(expression))
    return found


def names(expression):
    """Names of the series that it reads."""
    return {re.match(r"[a-zA-Z_:][a-zA-Z0-9_:]*", selector).group() for selector in selectors(expression)}
