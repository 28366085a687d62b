"""Generated requests, valid and not, against what `/openapi.json` says of every operation."""

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from jaxsearch.bundle import load_bundle
from serve.engine import Engine
from serve.telemetry import Telemetry
from tests.live_server import serving
from tests.tiny_bundle import write_tiny_bundle

DESCRIBED = [status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    bundle = load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))
    with serving(Engine(bundle, Telemetry())) as client:
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        yield [found.ok() for found in schema.get_all_operations()]


def keeps_to_its_description(operation, mode, num_examples):
    @hypothesis.settings(max_examples=num_examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def check(case):
        reply = case.call()
        is_late = reply.status_code == 504 and (
            "x-timeout-ms" in (case.headers or {}) or "timeout_ms" in case.body
        )
        case.validate_response(reply, checks=DESCRIBED if is_late else [*DESCRIBED, not_a_server_error])

    check()


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_posts_keep_to_their_description(operations, mode):
    posts = [operation for operation in operations if operation.method == "post"]
    assert posts
    for operation in posts:
        keeps_to_its_description(operation, mode, num_examples=40)


def test_gets_keep_to_their_description(operations):
    gets = [operation for operation in operations if operation.method == "get"]
    assert gets
    for operation in gets:
        keeps_to_its_description(operation, schemathesis.GenerationMode.POSITIVE, num_examples=1)
