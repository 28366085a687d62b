"""Embeds a collection's documents with an encoder and writes a search index.

    python -m train.index --config configs/demo/index.py --workdir work/demo/index

The folder `index/` says which encoder, view and data it was made from; a bundle refuses an index of another
encoder.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.retrieval.scann import ScannIndex
from train.first_stage import embed_corpus
from train.inputs import load_data, load_retriever
from train.options import run, say


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """What is indexed, and how."""

    kind: Literal["exact", "scann", "bm25"] = "exact"
    """exact: scanned on the device, with filters; scann: approximate, on the CPU; bm25: by words, no encoder."""
    encoder: str = "work/encoder/model"
    """Asset, hub name or folder of the encoder."""
    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet)."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields and views."""
    view: str = "short"
    """Which view of a document is embedded."""


def build_index(config: IndexConfig) -> ExactIndex | ScannIndex | Bm25Index:
    """The index in memory, its metadata filled in."""
    collection, vertical = load_data(config, view=config.view)
    ids = list(collection.documents)
    texts = [vertical.document_text(document, config.view) for document in collection.documents.values()]
    metadata = {"collection": collection.name, "data": collection.fingerprint(), "view": config.view}
    if config.kind == "bm25":
        return Bm25Index(texts, ids, metadata=metadata)
    encoder = load_retriever(config.encoder)
    make = ExactIndex if config.kind == "exact" else ScannIndex
    return make(embed_corpus(encoder, texts), ids, metadata=metadata | {"encoder": encoder.version})


def main(config: IndexConfig, workdir: Path) -> None:
    started = time.monotonic()
    index = build_index(config)
    index.save(workdir / "index")
    seconds = time.monotonic() - started
    by = "" if config.kind == "bm25" else f" by {config.encoder}"
    say(f"{len(index.ids)} documents indexed ({config.kind}{by}) in {seconds:.1f} s: {workdir / 'index'}")


if __name__ == "__main__":
    run(main, IndexConfig)
