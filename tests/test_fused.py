"""The fused kernel against the plain routes: by Triton's interpreter (see conftest), and on CUDA where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import _fused
from packext._factored import Factored, Outer
from packext._quantity import Ask, Quantity
from packext._statistics import Statistics

pytest.importorskip("triton")
# Of the interpreter of Triton 3.5, which torch 2.9 comes with.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WANTS = ("sq_norms", "total", "second_moment", "scatter", "dots")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with torch.no_grad():
        yield
    _fused._WINS.clear()


class Forms(Quantity):
    """Hands out every parameter's individual gradients in their factors."""

    savefield = "form"

    def result(self, ask: Ask) -> Any:
        return ask.statistics.form


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    draw = torch.randn
    return {
        "linear over tokens": (nn.Linear(5, 7), draw(3, 4, 5)),
        "several blocks": (nn.Linear(70, 130), draw(2, 35, 70)),
        "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), draw(3, 3, 11)),
        "conv2d": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), draw(4, 3, 7, 8)),
        "conv2d of groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), draw(3, 4, 6, 5)),
        "conv2d with many features": (nn.Conv2d(9, 3, 3, padding=1), draw(2, 9, 7, 7)),
        "channels last": (nn.Conv2d(3, 5, 3), draw(3, 3, 6, 6).to(memory_format=torch.channels_last)),
        "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), draw(3, 3, 4, 5)),
        "transposed of groups": (nn.ConvTranspose1d(4, 6, 3, groups=2), draw(3, 4, 5)),
    }


NETS = list(nets())


def forms(net: nn.Module, x: Tensor) -> list[Factored]:
    """Of all parameters, in one pass whose loss weighs entries unequally."""
    net, x = px.extend(net.to(DEVICE)), x.to(DEVICE)
    with torch.enable_grad(), px.backpack(Forms()):
        y = net(x)
        (y * torch.linspace(-1, 1, y[0].numel(), device=DEVICE, dtype=y.dtype).view_as(y[0])).square().sum().backward()
    return [vars(p)["form"] for p in net.parameters()]


def oracle(form: Factored) -> dict[str, Tensor]:
    rows = form.rows(0, form.n).double()
    return {
        "sq_norms": rows.flatten(1).square().sum(1),
        "total": rows.sum(0),
        "second_moment": rows.square().sum(0),
        "scatter": (rows - rows.mean(0)).square().sum(0),
        "dots": rows.flatten(1) @ rows.sum(0).flatten(),
    }


def compare(found: dict[str, Tensor], form: Factored, rtol: float = 1e-5) -> None:
    for want, truth in oracle(form).items():
        assert found[want].shape == truth.shape
        torch.testing.assert_close(found[want].double(), truth, rtol=rtol, atol=rtol * float(truth.abs().max()))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("per_part", [None, 2])
def test_kernel_is_right(name: str, per_part: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if per_part is not None:
        monkeypatch.setattr(_fused, "_per_part", lambda n, programs, device: per_part)
    form = forms(*nets()[name])[0]
    assert isinstance(form, Outer) and _fused.takes(form, WANTS)
    compare(_fused.moments(form, WANTS), form)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            torch.bfloat16, marks=pytest.mark.skipif(not CUDA, reason="Triton's interpreter has no such `dot`")
        ),
        torch.float16,
    ],
)
def test_kernel_takes_half_precision(dtype: torch.dtype) -> None:
    form = forms(nn.Linear(5, 7).to(dtype), torch.randn(3, 4, 5).to(dtype))[0]
    assert isinstance(form, Outer) and form.g.dtype == dtype
    compare(_fused.moments(form, WANTS), form)


@pytest.mark.parametrize("want", WANTS)
def test_kernel_gives_what_is_wanted_alone(want: str) -> None:
    form = forms(*nets()["conv2d"])[0]
    assert isinstance(form, Outer)
    found = _fused.moments(form, [want])
    assert set(found) <= {want, "total"}
    torch.testing.assert_close(found[want].double(), oracle(form)[want], rtol=1e-5, atol=1e-4)


def test_scatter_does_not_cancel() -> None:
    """Of rows that hardly differ: by the difference of moments, nothing would be left in float32."""
    x = torch.ones(6, 4, 3) + 1e-4 * torch.randn(6, 4, 3)
    form = Outer(x[:, None].to(DEVICE), torch.ones(6, 1, 2, 4, device=DEVICE), (2, 3))
    rows = form.rows(0, 6).double()
    truth = (rows - rows.mean(0)).square().sum(0)
    torch.testing.assert_close(_fused.moments(form, ["scatter"])["scatter"].double(), truth, rtol=1e-2, atol=0)


