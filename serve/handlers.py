"""What each path answers: from a parsed body to the reply's fields.

A handler checks, tokenises in a thread, queues a job and shapes the reply. Statuses, headers and reading the body are
`routes`', the search pipeline is `search`'s.
"""

import asyncio
import concurrent.futures
import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import Request
from scipy.special import expit, softmax

from jaxsearch.errors import InputError
from jaxsearch.scoring.prefill import ScoreRequest
from jaxsearch.search.orders import Order
from serve.batcher import Outcome
from serve.dialects import AnyEmbedBody, AnyRerankBody, Ranked, embed_kind, rerank_kind
from serve.engine import Engine, Job, Scored
from serve.protocol import (
    MAX_BODY_BYTES,
    MAX_ITEMS,
    PairsBody,
    RequestError,
    ScoreBody,
    SearchBody,
    blaming,
    check_count,
    check_no_token_ids,
    validate,
)
from serve.search import SearchService

MAX_REQUEST_TOKENS = 300_000
CHARACTERS_PER_TOKEN = 4
"""About: what waits to be tokenised is admitted by this, so that a crowd does not wait there instead."""
MAX_QUERY_CHARACTERS = 32_768
"""The limit of a search's query; the ranker's own limit, where it reads the query, is lower."""
POLL_SECONDS = 0.25
"""How often a waiting request looks whether its client is still there."""

Reply = dict[str, Any] | list[Any]


