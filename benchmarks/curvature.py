"""The reference of the curvature rows: a loop over samples and columns of a root, in float64.

For a cross-entropy that is a mean over N samples of T predictions p each, a column of a root of its Hessian is
`(p - e_y) / sqrt(N T)` at every prediction, for labels y drawn from p; and where T = 1 the columns
`sqrt(p_c) (p - e_c) / sqrt(N)` of all classes c are an exact root. A contender that draws labels tells which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.problems import Instance

Factors = list[Tensor]
"""Kronecker factors of a parameter: B and A of a weight, B of a vector."""


class Unrolled(nn.Module):
    """An LSTM of one layer as a loop over two linear maps, which own its parameters."""

    def __init__(self, lstm: nn.LSTM) -> None:
        """Share the parameters of `lstm`."""
        super().__init__()
        self.ih, self.hh = nn.Linear(1, 1), nn.Linear(1, 1)
        own = dict(lstm.named_parameters())
        self.ih.weight, self.ih.bias = own["weight_ih_l0"], own["bias_ih_l0"]
        self.hh.weight, self.hh.bias = own["weight_hh_l0"], own["bias_hh_l0"]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the outputs (N, T, H) for inputs (N, T, D)."""
        h = c = x.new_zeros(len(x), self.hh.weight.shape[1])
        found = []
        for step in x.unbind(1):
            i, f, g, o = (self.ih(step) + self.hh(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            found.append(h)
        return torch.stack(found, 1), None


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer's weight multiplied, one row per position; for a table the counts of its rows."""
    if isinstance(module, nn.Embedding):
        return torch.bincount(x.flatten(), minlength=module.num_embeddings).double()
    if isinstance(module, nn.Conv2d):
        assert module.groups == 1 and isinstance(module.padding, tuple)
        return functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)[0].T
    return x.reshape(-1, x.shape[-1])


def outputs_of(module: nn.Module, g: Tensor) -> Tensor:
    """Return the gradient at a layer's output, one row per position."""
    return g[0].flatten(1).T if isinstance(module, nn.Conv2d) else g.reshape(-1, g.shape[-1])


class Curvature:
    """Diagonal of the GGN and Kronecker factors ("expand"), for labels that were drawn, or exact."""

    def __init__(self, instance: Instance, labels: Tensor | None) -> None:
        """Run the loop.

        Args:
            instance: The problem.
            labels: One draw (N, *predictions), in the shape of the targets; None for all columns.
        """
        model = instance.copy_model().double()
        self.parameters = list(model.parameters())
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.LSTM):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, Unrolled(module))
        self.diagonal = [torch.zeros_like(p).detach() for p in self.parameters]
        self.products: dict[Any, Tensor] = {}
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))]
        self.owner = {p: m for m in layers for p in m.parameters()}
        self.samples = instance.batch
        self.positions: dict[nn.Module, int] = {layer: 0 for layer in layers}
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        for layer in layers:
            layer.register_forward_hook(self.note)
        for n in range(instance.batch):
            self.calls.clear()
            x = instance.inputs[n : n + 1]
            output = model(x.double() if x.is_floating_point() else x)
            self.add_inputs()
            for column in columns(output.detach(), None if labels is None else labels[n : n + 1], instance.batch):
                self.add_outputs(output, column)

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Keep a layer's call."""
        self.calls.append((module, args[0], output))

    def add_inputs(self) -> None:
        """Add what the layers saw of one sample."""
        for module, x, out in self.calls:
            a = inputs_of(module, x.detach())
            self.positions[module] += len(outputs_of(module, out))
            self.add((module, "A"), a if isinstance(module, nn.Embedding) else a.T @ a)

    def add_outputs(self, output: Tensor, column: Tensor) -> None:
        """Add one column of one sample."""
        outs = [out for _, _, out in self.calls]
        found = torch.autograd.grad(output, [*self.parameters, *outs], column, retain_graph=True)
        for p, total, row in zip(self.parameters, self.diagonal, found, strict=False):
            total += row.square()
            if p not in self.owner:
                self.add((p, "B"), torch.outer(row, row))
        for (module, _, _), g in zip(self.calls, found[len(self.parameters) :], strict=True):
            b = outputs_of(module, g)
            self.add((module, "B"), b.T @ b)
            if isinstance(module, nn.Conv2d):
                self.add((module, "pooled B"), torch.outer(b.sum(0), b.sum(0)))

    def add(self, key: Any, value: Tensor) -> None:
        """Add to a sum of products."""
        self.products[key] = self.products[key] + value if key in self.products else value

    def factors(self, *, pooled: bool) -> list[Factors]:
        """Return the factors of every parameter.

        Args:
            pooled: Whether those of convolutions are as BackPACK defines them: B of gradients that are summed over
                positions, with an A that is summed over positions, too, and not averaged.
        """
        out = []
        for p in self.parameters:
            module = self.owner.get(p)
            if module is None:
                out.append([self.products[p, "B"]])
                continue
            mixed = pooled and isinstance(module, nn.Conv2d)
            found = [self.products[module, "pooled B" if mixed else "B"]]
            if p.dim() > 1:
                found.append(self.products[module, "A"] / (self.samples if mixed else self.positions[module]))
            out.append(found)
        return out


def columns(output: Tensor, labels: Tensor | None, batch: int) -> list[Tensor]:
    """Return the columns of one sample's root, in the shape of its output (1, C, *predictions)."""
    p, classes = output.softmax(1), output.shape[1]
    scale = (batch * output[0, 0].numel()) ** -0.5
    if labels is not None:
        return [scale * (p - functional.one_hot(labels, classes).movedim(-1, 1))]
    assert output.dim() == 2
    return [scale * r * (p - e) for r, e in zip(p[0].sqrt(), torch.eye(classes).to(p), strict=True)]


def hessian_diagonal(instance: Instance) -> list[Tensor]:
    """Return the Hessian's diagonal of every parameter of a network that is curved in its last layers alone.

    The rest is piecewise linear in each of its parameters: their second derivatives are squares of rows, which are
    eigenvectors of the Hessian in what the curved layers receive, taken back. The very last layer is linear.
    """
    model = instance.copy_model().double()
    assert isinstance(model, nn.Sequential)
    layers, cut = list(model), len(model) - instance.problem.tail
    head, curve, final = nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:-1]), layers[-1]
    parameters, last = list(head.parameters()), list(final.parameters())
    found = [torch.zeros_like(p).detach() for p in (*parameters, *last)]
    for x, y in zip(instance.inputs.double().split(1), instance.targets.split(1), strict=True):
        h = head(x)
        share = lambda logits, y=y: instance.loss_fn(logits, y) / instance.batch  # noqa: E731
        width = h.shape[1]
        hessian = torch.func.hessian(lambda h, share=share: share(final(curve(h))))(h.detach()).reshape(width, width)
        for value, vector in zip(*(t.unbind(-1) for t in torch.linalg.eigh(hessian.detach())), strict=True):
            rows = torch.autograd.grad(h, parameters, vector[None], retain_graph=True)
            for total, row in zip(found, rows, strict=False):
                total += value * row.square()
        inner = curve(h.detach())
        z = final(inner).detach()
        curved = torch.func.hessian(share)(z).reshape(z.shape[1], z.shape[1]).diagonal()
        found[-2] += torch.outer(curved, inner[0].square())
        found[-1] += curved
    return found


def balanced(factors: Factors) -> Factors:
    """Return the factors with A of norm 1: a scalar may stand in either, and only their product is defined."""
    if len(factors) == 1:
        return factors
    norm = factors[1].norm()
    return [factors[0] * norm, factors[1] / norm]
