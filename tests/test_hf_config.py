"""config.json ↔ our configs: both ways, with the defaults of `transformers`, refusing what we do not compute."""

import dataclasses
import json

import pytest

from jaxsearch.errors import InputError
from jaxsearch.nn.hf_config import config_from_hf, config_to_hf
from jaxsearch.nn.layers import RopeScaling
from jaxsearch.nn.transformer import DecoderConfig
from tests.small_models import CONFIGS, LLAMA, QWEN2, QWEN3

SCALINGS = [
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("dynamic", 2.0),
    RopeScaling("llama3", 8.0, 16, 1.0, 4.0),
    RopeScaling("yarn", 4.0, 16, attention_factor=1.2, beta_fast=16.0, beta_slow=2.0, truncate=False),
    RopeScaling("yarn", 4.0, 16, mscale=0.7, mscale_all_dim=1.1),
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["llama", "full llama", "qwen2", "qwen3"])
def test_configs_come_back(name, scaling):
    config = dataclasses.replace(CONFIGS[name], rope_scaling=scaling, rope_theta=5e5, norm_eps=1e-5)
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config
    newer = {key: value for key, value in written.items() if not key.startswith("rope_")}
    newer["rope_parameters"] = (written["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": 5e5}
    assert config_from_hf(newer) == config


def test_missing_keys_mean_what_transformers_means():
    config = config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": 48,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        }
    )
    assert config == DecoderConfig("llama", 48, 16, 24, 3, 4, 4, 4, norm_eps=1e-6, max_positions=2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"num_hidden_layers": "3"}, "`num_hidden_layers` is '3', expected int"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0"),
        ({"tie_word_embeddings": 1}, "`tie_word_embeddings` is 1, expected bool"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "`factor` is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "swirl": 1}}, "unknown RoPE setting `swirl`"),
        ({"rope_scaling": "linear"}, "expected an object"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        config_from_hf(config_to_hf(LLAMA) | change)


def test_all_config_problems_in_one_message():
    wrong = config_to_hf(LLAMA) | {"hidden_size": "16", "hidden_act": "relu", "vocab_size": None}
    with pytest.raises(InputError) as caught:
        config_from_hf(wrong)
    assert all(word in str(caught.value) for word in ("hidden_size", "hidden_act", "vocab_size"))


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(LLAMA, use_qk_norm=True),
        dataclasses.replace(LLAMA, use_qkv_bias=True),
        dataclasses.replace(QWEN2, use_output_bias=True),
        dataclasses.replace(QWEN3, use_mlp_bias=True),
    ],
)
def test_configs_that_no_family_can_state(config):
    with pytest.raises(InputError, match="cannot state"):
        config_to_hf(config)
