"""What the pages say: their snippets run, and their tables are those of the code."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packext as px
from benchmarks import models, summary, zoo
from packext._quantity import Quantity
from packext.diagnostics import Instrument
from tests.cases import CASES
from tests.helpers import double_precision

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: `<!-- run -->` before a block: it is run, after those before it on the page, as one program. `<!-- run with NAME -->`
#: does so where the package NAME is installed. `<!-- run hidden` and a block: it is run, and not shown; `with NAME` may
#: follow.
BLOCK = re.compile(
    r"(?P<mark><!-- run(?: hidden)?(?: with (?P<needs>[\w-]+))?(?: -->)?\n)?"
    r"(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.M,
)

#: What is shown and not run, by page and first line, and why: names and arguments of packext in it are looked up.
NOT_RUN = {
    ("docs/audit.md", "import packext as px"): "takes its budget; tests/test_audit.py",
    (
        "docs/diagnostics.md",
        "from packext.diagnostics.lightning import CockpitCallback",
    ): "is for one Trainer or another",
    ("docs/attacks.md", "from packext.attacks.flower import SecAggPlus"): "needs flwr; tests/test_attacks_flower.py",
    ("docs/migrate/cockpit.md", "from backpack import extend"): "is Cockpit's, which the tests do not install",
    ("docs/world.md", "dht = hivemind.DHT(initial_peers=peers, start=True)"): "needs hivemind; tests/test_swarm.py",
}


def blocks(page: Path) -> list[tuple[bool, str | None, str, int]]:
    """Of a page's blocks whether they are run, what they need, their code and the line on which it begins."""
    text = page.read_text()
    return [
        (m["mark"] is not None, m["needs"], textwrap.dedent(m["code"]), text[: m.start("code")].count("\n"))
        for m in BLOCK.finditer(text)
    ]


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")  # in torch.distributed.optim
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT).with_suffix(""))
)
def test_snippets(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "snippet"}
    missing: set[str] = set()
    for run, needs, code, line in blocks(page):
        if not run:
            continue
        if needs is not None and importlib.util.find_spec(needs) is None:
            missing.add(needs)
            continue
        with warnings.catch_warnings():
            if needs is not None:  # what others warn of is not ours to mend
                warnings.simplefilter("ignore")
            # Empty lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * line + code, str(page), "exec"), space)
    if missing:
        pytest.skip(f"all was run but what needs {', '.join(sorted(missing))}")


def test_every_block_is_run_or_listed() -> None:
    shown = ((page, code) for page in PAGES for run, _, code, _ in blocks(page) if not run)
    left = {(str(page.relative_to(ROOT)), code.split("\n")[0].partition("  #")[0]) for page, code in shown}
    assert left == NOT_RUN.keys()
    for page in PAGES:
        text = page.read_text()
        assert len(blocks(page)) == text.count("```python"), page
        assert sum(run for run, *_ in blocks(page)) == text.count("<!-- run"), page


@pytest.mark.parametrize("page, first", NOT_RUN)
def test_names_and_arguments_of_what_is_not_run(page: str, first: str) -> None:
    """Each name of packext exists, and each call of one that is found at once binds to its signature."""
    [code] = [code for run, _, code, _ in blocks(ROOT / page) if not run and code.startswith(first)]
    trees = [ast.parse(code) for _, _, code, _ in blocks(ROOT / page)]
    space: dict[str, Any] = {"px": px}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "packext":
            with contextlib.suppress(ImportError):  # of what it is for
                module = importlib.import_module(str(node.module))
                space |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Attribute):
            found = value(node.value)
            return None if found is None else getattr(found, node.attr)
        return space.get(node.id) if isinstance(node, ast.Name) else None

    for node in ast.walk(ast.parse(code)):
        called = value(node.func) if isinstance(node, ast.Call) else value(node)
        if called is not None and isinstance(node, ast.Call):
            keywords = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(called).bind(*node.args, **keywords)


def test_a_snippet_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n```python\nx = 1\n```\n\n<!-- run -->\n    ```python\n    assert x == 2\n    ```\n")
    with pytest.raises(AssertionError):
        test_snippets(page, tmp_path, monkeypatch)


