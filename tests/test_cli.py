"""The command line on models of a user's own: `packext check` and `packext bench`."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import _bench, _check, _cli, _subject, testing

pytest.importorskip("rich")

MODELS = '''
"""Models of a user's own."""
from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import nn

@dataclass
class Config:
    """Which looks for its own module, as annotations are strings."""
    width: int

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))

class Norm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

class Coupled(nn.Linear):
    def forward(self, x):
        return super().forward(x) - super().forward(x).mean(0)

class Four(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(4, 6))

def four():
    return Four(6, 3)

class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()

def detached():
    return Detached(6, 3)

class Indices(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(1)

def indices():
    return Indices(6, 3)

class Broken(nn.Linear):
    def forward(self, x):
        return super().forward(x).exp().sqrt().add_(1)

def broken():
    return Broken(6, 3)

class Keeping(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last

def keeping():
    return Keeping(6, 3)

def locked():
    model = nn.Linear(6, 3)
    model.lock = threading.Lock()
    return model

class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x

def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 2))

def wide():
    return nn.Sequential(nn.Linear(70, 65))

def breaks():
    raise KeyError("nothing is configured")

def data():
    return torch.ones(4, 6), torch.tensor([0, 1, 2, 0])

def measured():
    return torch.ones(4, 6), torch.ones(4, 3)

def nobody():
    return torch.ones(0, 6), torch.ones(0).long()

def one():
    return (torch.ones(4, 6),)

