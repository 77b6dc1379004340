"""Options of the test session."""

from __future__ import annotations

import pytest

from tests import checked

checked.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-models", type=int, default=200, help="how many random models test_fuzz compares")
    parser.addoption("--fuzz-start", type=int, default=0, help="the first seed of test_fuzz")
