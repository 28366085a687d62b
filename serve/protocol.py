"""The bodies that clients send, and how they are told that one is wrong.

Bodies are read as JSON by `parse`, checked by a model of this module, and what the model does not know comes back as
warnings. Nothing here touches the engine.
"""

import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
import pydantic
from pydantic import ConfigDict, Field

from jaxsearch.errors import InputError
from jaxsearch.search.candidates import RETRIEVE_DEPTH
from serve.complaints import complaints

MAX_ITEMS = 1000
MAX_BODY_BYTES = 32 * 2**20
MAX_TOP_K = 1000
MAX_DEPTH = 1000
TEI_KINDS = {400: "Empty", 424: "Backend", 429: "Overloaded", 503: "Overloaded"}
"""What TEI's clients read of a status; "Validation" is that of all others."""


class RequestError(Exception):
    """A reply other than 2xx: status, a message for people, a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_seconds = retry_after_seconds


@contextlib.contextmanager
def blaming(param: str) -> Iterator[None]:
    """An InputError of the body names the field that is wrong."""
    try:
        yield
    except InputError as error:
        raise RequestError(400, str(error), param=param) from None


class Body(pydantic.BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True)
    is_ours: ClassVar[bool] = False
    """Our own clients are told of a field that nobody reads; those of others send more than we know."""


Text = Annotated[str, Field(min_length=1)]


class ScoreBody(Body):
    """`/v1/score`: items against one query. With `label_token_ids`, raw tokens without the ranker's prompt."""

    query: Text | list[int]
    items: list[str] | list[list[int]]
    label_token_ids: list[int] | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None
    model: str | None = None


class PairsBody(Body):
    """`/v1/score` in vLLM's words: one text against one or many."""

    text_1: Text
    text_2: Text | list[str]
    model: str | None = None


class OurBody(Body):
    """Fields that it does not know are refused, by `validate`."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})
    is_ours: ClassVar[bool] = True


class RetrieveOptions(OurBody):
    """Where candidates come from."""

    sources: list[Literal["embedding", "bm25"]] | None = None
    """Absent: those that the order reads. One alone gives that source's own order, unless `rank.depth` asks for the
    ranker."""
    depth: Annotated[int, Field(ge=1, le=MAX_DEPTH)] = RETRIEVE_DEPTH
    """Candidates of each source, and of all together."""


class RankOptions(OurBody):
    """The ranker's part in sorting them."""

    depth: Annotated[int, Field(ge=0, le=MAX_DEPTH)] | None = None
    """The best candidates, which the ranker scores; 0: no ranker; absent: as `/info` says (`order`, `rank_depth`)."""
    variant: str = "ranker"
    objective: dict[str, float] = {"relevance": 1.0}


class SearchBody(OurBody):
    """`/v1/search`, ours: retrieve, then rank."""

    query: Text
    vertical: str | None = None
    """Refused when the server has another one."""
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 10
    """Results of one page."""
    cursor: str | None = None
    """Of an earlier reply: the next page of that very list."""
    filter: dict[str, Any] | None = None
    """`and`, `or`: lists of filters; `not`: a filter; or a `field` with one of eq ne in lt lte gt gte exists."""
    order: str | None = None
    """One of `orders` in `/info`; absent: the bundle's own, see `order_reason` there."""
    retrieve: RetrieveOptions = RetrieveOptions()
    rank: RankOptions = RankOptions()
    facets: list[str] = []
    """Fields whose values are counted among the candidates."""
    fields: list[str] | None = None
    """Document fields to return; all when absent."""
    explain: bool = False
    """Each result says which source found it, at which rank, with which score."""
    timeout_ms: Annotated[float, Field(gt=0)] | None = None


BodyType = TypeVar("BodyType", bound=Body)


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises: RequestError 400 for anything else: bad JSON, bad UTF-8, NaN, not an object.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object", code="invalid_json")
    return body


def read_milliseconds(text: str, name: str) -> float:
    """Raises: InputError unless it is a time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be a number of milliseconds above 0; got {text[:40]!r}")
    return value


def number_above(least: float, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads a finite number above `least` on a command line."""

    def number(text: str) -> Any:
        value = kind(text)
        if not least < value < math.inf:
            raise ValueError
        return value

    number.__name__ = f"number above {least}"  # argparse tells it
    return number


def check_no_token_ids(body: dict[str, Any], key: str) -> None:
    """Raises: RequestError 400 for texts that come as OpenAI's clients may send them, as one or more lists of ids."""
    value = body.get(key)
    if isinstance(value, list) and value and all(type(entry) in (int, list) for entry in value):
        raise RequestError(400, f"{key}: token ids are not taken; send texts", param=key)


def check_count(body: dict[str, Any], key: str, limit: int) -> None:
    """Refuses too long a list before its entries are looked at.

    Raises: RequestError 400 for an empty list, 413 for one above `limit`.
    """
    value = body.get(key)
    if isinstance(value, list) and not value:
        raise RequestError(400, f"{key} is empty; give at least one", code="empty_input", param=key)
    if isinstance(value, list) and len(value) > limit:
        message = f"{key} has {len(value)} entries, at most {limit} are allowed in one request; split it"
        raise RequestError(413, message, code="too_many_items", param=key)


