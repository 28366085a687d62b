"""One directory with everything that serving needs, and a loader that refuses anything damaged or mismatched.

    bundle.json       format, versions, shapes, and size and sha256 of every other file
    encoder/ ranker/  model folders in the HF layout, with tokenizer and card (`checkpoints`)
    vertical/         fields, views, policy and prompt templates (`data.verticals`)
    documents.jsonl   the corpus;  index/ its embeddings and the encoder version that made them
    orders.json       the ways to sort results: weights, calibration, NDCG@10 on validation, which one is served
    selftest.json     questions with known answers, asked before the server says that it is ready
    MODEL_CARD.md     for people
    programs/         compiled for some machines, where a server left them; in no manifest, read when asked for only

Not here: choosing what goes in (`train.export`), the stages of a search (`search`), HTTP (`serve`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxsearch.buckets import Lattice
from jaxsearch.data.records import Document
from jaxsearch.data.verticals import Vertical, load_vertical
from jaxsearch.encoder import TextEncoder, load_encoder
from jaxsearch.errors import InputError
from jaxsearch.files import read_json, read_object, replace_folder, sha256_hex, write_json
from jaxsearch.ranker import TextRanker, load_ranker
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.scoring.prefill import PrefillScorer, ScoreRequest
from jaxsearch.search.orders import Orders
from jaxsearch.search.requests import SearchReply, SearchRequest
from jaxsearch.search.searcher import Searcher

FORMAT = 4
MANIFEST = "bundle.json"
PROGRAMS = "programs"
ORDERS, CARD, QUALITY = "orders.json", "MODEL_CARD.md", "quality.json"
DOCUMENTATION = (CARD, QUALITY)
"""Files that tell of a bundle and change no answer: its revision does not depend on them."""
Dtype = Literal["float32", "bfloat16"]
SCORE_TOLERANCE: Mapping[Dtype, float] = {"float32": 0.02, "bfloat16": 0.1}
"""Known scores, written in float32, may differ by this much from those that a server computes. Measured of the demo's
ranker on CPU, 128 scores in bfloat16: at most 0.047; other rankers were not measured."""


def serving_dtype() -> Dtype:
    """What a server computes in unless it is told: float32 on CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class KnownAnswer:
    """A query with one document that fits and one that does not, and the ranker's scores for them."""

    query: str
    documents: tuple[str, str]
    scores: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle in memory. Positions in `index` are those of `documents`; `revision` names all that answers depend on.
    The ranker computes in `dtype`."""

    directory: Path
    name: str
    revision: str
    index_revision: str
    vertical: Vertical
    encoder: TextEncoder
    ranker: TextRanker
    dtype: Dtype
    documents: list[Document]
    index: ExactIndex
    lexical_view: str
    orders: Orders
    lattice: Lattice
    known_answers: list[KnownAnswer]
    quality: list[dict[str, Any]]

    def scorer(self, *, is_batch_invariant: bool = False, use_kernel: bool = False) -> PrefillScorer:
        """The ranker in the bundle's shapes."""
        return PrefillScorer(
            self.ranker.decoder,
            self.ranker.label_ids,
            self.lattice,
            is_batch_invariant=is_batch_invariant,
            use_kernel=use_kernel,
        )

    @functools.cached_property
    def searcher(self) -> Searcher:
        """The corpus ready to be searched, made at its first use; programs are compiled as they are needed."""
        texts = [self.vertical.document_text(document, self.lexical_view) for document in self.documents]
        return Searcher(
            self.documents,
            self.vertical,
            encoder=self.encoder,
            index=self.index,
            bm25=Bm25Index(texts, self.index.ids),
            orders=self.orders,
            ranker=self.ranker,
            make_scorer=self.scorer,
        )

    def search(
        self,
        query: str,
        *,
        top_k: int = 10,
        filter: Mapping[str, Any] | None = None,
        explain: bool = False,
        **options: Any,
    ) -> SearchReply:
        """Searches the bundle's documents in this process, by the functions that the server runs.

        Args: all are fields of `SearchRequest`; `options` are those not named here.
        Raises: InputError for an unknown field or order, a wrong filter, or a query that is too long.
        """
        request = SearchRequest(query, top_k=top_k, filter=filter, explain=explain, **options)
        return self.searcher.search(request)


def known_answers(
    ranker: TextRanker, lattice: Lattice, triples: Sequence[tuple[str, str, str]]
) -> list[KnownAnswer]:
    """Scores (query, fitting document, other document) texts as the server will; those that the ranker gets
    wrong are left out, since they say nothing about whether a server works."""
    requests = []
    for query, fitting, other in triples:
        prompt = ranker.request(query, [fitting, other])
        requests.append(ScoreRequest(tuple(prompt.prefix), prompt.items))
    logits = PrefillScorer(ranker.decoder, ranker.label_ids, lattice).score(requests)
    answers = []
    for (query, fitting, other), rows in zip(triples, logits, strict=True):
        first, second = ranker.scores(rows).tolist()
        if first > second:
            answers.append(KnownAnswer(query, (fitting, other), (first, second)))
    return answers


