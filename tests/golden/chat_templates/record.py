"""Records what transformers renders for the templates in this folder (written for these tests).

    pip install transformers tokenizers jinja2
    python record.py > renderings.json
"""
import json
import pathlib

import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), bos_token="<s>", eos_token="</s>"
)
SYSTEM = {"role": "system", "content": "Be brief.  "}
USER = {"role": "user", "content": "  What is the capital of France? é😀 {{ 1 + 1 }}\n"}
ANSWER = {"role": "assistant", "content": "It is Paris."}
OPEN = {"role": "assistant", "content": "The answer is \n"}
EMPTY = {"role": "assistant", "content": ""}
PARTS = {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für <city>", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.5}}}]}
RESULT = {"role": "tool", "content": "12 °C"}

CONVERSATIONS = [
    {"messages": [USER], "add_generation_prompt": True},
    {"messages": [SYSTEM, USER], "add_generation_prompt": True},
    {"messages": [SYSTEM, USER, ANSWER, USER], "add_generation_prompt": False},
    {"messages": [USER, ANSWER], "continue_final_message": True},
    {"messages": [SYSTEM, USER, OPEN], "continue_final_message": True},
    {"messages": [USER, EMPTY], "continue_final_message": True},
    {"messages": [USER, USER], "add_generation_prompt": True},
    {"messages": [USER, {"role": "narrator", "content": "x"}], "add_generation_prompt": True},
]
HEADERS_ONLY = [
    {"messages": [USER, CALL, RESULT], "tools": [TOOL], "add_generation_prompt": True},
    {"messages": [PARTS], "add_generation_prompt": True},
    {"messages": [USER], "add_generation_prompt": True, "kwargs": {"enable_thinking": False}},
]

cases = []
for name in ["chatml", "headers", "inst"]:
    template = (HERE / f"{name}.jinja").read_text()
    for chat in CONVERSATIONS + (HEADERS_ONLY if name == "headers" else []):
        case = {"template": name, "chat": chat}
        arguments = {key: value for key, value in chat.items() if key not in ("messages", "kwargs")}
        arguments |= chat.get("kwargs", {})
        try:
            case["prompt"] = tokenizer.apply_chat_template(
                json.loads(json.dumps(chat["messages"])), chat_template=template, tokenize=False, **arguments
            )
        except jinja2.TemplateError as error:
            case["error"] = str(error)
        cases.append(case)
print("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]")
