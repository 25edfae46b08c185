"""Streams of the official client, many at once, and what became of each."""

import asyncio
from dataclasses import dataclass

import openai

MODEL = "smollm2"
# Nothing may take longer; a request that does is one that hangs.
LONGEST = 150


@dataclass
class Outcome:
    """How a stream ended."""

    tokens: int = 0
    finish: str | None = None
    error: str | None = None
    ended: bool = False

    @property
    def complete(self) -> bool:
        return self.finish == "length" and self.error is None


class Streams:
    """Streamed chats that run until their `tokens` are there."""

    def __init__(self, url: str, retries: int = 0):
        self._api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=retries, timeout=LONGEST)
        self.outcomes: list[Outcome] = []
        self._tasks: list[asyncio.Task] = []
        self._progress = asyncio.Condition()

    def start(self, count: int, tokens: int) -> None:
        for _ in range(count):
            number = len(self.outcomes)
            self.outcomes.append(Outcome())
            self._tasks.append(asyncio.create_task(self._run(number, tokens)))

    async def _run(self, number: int, tokens: int) -> None:
        outcome = self.outcomes[number]
        question = [{"role": "user", "content": f"Count from {number} on."}]
        try:
            stream = await self._api.chat.completions.create(
                model=MODEL,
                messages=question,
                max_tokens=tokens,
                seed=number,
                stream=True,
                extra_body={"ignore_eos": True, "min_tokens": tokens},
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    outcome.tokens += bool(choice.delta.content)
                    outcome.finish = choice.finish_reason or outcome.finish
                async with self._progress:
                    self._progress.notify_all()
        except (openai.OpenAIError, OSError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        except Exception as error:  # the client's transport has its own
            outcome.error = f"{type(error).__module__}.{type(error).__name__}: {error}"
        finally:
            outcome.ended = True
            async with self._progress:
                self._progress.notify_all()

    async def until_all_stream(self) -> None:
        """Every stream has had some of its answer, or has ended."""

        def all_stream() -> bool:
            return all(outcome.tokens > 1 or outcome.ended for outcome in self.outcomes)

        async with asyncio.timeout(LONGEST), self._progress:
            await self._progress.wait_for(all_stream)

    async def until_ended(self) -> list[Outcome]:
        """The outcomes; an AssertionError if a request hangs."""
        _, pending = await asyncio.wait(self._tasks, timeout=LONGEST)
        assert not pending, f"{len(pending)} of {len(self._tasks)} requests hang"
        await self._api.close()
        return self.outcomes
