"""The real SmolLM2 (from GGUF) and the real MiniLM against `transformers`."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from pairs import TOLERANCE, our_outputs, reference_outputs, relative_error

from jaxsearch.data.assets import fetch
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.nn.convert import load_pretrained, save_pretrained
from jaxsearch.nn.transformer import Decoder

TEXTS = (
    "Negotiate labor disputes.",
    "Registered nurses assess patient health problems and needs, develop and implement nursing care plans, and "
    "maintain medical records. May advise patients on health maintenance and disease prevention.",
    "3 x 17 = 51; naïve café, 東京",
)


def _batch(token_lists):
    where = np.arange(max(map(len, token_lists))) < np.array([[len(tokens)] for tokens in token_lists])
    padded = np.zeros(where.shape, np.int32)
    padded[where] = np.concatenate(token_lists)
    return padded, where


@pytest.fixture(scope="module")
def gguf_file():
    (file,) = _files(fetch("smollm2"))
    return file


def _files(path):
    return [path] if path.is_file() else sorted(path.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(gguf_file):
    return load_pretrained(gguf_file)


@pytest.fixture(scope="module")
def tokens(gguf_file):
    return _batch(Tokenizer.from_path(gguf_file).encode_batch(list(TEXTS)))


@pytest.fixture(scope="module")
def independent(gguf_file):
    """The published sizes, and weights decoded by the `gguf` package and placed here, by none of our code."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    decoded = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(gguf_file).tensors}
    weights = {
        "model.embed_tokens": decoded["token_embd.weight"],
        "model.norm": decoded["output_norm.weight"],
    }
    weights["lm_head"] = weights["model.embed_tokens"]
    # llama.cpp puts channel c and its rotary partner c + 32 of a head of 64 into rows 2c and 2c + 1.
    within_head = np.array([2 * (channel % 32) + channel // 32 for channel in range(64)])
    for layer in range(30):
        for theirs, name in parts.items():
            values = decoded[f"blk.{layer}.{name}.weight"]
            if name in ("attn_q", "attn_k"):
                rows = np.concatenate([64 * head + within_head for head in range(len(values) // 64)])
                values = values[rows]
            weights[f"model.layers.{layer}.{theirs}"] = values
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict({f"{name}.weight": torch.tensor(values) for name, values in weights.items()})
    return model.eval()


def test_smollm2(smollm2, independent, tokens):
    error = relative_error(our_outputs(smollm2, *tokens), reference_outputs(independent, *tokens), tokens[1])
    print(f"MEASURED smollm2: {error:.1e}")
    assert error <= TOLERANCE  # max 6.0e-6


def test_smollm2_shared_prefix(smollm2, independent, tokens):
    """One text as the prefix of the others."""
    padded, where = tokens
    prefix, prefix_where = padded[:1], where[:1]

    @nnx.jit
    def run(model: Decoder, *inputs):
        key_values = model.prefill(*inputs[:2])[1]
        return model.logits(model.attend_prefix(*inputs[2:], key_values))[0]

    ours = run(smollm2, *map(jnp.asarray, (prefix, prefix_where, padded[None, 1:], where[None, 1:])))
    for row, item in enumerate(padded[i][where[i]] for i in (1, 2)):
        whole = np.concatenate([prefix[prefix_where], item])[None]
        expected = reference_outputs(independent, whole, np.ones_like(whole, bool))[0, -len(item) :]
        error = relative_error(ours[row, : len(item)], expected)
        print(f"MEASURED smollm2 shared prefix: {error:.1e}")
        assert error <= TOLERANCE  # max 2.2e-6


def test_smollm2_export(smollm2, independent, tokens, tmp_path):
    """`transformers` loads what we write, finds the same bits as in the GGUF file, and computes the same."""
    save_pretrained(smollm2, tmp_path)
    exported, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    expected = dict(independent.named_parameters())
    for name, param in exported.named_parameters():
        assert torch.equal(param, expected.pop(name)), name
    assert not expected
    np.testing.assert_array_equal(
        reference_outputs(exported.eval(), *tokens), reference_outputs(independent, *tokens)
    )


def test_minilm(tmp_path):
    """Hidden states and sentence embeddings; then the same of the exported folder."""
    folder = fetch("minilm")
    batch = _batch(Tokenizer.from_path(folder).encode_batch(list(TEXTS), special=True))
    ours = load_pretrained(folder)
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    hidden, expected = our_outputs(ours, *batch), reference_outputs(reference, *batch)
    error = relative_error(hidden, expected, batch[1])
    embedding_error = np.abs(_embed(hidden, batch[1]) - _embed(expected, batch[1])).max()
    print(f"MEASURED minilm: hidden {error:.1e}, sentence embeddings {embedding_error:.1e}")
    assert error <= TOLERANCE  # max 5.9e-7
    assert embedding_error <= 1e-5  # max 1.6e-7

    save_pretrained(ours, tmp_path)
    exported = transformers.BertModel.from_pretrained(
        tmp_path, attn_implementation="eager", add_pooling_layer=False
    )
    np.testing.assert_array_equal(reference_outputs(exported.eval(), *batch), expected)


def _embed(hidden, where):
    """Mean over the tokens, then unit length."""
    mean = (hidden * where[..., None]).sum(1) / where.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)
