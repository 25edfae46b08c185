"""Every route built so far through the official client with strict response validation.

Usage: conformance.py URL BUSY_URL KEYED_URL
  URL        a server with the default model under the name `smollm2`
  BUSY_URL   one with --max-running 1 --max-waiting 1, to be overloaded
  KEYED_URL  one with the key `sk-conformance`, which may ask once in a minute
"""

import json
import sys
import threading

import openai
import pydantic
from openai import OpenAI

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def client(url, api_key="unused", **options):
    return OpenAI(base_url=url + "/v1", api_key=api_key, max_retries=0, _strict_response_validation=True, **options)


def models(api):
    listed = api.models.list()
    assert [model.id for model in listed.data] == [MODEL], listed
    assert api.models.retrieve(MODEL).owned_by == "locket"


def chat(api):
    answer = api.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30)
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.choices[0].finish_reason == "stop"
    several = api.chat.completions.create(model=MODEL, messages=QUESTION, n=3, seed=1, max_tokens=8)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    scored = api.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=4
    )
    entries = scored.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == scored.choices[0].message.content
    assert all(len(entry.top_logprobs) == 4 for entry in entries)
    every = api.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": [{"type": "text", "text": "Say hello."}]},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Again."},
        ],
        max_completion_tokens=6,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        logit_bias={"5": -100},
        stop=["\n\n"],
        seed=1,
        user="someone",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.05, "min_tokens": 1},
    )
    assert every.choices[0].message.role == "assistant"


def chat_stream(api):
    plain = api.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30)
    chunks = list(
        api.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage or chunks[-1].usage.total_tokens == plain.usage.total_tokens
    assert not chunks[-1].choices
    with api.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == text


def cache(api):
    """Our extension: what a request says about its cache, and what every answer says of it."""
    card = api.models.retrieve(MODEL).model_extra["locket"]["kv_cache"]
    assert card["method"] in card["methods"] and card["min_slots"] <= card["max_slots"], card
    own = {"locket": {"kv_cache": {"method": "window", "slots": 64}}}
    answer = api.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, extra_body=own)
    exact = {"exact": True, "folded_tokens": 0, "method": "window", "slots": 64}
    assert answer.usage.model_extra["locket"] == exact, answer
    long = "word " * 300
    folded = api.completions.create(model=MODEL, prompt=long, temperature=0, max_tokens=4, extra_body=own)
    said = folded.usage.model_extra["locket"]
    assert not said["exact"] and said["folded_tokens"] > 0, folded
    own["locket"]["require_exact"] = True
    refused(
        openai.BadRequestError,
        "exact_length_exceeded",
        "prompt",
        lambda: api.completions.create(model=MODEL, prompt=long, extra_body=own),
    )
    own["locket"]["kv_cache"]["slots"] = 10**9
    refused(
        openai.BadRequestError,
        "integer_above_max_value",
        "locket.kv_cache.slots",
        lambda: api.completions.create(model=MODEL, prompt=long, extra_body=own),
    )


def returned_turns(api):
    """An answer that comes back is the tokens that were sampled; they are not run again."""
    messages = list(QUESTION)
    known = []
    for turn in range(4):
        answer = api.chat.completions.create(
            model=MODEL,
            messages=messages,
            temperature=1,
            seed=turn,
            max_tokens=40,
            extra_body={"return_token_ids": True, "cache_salt": "conformance"},
        )
        prompt = answer.model_extra["prompt_token_ids"]
        assert prompt[: len(known)] == known, turn
        cached = answer.usage.prompt_tokens_details.cached_tokens
        # The last token may have been sampled and never run.
        assert cached >= len(known) - 1, (cached, len(known))
        known = prompt + answer.choices[0].model_extra["token_ids"]
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        messages.append({"role": "user", "content": "Tell me more."})