class ClientLeft(Exception):
    """Nobody waits for the reply any more."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_items: int = MAX_ITEMS
    max_body_bytes: int = MAX_BODY_BYTES
    max_request_tokens: int = MAX_REQUEST_TOKENS
    max_searches: int = 512
    """Searches under way at once: what they do on the host passes no queue of tokens."""


@dataclasses.dataclass
class Call:
    """One request while it is answered: parsed body, what to warn about, and where its time went."""

    request: Request
    body: dict[str, Any]
    is_strict: bool
    arrived: float
    """On the monotonic clock, as are the next two."""
    expected_by: float | None = None
    deadline: float | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def end_within(self, milliseconds: float) -> None:
        """The reply is of no use later than so after the request came; the earliest such time counts."""
        self.deadline = min(self.deadline or math.inf, self.arrived + milliseconds / 1000)

    def validated(self, kind: Any) -> Any:
        typed, warnings = validate(kind, self.body, is_strict=self.is_strict)
        self.warnings += warnings
        return typed


class Service:
    """The handlers, over one engine."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.executor = concurrent.futures.ThreadPoolExecutor(max_workers=2, thread_name_prefix="host")
        self.searches = SearchService(engine, self.executor, max_searches=limits.max_searches)
        self._arriving_tokens = 0

    async def score(self, call: Call) -> Reply:
        """`/v1/score`, `/score`: SGLang's and vLLM's bodies, told apart by their keys."""
        if "text_1" in call.body or "text_2" in call.body:
            return await self._score_pairs(call)
        check_count(call.body, "items", self.limits.max_items)
        body: ScoreBody = call.validated(ScoreBody)
        self._check_model(body.model)
        if body.item_first:
            message = "item_first is not supported: the query is the prefix that all items share"
            raise RequestError(400, message, param="item_first")
        if body.label_token_ids is None:
            texts = [item for item in body.items if isinstance(item, str)]
            if not isinstance(body.query, str) or len(texts) < len(body.items):
                raise InputError("token ids need label_token_ids; without them query and items are texts")
            scored, truncated = await self._score_texts(call, body.query, texts)
            raw = self.engine.bundle.ranker.scores(scored.logits)
            scores = {"scores": expit(raw).tolist(), "logits": raw.tolist(), "truncated": truncated}
        else:
            if body.apply_softmax is False:
                message = (
                    "apply_softmax must be true: only the label rows of the output matrix are multiplied, so "
                    "probabilities over the whole vocabulary do not exist"
                )
                raise RequestError(400, message, param="apply_softmax")
            texts = [value for value in (body.query, *body.items) if isinstance(value, str)]
            scored = await self._run(call, await self._host(call, texts, self._raw_job, body))
            scores = {"scores": softmax(scored.logits, axis=-1).tolist()}
        return {**scores, "object": "scoring", "model": self._model, "usage": scored.usage()}

    async def _score_pairs(self, call: Call) -> Reply:
        check_count(call.body, "text_2", self.limits.max_items)
        body: PairsBody = call.validated(PairsBody)
        self._check_model(body.model)
        texts = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        scored, _ = await self._score_texts(call, body.text_1, texts)
        probs = expit(self.engine.bundle.ranker.scores(scored.logits)).tolist()
        data = [{"index": i, "object": "score", "score": prob} for i, prob in enumerate(probs)]
        identity = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return {**identity, "model": self._model, "data": data, "usage": scored.usage()}

    async def rerank(self, call: Call) -> Reply:
        """`/rerank`, `/v1/rerank`, `/v2/rerank`, `/v1/reranking`: whose client it is, its keys say."""
        kind = rerank_kind(call.body)
        check_count(call.body, kind.items_key, self.limits.max_items)
        body: AnyRerankBody = call.validated(kind)
        self._check_model(body.model)
        texts = body.texts
        scored, truncated = await self._score_texts(call, body.query, texts)
        raw = self.engine.bundle.ranker.scores(scored.logits)
        probs = expit(raw)
        ranked = [
            Ranked(index, float(probs[index]), float(raw[index]), texts[index], truncated[index])
            for index in np.argsort(-probs, kind="stable").tolist()
        ]
        return body.reply(ranked, model=self._model, usage=scored.usage())

    async def embeddings(self, call: Call) -> Reply:
        """`/v1/embeddings` (OpenAI, Voyage), `/v2/embed` (Cohere), `/embed` (TEI)."""
        kind = embed_kind(call.request.url.path)
        key = kind.items_key
        check_count(call.body, key, self.limits.max_items)
        check_no_token_ids(call.body, key)
        body: AnyEmbedBody = call.validated(kind)
        self._check_model(body.model)
        texts = body.texts
        if empty := [index for index, text in enumerate(texts) if not text.strip()]:
            place = key if isinstance(call.body[key], str) else f"{key}.{empty[0]}"
            raise RequestError(400, f"{place} is empty; give some text", code="empty_input", param=place)
        width = self.engine.bundle.encoder.embed_dim
        if body.dimensions not in (None, width):
            raise RequestError(400, f"dimensions must be {width}, the encoder's width", param="dimensions")
        job = await self._host(call, texts, self.engine.embed_job, texts, body.is_query, is_embedding=True)
        self._check_tokens(job.tokens)
        embeds, tokens = await self._run(call, job)
        return body.reply(embeds, model=self._model, tokens=tokens)

    async def search(self, call: Call) -> Reply:
        """`/v1/search`: see `SearchService`."""
        body: SearchBody = call.validated(SearchBody)
        if body.timeout_ms is not None:
            call.end_within(body.timeout_ms)
        plan = self.searches.plan(body)
        if plan.order.uses_ranker:
            self._check_query(body.query)
        if len(body.query) > MAX_QUERY_CHARACTERS:
            message = f"query has {len(body.query)} characters, at most {MAX_QUERY_CHARACTERS} are allowed; shorten it"
            raise RequestError(400, message, param="query")
        if body.cursor is None:
            self._check_room(call, self.searches.expected_tokens(plan))

        async def run(job: Job) -> Outcome:
            return await self._outcome(call, job)

        return await self.searches.search(body, plan, run, call.deadline)

    def info(self) -> Reply:
        """`/info`: what is served, with which limits, and in which state."""
        engine, bundle = self.engine, self.engine.bundle
        columns, orders = bundle.searcher.columns, bundle.orders
        return {
            "name": bundle.name,
            "state": engine.state,
            "failure": engine.failure,
            "model_revision": bundle.revision,
            "index_revision": bundle.index_revision,
            "encoder_version": bundle.encoder.version,
            "ranker_version": bundle.ranker.version,
            "vertical": bundle.vertical.name,
            "views": {name: list(fields) for name, fields in bundle.vertical.views.items()},
            "default_view": bundle.ranker.view,
            "examples": list(bundle.vertical.examples),
            "fields": columns.names,
            "columns": columns.described,
            "order": orders.default,
            "order_reason": orders.reason,
            "orders": [_about_order(order) for order in orders.orders.values()],
            "first_stage": orders.first_stage.name,
            "ranked_order": orders.ranked.name,
            "rank_depth": orders.rank_depth,
            "quality": bundle.quality,
            "num_documents": len(bundle.documents),
            "embed_dim": bundle.encoder.embed_dim,
            "label_token_ids": list(bundle.ranker.label_ids),
            "is_calibrated": orders[orders.default].calibration is not None,
            "num_known_answers": len(bundle.known_answers),
            "num_programs": engine.num_programs,
            "ready_seconds": engine.ready_seconds,
            "lattice": bundle.lattice.to_json() | {"launches": list(engine.scorer.shapes.launches)},
            "dtype": bundle.dtype,
            "use_kernel": engine.scorer.use_kernel,
            "is_batch_invariant": engine.scorer.shapes.is_batch_invariant,
            "limits": dataclasses.asdict(self.limits) | {"max_queue_tokens": engine.batcher.max_queue_tokens},
            "slo_ms": None if engine.slo_seconds is None else 1000 * engine.slo_seconds,
            "queue_tokens": engine.batcher.queue_tokens,
            "tokens_per_second": engine.batcher.tokens_per_second,
        }

    def models(self) -> Reply:
        """`/v1/models`."""
        entry = {"object": "model", "created": int(self.engine.started), "owned_by": "jaxsearch"}
        return {"object": "list", "data": [{"id": name, **entry} for name in self._model_names]}

    @property
    def _model(self) -> str:
        return self.engine.bundle.name

    @property
    def _model_names(self) -> tuple[str, ...]:
        return (self._model, "encoder", "ranker")

    def _check_model(self, model: str | None) -> None:
        if model is not None and model not in self._model_names:
            names = ", ".join(repr(name) for name in self._model_names)
            message = f"model {model!r} is not served here; use one of {names}, or leave it out"
            raise RequestError(404, message, code="model_not_found", param="model")

    def _check_query(self, query: str) -> None:
        """Refuses what cannot fit before it is tokenised."""
        ranker = self.engine.bundle.ranker
        tokens = ranker.prompt.max_shared_tokens
        if len(query) > tokens * ranker.tokenizer.max_token_chars:
            message = (
                f"query has {len(query)} characters; with the prompt at most {tokens} tokens fit: shorten it"
            )
            raise RequestError(400, message, param="query")

    def _check_tokens(self, tokens: int) -> None:
        limit = self.limits.max_request_tokens
        if tokens > limit:
            message = f"the request has {tokens} tokens, at most {limit} are allowed; split it"
            raise RequestError(413, message, code="too_many_tokens")

    def _raw_job(self, body: ScoreBody) -> Job:
        """Query and items as they are, special tokens parsed: the client has its own template."""
        tokenizer = self.engine.bundle.ranker.tokenizer

        def encoded(value: str | list[int], largest: int) -> list[int]:
            if isinstance(value, list):
                if wrong := [token for token in value if not 0 <= token < tokenizer.vocab_size]:
                    raise InputError(f"token ids must be in 0..{tokenizer.vocab_size - 1}; got {wrong[0]}")
                return value
            if len(value) > largest * tokenizer.max_token_chars:
                raise InputError(
                    f"a text of {len(value)} characters does not fit {largest} tokens; shorten it"
                )
            return tokenizer.encode_template(value)

        scorer = self.engine.scorer
        prefix = encoded(body.query, scorer.lattice.max_prefix_tokens)
        items = [encoded(item, scorer.lattice.max_item_tokens) for item in body.items]
        return self._score_job(ScoreRequest(tuple(prefix), items, tuple(body.label_token_ids or ())))

    async def _score_texts(self, call: Call, query: str, texts: Sequence[str]) -> tuple[Scored, list[bool]]:
        """Scores documents with the ranker's prompt; also which of them were cut."""
        self._check_query(query)
        job, truncated = await self._host(call, [query, *texts], self._text_job, query, texts)
        self.engine.telemetry.truncated_items.inc(sum(truncated))
        return await self._run(call, job), truncated

    def _text_job(self, query: str, texts: Sequence[str]) -> tuple[Job, list[bool]]:
        with blaming("query"):  # documents are cut, the query is not
            prompt = self.engine.bundle.ranker.request(query, texts)
        return self._score_job(ScoreRequest(prompt.prefix, prompt.items)), prompt.truncated

    def _score_job(self, request: ScoreRequest) -> Job:
        self._check_tokens(len(request.prefix) + sum(map(len, request.items)))
        return self.engine.score_job(request)

    async def _host(
        self,
        call: Call,
        texts: Sequence[str],
        function: Callable[..., Any],
        *arguments: Any,
        is_embedding: bool = False,
    ) -> Any:
        """Does what depends on `texts` in a thread, timed as "tokenize". Raises: QueueFull before, where no room is."""
        most = self.engine.scorer.lattice.max_item_tokens
        if is_embedding:
            most = self.engine.bundle.encoder.max_document_tokens
        tokens = sum(min(len(text) // CHARACTERS_PER_TOKEN, most) for text in texts)  # what is longer is cut
        self._check_room(call, tokens, has_steps=is_embedding)
        begun = time.perf_counter()
        self._arriving_tokens += tokens
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, function, *arguments)
        finally:
            self._arriving_tokens -= tokens
            call.seconds["tokenize"] = time.perf_counter() - begun

    def _check_room(self, call: Call, tokens: int, *, has_steps: bool = False) -> None:
        """Raises: QueueFull, DeadlineExceeded as `Batcher.check_room`, which counts what is being tokenised too."""
        self.engine.batcher.check_room(
            tokens,
            arriving=self._arriving_tokens,
            deadline=call.deadline,
            expected_by=call.expected_by,
            has_steps=has_steps,
        )

    async def _run(self, call: Call, job: Job) -> Any:
        outcome = await self._outcome(call, job)
        call.seconds["queue"] = outcome.queue_seconds
        call.seconds["compute"] = outcome.compute_seconds
        return outcome.value

    async def _outcome(self, call: Call, job: Job) -> Outcome:
        """Queues a job and waits for it, as long as the client does."""
        batcher = self.engine.batcher
        future = batcher.submit(job.work, job.tokens, deadline=call.deadline, expected_by=call.expected_by)
        self.engine.telemetry.queue_tokens.set(batcher.queue_tokens)
        waiting = asyncio.wrap_future(future)
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=POLL_SECONDS)
                if not waiting.done() and await call.request.is_disconnected():
                    raise ClientLeft
        finally:
            future.cancel()
        self.engine.telemetry.queue_tokens.set(batcher.queue_tokens)
        return waiting.result()


def _about_order(order: Order) -> dict[str, Any]:
    validation = None if order.validation is None else order.validation._asdict()
    about = {"name": order.name, "uses_ranker": order.uses_ranker, "sources": list(order.sources)}
    return about | {"weights": dict(order.weights), "validation_ndcg@10": validation}