def test_kernel_leaves_the_rest_to_the_plain_routes() -> None:
    torch.manual_seed(0)
    dense, vector, solid, double = (
        forms(nn.Linear(5, 7), torch.randn(3, 5))[0],
        forms(*nets()["linear over tokens"])[1],
        forms(nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 4, 4))[0],
        forms(nn.Linear(5, 7).double(), torch.randn(3, 4, 5).double())[0],
    )
    assert not any(_fused.takes(form, WANTS) for form in (dense, vector, solid, double))
    form = forms(*nets()["conv2d"])[0]
    assert not _fused.takes(form, ["sq_norms", "gram"]) and not _fused.takes(form, [])


def forced(form: Any, wants: Any, plain: Any) -> dict[str, Tensor] | None:
    """The kernel wherever it can be, whatever the device and the time."""
    return _fused.moments(form, wants) if not torch.is_grad_enabled() and _fused.takes(form, wants) else None


def test_a_pass_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that reads these statistics, `.grad` included, is as by the plain routes."""

    def passed() -> tuple[list[Any], list[str]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Linear(25, 6)).to(DEVICE)
        net, x = px.extend(net), torch.randn(4, 3, 5, 5, device=DEVICE)
        with torch.enable_grad(), px.backpack(px.BatchL2Grad(), px.Variance(), px.SumGradSquared(), px.GradDot()):
            net(x).square().sum((1, 2)).mean().backward()
        fields = ("grad", "batch_l2", "variance", "sum_grad_squared", "grad_dot")
        found = [getattr(p, field) for p in net.parameters() for field in fields]
        with torch.enable_grad():
            told = px.explain(net, x)
        return found, [use.route for use in told.uses]

    plain, _ = passed()
    monkeypatch.setattr(_fused, "answers", forced)
    fused, routes = passed()
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    assert any("kernel" in route for route in routes)


def test_what_is_faster_and_right_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    form = forms(*nets()["conv2d"])[0]
    assert isinstance(form, Outer)
    plain, times = {k: v.float() for k, v in oracle(form).items()}, iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr("triton.testing.do_bench", lambda way, **_: next(times))
    assert _fused._race(lambda: _fused.moments(form, WANTS), lambda: plain)
    assert not _fused._race(lambda: _fused.moments(form, WANTS), lambda: plain)  # slower
    wrong = {**plain, "scatter": plain["scatter"] * 1.1}
    assert not _fused._race(lambda: wrong, lambda: plain)

    def fails() -> dict[str, Tensor]:
        raise RuntimeError("Failed to find C compiler")

    assert not _fused._race(fails, lambda: plain)  # the plain routes are right without it
    with pytest.raises(RuntimeError, match="C compiler"):
        _fused._race(lambda: plain, fails)


@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32")  # torch 2.9, of the older one
def test_precision_is_what_the_user_asked_of_torch() -> None:
    """By the older function or the newer attribute; where both were used, the former cannot be read any more."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for asked, precision in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(asked)
            assert _fused._precision() == precision
        for asked in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = asked
            assert _fused._precision() == asked
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from packext._kernel import moments

wants = dict(NORMS=True, TOTAL=True, SQUARES=True, SPREAD=True)
const = dict(KERNEL_H=3, KERNEL_W=3, BLOCK_O=64, BLOCK_I=64, BLOCK_S=32, **wants)
for kind, precision, device in (("fp32", "ieee", 80), ("fp32", "tf32", 90), ("bf16", "tf32", 90), ("fp16", "ieee", 75)):
    types = {name: "i32" for name in moments.arg_names}
    types |= {name: "*fp32" for name in ("norms", "totals", "squares", "means", "spreads")}
    types |= {"x": "*" + kind, "g": "*" + kind}
    types |= {name: "constexpr" for name in [*const, "PRECISION"]}
    source = ASTSource(moments, types, {**const, "PRECISION": precision})
    print(len(compile(source, target=GPUTarget("cuda", device, 32), options={"num_warps": 8}).asm["cubin"]))
"""


def test_kernel_compiles_for_devices_that_are_not_here(tmp_path: Path) -> None:
    """To machine code of four types and three generations; how much time a product takes there, it does not tell."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4


@pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
@pytest.mark.parametrize("name", NETS)
def test_on_cuda_cases_are_decided_once(name: str) -> None:
    form = forms(*nets()[name])[0]
    for _ in range(2):
        statistics = Statistics(form)
        statistics.prepare(["sq_norms", "scatter"], deliver=True)
        truth = oracle(form)
        for want in ("sq_norms", "scatter"):
            torch.testing.assert_close(statistics[want].double(), truth[want], rtol=1e-3, atol=1e-3)
    assert len(_fused._WINS) == 1