def completions(api, url):
    plain = api.completions.create(model=MODEL, prompt="The sky is", max_tokens=6, temperature=0)
    assert plain.choices[0].text
    scored = api.completions.create(model=MODEL, prompt="The sky is", max_tokens=6, temperature=0, logprobs=3)
    assert len(scored.choices[0].logprobs.tokens) == 6
    # The client's type of a streamed completion has no null finish reason, the wire format has.
    relaxed = OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0)
    pieces = relaxed.completions.create(model=MODEL, prompt="The sky is", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == plain.choices[0].text


TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def same_response(one, other):
    """Two answers to the same request, apart from ids and times."""

    def anonymous(response):
        plain = response.to_dict()
        for item in [plain, *plain["output"]]:
            for key in ["id", "call_id", "created_at", "completed_at"]:
                item.pop(key, None)
        plain["usage"].pop("input_tokens_details")
        return plain

    assert anonymous(one) == anonymous(other), (one, other)


def finished(events):
    """The response of the last event; the order of the others is checked."""
    events = list(events)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    response = events[-1].response
    assert events[-1].type == f"response.{response.status}"
    assert added == done == [item.id for item in response.output]
    return response


def responses(api):
    ask = dict(model=MODEL, input=QUESTION[0]["content"], temperature=0, max_output_tokens=30)
    plain = api.responses.create(**ask)
    assert plain.status == "completed" and "Paris" in plain.output_text, plain
    chat = api.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30)
    assert plain.output_text == chat.choices[0].message.content
    assert plain.usage.total_tokens == chat.usage.total_tokens
    same_response(finished(api.responses.create(stream=True, **ask)), plain)
    with api.responses.stream(**ask) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == plain.output_text
    cut = api.responses.create(**ask | {"max_output_tokens": 2})
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens", cut
    scored = api.responses.create(include=["message.output_text.logprobs"], top_logprobs=3, **ask)
    entries = scored.output[0].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == plain.output_text
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    items = [*QUESTION, *(item.to_dict() for item in plain.output), {"role": "user", "content": "Are you sure?"}]
    again = api.responses.create(
        model=MODEL,
        input=items,
        instructions="You are terse.",
        max_output_tokens=8,
        truncation="auto",
        metadata={"a": "b"},
        store=False,
    )
    assert again.output and again.metadata == {"a": "b"}
    refused(openai.NotFoundError, "not_found", None, lambda: api.responses.retrieve(plain.id))
    refused(
        openai.BadRequestError,
        "unsupported_parameter",
        "previous_response_id",
        lambda: api.responses.create(previous_response_id=plain.id, **ask),
    )


def responses_with_a_tool(api):
    ask = dict(model=MODEL, input="Weather in Paris?", temperature=0, tools=[TOOL], tool_choice="required")
    ask |= dict(max_output_tokens=80, parallel_tool_calls=False)
    plain = api.responses.create(**ask)
    [call] = plain.output
    assert call.type == "function_call" and call.name == "get_weather", plain
    assert isinstance(json.loads(call.arguments)["city"], str)
    same_response(finished(api.responses.create(stream=True, **ask)), plain)
    with api.responses.stream(**ask) as stream:
        pieces = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        assert "".join(event.delta for event in pieces) == call.arguments
        assert stream.get_final_response().output[0].arguments == call.arguments
    items = [
        {"role": "user", "content": ask["input"]},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 21 degrees."},
    ]
    last = api.responses.create(model=MODEL, input=items, tools=[TOOL], tool_choice="none", max_output_tokens=20)
    assert last.output[0].type == "message", last
    schema = {"type": "json_schema", "name": "city", "schema": TOOL["parameters"], "strict": True}
    shaped = api.responses.create(
        model=MODEL, input="Name a city.", text={"format": schema}, temperature=0, max_output_tokens=60
    )
    assert isinstance(json.loads(shaped.output_text)["city"], str), shaped


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def chat_tools(api):
    wish = dict(model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="required", temperature=0)
    wish |= dict(parallel_tool_calls=False, max_tokens=100)
    answer = api.chat.completions.create(**wish).choices[0]
    assert answer.finish_reason == "tool_calls", answer
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather" and list(json.loads(call.function.arguments)) == ["city"]
    with api.chat.completions.stream(**wish) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    history = [*QUESTION, answer.message, result]
    api.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], max_tokens=5)


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    likes_tea: bool
    age: int = pydantic.Field(ge=0, le=120)


