"""The models behind the server: what must be true before it is ready, and the jobs that the device thread runs.

Every program that a request can need is compiled here, and known questions get their known answers, before `state` is
"ready". Queueing is `batcher`'s, the search pipeline is `search`'s.
"""

import dataclasses
import gc
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsearch.bundle import SCORE_TOLERANCE, Bundle
from jaxsearch.errors import InputError
from jaxsearch.retrieval import NO_DOCUMENT
from jaxsearch.scoring.prefill import ScoreRequest
from serve.batcher import Batcher, Steps
from serve.protocol import MAX_DEPTH
from serve.telemetry import Telemetry

QUEUE_BATCHES = 4
"""Tokens that may wait, in largest batches, where the operator states no limit."""
EMBED_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Job:
    """Steps for the batcher and their cost in padded tokens."""

    steps: Steps
    tokens: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """Label logits per item, and what they cost in tokens."""

    logits: Float[np.ndarray, "c k"]
    prompt_tokens: int
    padded_tokens: int
    shared_prefix_tokens: int

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens,
            "shared_prefix_tokens": self.shared_prefix_tokens,
            "padded_tokens": self.padded_tokens,
        }


class Engine:
    """A bundle made ready to answer. `state` goes loading → compiling → testing → ready, or ends as failed.

    Args:
      max_queue_tokens: padded tokens that may wait for the device; None means `QUEUE_BATCHES` largest batches.
    """

    def __init__(self, bundle: Bundle, telemetry: Telemetry, *, max_queue_tokens: int | None = None) -> None:
        self.bundle = bundle
        self.telemetry = telemetry
        self.state = "loading"
        self.failure: str | None = None
        self.started = time.time()
        self.ready_seconds: float | None = None
        self.scorer = bundle.plan.scorer(bundle.ranker)
        self.num_retrieved = min(MAX_DEPTH, len(bundle.documents))
        self.batcher = Batcher(
            max_queue_tokens=max_queue_tokens or QUEUE_BATCHES * bundle.plan.max_batch_tokens
        )

    def prepare(self) -> None:
        """Compiles everything and runs the self-test; sets `state` to ready or, with the reason, to failed."""
        begun = time.monotonic()
        try:
            self.state = "compiling"
            self.bundle.index.compile(1, self.num_retrieved)
            self.bundle.encoder.compile(documents=True)
            self.scorer.compile()
            self.state = "testing"
            self._self_test()
        except Exception as error:  # whatever it is, the server must say why it is not ready
            self.failure = str(error) if isinstance(error, InputError) else repr(error)
            self.state = "failed"
            raise
        self.ready_seconds = time.monotonic() - begun
        self.telemetry.programs.set(self.num_programs)
        self.telemetry.arm()
        gc.collect()
        gc.freeze()  # what lives now lives until the end: no collection looks at it again
        self.state = "ready"

    def close(self) -> None:
        """Answers what is queued, then stops the device thread."""
        self.batcher.close()

    @property
    def num_programs(self) -> int:
        return sum(part.num_compilations for part in (self.scorer, self.bundle.encoder, self.bundle.index))

    def score_job(self, request: ScoreRequest) -> Job:
        """Scores items behind their prefix; the outcome is a `Scored`.

        Raises: InputError when prefix or an item is empty or too long.
        """
        batches = self.scorer.plan([request])
        padded = self.scorer.prefix_buckets.bucket_of(len(request.prefix))
        padded += sum(batch.padded_tokens for batch in batches)
        item_tokens = sum(len(item) for item in request.items)

        def steps() -> Steps:
            labels = request.label_token_ids or self.scorer.label_token_ids
            logits = np.zeros((len(request.items), len(labels)), np.float32)
            for place, batch in enumerate(batches):
                if place:
                    yield batches[place - 1].padded_tokens
                rows = self.scorer.finish(batch, self.scorer.start(batch))
                logits[[item for _, item in batch.owners]] = rows
                self.telemetry.batch_fill.observe(batch.num_tokens / batch.padded_tokens)
            self._count(len(request.items), len(request.prefix) + item_tokens, padded, len(request.prefix))
            return Scored(logits, len(request.prefix) + item_tokens, padded, len(request.prefix))

        return Job(steps(), padded)

    def embed_job(self, texts: Sequence[str], is_query: bool) -> Job:
        """Embeds texts; the outcome is float32 [texts, e] and the number of tokens."""
        encoder = self.bundle.encoder
        limit = encoder.max_query_tokens if is_query else encoder.max_document_tokens
        texts = [text[: (limit + 1) * encoder.tokenizer.max_token_chars] for text in texts]
        encode = encoder.encode_queries if is_query else encoder.encode_documents
        embed = encoder.embed_queries if is_query else encoder.embed_documents
        lengths = [len(row) for row in encode(texts)]

        def steps() -> Steps:
            parts = []
            for start in range(0, len(texts), EMBED_ROWS):
                if start:
                    yield sum(lengths[start - EMBED_ROWS : start])
                parts.append(embed(texts[start : start + EMBED_ROWS]))
            self.telemetry.tokens.labels("real").inc(sum(lengths))
            return np.concatenate(parts), sum(lengths)

        return Job(steps(), sum(lengths))

    def retrieve_job(self, query: str, mask: Bool[np.ndarray, "c"] | None) -> Job:
        """Embeds a query and searches the index: (scores, positions), best first, and the search's seconds."""
        embedding = self.embed_job([query], True)

        def steps() -> Steps:
            embeds, _ = yield from embedding.steps
            begun = time.perf_counter()
            hits = self._search(embeds, mask)
            return hits, time.perf_counter() - begun

        return Job(steps(), embedding.tokens)

    def _search(
        self, query_embeds: Float[np.ndarray, "1 e"], mask: Bool[np.ndarray, "c"] | None
    ) -> tuple[Float[np.ndarray, "c"], Int[np.ndarray, "c"]]:
        """Always the same k, so that one program serves every depth; empty places are left out."""
        hits = self.bundle.index.search(query_embeds, self.num_retrieved, mask)
        is_found = hits.positions[0] != NO_DOCUMENT
        return hits.scores[0][is_found], hits.positions[0][is_found]

    def _self_test(self) -> None:
        """Known answers through the real path. Raises: InputError when one differs."""
        ranker = self.bundle.ranker
        self._search(self.bundle.encoder.embed_queries(["self-test"]), None)
        for known in self.bundle.known_answers:
            prompt = ranker.request(known.query, list(known.documents))
            scores = ranker.scores(self.scorer.score([ScoreRequest(prompt.prefix, prompt.items)])[0])
            if not np.allclose(scores, known.scores, rtol=0, atol=SCORE_TOLERANCE):
                raise InputError(
                    f"self-test failed: {known.query!r} scored {scores.tolist()}, the bundle says "
                    f"{list(known.scores)}; this machine computes something else than the one that exported it"
                )

    def _count(self, items: int, real: int, padded: int, prefix: int) -> None:
        self.telemetry.items_scored.inc(items)
        self.telemetry.tokens.labels("real").inc(real)
        self.telemetry.tokens.labels("padding").inc(padded - real)
        self.telemetry.tokens.labels("shared_saved").inc(prefix * max(items - 1, 0))
