"""Writes deploy/grafana/dashboards/*.json. With --check, says whether they are as this would write them.

A board answers an operator's questions, a row each; a panel is a title that says what one sees, a unit,
and queries. Positions, identifiers and variables follow from the order. Needs Python alone.
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Matchers of series that the server has, and of those that its engine has.
S = 'job=~"$job", instance=~"$instance"'
E = S + ', model_name=~"$model_name"'
RATE = "[$__rate_interval]"
TOKENS = "suffix: tok/s"


def quantile(share, series, by=""):
    """The quantile of a histogram of the engine."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({series}_bucket{{{E}}}{RATE})))"


def quantiles(series):
    return [(quantile(share, series), f"p{int(share * 100)}") for share in (0.5, 0.95, 0.99)]


def rate(series, matchers=E, by=""):
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({series}{{{matchers}}}{RATE}))"


def mean(series):
    return f"{rate(series + '_sum')} / ({rate(series + '_count')} > 0)"


def share(part, whole):
    return f"{part} / ({whole} > 0)"


def panel(kind, title, unit, queries, about, width, height, **more):
    """`queries` are pairs of an expression and its legend."""
    defaults = {"unit": unit, "noValue": "none"}
    if more.get("steps"):
        # Pairs of a colour and the value from which on it is shown.
        defaults["color"] = {"mode": "thresholds"}
        steps = [{"color": color, "value": value} for color, value in more["steps"]]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    defaults.update({key: more[key] for key in ("min", "max", "mappings") if key in more})
    made = {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for at, (expr, legend) in enumerate(queries)
        ],
    }
    if kind == "stat":
        made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    elif kind == "timeseries":
        style = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
        if more.get("stacked"):
            style["stacking"] = {"mode": "normal", "group": "A"}
        defaults["custom"] = style
        defaults.setdefault("min", 0)
        made["options"] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif kind == "table":
        for target in made["targets"]:
            target.update({"format": "table", "instant": True, "range": False})
        hidden = {name: True for name in ("Time", "Value", "__name__", "job")}
        made["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
        made["options"] = {"showHeader": True}
    return made


def stat(title, unit, expr, about, width=3, **more):
    return panel("stat", title, unit, [(expr, "")], about, width, 4, **more)


def graph(title, unit, queries, about, width=8, **more):
    return panel("timeseries", title, unit, queries, about, width, 8, **more)


def table(title, expr, about, height=6):
    return panel("table", title, "none", [(expr, "")], about, 24, height)


HIGH_IS_BAD = [("green", None), ("orange", 0.001), ("red", 0.01)]

HEALTH = [
    ("Is it healthy?", [
        stat("Ready", "short", f"sum(locket_ready{{{S}}})", "Servers that take requests.", 2,
             steps=[("red", None), ("green", 1)]),
        stat("Not answering", "short", 'count(up{job=~"$job"} == 0) or vector(0)',
             "Servers that Prometheus cannot scrape.", 2, steps=[("green", None), ("red", 1)]),
        stat("Alerts", "short", 'count(ALERTS{alertstate="firing", alertname=~"Locket.*"}) or vector(0)',
             "Alerts that fire; docs/monitoring.md has a section for each.", 2,
             steps=[("green", None), ("red", 1)]),
        stat("Requests", "reqps", rate("locket_http_requests_total", S + ', method="POST"'),
             "Requests with a body, answered with anything."),
        stat("Failing", "percentunit",
             share(rate("locket_http_errors_total", S + ', kind=~"internal_error|engine_not_running"'),
                   rate("locket_http_requests_total", S + ', method="POST"')) + " or vector(0)",
             "Share of requests that end with an error of the server's own.", steps=HIGH_IS_BAD),
        stat("Refused", "percentunit",
             share(rate("locket_http_errors_total", S + ', kind="server_overloaded"'),
                   rate("locket_http_requests_total", S + ', method="POST"')) + " or vector(0)",
             "Share of requests that come while the server is full and get 503.", steps=HIGH_IS_BAD),
        stat("First token, p95", "s", quantile(0.95, "vllm:time_to_first_token_seconds"),
             "From the request to its first token."),
        stat("Between tokens, p95", "s", quantile(0.95, "vllm:inter_token_latency_seconds"),
             "Between two tokens of one answer."),
        stat("Up for", "s", f"min(time() - process_start_time_seconds{{{S}}})", "Since the youngest start."),
    ]),
    ("What do clients get?", [
        graph("Answers by status", "reqps",
              [(rate("locket_http_requests_total", S + ', method="POST"', "status"), "{{status}}")],
              "499: the client went away before the end.", stacked=True),
        graph("Errors by kind", "reqps",
              [(f"{rate('locket_http_errors_total', S, 'kind')} > 0 or {rate('locket_http_errors_total', S)}",
                "{{kind}}")],
              "Error answers and error events in streams, by the code that clients see. Without a name: all."),
        graph("Ends of sequences", "reqps",
              [(rate("vllm:request_success_total", E, "finished_reason"), "{{finished_reason}}")],
              "length: cut by max_tokens. abort: the client left. error: the panel beside says why.",
              stacked=True),
        graph("Requests by key", "reqps",
              [(rate("locket_requests_by_key_total", S, "key"), "{{key}}")],
              "Who asks. Keys have names in the settings or the key file."),
        graph("Refused by a key's own limit", "reqps",
              [(rate("locket_rate_limited_total", S, "key, limit"), "{{key}}: {{limit}}")],
              "Answered with 429: raise the key's limit, or let its owner slow down."),
        graph("Connections and requests in work", "short",
              [(f"sum(locket_http_connections{{{S}}})", "connections"),
               (f"sum(locket_http_in_flight{{{S}}})", "requests in work"),
               (f"sum(increase(locket_http_stalls_total{{{S}}}{RATE}))", "stalled streams")],
              "Streams count as work until their last byte is taken."),
    ]),
    ("Who waits, and why?", [
        graph("Running and waiting", "short",
              [(f"sum(vllm:num_requests_running{{{E}}})", "running"),
               (f"sum(vllm:num_requests_waiting{{{E}}})", "waiting"),
               (f"sum(locket_max_running{{{E}}})", "most that may run"),
               (f"sum(locket_max_waiting{{{E}}})", "most that may wait")],
              "At the most that may wait, more are refused."),
        graph("What they wait for", "short",
              [(f"sum by (reason) (locket_waiting_sequences{{{E}}})", "{{reason}}")],
              "block: of their size. running_limit: max-running. snapshot: one is being read. "
              "engine: the step that runs has to end first.", stacked=True),
        graph("Wait before the first step", "s",
              quantiles("vllm:request_queue_time_seconds")
              + [(f"max(locket_queue_oldest_seconds{{{E}}})", "longest now")],
              "The longest now is of one that still waits; near queue-timeout-s it fails."),
        graph("Blocks by size", "short",
              [(f'sum by (class) (locket_blocks{{{E}, state="used"}})', "{{class}} slots, used"),
               (f'sum by (class) (locket_blocks{{{E}, state="free"}})', "{{class}} slots, free")],
              "A size that is always used while another is free: change cache.capacities."),
        graph("Slots in owned blocks", "percentunit",
              [(f"max by (instance) (vllm:kv_cache_usage_perc{{{E}}})", "{{instance}}")],
              "At 1 the next request waits. It does not grow with the length of a conversation.", max=1),
        graph("Not accepted, by reason", "reqps",
              [(rate("locket_rejections_total", E, "reason"), "{{reason}}")],
              "queue_full: overload. does_not_fit: larger than the largest block. not_exact: an exact answer "
              "was asked for."),
    ]),
]

MEMORY = [
    ("What does a sequence take, and what would it take in a full cache?", [
        stat("A sequence's block", "bytes", mean("locket_sequence_cache_bytes"),
             "Mean of the sequences that ended.", 4),
        stat("In a full cache", "bytes", mean("locket_sequence_full_cache_bytes"),
             "Mean of the same sequences, had every token been kept.", 4),
        stat("Full cache over ours", "suffix: x",
             f"{rate('locket_sequence_full_cache_bytes_sum')} / "
             f"({rate('locket_sequence_cache_bytes_sum')} > 0)",
             "Above 1: memory saved by folding. Below 1: sequences end before their blocks are full.", 4),
        stat("Longest tenth, in a full cache", "bytes",
             quantile(0.9, "locket_sequence_full_cache_bytes"), "Nine in ten would take less.", 4),
        stat("Sequences that fit", "short", f"sum(locket_blocks{{{E}}})", "Blocks of all sizes.", 4),
        stat("Full-cache sequences in the same memory", "short",
             f'sum(locket_cache_bytes{{{E}, state="total"}}) / '
             f"({mean('locket_sequence_full_cache_bytes')})",
             "The cache's memory over the mean that a sequence of this traffic would take.", 4),
        graph("All running sequences", "bytes",
              [(f'sum(locket_cache_bytes{{{E}, state="reserved"}})', "their blocks"),
               (f'sum(locket_cache_bytes{{{E}, state="used"}})', "filled slots"),
               (f"sum(locket_full_cache_bytes{{{E}}})", "a full cache"),
               (f'sum(locket_cache_bytes{{{E}, state="total"}})', "all blocks")],
              "Blocks stay as they are while a full cache grows with every token.", 12),
        graph("One running sequence", "bytes",
              [(f'sum(locket_cache_bytes{{{E}, state="reserved"}}) / '
                f"(sum(vllm:num_requests_running{{{E}}}) > 0)", "its block"),
               (f"sum(locket_full_cache_bytes{{{E}}}) / (sum(vllm:num_requests_running{{{E}}}) > 0)",
                "in a full cache")],
              "Means over those that run now.", 12),
    ]),
    ("How much is folded?", [
        graph("Tokens", TOKENS,
              [(f"{rate('vllm:prompt_tokens_total')} + {rate('vllm:generation_tokens_total')}",
                "prompts and answers"),
               (rate("locket_folded_tokens_total"), "folded")],
              "Folded: some layer no longer holds the token in a slot of its own. Counted at a sequence's end.", 12),
        graph("Sequences that are exact", "percentunit",
              [(share(rate("locket_exact_sequences_total", E + ', exact="true"'),
                      rate("locket_exact_sequences_total")), "exact")],
              "Share of the sequences of which nothing was folded.", 12, max=1),
    ]),
    ("Does a conversation that returns find its state?", [
        graph("Prompt tokens by source", TOKENS,
              [(rate("vllm:prompt_tokens_by_source_total", E + ', source="local_compute"'), "computed"),
               (rate("vllm:prompt_tokens_by_source_total", E + ', source="local_cache_hit"'),
                "from a snapshot")],
              "Tokens from a snapshot are not run again.", stacked=True),
        graph("Snapshots", "bytes",
              [(f"sum by (tier) (locket_snapshot_bytes{{{E}}})", "{{tier}}"),
               (f'sum(locket_memory_plan_bytes{{{S}, part="snapshots"}})', "bound in RAM")],
              "States of blocks that are kept for prompts to come."),
        graph("Taken, evicted, not kept", "ops",
              [(rate("locket_snapshots_taken_total"), "taken"),
               (rate("locket_snapshots_evicted_total", E, "tier"), "evicted from {{tier}}"),
               (rate("locket_snapshots_refused_total"), "not kept or not used"),
               (rate("locket_snapshot_writes_dropped_total"), "not written")],
              "As many evicted as taken, and few hits: raise snapshots.memory."),
        graph("Answers that came back", "ops",
              [(rate("locket_turn_lookups_total", S, "result"), "{{result}}")],
              "missed: the client sent back something else, or the turn was forgotten."),
        graph("Remembered turns", "bytes",
              [(f"sum(locket_turn_bytes{{{S}}})", "bytes"),
               (f'sum(locket_memory_plan_bytes{{{S}, part="turns"}})', "bound")],
              "Answers kept as tokens."),
        graph("Time to move a state", "s",
              [(quantile(0.95, "locket_snapshot_seconds", "direction"), "{{direction}}, p95")],
              "The engine waits for as long."),
    ]),
    ("Does the process keep to its plan?", [
        graph("Resident memory and the plan", "bytes",
              [(f"sum(process_resident_memory_bytes{{{S}}})", "resident"),
               (f"sum(locket_memory_plan_bytes{{{S}}})", "planned"),
               (f"sum(locket_memory_budget_bytes{{{S}}})", "budget")],
              "Resident grows up to about the plan as blocks and snapshots are used for the first time.", 12),
        graph("The plan's parts", "bytes",
              [(f"sum by (part) (locket_memory_plan_bytes{{{S}}})", "{{part}}")],
              "What was planned at start.", 6, stacked=True),
        graph("Allocated by the model", "bytes",
              [(f"sum by (pool) (locket_memory_bytes{{{E}}})", "{{pool}}")],
              "What the model holds.", 6, stacked=True),
    ]),
]

SPEED = [
    ("How fast is it for a client?", [
        graph("First token", "s", quantiles("vllm:time_to_first_token_seconds"),
              "Queue, prompt and first step."),
        graph("Between tokens", "s", quantiles("vllm:inter_token_latency_seconds"),
              "Gaps; long ones are prompts of others, or a slow reader."),
        graph("Whole request", "s", quantiles("vllm:e2e_request_latency_seconds"),
              "From submission to the last token."),
        graph("Where the time goes", "s",
              [(mean(f"vllm:request_{phase}_time_seconds"), phase) for phase in ("queue", "prefill", "decode")],
              "Means by request.", stacked=True),
        graph("Tokens per second of one answer", TOKENS,
              [(f"1 / ({mean('vllm:request_time_per_output_token_seconds')})", "mean")],
              "After the first token."),
        graph("Requests within the service levels", "percentunit",
              [(share(f'sum(rate(vllm:time_to_first_token_seconds_bucket{{{E}, le="2.5"}}{RATE}))',
                      rate("vllm:time_to_first_token_seconds_count")), "first token within 2.5 s"),
               (share(f'sum(rate(vllm:inter_token_latency_seconds_bucket{{{E}, le="0.2"}}{RATE}))',
                      rate("vllm:inter_token_latency_seconds_count")), "gaps within 0.2 s")],
              "Alerts look at the same bounds, with allowances of 5 % and 1 %.", max=1),
    ]),
    ("How much does the server do?", [
        graph("Tokens", TOKENS,
              [(rate("vllm:generation_tokens_total"), "generated"),
               (rate("vllm:prompt_tokens_by_source_total", E + ', source="local_compute"'), "prompt, computed"),
               (rate("vllm:prompt_tokens_by_source_total", E + ', source="local_cache_hit"'),
                "prompt, from snapshots")],
              "All replicas chosen above."),
        graph("Duration of a step", "s",
              [(quantile(0.95, "locket_step_seconds", "kind"), "{{kind}}, p95"),
               (mean("locket_step_seconds"), "mean")],
              "mixed above target-step-ms: the machine is slower than measured at start, or shared."),
        graph("Rows of a step", "short",
              [(mean("locket_batch_rows"), "mean"), (quantile(0.95, "locket_batch_rows"), "p95")],
              "Tokens computed together; more is more efficient."),
        graph("Steps", "ops", [(rate("locket_step_seconds_count", E, "kind"), "{{kind}}")],
              "None while sequences run: the engine is stalled.", stacked=True),
        graph("Processor", "suffix: cores", [(rate("process_cpu_seconds_total", S, "instance"), "{{instance}}")],
              "Processor time per second."),
        graph("Constrained answers", "ops",
              [(rate("locket_steering_waits_total"), "rows that waited"),
               (rate("locket_steering_seconds_count"), "sets of tokens computed"),
               (rate("locket_steering_failures_total"), "failures")],
              "Schemas and grammars are followed beside the model; rows that wait slow their answer down."),
    ]),
    ("What is asked for?", [
        graph("Prompt tokens", "short", quantiles("vllm:request_prompt_tokens"), "By sequence."),
        graph("Generated tokens", "short",
              quantiles("vllm:request_generation_tokens")
              + [(mean("vllm:request_params_max_tokens"), "max_tokens, mean")],
              "max_tokens far above what is generated: clients reserve room that they do not use."),
        graph("Continuations per request", "short", [(mean("vllm:request_params_n"), "n, mean")],
              "The parameter n."),
    ]),
]

QUALITY = [
    ("Which settings are in force?", [
        table("Settings", f"locket_settings_info{{{S}}}",
              "What changes answers or what they take. Replicas that differ here answer differently."),
        table("Binary", f"locket_build_info{{{S}}}", "Version, commit and features.", 4),
        stat("Kinds of settings", "short",
             f"count(count without (instance, job) (locket_settings_info{{{S}}}))",
             "More than 1: replicas of one model differ.", 6, steps=[("green", None), ("orange", 2)]),
        stat("Exact sequences", "percentunit",
             share(rate("locket_exact_sequences_total", E + ', exact="true"'),
                   rate("locket_exact_sequences_total")), "Nothing of them was folded.", 6),
        stat("Folded of all tokens", "percentunit",
             share(rate("locket_folded_tokens_total"),
                   f"({rate('vllm:prompt_tokens_total')} + {rate('vllm:generation_tokens_total')})"),
             "Tokens without a slot of their own at the end.", 6),
        stat("Sequences with broken logits", "short",
             f"sum(increase(locket_non_finite_logits_total{{{E}}}[$__range]))",
             "Any: broken weights or a faulty kernel.", 6, steps=[("green", None), ("red", 1)]),
    ]),
    ("Images: how many visual tokens are kept?", [
        graph("Visual tokens by method", TOKENS,
              [(rate("locket_visual_tokens_total", S + ', stage="in"', "method"), "{{method}}, before"),
               (rate("locket_visual_tokens_total", S + ', stage="kept"', "method"), "{{method}}, after")],
              "Tokens that images had, and those that went into the decoder.", 12),
        graph("Share that is kept", "percentunit",
              [(share(rate("locket_visual_tokens_total", S + ', stage="kept"', "method"),
                      rate("locket_visual_tokens_total", S + ', stage="in"', "method")), "{{method}}")],
              "The budget in effect, by method.", 12, max=1),
        graph("Images", "ops", [(rate("locket_visual_images_total", S, "result"), "{{result}}")],
              "hit: its visual tokens were there already.", 6),
        graph("Time in the tower", "s",
              [(f"histogram_quantile(0.95, sum by (le) (rate(locket_visual_tower_seconds_bucket{{{S}}}{RATE})))",
                "p95")],
              "To decode an image and run the tower.", 6),
        graph("Images that wait for the tower", "short", [(f"sum(locket_visual_waiting{{{S}}})", "images")],
              "At visual.max-waiting more are refused.", 6),
        graph("Visual tokens in memory", "bytes", [(f"sum(locket_visual_cache_bytes{{{S}}})", "bytes")],
              "Kept for images that come again.", 6),
    ]),
    ("Thoughts, for models that have them", [
        graph("Thought tokens by mode", TOKENS, [(rate("locket_reasoning_tokens_total", S, "mode"), "{{mode}}")],
              "The price of thinking."),
        graph("Choices by mode", "reqps",
              [(rate("locket_reasoning_mode_total", S, "requested, chosen"), "{{requested}}: {{chosen}}")],
              "slow: there was a thought."),
        graph("Budgets used up", "reqps", [(rate("locket_reasoning_budget_exhausted_total", S), "closed")],
              "Often: answers suffer; raise reasoning.budget."),
    ]),
]

BOARDS = {
    "locket-health": ("Locket: health and queue", HEALTH),
    "locket-memory": ("Locket: memory and folding", MEMORY),
    "locket-speed": ("Locket: speed", SPEED),
    "locket-quality": ("Locket: settings and quality", QUALITY),
}


def variable(name, label, query):
    return {
        "type": "query", "name": name, "label": label, "datasource": SOURCE, "definition": query,
        "query": {"query": query, "refId": name}, "refresh": 2, "sort": 1, "multi": True, "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def board(uid, title, rows):
    panels, y = [], 0
    for heading, row in rows:
        panels.append({"type": "row", "title": heading, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        x, y, height = 0, y + 1, 0
        for made in row:
            size = made["gridPos"]
            if x + size["w"] > 24:
                x, y, height = 0, y + height, 0
            size.update({"x": x, "y": y})
            x, height = x + size["w"], max(height, size["h"])
            panels.append(made)
        y += height
    for number, made in enumerate(panels, 1):
        made["id"] = number
    data_source = {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus",
                   "current": {"text": "Prometheus", "value": "prometheus"}, "refresh": 1}
    return {
        "uid": uid, "title": title, "tags": ["locket"], "schemaVersion": 39, "version": 1, "editable": False,
        "graphTooltip": 1, "refresh": "15s", "time": {"from": "now-1h", "to": "now"}, "timezone": "browser",
        "links": [{"type": "dashboards", "title": "locket", "tags": ["locket"], "asDropdown": True,
                   "includeVars": True, "keepTime": True}],
        "templating": {"list": [
            data_source,
            variable("job", "Job", "label_values(locket_ready, job)"),
            variable("instance", "Replica", 'label_values(locket_ready{job=~"$job"}, instance)'),
            variable("model_name", "Model",
                     f"label_values(vllm:num_requests_running{{{S}}}, model_name)"),
        ]},
        "panels": panels,
    }


def main():
    stale = []
    for uid, (title, rows) in BOARDS.items():
        path = FOLDER / f"{uid}.json"
        text = json.dumps(board(uid, title, rows), indent=1, ensure_ascii=False) + "\n"
        if "--check" in sys.argv:
            if not path.exists() or path.read_text() != text:
                stale.append(path.name)
        else:
            path.write_text(text)
    if stale:
        sys.exit(f"run deploy/grafana/make_dashboards.py: {', '.join(stale)} would change")


if __name__ == "__main__":
    main()
