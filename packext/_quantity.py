"""What a quantity is: a question put to the factored gradient of one parameter at a time."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor

from packext._errors import UnsupportedUseError
from packext._factored import Factored, accumulation_dtype
from packext._statistics import Statistics, Visitor
from packext._union import Here, Part


@dataclass(eq=False, slots=True)
class Ask:
    """One parameter in one backward pass, as a quantity sees it.

    Attributes:
        statistics: answers about the rows of the loss as written.
        name: of the parameter.
        parameter: itself.
        n: number of samples.
        factor: what a row is to be multiplied with, by the context's scale.
        scale: the context's scale.
        sample_factor: gives the factor to the samples' own losses, whatever the scale.
        sign: of the column that arrives, where curvature may be negative.
        loss: whose column it is: the same object for all columns of one call of a loss.
        partner: gives the bias that this weight meets in every use of either (or the weight that this bias does), and
            the axis of the inputs in the weight; or None.
        columns: how many columns the rows are of, N of the first, and so on.
        notes: what a quantity keeps between its calls for this parameter.
        attached: whether the result becomes an attribute of the parameter.
    """

    statistics: Statistics
    name: str
    parameter: Tensor
    n: int
    factor: float
    scale: str | float
    sample_factor: Callable[[], float]
    sign: float = 1.0
    loss: Any = None
    partner: Callable[[], tuple[Tensor, int] | None] = lambda: None
    columns: int = 1
    notes: dict[Any, Any] = field(default_factory=dict)
    attached: bool = True


class Quantity:
    """Base of all quantities. A quantity holds its arguments and nothing of any pass."""

    #: Attribute of a parameter under which the result is found.
    savefield: str
    #: Whether the result needs all parameters, and comes from `finish` at the end of the pass.
    deferred: ClassVar[bool] = False
    #: Whether curvature may be that of several losses in one pass.
    additive: ClassVar[bool] = True
    #: Whether `whole` has a place for each parameter, also for those that a pass did not reach.
    placed: ClassVar[bool] = False
    #: Why the result for a batch cannot be made from those of its parts; nothing if it can.
    indivisible: str = "what they find by themselves does not tell it"

    #: How results for parts of a parameter (of a DTensor) make the one for it: "split", as it is itself (its axes are
    #: the last ones), or "sum"; nothing if they do not tell it.
    parts: str = ""

    #: For whom what samples add is bounded one by one, and noise scaled to that; nobody by default. Refused is then a
    #: pass in which a sample counts again, changes what others add, or leaves something beside the result.
    bounded: Any = None

    def wants(self, form: Factored) -> tuple[str, ...]:
        """Statistics that should be computed together."""
        return ()

    def visitor(self, ask: Ask) -> Visitor | None:
        """A function to be called with every tile of rows, where the quantity needs the rows one by one."""
        return None

    def buffer(self, ask: Ask, holders: int) -> Tensor | None:
        """Memory that the rows may be written to: an older result that nobody else holds."""
        return None

    def check(self, sample_factor: Callable[[], float]) -> None:
        """Raise what can be known to be wrong before the pass has changed anything."""

    def result(self, ask: Ask) -> Any:
        """The result for one parameter; None if it comes at the end of the pass."""
        raise NotImplementedError

    def finish(self, asks: dict[int, Ask]) -> dict[int, Tensor]:
        """Results of a deferred quantity for all parameters of the pass."""
        return {}

    def nothing(self, parameter: Tensor, n: int) -> Any:
        """The result for a parameter that none of n samples has reached; of bounded and of placed quantities."""
        raise NotImplementedError

    def whole(self, values: dict[str, Any]) -> Any:
        """The result for the whole model from those of its parameters."""
        raise AttributeError(f"{self.savefield} is a quantity of each parameter: use results[name].{self.savefield}.")

    def aside(self, ask: Ask, held: Any) -> Any:
        """What `unite` needs to know of a part beside its result; `held` is what curvature has absorbed."""
        return None

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        """The result for the whole batch: `parts` of it are here, and the others where `over` fetches them from."""
        raise NotImplementedError

    def ways(self, part: Part) -> str:
        """What of a part has to be alike on all ranks, beside the parameter's shape."""
        return ""

    def absent(self, part: Part, n: int) -> Part:
        """What n samples find that did not reach the parameter; `part` is what others have found."""
        raise UnsupportedUseError(
            f"{self!r} of several passes needs each parameter to be reached in all of them: ask for it pass by pass."
        )

    def __repr__(self) -> str:
        """As it was made, without generators, and what has tensors in it."""
        made = {k: vars(self).get(k) for k in inspect.signature(type(self)).parameters}
        told = [f"{k}={v!r}" for k, v in made.items() if isinstance(v, (int, float, str, tuple, list))]
        return f"{type(self).__name__}({', '.join(told)})"


