"""A judge model behind any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, field_validator

from backend.judges import JUDGE_MODELS
from backend.judges.base import (
    Ask,
    JudgeModel,
    NoReply,
    Opening,
    Reply,
    Request,
    Variant,
)

if TYPE_CHECKING:
    import httpx

# Only names made for this: a spec must not be able to send any other secret of the machine away.
KEY_NAME = re.compile(r"([A-Z][A-Z0-9_]*_)?API_KEY")
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # worth another attempt
NO_MONEY = "insufficient_quota"  # comes as a 429 that no waiting mends
MAX_BODY_BYTES = 4 << 20
MAX_REASON = 300  # characters of what a server says about an error
HIDDEN = "[API key]"

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


@JUDGE_MODELS.register
class Endpoint(JudgeModel):
    """A model behind an OpenAI-compatible chat-completions endpoint, local or paid."""

    kind: ClassVar[str] = "endpoint"
    remote: ClassVar[bool] = True

    model: str = Field("", max_length=200, description="Name the endpoint knows it by.")
    base_url: str = Field(
        "https://api.openai.com/v1", description="Address up to, without, /chat/completions."
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the key, never the key; empty: none is sent.",
    )
    temperature: float | None = Field(
        0.0, ge=0, le=2, description="Of the judge; null for models that take none."
    )
    length_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What the endpoint calls the longest reply."
    )

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        return plain_address(url)

    @field_validator("key_variable")
    @classmethod
    def _made_for_keys(cls, name: str) -> str:
        if name and not KEY_NAME.fullmatch(name):
            # The value is not repeated: somebody may have put the key itself here.
            raise ValueError(
                "key_variable names the environment variable that holds the key, such as "
                "OPENAI_API_KEY; its name must end in API_KEY"
            )
        return name

    def key(self) -> str:
        """The key from the environment; "" where none is needed."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if self.key_variable and not key and not loopback(self.base_url):
            raise ValueError(
                f"{self.base_url} needs a key, and the environment variable {self.key_variable} is "
                "not set where this program runs; set it, or use key_variable='' for none"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{self.key_variable} holds characters that no key has")
        return key

    def check(self) -> None:
        """ValueError if the model has no name, or the key is missing."""
        if not self.model:
            raise ValueError("endpoint: model is empty; give the name of the model that judges")
        self.key()

    def open(self, opening: Opening) -> AbstractAsyncContextManager[Ask]:
        """One client for all requests."""
        return connected(self, opening)

    def related(self, variant: Variant, home: Path) -> str:
        """True kinship is not told by an endpoint; one name is."""
        if bare(self.model) != bare(variant.model):
            return ""
        return f"the judge {self.model} is the judged model {variant.model}"

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON of one request."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message.data() for message in request.messages],
            self.length_field: request.max_tokens,
            "stream": False,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if request.letters:
            body |= {"logprobs": True, "top_logprobs": 5}
        return body


class Usage(BaseModel):
    """What the endpoint counted."""

    prompt_tokens: int | None = Field(None, ge=0)
    completion_tokens: int | None = Field(None, ge=0)


class Said(BaseModel):
    """The message of a choice."""

    content: str | None = None
    refusal: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts_are_joined(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


class Choice(BaseModel):
    """One of the answers in a completion; one is asked for."""

    message: Said
    finish_reason: str | None = None
    logprobs: Any = None

    def first_token(self) -> dict[str, float]:
        """{token: log-probability} of the likeliest first tokens; {} where they are not told."""
        try:
            likely = self.logprobs["content"][0]["top_logprobs"]
            return {str(entry["token"]): float(entry["logprob"]) for entry in likely}
        except (KeyError, IndexError, TypeError, ValueError):
            return {}


class Completion(BaseModel):
    """What is read of a chat completion; servers add much more."""

    choices: list[Choice] = Field(min_length=1)
    model: str | None = None
    usage: Usage | None = None


class Trouble(Exception):
    """One attempt that brought no reply."""

    def __init__(self, reason: str, passing: bool, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing  # another attempt may succeed
        self.after_s = after_s  # the server said to wait so long


class Pace:
    """Lets requests start evenly, and none while the server wants quiet."""

    def __init__(self, per_minute: int, clock: Clock, sleep: Sleep) -> None:
        self.gap_s = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._free = self._quiet_until = clock()

    async def turn(self) -> None:
        """Wait for this request's turn."""
        start = max(self._clock(), self._free)
        self._free = start + self.gap_s
        while (wait := max(start, self._quiet_until) - self._clock()) > 0:
            await self._sleep(wait)

    def quiet(self, seconds: float) -> None:
        """Nobody starts within the next `seconds`."""
        self._quiet_until = max(self._quiet_until, self._clock() + seconds)


class Line:
    """An open endpoint: asks, waits, tries again, and never lets the key out."""

    def __init__(
        self,
        model: Endpoint,
        client: httpx.AsyncClient,
        opening: Opening,
        *,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.model, self.client, self.opening = model, client, opening
        self.patience = opening.patience
        self.pace = Pace(self.patience.per_minute, clock, sleep)
        self._key = model.key()
        self._clock, self._sleep, self._chance = clock, sleep, chance

    async def __call__(self, request: Request, /) -> Reply:
        """A reply, after as many attempts as patience allows. Raises NoReply."""
        body = self.model.body(request)
        for attempt in range(1, self.patience.retries + 2):
            await self.pace.turn()
            self.opening.spend()
            began = self._clock()
            try:
                answer = await self.once(body)
                return self.reply(answer, attempt, self._clock() - began)
            except Trouble as trouble:
                await self.recover(trouble, attempt, self._clock() - began)
        raise AssertionError("the last attempt replies or gives up")

    async def recover(self, trouble: Trouble, attempt: int, took_s: float) -> None:
        """Wait for the next attempt, or raise NoReply where there is to be none."""
        reason = one_line(self.scrub(trouble.reason))
        if trouble.after_s is not None and trouble.after_s > self.patience.longest_wait_s:
            reason += f"; it asks to wait {trouble.after_s:g} s"
        elif trouble.passing and attempt <= self.patience.retries:
            if trouble.after_s is not None:
                self.pace.quiet(trouble.after_s)  # its limit holds for every request
            else:
                await self._sleep(self.backoff_s(attempt))
            return
        tried = f" ({attempt} attempts)" if attempt > 1 else ""
        raise NoReply(reason + tried, attempt, took_s) from None

    def backoff_s(self, attempt: int) -> float:
        """Doubles with every attempt; a random half of it keeps parallel requests apart."""
        whole = min(self.patience.backoff_s * 2 ** (attempt - 1), self.patience.longest_wait_s)
        return whole * (0.5 + 0.5 * self._chance())

    async def once(self, body: Mapping[str, Any]) -> Completion:
        """One attempt. Raises Trouble."""
        import httpx

        limit = self.patience.timeout_s
        try:
            async with asyncio.timeout(limit):  # httpx's own limits start anew with every byte
                return await self.exchange(body)
        except TimeoutError:
            raise Trouble(f"no reply within {limit:g} s", True) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = str(error) or type(error).__name__
            raise Trouble(f"{self.model.base_url} cannot be reached: {what}", True) from None

    async def exchange(self, body: Mapping[str, Any]) -> Completion:
        """POST -> the completion."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        url = f"{self.model.base_url}/chat/completions"
        async with self.client.stream("POST", url, json=dict(body), headers=headers) as answer:
            content = await bounded(answer.aiter_bytes())
            if answer.status_code != 200:
                raise refusal(answer.status_code, content, answer.headers.get("retry-after", ""))
            return completion(content)

    def reply(self, answer: Completion, attempt: int, took_s: float) -> Reply:
        """What the verdict is read from, without the key should the server repeat it."""
        choice, usage = answer.choices[0], answer.usage or Usage()
        text, chances = self.scrub(choice.message.content or ""), choice.first_token()
        if not text.strip() and not chances:
            why = choice.message.refusal or f"finish_reason {choice.finish_reason or 'unknown'}"
            reason = f"the judge said nothing ({one_line(self.scrub(why))})"
            raise NoReply(reason, attempt, took_s)
        return Reply(
            text=text,
            model=self.scrub(answer.model or self.model.model)[:200],
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            latency_s=took_s,
            attempts=attempt,
            finish=choice.finish_reason or "",
            chances={self.scrub(token): value for token, value in chances.items()},
        )

    def scrub(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, HIDDEN) if self._key else text


@asynccontextmanager
async def connected(model: Endpoint, opening: Opening) -> AsyncIterator[Ask]:
    """The endpoint, with one pool of connections for all requests."""
    import httpx

    near = loopback(model.base_url)
    if model.key() and model.base_url.startswith("http:") and not near:
        opening.note(f"the API key travels unencrypted to {model.base_url}")
    # Redirects are not followed, so the key goes nowhere else; proxies are for other machines.
    async with httpx.AsyncClient(timeout=None, trust_env=not near) as client:
        yield Line(model, client, opening)


async def bounded(chunks: AsyncIterator[bytes]) -> bytes:
    """A body that must not fill the memory."""
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Trouble(f"the reply is over {MAX_BODY_BYTES >> 20} MiB long", False)
    return bytes(body)


def completion(content: bytes) -> Completion:
    """The body of a good answer. Raises Trouble where it is none."""
    try:
        return Completion.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = told(content) if b'"error"' in content else f"{place} {first['msg']}".strip()
        raise Trouble(f"the reply is no chat completion: {what}", True) from None


def refusal(status: int, content: bytes, retry_after: str) -> Trouble:
    """What an answer other than 200 means."""
    passing = status in PASSING and NO_MONEY.encode() not in content
    after_s = seconds_of(retry_after) if passing else None
    return Trouble(f"the endpoint answered {status}: {told(content)}", passing, after_s)


def told(content: bytes) -> str:
    """The message in an error's body, else all of it; it may still hold the key."""
    text = content.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = str(error["message"]) if isinstance(error, Mapping) else str(error)
    except (ValueError, KeyError, TypeError):
        pass  # a proxy's page, or another server's own form
    return text.strip() or "nothing more"


def one_line(text: str) -> str:
    """On one line and bounded."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + "…"


def seconds_of(retry_after: str) -> float | None:
    """The header Retry-After, seconds or a date -> seconds from now; None where it says nothing."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def plain_address(url: str) -> str:
    """The base URL in one form. ValueError unless it is http or https without any secret in it."""
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018  ValueError if it is no number
    except ValueError:
        raise ValueError("base_url is no address; give something like https://host/v1") from None
    # The address is not repeated below: it may hold what must not be shown.
    if not url.strip().isprintable() or " " in url.strip():
        raise ValueError("base_url holds blanks or control characters")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("base_url must begin with http:// or https:// and a host")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            "base_url holds a user, a password, a query or a fragment; give the address alone, and "
            "the key in an environment variable that key_variable names"
        )
    return url.strip().rstrip("/").removesuffix("/chat/completions").rstrip("/")


def loopback(url: str) -> bool:
    """True if the address means this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def bare(name: str) -> str:
    """A model's name without owner, folder, revision and case."""
    return name.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
