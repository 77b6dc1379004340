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

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packext import linalg
from packext._errors import PackextError, UnsupportedUseError, due_to
from packext._factored import Factored, Sum, added
from packext._quantity import Ask, Curvature, Sampled, sum_of
from packext._statistics import Statistics
from packext._union import HERE, Here, Part


class _Pair(NamedTuple):
    """B `[G, O, O]` and A `[G, I, I]` or `[G, I]`, the mean over `terms`, a number or one for each group.

    `loss` is the last whose columns are in B: A has what the parameter met once for each loss, and B all columns.
    `samples` is the size of this part of a batch, where A of the whole is a mean over all samples ("reduce"), and not
    over what the parameter met: a part that does not reach it then counts as zeros.
    """

    outputs: Tensor
    inputs: Tensor | None
    stored: str
    terms: int | float | Tensor
    loss: Any = None
    samples: int | float | Tensor | None = None

    @property
    def shape(self) -> list[int]:
        """Of the parameter, as a matrix."""
        sizes = [self.outputs.shape[-1], *([] if self.inputs is None else [self.inputs.shape[-1]])]
        return sizes if self.stored == "OI" else sizes[::-1]

    def scaled(self, factor: float) -> _Pair:
        """Of a Hessian times `factor`."""
        return self._replace(outputs=self.outputs * factor)

    def summands(self) -> list[Tensor]:
        """Tensors that add up over parts of a batch."""
        if self.inputs is None:
            return [self.outputs]
        terms = self.terms if isinstance(self.terms, Tensor) else self.outputs.new_full((1,), self.terms)
        if self.samples is None:
            return [self.outputs, self.inputs * _along(terms, self.inputs), terms]
        samples = self.outputs.new_zeros(1) + self.samples
        terms = torch.where(terms > 0, samples, 0.0)
        return [self.outputs, self.inputs * _along(terms, self.inputs), terms, samples]

    def of_sums(self, sums: Iterable[Tensor]) -> _Pair:
        """The same of the sums of what `summands` gave."""
        outputs, *rest = sums
        if not rest:
            return self._replace(outputs=outputs)
        total, terms, *samples = rest
        every = samples[0] if samples else None
        terms = terms if every is None else torch.where(terms > 0, every, 0.0)
        return self._replace(outputs=outputs, inputs=_mean(total, terms), terms=terms, samples=every)

    def absent(self, n: int) -> _Pair:
        """Of n samples that do not reach the parameter."""
        samples = None if self.samples is None else n
        return self._replace(outputs=torch.zeros_like(self.outputs), terms=self.terms * 0, samples=samples)


def _along(terms: Tensor, inputs: Tensor) -> Tensor:
    """Terms of each group beside A."""
    return terms.to(inputs).reshape(-1, *[1] * (inputs.dim() - 1))


def _mean(total: Tensor, terms: int | float | Tensor, fresh: bool = False) -> Tensor:
    """A, from the sum over its terms, in its place if it is nobody else's; zeros for a group without any."""
    count = _along(torch.where(terms > 0, terms, 1.0), total) if isinstance(terms, Tensor) else terms or 1
    return total.div_(count) if fresh and not torch.is_grad_enabled() else total / count


def _joined(pairs: Sequence[_Pair], over: Here) -> _Pair:
    """B adds up, and A is the mean over the terms of all."""
    summands = zip(*(pair.summands() for pair in pairs), strict=True)
    return pairs[0].of_sums(over.sum(sum_of(each)) for each in summands)


