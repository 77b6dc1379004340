"""The context: what is wanted of the backward passes inside it, and the results."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from packext import _compiler, _listening
from packext._curvature import account, measure, spread
from packext._errors import CoupledSamplesError, NotExtendedError, PackextError, due_to
from packext._extend import end_interrupted
from packext._layout import Tokens
from packext._pass import Pass, aimed_at
from packext._places import records_of
from packext._quantity import Ask, Curvature, HessianQuantity, Quantity
from packext._record import Record
from packext._refusals import awaited_loss, constant, refuse_reentrant
from packext._results import Results
from packext._scale import Seen
from packext._shards import added, is_distributed, like
from packext._statistics import Statistics
from packext._union import END, HERE, Elsewhere, Part, Ranks
from packext._use import Source, live_nodes, partner


class backpack:  # noqa: N801 - the name that BackPACK's users type
    """Context in which backward passes through extended models emit quantities.

    Example:
        >>> with backpack(Variance()) as results:
        ...     loss_fn(model(x), y).backward()
        >>> results["0.weight"].variance, model[0].weight.variance

    A result is from the last backward pass that ran in a context which asked for it. Each such pass first
    forgets the context's savefields on all parameters of the model, so that a parameter which the pass did
    not reach has none, and no older value is mistaken for a new one. A pass that fails changes no attribute
    (`.grad` of parameters that it had come by is as autograd left it). Of nested contexts the innermost alone hears a
    pass, as in BackPACK; `overhear` says otherwise.
    """

    def __init__(
        self,
        *extensions: Quantity,
        extension_hook: Callable[[nn.Module], Any] | None = None,
        pass_hook: Callable[[Results], Any] | None = None,
        attach: bool = True,
        exact_grad: bool = False,
        grad: bool = True,
        debug: bool = False,
        retain_graph: bool = False,
        scale: str | float = "loss",
        parameters: Iterable[Tensor] | None = None,
        accumulate: bool = False,
        group: Any = None,
        per: str = "sample",
        mask: Tensor | None = None,
        overhear: bool = False,
    ) -> None:
        """Say what is wanted.

        Args:
            *extensions: quantities, as instances.
            extension_hook: called with a module when all results of its own parameters are attached,
                during the backward pass; may delete them to save memory.
            pass_hook: called with the results at the end of each backward pass, when `.grad` is complete. Those of the
                next pass take their place.
            attach: whether results become attributes of the parameters; if not, attributes stay as they are.
            exact_grad: whether `.grad` is that of a backward pass without packext to the last bit (of the extended
                model, where a loss is made of second derivatives). Otherwise sums that a quantity has formed anyway may
                serve as `.grad`: faster, and equal up to rounding.
            grad: whether `.grad` is wanted. If not, matrix products and convolutions for `.grad` alone are left out:
                `.grad` of the parameters that quantities are wanted of is missing or incomplete, and not to be read.
            debug: accepted for code written for BackPACK; `px.explain` shows more.
            retain_graph: accepted for code written for BackPACK; `backward(retain_graph=True)` suffices (which is the
                default of `loss.backward()` where products are asked for that run through the graph).
            scale: "loss": individual gradients are those of the loss as written, so that they sum to
                `.grad` (with a mean over N samples each carries 1/N). "sample": those of the samples' own
                losses l_n, defined by loss = mean of l_n or sum of l_n, according to the reduction of
                the extended loss module, whatever that loss (or all of several) is multiplied with before
                `backward()` (1/k, a loss scale). Losses of different weights are terms of one: a weight of 1 among
                them says that nothing multiplies all of them, and without one they are refused. A number: individual
                gradients of the loss as written times that number (N for a mean that packext cannot see; 1/k to undo
                a loss scale k).
            parameters: of which quantities are wanted, such as `model.head.parameters()`; all that require grad by
                default. No work is done for others; what is of the whole model (norms, a clipping norm, eigenvalues)
                is of these.
            accumulate: whether results are of all backward passes in the context so far, as if their batches had been
                one whose loss is the sum of theirs: of gradient accumulation, for `(loss / k).backward()`.
            group: a `torch.distributed` process group (`group.WORLD` for all), of which each rank runs a backward pass
                on its own part of the batch: results are of the samples of all ranks, in their order, on each of them.
                Every rank enters and leaves the context, and makes as many passes in it.
            per: "token": tokens take the place of samples, in first-order quantities. A token's gradient is what its
                position contributes to that of a parameter, the sum over a use's positions g aᵀ being left open; those
                of all tokens sum to `.grad`. (It is not the gradient of the token's own loss, which reaches other
                positions as well.) Results have a row for each token, those of the first sample first; with scale
                "sample" they are of the tokens' own losses, of which the loss is the mean (or sum).
            mask: of the tokens that count, `[N, T]` bool, true where they do: rows are in the order of `x[mask]`. All
                others must have no gradient. By default all count, and T is the size of the first input's second axis
                (of its first, with a batch axis of 1).
            overhear: whether to share passes with another context, around this one or inside of it; as a rule the
                innermost one hears a pass alone. The other one gets to the last bit what it would get without, `.grad`
                included; what both need is computed once. Of several contexts that overhear, the innermost one does.
                With `attach=False`. Passes `per="token"` are not overheard.

        Raises:
            ValueError: for a class in place of an instance, an unknown scale or one that is zero or not finite, a
                negative one with quantities of the GGN, `parameters` that are no tensors, a hook that is no function,
                or reads attributes which are not to be attached or not complete, a flag that is neither true nor false,
                `overhear` with options that need a pass of their own, a quantity that parts of a batch do not tell, a
                `group` with scale "loss" (there is no loss as written of all ranks), curvature per token (it is not a
                sum over tokens), or a mask that is none.
        """
        for name, hook in (("extension_hook", extension_hook), ("pass_hook", pass_hook)):
            if hook is not None and not callable(hook):
                raise ValueError(f"{name} must be a function, got {hook!r:.80}.")
        flags = {
            "accumulate": accumulate, "attach": attach, "exact_grad": exact_grad, "grad": grad, "overhear": overhear,
        }  # fmt: skip
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r:.80}.")
        self._unites = accumulate or group is not None
        if extension_hook is not None and self._unites:
            raise ValueError("extension_hook is called before results of several passes or ranks are known.")
        if group is not None and scale == "loss":
            raise ValueError(
                'with group=... say what the quantities are of, as no rank knows a loss of all: scale="sample" for '
                "the samples' own losses, or a number."
            )
        if extension_hook is not None and not attach:
            raise ValueError("extension_hook reads results from the parameters, to which attach=False puts none.")
        for extension in extensions if self._unites else ():
            if isinstance(extension, Quantity) and extension.indivisible:
                why = extension.indivisible
                raise ValueError(f"{extension!r} of several passes or ranks cannot be had from each by itself: {why}.")
        if exact_grad and not grad:
            raise ValueError("exact_grad=True and grad=False contradict each other.")
        for extension in extensions:
            if isinstance(extension, type):
                raise ValueError(
                    f"backpack expects instances, got the class {extension.__name__}: write {extension.__name__}()."
                )
            if not isinstance(extension, Quantity):
                raise ValueError(f"backpack expects quantities such as BatchGrad(), got {extension!r}.")
        fields = [e.savefield for e in extensions]
        for field in fields:
            if fields.count(field) > 1:
                raise ValueError(
                    f"two quantities write {field!r}: ask for one of them, and for the other in a context inside of "
                    "this one that shares its passes, px.backpack(..., attach=False, overhear=True)."
                )
        if not (scale in ("loss", "sample") or (isinstance(scale, (int, float)) and not isinstance(scale, bool))):
            raise ValueError(f'scale must be "loss", "sample" or a number, got {scale!r:.80}.')
        if not isinstance(scale, str) and (not math.isfinite(scale) or scale == 0):
            raise ValueError(f"scale must be finite and not zero, got {scale!r}.")
        self.extensions = extensions
        self.curvature = tuple(e for e in extensions if isinstance(e, Curvature))
        self.spreading = tuple(e for e in self.curvature if e.root[0] != "empirical")
        self.hessian = tuple(e for e in extensions if isinstance(e, HessianQuantity))
        self.first_order = tuple(e for e in extensions if not isinstance(e, (Curvature, HessianQuantity)))
        roots = [type(e).__name__ for e in self.spreading if e.root[0] != "hessian"]
        if roots and not isinstance(scale, str) and scale < 0:
            raise ValueError(
                f"{', '.join(roots)} with scale={scale!r}: the GGN of a loss times a negative number is not positive "
                "semi-definite, and has no root. Take the quantities with a positive scale."
            )
        self.retaining = _listening.Retaining() if any(e.retains for e in self.hessian) else None
        self.by_sample = bool(self.first_order or self.curvature)
        self.extension_hook, self.pass_hook = extension_hook, pass_hook
        self.attach, self.exact_grad, self.grad = attach, exact_grad, grad
        self.scale = scale
        self.parameters = None if parameters is None else _identified(parameters)
        self.distributed = any(map(is_distributed, (self.parameters or {}).values()))  # whether it names a DTensor
        if per not in ("sample", "token"):
            raise ValueError(f'per must be "sample" or "token", got {per!r}.')
        if mask is not None and (
            per == "sample" or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool
        ):
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f'mask goes with per="token", and is a bool tensor [N, T]; got {got} with per={per!r}.')
        if per == "token" and (self.curvature or self.hessian):
            asked = ", ".join(type(e).__name__ for e in (*self.curvature, *self.hessian))
            raise ValueError(f'{asked}: curvature is no sum over tokens, so that it cannot be had with per="token".')
        if overhear and (attach or not grad or per == "token"):
            raise ValueError(
                "overhear=True goes with attach=False (attributes are those of the context inside), and neither with "
                'grad=False nor with per="token".'
            )
        self.per, self.mask, self.overhear = per, mask, overhear
        self.accumulate, self.ranks = accumulate, None if group is None else Ranks(group)
        self._before: dict[int, tuple[Source, dict[str, Part]]] = {}  # what passes of the context have found
        self._count = 0  # of their samples
        self._constants: set[Quantity] = set()  # of which one has found a part without a graph
        self.results = Results(extensions)
        self._passes = 0
        self._inner = 0
        self._task: int | None = None
        self._restore: list[Callable[[], None]] = []

    def __enter__(self) -> Results:
        restore = _compiler.eager()
        if restore is None:
            raise PackextError(
                "backpack(...) inside of a function that is compiled: compile the model, and not the step that "
                "computes its gradient."
            )
        self._restore.append(restore)
        self._before, self._count, self._constants = {}, 0, set()
        self._passes = self._inner = 0
        self._task = _listening.task()
        _listening.opened(self)
        return self.results

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is not None:
            end_interrupted()
        _listening.closed(self)
        self._restore.pop()()
        if around := _listening.here().contexts:
            around[-1]._inner += self._passes + self._inner
        if self.ranks is not None and kind is not Elsewhere:
            why = "" if kind is None else f"{kind.__name__}: {value}"
            self.ranks.meet({END: ""}, 0, why)
        if kind is None and self.extensions and not (self._passes or self._inner):
            asked = ", ".join(type(e).__name__ for e in self.extensions)
            reached = given = ""
            if self.parameters is not None:
                reached = " and reached one of the given parameters"
                given = " Give parameters=... of that model that require grad."
            if _listening.here().passes:
                raise NotExtendedError(
                    f"{asked} asked for within a backward pass that another context hears: what a hook or a Function "
                    "asks for by torch.autograd.grad is that pass's own there. Call backward()."
                )
            raise NotExtendedError(
                f"{asked} asked for, but no backward pass through an extended model ended in this context{reached}. "
                "Call model = px.extend(model) before the forward pass, and backward() inside the context, neither of "
                f"them within px.disable().{given} If torch.compile is to run the model, its forward pass has to be "
                "inside, too."
            )

    def _strange(self) -> bool:
        """Whether what runs is another of asyncio's tasks than the one that entered."""
        now = None if self._task is None else _listening.task()
        return now is not None and now != self._task

    def _wants(self, parameter: Tensor) -> bool:
        return self.parameters is None or id(parameter) in self.parameters

    def _tokens(self, record: Record) -> Tokens | None:
        """The tokens of a forward pass, if they are what results are per."""
        if self.per == "sample":
            return None
        n, length = record.n, record.lengths[0] if record.lengths else 1
        kept = None
        if self.mask is not None:
            if self.mask.shape[0] != n:
                raise PackextError(f"mask is {list(self.mask.shape)}, of {self.mask.shape[0]} samples; there are {n}.")
            length, kept = self.mask.shape[1], self.mask.flatten().nonzero()[:, 0]
        if length < 2 or kept is not None and not len(kept):
            raise PackextError(
                f"per='token' needs samples of at least two tokens, of which some count: these have {length}"
                f"{'' if kept is None else f', and {len(kept)} count in all'}."
            )
        return Tokens(None, n * length if kept is None else len(kept), False, n, length, kept)

    def _partner(self, parameter: Tensor) -> tuple[Tensor, int] | None:
        found = partner(parameter)
        return found if found is not None and self._wants(found[0]) else None

    # -- called by the pass in flight --------------------------------------------------------------
    def _factor(self, flight: Pass, record_n: int, sample: bool = False) -> float:
        if not sample and self.scale == "loss":
            return 1.0
        if isinstance(self.scale, (int, float)) and not (sample and flight.losses):
            return float(self.scale)
        key = (record_n, len(flight.losses))
        if key not in flight.factors:  # each parameter asks, and numbers are read from tensors once
            try:
                flight.factors[key] = self._sample_factor(flight, record_n)
            except PackextError:
                if isinstance(self.scale, str):
                    raise
                flight.factors[key] = float(self.scale)  # which the user has given in its place
        return flight.factors[key]

    def _sample_factor(self, flight: Pass, record_n: int) -> float:
        """The factor from the loss as written to the samples' own, by the losses that the pass came through."""
        written: list[tuple[str, float]] = []
        weights: list[tuple[float, float]] = []
        numbers = [name for name, reduction, g in flight.losses if reduction == "none" and not g.dim()]
        if 0 < len(numbers) < record_n:  # as many are of samples one by one
            raise PackextError(
                f"The extended {numbers[0]} has reduction='none' and gave one number, not the losses of {record_n} "
                f"samples: whether it is their mean or their sum is not known. Set its `reduction`, or pass {_SCALE}."
            )
        for name, reduction, g in flight.losses:
            if reduction not in _REDUCTIONS:
                raise PackextError(
                    f"The extended {name} has reduction={reduction!r}, so that the scale of a sample's own loss is not "
                    f"known. Make it one of {', '.join(_REDUCTIONS)}, or pass {_SCALE}."
                )
            low, high = torch.stack([g.min(), g.max()]).tolist() if g.dim() else (g.item(),) * 2  # read once
            if reduction == "none" and (low != high or low == 0):
                raise PackextError(
                    f"The extended {name} with reduction='none' is weighted unevenly over its entries (from "
                    f"{low:.4g} to {high:.4g}), so that the scale of a sample is not defined. "
                    f"Pass {_SCALE}."
                )
            count = float(record_n) if reduction in ("mean", "batchmean") else 1.0
            written.append((f"{name} ({reduction})", count / (low if reduction == "none" else 1.0)))
            weights.append((count, low))
        if not written and (name := awaited_loss()) is not None:
            raise PackextError(
                f"The gradient came to the model by another term first than the extended {name}, so that the scale of "
                "a sample's own loss is not known yet. Compute the whole loss in one extended module, or pass "
                f"{_SCALE} (the batch size for a mean, 1 for a sum)."
            )
        if not written:
            raise NotExtendedError(
                "The scale of a sample's own loss is not known: the loss is not extended, or has no `reduction`. Use "
                f"loss_fn = px.extend(nn.CrossEntropyLoss()) or pass {_SCALE} (the batch size for a mean, 1 for a sum)."
                " A loss of your own is an nn.Module with an attribute `reduction` ('mean' or 'sum') and without "
                "parameters."
            )
        # Losses of different weights are terms of one; a weight that all have is none of the samples' own losses.
        weights = [(count, low) for count, low in weights if low] or [(count, 1.0) for count, _ in weights]
        alone, arrived = {count / low for count, low in weights}, {low for _, low in weights}
        if len(alone) > 1 and len(arrived) > 1 and 1.0 not in arrived:
            raise PackextError(
                f"Losses of different weights ({', '.join(name for name, _ in written)}; gradients "
                f"{', '.join(f'{g:g}' for g in sorted(arrived))} arrive at them), none of which is 1: what all of them "
                "are multiplied with besides, as by a GradScaler or for micro-batches, is not known. Give one of them "
                f"the weight 1, or pass {_SCALE}."
            )
        factors = alone if len(alone) == 1 else {factor for _, factor in written}
        if len(factors) > 1:
            each = ", ".join(f"{name} by {factor:g}" for name, factor in written)
            raise PackextError(
                f"The losses scale samples differently: {each}. Give them one reduction, or pass {_SCALE}."
            )
        return factors.pop()

    def _check(self, flight: Pass, n: int) -> None:
        """Everything that can be refused before any gradient is accumulated."""
        if n > 1 and flight.uneven and any(e.bounded is not None for e in self.extensions):
            raise CoupledSamplesError(flight.uneven[0])
        self._factor(flight, n)
        for extension in self.extensions:
            extension.check(lambda: self._factor(flight, n, sample=True))

    def _spread(self, flight: Pass, seen: Seen, edge: GradientEdge, g: Tensor) -> None:
        """An extended loss was reached: send its curvature ahead of the gradient."""
        if waiting := [q for each in flight.heard for q in (*each.context.spreading, *each.context.hessian)]:
            with due_to(waiting):
                refuse_reentrant(edge.node, records_of(seen, edge), flight.wants)
        account(flight, seen, edge, g.detach())
        for each in flight.heard:
            if each.context.hessian:
                flight.spread = True
                measure(each, each.context.hessian, seen, edge, g.detach())
        if asked := [q for each in flight.heard for q in each.context.spreading]:
            flight.spread = True
            with torch.no_grad(), due_to(asked):
                spread(flight, seen, edge, g)

    def _emit(self, flights: Sequence[Pass], source: Source, statistics: Statistics, deliver: bool) -> Tensor | None:
        flight, form = flights[0], statistics.form
        flight.n = n = form.n
        ask = Ask(
            statistics, source.name, source.tensor, n, self._factor(flight, n), self.scale,
            lambda: self._factor(flight, n, sample=True), partner=functools.partial(self._partner, source.tensor),
            attached=self.attach,
        )  # fmt: skip
        wants = [w for e in self.extensions if e not in self.spreading for w in e.wants(form)]
        visitors = [visitor for e in self.first_order if (visitor := e.visitor(ask)) is not None]
        buffer = None
        if "rows" in wants and not torch.is_grad_enabled():
            holders = 1 if id(source.tensor) in self.results._by_parameter else 0
            buffer = next((b for e in self.first_order if (b := e.buffer(ask, holders)) is not None), None)
        statistics.prepare(wants, visitors, deliver, buffer)
        for other in flights[1:]:  # now, as results may let go of the form
            other.context._emit([other], source, statistics.apart(), False)
        values, absorbed = {}, {}
        sums = flight.sums.get(id(source.tensor), (source, {}))[1]
        for e in self.curvature:  # first, as results of others may leave no more than rows of the factors
            if e.root[0] == "empirical":
                absorbed[e] = e.absorb(ask, None)
                values[e.savefield] = e.land(absorbed[e], n, ask.factor * ask.sample_factor())
            elif id(e) in sums:
                absorbed[e] = sums.pop(id(e))
                values[e.savefield] = e.land(absorbed[e], n, ask.factor)
        values.update({e.savefield: value for e in self.first_order if (value := e.result(ask)) is not None})
        if self._unites:
            flight.asides[id(source.tensor)] = {e.savefield: e.aside(ask, absorbed.get(e)) for e in self.extensions}
        flight.values[id(source.tensor)] = (source, values)
        for e in self.extensions:
            if e.deferred:
                flight.asks.setdefault(id(e), {})[id(source.tensor)] = ask
        if self.extension_hook is not None:
            self._hold(flight, source, values)
            for field, value in values.items():
                flight.attach(source.tensor, field, value)
            self._hook(flight, source)
        return statistics.known.get("total")

    def _hook(self, flight: Pass, source: Source) -> None:
        for record in flight.records[flight.owned :]:  # a model behind another one is entered later
            for module, held in record.held():
                own = {id(p) for p in held if self._wants(p) and _will_arrive(p)}
                if own:
                    flight.owners.setdefault(id(module), (module, own, held))
        flight.owned = len(flight.records)
        for module, own, held in flight.owners.values():
            if id(source.tensor) in own:
                own.discard(id(source.tensor))
                if not own and self.extension_hook is not None:
                    self.extension_hook(module)
                    flight.forget_deleted(held)

    def _asked(self) -> str:
        """What all ranks have to ask for alike: quantities with their plain arguments, and the scale."""
        told = [
            f"{type(e).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(e).items() if isinstance(v, _PLAIN))})"
            for e in self.extensions
        ]
        return f"{', '.join(told)} with scale={self.scale!r}, accumulate={self.accumulate}, per={self.per!r}"

    def _unite(self, flight: Pass) -> None:
        """Results of all passes so far, and all ranks, in place of those of this pass."""
        n = flight.n or (flight.records[0].n if flight.records else 0)
        by_field = {e.savefield: e for e in self.extensions}
        found: dict[int, tuple[Source, dict[str, Part]]] = {}
        for key, (source, values) in flight.values.items():
            asides = flight.asides.get(key, {})
            found[key] = (source, {f: Part(value, n, asides.get(f)) for f, value in values.items()})
        if self.accumulate:
            for key, (source, before) in {**found, **self._before}.items():
                new, old = found.get(key, (source, {}))[1], self._before.get(key, (source, {}))[1]
                together = {}
                for field in {**before, **new}:
                    e = by_field[field]
                    parts = [new[field] if field in new else e.absent(old[field], n)]
                    if self._count:
                        parts.insert(0, old[field] if field in old else e.absent(new[field], self._count))
                    together[field] = e.unite(parts, HERE)
                found[key] = (source, together)
            n += self._count
            flight.constants |= self._constants if flight.graph else {*self.extensions}
            flight.together = dict(found), n, {*flight.constants}
        if self.ranks is not None:
            named = sorted((source.name, key) for key, (source, _) in found.items())
            alike = [name for (name, _), (other, _) in itertools.pairwise(named) if name == other]
            if alike:
                raise PackextError(
                    f"{alike[0]} is the name of parameters of several models that were extended one by one, so that "
                    "ranks could not tell which is which: extend an nn.ModuleDict of the models, whose names differ."
                )
            kinds = {
                name: _kind(found[key][0].tensor, (by_field[f].ways(p) for f, p in found[key][1].items()))
                for name, key in named
            }
            self.ranks.meet(kinds, n, asked=self._asked())
            flight.constants.update(self.extensions)  # no graph goes from one process to another
            for _, key in named:
                source, parts_ = found[key]
                found[key] = (source, {f: by_field[f].unite([parts_[f]], self.ranks) for f in sorted(parts_)})
        for key, (source, parts_) in found.items():
            flight.values[key] = (source, {f: part.value for f, part in parts_.items()})

    def _hold(self, flight: Pass, source: Source, values: dict[str, Any]) -> None:
        """Make errors of derivatives that results of a pass with create_graph=True do not have."""
        for e in self.extensions if flight.graph else ():
            wrong = bool(flight.unsound) if e.deferred else id(source.tensor) in flight.unsound
            if (wrong or e in flight.constants or e in self.hessian) and e.savefield in values:
                with torch.enable_grad():
                    values[e.savefield] = constant(values[e.savefield], type(e).__name__, flight.anchor)

    def _assemble(self, flight: Pass) -> None:
        """Results of parameters of which each process holds a part, in place of those of the parts."""
        split = [key for key, (source, _) in flight.values.items() if is_distributed(source.tensor)]
        split.sort(key=lambda key: flight.values[key][0].name)  # in the order in which passes come to them, if alike
        for e in self.extensions if split else ():
            field = e.savefield
            here = [key for key in split if field in flight.values[key][1]]
            found = [(flight.values[key][0].tensor, flight.values[key][1][field]) for key in here]
            whole = added(found) if e.parts == "sum" else [like(value, p) for p, value in found]
            for key, value in zip(here, whole, strict=True):
                source, values = flight.values[key]
                flight.values[key] = (source, {**values, field: value})

    def _land(self, flight: Pass) -> None:
        for key, (source, found) in flight.measured.items():
            values = flight.values.setdefault(key, (source, {}))[1]
            n = flight.records[0].n
            for e in self.hessian:
                if id(e) in found:
                    values[e.savefield] = e.land(found[id(e)], n, self._factor(flight, n))
        for extension in self.extensions:
            if extension.deferred:
                for key, value in extension.finish(flight.asks.get(id(extension), {})).items():
                    flight.values[key][1][extension.savefield] = value
        bounded = [e for e in self.extensions if e.bounded is not None]
        if bounded and flight.values:  # noise hides whether samples have reached a parameter, too
            for name, p in [item for record in flight.records for item in record.names.items()]:
                if id(p) not in flight.values and self._wants(p):
                    n = flight.records[0].n
                    flight.values[id(p)] = Source(p, name), {e.savefield: e.nothing(p, n) for e in bounded}
        if self._unites:
            self._unite(flight)
        self._assemble(flight)
        for source, values in flight.values.values():
            self._hold(flight, source, values)
        fields = [e.savefield for e in self.extensions] if self.attach else []
        tree: dict[int, Tensor] = {}
        for record in flight.records:
            for module, held in record.held():
                tree.update((id(p), p) for p in held)
                for p in (*held, *(p for p in module._parameters.values() if p is not None)):
                    for field in fields:
                        flight.detach(p, field)
        # Gradients arrive in an order that the forward pass may change: columns side by side would change theirs.
        order = {key: k for k, key in enumerate(tree)}
        flight.values = dict(sorted(flight.values.items(), key=lambda item: order.get(item[0], len(order))))
        results = self.results
        results._by_parameter = {key: (source.name, values) for key, (source, values) in flight.values.items()}
        names = [(source.name, key) for key, (source, _) in flight.values.items()]
        known = [item for record in flight.records for item in record.names.items()]
        names += [(name, id(p)) for name, p in known if id(p) in flight.values]
        results._names = dict(names)
        results._ambiguous = {name for name, key in names if results._names[name] != key}
        for source, values in flight.values.values():
            for field, value in values.items() if self.attach else ():
                flight.attach(source.tensor, field, value)
        results._keep = [source.tensor for source, _ in flight.values.values()]
        results._places = {}
        if any(e.placed for e in self.extensions) and flight.values.keys() <= tree.keys():
            results._places = {key: p for key, p in tree.items() if p.requires_grad and self._wants(p)}
        if flight.values:
            self._passes += 1
            if self.pass_hook is not None:
                self.pass_hook(results)
            for record in flight.records:
                record.counted += [e.bounded for e in bounded]
        if flight.together is not None:
            self._before, self._count, self._constants = flight.together


