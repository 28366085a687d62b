"""BERT against `transformers`: parts, whole models, each parameter, and back again."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from pairs import (
    BERTS,
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

from jaxsearch.nn.convert import conversion_table, save_pretrained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BERTS)
def test_hidden_states(tmp_path, case, dtype):
    pair = make_pair(case, tmp_path, dtype)
    tokens, where = make_tokens(pair.ours.config.vocab_size)
    error = relative_error(
        our_outputs(pair.ours, tokens, where), reference_outputs(pair.reference, tokens, where), where
    )
    print(f"MEASURED hidden {case} {dtype}: {error:.1e}")
    assert error <= TOLERANCE  # max 7.4e-7


@pytest.mark.parametrize("case", BERTS)
def test_parts(tmp_path, case):
    """Each part gets the reference's own input, so that no error hides behind an earlier one."""
    pair = make_pair(case, tmp_path)
    model = pair.ours
    tokens, where = make_tokens(model.config.vocab_size)
    calls = record_calls(pair.reference, tokens, where)
    positions = jnp.arange(tokens.shape[1])[None]
    errors = {
        "embeddings": relative_error(
            model.embeddings(jnp.asarray(tokens), positions), calls["embeddings"][1].numpy(), where
        )
    }
    mask = jnp.asarray(where)[:, None]

    def compare(name, run):
        given, expected = calls[name]
        errors[name] = relative_error(run(jnp.asarray(given.numpy())), expected.numpy(), where)

    compare("embeddings.LayerNorm", model.embeddings.LayerNorm)
    for index in range(model.config.num_layers):
        layer, at = layer_of(model.encoder.layer, index), f"encoder.layer.{index}"
        for projection in ("query", "key", "value"):
            compare(f"{at}.attention.self.{projection}", getattr(layer.attention.self, projection))
        compare(f"{at}.attention.self", lambda x, part=layer.attention.self: part(x, mask))
        compare(f"{at}.attention.output.dense", layer.attention.output.dense)
        compare(f"{at}.attention.output.LayerNorm", layer.attention.output.LayerNorm)
        compare(f"{at}.attention", lambda x, part=layer.attention: part(x, mask))
        compare(f"{at}.intermediate", layer.intermediate)
        compare(f"{at}.output.dense", layer.output.dense)
        compare(f"{at}.output.LayerNorm", layer.output.LayerNorm)
        compare(at, lambda x, part=layer: part(x, mask))
    worst = max(errors, key=errors.__getitem__)
    print(f"MEASURED parts {case}: {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= TOLERANCE, errors  # max 5.5e-7


def _parameters():
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
    return [name for name, _ in model.named_parameters()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair("bert", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", _parameters())
def test_each_parameter(pair, name):
    """The same noise on one tensor of both changes the states, and changes them alike."""
    tokens, where = make_tokens(pair.ours.config.vocab_size)
    before = reference_outputs(pair.reference, tokens, where)
    (row,) = [row for row in conversion_table(pair.ours) if row.name == name]
    with perturbed(pair, row) as ours:
        after = reference_outputs(pair.reference, tokens, where)
    error = relative_error(our_outputs(ours, tokens, where), after, where)
    change = relative_error(before, after, where)
    print(f"MEASURED parameter bert {name}: {error:.1e}")
    if name.endswith("key.bias"):
        assert change <= TOLERANCE  # adds one constant to all scores of a query: softmax ignores it
    else:
        assert change > 100 * TOLERANCE
    assert error <= TOLERANCE  # max 9.5e-7


@pytest.mark.parametrize("case", BERTS)
def test_export(tmp_path, case):
    pair = make_pair(case, tmp_path / "in")
    save_pretrained(pair.ours, tmp_path / "out")
    exported, report = transformers.BertModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, add_pooling_layer=False
    )
    assert not any(report.values()), report
    tokens, where = make_tokens(pair.ours.config.vocab_size)
    expected = reference_outputs(pair.reference, tokens, where)
    np.testing.assert_array_equal(reference_outputs(exported.eval(), tokens, where), expected)