# -- docs/quantities.md ------------------------------------------------------------------------------
def described() -> dict[str, dict[str, str]]:
    """The tables of docs/quantities.md by the quantity's name."""
    parts = re.split(r"^::: packext\.(\w+)$", (ROOT / "docs/quantities.md").read_text(), flags=re.MULTILINE)
    rows = [dict(re.findall(r"^\| (\w+) \| (.*) \|$", text, re.MULTILINE)) for text in parts[2::2]]
    return dict(zip(parts[1::2], rows, strict=True))


def quantities() -> dict[str, type[Quantity]]:
    return {n: v for n, v in vars(px).items() if isinstance(v, type) and issubclass(v, Quantity)}


def test_every_quantity_is_described() -> None:
    assert described().keys() == quantities().keys()
    for name, row in described().items():
        assert row.keys() == {"field", "shape", "formula", "scale", "cost", "source"} and all(row.values()), name
        assert row["field"] == f"`{quantities()[name].savefield}`"


#: Arguments that a quantity needs, or that make it the same in two passes.
MADE = {
    "ProjectedGrad": lambda: px.ProjectedGrad((2, 4)),
    "ClippedGrad": lambda: px.ClippedGrad(0.5),
    "TopEigenvalues": lambda: px.TopEigenvalues(2, tol=1e-12, generator=torch.Generator().manual_seed(3)),
}


def made(name: str) -> Quantity:
    kind: Any = quantities()[name]
    if name in MADE:
        return MADE[name]()
    return kind(generator=torch.Generator().manual_seed(3)) if name.endswith(("MC", "KFAC", "Trace")) else kind()


@functools.cache
def found(name: str, scale: Any) -> Any:
    """The result for a weight `[7, 5]` with 4 samples and 3 classes."""
    torch.manual_seed(0)
    model = px.extend(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))).double()
    loss_fn = px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5).double(), torch.randint(3, (4,))
    with px.backpack(made(name), scale=scale) as results:
        loss_fn(model(x), y).backward(retain_graph=True)
    value = getattr(results["0.weight"], quantities()[name].savefield)
    return value(torch.ones(2, 7, 5).double()) if callable(value) else value


@pytest.mark.parametrize("name", quantities())
def test_shapes_of_quantities(name: str) -> None:
    shape, value = described()[name]["shape"], found(name, "loss")
    known = {
        "N": [4],
        "*p": [7, 5],
        "V": [3],
        "M": [1],
        "r": [2],
        "q": [4],
        "O": [7],
        "I": [5],
        "bins": [100],
        "k": [2],
    }
    if shape == "`p`":
        shape = "`[*p]`"
    if name in ("HMP", "GGNMP", "PCHMP"):
        shape, value, known["V"] = shape.partition(" -> ")[2], value, [2]
        shape = f"`{shape}"
    if name == "DiagHessianMC":
        assert value.value.shape == value.standard_error.shape == (7, 5) and "`p`" in shape
    elif name == "HessianTrace":
        assert value.value.shape == value.standard_error.shape == ()
    elif name == "EKFAC":
        assert isinstance(value, px.linalg.KronEigh)
    else:
        if name in ("GradHistogram", "ProjectedGrad"):  # the first of two, for a weight
            shape = shape.partition(", or ")[0]
        shapes = [[n for k in s.split(", ") for n in known[k]] for s in re.findall(r"`\[([^`]*)\]`", shape)]
        got = value if isinstance(value, (list, tuple)) else [value]
        assert [list(t.shape) for t in got[: len(shapes)]] == shapes and shapes


@pytest.mark.parametrize("name", quantities())
def test_scales_of_quantities(name: str) -> None:
    rule = described()[name]["scale"]
    if name == "GradHistogram":
        assert "bins stay" in rule
        return
    if name == "GradDot":
        assert rule.startswith("c with a given direction; c²/N with the default one, and 1 with")
        powers = {"sample": 1.0}  # N = c for a mean
    else:
        power = next(v for k, v in {"c²": 2.0, "c": 1.0, "sqrt(c)": 0.5, "none": 0.0}.items() if rule.startswith(k))
        assert (name in ("DiagEF", "ClippedGrad")) == ("a number is taken for the factor" in rule)
        powers = {"sample": power} if name == "ClippedGrad" else {"sample": power, 4.0: power}
    for scale, power in powers.items():  # 4 is c for a mean over 4 samples
        one, four = found(name, 1.0 if scale == 4.0 else "loss"), found(name, scale)
        if isinstance(one, px.linalg.KronEigh):
            one, four = one.eigenvalues, four.eigenvalues
        one, four = ((v[0] if isinstance(v, (list, tuple)) else v) for v in (one, four))
        assert one.abs().max() > 1e-6
        assert torch.allclose(four, one * 4.0**power, rtol=1e-9, atol=1e-12), (scale, power)


