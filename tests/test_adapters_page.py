"""The page's examples run, one after the other as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()
FIRST, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PACKAGES = ("laplace", "opacus", "lightning", "transformers")


@pytest.mark.filterwarnings("ignore")  # Lightning's advice, and torch's on functions that the packages call
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in PACKAGES:
        if re.search(rf"^(from|import) {package}\b", example, re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # Lightning writes where it is
    names: dict[str, object] = {}
    exec(FIRST, names)
    exec(example, names)
    assert "print(" not in example or capsys.readouterr().out