def validate(
    kind: type[BodyType], body: dict[str, Any], *, is_strict: bool = False
) -> tuple[BodyType, list[str]]:
    """The typed body and a warning for each field that nobody reads.

    Nulls count as absent, since clients send them. Raises: RequestError 400, also for unknown fields when `is_strict`
    or the body is our own.
    """
    given = {key: value for key, value in body.items() if value is not None}
    for key in ("query", "text_1", "text_2"):
        if key in kind.model_fields and isinstance(text := given.get(key), str) and not text.strip():
            raise RequestError(400, f"{key} is empty; give some text", code="empty_input", param=key)
    try:
        typed = kind.model_validate(given)
    except pydantic.ValidationError as error:
        told, place = complaints(error.errors(include_url=False, include_input=False, include_context=False))
        raise RequestError(400, told, param=place) from None
    unknown = _unknown_fields(typed)
    if unknown and (is_strict or kind.is_ours):
        name, siblings = next(iter(unknown.items()))
        near = difflib.get_close_matches(name.rpartition(".")[2], siblings, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(siblings)}"
        message = f"unknown fields: {', '.join(unknown)}; {hint}"
        raise RequestError(400, message, code="unknown_field", param=name)
    return typed, [f"unknown field {name!r} was ignored" for name in unknown]


class RelevanceScore(pydantic.BaseModel):
    raw: float
    """The number that sorts: a weighted sum of signals, or the ranker's yes minus no in logits."""
    calibrated: float | None
    """A probability; null where the bundle has no calibration."""


class SearchResultBody(pydantic.BaseModel):
    """One document."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    id: str
    rank: int
    """From 1, over all pages."""
    score: float | None
    """The calibrated probability of relevance; in a bundle without calibration the ranker's own, or retrieval's raw
    score; null below the ranking depth."""
    scores: dict[Literal["relevance"], RelevanceScore]
    """Empty below the ranking depth."""
    fields: dict[str, Any]
    matched: list[Literal["bm25", "embedding"]]
    """The sources that found it."""
    truncated: bool
    """Whether the ranker read only the beginning of its text."""
    explain: dict[str, Any] | None = None
    """Absent unless asked for."""


class SearchReplyBody(pydantic.BaseModel):
    """What `/v1/search` answers."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    results: list[SearchResultBody]
    """One page."""
    cursor: str | None
    """For the next page; null on the last."""
    order: str
    """The order that was used."""
    facets: dict[str, list[dict[str, Any]]]
    """Per field its values among the candidates with their counts, most frequent first."""
    total: int
    """Candidates, so results over all pages; not how many documents pass the filter."""
    depth_used: dict[Literal["retrieve", "rank"], int]
    starved: bool
    """True where fewer documents pass the filter than `retrieve.depth`."""
    model_revision: str
    index_revision: str
    usage: dict[str, int]
    timings_ms: dict[str, float]
    warnings: list[str]


class ErrorReply(pydantic.BaseModel):
    """What rerank, score and search say of an error; Cohere's, Jina's, Voyage's and SGLang's clients read it."""

    message: str
    detail: str
    """The same."""
    object: Literal["error"]
    type: Literal["invalid_request_error", "overloaded_error", "server_error"]
    code: str
    param: str | None
    """The field that is wrong."""
    id: str
    """Of the request; the server's log has it too."""


class OpenaiError(pydantic.BaseModel):
    message: str
    type: Literal["invalid_request_error", "overloaded_error", "server_error"]
    param: str | None
    code: str


class OpenaiErrorReply(pydantic.BaseModel):
    """What the embeddings paths say of an error."""

    error: OpenaiError


class TeiErrorReply(pydantic.BaseModel):
    """What TEI's paths and bodies are told of an error."""

    error: str
    error_type: Literal["Backend", "Empty", "Overloaded", "Validation"]


ERROR_REPLIES = {"rerank": ErrorReply, "openai": OpenaiErrorReply, "tei": TeiErrorReply}


def error_dialect(path: str, body: Mapping[str, Any]) -> str:
    """Whose errors the client reads: "openai" for embeddings, "tei" for its path and bodies, else "rerank".

    A body that could not be read is {}: on /rerank nobody knows then whose it was.
    """
    if path.endswith("/embeddings"):
        return "openai"
    return "tei" if path == "/embed" or (path == "/rerank" and "texts" in body) else "rerank"


def as_tei(error: RequestError) -> RequestError:
    """The error with TEI's status: 422 for a body that is JSON and does not validate, 424 for a failure of ours."""
    unread = ("invalid_json", "empty_input")
    status = {400: 400 if error.code in unread else 422, 500: 424}.get(error.status, error.status)
    return RequestError(
        status,
        error.message,
        code=error.code,
        param=error.param,
        retry_after_seconds=error.retry_after_seconds,
    )


def error_body(error: RequestError, *, dialect: str, request_id: str) -> dict[str, Any]:
    """The error as clients of that dialect (see `error_dialect`) read it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    if error.status in (429, 503):
        kind = "overloaded_error"
    if dialect == "tei":
        return {"error": error.message, "error_type": TEI_KINDS.get(error.status, "Validation")}
    if dialect == "openai":
        return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
    return {
        "message": error.message,
        "detail": error.message,
        "object": "error",
        "type": kind,
        "code": error.code,
        "param": error.param,
        "id": request_id,
    }


def _unknown_fields(model: Body, prefix: str = "") -> dict[str, list[str]]:
    """Given fields that the model does not have, each with those that it could have been."""
    known = list(type(model).model_fields)
    extra = model.model_extra or {}
    unknown = {prefix + name: known for name, value in extra.items() if value is not None}
    for field in known:
        value = getattr(model, field)
        if isinstance(value, Body):
            unknown |= _unknown_fields(value, f"{prefix}{field}.")
    return unknown


def to_json(value: Any) -> bytes:
    """JSON bytes, NumPy arrays included; NaN and infinities become null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
