"""A real bundle of tiny random models and made-up documents, for the tests of bundle and server."""

import hashlib
import json
from pathlib import Path

import tokenizers
from flax import nnx

from jaxsearch.bundle import MANIFEST, write_bundle
from jaxsearch.calibration import IsotonicMap
from jaxsearch.data.prompts import PromptEncoder, PromptTemplate
from jaxsearch.data.records import Document
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.encoder import Encoder, TextEncoder, load_encoder, save_encoder
from jaxsearch.nn.bert import Bert, BertConfig
from jaxsearch.nn.transformer import Decoder, DecoderConfig
from jaxsearch.ranker import new_ranker, save_ranker
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.search.orders import UNFITTED, Order, Orders

SPECIAL = ("<|im_start|>", "<|im_end|>", "<unk>")
RANKER_PROMPT = """<|im_start|>user
Does the work include it? {query}
---
Work: {document}<|im_end|>
<|im_start|>assistant
"""
JUDGE_PROMPT = """{policy}
---
{query} {document}
Grade:
"""
DOCUMENTS = [
    Document("baker", {"title": "Baker", "tasks": ["Mix dough.", "Bake bread."], "pay": 30, "remote": False}),
    Document("coder", {"title": "Programmer", "tasks": ["Write code."], "pay": 80.5, "remote": True}),
    Document("nurse", {"title": "Nurse", "tasks": ["Care for patients."], "pay": 50, "remote": False}),
    Document("miner", {"title": "Data miner", "tasks": ["Write code.", "Dig for data."], "pay": 70}),
    Document("smith", {"title": "Smith\u2028of iron", "tasks": ["Forge iron."], "pay": 40, "remote": False}),
]
MAX_ITEM_TOKENS = 64
RANKER_ORDER = Order("ranker", {"ranker": 1.0}, calibration=IsotonicMap((-1.0, 1.0), (0.1, 0.9)))
ORDERS = Orders({order.name: order for order in (*UNFITTED, RANKER_ORDER)}, "ranker", "Served: ranker.", 20)
"""The ranker sorts, since the tests of the server are about it."""


def tiny_tokenizer() -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["Yes", "No", *SPECIAL]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(alphabet) + place,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": word in SPECIAL,
            }
            for place, word in enumerate(words)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {word: place for place, word in enumerate([*alphabet, *words])},
            "merges": [],
        },
    }
    return Tokenizer(spec, {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"})


def write_parts(root: Path) -> dict[str, Path]:
    """Model folders and a vertical under `root`."""
    tokenizer = tiny_tokenizer()
    bert = BertConfig(
        tokenizer.vocab_size, embed_dim=16, mlp_dim=24, num_layers=1, num_heads=2, max_positions=64
    )
    encoder = TextEncoder(
        Encoder(Bert(bert, rngs=nnx.Rngs(1))),
        tokenizer,
        query_instruction="Find: ",
        max_query_tokens=24,
        max_document_tokens=32,
    )
    save_encoder(root / "encoder", encoder, trained={})
    decoder = DecoderConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        embed_dim=16,
        mlp_dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        max_positions=160,
        use_qk_norm=False,
        use_qkv_bias=False,
        use_output_bias=False,
        use_mlp_bias=False,
        tie_embeddings=True,
    )
    template = PromptTemplate.from_text(RANKER_PROMPT)
    prompt = PromptEncoder(template, tokenizer, max_shared_tokens=80, max_item_tokens=MAX_ITEM_TOKENS)
    ranker = new_ranker(Decoder(decoder, rngs=nnx.Rngs(2)), prompt, view="short")
    save_ranker(root / "ranker", ranker, trained={})
    vertical = root / "vertical"
    (vertical / "prompts").mkdir(parents=True)
    (vertical / "vertical.toml").write_text(
        'name = "jobs"\nquery_instruction = "Find: "\nrelevant_threshold = 2\n'
        'examples = ["write code", "bake bread"]\n'
        '[views]\nshort = ["title"]\nfull = ["title", "tasks"]\n'
    )
    (vertical / "policy.md").write_text("Grade 4 when it fits.\n")
    (vertical / "prompts" / "judge.txt").write_text(JUDGE_PROMPT)
    (vertical / "prompts" / "ranker.txt").write_text(RANKER_PROMPT)
    return {"encoder": root / "encoder", "ranker": root / "ranker", "vertical": vertical}


def tiny_index(parts: dict[str, Path]) -> ExactIndex:
    encoder = load_encoder(parts["encoder"])
    embeds = encoder.embed_documents([f"{document.fields['title']}." for document in DOCUMENTS])
    ids = [document.id for document in DOCUMENTS]
    return ExactIndex(embeds, ids, metadata={"encoder": encoder.version, "view": "short"})


def write_tiny_bundle(root: Path) -> Path:
    parts = write_parts(root / "parts")
    return write_bundle(
        root / "bundle",
        name="tiny",
        encoder_directory=parts["encoder"],
        ranker_directory=parts["ranker"],
        vertical_directory=parts["vertical"],
        documents=DOCUMENTS,
        index=tiny_index(parts),
        lexical_view="full",
        max_batch_tokens=256,
        orders=ORDERS,
        triples=[("bake bread", "Baker", "Nurse"), ("bake bread", "Nurse", "Baker")],
        model_card="# tiny\n",
    )


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def relist(directory: Path) -> None:
    """Writes the true digests into the manifest, so that only the mismatch is left to find."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for path, entry in manifest["files"].items():
        entry["sha256"] = hashlib.sha256((directory / path).read_bytes()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(manifest))
