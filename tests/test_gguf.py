"""GGUF files written here as llama.cpp's converter writes them; the real SmolLM2 is in tests/parity."""

import dataclasses

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsearch.errors import InputError
from jaxsearch.nn.convert import load_pretrained, save_pretrained
from jaxsearch.nn.layers import RopeScaling
from tests.small_models import CONFIGS, LLAMA, assert_same_bits, make


def write_gguf(path, config, tensors, quantised=(), **changes):
    """What llama.cpp's converter writes for this model, q and k rows of llama permuted as it permutes them."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    arch = changes.get("arch", config.family)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling.rope_type))
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling.original_max_positions)
    for name, values in tensors.items():
        stem, kind = name.rsplit(".", 1)
        parts = stem.split(".")
        if arch == "llama" and parts[-1] in ("q_proj", "k_proj"):
            heads = config.num_heads if parts[-1] == "q_proj" else config.num_kv_heads
            halves = values.reshape(heads, 2, config.head_dim // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if stem in names:
            written = names[stem]
        else:
            part = names.get(parts[3]) or (
                parts[-1].replace("_proj", "").replace("o", "output", parts[-1] == "o_proj")
            )
            if parts[3] == "self_attn":
                part = f"attn_{part}"
            elif parts[3] == "mlp":
                part = f"ffn_{part}"
            written = f"blk.{parts[2]}.{part}"
        if name in quantised:
            kind_of_blocks = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quantize(values, kind_of_blocks)
            writer.add_tensor(f"{written}.{kind}", blocks, raw_dtype=kind_of_blocks)
        else:
            writer.add_tensor(f"{written}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "full llama"])
def test_gguf_equals_safetensors(tmp_path, name):
    config = CONFIGS[name]
    if name == "qwen3":  # llama.cpp has no biases here
        config = dataclasses.replace(config, use_qkv_bias=False, use_output_bias=False)
    if name == "qwen2":
        config = dataclasses.replace(config, rope_scaling=RopeScaling("yarn", 4.0, 16), norm_eps=1e-5)
    model = make(config)
    save_pretrained(model, tmp_path)
    write_gguf(tmp_path / "model.gguf", config, load_file(tmp_path / "model.safetensors"))
    loaded = load_pretrained(tmp_path / "model.gguf")
    assert loaded.config == config
    assert_same_bits(loaded, model)


def test_gguf_blocks_are_decoded(tmp_path):
    config = dataclasses.replace(LLAMA, embed_dim=32, mlp_dim=64, head_dim=8)
    model = make(config)
    save_pretrained(model, tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    write_gguf(tmp_path / "model.gguf", config, tensors, quantised=(name,))
    loaded = load_pretrained(tmp_path / "model.gguf")
    kernel = np.asarray(loaded.layers.mlp.down_proj.kernel[...])[1].T
    q8 = gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(
        kernel, gguf.dequantize(gguf.quantize(tensors[name], q8), q8).reshape(32, 64)
    )
    assert 0 < np.abs(kernel - tensors[name]).max() < 0.02  # half a step of 1/127 of values up to 3.5


def test_gguf_that_is_refused(tmp_path):
    model = make(LLAMA)
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    file = tmp_path / "model.gguf"

    write_gguf(file, LLAMA, tensors, arch="gemma")
    with pytest.raises(InputError, match="architecture 'gemma' is not supported"):
        load_pretrained(file)
    write_gguf(
        file, LLAMA, tensors | {"model.layers.0.self_attn.z_proj.weight": np.zeros((4, 4), np.float32)}
    )
    with pytest.raises(InputError, match=r"unmapped: blk\.0\.attn_z\.weight"):
        load_pretrained(file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="not a readable GGUF file"):
        load_pretrained(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not a readable GGUF file"):
        load_pretrained(file)
