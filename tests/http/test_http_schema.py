"""Requests that schemathesis makes from the OpenAPI description: none is answered with 500, all as the description says."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
def test_any_request_is_answered_as_described(http: httpx.Client, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{http.base_url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) >= 7
    tried = 0
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        def answer(case: schemathesis.Case[Any]) -> None:
            nonlocal tried
            tried += 1
            case.call_and_validate(timeout=10.0)

        if (
            mode is GenerationMode.POSITIVE or operation.method == "post"
        ):  # a GET without parameters can't be wrong
            answer()
    assert tried > 20