class Summed:
    """What quantities share whose results add up over the samples."""

    indivisible = ""

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        """The sum, which goes on in float32 or better where results are in half precision."""
        dtype = parts[0].value.dtype
        sums = [p.value.to(accumulation_dtype(dtype)) if p.aside is None else p.aside for p in parts]
        total = over.sum(sum_of(sums))
        return Part(total.to(dtype), over.count(sum(p.n for p in parts)), total)

    def absent(self, part: Part, n: int) -> Part:
        """Zeros."""
        return Part(torch.zeros_like(part.value), n)


class PerSample:
    """What quantities share that have an entry for each sample along `axis`."""

    indivisible = ""
    axis: ClassVar[int] = 0

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        """One after the other."""
        together = torch.cat([p.value for p in parts], self.axis)
        return Part(over.cat(together, self.axis), over.count(sum(p.n for p in parts)))

    def absent(self, part: Part, n: int) -> Part:
        """Zeros."""
        shape = list(part.value.shape)
        shape[self.axis] = n
        return Part(part.value.new_zeros(shape), n)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Of one or several tensors of one shape."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).sum(0)


class Curvature(Quantity):
    """Base of quantities of the loss's curvature: sums over columns of a root of its Hessian.

    Every column arrives at a parameter as rows `[N, *p]` in factored form, as the gradient does.
    """

    #: Whether the quantity depends on the product of the root with itself alone, so that any exact root serves.
    compact: ClassVar[bool] = True
    #: Whether `absorb` takes rows of several columns at once (`Ask.columns`).
    columns: ClassVar[bool] = False
    #: Whether the result can be differentiated, where the root can (create_graph=True).
    traced: ClassVar[bool] = True

    @property
    def root(self) -> tuple[str, int, torch.Generator | None]:
        """Which root: ("exact", 0, None), or ("mc", number of draws, generator); equal ones are propagated once.

        ("hessian", 0, None) stands for columns with signs (`Ask.sign`), whose outer products times these give each
        parameter's entries of the diagonal of the Hessian, and not of the GGN; ("averaged", 0, None) for the average
        over the samples after each function of a chain; ("empirical", 0, None) for the gradients themselves;
        ("entries", 0, None) for the entries of what the loss takes, one by one, with which rows are Jacobians.
        """
        return ("exact", 0, None)

    @property
    def of_all_terms(self) -> bool:
        """Whether terms of what is minimised beside the extended losses would be a part of it.

        Drawn targets are those of the distribution that an extended loss stands for: its Fisher has no other terms. Nor
        have Jacobians.
        """
        return self.root[0] not in ("mc", "entries")

    def absorb(self, ask: Ask, held: Any) -> Any:
        """Take one column; `held` is what the last call for this parameter returned, None at first."""
        raise NotImplementedError

    def settle(self, held: dict[str, Any]) -> None:
        """Raise if what was absorbed, by the parameter's name, is not to be trusted; `.grad` is still as it was."""

    def land(self, held: Any, n: int, factor: float) -> Any:
        """The result, of a Hessian times `factor`."""
        return held if factor == 1.0 else held * factor