class _Kronecker(Curvature):
    approx: str = "expand"
    bias: str = "separate"
    columns = True

    def absorb(self, ask: Ask, held: Any) -> Any:
        form = self._form(ask)
        if isinstance(form, linalg.Joint):
            return form
        found = [] if form is None else added(form.kronecker(self.approx == "reduce"))
        if not found:
            with due_to([self]):
                raise UnsupportedUseError(self._refusal(ask))
        known = {pair.stored: pair for pair in held or ()}
        for k in found:
            pair = known.get(k.stored)
            if pair is not None and pair.loss is ask.loss:  # not in place: weight and bias may share what came first
                known[k.stored] = pair._replace(outputs=pair.outputs + k.outputs)
                continue
            terms = ask.n * k.positions
            inputs = None if k.inputs is None else _mean(k.inputs(), terms * ask.columns, fresh=True)
            new = _Pair(k.outputs, inputs, k.stored, terms, ask.loss)
            known[k.stored] = new if pair is None else _joined([new, pair], HERE)
        return [known[stored] for stored in sorted(known)]

    def _form(self, ask: Ask) -> Factored | linalg.Joint | None:
        """What is to be factored; of a bias that is part of its weight's block, where that is."""
        form, found = ask.statistics.form, ask.partner() if self.bias == "joint" else None
        if found is None:
            return form
        return linalg.Joint(*found) if len(form.shape) == 1 else form.with_bias()

    def _refusal(self, ask: Ask) -> str:
        form = ask.statistics.form
        text = f"{self.savefield.upper()} has no Kronecker factors for {ask.name} {list(form.shape)}"
        if self.approx == "reduce" and added(form.kronecker(False)):
            why = "where the inputs of all positions mix, or samples differ in how many positions they have"
            return f'{text} with approx="reduce", {why}. Use approx="expand".'
        if self.bias == "joint" and added(form.kronecker(False)):
            return f'{text} with bias="joint" for uses of different kinds, or unknown positions. Use bias="separate".'
        why = "is not the weight of a linear map or convolution, a table of which rows are read or added, nor a vector"
        if form.kronecker(False):
            why = "is divided into blocks in one way by some of its uses, and in another by others"
        elif isinstance(form, Sum) and any(part.kronecker(False) for part in form.parts):
            why = f"in some of its {len(form.parts)} uses {why}"
        return (
            f"{text}, which {why}. Choose the parameters, px.backpack(..., parameters=[...]), or ask for DiagGGNExact "
            "or DiagGGNMC; an optimizer of px.optim takes it in a group with fallback=True."
        )

    def land(self, held: Any, n: int, factor: float) -> Any:
        return held if isinstance(held, linalg.Joint) else self.matrices([pair.scaled(factor) for pair in held])

    @staticmethod
    def matrices(held: Any) -> list[Tensor]:
        """Of what was absorbed, the factors in the order of the parameter's axes."""
        sides = [
            [p.outputs] if p.inputs is None else [p.outputs, p.inputs] if p.stored == "OI" else [p.inputs, p.outputs]
            for p in held
        ]
        products = [[t[0] if len(t) == 1 else t for t in side] for side in sides]
        return products[0] if len(products) == 1 else linalg.nearest_kron(products)

    indivisible = ""

    def aside(self, ask: Ask, held: Any) -> Any:
        """How A and B stand, and how many terms A is the mean of; where they stand in both ways, all of them."""
        if isinstance(held, linalg.Joint):
            return None
        if len(held) == 1:
            return held[0].stored, held[0].terms
        factor = ask.factor * (ask.sample_factor() if self.root[0] == "empirical" else 1.0)
        return [pair.scaled(factor) for pair in held]

    def ways(self, part: Part) -> str:
        return "" if part.aside is None else "stored " + " and ".join(pair.stored for pair in self._pairs(part))

    def _pairs(self, part: Part) -> list[_Pair]:
        """What `aside` tells of a part, with the factors."""
        if not isinstance(part.aside, tuple):
            return [self.sampled(pair, part.n) for pair in part.aside]
        stored, terms = part.aside
        factors = [t if t.dim() == 3 else t[None] for t in part.value]
        outputs, inputs = (*factors, None) if len(factors) == 1 else factors if stored == "OI" else factors[::-1]
        return [self.sampled(_Pair(outputs, inputs, stored, terms), part.n)]

    def sampled(self, pair: _Pair, n: int) -> _Pair:
        """As it adds up with other parts: with the number of its samples, where A is a mean over these."""
        return pair._replace(samples=n) if self.approx == "reduce" else pair

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        """B adds up, and A is the mean over all terms, or samples; the nearest product is that of these sums."""
        n = over.count(sum(p.n for p in parts))
        if isinstance(parts[0].value, linalg.Joint):
            return Part(parts[0].value, n)
        found = [{pair.stored: pair for pair in self._pairs(part)} for part in parts]
        like = {stored: pair for each in found for stored, pair in each.items()}
        united = []
        for stored in sorted(like):
            pairs = [each.get(stored) or like[stored].absent(part.n) for each, part in zip(found, parts, strict=True)]
            united.append(_joined(pairs, over))
        aside = (united[0].stored, united[0].terms) if len(united) == 1 else united
        return Part(self.matrices(united), n, aside)

    def absent(self, part: Part, n: int) -> Part:
        if isinstance(part.value, linalg.Joint):
            return part
        pairs = [pair.absent(n) for pair in self._pairs(part)]
        zeros = [torch.zeros_like(f) for f in part.value]
        return Part(zeros, n, (pairs[0].stored, pairs[0].terms) if len(pairs) == 1 else pairs)


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
    `[E, E]`. Refused are values that are computed from a table.

    A parameter may have several uses. Calls of one layer, or reads of one table, count as positions of one. Equal
    blocks of one tensor (experts in `[E, O, I]`, queries, keys and values as thirds of the rows) have factors of their
    own, `[E, O, O]` and `[E, I, I]`, with a mean over the tokens that each was given, and zeros for one without any.
    Pieces of different sizes (queries, and keys and values together, where tokens attend to others) are seen as blocks
    of the largest size that divides all of them. A weight that is also used transposed, as a table `[V, E]` tied to
    the last layer, has the Kronecker product that is nearest to the sum over both (`linalg.nearest_kron`): dense
    `[V, V]` and `[E, E]`, of equal norm and neither of them A or B. Cross terms between uses are dropped, and between
    blocks of a piece. Refused are uses that divide a parameter otherwise than into rows, or where such blocks were less
    than an eighth of a piece.

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
                "empirical": the gradients of the loss as it is, of each sample's own loss as in `DiagEF`: where that
                is a mean over T terms (tokens, labels), B is T times smaller than that of the other two.
            generator: for the draws; one of packext's own by default.
            bias: "separate": weight and bias have blocks of their own. "joint": a bias that a linear layer or
                convolution adds in every use of its weight has one with it, that of the weight with an input more,
                which is 1: A is `[I + 1, I + 1]`, and the bias has a `linalg.Joint` with the weight in it, whose `join`
                and `split` make one matrix of two gradients and the reverse. Other biases (those of transposed
                convolutions, of bilinear and recurrent layers, what is added by hand) have blocks of their own.

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


