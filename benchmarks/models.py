"""Which models are supported: tries every model of the tests' table, and writes docs/models.md and a table of README.

    python -m benchmarks.models

Needs the tests beside it. What is given here is compared with the oracle by the tests, on the same table.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import packext as px
from benchmarks.summary import ROOT, between
from packext import testing
from tests.cases import CASES, Case

RESULTS = ROOT / "benchmarks" / "results" / "models.json"
OWN = "parameters of your own modules"

#: Columns, and what is asked for in one pass for each.
COLUMNS: dict[str, Callable[[], list[Any]]] = {
    "first order": lambda: list(testing.all_quantities()),
    "GGN": lambda: [px.DiagGGNExact(), px.BatchDiagGGNExact(), px.SqrtGGNExact()],
    "KFAC": lambda: [px.KFAC(fisher="exact")],
    "Hessian": lambda: [px.DiagHessian(), px.BatchDiagHessian()],
}


def curved(case: Case) -> bool:
    """Whether the loss is one whose GGN the tests compare."""
    return isinstance(case.loss(), (nn.CrossEntropyLoss, nn.MSELoss))


def layers(model: nn.Module) -> list[str]:
    """Classes of modules that hold parameters: those of torch by name, in any number of dimensions."""
    found = set()
    for module in model.modules():
        name = type(module).__name__
        if module._parameters and name != "NonDynamicallyQuantizableLinear":  # a part of MultiheadAttention
            own = not type(module).__module__.startswith("torch.nn.modules")
            found.add(OWN if own else re.sub(r"\dd$", "", name))
    return sorted(found)


def given(case: Case, quantities: list[Any]) -> bool:
    """Whether a pass gives them; a refusal is the only other thing that may happen."""
    torch.manual_seed(0)
    model, inputs, targets = case.build()
    loss_fn = px.extend(case.loss())
    px.extend(model, case.batch_axis)
    try:
        with sdpa_kernel(SDPBackend.MATH), px.backpack(*quantities):
            loss_fn(testing.call(model, inputs), targets).backward()
    except px.PackextError:
        return False
    return True


def tried(cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Layers and outcomes of each case; None where a column says nothing of it."""
    results = {}
    for case in cases:
        torch.manual_seed(0)
        row: dict[str, Any] = {"layers": layers(case.build()[0])}
        for column, quantities in COLUMNS.items():
            asked = column == "first order" or column == "Hessian" or curved(case)
            row[column] = given(case, quantities()) if asked else None
        results[case.name] = row
    return results


def _mark(value: bool | None) -> str:
    return {True: "yes", False: "refused", None: "–"}[value]


def by_case(results: dict[str, dict[str, Any]]) -> str:
    """The table of docs/models.md: a row for each model."""
    lines = [f"| model | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {name} | {' | '.join(_mark(row[c]) for c in COLUMNS)} |" for name, row in results.items()]
    return "\n".join(lines)


def by_layer(results: dict[str, dict[str, Any]]) -> str:
    """The table of README: a row for each class of layers, with how many of the models that have one are served."""
    names = sorted({layer for row in results.values() for layer in row["layers"]}, key=lambda n: (n == OWN, n))
    lines = [f"| layer | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for name in names:
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in results.values() if name in row["layers"] and row[column] is not None]
            cells.append(f"{sum(values)} of {len(values)}" if values else "–")
        lines.append(f"| {name if name == OWN else f'`{name}`'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pages(results: dict[str, dict[str, Any]]) -> dict[Path, str]:
    """The pages with their tables renewed."""
    models, readme = ROOT / "docs" / "models.md", ROOT / "README.md"
    return {
        models: between(models.read_text(), "models", by_case(results)),
        readme: between(readme.read_text(), "layers", by_layer(results)),
    }


def main() -> None:
    """Try all, and write what was found."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    results = tried(CASES)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for page, text in pages(results).items():
        page.write_text(text)


if __name__ == "__main__":
    main()
