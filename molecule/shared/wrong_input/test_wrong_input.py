"""The role refuses wrong input, by a message that names it."""

from __future__ import annotations

import pytest
from conftest import SCENARIO

from lab.scenario import Scenario, title_of


@pytest.fixture(scope="session")
def messages(scenario: Scenario) -> dict[str, str]:
    return scenario.refuse() if scenario.steps.wrong else {}


@pytest.mark.parametrize(
    ("title", "message"), [(title_of(case), case["message"]) for case in SCENARIO.steps.wrong]
)
def test_wrong_input_is_refused(messages: dict[str, str], title: str, message: str) -> None:
    assert message in messages[title]


def test_there_is_wrong_input_or_a_reason_for_none(scenario: Scenario) -> None:
    assert scenario.steps.wrong or scenario.steps.none["wrong"]
