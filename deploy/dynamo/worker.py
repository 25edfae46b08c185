"""Registers a locket server with NVIDIA Dynamo: one worker process beside each server.

    python worker.py --url http://127.0.0.1:8080

Dynamo's frontend hands over whole OpenAI requests (its text mode): locket keeps its templates, tools,
reasoning, grammars and cache. See docs/scaling.md.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dynamo.llm import HttpError, ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
from dynamo.llm.exceptions import Disconnected, EngineShutdown, InvalidArgument, WorkerUnavailable
from dynamo.runtime import Context, DistributedRuntime
from dynamo.runtime.logging import configure_dynamo_logging

from upstream import Json, Lost, Refused, Stopped, Upstream, from_locket, to_locket, to_stream

logger = logging.getLogger("locket_worker")

# Dynamo's text mode has one kind of request per endpoint.
ROUTES = {
    "chat": (ModelType.Chat, "/v1/chat/completions"),
    "completions": (ModelType.Completions, "/v1/completions"),
    "embeddings": (ModelType.Embedding, "/v1/embeddings"),
}
# Private fields between workers: who had the request already, and an error as an item of the answer,
# which keeps its status where an exception would not.
TRIED = "locket_tried"
ERROR = "locket_error"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    env = os.environ.get
    parser.add_argument("--url", default=env("LOCKET_URL", "http://127.0.0.1:8080"), help="the locket server")
    parser.add_argument("--namespace", default=env("DYN_NAMESPACE", "dynamo"), help="Dynamo namespace")
    parser.add_argument("--component", default=env("DYN_COMPONENT", "locket"), help="Dynamo component")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        default=env("LOCKET_WORKER_KEY_FILE"),
        help="file with the key that locket asks of this worker; or LOCKET_WORKER_KEY in the environment",
    )
    parser.add_argument("--start-timeout-s", type=float, default=600, help="longest wait for locket to be ready")
    parser.add_argument("--health-interval-s", type=float, default=0.5, help="between two looks at /ready")
    parser.add_argument(
        "--grace-s",
        type=float,
        default=2,
        help="after SIGTERM, how long requests of frontends that have not noticed yet are still taken",
    )
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30,
        help="after that, how long answers may still take before they are handed back as EngineShutdown",
    )
    return parser.parse_args()


class Worker:
    """Requests of Dynamo's frontends on one side, one locket on the other."""

    def __init__(self, runtime: DistributedRuntime, upstream: Upstream, options: argparse.Namespace):
        self._runtime = runtime
        self._upstream = upstream
        self._options = options
        prefix = f"{options.namespace}.{options.component}"
        self._endpoints = {name: runtime.endpoint(f"{prefix}.{name}") for name in ROUTES}
        self._peers: dict[str, Any] = {}
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        loop = asyncio.get_running_loop()
        # SIGTERM has come; and: time is up for what still runs.
        self._leaving = asyncio.Event()
        self._cut: asyncio.Future = loop.create_future()
        self._is_listed = True
        self._look_again = asyncio.Event()

    async def run(self) -> None:
        """Registers, serves until SIGTERM or SIGINT, drains."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leaving.set)
        if not await self._wait_for_locket():
            return
        try:
            models = await self._upstream.models()
        except (Lost, Refused) as error:
            raise SystemExit(f"{self._options.url} does not say what it serves: {error}") from error
        await self._register(models)
        serving = [
            asyncio.ensure_future(endpoint.serve_endpoint(self._handler(name), graceful_shutdown=True))
            for name, endpoint in self._endpoints.items()
        ]
        for name, endpoint in self._endpoints.items():
            self._peers[name] = await endpoint.client()
        self._runtime.set_health_status(True)
        watching = asyncio.ensure_future(self._watch())
        logger.info("registered %s", self._options.url)
        leaving = asyncio.ensure_future(self._leaving.wait())
        await asyncio.wait({leaving, *serving}, return_when=asyncio.FIRST_COMPLETED)
        watching.cancel()
        await self._drain()
        self._runtime.shutdown()
        for result in await asyncio.gather(*serving, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("an endpoint ended: %s", result)

    async def _wait_for_locket(self) -> bool:
        """False: asked to leave before locket was there."""
        deadline = asyncio.get_running_loop().time() + self._options.start_timeout_s
        while not await self._upstream.is_ready():
            if asyncio.get_running_loop().time() > deadline:
                raise SystemExit(f"{self._options.url} is not ready after {self._options.start_timeout_s:g} s")
            if await self._left_within(self._options.health_interval_s):
                return False
        return True

    async def _left_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._leaving.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    async def _register(self, models: list[Json]) -> None:
        name, aliases = models[0]["id"], [model["id"] for model in models[1:]]
        runtime_config = ModelRuntimeConfig()
        runtime_config.context_length = models[0].get("max_model_len")
        for route, (model_type, _) in ROUTES.items():
            await register_model(
                ModelInput.Text,
                model_type,
                self._endpoints[route],
                name,
                model_name=name,
                model_aliases=aliases or None,
                worker_type=WorkerType.Aggregated,
                runtime_config=runtime_config,
                # Templates and tokenizer are locket's business.
                skip_model_assets=True,
            )

    async def _watch(self) -> None:
        """Keeps the worker listed exactly while its locket takes requests."""
        while True:
            await self._list(await self._upstream.is_ready())
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._look_again.wait(), self._options.health_interval_s)
            self._look_again.clear()

    async def _list(self, is_listed: bool) -> None:
        if is_listed == self._is_listed:
            return
        logger.warning("this worker is listed again" if is_listed else "this worker is listed no more")
        for endpoint in self._endpoints.values():
            change = endpoint.register_endpoint_instance if is_listed else endpoint.unregister_endpoint_instance
            try:
                await change()
            except Exception as error:  # whatever discovery raises; the next look tries again
                logger.error("discovery: %s", error)
                return
        self._runtime.set_health_status(is_listed)
        self._is_listed = is_listed

    async def _drain(self) -> None:
        logger.info("draining: %d requests run", self._running)
        await self._list(False)
        await asyncio.sleep(self._options.grace_s)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self._options.drain_timeout_s)
        if self._running:
            logger.warning("%d requests are handed back", self._running)
        self._cut.set_result(None)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), 5)

    def _handler(self, route: str):
        async def handle(request: Json, context: Context) -> AsyncIterator[Json]:
            self._running += 1
            self._idle.clear()
            is_from_peer = TRIED in request
            try:
                async for item in self._answer(route, request, context):
                    yield item
            except Refused as refusal:
                if is_from_peer:
                    yield {ERROR: refusal.to_json()}
                else:
                    raise _to_dynamo(refusal) from refusal
            finally:
                self._running -= 1
                if not self._running:
                    self._idle.set()

        return handle

    async def _answer(self, route: str, request: Json, context: Context) -> AsyncIterator[Json]:
        """The items of an answer, from this worker's locket or, before the first, from another's."""
        tried = request.pop(TRIED, [])
        if self._cut.done():
            raise EngineShutdown("this worker has drained")
        has_begun = False
        try:
            async for item in self._local(route, request, context):
                has_begun = True
                yield item
            return
        except Stopped:
            if self._cut.done() and not context.is_stopped():
                raise EngineShutdown("this worker has drained") from None
            return
        except Lost as loss:
            self._look_again.set()
            if has_begun:
                raise Disconnected(f"locket was lost: {loss}") from loss
            failure = Refused(503, "No replica can take the request.", "server_overloaded")
        except Refused as refusal:
            if has_begun or not refusal.is_elsewhere_possible:
                raise
            failure = refusal
        tried = [*tried, self._endpoints[route].connection_id()]
        async for item in self._elsewhere(route, request | {TRIED: tried}, context, failure):
            yield item

    async def _local(self, route: str, request: Json, context: Context) -> AsyncIterator[Json]:
        path = ROUTES[route][1]
        # The request's name in the frontend's log, unless its caller gave one; and the trace.
        headers = {"x-request-id": context.id()} | (context.trace_headers() or {})
        stopped = context.async_killed_or_stopped()
        stop = {asyncio.ensure_future(stopped), self._cut}
        try:
            if route == "embeddings":
                yield await self._upstream.whole(path, to_locket(request), headers, stop)
                return
            body, wants_usage = to_stream(to_locket(request))
            async for chunk in self._upstream.stream(path, body, headers, stop):
                if wants_usage or chunk.get("choices"):
                    yield from_locket(chunk)
        finally:
            for future in stop - {self._cut}:
                future.cancel()

    async def _elsewhere(self, route: str, request: Json, context: Context, failure: Refused) -> AsyncIterator[Json]:
        """The answer of another worker that has not had the request; without one, the failure."""
        client = self._peers[route]
        others = [instance for instance in client.instance_ids() if instance not in request[TRIED]]
        if not others:
            raise failure
        other = random.choice(others)
        has_begun = False
        try:
            items = await client.direct(request, other, annotated=False, context=context)
            async for item in items:
                if error := item.get(ERROR):
                    raise Refused(**error)
                has_begun = True
                yield item
        except Refused:
            raise
        except Exception as error:  # whatever Dynamo's transport raises
            if context.is_stopped():
                return
            if has_begun:
                raise
            logger.warning("instance %x did not answer: %s", other, error)
            again = request | {TRIED: [*request[TRIED], other]}
            async for item in self._elsewhere(route, again, context, failure):
                yield item


def _to_dynamo(refusal: Refused) -> Exception:
    """What makes Dynamo's frontend answer with the status, and with the message where it passes one on."""
    status, message = refusal.status, refusal.message
    named = [("code", refusal.code), ("param", refusal.param)]
    details = ", ".join(f"{name} {value}" for name, value in named if value)
    text = f"{message} ({details})" if details else message
    if status in (400, 422):
        return InvalidArgument(text)
    if status in (401, 403):
        # Not the caller's key but the worker's.
        logger.error("locket refuses this worker's key: %s", text)
        return HttpError(500, text)
    if status == 503:
        return WorkerUnavailable(text)
    return HttpError(status, text)


async def main() -> None:
    options = arguments()
    key = os.environ.get("LOCKET_WORKER_KEY")
    if options.api_key_file:
        key = Path(options.api_key_file).read_text().strip()
    env = os.environ.get
    runtime = DistributedRuntime(
        asyncio.get_running_loop(),
        env("DYN_DISCOVERY_BACKEND", "etcd"),
        env("DYN_REQUEST_PLANE", "tcp"),
        event_plane=env("DYN_EVENT_PLANE"),
    )
    upstream = Upstream(options.url, key)
    try:
        await Worker(runtime, upstream, options).run()
    finally:
        await upstream.close()


if __name__ == "__main__":
    configure_dynamo_logging()
    sys.exit(asyncio.run(main()))
