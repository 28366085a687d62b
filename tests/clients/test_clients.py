"""Other services' own clients over loopback: what they get back is what the library computes.

Cohere, OpenAI, Voyage and Hugging Face, from their packages, with nothing changed but the address.
"""

import cohere
import huggingface_hub
import numpy as np
import openai
import pytest
import voyageai
from scipy.special import expit

from jaxsearch.bundle import load_bundle
from jaxsearch.scoring.prefill import ScoreRequest
from tests.live_server import running, wait_until_ready
from tests.tiny_bundle import write_tiny_bundle

TEXTS = ["Baker.", "Nurse.", "Someone who bakes bread all night long."]
MODEL = "tiny"

# These packages leave their sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
KEY = "any-key"


@pytest.fixture(scope="module")
def bundle_directory(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def address(bundle_directory, tmp_path_factory):
    with running(bundle_directory, tmp_path_factory.mktemp("serve") / "log") as (_, client):
        wait_until_ready(client)
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="module")
def scores(bundle_directory) -> np.ndarray:
    """p(yes) of each text for "bread", from the library."""
    bundle = load_bundle(bundle_directory)
    prompt = bundle.ranker.request("bread", TEXTS)
    logits = bundle.scorer().score([ScoreRequest(prompt.prefix, prompt.items)])[0]
    return expit(bundle.ranker.scores(logits))


@pytest.fixture(scope="module")
def embeds(bundle_directory) -> np.ndarray:
    return load_bundle(bundle_directory).encoder.embed_documents(TEXTS)


def agrees(ranked: list[tuple[int, float]], scores: np.ndarray, count: int = 3) -> bool:
    """Best first, the right documents, scores within 1e-5 (measured maximum 6e-8)."""
    order = np.argsort(-scores, kind="stable")[:count]
    indices, values = zip(*ranked, strict=True)
    return list(indices) == order.tolist() and bool(np.allclose(values, scores[order], atol=1e-5, rtol=0))


def test_cohere_reranks_in_both_versions(address, scores):
    for make in (cohere.ClientV2, cohere.Client):
        client = make(api_key=KEY, base_url=address)
        reply = client.rerank(model=MODEL, query="bread", documents=TEXTS, top_n=2)
        assert agrees([(row.index, row.relevance_score) for row in reply.results], scores, 2)


def test_cohere_embeds(address, embeds):
    client = cohere.ClientV2(api_key=KEY, base_url=address)
    reply = client.embed(
        model=MODEL, texts=TEXTS, input_type="search_document", embedding_types=["float", "base64"]
    )
    np.testing.assert_allclose(reply.embeddings.float_, embeds, atol=1e-6)
    with pytest.raises(cohere.errors.BadRequestError, match=r"embedding_types.*float.*base64"):
        client.embed(model=MODEL, texts=TEXTS, input_type="search_document", embedding_types=["int8"])


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"dimensions": 16}])
def test_openai_embeds(address, embeds, options):
    with openai.OpenAI(api_key=KEY, base_url=f"{address}/v1") as client:
        reply = client.embeddings.create(model=MODEL, input=TEXTS, **options)
        np.testing.assert_allclose([row.embedding for row in reply.data], embeds, atol=1e-6)
        assert reply.usage.total_tokens > 0
        with pytest.raises(openai.BadRequestError, match="dimensions must be 16"):
            client.embeddings.create(model=MODEL, input=TEXTS, dimensions=7)
        with pytest.raises(openai.NotFoundError, match="use one of 'tiny'"):
            client.embeddings.create(model="text-embedding-3-small", input=TEXTS)


def test_voyage_reranks_and_embeds(address, scores, embeds):
    client = voyageai.Client(api_key=KEY, base_url=f"{address}/v1")
    reply = client.rerank("bread", TEXTS, model=MODEL, top_k=2)
    assert agrees([(row.index, row.relevance_score) for row in reply.results], scores, 2)
    assert [row.document for row in reply.results] == [TEXTS[row.index] for row in reply.results]
    found = client.embed(TEXTS, model=MODEL, input_type="document")
    np.testing.assert_allclose(found.embeddings, embeds, atol=1e-6)


def test_hugging_face_embeds(address, embeds):
    client = huggingface_hub.InferenceClient(model=f"{address}/embed", token=KEY)
    for text, expected in zip(TEXTS, embeds, strict=True):
        np.testing.assert_allclose(client.feature_extraction(text)[0], expected, atol=1e-6)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        client.feature_extraction(" ")
