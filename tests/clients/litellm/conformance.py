"""Chat, streams, tools, schemas and embeddings through litellm, as a proxy or an agent would use it.

Usage: conformance.py URL
"""

import json
import sys

import litellm

ROUTE = {"model": "openai/smollm2", "api_base": sys.argv[1] + "/v1", "api_key": "unused", "num_retries": 0}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": CITY}}


def chat():
    answer = litellm.completion(messages=QUESTION, temperature=0, max_tokens=30, **ROUTE)
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = litellm.completion(
        messages=QUESTION, temperature=0, max_tokens=30, stream=True, stream_options={"include_usage": True}, **ROUTE
    )
    whole = litellm.stream_chunk_builder(list(stream), messages=QUESTION)
    assert whole.choices[0].message.content == answer.choices[0].message.content, whole
    assert whole.usage.total_tokens == answer.usage.total_tokens, whole


def text():
    route = ROUTE | {"model": "text-completion-openai/smollm2"}
    answer = litellm.text_completion(prompt="The sky is", max_tokens=6, temperature=0, **route)
    assert answer.choices[0].text, answer


def tools():
    asked = dict(messages=QUESTION, temperature=0, max_tokens=100, tools=[TOOL], **ROUTE)
    asked |= {"tool_choice": "required", "parallel_tool_calls": False}
    answer = litellm.completion(**asked)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"], answer
    whole = litellm.stream_chunk_builder(list(litellm.completion(stream=True, **asked)), messages=QUESTION)
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments, whole
    assert whole.choices[0].finish_reason == "tool_calls", whole


def schema():
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    answer = litellm.completion(messages=QUESTION, temperature=0, max_tokens=60, response_format=wanted, **ROUTE)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome"), answer


def responses():
    answer = litellm.responses(input="What is the capital of France?", temperature=0, max_output_tokens=30, **ROUTE)
    assert answer.status == "completed" and "Paris" in answer.output[-1].content[0].text, answer


def embeddings():
    answer = litellm.embedding(input=["A cat.", "A dog."], **ROUTE)
    assert [item["index"] for item in answer.data] == [0, 1], answer
    assert abs(sum(value * value for value in answer.data[0]["embedding"]) - 1) < 1e-3


def errors():
    try:
        litellm.completion(messages=QUESTION, temperature=3, **ROUTE)
    except litellm.BadRequestError as error:
        assert "temperature" in str(error), error
    else:
        raise AssertionError("a temperature of 3 was accepted")
    try:
        litellm.completion(messages=QUESTION, **(ROUTE | {"model": "openai/nobody"}))
    except litellm.NotFoundError:
        pass
    else:
        raise AssertionError("an unknown model was accepted")
    long = [{"role": "user", "content": "word " * 20000}]
    try:
        litellm.completion(messages=long, **ROUTE)
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("a prompt beyond the context was accepted")


for test in (chat, text, tools, schema, responses, embeddings, errors):
    test()
print("litellm: passed")
