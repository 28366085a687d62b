"""A server as its clients see it: bodies in three dialects, replies, its own texts, and what it says in `/metrics`.

What is sent when, and what that shows, is `loadtest`'s.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import orjson
from prometheus_client.parser import text_string_to_metric_families

from jaxsearch.data.records import Document
from jaxsearch.data.verticals import document_text
from jaxsearch.errors import InputError
from jaxsearch.scoring.load import Reply, TextRequest

TIMEOUT_SECONDS = 60.0
"""After this long without an answer a request counts as failed."""
MAX_TEXTS = 1000
"""Documents that the server is asked for: the most that one search may return."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Path and body of a scoring request."""

    path: str
    body: Callable[[TextRequest], dict[str, Any]]


DIALECTS = {
    "rerank": Dialect("/v1/rerank", lambda asked: {"query": asked.query, "documents": asked.items}),
    "score": Dialect("/v1/score", lambda asked: {"query": asked.query, "items": asked.items}),
    "tei": Dialect("/rerank", lambda asked: {"query": asked.query, "texts": asked.items}),
    "search": Dialect(
        "/v1/search",
        lambda asked: {
            "query": asked.query,
            "top_k": len(asked.items),
            "retrieve": {"depth": len(asked.items)},
            "rank": {"depth": len(asked.items)},
            "fields": [],
        },
    ),
}
"""Cohere's, Jina's and vLLM's rerank; SGLang's score; Text Embeddings Inference's rerank; our search, which finds its
own items and ranks as many of them."""


@dataclasses.dataclass(frozen=True)
class ServerMetrics:
    """What a server has counted since it started; what it does not say is None or empty.

    `launches` are {padded tokens of a launch: (launches, their seconds)} of those that ended; `running_seconds` had the
    one that runs so far. `read` is the reading's moment, on `time.perf_counter`, known to half of a round trip.
    """

    launches: Mapping[int, tuple[float, float]]
    running_seconds: float
    read: float
    memory_bytes: float | None
    recompiles: float | None

    def launches_since(self, earlier: "ServerMetrics") -> dict[int, tuple[float, float]]:
        """The launches between two readings, shapes without any left out."""
        found = {}
        for tokens, (count, seconds) in self.launches.items():
            old_count, old_seconds = earlier.launches.get(tokens, (0.0, 0.0))
            if count > old_count:
                found[tokens] = (count - old_count, seconds - old_seconds)
        return found

    def busy_share_since(self, earlier: "ServerMetrics") -> float | None:
        """The device's share of the time between two readings, 1 at most; None where no launch ended.

        Of a launch that was running at a reading each side has its part.
        """
        if not (launches := self.launches_since(earlier)):
            return None
        seconds = (
            sum(spent for _, spent in launches.values()) + self.running_seconds - earlier.running_seconds
        )
        return min(seconds / (self.read - earlier.read), 1.0)


def parse_metrics(text: str, *, read: float = 0.0) -> ServerMetrics:
    """Reads Prometheus' text format, which the server wrote at `read`. Raises: ValueError when it is something else."""
    values: dict[str, float] = {}
    counts: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "batch_seconds_count":
                counts[int(sample.labels["tokens"])] = sample.value
            elif sample.name == "batch_seconds_sum":
                seconds[int(sample.labels["tokens"])] = sample.value
            elif not sample.labels:
                values[sample.name] = sample.value
    return ServerMetrics(
        launches={tokens: (count, seconds[tokens]) for tokens, count in counts.items()},
        running_seconds=values.get("batch_running_seconds", 0.0),
        read=read,
        memory_bytes=values.get("process_resident_memory_bytes"),
        recompiles=values.get("recompiles_total"),
    )


