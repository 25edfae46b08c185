"""What the worker says to its locket over HTTP, and what it makes of the answers.

No Dynamo in here: requests and chunks are dictionaries, failures are the exceptions below.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

# An event of a stream, log-probabilities of a long chunk included.
LONGEST_EVENT = 16 << 20
ANNOTATION = "locket:"

T = TypeVar("T")
Json = dict[str, Any]


@dataclass
class Refused(Exception):
    """An answer that is an error: its HTTP status and OpenAI error."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    @property
    def is_elsewhere_possible(self) -> bool:
        """Whether another replica may take the request: this one is full, drains, or is broken."""
        return self.status == 503

    def to_json(self) -> Json:
        return {"status": self.status, "message": self.message, "code": self.code, "param": self.param}

    @classmethod
    def of_body(cls, status: int, body: bytes | str | Json) -> "Refused":
        """The error in an answer's body, whatever a proxy between may have made of it."""
        try:
            error = (body if isinstance(body, dict) else json.loads(body))["error"]
            return cls(status, str(error["message"]), error.get("code"), error.get("param"))
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls(status, f"locket answered with status {status}")


class Lost(Exception):
    """No connection to locket, or it broke before the answer was complete."""


class Stopped(Exception):
    """The caller wants no more of the answer."""


def to_locket(request: Json) -> Json:
    """The request as locket knows it.

    Dynamo's frontend renames one field, has its own in `nvext`, and refuses names that it does not
    know. An entry `locket:{...}` of `nvext.annotations` therefore carries further fields: those of
    the object are put into the request.
    """
    request = {name: value for name, value in request.items() if value is not None}
    extensions = request.pop("nvext", {})
    if arguments := request.pop("chat_template_args", None):
        request.setdefault("chat_template_kwargs", arguments)
    if salt := extensions.get("cache_salt"):
        request.setdefault("cache_salt", salt)
    for annotation in extensions.get("annotations") or []:
        if annotation.startswith(ANNOTATION):
            try:
                request.update(json.loads(annotation[len(ANNOTATION) :]))
            except (ValueError, TypeError) as error:
                where = "nvext.annotations"
                raise Refused(400, f"`{where}`: not a JSON object: {error}", "invalid_json", where) from error
    return request


def to_stream(request: Json) -> tuple[Json, bool]:
    """The request as a stream with usage, and whether the caller wants to see that usage.

    The frontend makes whole answers and the Responses API's of a stream; without its last chunk they
    would have no usage. A client that streams and did not ask for it does not expect that chunk.
    """
    options = {name: value for name, value in (request.get("stream_options") or {}).items() if value}
    wants_usage = not request.get("stream") or bool(options.get("include_usage"))
    return request | {"stream": True, "stream_options": options | {"include_usage": True}}, wants_usage


def from_locket(chunk: Json) -> Json:
    """The chunk with locket's own part of the usage where the frontend leaves it alone."""
    usage = chunk.get("usage")
    if usage and (own := usage.pop("locket", None)) is not None:
        chunk["nvext"] = {"locket": own}
    return chunk


class Upstream:
    """One locket, over one pool of connections."""

    def __init__(self, url: str, key: str | None):
        self._url = url.rstrip("/")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        # No limit on the whole of an answer: locket ends those that take too long.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 18
        )

    async def close(self) -> None:
        await self._session.close()

    async def is_ready(self) -> bool:
        """Whether it takes new requests."""
        try:
            limit = aiohttp.ClientTimeout(total=5)
            async with self._session.get(f"{self._url}/ready", timeout=limit) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    async def models(self) -> list[Json]:
        """The served names, the first of which is the model's own."""
        try:
            async with self._session.get(f"{self._url}/v1/models") as answer:
                body = await answer.read()
                if answer.status != 200:
                    raise Refused.of_body(answer.status, body)
                return _json(body)["data"]
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(str(error)) from error

    async def whole(self, path: str, request: Json, headers: Json, stop: set[asyncio.Future]) -> Json:
        """An answer that is one JSON object."""
        async with await self._post(path, request, headers, stop) as answer:
            return _json(await _before(stop, answer.read()))

    async def stream(self, path: str, request: Json, headers: Json, stop: set[asyncio.Future]) -> AsyncIterator[Json]:
        """The chunks of a streamed answer. Leaving it early ends the request in locket."""
        async with await self._post(path, request, headers, stop) as answer:
            buffer = b""
            while piece := await _before(stop, answer.content.readany()):
                *events, buffer = (buffer + piece).split(b"\n\n")
                for event in events:
                    data = b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
                    if data == b"[DONE]":
                        return
                    if not data:
                        continue
                    chunk = _json(data)
                    if "error" in chunk:
                        code = (chunk["error"] or {}).get("code")
                        raise Refused.of_body(503 if code == "shutting_down" else 500, chunk)
                    yield chunk
                if len(buffer) > LONGEST_EVENT:
                    raise Lost("an event without end")
        raise Lost("the stream ended before it was complete")

    async def _post(
        self, path: str, request: Json, headers: Json, stop: set[asyncio.Future]
    ) -> aiohttp.ClientResponse:
        """The answer, whose body is not read yet; errors are raised."""
        answer = await _before(stop, self._session.post(self._url + path, json=request, headers=headers))
        if answer.status == 200:
            return answer
        async with answer:
            raise Refused.of_body(answer.status, await _before(stop, answer.read()))


def _json(data: bytes) -> Any:
    """What locket said; that it is not JSON is no fault of the caller's."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise Lost(f"an answer that is not JSON: {error}") from error


async def _before(stop: set[asyncio.Future], wanted: Awaitable[T]) -> T:
    """What was awaited, unless one of the futures is done first."""
    task = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait({task, *stop}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Stopped
        return task.result()
    except (aiohttp.ClientError, OSError) as error:
        raise Lost(str(error) or type(error).__name__) from error
    finally:
        task.cancel()
