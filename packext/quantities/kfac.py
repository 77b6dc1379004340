"""Kronecker-factored curvature: KFAC with the loss Hessian sampled, exact or empirical.

For a weight that meets a at S positions, with columns b of a root of the loss Hessian carried back to the output:

    expand   A = 1/(N S) sum over n, s of a aᵀ           B = sum over n, s and columns of b bᵀ
    reduce   A = 1/N sum over n of (mean_s a)(mean_s a)ᵀ  B = sum over n and columns of (sum_s b)(sum_s b)ᵀ

(Eschenhagen et al., 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures",
section 3). The curvature of the weight, its rows one after the other, is B ⊗ A; of one that is stored `[I, O]`, as in
`x @ weight`, it is A ⊗ B. That of a vector is the one factor B.

A lookup is the linear map of one-hot vectors by a table `[V, E]`: A is diagonal, the tokens' counts over N S. It is the
same whether data says which rows are read or they are constant, as a position table's: b is then each sample's own
gradient at what was read. A parameter that meets data entry by entry is a table whose rows, along its last axis of more
than one entry, are all read once: A is 1/S for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packext import linalg
from packext._errors import UnsupportedUseError
from packext._factored import Factored, Sum
from packext._quantity import Ask, Curvature, Sampled, sum_of
from packext._statistics import Statistics
from packext._union import Here, Part


class _Pair(NamedTuple):
    """B and A as they add up; A comes with the first column."""

    outputs: Tensor
    inputs: Tensor | None
    stored: str
    terms: float


class _Kronecker(Curvature):
    approx: str = "expand"
    bias: str = "separate"

    def absorb(self, ask: Ask, held: Any) -> Any:
        form = self._form(ask)
        if isinstance(form, linalg.Joint):
            return form
        found = None if form is None else form.kronecker(self.approx == "reduce")
        if found is None:
            raise UnsupportedUseError(self._refusal(ask))
        if held is not None:  # not in place: weight and bias may share what came first
            return held._replace(outputs=held.outputs + found.outputs)
        terms = ask.n * found.positions
        inputs = None if found.inputs is None else found.inputs() / terms
        return _Pair(found.outputs, inputs, found.stored, terms)

    def _form(self, ask: Ask) -> Factored | linalg.Joint | None:
        """What is to be factored; of a bias that is part of its weight's block, where that is."""
        form, found = ask.statistics.form, ask.partner() if self.bias == "joint" else None
        if found is None:
            return form
        return linalg.Joint(*found) if len(form.shape) == 1 else form.with_bias()

    def _refusal(self, ask: Ask) -> str:
        form = ask.statistics.form
        text = f"{self.savefield.upper()} has no Kronecker factors for {ask.name} {list(form.shape)}"
        if self.approx == "reduce" and form.kronecker(False) is not None:
            why = "where the inputs of all positions mix, or samples differ in how many positions they have"
            return f'{text} with approx="reduce", {why}. Use approx="expand".'
        if self.bias == "joint" and form.kronecker(False) is not None:
            return f'{text} with bias="joint", as samples differ in how many positions they have. Use bias="separate".'
        why = "is not the weight of a linear map or convolution, a table of which rows are read or added, nor a vector"
        if isinstance(form, Sum):
            why = "has several uses, whose factors do not add up (as those of an embedding tied to the last layer)"
        return (
            f"{text}, which {why}. Choose the parameters, px.backpack(..., parameters=[...]), or ask for DiagGGNExact "
            "or DiagGGNMC; an optimizer of px.optim takes it in a group with fallback=True."
        )

    def land(self, held: Any, n: int, factor: float) -> Any:
        if isinstance(held, linalg.Joint):
            return held
        factors = [held.outputs * factor] if held.inputs is None else [held.outputs * factor, held.inputs]
        return [t[0] if len(t) == 1 else t for t in (factors if held.stored == "OI" else factors[::-1])]

    indivisible = ""

    def aside(self, ask: Ask, held: Any) -> tuple[int, float]:
        """Where A stands, and how many terms it is the mean of."""
        return (0, 0.0) if isinstance(held, linalg.Joint) else (int(held.stored == "OI"), float(held.terms))

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        """B adds up, and A is the mean over the terms of all."""
        n = over.count(sum(p.n for p in parts))
        first = parts[0]
        if isinstance(first.value, linalg.Joint):
            return Part(first.value, n, first.aside)
        factors = [sum_of([p.value[k] for p in parts]) for k in range(len(first.value))]
        place, terms = first.aside[0], sum(p.aside[1] for p in parts)
        if len(factors) == 1:
            return Part([over.sum(factors[0])], n, (place, terms))
        factors[place] = sum_of([p.value[place] * p.aside[1] for p in parts])
        factors = [over.sum(f) for f in factors]
        device = factors[place].device  # that of the group's collectives
        terms = float(over.sum(torch.tensor(terms, dtype=torch.float64, device=device)))
        factors[place] = factors[place] / terms
        return Part(factors, n, (place, terms))

    def absent(self, part: Part, n: int) -> Part:
        if isinstance(part.value, linalg.Joint):
            return part
        return Part([torch.zeros_like(f) for f in part.value], n, (part.aside[0], 0.0))


