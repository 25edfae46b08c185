"""What must hold behind a gateway. Each check starts its own replicas and says what it saw."""

import asyncio
import json
import sys
from argparse import Namespace
from pathlib import Path

import openai
from gateways import REPOSITORY, Cluster, answers, running
from load import LONGEST, MODEL, Streams

sys.path.insert(0, str(REPOSITORY / "tests/openai_client"))

import conformance  # noqa: E402

SERVE = ["--served-model-name", MODEL, "--memory-budget", "1GiB", "--threads", "1", "--drain-timeout-s", "60"]
# Blocks enough for all streams on one replica.
MANY = ["--cache-slots", "512", "--max-running", "64"]


async def client(gateway: type[Cluster], options: Namespace, logs: Path) -> str:
    """The official client's checks pass; errors keep their status; our own fields have their way."""
    with gateway(options.locket, 2, SERVE, logs=logs) as cluster:
        cluster.start()
        await asyncio.to_thread(through_a_gateway, cluster.url, gateway.name)
        shares = [generated(replica.url) for replica in cluster.replicas]
        assert all(shares), f"a replica got nothing: {shares}"
    return f"the client's checks pass; {shares} tokens by replica"


def through_a_gateway(url: str, gateway: str) -> None:
    api = conformance.client(url)
    conformance.chat(api)
    conformance.chat_stream(api)
    conformance.completions(api, url)
    conformance.chat_tools(api)
    conformance.parsed(api)
    conformance.embeddings(api)
    if gateway == "dynamo":
        dynamo_alone(api, url)
    else:
        conformance.models(api)
        conformance.responses(api)
        conformance.responses_with_a_tool(api)
        conformance.cache(api)
        conformance.refused(
            openai.BadRequestError,
            "decimal_above_max_value",
            "temperature",
            lambda: api.chat.completions.create(model=MODEL, messages=conformance.QUESTION, temperature=3),
        )


def dynamo_alone(api: openai.OpenAI, url: str) -> None:
    """What the frontend makes of itself: models, responses, the form of errors, extensions."""
    [model] = api.models.list().data
    assert model.id == MODEL, model
    ask = dict(model=MODEL, input=conformance.QUESTION[0]["content"], temperature=0, max_output_tokens=30)
    lax = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    assert "Paris" in lax.responses.create(**ask).output_text
    pieces = [event.delta for event in lax.responses.create(stream=True, **ask) if event.type.endswith("text.delta")]
    assert "Paris" in "".join(pieces)
    wish = dict(model=MODEL, messages=conformance.QUESTION, temperature=0, max_tokens=8)
    # Locket's refusal, whole and in a stream.
    for stream in (False, True):
        try:
            api.chat.completions.create(stream=stream, modalities=["text", "audio"], **wish)
        except openai.BadRequestError as error:
            assert "modalities[1]" in str(error) and "unsupported_value" in str(error), error
        else:
            raise AssertionError("a wrong request was accepted")
    # Fields that the frontend does not know travel as an annotation.
    own = {"locket": {"kv_cache": {"method": "window", "slots": 64}}}
    body = {"nvext": {"annotations": ["locket:" + json.dumps(own)]}}
    answer = api.chat.completions.create(extra_body=body, **wish)
    assert answer.model_extra["nvext"]["locket"]["method"] == "window", answer
    # Usage comes with the last chunk of those who ask, and with no other.
    for asked in (False, True):
        options = {"stream_options": {"include_usage": True}} if asked else {}
        chunks = list(api.chat.completions.create(stream=True, **options, **wish))
        assert bool(chunks[-1].choices) is not asked and (chunks[-1].usage is not None) is asked, chunks[-1]


def generated(url: str) -> int:
    """Tokens that a replica has generated."""
    lines = answers(f"{url}/metrics").splitlines()
    return int(
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:generation_tokens_total"))
    )


async def kill(gateway: type[Cluster], options: Namespace, logs: Path) -> str:
    """`kill -9` of a replica: no request hangs, those of the other are complete, later ones too."""
    with gateway(options.locket, 2, SERVE + MANY, logs=logs) as cluster:
        cluster.start()
        streams = Streams(cluster.url)
        streams.start(options.streams, tokens=100)
        await streams.until_all_stream()
        lost, kept = [await asyncio.to_thread(running, replica) for replica in cluster.replicas]
        assert lost and kept, (lost, kept)
        cluster.end(cluster.replicas[0], "kill")
        # As clients do: those refused while nobody has noticed yet try again.
        later = Streams(cluster.url, retries=5)
        later.start(10, tokens=10)
        outcomes = await streams.until_ended()
        failed = [outcome for outcome in outcomes if not outcome.complete]
        assert len(failed) <= lost, f"{len(failed)} failed, {lost} were on the replica: {failed}"
        assert all(outcome.error or outcome.finish is None for outcome in failed), failed
        after = await later.until_ended()
        assert all(outcome.complete for outcome in after), after
    return f"{options.streams} streams, {lost} on the killed replica, {len(failed)} failed, 0 hang; 10 later ones complete"


