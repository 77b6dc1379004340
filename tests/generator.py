"""Random models, each from a seed: layers, sharing, branches, views, and values made of parameters.

`generate(seed)` draws a `Problem`. Its model is a chain of blocks over a hidden state of one of four
kinds: "vec" [N, C], "seq" [N, T, C], "tmj" (time-major) [T, N, C], "img" [N, C, H, W]. Some problems
are ill on purpose: a block lets samples influence each other, or uses what packext may refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests import generator_ill, generator_layers  # noqa: F401 - they register their blocks
from tests.generator_axes import from_image
from tests.generator_blocks import linear
from tests.generator_draw import COUPLERS, IDS, MAYBE, Draw, State, pick
from tests.generator_losses import Record, Whole, any_loss, flat, summed, targets_of


class Model(nn.Module):
    """Blocks in a chain, behind an interface that differs from model to model."""

    def __init__(self, blocks: list[nn.Module], state: State, out: State, form: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.start, self.out, self.form = state, out, form
        self.head = nn.Linear(out.c, 2) if form["outputs"] != "one" else None
        self.unused = nn.Parameter(torch.randn(3)) if form["unused"] else None
        self.aux: Tensor | None = None

    def forward(self, x: Any, ids: Any = None) -> Any:
        if isinstance(x, dict):
            x, ids = x["x"], x["ids"]
        if self.form["batch_axis"]:
            ids = ids.t()
        h, extra = x, {"ids": ids}
        for i, step in enumerate(self.blocks):
            h = step(h, extra)
            if i == self.form["aux at"]:
                self.aux = h.movedim(self.form["aux axis"], 0).flatten(1).tanh()
        if self.head is None:
            return h
        other = self.head(h).tanh()
        if self.form["outputs"] == "tuple, in part":
            return h, {"not used": other}
        return Record(h, [None, other]) if self.form["outputs"] == "record" else {"a": h, "b": (other, None)}


@dataclass
class Problem:
    """A model with inputs, and what is known of it.

    Attributes:
        seed: from which it was drawn.
        model: not extended.
        loss: a loss module; the loss of a batch is the mean or the sum of those of the samples.
        axis: of the samples in the inputs.
        out_axis: of the samples in the outputs.
        ill: "" for a model that must come out right; "coupled" or "maybe refused".
        label: the blocks, in words.
        sizes: N and T of each batch.
        draw: the source of the choices that are made later.
        aux: whether the loss has another term, of a hidden state of each sample.
        draws: whether a forward pass draws random numbers.
    """

    seed: int
    model: Model
    loss: nn.Module
    axis: int
    out_axis: int
    ill: str
    label: str
    sizes: list[tuple[int, int]]
    draw: Draw = field(repr=False)
    aux: bool = False
    draws: bool = False

    def inputs(self, n: int, t: int) -> Any:
        """A batch of `n` samples with `t` positions."""
        s = self.model.start
        shape = {"vec": (n, s.c), "seq": (n, t, s.c), "tmj": (t, n, s.c), "img": (n, s.c, s.side, s.side)}[s.kind]
        x, ids = torch.randn(shape), torch.randint(IDS, (n, t))
        if self.axis:
            ids = ids.t()
        form = self.model.form["inputs"]
        if form == "kwargs":
            return {"x": x, "ids": ids}
        return ({"x": x, "ids": ids},) if form == "dict" else (x, ids)

    def targets(self, outputs: Any) -> Any:
        """Targets for these outputs."""
        return [targets_of(self.loss, y) for y in flat(outputs)]

    def whole(self, outputs: Any, targets: Any) -> Whole:
        """The loss of this batch, which takes single samples as well."""
        each = summed(self.loss)
        with torch.no_grad():
            pairs = list(zip(flat(outputs), targets, strict=True))
            shares = [float(each(y, t) / self.loss(y, t)) for y, t in pairs]
        return Whole(self.loss, shares, targets[0].shape[self.out_axis], self.out_axis)

    def total(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of a batch."""
        parts = [self.loss(y, t) for y, t in zip(flat(outputs), targets, strict=True)]
        total = sum(parts[1:], parts[0])
        if self.aux:
            aux = self.model.aux
            assert aux is not None
            return total + aux.square().sum() / (1 if self.loss.reduction == "sum" else len(aux))
        return total


def generate(seed: int) -> Problem:
    """The problem of this seed. Build it with float64 as the default dtype."""
    d = Draw(seed)
    kind = d.choice(["vec", "seq", "seq", "seq", "tmj", "img"])
    c = d.width() if kind != "img" else d.choice([1, 2, 4])
    state = start = State(kind, c, d.t, d.choice([2, 3, 4]))
    d.fixed_t = kind == "img"
    fate = d.random()
    ill = "coupled" if fate < 0.12 else "maybe refused" if fate < 0.2 else ""
    length = d.randint(2, 6)
    where = d.randint(1 if ill == "coupled" else 0, length - 1)
    blocks: list[nn.Module] = []
    for i in range(length):
        m, after = pick(d, state)
        if i == where and ill:
            choices = (COUPLERS if ill == "coupled" else MAYBE)[state.kind]
            if choices:
                before, _ = d.choice(sorted(choices, key=lambda build: build.__name__))(d, state)
                blocks.append(before)
            else:
                ill = ""
        blocks.append(m)
        state = after
    if state.kind == "img" or d.chance(0.4):
        if state.kind == "img":
            m, state = from_image(d, state)
            blocks.append(m)
        m, state = linear(d, state)
        blocks.append(m)
    form = {
        "batch_axis": start.axis,
        "outputs": d.choice(["one"] * 6 + ["two heads", "record", "tuple, in part"]),
        "inputs": d.choice(["args", "kwargs", "dict"]),
        "unused": d.chance(0.1),
        "aux at": -1,
        "aux axis": 0,
    }
    aux = not ill and d.chance(0.04)
    if aux:  # of what forward does not return
        form["aux at"], form["aux axis"] = len(blocks) - 1, state.axis
        ill = "maybe refused"
    model = Model(blocks, start, state, form)
    loss = any_loss(d, state, form["outputs"] in ("one", "tuple, in part"))
    sizes = [(d.n, d.t)]
    if d.chance(0.5) and ill != "maybe refused":
        n = d.choice([1, 2, 3, 4, 5])
        sizes.append((n, d.t if d.fixed_t else d.choice([n, d.t, d.randint(1, 5)])))
    label = " > ".join(map(str, blocks))
    return Problem(
        seed, model, loss, start.axis, state.axis, ill, label, sizes, d, aux, d.training_random
    )  # fmt: skip