class KFAC(Sampled, _Kronecker):
    """Kronecker factors of the Fisher, in `kfac`: `[B, A]` for a weight, `[B]` for a vector.

    B is `[O, O]` and A `[I, I]`, with a leading axis of groups for a grouped convolution. A weight that is stored
    `[I, O]` has `[A, B]`, so that `linalg.kron_matvec(p.kfac, p.grad)` is right for all: the second factor of a product
    `x @ weight`; a transposed convolution (its positions are those of the input, and O the entries of the patch that
    each is written to); an embedding, whose A is diagonal, `[V]`, and which needs "expand" where a sample reads several
    rows. A bag, the sum or mean of rows, has the factors of an embedding with that sum (or mean) behind it; where bags
    differ in size, S is the mean number of tokens that count.

    A position table has those of an embedding, too: one that is read at constant indices (also sliced, transposed,
    repeated or joined to others on the way), and a parameter of several axes that is added to data or multiplied with
    it, as a table whose rows are its last axis of more than one entry: `[1, T, E]` has A `[T]`, of 1/T each, and B
    `[E, E]`. Refused are values that are computed from a table, and those that meet data in several places.

    For parameters without positions they are BackPACK's; for convolutions BackPACK mixes A of "expand" with B of
    "reduce", which is off by a factor that grows with the number of positions. For a parameter that is no linear map's
    weight, but a vector, such as a normalisation's or a scale `[C, 1, 1]`, B is the block itself.
    """

    savefield = "kfac"

    def __init__(
        self,
        mc_samples: int = 1,
        approx: str = "expand",
        fisher: str = "mc",
        generator: torch.Generator | None = None,
        bias: str = "separate",
    ) -> None:
        """Choose the approximation.

        Args:
            mc_samples: draws for each sample, with fisher "mc".
            approx: "expand", where every position counts as a sample; or "reduce", where positions are pooled.
            fisher: "mc": targets drawn from the model's predictions; "exact": the loss's Hessian (type 2, as KFLR);
                "empirical": the gradients of the loss as it is.
            generator: for the draws; one of packext's own by default.
            bias: "separate": weight and bias have blocks of their own. "joint": a bias that is added to what a weight
                gives in every use of either has one with it, that of the weight with an input more, which is 1: A is
                `[I + 1, I + 1]`, and the bias has a `linalg.Joint` with the weight in it, whose `join` and `split`
                make one matrix of two gradients and the reverse. Others have blocks of their own.

        Raises:
            ValueError: for an unknown choice.
        """
        super().__init__(mc_samples, generator)
        for what, choice, known in (
            ("approx", approx, ("expand", "reduce")),
            ("fisher", fisher, ("mc", "exact", "empirical")),
            ("bias", bias, ("separate", "joint")),
        ):
            if choice not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {choice!r}.")
        self.approx, self.fisher, self.bias = approx, fisher, bias

    @property
    def root(self) -> tuple[str, int, torch.Generator | None]:
        return ("mc", self.mc_samples, self.generator) if self.fisher == "mc" else (self.fisher, 0, None)

    def __repr__(self) -> str:
        """As it was made."""
        how = f"approx={self.approx!r}, fisher={self.fisher!r}, bias={self.bias!r}"
        return f"KFAC(mc_samples={self.mc_samples}, {how})"


