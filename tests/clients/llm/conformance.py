"""The `llm` command: a prompt, a stream, a conversation that goes on, a schema, a tool.

Usage: conformance.py URL
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "string", "enum": ["dog", "cat"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


def llm(*arguments):
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout.strip()


with tempfile.TemporaryDirectory() as home:
    os.environ["LLM_USER_PATH"] = home
    models = (HERE / "extra-openai-models.yaml").read_text().replace("LOCKET_URL", sys.argv[1])
    pathlib.Path(home, "extra-openai-models.yaml").write_text(models)
    assert "locket" in llm("models", "list")
    ask = ["-m", "locket", "-o", "temperature", "0", "-o", "max_tokens", "60"]
    whole = llm("prompt", "--no-stream", *ask, "What is the capital of France?")
    assert "Paris" in whole, whole
    assert llm("prompt", *ask, "What is the capital of France?") == whole
    assert llm("prompt", "-c", *ask, "And of Italy?")
    made = llm("prompt", "--schema", json.dumps(SCHEMA), *ask, "The dog Rex is a pet. Describe it.")
    assert json.loads(made)["kind"] in ("dog", "cat"), made
    # Whether a model this small calls a tool is its own affair; the request must be understood.
    llm("prompt", "-T", "llm_version", *ask, "Which version is this?")
print("llm: passed")
