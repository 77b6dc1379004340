"""What a release promises: names and signatures, one version, light imports, permissive licences, whole packages."""

from __future__ import annotations

import compileall
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import packext as px
from tests import public_api

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

#: What a plain `import packext` must leave alone: all that is not torch's, einops' and numpy's.
HEAVY = (
    "matplotlib", "plotly", "pandas", "sklearn", "scipy", "rich", "transformers", "lightning", "tensorboard",
    "dp_accounting", "wandb", "flwr", "PIL", "jaxtyping", "beartype", "torchvision", "torch._dynamo", "sympy",
)  # fmt: skip


def test_public_names_and_signatures() -> None:
    written = public_api.FILE.read_text().splitlines()
    now = public_api.text().splitlines()
    changes = [f"- {x}" for x in written if x not in now] + [f"+ {x}" for x in now if x not in written]
    assert written == now, "\n".join(["python -m tests.public_api, if this is meant:", *changes])


def test_names_that_are_pinned_are_there() -> None:
    extras = (  # where these are installed
        "attacks.flower", "diagnostics.lightning", "diagnostics.huggingface",
        "adapters.lightning", "adapters.huggingface", "adapters.laplace", "adapters.opacus",
    )  # fmt: skip
    for line in public_api.FILE.read_text().splitlines():
        path = re.match(r"(?:class )?packext\.([\w.]+)", line)
        assert path is not None
        value = px
        for name in () if path[1].startswith(extras) else path[1].removesuffix(".__init__").split("."):
            if not (name in getattr(value, "__annotations__", ()) or name in getattr(value, "__slots__", ())):
                assert hasattr(value, name), line
                value = getattr(value, name)


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    found = re.findall(r'^__version__ = "(.+)"$', (ROOT / "packext/__init__.py").read_text(), re.MULTILINE)
    assert found == [px.__version__] and f"## [{px.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert not re.search("^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_what_everybody_needs_is_little() -> None:
    assert [re.match(r"[\w-]+", d)[0] for d in PROJECT["project"]["dependencies"]] == ["torch", "einops", "numpy"]


IMPORT = """
import sys
import torch, einops, numpy
before = set(sys.modules)
import gc
from time import process_time
gc.disable()  # a collection of all that torch has made may fall anywhere
start = process_time()
import packext
seconds = process_time() - start
assert "packext.diagnostics" not in sys.modules
packext.diagnostics.Cockpit
packext.optim, packext.defences, packext.attacks, packext.diagnostics, packext.audit
new = set(sys.modules) - before
print(seconds, *(name for name in sys.argv[1:] if name in new))
"""


def test_importing_is_quick_and_light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "pycache_prefix", str(tmp_path)
    )  # compiled files are there, as those of an installed package
    compileall.compile_dir(ROOT / "packext", quiet=1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    times = []
    for _ in range(3):  # the quickest of some, as others may be at work
        done = subprocess.run(
            [sys.executable, "-c", IMPORT, *HEAVY], env=environment, capture_output=True, text=True, check=True
        )
        seconds, *heavy = done.stdout.split()
        assert not heavy
        times.append(float(seconds))
        if times[-1] < 0.1:
            return
    raise AssertionError(f"importing took {times} s of the processor")


PERMISSIVE = re.compile(r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla|HPND|Zlib|Unlicense|0BSD", re.I)
COPYLEFT = re.compile(r"\b[AL]?GPL|GNU", re.I)


def requirements() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(d for group in extras for d in group)]
    names = {re.match(r"[\w.-]+", d)[0] for d in wanted} - {"packext"}
    return sorted(names | {"backpack-for-pytorch"})


@pytest.mark.parametrize("name", requirements())
def test_dependencies_have_permissive_licences(name: str) -> None:
    try:
        about = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    said = [about.get("License-Expression") or "", (about.get("License") or "")[:200]]
    said += [c for c in about.get_all("Classifier") or [] if c.startswith("License")]
    files = [f for f in importlib.metadata.files(name) or [] if "LICEN" in f.name.upper() and f.suffix != ".py"]
    if not PERMISSIVE.search(" ".join(said)):
        said += [f.read_text()[:2000] for f in files[:3]]
    text = " ".join(said)
    assert PERMISSIVE.search(text) or "Permission is hereby granted" in text or "Redistribution and use" in text, name
    assert not COPYLEFT.search(" ".join(said[:2])), said[:2]


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    import zipfile

    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    packed = {n for n in zipfile.ZipFile(path).namelist() if n.startswith("packext/")}
    files = (f for f in (ROOT / "packext").rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert packed == {str(f.relative_to(ROOT)) for f in files} and "packext/py.typed" in packed
