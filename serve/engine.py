"""The models behind the server: what must be true before it is ready, and the jobs that the device threads run.

Every program that a request can need is compiled here, and known questions get their known answers, before `state` is
"ready". Queueing is `batcher`'s, the search pipeline is `search`'s.
"""

import dataclasses
import gc
import logging
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsearch.bundle import SCORE_TOLERANCE, Bundle
from jaxsearch.errors import InputError
from jaxsearch.scoring.packing import Launch, Part, ScoreRequest, longest_first
from serve.batcher import Batcher, Shareable, Steps
from serve.plan import LengthLog
from serve.protocol import MAX_DEPTH
from serve.telemetry import Telemetry

log = logging.getLogger("jaxsearch.serve")

QUEUE_BATCHES = 8
"""Tokens that may wait, in largest launches, if the operator states no limit; a request of 50 items may take four."""
SLO_SHARE = 0.75
"""Of the service level, what a request may be expected to take when it is admitted; the rest is for what the
expectation does not know: at overload every request is admitted at the limit."""
EMBED_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Job:
    """Work for the batcher and its tokens."""

    work: Steps | Shareable
    tokens: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """Label logits per item, and what they cost in tokens."""

    logits: Float[np.ndarray, "c k"]
    prompt_tokens: int
    padded_tokens: int
    """Its share of its launches' padding included."""
    shared_prefix_tokens: int

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens,
            "shared_prefix_tokens": self.shared_prefix_tokens,
            "padded_tokens": self.padded_tokens,
        }


class ScoreWork:
    """A request's items on their way through launches."""

    def __init__(self, request: ScoreRequest) -> None:
        self.request = request
        self._waiting = longest_first(request.items)
        self._logits = np.zeros((len(request.items), len(request.label_token_ids or ())), np.float32)
        self._padded: list[float] = []

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prefix) + sum(map(len, self.request.items))

    def join(self, launch: Launch, member: int) -> int:
        return launch.parts[-1].num_tokens if launch.add(member, self.request, self._waiting) else 0

    def receive(self, part: Part, logits: Float[np.ndarray, "c k"], padding: float) -> None:
        """`padding` is the launch's size over its tokens."""
        self._logits[part.positions] = logits
        self._padded.append(part.num_tokens * padding)

    def result(self) -> Scored:
        return Scored(self._logits, self.num_tokens, round(sum(self._padded)), len(self.request.prefix))