def parsed(api):
    answer = api.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Person, temperature=0, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, Person), answer


def embeddings(api):
    texts = ["A cat sat.", "A dog ran."]
    answer = api.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [one.index for one in answer.data] == [0, 1] and answer.usage.prompt_tokens > 0
    assert abs(sum(x * x for x in answer.data[0].embedding) - 1) < 1e-3
    # The client asks for base64 by default and decodes it; its type for what is on the wire is narrower.
    decoded = OpenAI(base_url=api.base_url, api_key="unused").embeddings.create(model=MODEL, input=texts)
    for one, other in zip(answer.data, decoded.data):
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding)) < 1e-6


def keys(url):
    def ask(key):
        return client(url, api_key=key).models.list()

    error = refused(openai.AuthenticationError, "invalid_api_key", None, lambda: ask("sk-other"))
    assert error.response.headers["www-authenticate"] == "Bearer"
    assert ask("sk-conformance").data
    keyed = client(url, api_key="sk-conformance")
    once = dict(model=MODEL, messages=QUESTION, max_tokens=1)
    keyed.chat.completions.create(**once)
    error = refused(
        openai.RateLimitError, "rate_limit_exceeded", None, lambda: keyed.chat.completions.create(**once)
    )
    assert error.type == "rate_limit_error" and 1 <= int(error.response.headers["retry-after"]) <= 120
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0"


def refused(kind, code, param, call):
    try:
        call()
    except kind as error:
        assert error.code == code, error
        assert error.param == param, error
        assert error.request_id, error
        return error
    raise AssertionError(f"{code} was not raised")


def errors(api, busy):
    ask = api.chat.completions.create
    error = refused(
        openai.BadRequestError,
        "decimal_above_max_value",
        "temperature",
        lambda: ask(model=MODEL, messages=QUESTION, temperature=3),
    )
    assert error.type == "invalid_request_error"
    refused(openai.NotFoundError, "model_not_found", "model", lambda: ask(model="nobody", messages=QUESTION))
    refused(
        openai.BadRequestError,
        "unsupported_value",
        "modalities[1]",
        lambda: ask(model=MODEL, messages=QUESTION, modalities=["text", "audio"]),
    )
    # One runs, one waits, the third is refused.
    endless = dict(model=MODEL, messages=QUESTION, max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    running = busy.chat.completions.create(**endless)
    next(iter(running))
    held, opened = [], threading.Event()

    def wait():
        try:
            held.append(busy.chat.completions.create(**endless))
            opened.set()
        except openai.APIStatusError:
            pass

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    # Of three more, one fits into the queue: the others end with 503, so two threads finish.
    while sum(thread.is_alive() for thread in threads) > 1:
        for thread in threads:
            thread.join(0.01)
    error = refused(
        openai.InternalServerError, "server_overloaded", None, lambda: busy.chat.completions.create(**endless)
    )
    assert error.status_code == 503 and int(error.response.headers["retry-after"]) >= 1
    running.close()
    opened.wait()
    held[0].close()


def main():
    url, busy_url, keyed_url = sys.argv[1:4]
    api = client(url)
    models(api)
    chat(api)
    chat_stream(api)
    completions(api, url)
    responses(api)
    responses_with_a_tool(api)
    chat_tools(api)
    parsed(api)
    embeddings(api)
    keys(keyed_url)
    cache(api)
    returned_turns(api)
    errors(api, client(busy_url))
    print("conformance: all routes passed")


if __name__ == "__main__":
    main()
