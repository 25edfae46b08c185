"""Keeps generated requests short: the check is of the interface, not of the model."""

import schemathesis


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(name), int) and not isinstance(body[name], bool) and body[name] > 8:
                body[name] = 8
        if isinstance(body.get("n"), int) and not isinstance(body["n"], bool) and 2 < body["n"] <= 16:
            body["n"] = 2
    return body
