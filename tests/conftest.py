"""Options of the test session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests import checked

checked.install()
if not torch.cuda.is_available():  # Triton reads it when it is imported, whoever does that first
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-models", type=int, default=200, help="how many random models test_fuzz compares")
    parser.addoption("--fuzz-start", type=int, default=0, help="the first seed of test_fuzz")


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 by default and a fixed seed, for a file: `pytestmark = pytest.mark.usefixtures("double")`."""
    from tests.helpers import double_precision  # after `checked` is installed: it imports packext

    with double_precision():
        yield