class Point:
    """Products with the curvature of the loss where the parameters are now."""

    parameters: list[Tensor]

    @property
    def negative(self) -> bool:
        """Whether the factor that results get by the context's scale is."""
        return False

    def hessian(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Products with the Hessian of vectors in the shapes of the parameters."""
        raise NotImplementedError

    def ggn(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Products with the GGN of vectors in the shapes of the parameters."""
        raise NotImplementedError

    def positive(self, modify: Callable[[Tensor], Tensor]) -> list[Callable[[Tensor], Tensor]]:
        """Of each parameter the products with its block of the Hessian, second derivatives of functions modified."""
        raise NotImplementedError

    def part(self, places: Sequence[int]) -> Point:
        """Products with the block of some of the parameters, by their places."""
        return _Part(self, places)

    def block(self, product: Callable[[Sequence[Tensor]], list[Tensor]], k: int, matrix: Tensor) -> Tensor:
        """Products of `matrix` `[V, *p]` with the diagonal block of parameter k, by `hessian` or `ggn`."""
        refuse_vectors(matrix, self.parameters[k])
        rows = []
        for row in matrix:
            vectors = [torch.zeros_like(p) for p in self.parameters]
            vectors[k] = row.to(vectors[k])
            rows.append(product(vectors)[k])
        return torch.stack(rows) if rows else torch.zeros_like(matrix)


class _Part(Point):
    """The block of some of the parameters: products of vectors that are zero elsewhere."""

    def __init__(self, whole: Point, places: Sequence[int]) -> None:
        self.parameters = [whole.parameters[k] for k in places]
        self._whole, self._places = whole, places

    @property
    def negative(self) -> bool:
        return self._whole.negative

    def hessian(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._within(self._whole.hessian, vectors)

    def ggn(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._within(self._whole.ggn, vectors)

    def _within(self, product: Callable[[Sequence[Tensor]], list[Tensor]], vectors: Sequence[Tensor]) -> list[Tensor]:
        filled = [torch.zeros_like(p) for p in self._whole.parameters]
        for k, vector in zip(self._places, vectors, strict=True):
            filled[k] = vector
        products = product(filled)
        return [products[k] for k in self._places]


def refuse_vectors(matrix: Tensor, parameter: Tensor) -> None:
    """Raise a ValueError unless `matrix` is `[V, *p]`."""
    if not isinstance(matrix, Tensor):
        raise ValueError(f"products are of vectors in one tensor, one after the other; got a {type(matrix).__name__}.")
    if matrix.dim() != parameter.dim() + 1 or matrix.shape[1:] != parameter.shape:
        shape = ", ".join(map(str, ("V", *parameter.shape)))
        one = " Of one vector pass vector[None]." if matrix.shape == parameter.shape else ""
        raise ValueError(f"products are of vectors [{shape}], one after the other; got {list(matrix.shape)}.{one}")


class HessianQuantity(Quantity):
    """Base of quantities of the loss's Hessian that need no more than its products with vectors.

    They know no samples: what couples them, such as BatchNorm in training mode, is no obstacle.
    """

    #: Whether terms of what is minimised beside the extended losses would be a part of it.
    of_all_terms: ClassVar[bool] = True
    #: Whether results run through the graph of the loss, which the backward pass therefore keeps.
    retains: ClassVar[bool] = False

    def measure(self, point: Point, generator: torch.Generator) -> list[Any]:
        """What is found for each parameter; `generator` is packext's own."""
        raise NotImplementedError

    def add(self, held: Any, value: Any) -> Any:
        """What two losses in one pass give together."""
        return held + value

    def land(self, held: Any, n: int, factor: float) -> Any:
        """The result, of a Hessian times `factor`."""
        raise NotImplementedError


def checked_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """`generator`; a ValueError for another thing that a user gives, such as a seed."""
    if not isinstance(generator, (torch.Generator, type(None))):
        raise ValueError(f"generator must be one, such as torch.Generator().manual_seed(0), got {generator!r}.")
    return generator


class Sampled:
    """What quantities with random draws share: how many, and where from."""

    def __init__(self, mc_samples: int = 1, generator: torch.Generator | None = None) -> None:
        """Say how many draws, and from which generator (one of packext's own by default).

        Raises:
            ValueError: if there is no draw, or for a seed in place of a generator.
        """
        if isinstance(mc_samples, bool) or not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples must be an int of 1 or more, got {mc_samples!r}.")
        self.mc_samples, self.generator = mc_samples, checked_generator(generator)


class Subsampled:
    """What quantities share that have rows of all samples, or of those in `subsampling`, a list of indices."""

    subsampling: list[int] | None = None

    def choose(self, subsampling: Iterable[SupportsIndex] | None) -> None:
        """Take the samples; a ValueError if they are not integers of 0 or more."""
        if subsampling is None:
            return
        given: list[Any] = list(subsampling) if isinstance(subsampling, Iterable) else [None]
        try:
            chosen = [operator.index(i) for i in given]  # of numpy and tensors, too
        except TypeError:
            chosen = [-1]
        no_index = any(isinstance(i, bool) or getattr(i, "dtype", None) == torch.bool for i in given)
        if no_index or any(i < 0 for i in chosen):
            raise ValueError(f"subsampling must be a list of sample indices, got {subsampling!r}.")
        self.subsampling, self.indivisible = chosen, "subsampling counts the samples of one pass"

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("rows",) if self.subsampling is None else ()

    def rows(self, ask: Ask) -> Tensor:
        """Those of this pass; an IndexError if the batch has no such sample."""
        if self.subsampling is None:
            return ask.statistics["rows"]
        beyond = [i for i in self.subsampling if i >= ask.n]
        if beyond:
            name = type(self).__name__
            raise IndexError(f"{name}(subsampling=...): samples {beyond} of a batch of {ask.n} asked for.")
        index = torch.tensor(self.subsampling, dtype=torch.long, device=ask.parameter.device)
        return ask.statistics.form.select(index)


class Total:
    """What quantities share that add up over parameters."""

    def whole(self, values: dict[str, Tensor]) -> Tensor:
        """The sum; an AttributeError where parameters have seen different batches."""
        tensors = list(values.values())
        if len({t.shape for t in tensors}) > 1:
            sizes = {name: list(t.shape) for name, t in values.items()}
            raise AttributeError(
                f"parameters have seen different batches, there is no result for the whole model: {sizes}"
            )
        dtype = tensors[0].dtype
        for t in tensors[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        return sum((t.to(dtype) for t in tensors[1:]), tensors[0].to(dtype))
