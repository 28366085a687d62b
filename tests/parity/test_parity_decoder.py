"""Decoders against `transformers`: parts, whole models, each parameter, every option, and back again."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from pairs import (
    DECODERS,
    SIZES,
    TOLERANCE,
    layer_of,
    make_pair,
    make_tokens,
    our_outputs,
    perturbed,
    record_calls,
    reference_outputs,
    relative_error,
)
from safetensors import safe_open

from jaxsearch.nn.attention import causal_mask, dense_attention
from jaxsearch.nn.convert import conversion_table, load_pretrained, save_pretrained
from jaxsearch.nn.layers import rope_frequencies
from jaxsearch.nn.transformer import Decoder, KeyValues

RICH = ("llama everything", "qwen2", "qwen3 attention bias")
"""Between them these have every parameter that exists, except an untied llama head (qwen2 has it)."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """One pair per case for the tests that change nothing."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = make_pair(case, tmp_path_factory.mktemp("model"))
        return made[case]

    return get


@pytest.mark.parametrize("case", DECODERS)
def test_logits(pairs, case):
    pair = pairs(case)
    tokens, where = make_tokens(pair.ours.config.vocab_size)
    error = relative_error(
        our_outputs(pair.ours, tokens, where), reference_outputs(pair.reference, tokens, where), where
    )
    print(f"MEASURED logits {case}: {error:.1e}")
    assert error <= TOLERANCE  # max 3.3e-6 (qwen2 yarn)


@pytest.mark.parametrize("case", RICH)
def test_parts(pairs, case):
    """Each part gets the reference's own input, so that no error hides behind an earlier one."""
    pair = pairs(case)
    model, config = pair.ours, pair.ours.config
    tokens, where = make_tokens(config.vocab_size)
    calls = record_calls(pair.reference, tokens, where)
    errors = {}

    def compare(name, run):
        given, expected = calls[f"model.{name}"]
        errors[name] = relative_error(run(jnp.asarray(given.numpy())), expected.numpy(), where)

    compare("embed_tokens", lambda ids: model.embed_tokens(jnp.asarray(ids, jnp.int32)))
    frequencies, amplitude = rope_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling, config.max_positions
    )
    angles = np.broadcast_to(
        np.arange(tokens.shape[1], dtype=np.float32)[:, None] * frequencies,
        (len(tokens), tokens.shape[1], len(frequencies)),
    )
    rotation = jnp.asarray(np.cos(angles) * amplitude), jnp.asarray(np.sin(angles) * amplitude)
    for ours, theirs in zip(rotation, calls["model.rotary_emb"][1], strict=True):
        errors["rotary_emb"] = relative_error(np.concatenate([ours[:1]] * 2, -1), theirs.numpy()[:1])
    mask = causal_mask(jnp.asarray(where))

    def attend(queries, keys, values):
        return dense_attention(queries, keys, values, mask)

    for index in range(config.num_layers):
        layer, at = layer_of(model.layers, index), f"layers.{index}"
        compare(f"{at}.input_layernorm", layer.input_layernorm)
        compare(f"{at}.post_attention_layernorm", layer.post_attention_layernorm)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            compare(f"{at}.self_attn.{projection}", getattr(layer.self_attn, projection))
        if config.use_qk_norm:
            compare(f"{at}.self_attn.q_norm", layer.self_attn.q_norm)
            compare(f"{at}.self_attn.k_norm", layer.self_attn.k_norm)
        compare(
            f"{at}.self_attn", lambda x, part=layer.self_attn: part.o_proj(part.mix(x, rotation, attend)[0])
        )
        compare(f"{at}.mlp", lambda x, part=layer.mlp: part.down_proj(part.widen(x)))
        compare(at, lambda x, part=layer: part(x, rotation, attend)[0])
    compare("norm", model.norm)
    hidden, expected = calls["lm_head"]
    errors["lm_head"] = relative_error(model.logits(jnp.asarray(hidden.numpy())), expected.numpy(), where)
    worst = max(errors, key=errors.__getitem__)
    print(f"MEASURED parts {case}: {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= TOLERANCE, errors  # max 1.2e-6


def _parameters(case):
    config = transformers.AutoConfig.for_model(case.split()[0], **SIZES | DECODERS[case])
    with torch.device("meta"):
        return [name for name, _ in transformers.AutoModelForCausalLM.from_config(config).named_parameters()]


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in RICH for name in _parameters(case)])
def test_each_parameter(pairs, case, name):
    """The same noise on one tensor of both changes the logits, and changes them alike."""
    pair = pairs(case)
    tokens, where = make_tokens(pair.ours.config.vocab_size)
    before = reference_outputs(pair.reference, tokens, where)
    (row,) = [row for row in conversion_table(pair.ours) if row.name == name]
    with perturbed(pair, row) as ours:
        after = reference_outputs(pair.reference, tokens, where)
    error = relative_error(our_outputs(ours, tokens, where), after, where)
    print(f"MEASURED parameter {case} {name}: {error:.1e}")
    assert relative_error(before, after, where) > 100 * TOLERANCE
    assert error <= TOLERANCE  # max 2.3e-6