def test_the_default_direction_has_no_factor_of_a_number() -> None:
    assert torch.allclose(found("GradDot", 4.0), found("GradDot", "loss") * 4.0**2 / 4)


def parts(value: Any) -> list[Any]:
    """Tensors and numbers of a result."""
    if dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    return [leaf for one in value for leaf in parts(one)] if isinstance(value, (list, tuple)) else [value]


def test_results_travel_with_parameters_that_are_saved() -> None:
    torch.manual_seed(0)
    model = px.extend(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)))
    loss_fn = px.extend(nn.CrossEntropyLoss())
    others = ("KFAC", "HMP", "GGNMP", "PCHMP")
    asked = [px.KFAC(bias="joint"), *(made(name) for name in quantities() if name not in others)]
    with px.backpack(*asked):
        loss_fn(model(torch.randn(4, 5)), torch.randint(3, (4,))).backward()
    sizes = []
    for saved in (dict(model.named_parameters()), model.state_dict(keep_vars=True), model.state_dict()):
        file = io.BytesIO()
        torch.save(saved, file)
        sizes.append(file.tell())
        file.seek(0)
        loaded = torch.load(file)
        for name, p in saved.items():
            assert torch.equal(loaded[name], p) and vars(loaded[name]).keys() == vars(p).keys()
            for field, value in vars(p).items():
                twin = getattr(loaded[name], field)
                assert type(twin) is type(value)
                for one, other in zip(parts(value), parts(twin), strict=True):
                    assert one is other or (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other)
        if vars(loaded["0.bias"]):
            assert loaded["0.bias"].kfac.weight is loaded["0.weight"]
    assert {q.savefield for q in asked} <= vars(model[0].weight).keys() and sizes[0] > 3 * sizes[2]
    assert not vars(copy.deepcopy(model)[0].weight)
    with px.backpack(px.HMP()):
        loss_fn(model(torch.randn(4, 5)), torch.randint(3, (4,))).backward(retain_graph=True)
    with pytest.raises(TypeError, match="del parameter.hmp"):
        torch.save(list(model.parameters()), io.BytesIO())


# -- docs/migrate/cockpit.md -------------------------------------------------------------------------
def test_numbers_are_those_of_cockpit_or_differ_as_its_page_says() -> None:
    """By the formulas of Cockpit 1.0.2, with b the rows of BackPACK's `grad_batch`."""
    n, lr = 8, 0.1
    with double_precision():
        torch.manual_seed(0)
        model, (x, y) = px.extend(nn.Sequential(nn.Linear(5, 3))), (torch.randn(n, 5), torch.randint(3, (n,)))
        loss_fn, optimizer = px.extend(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr)
        rows = px.testing.individual_gradients(model, nn.CrossEntropyLoss(), x, y)
        b = torch.cat([r.flatten(1) for r in rows.values()], 1) / n
        with px.backpack(px.DiagGGNExact(), attach=False) as results:
            loss = loss_fn(model(x), y)
            loss.backward()
        optimizer.zero_grad()
        d = px.diagnostics
        asked = d.EarlyStopping(), d.CABS(), d.MeanGSNR(), d.HessTrace("ggn"), d.TICDiag("ggn"), d.TICTrace("ggn")
        more = d.NormTest(), d.InnerTest(), d.OrthoTest(), d.GradNorm(), d.UpdateSize()
        monitor = d.Cockpit(model, optimizer, level=None, instruments=[*asked, *more])
        with monitor.step():
            loss_fn(model(x), y).backward()
            optimizer.step()
    h = torch.cat([results[name].diag_ggn_exact.flatten() for name in rows])
    g, l2, dot = b.sum(0), b.square().sum(1), b @ b.T
    norm, along, squares = g.square().sum(), n * dot.sum(1), b.square().sum(0)
    variance = (n**2 * squares - n * g**2) / (n - 1)
    theirs = {
        "NormTest": ((n**2 * l2.sum() - n * norm) / (n - 1) / n / norm).sqrt(),
        "InnerTest": ((along.square().sum() - n * norm**2) / (n - 1) / n / norm**2).sqrt(),
        "OrthoTest": ((n**2 * l2.sum() - (along**2 / norm).sum()) / (n - 1) / n / norm).sqrt(),
        "EarlyStopping": 1 - n * (g**2 / (variance + 1e-5)).mean(),
        "GradNorm": norm.sqrt(),
        "UpdateSize": lr * norm.sqrt(),
        "HessTrace": h.sum(),
        "TICDiag": (n * squares / (h + 1e-7)).sum(),
        "TICTrace": n * squares.sum() / (h.sum() + 1e-7),
        "CABS": lr * (n**2 * squares - n * g**2).sum() / (n * loss.detach()),
        "MeanGSNR": (g**2 / (n * squares - g**2 + 1e-5)).mean(),
    }
    ours = {
        **theirs,
        "CABS": theirs["CABS"] * n / (n - 1),
        "MeanGSNR": ((g**2 - variance / n) / (variance + 1e-5)).mean(),
    }
    for name, want in ours.items():
        assert monitor.values[name] == pytest.approx(float(want), rel=1e-9), name
    assert ours["MeanGSNR"] < theirs["MeanGSNR"]