plain = nn.Linear(6, 3)
frozen = nn.Linear(6, 3).requires_grad_(False)
empty = nn.Flatten()
number = 3
'''


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net_of_mine.py").write_text(MODELS)
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "net_of_mine", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = _cli.main(arguments)
    except SystemExit as end:  # as argparse leaves
        status = int(end.code or 0)
    return status, *capsys.readouterr()


ALL = {".grad", *(type(q).__name__ for q in _check.quantities())}


def verdicts(out: str) -> dict[str, str]:
    return {words[0]: words[1] for line in out.splitlines() if len(words := line.split()) > 1 and words[0] in ALL}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all quantities, which take a pass and an oracle each."""
    monkeypatch.setattr(testing, "all_quantities", lambda: (px.SumGradSquared(), px.Variance()))
    curvature = (px.DiagGGNExact(), px.SqrtGGNExact(), px.KFAC(fisher="exact"), px.DiagHessian())
    monkeypatch.setattr(testing, "exact_curvature", lambda: curvature)


# -- check -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        ("net_of_mine:Net", "--input", "2x5x5"),
        ("net_of_mine.py:plain", "--batch", "net_of_mine:measured"),
    ],
)
def test_a_model_that_is_right(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    status, out, err = run(capsys, "check", *arguments)
    assert status == 0 and not err.strip()
    found = verdicts(out)
    assert set(found.values()) == {"right"} and found.keys() == ALL >= {"Variance", "SqrtGGNExact", "KFAC"}
    assert ("mse" if "measured" in arguments[-1] else "cross-entropy") in out


@pytest.mark.usefixtures("few")
def test_a_rule_that_is_wrong_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = px.SumGradSquared.result
    monkeypatch.setattr(px.SumGradSquared, "result", lambda self, ask: right(self, ask) * 1.001)
    status, out, _ = run(capsys, "check", "net_of_mine:Net", "--input", "2x5x5")
    assert status == 1
    found = verdicts(out)
    assert found.pop("SumGradSquared") == "wrong" and "wrong" not in found.values() and "1.0e-03" in out


@pytest.mark.usefixtures("few")
def test_curvature_that_is_wrong_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = px.DiagHessian.land
    monkeypatch.setattr(px.DiagHessian, "land", lambda self, held, n, factor: right(self, held, n, factor) * 1.001)
    status, out, _ = run(capsys, "check", "net_of_mine:Net", "--input", "2x5x5")
    assert status == 1 and verdicts(out)["DiagHessian"] == "wrong" and verdicts(out)["DiagGGNExact"] == "right"


@pytest.mark.usefixtures("few")
def test_what_is_refused_is_no_error_in_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "check", "net_of_mine:Coupled", "--input", "6", "--loss", "mse")
    assert status == 2 and not out  # the class needs arguments
    source = Path("net_of_mine.py").read_text()
    Path("net_of_mine.py").write_text(source + "\ndef coupled():\n    return Coupled(6, 3)\n")
    status, out, _ = run(capsys, "check", "net_of_mine.py:coupled", "--input", "6", "--loss", "mse")
    found = verdicts(out)
    assert status == 1 and found["Variance"] == "refused" and "right" not in found.values()
    assert "samples" in out and "Traceback" not in out


@pytest.mark.usefixtures("few")
def test_a_crash_of_packext_is_not_blamed_on_the_oracle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(px.SumGradSquared, "result", lambda self, ask: [][0])
    monkeypatch.setattr(px.DiagHessian, "land", lambda self, held, n, factor: [][0])
    status, out, _ = run(capsys, "check", "net_of_mine:Net", "--input", "2x5x5")
    found = verdicts(out)
    assert status == 1 and {k for k, v in found.items() if v != "right"} == {"SumGradSquared", "DiagHessian"}
    assert "SumGradSquared, DiagHessian: packext has failed" in out and "IndexError: list index out of range" in out
    assert found["SumGradSquared"] == found["DiagHessian"] == "wrong"


@pytest.mark.usefixtures("few")
def test_a_model_that_takes_no_single_sample_is_not_checked(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "check", "net_of_mine:four", "--input", "6")
    assert status == 1 and set(verdicts(out).values()) == {"not"} and "one sample at a time" in out


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_model_that_keeps_what_it_has_computed(capsys: pytest.CaptureFixture[str], command: str) -> None:
    options = ("--seconds", "0.1", "--quantities", "Variance") if command == "bench" else ()
    assert run(capsys, command, "net_of_mine:keeping", "--input", "6", *options)[0] == 0


@pytest.mark.usefixtures("few")
def test_a_batch_of_a_loader_and_long_names_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `DataLoader` gives lists; what is printed is whole in a pipe as well."""
    monkeypatch.setenv("COLUMNS", "40")
    name = "a_layer_with_quite_a_long_name_for_a_terminal"
    Path("named.py").write_text(
        "import torch\nfrom torch import nn\n"
        f"net = nn.Sequential()\nnet.add_module({name!r}, nn.Linear(5, 3))\n"
        "data = torch.utils.data.TensorDataset(torch.randn(8, 5), torch.arange(8) % 3)\n"
        "def batch():\n    return next(iter(torch.utils.data.DataLoader(data, 4)))\n"
    )
    status, out, _ = run(capsys, "check", "named.py:net", "--batch", "named.py:batch")
    assert status == 0 and f"{name}.weight" in out and "right" in out and "…" not in out


def test_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "check", "net_of_mine:words", "--input", "5", "--tokens", "9")
    assert status == 0 and "inputs [4, 5]" in out and verdicts(out)["Variance"] == "right"


@pytest.mark.usefixtures("few")
def test_evaluation_mode_is_said_and_training_mode_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "check", "net_of_mine:Norm", "--batch", "net_of_mine:data")
    assert status == 0 and "evaluation mode" in out
    status, out, err = run(capsys, "check", "net_of_mine:Norm", "--batch", "net_of_mine:data", "--train")
    assert status == 2 and "random numbers" in err


@pytest.mark.usefixtures("few")
def test_oracles_that_would_take_too_long_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "check", "net_of_mine:wide", "--input", "70")
    found = verdicts(out)
    assert status == 0 and found["Variance"] == found["DiagGGNExact"] == found["KFAC"] == "right"
    assert found["DiagHessian"].startswith("not")
    assert "the Hessian has 21,298,225 entries, for 4 samples of 65 outputs and 4615 parameters" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "net_of_mine:Net"), "--input 3x32x32"),
        (("check", "nothing_here:Net", "--input", "3"), "no module 'nothing_here'"),
        (("check", "nothing.py:Net", "--input", "3"), "nothing.py is not a file"),
        (("check", "net_of_mine", "--input", "3"), "module:name"),
        (("check", "net_of_mine:Nat", "--input", "3"), "no 'Nat'. It has annotations, threading, dataclass"),
        (("check", "net_of_mine:number", "--input", "3"), "is a int, not a model"),
        (("check", "net_of_mine:data", "--input", "3"), "gave a tuple, not a model"),
        (("check", "net_of_mine:breaks", "--input", "3"), "net_of_mine:breaks: KeyError: 'nothing is configured' ("),
        (("check", "net_of_mine:frozen", "--input", "6"), "no parameter that requires a gradient"),
        (("check", "net_of_mine:empty", "--input", "6"), "no parameter that requires a gradient"),
        (("check", "net_of_mine:plain", "--input", "0x3"), "positive numbers"),
        (("check", "net_of_mine:plain", "--input", "3xthree"), "positive numbers"),
        (("check", "net_of_mine:plain", "--input", "1x5"), "Linear on [4, 1, 5], drawn from a normal distribution"),
        (("check", "net_of_mine:plain", "--input", "5"), "V draws indices): RuntimeError"),
        (("check", "net_of_mine:plain", "--batch", "net_of_mine:one"), "must return (inputs, targets)"),
        (("check", "net_of_mine:plain", "--batch", "net_of_mine:number"), "is a int, not (inputs, targets), or a fun"),
        (("check", "net_of_mine:plain", "--batch", "net_of_mine:data", "--samples", "2"), "leave out --samples"),
        (("report", "net_of_mine.py"), "must be a folder, and net_of_mine.py is a file"),
        (("audit", "--out", "net_of_mine.py"), "must be a folder, and net_of_mine.py is a file"),
        (("check", "net_of_mine:plain", "--input", "6", "--loss", "hinge"), "cross-entropy, mse, bce"),
        (("check", "net_of_mine:plain", "--input", "6", "--loss", "torch.nn:HuberLoss"), "say --batch"),
        (("check", "net_of_mine:plain", "--batch", "net_of_mine:data", "--loss", "mse"), "the loss of outputs [4, 3]"),
        (("check", "net_of_mine:plain", "--batch", "net_of_mine:nobody"), "the batch is empty"),
        (("check", "net_of_mine:plain", "--batch", "net_of_mine:data", "--input", "6"), "not allowed with"),
        (("check", "net_of_mine:plain", "--batch", "net_of_mine:data", "--tokens", "6"), "leave out --input and"),
        (("check", "net_of_mine:detached", "--input", "6"), "Detached has no gradient: is its output detached"),
        (("check", "net_of_mine:indices", "--input", "6"), "Indices returns torch.int64, of which parameters have no"),
        (("check", "net_of_mine:locked", "--input", "6"), "a copy of Linear: TypeError"),
        (("bench", "net_of_mine:broken", "--input", "6"), "the gradient of Broken: RuntimeError"),
        (("check", "net_of_mine:plain", "--input", "6", "--seed", f"1{'0' * 13}"), "--seed: must be at most 10^12"),
        (("check", "quits.py:Net", "--input", "6"), "quits.py: SystemExit: 0"),
        (("bench", "--input", "3x64x64"), "SmallNet on [32, 3, 64, 64]"),
        (("bench", "--device", "abacus"), "--device abacus"),
        (("bench", "--quantities", "Variance+Variance"), "Variance+Variance: two quantities write 'variance'"),
        (("bench", "--quantities", "Foo"), "'Foo' is no quantity"),
        (("bench", "--seconds", "0"), "must be positive"),
        (("audit", "--seconds", "long"), "--seconds: must be a number, got long"),
        (("check", "net:model", "--samples", "2.5"), "--samples: must be a whole number, got 2.5"),
        (("check", "net_of_mine:plain", "--samples", "0"), "1 or more"),
        (("check",), "required: MODEL"),
        (("fly",), "invalid choice"),
    ],
)
def test_mistakes_are_said_in_a_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2 and said in err and "Traceback" not in err


def test_a_model_that_returns_no_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net_of_mine.py").write_text(MODELS + "\npair = Pair(6, 3)\n")
    status, _, err = run(capsys, "check", "net_of_mine.py:pair", "--input", "6")
    assert status == 2 and "returns a tuple, where a tensor is needed" in err


@pytest.mark.usefixtures("few")
def test_the_users_model_stays_as_it_was() -> None:
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    model = nn.Linear(6, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    this = _subject.Subject(model, nn.CrossEntropyLoss(), x, y, "")
    assert not _check.is_bad(list(_check.outcomes(this)))
    list(_bench.costs(this, ["Variance"], 0.1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not px.is_extended(model) and all(p.grad is None and not p.__dict__ for p in model.parameters())


# -- bench -------------------------------------------------------------------------------------------
def test_ratios_are_of_times() -> None:
    def work(seconds: float) -> Callable[[], None]:
        return lambda: time.sleep(seconds)  # a busy machine changes that less than the time of products

    ratios = _bench.against(work(0.005), work(0.02), 0.3)
    assert len(ratios) >= 3 and 1.5 < sorted(ratios)[len(ratios) // 2] < 6


def test_a_step_that_fails_leaves_the_garbage_collector_on() -> None:
    with pytest.raises(ZeroDivisionError):
        _bench.against(lambda: None, lambda: 1 // 0, 0.1)
    assert gc.isenabled()


def linear(features: int, n: int) -> _subject.Subject:
    return _subject.Subject(
        nn.Linear(features, 10), nn.CrossEntropyLoss(), torch.randn(n, features), torch.randint(10, (n,)), ""
    )


def test_peaks_of_memory_count_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # by somebody else
    this = linear(3000, 16)
    gradient, rows = 4 * 3001 * 10, 4 * 3001 * 10 * 16
    plain = _bench.peak_memory(_bench.Work(this))
    batch = _bench.peak_memory(_bench.Work(this, lambda: [px.BatchGrad()]))
    assert gradient < plain < 1.2 * gradient
    assert rows < batch < 1.2 * rows + 2 * gradient  # and not only what a second step adds to them


def test_a_bench_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys, "bench", "net_of_mine:Net", "--input", "2x5x5", "--seconds", "0.3",
        "--quantities", "BatchL2Grad+ClippedGrad", "--samples", "8",
    )  # fmt: skip
    assert status == 0
    lines = {line.split("  ")[0]: line.split()[-7:] for line in out.splitlines() if " to " in line}
    assert list(lines) == ["the plain gradient again", "BatchL2Grad+ClippedGrad"]
    assert all(float(words[-1]) > 0 and math.isfinite(float(words[-5])) for words in lines.values())


def test_a_quantity_that_is_refused_has_no_cost() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 10))
    this = _subject.Subject(model, nn.CrossEntropyLoss(), torch.randn(4, 6), torch.randint(10, (4,)), "")
    costs = {c.name: c for c in _bench.costs(this, ["KFRA", "Variance"], 0.1)}
    assert costs["KFRA"].time is None and "LayerNorm" in costs["KFRA"].why
    assert costs["Variance"].time is not None and costs["Variance"].memory is not None


def test_the_network_that_is_timed_by_default() -> None:
    this = _subject.subject("packext._bench:SmallNet", "3x32x32", samples=2)
    output: Any = this.model(this.inputs)
    assert isinstance(output, Tensor) and output.shape == (2, 10)


# -- all ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["demo", "bench", "check", "watch", "report", "audit"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and len(out.splitlines()) > 10 and (command in ("watch", "report") or "--seed" in out)
    assert max(map(len, out.splitlines())) <= 120


def test_the_tables_need_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cli, "find_spec", lambda name: None)
    status, _, err = run(capsys, "bench")
    assert status == 1 and "pip install 'packext[cli]'" in err