class EKFAC(KFAC):
    """Eigenvalue-corrected Kronecker factors of the Fisher, in `ekfac`: a `linalg.KronEigh` for each parameter.

    With a `basis`, its eigenvalues are the second moments of the (sampled, exact or empirical) gradients in that basis:
    the diagonal that is best in Frobenius norm (George et al., 2018, "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis", section 3.1). Without, it has the eigenvectors of `KFAC`, and the products of the
    factors' eigenvalues: the basis for the passes that follow.
    """

    savefield = "ekfac"

    def __init__(
        self,
        basis: Mapping[Any, linalg.KronEigh | linalg.Joint] | None = None,
        mc_samples: int = 1,
        approx: str = "expand",
        fisher: str = "mc",
        generator: torch.Generator | None = None,
        bias: str = "separate",
    ) -> None:
        """Take an earlier result for each parameter, by name or by the parameter itself, and what `KFAC` takes."""
        super().__init__(mc_samples, approx, fisher, generator, bias)
        self.basis = basis
        if basis is None:
            self.indivisible = "eigenvectors of parts are not those of all (pass a basis)"

    def aside(self, ask: Ask, held: Any) -> None:
        return None

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        """In the basis that is given, eigenvalues add up."""
        n, first = over.count(sum(p.n for p in parts)), parts[0].value
        if isinstance(first, linalg.Joint):
            return Part(first, n)
        return Part(linalg.KronEigh(first.vectors, over.sum(sum_of([p.value.eigenvalues for p in parts]))), n)

    def absent(self, part: Part, n: int) -> Part:
        if isinstance(part.value, linalg.Joint):
            return part
        return Part(linalg.KronEigh(part.value.vectors, torch.zeros_like(part.value.eigenvalues)), n)

    def _basis(self, ask: Ask) -> linalg.KronEigh | linalg.Joint | None:
        if self.basis is None:
            return None
        found = self.basis.get(ask.name)
        if found is None:
            found = next((b for key, b in self.basis.items() if key is ask.parameter), None)
        if found is None:
            raise KeyError(f"EKFAC(basis=...) has nothing for {ask.name}, shape {list(ask.parameter.shape)}.")
        return found

    def absorb(self, ask: Ask, held: Any) -> Any:
        basis = self._basis(ask)
        if basis is None:
            return super().absorb(ask, held)
        form, turned = self._form(ask), None
        if isinstance(form, linalg.Joint):
            return form
        vectors = [] if isinstance(basis, linalg.Joint) else basis.vectors
        if form is not None and vectors:
            turned = form.rotated([v if v.dim() == 3 else v[None] for v in vectors])
        if turned is None:
            raise UnsupportedUseError(
                f"EKFAC: the basis of {ask.name} {list(ask.parameter.shape)} does not fit it. Take one from the same "
                f"model, by EKFAC with bias={self.bias!r}."
            )
        moment = Statistics(turned)["second_moment"]
        return linalg.KronEigh(vectors, moment if held is None else held.eigenvalues.add_(moment))

    def land(self, held: Any, n: int, factor: float) -> linalg.KronEigh | linalg.Joint:
        if isinstance(held, linalg.KronEigh):
            return linalg.KronEigh(held.vectors, held.eigenvalues * factor)
        found = super().land(held, n, factor)
        return found if isinstance(found, linalg.Joint) else linalg.KronEigh.of(found)

    def __repr__(self) -> str:
        """As it was made."""
        return f"E{super().__repr__()}"


class KFLR(_Kronecker):
    """Kronecker factors with the exact Hessian of the loss, "expand", in `kflr`; see `KFAC`."""

    savefield = "kflr"


class KFRA(_Kronecker):
    """Kronecker factors from a curvature that is averaged over the samples after every function, in `kfra`.

    B of a layer is the GGN with respect to its output as it comes through the layers above, averaged over the samples
    at each of them (Botev, Ritter & Barber, 2017, "Practical Gauss-Newton Optimisation for Deep Learning"). It is kept
    for all entries of that output, `[D, D]`. A and the treatment of positions are those of `KFAC` with "expand": B is
    the sum of the blocks of each position by itself. For layers without positions these are BackPACK's factors; of a
    convolution, BackPACK takes the sum over all pairs of positions for B, and does not divide A by their number.

    Defined for a chain of linear maps, convolutions and functions without parameters, with the batch along axis 0
    everywhere; branches, residual connections and parameters that are used twice are refused.
    """

    savefield = "kfra"
    indivisible = "the average over the samples is taken at each layer"

    @property
    def root(self) -> tuple[str, int, torch.Generator | None]:
        return ("averaged", 0, None)