class Engine:
    """A bundle made ready to answer. `state` goes loading → compiling → testing → ready → stopping, or ends as failed.

    Args:
      max_queue_tokens: tokens that may wait for the device; None means `QUEUE_BATCHES` largest launches.
      slo_seconds: a request that would probably be answered later than so is refused, unless nothing is before it.
      is_batch_invariant, use_kernel: see `PrefillScorer`.
      lengths: where the lengths of requests are recorded.
    """

    def __init__(
        self,
        bundle: Bundle,
        telemetry: Telemetry,
        *,
        max_queue_tokens: int | None = None,
        slo_seconds: float | None = None,
        is_batch_invariant: bool = False,
        use_kernel: bool = False,
        lengths: LengthLog | None = None,
    ) -> None:
        self.bundle = bundle
        self._lengths = lengths
        self.telemetry = telemetry
        self.state = "loading"
        self.failure: str | None = None
        self.started = time.time()
        self.ready_seconds: float | None = None
        self.scorer = bundle.scorer(is_batch_invariant=is_batch_invariant, use_kernel=use_kernel)
        self.num_retrieved = min(MAX_DEPTH, len(bundle.documents))
        self.slo_seconds = slo_seconds
        self.batcher = Batcher(
            max_queue_tokens=QUEUE_BATCHES * bundle.lattice.max_batch_tokens
            if max_queue_tokens is None
            else max_queue_tokens,
            launcher=self,
            num_threads=self.scorer.num_concurrent,
            launch_tokens=bundle.lattice.max_batch_tokens,
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

    def expected_by(self, arrived: float) -> float | None:
        """When a request that came at `arrived` should be answered for it to be taken; None: whenever."""
        return None if self.slo_seconds is None else arrived + SLO_SHARE * self.slo_seconds

    def refuse(self) -> None:
        """From now on no new request is taken; those that were are answered."""
        if self.state == "ready":
            self.state = "stopping"
            self.telemetry.is_ready.set(0)

    def close(self) -> None:
        """Answers what is queued, then stops the device threads."""
        self.batcher.close()
        if self._lengths is not None:
            self._lengths.close()

    @property
    def num_programs(self) -> int:
        return sum(part.num_compilations for part in (self.scorer, self.bundle.encoder, self.bundle.index))

    def score_job(self, request: ScoreRequest) -> Job:
        """Scores items behind their prefix; the outcome is a `Scored`.

        Raises: InputError when there is no item, or prefix or an item is empty or too long.
        """
        if not request.items:
            raise InputError("no items to score; give at least one")
        work = ScoreWork(self.scorer.checked(request))
        if self._lengths is not None:
            self._lengths.add(work.request)
        return Job(work, work.num_tokens)

    def open(self) -> Launch:
        """A launch for the batcher to fill."""
        return Launch(self.scorer.shapes)

    def run(self, launch: Launch, members: Sequence[ScoreWork]) -> dict[int, Exception]:
        """Scores a launch and hands every member its rows; where it fails, each member alone, and says whose did."""
        try:
            found = self.scorer.finish(launch, self.scorer.start(launch))
        except Exception as error:
            if len(launch.parts) == 1:
                return {launch.parts[0].owner: error}
            log.warning("a launch of %d requests failed; each runs alone", len(launch.parts), exc_info=error)
            failed: dict[int, Exception] = {}
            for alone in launch.split():
                failed |= self.run(alone, members)
            return failed
        padding = launch.padded_tokens / launch.num_tokens
        for part, logits in zip(launch.parts, found, strict=True):
            members[part.owner].receive(part, logits, padding)
            self.telemetry.items_scored.inc(len(part.items))
            self.telemetry.tokens.labels("shared_saved").inc(len(part.prefix) * (len(part.items) - 1))
        return {}

    def count(self, launch: Launch, seconds: float) -> None:
        """Keeps what the batcher tells of a launch: how long it had the device."""
        size, real = launch.padded_tokens, launch.num_tokens
        self.telemetry.batch_seconds.labels(str(size)).observe(seconds)
        self.telemetry.batch_fill.observe(real / size)
        self.telemetry.tokens.labels("real").inc(real)
        self.telemetry.tokens.labels("padding").inc(size - real)

    def embed_job(self, texts: Sequence[str], is_query: bool) -> Job:
        """Embeds texts; the outcome is float32 [texts, e] and the number of tokens."""
        return Job(*self._embed(texts, is_query))

    def retrieve_job(self, query: str, filter_where: Bool[np.ndarray, "c"] | None) -> Job:
        """Embeds a query and searches the index: its embedding, positions best first, and the search's seconds."""
        embedding, tokens = self._embed([query], True)

        def steps() -> Steps:
            embeds, _ = yield from embedding
            begun = time.perf_counter()
            nearest = self._nearest(embeds[0], filter_where)
            return embeds[0], nearest, time.perf_counter() - begun

        return Job(steps(), tokens)

    def _embed(self, texts: Sequence[str], is_query: bool) -> tuple[Steps, int]:
        encoder = self.bundle.encoder
        limit = encoder.max_query_tokens if is_query else encoder.max_document_tokens
        texts = [text[: (limit + 1) * encoder.tokenizer.max_token_chars] for text in texts]
        rows = encoder.encode_queries(texts) if is_query else encoder.encode_documents(texts)
        lengths = [len(row) for row in rows]

        def steps() -> Steps:
            parts = []
            for start in range(0, len(rows), EMBED_ROWS):
                if start:
                    yield sum(lengths[start - EMBED_ROWS : start])
                parts.append(encoder.embed_encoded(rows[start : start + EMBED_ROWS], is_query=is_query))
            self.telemetry.tokens.labels("real").inc(sum(lengths))
            return np.concatenate(parts), sum(lengths)

        return steps(), sum(lengths)

    def _nearest(
        self, query_embed: Float[np.ndarray, "e"], filter_where: Bool[np.ndarray, "c"] | None
    ) -> Int[np.ndarray, "c"]:
        """Always the same k, so that one program serves every depth."""
        return self.bundle.searcher.nearest(query_embed, self.num_retrieved, filter_where)

    def _self_test(self) -> None:
        """Known answers through the real path. Raises: InputError when one differs."""
        ranker = self.bundle.ranker
        self._nearest(self.bundle.encoder.embed_queries(["self-test"])[0], None)
        for known in self.bundle.known_answers:
            prompt = ranker.request(known.query, list(known.documents))
            scores = ranker.scores(self.scorer.score([ScoreRequest(prompt.prefix, prompt.items)])[0])
            if not np.allclose(scores, known.scores, rtol=0, atol=SCORE_TOLERANCE[self.bundle.dtype]):
                raise InputError(
                    f"self-test failed: {known.query!r} scored {scores.tolist()} in {self.bundle.dtype}, the bundle "
                    f"says {list(known.scores)}; this machine computes something else than the one that exported it"
                )