class EKFAC(KFAC):
    """Eigenvalue-corrected Kronecker factors of the Fisher, in `ekfac`: a `linalg.KronEigh` for each parameter.

    The correction takes two passes. Without a `basis` this is `KFAC` in its eigenbasis: the eigenvectors of the
    factors, and the products of their eigenvalues, not corrected. Given that as the `basis` of a pass that follows, on
    the same batch or on others, eigenvalues are the second moments of the (sampled, exact or empirical) gradients in
    it: the diagonal that is best in Frobenius norm (George et al., 2018, "Fast Approximate Natural Gradient Descent in
    a Kronecker-factored Eigenbasis", section 3.1).

    Example:
        >>> with px.backpack(px.EKFAC()) as results:
        ...     loss_fn(model(x), y).backward()
        >>> basis = {name: result.ekfac for name, result in results.items()}
        >>> with px.backpack(px.EKFAC(basis)):
        ...     loss_fn(model(x), y).backward()
    """

    savefield = "ekfac"
    traced = False  # of eigenvectors torch has a derivative only where eigenvalues differ

    def __init__(
        self,
        basis: Mapping[Any, linalg.KronEigh | linalg.Joint] | None = None,
        mc_samples: int = 1,
        approx: str = "expand",
        fisher: str = "mc",
        generator: torch.Generator | None = None,
        bias: str = "separate",
    ) -> None:
        """Take an earlier result for each parameter, by name or by the parameter itself, and what `KFAC` takes.

        Raises:
            ValueError: for another thing than a dictionary of such results, or an unknown choice.
        """
        if not isinstance(basis, (Mapping, type(None))):
            raise ValueError(
                "basis must be a dictionary of earlier results by name, such as {name: result.ekfac for name, result "
                f"in results.items()}}, got a {type(basis).__name__}."
            )
        for key, value in (basis or {}).items():
            if not isinstance(value, (linalg.KronEigh, linalg.Joint)):
                name = key if isinstance(key, str) else f"a parameter {list(key.shape)}"
                raise ValueError(
                    f"basis has a {type(value).__name__} for {name}: it takes results of EKFAC, {{name: result.ekfac "
                    "...}; of factors (kfac), linalg.KronEigh.of(factors)."
                )
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
        form, turned = self._form(ask), None
        if isinstance(form, Factored) and not form.shape.numel():
            raise UnsupportedUseError(
                f"EKFAC has no eigenvectors for {ask.name} {list(form.shape)}, which has no entries. Leave it out "
                "(px.backpack(..., parameters=[...])), or ask for KFAC, whose factors are empty then."
            )
        basis = self._basis(ask)
        if basis is None:
            found = super().absorb(ask, held)
            if self.fisher == "empirical":  # whose gradients are there with `.grad`, and no earlier
                self.settle({ask.name: found})
            return found
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

    def settle(self, held: dict[str, Any]) -> None:
        for name, found in held.items():
            pairs = found if isinstance(found, list) else []
            factors = [f for pair in pairs for f in (pair.outputs, pair.inputs) if f is not None]
            if not all(bool(f.isfinite().all()) for f in factors):
                raise PackextError(
                    f"EKFAC: the factors of {name} {pairs[0].shape} are not finite, and have no eigenvectors. Check "
                    "that the model's inputs, parameters and outputs are."
                )

    def land(self, held: Any, n: int, factor: float) -> linalg.KronEigh | linalg.Joint:
        if isinstance(held, linalg.KronEigh):
            return linalg.KronEigh(held.vectors, held.eigenvalues * factor)
        found = super().land(held, n, factor)
        return found if isinstance(found, linalg.Joint) else linalg.KronEigh.of(found)

    def __repr__(self) -> str:
        """As it was made."""
        corrected = "basis=None, eigenvalues not corrected" if self.basis is None else f"basis of {len(self.basis)}"
        return f"EKFAC({corrected}, {super().__repr__().partition('(')[2]}"


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
