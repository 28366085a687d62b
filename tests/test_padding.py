"""The demo's batches on its own data, without its models: how much of what a step computes is padding."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from configs.demo import encoder as encoder_config
from configs.demo import judge as judge_config
from configs.demo import ranker as ranker_config
from jaxsearch.data.assets import fetch
from jaxsearch.data.prompts import PromptEncoder
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.encoder import Encoder, TextEncoder
from jaxsearch.judge import new_judge
from jaxsearch.nn.bert import Bert, BertConfig
from jaxsearch.nn.transformer import Decoder
from jaxsearch.ranker import new_ranker
from tests.small_models import LLAMA
from train.encoder import EncoderData
from train.inputs import load_data, pair_texts
from train.judge import JudgeData
from train.ranker import RankerData

STEPS = 40
MOST = 0.10


@pytest.fixture(scope="module")
def data():
    return load_data(ranker_config.config(), needs=("train",))


@pytest.fixture(scope="module")
def prompts(data):
    """Prompt encoders of ranker and judge on the real tokenizer, and a tiny decoder that holds its vocabulary."""
    tokenizer = Tokenizer.from_path(fetch("smollm2"))
    decoder = Decoder(dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size), rngs=nnx.Rngs(0))

    def prompt(name, config):
        limits = {"max_shared_tokens": config.max_shared_tokens, "max_item_tokens": config.max_item_tokens}
        return PromptEncoder(data[1].prompts[name], tokenizer, **limits)

    return decoder, prompt


def padding_of(batches, arrays_of):
    arrays = [array for batch in batches for array in arrays_of(batch)]
    return 1 - sum(int((array > 0).sum()) for array in arrays) / sum(array.size for array in arrays)


def shapes_of(batches, arrays_of):
    return {tuple(array.shape for array in arrays_of(batch)) for batch in batches}


def test_the_rankers_batches_are_full(data, prompts):
    collection, vertical = data
    config = dataclasses.replace(ranker_config.config(), labels="")
    decoder, prompt = prompts
    ranker = new_ranker(decoder, prompt("ranker", config), view=config.view)
    made = RankerData(ranker, collection, vertical, {}, [], config)
    batches = [made.batch(i) for i in range(STEPS)]

    def arrays_of(batch):
        return batch.prefix_ids, batch.segment_ids

    assert padding_of(batches, arrays_of) <= MOST  # measured .080
    assert len(shapes_of(batches, arrays_of)) <= 8  # measured 6


def test_the_encoders_batches_are_full(data):
    collection, vertical = data
    config = encoder_config.config()
    tokenizer = Tokenizer.from_path(fetch("minilm"))
    bert = Bert(
        BertConfig(tokenizer.vocab_size, embed_dim=8, mlp_dim=8, num_layers=1, num_heads=1), rngs=nnx.Rngs(0)
    )
    encoder = TextEncoder(Encoder(bert), tokenizer, max_query_tokens=64, max_document_tokens=128)
    made = EncoderData(encoder, collection, vertical, {}, config)
    batches = [made.batch(i) for i in range(STEPS)]

    def arrays_of(batch):
        return (batch.segment_ids,)

    assert padding_of(batches, arrays_of) <= MOST  # measured .078
    assert len(shapes_of(batches, arrays_of)) <= 6  # measured 4


def test_the_judges_batches_are_full(data, prompts):
    collection, vertical = data
    config = judge_config.config()
    decoder, prompt = prompts
    judge = new_judge(decoder, prompt("judge", config), policy=vertical.policy, view=config.view)
    rng = np.random.default_rng(0)
    documents, queries = list(collection.documents), [query.id for query in collection.split("train")]
    pairs = [(str(rng.choice(queries)), str(rng.choice(documents))) for _ in range(320)]
    texts = pair_texts(collection, vertical, pairs, view=config.view)
    made = JudgeData(judge, texts, [0] * len(texts), config)
    batches = [made.batch(i) for i in range(STEPS)]

    def arrays_of(batch):
        return (batch.segment_ids,)

    assert padding_of(batches, arrays_of) <= MOST  # measured .078
    assert len(shapes_of(batches, arrays_of)) <= 6  # measured 4
