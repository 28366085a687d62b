"""First-stage search: from a query to the best k of all documents.

`exact` scans every document on the device (the reference, and the fast path on accelerators), `scann`
approximates on the CPU for large corpora, `lexical` matches words, `fusion` joins rankings. All share
`Index`; an index knows positions in its list of document ids, never texts or grades. How good a ranking is:
`jaxsearch.metrics`.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsearch.data.records import Run
from jaxsearch.errors import InputError
from jaxsearch.files import replace_folder

NO_DOCUMENT = -1
_INDEX_FILE = "index.json"
_FORMAT = 1


class Hits(NamedTuple):
    """Best documents per query, best first; equal scores in the order of the documents.

    `scores` is -inf and `positions` is -1 where fewer than k documents were found.
    """

    scores: Float[np.ndarray, "q k"]
    positions: Int[np.ndarray, "q k"]


class Index(Protocol):
    """What every index offers. `queries` are embeddings [q e] for vector indexes, texts for `Bm25Index`."""

    ids: Sequence[str]

    def search(self, queries: Any, k: int, filter_where: Bool[np.ndarray, "..."] | None = None) -> Hits:
        """The best k documents of each query among those whose mask is True ([n] shared, or [q n] per query)."""
        ...


def count_passing(filter_where: Bool[np.ndarray, "..."] | None, num_documents: int) -> Int[np.ndarray, "..."]:
    """How many documents a filter lets through: one number, or one per query."""
    return np.asarray(num_documents if filter_where is None else filter_where.sum(axis=-1))


def starved(
    hits: Hits, num_documents: int, filter_where: Bool[np.ndarray, "..."] | None = None
) -> Bool[np.ndarray, "q"]:
    """Queries for which an approximate index found fewer documents than k although the filter lets more through."""
    found = (hits.positions != NO_DOCUMENT).sum(axis=1)
    return found < np.minimum(hits.positions.shape[1], count_passing(filter_where, num_documents))


def to_run(hits: Hits, query_ids: Sequence[str], document_ids: Sequence[str]) -> Run:
    """Hits as a run over ids, without the empty places."""
    return {
        str(query): {
            str(document_ids[position]): float(score)
            for score, position in zip(scores, positions, strict=True)
            if position != NO_DOCUMENT
        }
        for query, scores, positions in zip(query_ids, hits.scores, hits.positions, strict=True)
    }


def check_request(num_queries: int, k: int, num_documents: int, filter_where: np.ndarray | None) -> None:
    """Raises InputError for a k or a filter that no index can answer."""
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if filter_where is None:
        return
    if filter_where.dtype != np.bool_:
        raise InputError(f"a filter mask must be boolean, got {filter_where.dtype}")
    if filter_where.shape not in ((num_documents,), (num_queries, num_documents)):
        raise InputError(
            f"a filter mask must have shape ({num_documents},) or ({num_queries}, {num_documents}), "
            f"got {filter_where.shape}"
        )


def check_documents(ids: Sequence[str], num_rows: int) -> list[str]:
    """The ids as a list; InputError when there are none, they repeat, or they do not match the rows."""
    ids = list(ids)
    if not ids:
        raise InputError("an index needs at least one document")
    if len(ids) != num_rows:
        raise InputError(f"{len(ids)} document ids for {num_rows} rows; give one id per row")
    if len(set(ids)) != len(ids):
        repeated = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"document id {repeated!r} occurs more than once; ids must be unique")
    return ids


def pad_hits(hits: Hits, k: int) -> Hits:
    """Hits widened to k places with empty ones."""
    missing = k - hits.positions.shape[1]
    if missing <= 0:
        return hits
    return Hits(
        np.pad(hits.scores, ((0, 0), (0, missing)), constant_values=-np.inf),
        np.pad(hits.positions, ((0, 0), (0, missing)), constant_values=NO_DOCUMENT),
    )


def write_index(
    directory: str | Path,
    kind: str,
    ids: Sequence[str],
    settings: Mapping[str, Any],
    metadata: Mapping[str, Any],
    write_files: Callable[[Path], None],
) -> None:
    """Writes an index folder whole or not at all: files, ids.json, index.json; replaces a former one."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists() and any(directory.iterdir()) and not (directory / _INDEX_FILE).exists():
        raise InputError(f"{directory} holds something that is not an index; choose another directory")
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write_files(temporary)
        (temporary / "ids.json").write_text(json.dumps(list(ids), ensure_ascii=False), encoding="utf-8")
        header = {"format": _FORMAT, "kind": kind, "num_documents": len(ids)}
        header |= {"settings": dict(settings), "metadata": dict(metadata)}
        (temporary / _INDEX_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        replace_folder(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_index(directory: str | Path, kind: str) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Ids, settings and metadata of an index folder.

    Raises:
      InputError: no index there, another kind, a format or a number of documents that does not fit.
    """
    directory = Path(directory)
    try:
        header = json.loads((directory / _INDEX_FILE).read_text(encoding="utf-8"))
        ids = json.loads((directory / "ids.json").read_text(encoding="utf-8"))
        found, count, form = header["kind"], header["num_documents"], header["format"]
        settings, metadata = header["settings"], header["metadata"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{directory} is not a readable index ({error!r}); build it with train.index"
        ) from None
    if (found, form) != (kind, _FORMAT):
        raise InputError(
            f"{directory} holds a {found!r} index, format {form}; expected {kind!r}, format {_FORMAT}"
        )
    return check_documents(ids, count), settings, metadata


def load_array(path: Path) -> np.ndarray:
    """A .npy file, never unpickled; InputError when it is damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); build the index again with train.index") from None