@pytest.mark.parametrize("case", RICH)
def test_shared_prefix(pairs, case):
    """Items behind a shared prefix get the logits that `transformers` gives prefix and item in one sequence."""
    pair = pairs(case)
    vocab_size = pair.ours.config.vocab_size
    prefix, _ = make_tokens(vocab_size, (13,))
    items, where = make_tokens(vocab_size, (11, 4, 7))

    @nnx.jit
    def run(model: Decoder, prefix, items, where):
        key_values: KeyValues = model.prefill(prefix, jnp.ones(prefix.shape, bool))[1]
        return model.logits(model.attend_prefix(items[None], where[None], key_values))[0]

    ours = run(pair.ours, jnp.asarray(prefix), jnp.asarray(items), jnp.asarray(where))
    whole = np.concatenate([np.repeat(prefix, len(items), 0), items], axis=1)
    kept = np.concatenate([np.ones((len(items), prefix.shape[1]), bool), where], axis=1)
    expected = reference_outputs(pair.reference, whole, kept)[:, prefix.shape[1] :]
    error = relative_error(ours, expected, where)
    print(f"MEASURED shared prefix {case}: {error:.1e}")
    assert error <= TOLERANCE  # max 1.1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", RICH)
def test_stored_dtypes(tmp_path, case, dtype):
    """Weights stored in any dtype, computed in fp32 by both."""
    pair = make_pair(case, tmp_path, dtype)
    tokens, where = make_tokens(pair.ours.config.vocab_size)
    error = relative_error(
        our_outputs(pair.ours, tokens, where), reference_outputs(pair.reference, tokens, where), where
    )
    print(f"MEASURED stored {case} {dtype}: {error:.1e}")
    assert error <= TOLERANCE  # max 2.4e-6


@pytest.mark.parametrize("case", DECODERS)
def test_export(pairs, tmp_path, case):
    """`transformers` loads what we write, complains of nothing and computes what it did; a shard or many."""
    pair = pairs(case)
    save_pretrained(pair.ours, tmp_path, shard_bytes=20_000 if "gqa" in case else 1 << 30)
    exported, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    tokens, where = make_tokens(pair.ours.config.vocab_size)
    expected = reference_outputs(pair.reference, tokens, where)
    np.testing.assert_array_equal(reference_outputs(exported.eval(), tokens, where), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_shards", ["one", "many"])
def test_bits_survive(tmp_path, dtype, num_shards):
    """What `transformers` saved, single or sharded, comes back bit for bit."""
    pair = make_pair("qwen3 attention bias", tmp_path / "single", getattr(torch, dtype))
    size = "20KB" if num_shards == "many" else "1GB"
    pair.reference.to(getattr(torch, dtype)).save_pretrained(tmp_path / "in", max_shard_size=size)
    shards = sorted((tmp_path / "in").glob("*.safetensors"))
    assert (len(shards) > 1) == (num_shards == "many")
    save_pretrained(load_pretrained(tmp_path / "in", param_dtype=jnp.dtype(dtype)), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as written:
        for shard in shards:
            with safe_open(shard, "pt") as read:
                for name in read.keys():  # noqa: SIM118
                    assert written.get_tensor(name).dtype == read.get_tensor(name).dtype
                    assert torch.equal(written.get_tensor(name), read.get_tensor(name)), name
        assert len(written.keys()) == len(conversion_table(pair.ours))
