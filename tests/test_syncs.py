"""Where a backward pass waits for the device: nowhere but where docs/performance.md says so.

Seen on the CPU, by the operations for which an accelerator, which computes on its own, has to send a number or a size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import packext as px

aten = torch.ops.aten
#: A number, or the size of a result, is needed before the next call can be made.
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
ROOT = Path(px.__file__).parent
N = 6


def place() -> str:
    """Which function of packext is under way, as "file: function"."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if ROOT in Path(code.co_filename).parents and not code.co_name.startswith("<"):
            return f"{Path(code.co_filename).relative_to(ROOT).as_posix()}: {code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Operations(TorchDispatchMode):
    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITS or by_mask:
            self.found.add(place())
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.found.add(place())
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[set[str]]:
    found: set[str] = set()
    with Operations(found), Reads(found):
        yield found


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(9, 6), nn.Embedding(5, 6), nn.Linear(6, 3)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1]).expand(x.shape))
        return self.out(self.block(self.words(x) + places).mean(1))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.steps(x)[0].mean(1))


def problems() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten()]
    return {
        "perceptron": (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)), torch.randn(N, 5)),
        "convolutions": (nn.Sequential(*convolutions, nn.Linear(16, 3)), torch.randn(N, 2, 6, 6)),
        "words": (Words(), torch.randint(9, (N, 4))),
        "bags": (nn.Sequential(nn.EmbeddingBag(9, 5), nn.Linear(5, 3)), torch.randint(9, (N, 4))),
        "chain": (nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)), torch.randn(N, 5)),
        "steps": (Steps(), torch.randn(N, 4, 4)),
    }


FIRST_ORDER = [
    px.BatchGrad(), px.BatchGrad(subsampling=[0, 2]), px.BatchL2Grad(), px.SumGradSquared(), px.Variance(),
    px.BatchDotGrad(), px.GradDot(), px.ProjectedGrad((2, 3)), px.ClippedGrad(0.3), px.ClippedGrad(0.3, per_layer=True),
    px.GradHistogram(), px.DiagEF(), px.KFAC(fisher="empirical"),
]  # fmt: skip
GGN = [px.DiagGGNExact(), px.DiagGGNMC(), px.SqrtGGNExact(), px.GGNGram(), px.KFAC(), px.EKFAC()]
HESSIAN = [px.DiagHessian(), px.HessianTrace(), px.DiagHessianMC(), px.TopEigenvalues(ncv=4), px.HMP(), px.GGNMP()]


def syncs(
    model: nn.Module, x: Tensor, quantity: Any, loss_fn: Callable[[], nn.Module] = nn.CrossEntropyLoss, **options: Any
) -> set[str]:
    """Of the third backward pass: no multiple of three is a power of two, so that the probe does not look at it."""
    options.setdefault("scale", "sample")
    loss, y = px.extend(loss_fn()), torch.arange(len(x)) % 3
    found: set[str] = set()
    for _ in range(3):
        with px.backpack(quantity, **options):
            out = model(x)
            value = loss(out if out.dim() == 2 else out.mean(1), y)
            with watched() as found:
                value.backward()
    return found


def listed() -> set[str]:
    """What the page has in the first column of its table: a function, or a whole file."""
    text = (ROOT.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    table = text.partition("<!-- waits: begin -->")[2].partition("<!-- waits: end -->")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")][2:]
    return {part for cell in cells for part in cell.split("`")[1::2]}


def test_what_waits_is_what_the_page_says() -> None:
    expected, found = listed(), set()
    asked = {
        "perceptron": FIRST_ORDER + GGN + HESSIAN,
        "convolutions": [*FIRST_ORDER, px.DiagGGNMC(), px.KFAC()],
        "words": [*FIRST_ORDER, px.KFAC()],
        "bags": [px.BatchL2Grad(), px.Variance()],
        "chain": [px.KFRA(), px.PCHMP()],
    }
    for name, quantities in asked.items():
        model, x = problems()[name]
        px.extend(model)
        for quantity in quantities:
            with suppress(px.UnsupportedUseError):  # Kronecker factors of what has none
                found |= syncs(model, x, quantity)
    model, x = px.extend(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))), torch.randn(N, 4, 5)
    found |= syncs(model, x, px.BatchL2Grad(), per="token", mask=torch.ones(N, 4, dtype=torch.bool))
    model, x = px.extend(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3))), torch.randn(N, 2, 40)
    found |= syncs(model, x, px.BatchDotGrad())
    model, x = px.extend(nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1))), torch.randn(N, 5)
    found |= syncs(model, x, px.DiagGGNMC(), nn.NLLLoss)
    assert "_backpack.py: _sample_factor" in found  # and not nothing, if torch no longer shows these operations
    assert {site if site in expected else site.partition(":")[0] for site in found} == expected


def test_what_waits_for_nothing() -> None:
    """First-order quantities of a model without embeddings, but for those that are of the samples' own losses."""
    waits = (px.Variance, px.GradHistogram, px.ClippedGrad, px.DiagEF, px.KFAC)
    free = [q for q in FIRST_ORDER if not isinstance(q, waits)]
    for name in ("perceptron", "convolutions", "steps"):
        model, x = problems()[name]
        px.extend(model)
        for quantity in free:
            found = syncs(model, x, quantity, scale="loss") - {"_factored/outer.py: _sound"}  # on the CPU alone
            assert not found, (name, quantity)
