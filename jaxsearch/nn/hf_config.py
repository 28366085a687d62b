"""`config.json` of Hugging Face ↔ our configs. What we cannot compute is refused, never dropped.

Missing keys mean what the config classes of `transformers` mean by them. Written configs use the keys that both
`transformers` 4 and 5 read (`rope_theta` and `rope_scaling`). Next: `convert.py`, which reads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxsearch.errors import InputError
from jaxsearch.nn.bert import BertConfig
from jaxsearch.nn.layers import RopeScaling
from jaxsearch.nn.transformer import FAMILIES, DecoderConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "bert": "BertModel",
}

_MAX_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}
_ROPE_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
_ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": tuple(key for key in _ROPE_FIELDS if "freq_factor" not in key),
}
_ABSENT = object()


class _Reader:
    """Looks keys up and gathers what is wrong, so that one error can state it all."""

    def __init__(self, config: Mapping[str, Any]):
        self.config, self.problems = config, []

    def get(self, key: str, kind: type, default: Any = _ABSENT) -> Any:
        """The value, `default` where the key is absent or null; a required or mistyped key becomes a problem."""
        value = self.config.get(key)
        if value is None:
            if default is _ABSENT:
                self.problems.append(f"`{key}` is missing")
                return kind(1)
            return default
        is_bool = isinstance(value, bool)
        if is_bool != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            self.problems.append(f"`{key}` is {value!r}, expected {kind.__name__}")
            return kind(1)
        if kind is int and value < 1:
            self.problems.append(f"`{key}` is {value}, expected a positive number")
            return 1
        return kind(value)

    def expect(self, key: str, *allowed: Any) -> None:
        """A key whose other values would change the computation."""
        value = self.config.get(key)
        if value is not None and value not in allowed:
            self.problems.append(f"`{key}` is {value!r}, supported: {', '.join(map(repr, allowed))}")


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig | BertConfig:
    """Our config from the contents of a config.json.

    Raises:
        InputError: another `model_type`, a missing or mistyped key, or an option that we do not compute (sliding
            windows, partial rotary, quantised weights, other activations); every problem in one message.
    """
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise InputError(f"model_type {family!r} is not supported; use one of {', '.join(ARCHITECTURES)}")
    reader = _Reader(config)
    if config.get("quantization_config") is not None:
        reader.problems.append("`quantization_config` is set; use the unquantised checkpoint")
    fields = _bert_fields(reader) if family == "bert" else _decoder_fields(reader, family)
    if reader.problems:
        raise InputError(f"config.json of a {family} model cannot be used: {'; '.join(reader.problems)}")
    return BertConfig(**fields) if family == "bert" else DecoderConfig(**fields)


def config_to_hf(config: DecoderConfig | BertConfig) -> dict[str, Any]:
    """The contents of a config.json from which `transformers` computes the same; inverse of `config_from_hf`.

    Raises:
        InputError: options that no config of this family can state, such as q/k norm in a llama model.
    """
    if isinstance(config, BertConfig):
        return {
            "architectures": [ARCHITECTURES["bert"]],
            "model_type": "bert",
            "vocab_size": config.vocab_size,
            "hidden_size": config.embed_dim,
            "intermediate_size": config.mlp_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "max_position_embeddings": config.max_positions,
            "type_vocab_size": config.num_token_types,
            "layer_norm_eps": config.norm_eps,
            "hidden_act": config.activation,
        }
    written = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config),
        "attention_bias": config.use_qkv_bias,
        "mlp_bias": config.use_mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
    }
    read_back = _decoder_fields(_Reader(written), config.family)
    options = ("use_qk_norm", "use_qkv_bias", "use_output_bias", "use_mlp_bias")
    lost = [f"{key}={getattr(config, key)}" for key in options if getattr(config, key) != read_back[key]]
    if lost:
        raise InputError(
            f"a {config.family} config.json cannot state {', '.join(lost)}; choose the family whose layers these are"
        )
    return written


def _decoder_fields(reader: _Reader, family: str) -> dict[str, Any]:
    assert family in FAMILIES
    embed_dim, num_heads = reader.get("hidden_size", int), reader.get("num_attention_heads", int)
    num_layers = reader.get("num_hidden_layers", int)
    max_positions = reader.get("max_position_embeddings", int, _MAX_POSITIONS[family])
    attention_bias = family == "qwen2" or reader.get("attention_bias", bool, False)
    reader.expect("hidden_act", "silu", "swish")
    reader.expect("partial_rotary_factor", 1, 1.0)
    if set(reader.config.get("layer_types") or ()) - {"full_attention"} or (
        reader.config.get("use_sliding_window")
        and reader.config.get("sliding_window") is not None
        and reader.get("max_window_layers", int, 28) < num_layers
    ):
        reader.problems.append("sliding-window attention is not supported; set `use_sliding_window` to false")
    return {
        "family": family,
        "vocab_size": reader.get("vocab_size", int),
        "embed_dim": embed_dim,
        "mlp_dim": reader.get("intermediate_size", int),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": reader.get("num_key_value_heads", int, num_heads if family == "llama" else 32),
        "head_dim": reader.get("head_dim", int, 128 if family == "qwen3" else embed_dim // num_heads),
        **_rope_fields(reader),
        "norm_eps": reader.get("rms_norm_eps", float, 1e-6),
        "max_positions": max_positions,
        "use_qk_norm": family == "qwen3",
        "use_qkv_bias": attention_bias,
        "use_output_bias": attention_bias and family != "qwen2",
        "use_mlp_bias": family == "llama" and reader.get("mlp_bias", bool, False),
        "tie_embeddings": reader.get("tie_word_embeddings", bool, False),
    }


def _bert_fields(reader: _Reader) -> dict[str, Any]:
    reader.expect("position_embedding_type", "absolute")
    reader.expect("is_decoder", False)
    reader.expect("add_cross_attention", False)
    return {
        "vocab_size": reader.get("vocab_size", int, 30522),
        "embed_dim": reader.get("hidden_size", int),
        "mlp_dim": reader.get("intermediate_size", int),
        "num_layers": reader.get("num_hidden_layers", int),
        "num_heads": reader.get("num_attention_heads", int),
        "max_positions": reader.get("max_position_embeddings", int, 512),
        "num_token_types": reader.get("type_vocab_size", int, 2),
        "norm_eps": reader.get("layer_norm_eps", float, 1e-12),
        "activation": reader.get("hidden_act", str, "gelu"),
    }


def _rope_fields(reader: _Reader) -> dict[str, Any]:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4); the former wins."""
    stated = reader.config.get("rope_parameters") or reader.config.get("rope_scaling") or {}
    if not isinstance(stated, Mapping):
        reader.problems.append(f"the RoPE settings are {stated!r}, expected an object")
        stated = {}
    rope = _Reader({key: value for key, value in stated.items() if value is not None})
    theta = rope.get("rope_theta", float, reader.get("rope_theta", float, 10_000.0))
    rope_type = rope.get("rope_type", str, rope.get("type", str, "default"))
    rope.expect("partial_rotary_factor", 1, 1.0)
    scaling = None
    if rope_type != "default" and rope_type not in _ROPE_KEYS:
        rope.problems.append(f"RoPE type {rope_type!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    elif rope_type != "default":
        known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_ROPE_FIELDS}
        rope.problems += [f"unknown RoPE setting `{key}`" for key in rope.config if key not in known]
        kinds = {"truncate": bool, "original_max_position_embeddings": int}
        rope.get("factor", float)
        values = {
            _ROPE_FIELDS[key]: rope.get(key, kinds.get(key, float))
            for key in _ROPE_KEYS[rope_type]
            if key in rope.config
        }
        if not rope.problems:
            scaling = RopeScaling(rope_type, **values)
    reader.problems += rope.problems
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    values = {key: getattr(scaling, _ROPE_FIELDS[key]) for key in _ROPE_KEYS[scaling.rope_type]}
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = scaling.original_max_positions or config.max_positions
    return {"rope_type": scaling.rope_type} | {k: v for k, v in values.items() if v is not None}