def write_bundle(
    directory: str | Path,
    *,
    name: str,
    encoder_directory: str | Path,
    ranker_directory: str | Path,
    vertical_directory: str | Path,
    documents: Sequence[Document],
    index: ExactIndex,
    lexical_view: str,
    max_batch_tokens: int = 2048,
    orders: Orders | None = None,
    triples: Sequence[tuple[str, str, str]] = (),
    model_card: str = "",
) -> Path:
    """Writes a bundle in one step: until it is whole, nothing is at `directory`.

    Args:
      documents: the corpus, in the order of the index.
      index: the documents' embeddings; its metadata name the encoder's version ("encoder") and the "view".
      lexical_view: the view whose words BM25 searches.
      max_batch_tokens: of the largest launch; `serve.plan` fits launches to traffic.
      orders: how results are sorted; None: nothing was fitted.
      triples: (query, fitting document, other document) texts for the self-test.
    Raises: InputError when parts do not fit together, or `directory` holds something that is not a bundle.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise InputError(f"{directory} is not empty and not a bundle; choose another directory")
    vertical = load_vertical(vertical_directory)
    if lexical_view not in vertical.views:
        raise InputError(
            f"vertical {vertical.name} has no view {lexical_view!r} for BM25: set lexical_view to "
            f"{' or '.join(vertical.views)}"
        )
    encoder = load_encoder(encoder_directory)
    ranker = load_ranker(ranker_directory)
    if index.ids != [document.id for document in documents]:
        raise InputError("the index has other documents, or another order; build it again from these")
    if index.metadata.get("encoder") != encoder.version:
        raise InputError(
            f"the index was made by encoder {index.metadata.get('encoder')}, the bundle's is {encoder.version}; "
            "build it again with this one"
        )
    lattice = Lattice.for_prompts(
        max_prefix_tokens=ranker.prompt.max_shared_tokens,
        max_item_tokens=ranker.prompt.max_item_tokens,
        max_batch_tokens=max_batch_tokens,
    )

    part = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    part.mkdir(parents=True)
    try:
        shutil.copytree(encoder_directory, part / "encoder")
        shutil.copytree(ranker_directory, part / "ranker")
        shutil.copytree(vertical_directory, part / "vertical", ignore=shutil.ignore_patterns("__pycache__"))
        lines = [json.dumps({"id": d.id, "fields": dict(d.fields)}, ensure_ascii=False) for d in documents]
        (part / "documents.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        index.metadata["documents_sha256"] = sha256_hex(part / "documents.jsonl")
        index.save(part / "index")
        write_json(part / ORDERS, (orders or Orders.unfitted()).to_json())
        answers = known_answers(ranker, lattice, triples)
        write_json(part / QUALITY, [])
        write_json(part / "selftest.json", [dataclasses.asdict(answer) for answer in answers])
        (part / CARD).write_text(model_card, encoding="utf-8")
        _write_manifest(part, name, encoder, ranker, lattice, lexical_view)
        replace_folder(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return directory


def _write_manifest(
    part: Path, name: str, encoder: TextEncoder, ranker: TextRanker, lattice: Lattice, lexical_view: str
) -> None:
    """What is in the folder, byte for byte, and which versions belong together."""
    manifest = {
        "format": FORMAT,
        "name": name,
        "encoder_version": encoder.version,
        "ranker_version": ranker.version,
        "prompt_fingerprint": ranker.prompt.template.fingerprint,
        "label_ids": list(ranker.label_ids),
        "lexical_view": lexical_view,
        "lattice": lattice.to_json(),
        "files": {path: _stated(part / path) for path in _files(part)},
    }
    write_json(part / MANIFEST, manifest)


def _stated(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_hex(path), "size_bytes": path.stat().st_size}


def document_bundle(directory: str | Path, *, card: str, quality: Sequence[Mapping[str, Any]]) -> None:
    """Puts another card and measurements into a bundle, in one step; answers and revision stay what they are.

    Args: `quality` has a row per system; the server shows it.

    Raises: InputError when there is no bundle, or its folder cannot be written to.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    part = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    try:
        shutil.copytree(directory, part, copy_function=_link)
        for path in (MANIFEST, *DOCUMENTATION):
            (part / path).unlink()  # a link: the file itself belongs to the old folder too
        (part / CARD).write_text(card, encoding="utf-8")
        write_json(part / QUALITY, list(quality))
        manifest["files"] |= {path: _stated(part / path) for path in DOCUMENTATION}
        write_json(part / MANIFEST, manifest)
        replace_folder(part, directory)
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _link(source: str, target: str) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def revision_of(directory: str | Path) -> str:
    """Twelve hex digits that change with anything that answers depend on. Raises: InputError without a bundle."""
    manifest = _read_manifest(Path(directory))
    manifest["files"] = {
        path: entry for path, entry in manifest["files"].items() if path not in DOCUMENTATION
    }
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]