def _identified(parameters: Any) -> dict[int, Tensor]:
    if isinstance(parameters, (Tensor, nn.Module)):
        raise ValueError(
            f"parameters must be several tensors, got a {type(parameters).__name__}: put it in a list, or "
            "call its .parameters()."
        )
    if not isinstance(parameters, Iterable):
        raise ValueError(
            f"parameters must be several tensors, such as model.head.parameters(), got {parameters!r:.80}."
        )
    found = list(parameters)
    for p in found:
        if not isinstance(p, Tensor):
            what = "pairs of names and tensors" if isinstance(p, tuple) else f"{p!r:.80}"
            raise ValueError(f"parameters must be tensors such as model.head.parameters() gives, got {what}.")
    if not found:
        raise ValueError("parameters is empty: leave it out to ask for all (a generator can be used once only).")
    return {id(p): p for p in found}


_PLAIN = (int, float, str, tuple, type(None))

#: Of a loss module; "batchmean" is that of KLDivLoss.
_REDUCTIONS = ("mean", "batchmean", "sum", "none")

_SCALE = "scale=<number> to backpack, to px.optim.emit, or to step() of a monitor"


def _kind(t: Tensor, ways: Iterable[str]) -> str:
    used = ", ".join(filter(None, ways))
    return f"{list(t.shape)} {t.dtype}{used and f' ({used})'}"


def _will_arrive(parameter: Tensor) -> bool:
    return aimed_at(parameter) and any(torch._C._will_engine_execute_node(node) for node in live_nodes(parameter))
