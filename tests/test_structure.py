"""The shape of the house: who may know whom, and that what is public is documented and tested."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import packext as px
from packext import testing
from packext._quantity import Curvature, HessianQuantity, Quantity

ROOT = Path(px.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

#: Packages of the top floor, which use what is public of the engine and of each other.
CONSUMERS = ("adapters", "attacks", "audit", "defences", "diagnostics", "optim", "search")

#: Floors, from the ground up; a module may import from its own floor and those below it.
FLOORS = [
    {
        "_errors",
        "_layout",
        "_scratch",
        "_switch",
        "_kronecker",
        "linalg",
        "_union",
        "_graph",
        "_copies",
        "_shards",
        "_precision",
    },
    {"_factored", "_statistics", "_fused", "_kernel", "_roots"},
    {"_use", "_quantity"},
    {
        "_taps",
        "_record",
        "_probe",
        "_owners",
        "_gathering",
        "_refusals",
        "_distributed",
        "_results",
        "_compiler",
        "_pass",
        "_listening",
        "_flight",
    },
    {"rules"},
    {"_calls", "_lineage", "_places", "_scale", "_choices", "_unseen", "_again", "_checkpointing"},
    {"_extend", "_residual", "_chain", "_columns", "_curvature"},
    {"_backpack"},
    {"quantities"},
    {"extensions", "testing", "_observation", "_explain", "_drawing"},
    {"_subject", "_check", "_bench", "_tables"},
    {*CONSUMERS, "__init__", "demo", "_cli", "__main__"},
]


def name_of(file: Path) -> str:
    """`packext/rules/linear.py` as `rules.linear`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def imports(file: Path, typing: bool = False) -> Iterator[str]:
    """Modules of packext that a file imports, by the name of their floor; those for type checkers only if asked."""
    tree = ast.parse(file.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test) and not typing
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "packext":
            if node.module == "packext":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.removeprefix("packext.")
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("packext.") for a in node.names if a.name.startswith("packext."))


def floor(module: str) -> int | None:
    return next((k for k, names in enumerate(FLOORS) if module.split(".")[0] in names), None)