def load_bundle(directory: str | Path, *, dtype: Dtype = "float32") -> Bundle:
    """Reads a bundle after checking every byte of what is read; the ranker computes in `dtype`, all else in float32.

    Raises: InputError that lists every missing, unlisted or changed file, or every part that does not fit the
    others.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    _check_files(directory, manifest)
    try:
        return _load_checked(directory, manifest, dtype)
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory} lacks a part ({error!r}); export it again") from error


def read_lattice(directory: str | Path) -> Lattice:
    """The shapes of a bundle alone. Raises: InputError when there is no bundle."""
    return Lattice.from_json(_read_manifest(Path(directory)).get("lattice", {}))


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not (directory / MANIFEST).is_file():
        raise InputError(
            f"{directory} holds no bundle: make one with `make demo` (QUICK=1: the small one), or with python -m "
            "train.export"
        )
    manifest = read_object(directory / MANIFEST, hint="export the bundle again")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{directory / MANIFEST} is not a bundle of format {FORMAT}; export it again")
    return manifest


def _load_checked(directory: Path, manifest: Mapping[str, Any], dtype: Dtype) -> Bundle:
    vertical = load_vertical(directory / "vertical")
    encoder = load_encoder(directory / "encoder")
    ranker = load_ranker(directory / "ranker", dtype=dtype)
    with (directory / "documents.jsonl").open(encoding="utf-8", newline="\n") as file:
        records = [json.loads(line) for line in file]
    documents = [Document(record["id"], record["fields"]) for record in records]
    corpus_digest = manifest["files"]["documents.jsonl"]["sha256"]
    index = ExactIndex.load(directory / "index")
    made_from = index.metadata
    pairs = [
        ("the manifest's encoder", manifest["encoder_version"], "the encoder folder", encoder.version),
        (
            "the index was made by encoder",
            made_from["encoder"],
            "the encoder folder",
            encoder.version,
        ),
        ("the manifest's ranker", manifest["ranker_version"], "the ranker folder", ranker.version),
        (
            "the manifest's prompt",
            manifest["prompt_fingerprint"],
            "the ranker's prompt",
            ranker.prompt.template.fingerprint,
        ),
        ("the manifest's labels", manifest["label_ids"], "the ranker's labels", list(ranker.label_ids)),
        ("the index's corpus", made_from["documents_sha256"], "documents", corpus_digest),
        ("the index's width", index.embed_dim, "the encoder's", encoder.embed_dim),
        ("the index has the documents' ids", index.ids == [d.id for d in documents], "expected", True),
        ("BM25's view is known", manifest["lexical_view"] in vertical.views, "expected", True),
        ("the ranker's view is known", ranker.view in vertical.views, "expected", True),
    ]
    if wrong := [f"{left}: {a}, {right}: {b}" for left, a, right, b in pairs if a != b]:
        raise InputError("\n  ".join([f"{directory}: parts do not belong together; export it again", *wrong]))
    return Bundle(
        directory=directory,
        name=manifest["name"],
        revision=revision_of(directory),
        index_revision=manifest["files"]["index/embeds.npy"]["sha256"][:12],
        vertical=vertical,
        encoder=encoder,
        ranker=ranker,
        dtype=dtype,
        documents=documents,
        index=index,
        lexical_view=manifest["lexical_view"],
        orders=Orders.load(directory / ORDERS),
        lattice=Lattice.from_json(manifest["lattice"]),
        known_answers=[
            KnownAnswer(answer["query"], tuple(answer["documents"]), tuple(answer["scores"]))
            for answer in read_json(directory / "selftest.json", hint="export the bundle again")
        ],
        quality=read_json(directory / QUALITY, hint="export the bundle again"),
    )


def _check_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    listed, found = manifest.get("files"), set(_files(directory))
    if not isinstance(listed, dict):
        raise InputError(f"{directory / MANIFEST} lists no files; export it again")
    wrong = [f"missing: {path}" for path in sorted(listed.keys() - found)]
    wrong += [f"not in the manifest: {path}" for path in sorted(found - listed.keys())]
    for path in sorted(listed.keys() & found):
        if sha256_hex(directory / path) != listed[path]["sha256"]:
            wrong.append(f"changed: {path}")
    if wrong:
        raise InputError(f"{directory} is damaged; export it again\n  " + "\n  ".join(wrong))


def _files(directory: Path) -> list[str]:
    """Every file below, manifest and compiled programs excepted, as relative paths with forward slashes."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST and not path.startswith(f"{PROGRAMS}/"))
