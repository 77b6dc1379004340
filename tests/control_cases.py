"""Controllers as their tests have them, and problems whose numbers are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext import optim

LOSS, EACH = px.extend(nn.CrossEntropyLoss()), px.extend(nn.CrossEntropyLoss(reduction="none"))


def sgd(model: nn.Module, lr: float = 0.2) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr)


#: From an optimizer a controller, and what its step takes of the individual losses.
CASES: dict[str, tuple[Callable[[Any], optim.Controller], Callable[[Tensor], tuple[Any, ...]]]] = {
    "CABS": (lambda o: optim.CABS(o, 2), lambda each: (each.mean(),)),
    "NoiseScale": (lambda o: optim.NoiseScale(2, 512), lambda each: ()),
    "NormTest": (lambda o: optim.NormTest(2, 512), lambda each: ()),
    "InnerProductTest": (lambda o: optim.InnerProductTest(4, 512), lambda each: ()),
    "EvidenceStopping": (lambda o: optim.EvidenceStopping(samples=48), lambda each: ()),
    "Alpha": (lambda o: optim.Alpha(o), lambda each: ()),
    "ImportanceSampler": (lambda o: optim.ImportanceSampler(12, 12), lambda each: ()),
}
NAMES = list(CASES)


def give(name: str, control: Any, model: nn.Module, batch: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """A backward pass within `emit`; the individual losses."""
    with optim.emit(control, **options):
        if name == "ImportanceSampler":
            index = torch.tensor(next(iter(control)))
            each = EACH(model(batch[0][index]), batch[1][index])
            control.loss(each, index).backward()
        else:
            each = EACH(model(batch[0]), batch[1])
            (control.loss(each) if name == "Alpha" else each.mean()).backward()
    return each


def step(name: str, control: Any, model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    each = give(name, control, model, batch)
    control.step(*CASES[name][1](each))
    optimizer.step()


def plain(state: Any) -> Any:
    """State for comparisons, NaN like NaN."""
    if isinstance(state, Tensor):
        return torch.nan_to_num(state.double(), nan=-7.0).tolist()
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items()}
    return [plain(v) for v in state] if isinstance(state, list) else state


def flat(state: Any) -> Iterator[float]:
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        for v in state:
            yield from flat(v)
    elif isinstance(state, Tensor):
        yield from state.double().flatten().tolist()
    elif state is not None:
        yield float(state)


class Shift(nn.Module):
    def __init__(self, at: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(at))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta - x


HALF = px.extend(nn.MSELoss())  # the mean over two entries is half of the squared norm


def noise(n: int, s: float, seed: int) -> Tensor:
    return s * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
