"""What quantities cost in large trainings, on paper, from what is counted: ``python -m benchmarks.scaling``.

Counted on a small transformer: matrix products beyond those of the plain step (torch's FLOP counter), and bytes that a
rank hands to the others for results of all (`backpack(..., group=...)`). Formulas for both must agree with the counts
before they are applied to models that no small machine holds.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import packext as px
from benchmarks.problems import Transformer
from benchmarks.summary import fill

RESULTS = Path(__file__).parent / "results" / "scaling.json"
PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
BATCH, LENGTH, WIDTH, DEPTH, VOCABULARY = 4, 128, 128, 2, 100

#: Bytes a second to and from memory, useful FLOPs a second (0.4 of the peak in bf16), bytes a second to other
#: devices of the node and to other nodes: of an H100 SXM, by its data sheet, with one 400 Gb/s adapter for each.
MEMORY, FLOPS, NODE, CLUSTER = 3.35e12, 0.4 * 989e12, 450e9, 50e9


@dataclass(frozen=True)
class Matrix:
    """A linear map `[outputs, inputs]` that a model has `count` times."""

    inputs: int
    outputs: int
    count: int

    @property
    def entries(self) -> int:
        return self.inputs * self.outputs * self.count

    @property
    def factors(self) -> int:
        """Entries of both Kronecker factors."""
        return (self.inputs**2 + self.outputs**2) * self.count


@dataclass(frozen=True)
class Cost:
    """What a quantity adds to a step of n samples of t tokens on a rank, of which P are the parameters.

    Attributes:
        title: its name.
        quantity: makes it.
        products: FLOPs of matrix products over 2 P n t, of a list of matrices and t (3 are the plain step's own).
        traffic: bytes to and from memory over P, for each sample, where rows are not kept in cache.
        sent: entries that a rank hands to the others, of the matrices and n.
        held: entries of the result of one rank's samples, likewise.
    """

    title: str
    quantity: Callable[[], Any]
    products: Callable[[list[Matrix], int], float]
    traffic: float
    sent: Callable[[list[Matrix], int], float]
    held: Callable[[list[Matrix], int], float]
    gathered: bool = False
    """Whether every rank is handed what each of the others has, and not their sum."""


def entries(net: list[Matrix]) -> int:
    return sum(m.entries for m in net)


def sides(net: list[Matrix]) -> float:
    """(d² + p²) / (d p) of all matrices together; 6 of 16 blocks of a large A are copied from the others."""
    return sum(m.count * (m.inputs**2 * (0.625 if m.inputs >= 128 else 1) + m.outputs**2) for m in net) / entries(net)


COSTS = [
    Cost(
        "BatchL2Grad",
        px.BatchL2Grad,
        lambda net, t: 0,
        8,
        lambda net, n: n * layers(net),
        lambda net, n: n * layers(net),
        gathered=True,
    ),
    Cost(
        "SumGradSquared",
        px.SumGradSquared,
        lambda net, t: 0,
        16,
        lambda net, n: entries(net),
        lambda net, n: entries(net),
    ),
    Cost("Variance", px.Variance, lambda net, t: 0, 16, lambda net, n: 2 * entries(net), lambda net, n: entries(net)),
    Cost(
        "BatchGrad",
        px.BatchGrad,
        lambda net, t: 0,
        4,
        lambda net, n: n * entries(net),
        lambda net, n: n * entries(net),
        gathered=True,
    ),
    Cost("DiagGGNMC", px.DiagGGNMC, lambda net, t: 2, 16, lambda net, n: entries(net), lambda net, n: entries(net)),
    Cost("KFAC", px.KFAC, lambda net, t: 1 + sides(net), 0, lambda net, n: factors(net), lambda net, n: factors(net)),
    Cost(
        'KFAC(fisher="empirical")',
        lambda: px.KFAC(fisher="empirical"),
        lambda net, t: sides(net),
        0,
        lambda net, n: factors(net),
        lambda net, n: factors(net),
    ),
    Cost(
        'KFAC(approx="reduce")',
        lambda: px.KFAC(approx="reduce"),
        lambda net, t: 1 + sides(net) / t,
        0,
        lambda net, n: factors(net),
        lambda net, n: factors(net),
    ),
]


def layers(net: list[Matrix]) -> int:
    return sum(m.count for m in net)


def factors(net: list[Matrix]) -> int:
    return sum(m.factors for m in net)


def small() -> tuple[nn.Module, list[nn.Parameter], list[Matrix]]:
    """A transformer, its matrices, and their sizes."""
    torch.manual_seed(0)
    model = Transformer(VOCABULARY, LENGTH, WIDTH, 4, DEPTH)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return model, [m.weight for m in linear], [Matrix(m.in_features, m.out_features, 1) for m in linear]


def step(model: nn.Module, loss_fn: nn.Module, context: Any) -> None:
    ids = torch.randint(VOCABULARY, (2, BATCH, LENGTH))
    with context:
        loss_fn(model(ids[0]), ids[1]).backward()


def counted(cost: Cost | None) -> tuple[int, int]:
    """FLOPs of a step after the first, and bytes that are handed over in it."""
    model, weights, _ = small()
    loss_fn, sent = nn.CrossEntropyLoss(), 0

    def all_reduce(t: torch.Tensor, **_: Any) -> None:
        nonlocal sent
        sent += t.nbytes

    def all_gather(parts: list[torch.Tensor], t: torch.Tensor, **_: Any) -> None:
        nonlocal sent
        sent += t.nbytes
        parts[0].copy_(t)

    if cost is not None:
        px.extend(model), px.extend(loss_fn)
    quantities = [] if cost is None else [cost.quantity()]
    for _ in range(2):  # the first step of a structure probes it
        with FlopCounterMode(display=False) as counter:
            step(model, loss_fn, px.backpack(*quantities, parameters=weights))
    if cost is not None:
        with mock.patch.object(dist, "all_reduce", all_reduce), mock.patch.object(dist, "all_gather", all_gather):
            step(
                model, loss_fn, px.backpack(cost.quantity(), parameters=weights, scale="sample", group=dist.group.WORLD)
            )
    return counter.get_total_flops(), sent


def count() -> list[dict[str, Any]]:
    """Counts beside formulas; raises where they differ by more than 2 %."""
    _, weights, net = small()
    plain, _ = counted(None)
    unit, gradient = 2 * entries(net) * BATCH * LENGTH, 4 * entries(net)
    found = [{"title": "the plain step", "products": plain / unit, "sent": 1.0}]
    for cost in COSTS:
        flops, sent = counted(cost)
        row = {"title": cost.title, "products": (flops - plain) / unit, "sent": sent / gradient}
        for key, want in (("products", cost.products(net, LENGTH)), ("sent", 4 * cost.sent(net, BATCH) / gradient)):
            if abs(row[key] - want) > 0.02 * max(1e-3, want):
                raise AssertionError(f"{cost.title}, {key}: counted {row[key]:.4g}, by the formula {want:.4g}")
        found.append(row)
    return found


@dataclass(frozen=True)
class Setting:
    """A training: a model's matrices, layer by layer, and how it is shared out."""

    title: str
    net: list[Matrix]
    ranks: int
    samples: int
    tokens: int

    @property
    def step(self) -> float:
        """Seconds of a plain step: matrix products of linear maps alone."""
        return 6 * entries(self.net) * self.samples * self.tokens / FLOPS

    def own(self, cost: Cost) -> float:
        """Seconds that a quantity adds on each rank."""
        p = entries(self.net)
        return (
            (2 * cost.products(self.net, self.tokens) * self.tokens / FLOPS + cost.traffic / MEMORY) * p * self.samples
        )

    def sending(self, cost: Cost) -> float:
        """Seconds for all ranks to have results of all, if nothing else is done meanwhile."""
        times = self.ranks - 1 if cost.gathered else 2
        return times * 4 * cost.sent(self.net, self.samples) / (NODE if self.ranks <= 8 else CLUSTER)

    def solving(self) -> float:
        """Seconds of inverses of all Kronecker factors (n³ FLOPs each by Cholesky, in float32), shared by the ranks."""
        return sum(m.count * (m.inputs**3 + m.outputs**3) for m in self.net) / (0.4 * 67e12) / self.ranks


def llama(width: int, keys: int, wide: int, depth: int) -> list[Matrix]:
    """The linear maps of a Llama without its head, of which a factor would be of the size of the vocabulary."""
    return [
        Matrix(width, width, 2 * depth),
        Matrix(width, keys, 2 * depth),
        Matrix(width, wide, 2 * depth),
        Matrix(wide, width, depth),
    ]


SETTINGS = [
    Setting("7B on 8 x H100, 2 samples of 4096 tokens on each", llama(4096, 4096, 11008, 32), 8, 2, 4096),
    Setting("70B on 512 x H100, 1 sample of 4096 tokens on each", llama(8192, 1024, 28672, 80), 512, 1, 4096),
]


def paper(setting: Setting) -> list[dict[str, Any]]:
    """What each quantity would cost, and the interval that keeps it at a twentieth of the training."""
    found = []
    for cost in COSTS:
        added = setting.own(cost) + setting.sending(cost)
        solving = setting.solving() if "KFAC" in cost.title else 0.0
        found.append(
            {
                "title": cost.title,
                "own": setting.own(cost) / setting.step,
                "sending": setting.sending(cost) / setting.step,
                "solving": solving / setting.step,
                "held": 4 * cost.held(setting.net, setting.samples * (setting.ranks if cost.gathered else 1)) / 1e9,
                "every": max(1, math.ceil((added + solving) / setting.step / 0.05)),
            }
        )
    return found


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Markdown of each table by its name."""
    lines = ["| | matrix products, of the plain step's | sent, of the gradient's bytes |", "|---|---:|---:|"]
    lines += [f"| {r['title']} | {r['products'] / 3:.2f} | {r['sent']:.3g} |" for r in found["counted"]]
    out = {"counted": "\n".join(lines)}
    for name, setting in zip(("small", "large"), SETTINGS, strict=True):
        lines = [
            f"{setting.title} ({entries(setting.net) / 1e9:.1f} billion entries in linear maps without the head; a "
            f"plain step of {setting.step:.2f} s):",
            "",
            "| | on each rank | sending | inverses | result on each rank | interval for 5 % |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for r in found[name]:
            inverses = f"{r['solving']:.1%}" if r["solving"] else ""
            held = f"{r['held']:.3g} GB" if r["held"] >= 0.01 else "under 10 MB"
            every = "every step" if r["every"] == 1 else f"{r['every']}"
            lines.append(f"| {r['title']} | {r['own']:.1%} | {r['sending']:.1%} | {inverses} | {held} | {every} |")
        out[name] = "\n".join(lines)
    return out


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            found: dict[str, Any] = {"counted": count()}
        finally:
            dist.destroy_process_group()
    found |= {name: paper(setting) for name, setting in zip(("small", "large"), SETTINGS, strict=True)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for text in tables(found).values():
        Console().print(text)
    fill(PAGE, tables(found), apart=True)


if __name__ == "__main__":
    main()
