"""Custom module: layers that packext has never seen need no code, and those that mix samples are refused.

Learned frequencies in front, a head of cosine similarities with a learned temperature behind. A slow computation
confirms what is found. The drawing is `px.explain`: each use of each parameter, and how it is dealt with. A third layer
takes the mean over the batch away, and samples then have no gradients of their own.
"""

from __future__ import annotations

import torch
from frame import Shown, digits, run
from torch import Tensor, nn

import packext as px
from packext import testing


class Waves(nn.Module):
    """Sine and cosine of the input along learned directions."""

    def __init__(self, inputs: int, waves: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(waves, inputs) / 4)

    def forward(self, x: Tensor) -> Tensor:
        phase = torch.einsum("ni,wi->nw", x, self.frequencies)
        return torch.cat([phase.sin(), phase.cos()], 1)


class Cosines(nn.Module):
    """The cosine of the input and a prototype of each class, over a temperature."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(classes, inputs))
        self.log_temperature = nn.Parameter(torch.tensor(-2.0))

    def forward(self, x: Tensor) -> Tensor:
        x, prototypes = nn.functional.normalize(x), nn.functional.normalize(self.prototypes)
        return x @ prototypes.T * (-self.log_temperature).exp()


class Centred(nn.Module):
    """What samples have in common is taken away, so that each depends on all."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def show(small: bool) -> Shown:
    torch.manual_seed(0)
    x, y = (t[: 4 if small else 12] for t in digits())
    model, loss_fn = nn.Sequential(Waves(64, 8), nn.Linear(16, 16), nn.ReLU(), Cosines(16, 10)), nn.CrossEntropyLoss()
    figure = px.explain(model, x).figure()
    report = testing.check(model, loss_fn, x, y)
    numbers: dict[str, object] = {"first-order quantities of parameters compared": len(report)}
    numbers["their largest relative error"] = max(entry.error for entry in report)

    px.extend(model.double()), px.extend(loss_fn)
    with px.backpack(px.DiagGGNExact()) as results:
        loss_fn(model(x.double()), y).backward()
    want = testing.curvature_rows(model, nn.CrossEntropyLoss(reduction="sum"), x.double(), y)
    errors = [
        testing.relative_error(results[k].diag_ggn_exact * len(x), w.square().sum((0, 1))) for k, w in want.items()
    ]
    numbers["the same of the GGN's diagonal"] = max(errors)

    coupled, loss_fn = px.extend(nn.Sequential(Waves(64, 8), Centred(), nn.Linear(16, 10))), nn.CrossEntropyLoss()
    try:
        with px.backpack(px.BatchGrad()):
            loss_fn(coupled(x), y).backward()
    except px.PackextError as error:
        numbers["with the mean over the batch"] = str(error).splitlines()[0]
    return figure, numbers


if __name__ == "__main__":
    run(show)
