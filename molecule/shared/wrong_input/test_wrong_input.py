"""The role refuses wrong input, by a message that names it."""

from __future__ import annotations

import pytest
from conftest import SCENARIO

from lab.scenario import Scenario


@pytest.fixture(scope="session")
def said(scenario: Scenario) -> dict[str, str]:
    return scenario.refuse() if scenario.steps.wrong else {}


@pytest.mark.parametrize("message", [case["message"] for case in SCENARIO.steps.wrong])
def test_wrong_input_is_refused(said: dict[str, str], message: str) -> None:
    assert message in said[message]


def test_there_is_wrong_input_or_a_reason_for_none(scenario: Scenario) -> None:
    assert scenario.steps.wrong or scenario.steps.none["wrong"]
