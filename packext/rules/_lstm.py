"""The gradient at an LSTM's gates, by hand: the recurrence of torch's documentation and its adjoint.

What autograd would do with it step by step is done for all steps at once wherever no step waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Entries of gates for which the coefficients of the adjoint are there at once.
PART = 1 << 16


def going(sizes: Tensor, device: torch.device) -> Tensor:
    """Whether sequence n of a packed batch has a step t, `[T, N]`; its entries that hold are in the packed order."""
    return (torch.arange(int(sizes[0])) < sizes[:, None]).to(device)


def padded(rows: Tensor, mask: Tensor) -> Tensor:
    """Packed rows `[*, F]` as `[T, N, F]`."""
    return rows.new_zeros(*mask.shape, rows.shape[1]).masked_scatter(mask[..., None], rows)


@dataclass
class Run:
    """One direction of one layer: `inputs` `[T, N, I]`, `hidden` before each step `[T, N, H]`, and after.

    `gates` `[T, N, 4H]` are i, f, g, o after their nonlinearities, `cells` `[T + 1, N, H]` begin with the initial one.
    `mask` `[T, N]` says which sequences have a step, where not all do.
    """

    inputs: Tensor
    hidden: Tensor
    gates: Tensor
    cells: Tensor
    last: Tensor
    w_hh: Tensor
    mask: Tensor | None

    @property
    def outputs(self) -> Tensor:
        """Hidden states after each step, `[T, N, H]`."""
        return torch.cat([self.hidden[1:], self.last[None]])


def forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Sequence[Tensor | None],
    h: Tensor,
    c: Tensor,
    mask: Tensor | None,
) -> Run:
    """Run one direction of one layer on `x` `[T, N, I]`; those that are not in `mask` `[T, N]` keep their states."""
    width = w_hh.shape[1]
    gates = F.linear(x, w_ih)
    for bias in biases:
        if bias is not None:
            gates += bias
    hidden, cells = x.new_empty(len(x), *h.shape), x.new_empty(len(x) + 1, *c.shape)
    cells[0] = c
    recurrent = w_hh.t()
    for step, gate in enumerate(gates):
        hidden[step] = h
        gate.addmm_(h, recurrent)
        gate[:, : 2 * width].sigmoid_()
        gate[:, 2 * width : 3 * width].tanh_()
        gate[:, 3 * width :].sigmoid_()
        i, f, g, o = gate.chunk(4, 1)
        before = h, c
        c = torch.addcmul(i * g, f, c)
        h = o * c.tanh()
        if mask is not None:
            h, c = (torch.where(mask[step, :, None], new, old) for new, old in zip((h, c), before, strict=True))
        cells[step + 1] = c
    return Run(x, hidden, gates, cells, h, w_hh, mask)


def backward(run: Run, g_y: Tensor | None, g_h: Tensor | None, g_c: Tensor | None) -> Tensor:
    """Gradient at the gates before their nonlinearities, `[T, N, 4H]`, written over `run.gates`."""
    steps, n, width = run.hidden.shape
    found = run.gates.view(steps, n, 4, width)
    dh = run.hidden.new_zeros(n, width) if g_h is None else g_h
    dc = torch.zeros_like(dh) if g_c is None else g_c
    at_once = max(1, PART // max(1, 4 * n * width))
    for lo in reversed(range(0, steps, at_once)):
        part = found[lo : lo + at_once]
        i, f, g, o = part.unbind(2)
        cells = run.cells[lo : lo + at_once + 1]
        tanh = cells[1:].tanh()
        # What a unit of dc, the gradient at the cell, makes of i, f and g; and a unit of dh of o and of c.
        of_cell = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], 2)
        of_output, to_cell = tanh * o * (1 - o), o * (1 - tanh * tanh)
        for step in reversed(range(len(part))):
            if g_y is not None:
                dh = dh + g_y[lo + step]
            at_cell = torch.addcmul(dc, dh, to_cell[step])
            before = at_cell * f[step]  # which is written over next
            torch.mul(at_cell[:, None], of_cell[step], out=part[step, :, :3])
            torch.mul(dh, of_output[step], out=part[step, :, 3])
            if run.mask is None:
                dh, dc = part[step].reshape(n, 4 * width) @ run.w_hh, before
                continue
            on = run.mask[lo + step, :, None]
            part[step].masked_fill_(~on[..., None], 0.0)
            dh = torch.where(on, part[step].reshape(n, 4 * width) @ run.w_hh, dh)
            dc = torch.where(on, before, dc)
    return run.gates


def pairs(consts: dict[str, Any], t: dict[str, Tensor], gs: Sequence[Tensor | None]) -> list[tuple[Run, Tensor]]:
    """For every layer and direction: the run, and the gradient at its gates.

    Args:
        consts: of the use (see `recurrent`).
        t: its tensors, detached.
        gs: gradients at (y, h_n, c_n), or at (h, c) of a cell.

    Returns:
        In torch's order of layers and directions.
    """
    cell, directions = consts["cell"], 2 if consts["bidirectional"] else 1
    x, h, c = t["input"], t["h"], t["c"]
    g_y, g_h, g_c = (None, *gs) if cell else gs
    mask = None if consts["sizes"] is None else going(consts["sizes"], x.device)
    if mask is not None:
        x, g_y = padded(x, mask), None if g_y is None else padded(g_y, mask)
    elif cell:
        x, h, c = x[None], h[None], c[None]
        g_h, g_c = (None if g is None else g[None] for g in (g_h, g_c))
    elif consts["batch_first"]:
        x, g_y = x.transpose(0, 1), None if g_y is None else g_y.transpose(0, 1)
    runs: list[Run] = []
    for layer in range(consts["layers"]):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            biases = t.get(f"{k}.bih"), t.get(f"{k}.bhh")
            sequence = x.flip(0) if direction else x
            on = mask.flip(0) if direction and mask is not None else mask
            run = forward(sequence, t[f"{k}.ih"], t[f"{k}.hh"], biases, h[k], c[k], on)
            runs.append(run)
            if layer + 1 < consts["layers"]:
                outputs.append(run.outputs.flip(0) if direction else run.outputs)
        x = torch.cat(outputs, -1) if outputs else x
    found = [run.gates for run in runs]
    for layer in reversed(range(consts["layers"])):
        parts = [None] * directions if g_y is None else list(g_y.chunk(directions, -1))
        below = []
        for direction, part in enumerate(parts):
            k = layer * directions + direction
            part = part.flip(0) if direction and part is not None else part
            found[k] = backward(runs[k], part, None if g_h is None else g_h[k], None if g_c is None else g_c[k])
            if layer:
                to_input = found[k] @ t[f"{k}.ih"]
                below.append(to_input.flip(0) if direction else to_input)
        if below:
            g_y = torch.stack(below).sum(0)
    return list(zip(runs, found, strict=True))