def test_every_module_has_a_floor() -> None:
    assert {name_of(f).split(".")[0] for f in FILES} <= set().union(*FLOORS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_imports_upward(file: Path) -> None:
    here = floor(name_of(file))
    assert here is not None
    for other in imports(file):
        if here < len(FLOORS) - 1:  # the top floor uses what is public
            there = floor(other)
            assert there is not None and there <= here, f"{name_of(file)} imports {other}"


@pytest.mark.parametrize("file", sorted((ROOT / "quantities").glob("*.py")), ids=name_of)
def test_a_quantity_knows_no_layer_and_no_torch_function(file: Path) -> None:
    source = file.read_text()
    for word in (
        "nn.functional",
        "import torch.nn",
        "from torch import nn",
        "F.",
        "rules",
        "Conv",
        "nn.Linear",
        "Tracer",
    ):
        assert word not in source.replace("TF.", ""), word
    allowed = {"_factored", "_quantity", "_statistics", "_errors", "_union", "_shards", "linalg"}
    assert all(m.split(".")[0] in allowed | {"quantities"} for m in imports(file, typing=True))


@pytest.mark.parametrize("file", sorted((ROOT / "rules").glob("*.py")), ids=name_of)
def test_a_rule_knows_no_quantity(file: Path) -> None:
    source = file.read_text()
    for quantity in testing.ORACLES:
        assert quantity.__name__ not in source and quantity.savefield not in source
    assert not any(
        m.startswith(("quantities", "_quantity", "_statistics", "_backpack")) for m in imports(file, typing=True)
    )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_of_a_size_that_can_be_read(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 600


@pytest.mark.parametrize("file", [f for f in FILES if name_of(f).split(".")[0] in CONSUMERS], ids=name_of)
def test_a_consumer_uses_what_is_public(file: Path) -> None:
    here = name_of(file).split(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.module != "packext" else [f"packext.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        inside = [n for n in names if n.split(".")[0] == "packext" and n != "packext"]
        public = {f"packext.{consumer}" for consumer in CONSUMERS}
        assert all(n.split(".")[1] == here or n in public for n in inside), f"{name_of(file)} imports {inside}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "px":
            assert not node.attr.startswith("_") or node.attr == "__version__"


@pytest.mark.parametrize(
    "name", [f"{c}.{n}" for c in CONSUMERS for n, value in vars(getattr(px, c)).items() if inspect.isclass(value)]
)
def test_public_names_of_consumers_are_documented(name: str) -> None:
    consumer, _, part = name.partition(".")
    value = getattr(getattr(px, consumer), part)
    assert inspect.getdoc(value), name
    for member, f in vars(value).items():
        if inspect.isfunction(f) and not member.startswith("_"):
            assert inspect.getdoc(getattr(value, member)), f"{name}.{member}"


def test_every_quantity_has_an_oracle_and_an_example() -> None:
    kinds = {value for value in vars(px).values() if isinstance(value, type) and issubclass(value, Quantity)}
    first_order = {kind for kind in kinds if not issubclass(kind, (Curvature, HessianQuantity))}
    assert first_order == set(testing.ORACLES) == {type(q) for q in testing.all_quantities()}
    files = ("curvature", "diag_hessian", "chains")
    source = "".join((Path(__file__).parent / f"test_{name}.py").read_text() for name in files)
    assert all(f"px.{kind.__name__}(" in source for kind in kinds - first_order)
    fields = [kind.savefield for kind in kinds]
    assert len(set(fields)) == len(fields)


def test_the_map_of_the_floors_is_that_of_the_tree() -> None:
    text = (ROOT.parent / "docs" / "design.md").read_text().partition("## Floors\n\n")[2].partition("\n\n")[0]
    floors = []
    for line in text.splitlines():  # names two spaces apart, and what they are
        cells = re.split(r"  +", line.strip())
        floors.append({c.rstrip("/") for c in itertools.takewhile(re.compile(r"[a-z_]+/?$").match, cells)})
    assert all(floors)
    mapped = set().union(*floors)
    assert mapped == {name_of(f).split(".")[0] for f in FILES} - {"__init__", "__main__"}, "docs/design.md, Floors"
    for upper, names in enumerate(floors):  # and drawn in the order in which they may import
        for lower in floors[:upper]:
            assert max(floor(n) or 0 for n in lower) <= min(floor(n) or 0 for n in names), (lower, names)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_first_line_of_a_file_says_its_reason(file: Path) -> None:
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
    assert len(first) > 15 and first[-1] in ".:?", first


def public() -> dict[str, object]:
    return {name: value for name, value in vars(px).items() if not name.startswith("_") and not inspect.ismodule(value)}


@pytest.mark.parametrize("name", public())
def test_public_names_are_documented(name: str) -> None:
    value = public()[name]
    assert inspect.getdoc(value), name
    if inspect.isclass(value) and issubclass(value, Quantity):
        assert f"`{value.savefield}`" in (value.__doc__ or ""), "the docstring names the attribute"
    members = vars(value).items() if inspect.isclass(value) else ()
    for member, f in members:
        if inspect.isfunction(f) and not member.startswith("_"):
            assert inspect.getdoc(getattr(value, member)), f"{name}.{member}"


def test_public_names() -> None:
    names = {
        "extend", "unextend", "is_extended", "backpack", "disable", "Results",
        "PackextError", "NotExtendedError", "UnsupportedUseError", "CoupledSamplesError", "WrongRuleError",
        "BatchGrad", "BatchL2Grad", "BatchDotGrad", "GradDot", "SumGradSquared", "Variance",
        "GradHistogram", "Histogram", "ProjectedGrad", "ClippedGrad",
    }  # fmt: skip
    assert names <= public().keys()
    assert all(issubclass(getattr(px, n), px.PackextError) for n in names if n.endswith("Error"))


def test_names_under_which_backpacks_users_import() -> None:
    from packext import backpack, disable, extend, extensions
    from packext.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance

    assert (backpack, disable, extend) == (px.backpack, px.disable, px.extend)
    assert (BatchGrad, BatchL2Grad, SumGradSquared, Variance) == (
        px.BatchGrad,
        px.BatchL2Grad,
        px.SumGradSquared,
        px.Variance,
    )
    assert {getattr(extensions, k.__name__) for k in testing.ORACLES} == set(testing.ORACLES)