class Target:
    """One server, spoken to in one dialect.

    Args:
      fields: further fields of every body, such as a model's name.
    Raises: InputError for what is no address.
    """

    def __init__(self, url: str, dialect: str, *, fields: Mapping[str, Any]) -> None:
        self.url = url
        self.dialect = DIALECTS[dialect]
        self.fields = fields
        try:
            self._client = httpx.AsyncClient(
                base_url=url,
                timeout=TIMEOUT_SECONDS,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                trust_env=False,  # a proxy would be measured with the server
            )
        except httpx.InvalidURL as error:
            raise InputError(f"{url} is no address ({error}); change --url") from None

    async def aclose(self) -> None:
        await self._client.aclose()

    def body(self, request: TextRequest) -> bytes:
        """The request as it is sent."""
        return orjson.dumps({**self.dialect.body(request), **self.fields})

    async def send(self, body: bytes) -> Reply:
        """Raises: httpx.HTTPError when no reply comes."""
        reply = await self._post(body)
        tokens = None
        if reply.is_success:
            content = orjson.loads(reply.content)
            tokens = content.get("usage", {}).get("padded_tokens") if isinstance(content, dict) else None
        return Reply(reply.status_code, _seconds(reply.headers.get("retry-after")), tokens)

    async def check_ready(self) -> None:
        """Raises: InputError when the address is wrong, nobody listens there, or the server is not ready."""
        reply = await self._get("/ready")
        if reply.status_code == 404:  # other servers have `/health` only
            reply = await self._get("/health")
        if reply.status_code != 200:
            raise InputError(
                f"{self.url} is not ready ({reply.status_code}: {reply.text[:200]}); try again later"
            )

    async def check_answer(self, body: bytes) -> None:
        """Raises: InputError when a first request is not answered, with what the server says about it."""
        try:
            reply = await self._post(body)
        except httpx.HTTPError as error:
            raise InputError(f"{self._place} does not answer ({error!r})") from None
        if not reply.is_success:
            raise InputError(
                f"{self._place} answers {reply.status_code}: {reply.text[:200]}; choose --format, --model, "
                "--label-token-ids, --items and --query-words that it takes"
            )

    async def info(self) -> dict[str, Any]:
        """What `/info` says; {} when the server has none."""
        reply = await self._get("/info")
        try:
            content = orjson.loads(reply.content) if reply.is_success else {}
        except orjson.JSONDecodeError:  # a page, say
            content = {}
        return content if isinstance(content, dict) else {}

    async def texts(self, info: Mapping[str, Any]) -> list[str]:
        """Documents that the server serves, as its ranker reads them: those that retrieval finds for its own examples.

        Raises: InputError when it offers none.
        """
        hint = f"{self.url} does not offer its documents; give --texts FILE"
        fields = info.get("views", {}).get(info.get("default_view"))
        if not fields:
            raise InputError(hint)
        found: dict[str, str] = {}
        for query in info["examples"] or [info["name"]]:
            body = {
                "query": query,
                "top_k": MAX_TEXTS,
                "retrieve": {"sources": ["embedding"], "depth": MAX_TEXTS},
                "rank": {"depth": 0},
            }
            try:
                reply = await self._client.post("/v1/search", json=body)
            except httpx.HTTPError as error:
                raise InputError(f"{hint} (/v1/search does not answer: {error!r})") from None
            if not reply.is_success:
                raise InputError(f"{hint} (/v1/search answers {reply.status_code}: {reply.text[:200]})")
            for result in orjson.loads(reply.content)["results"]:
                found[result["id"]] = document_text(Document(result["id"], result["fields"]), fields)
        return list(found.values())

    async def metrics(self) -> ServerMetrics:
        """What `/metrics` says now; nothing when the server has none."""
        begun = time.perf_counter()
        nothing = parse_metrics("", read=begun)
        try:
            reply = await self._client.get("/metrics")
            read = (begun + time.perf_counter()) / 2
            return parse_metrics(reply.text, read=read) if reply.is_success else nothing
        except (httpx.HTTPError, ValueError):
            return nothing

    @property
    def _place(self) -> str:
        return f"POST {self.url}{self.dialect.path}"

    async def _post(self, body: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return await self._client.post(self.dialect.path, content=body, headers=headers)

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._client.get(path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise InputError(f"no server at {self.url} ({error}); start it or change --url") from None


def read_texts(path: str) -> list[str]:
    """One text a line, or JSON lines with "text" where the name ends in .jsonl.

    Raises: InputError for a file that cannot be read or a line that is not such an object, with its number.
    """
    hint = 'give --texts a file of texts, a line each, or .jsonl with "text"'
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); {hint}") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path} (not UTF-8); {hint}") from None
    if not path.endswith(".jsonl"):
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts += [_text_of(line)] if line.strip() else []
        except (ValueError, TypeError, KeyError):
            raise InputError(f'{path}:{number}: not a JSON object with a "text"') from None
    return texts


def read_label_token_ids(text: str) -> list[int]:
    """Raises: InputError unless it is a list of numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--label-token-ids {text!r} is not a list such as 9454,2753") from None


def _text_of(line: str) -> str:
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError
    return text


def _seconds(header: str | None) -> float | None:
    """`Retry-After` in seconds; None when there is none, or a date, which no client of ours reads."""
    try:
        return None if header is None else float(header)
    except ValueError:
        return None
