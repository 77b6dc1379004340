"""The page's examples run, one after the other as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()
FIRST, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PACKAGES = ("laplace", "opacus", "lightning", "transformers")


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in PACKAGES:
        if re.search(rf"^(from|import) {package}\b", example, re.MULTILINE):
            pytest.importorskip(package)
    names: dict[str, object] = {}
    exec(FIRST, names)
    exec(example, names)
    assert "print(" not in example or capsys.readouterr().out
