"""llama.cpp scores our weights as we do: what is written for it is the same model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from jaxsearch.errors import InputError
from jaxsearch.nn.convert import save_pretrained
from jaxsearch.nn.layers import RopeScaling, last_hidden
from tests.small_models import CONFIGS, LLAMA, make
from train.llama_scorer import BATCH_TOKENS, LlamaScorer, write_gguf

LABELS = (5, 11)
LONGEST = 60
FAMILIES = {
    "llama": LLAMA,
    "biased llama": CONFIGS["full llama"],
    "wide heads": dataclasses.replace(LLAMA, head_dim=8, rope_theta=1e5, norm_eps=1e-5, tie_embeddings=False),
    "qwen2": CONFIGS["qwen2"],
    "qwen3": dataclasses.replace(CONFIGS["qwen3"], use_qkv_bias=False, use_output_bias=False),
}
TOLERANCES = {("float32", False): 1e-5, ("float32", True): 0.01, ("bfloat16", True): 0.2}
"""By dtype and whether attention is flash; measured 3.6e-6, 3.3e-3 and 0.083, of scores that vary by 0.6 to 1.6."""


@pytest.fixture(scope="module")
def prompt():
    """A prefix, and items of all lengths, more than go into one batch."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, LLAMA.vocab_size, 20).tolist()
    items = [rng.integers(0, LLAMA.vocab_size, size).tolist() for size in rng.integers(1, 40, 60)]
    assert sum(map(len, items)) > max(BATCH_TOKENS.values())
    return prefix, items


def our_scores(decoder, prompts):
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([[len(prompt)] for prompt in prompts])
    where = jnp.asarray(np.arange(tokens.shape[1]) < lengths)
    hidden = last_hidden(decoder(jnp.asarray(tokens), where=where), where)
    logits = decoder.logits(hidden, jnp.array(LABELS))
    return np.asarray(logits[:, 0] - logits[:, 1])


@pytest.mark.parametrize(("dtype", "use_flash"), TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_score_as_we_do(tmp_path, prompt, family, dtype, use_flash):
    decoder = make(FAMILIES[family])
    save_pretrained(decoder, tmp_path)
    write_gguf(tmp_path / "model.gguf", tmp_path, decoder.config, dtype)
    scorer = LlamaScorer(
        tmp_path / "model.gguf", LABELS, dtype=dtype, max_tokens=LONGEST, use_flash=use_flash
    )
    prefix, items = prompt
    whole = [[*prefix, *item] for item in items]
    expected = our_scores(decoder, whole)
    for scores in (scorer((), whole), scorer(prefix, items), scorer(prefix, items[:1]), scorer((), whole)):
        difference = np.abs(scores - expected[: len(scores)]).max()
        assert difference <= TOLERANCES[dtype, use_flash]


def test_what_cannot_be_written_or_read_is_one_sentence(tmp_path):
    scaled = dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 2.0))
    with pytest.raises(InputError, match="RoPE scaling"):
        write_gguf(tmp_path / "model.gguf", tmp_path, scaled, "float32")
    normed = make(CONFIGS["qwen3"])
    save_pretrained(normed, tmp_path)
    with pytest.raises(InputError, match=r"k_norm.* has no name in a GGUF of llama"):
        write_gguf(
            tmp_path / "model.gguf", tmp_path, dataclasses.replace(normed.config, family="llama"), "float32"
        )
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="does not load"):
        LlamaScorer(tmp_path / "broken.gguf", LABELS, dtype="float32", max_tokens=LONGEST, use_flash=False)