# -- docs/instruments.md, docs/optimizers.md, docs/leakage.md ----------------------------------------
#: Public names of attacks and defences that are neither: what they take and give, measures, and building blocks.
OTHERS = {
    "attacks": "Head Shared Threat LocalSteps Reconstruction Cohort NORMS LabelRule Judged Signals CanaryAudit "
    "PropertyClassifier share share_update sent without secure_sum count_accuracy guessed identity judge leverage "
    "in_order nearest_tokens psnr Misfit GaussianMisfit LaplacianMisfit RoundingMisfit Prior",
    "defences": "Compose PrecodeLoss Received DPSGD DPAdam epsilon noise_multiplier distance_correlation "
    "u_distance_correlation_sqr sensitivity replaces_share",
}


def shown(page: str) -> list[str]:
    """What a page shows of docstrings."""
    return re.findall(r"^::: (packext\.\S+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)


def located(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def instruments() -> dict[str, type[Instrument]]:
    found = {f"packext.diagnostics.{name}": v for name, v in vars(px.diagnostics).items() if isinstance(v, type)}
    return {name: v for name, v in found.items() if issubclass(v, Instrument) and v is not Instrument}


def optimizers() -> set[str]:
    """Optimizers and controllers but for their bases, what moves the norm of private ones, all of several processes."""
    several = px.optim.distributed
    bases = {px.optim.Optimizer, px.optim.Controller, px.optim.BatchSizeController, px.optim.Emitting}
    bases |= {several.Compression, several.Gathered}
    kinds = {f"packext.optim.{n}": v for n, v in vars(px.optim).items() if isinstance(v, type)}
    found = {
        name
        for name, v in kinds.items()
        if issubclass(v, (torch.optim.Optimizer, px.optim.Emitting)) and not issubclass(v, px.optim.Part)
    }
    found |= {f"packext.optim.distributed.{n}" for n, v in vars(several).items() if isinstance(v, type)}
    return {n for n in found if located(n) not in bases} | {"packext.optim.AdaptiveClipping"}


def leakage() -> set[str]:
    """Attacks and defences."""
    public = {
        package: {n for n, v in vars(getattr(px, package)).items() if n[0] != "_" and not inspect.ismodule(v)}
        for package in OTHERS
    }
    assert all(set(others.split()) <= public[package] for package, others in OTHERS.items()), "what is listed is there"
    return {f"packext.{k}.{name}" for k, others in OTHERS.items() for name in public[k] - set(others.split())}


def test_every_instrument_optimizer_attack_and_defence_is_shown() -> None:
    pages = {"instruments.md": set(instruments()), "optimizers.md": optimizers(), "leakage.md": leakage()}
    for page, names in pages.items():
        assert sorted(shown(page)) == sorted(names), page


def test_levels_of_instruments_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| (`\w+`[^|]*) \| (\w*) ?\|", (ROOT / "docs/diagnostics.md").read_text(), re.MULTILINE)
    said = {name: level for names, level in rows for name in re.findall(r"`(\w+)`", names)}
    lowest = {kind.__name__: level for level, kinds in reversed(px.diagnostics.LEVELS.items()) for kind in kinds}
    assert said == {kind.__name__: lowest.get(kind.__name__, "") for kind in instruments().values()}


def entry(name: str) -> dict[str, str]:
    """The list in a docstring, by its items; a formula that is set apart is one."""
    doc = inspect.getdoc(located(name)) or ""
    found = dict(re.findall(r"^- ([A-Z]\w+): (.+(?:\n  .+)*)$", doc, re.MULTILINE))
    if apart := re.search(r"\n\n((?: {4}(?!>>>).+\n)+)\n", doc):
        found.setdefault("Formula", apart[1])
    return found


@pytest.mark.parametrize("page", ["instruments.md", "optimizers.md", "leakage.md"])
def test_entries_are_whole(page: str) -> None:
    last = {"instruments.md": {"Units", "Absent"}, "optimizers.md": {"Refused"}, "leakage.md": {"Refused"}}
    for name in shown(page):
        assert entry(name).keys() == {"Formula", "Cost", "Source", *last[page]}, name


def asked(quantities: Any) -> set[str]:
    """Public names of quantities; of one that only counts, or sums what `.grad` sums, nothing."""
    plain = ("samples", "own_samples", "own_sum", "written_sum", "drawn_grad")
    kinds = [type(q) for q in quantities if q.savefield not in plain]
    return {next(k.__name__ for k in kind.__mro__ if getattr(px, k.__name__, None) is k) for kind in kinds}


def test_costs_of_instruments_name_their_quantities() -> None:
    for name, kind in instruments().items():
        instrument: Any = kind()
        instrument.enter(0, nn.Sequential())
        cost = entry(name)["Cost"]
        named = set(re.findall(r"`(\w+)`", cost)) & quantities().keys()
        assert asked(instrument.needs) <= named, name
        assert bool(named) != ("no quantity" in cost), name


def built(kind: Any) -> Any:
    """An optimizer or controller, as it is before its first step."""
    params = [nn.Parameter(torch.zeros(3))]
    if kind in (px.optim.DPSGD, px.optim.DPAdam):
        return kind(params, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    if torch.optim.Optimizer in kind.__mro__:
        return kind(params)
    if kind in (px.optim.CABS, px.optim.Alpha):
        return kind(torch.optim.SGD(params))
    if kind is px.optim.LearnedRate:
        return kind(torch.optim.RMSprop(params, alpha=0.9, eps=1e-6))
    return kind(4, 2) if kind is px.optim.ImportanceSampler else kind()


def test_costs_of_optimizers_name_their_quantities() -> None:
    for name in optimizers():
        kind = located(name)
        if not issubclass(kind, px.optim.Emitting):  # it asks for a pass of its own, or for none
            continue
        found = asked(built(kind).quantities())
        assert found <= set(re.findall(r"`(\w+)`", entry(name)["Cost"])), name
        assert found or kind is px.optim.Alpha, name  # which asks for more once there was an update


# -- tables that are made of results -----------------------------------------------------------------
def test_tables_of_measured_results_are_up_to_date() -> None:
    for page, text in summary.pages().items():
        assert page.read_text() == text, f"{page.name}: run python -m benchmarks.summary"


def test_the_table_of_models_is_up_to_date() -> None:
    results = json.loads(models.RESULTS.read_text())
    assert list(results) == [case.name for case in CASES], "run python -m benchmarks.models"
    for page, text in models.pages(results).items():
        assert page.read_text() == text, f"{page.name}: run python -m benchmarks.models"


def test_the_table_of_architectures_is_up_to_date() -> None:
    results = json.loads(zoo.RESULTS.read_text())
    for page, text in zoo.pages(results).items():
        assert page.read_text() == text, f"{page.name}: run python -m benchmarks.zoo"


def test_an_architecture_is_built_and_compared() -> None:
    transformers = pytest.importorskip("transformers")
    with double_precision():
        found = zoo.examine("causal", transformers.LlamaForCausalLM, transformers.LlamaConfig)
        assert found.outcome == "right" and found.curvature is not None, found
        assert found.curvature["DiagGGNMC"] == "given"
        broken = zoo.examine("causal", transformers.LlamaForCausalLM, type("Empty", (), {}))
    assert broken.outcome == "not built"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_models_are_given_what_the_table_says() -> None:
    results = json.loads(models.RESULTS.read_text())
    names = ("mlp", "one linear called twice", "weight norm")
    assert {tuple(results[name].values())[1:] for name in names} >= {(True,) * 4}  # and some are refused
    with double_precision():
        assert models.tried(c for c in CASES if c.name in names) == {name: results[name] for name in names}