async def drain(gateway: type[Cluster], options: Namespace, logs: Path) -> str:
    """SIGTERM to a replica under load fails nothing."""
    with gateway(options.locket, 2, SERVE + MANY, logs=logs) as cluster:
        cluster.start()
        streams = Streams(cluster.url)
        streams.start(options.streams, tokens=60)
        await streams.until_all_stream()
        leaving = cluster.replicas[0]
        on_it = await asyncio.to_thread(running, leaving)
        assert on_it, "nothing runs on the replica"
        cluster.end(leaving, "terminate")
        # New ones arrive while it leaves, before and after the gateway has noticed.
        later = Streams(cluster.url, retries=gateway.retries)
        for _ in range(20):
            later.start(1, tokens=10)
            await asyncio.sleep(0.1)
        outcomes = await streams.until_ended() + await later.until_ended()
        failed = [outcome for outcome in outcomes if not outcome.complete]
        assert not failed, f"{len(failed)} failed: {failed}"
        for process in cluster.processes(leaving):
            status = await asyncio.to_thread(process.wait, LONGEST)
            assert status == 0, f"{process.name} ended with {status}"
    return f"{options.streams} streams, {on_it} on the replica that left, and 20 later ones: 0 failed"


async def back(gateway: type[Cluster], options: Namespace, logs: Path) -> str:
    """A locket that dies alone costs nothing that comes after, and is used again when it is back."""
    with gateway(options.locket, 2, SERVE, logs=logs) as cluster:
        cluster.start()
        broken = cluster.replicas[0]
        broken.server.kill()
        await asyncio.to_thread(broken.server.wait, LONGEST)
        meanwhile = Streams(cluster.url, retries=gateway.retries)
        meanwhile.start(10, tokens=10)
        outcomes = await meanwhile.until_ended()
        assert all(outcome.complete for outcome in outcomes), outcomes
        broken.start_again()
        await asyncio.to_thread(broken.wait_until_ready)
        asked = 0
        async with asyncio.timeout(LONGEST):
            while not await asyncio.to_thread(generated, broken.url):
                again = Streams(cluster.url, retries=gateway.retries)
                again.start(4, tokens=4)
                asked += 4
                assert all(outcome.complete for outcome in await again.until_ended())
    return f"10 of 10 complete while one was dead; it answers again among {asked} later ones"


async def cancel(gateway: type[Cluster], options: Namespace, logs: Path) -> str:
    """A client that goes away ends its sequence; a full replica's refusal is a 503; all that with keys."""
    key = "sk-scaling"
    serve = [*SERVE, "--max-running", "1", "--max-waiting", "1", "--api-key", key]
    with gateway(options.locket, 2, serve, environment={"LOCKET_WORKER_KEY": key}, logs=logs) as cluster:
        cluster.start()
        api = openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key=key, max_retries=0)
        endless = dict(model=MODEL, messages=conformance.QUESTION, max_tokens=4000, stream=True)
        endless["extra_body"] = {"ignore_eos": True}
        # Two run, two wait, the others are refused. Those that wait have no answer yet.
        asked = [asyncio.create_task(api.chat.completions.create(**endless)) for _ in range(8)]
        async with asyncio.timeout(LONGEST):
            while sum(task.done() for task in asked) < 6:
                await asyncio.sleep(0.05)
        done = [task for task in asked if task.done()]
        held = [task for task in asked if not task.done()]
        refused = [task.exception() for task in done if task.exception()]
        streams = [task.result() for task in done if not task.exception()]
        assert refused and all(error.status_code == 503 for error in refused), refused
        for stream in streams:
            await stream.close()
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        async with asyncio.timeout(30):
            while any([await asyncio.to_thread(running, replica) for replica in cluster.replicas]):
                await asyncio.sleep(0.05)
        await api.close()
    return f"{len(refused)} of 8 were refused with 503, the others ended with their clients"


CHECKS = {"client": client, "kill": kill, "drain": drain, "back": back, "cancel": cancel}
