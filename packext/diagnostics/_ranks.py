"""Several processes under `DistributedDataParallel`: what each saw of a step becomes what all of them saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import OUTSIDE, Absent, Call, Count, Drawn, Pass, Step, outside
from packext.diagnostics._tensors import square
from packext.diagnostics._united import HESSIAN, Mean, Weighing, instead


def inside(model: Any) -> tuple[Any, DistributedDataParallel | None]:
    """The model that a `DistributedDataParallel` or `torch.compile` holds, and the former if there is one."""
    parallel = None
    while True:
        if isinstance(model, DistributedDataParallel):
            parallel, model = model, model.module
        elif type(model).__module__.startswith("torch._dynamo"):  # an import of it takes a second
            model = model._modules["_orig_mod"]
        else:
            return model, parallel


class Ranks:
    """The processes that train one model.

    Attributes:
        parallel: the `DistributedDataParallel` that averages their gradients; None in a process by itself.
        size: their number.
        rank: of this one among them.
        numbers: what targets are drawn with, which are to be others in each.
    """

    def __init__(self, model: nn.Module, parallel: DistributedDataParallel | None) -> None:
        """Take the model, and what averages its gradients."""
        self.parallel = parallel
        self._group = None if self.parallel is None else self.parallel.process_group
        self.size, self.rank = (1, 0) if self._group is None else (self._group.size(), self._group.rank())
        self.numbers = torch.Generator().manual_seed(self.rank)
        self._name = type(model).__name__
        self._synced = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        self.check()

    def check(self) -> None:
        """Refuse what is not averaged by `DistributedDataParallel`."""
        if self.parallel is None:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                raise px.PackextError(
                    f"Cockpit in a process group of {dist.get_world_size()} ranks needs the DistributedDataParallel "
                    f"that averages their gradients, got {self._name}: pass it as the model. Sharded models (FSDP) "
                    "and gradients averaged by hand are not supported."
                )
        elif self.parallel._join_config.enable:
            raise px.PackextError(
                "Cockpit does not work within DistributedDataParallel.join(): ranks without data take no steps, and "
                "the others would wait for them. Drop the last incomplete round of batches instead."
            )

    def first_step(self, begin: Callable[[], int]) -> int:
        """Where rank 0 begins; what it raises is raised by all."""
        if self.size == 1:
            return begin()
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                found = [begin()]
            except Exception as error:  # noqa: BLE001 - the others wait
                found = [error]
        assert self._group is not None
        dist.broadcast_object_list(found, dist.get_global_rank(self._group, 0), self._group)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def obstacle(self, instrument: Instrument, needs: Sequence[Any]) -> str | None:
        """Why an instrument cannot look at several processes."""
        if self.size == 1:
            return None
        for q in needs:
            if instead(q, self) is None:
                return (
                    f"{type(q).__name__} is defined within one process, and there are {self.size}: results of one do "
                    "not unite with those of another"
                )
            if isinstance(q, HESSIAN) and self._synced:
                return "SyncBatchNorm couples the processes, whose losses have no Hessians of their own"
        kind = type(instrument)
        if kind.enter is not Instrument.enter and kind.unite is Instrument.unite:
            return f"what it sees in one process does not unite with what it sees in another, and there are {self.size}"
        return None

    def needs(self, needs: Sequence[Any]) -> tuple[Any, ...]:
        """What to ask for in this process."""
        if self.size == 1:
            return tuple(needs)
        return tuple(one for q in needs for one in instead(q, self) or ())

    def unite(self, instruments: Sequence[Instrument]) -> None:
        """Have instruments tell each other what they have collected in their processes."""
        for instrument in instruments if self.size > 1 else ():
            if type(instrument).unite is not Instrument.unite:
                instrument.unite(self)

    def merge(self, step: Step, asked: Sequence[Sequence[Any]]) -> None:
        """Make a step of this process one of all of them, which is as if one pass had seen all samples.

        `DistributedDataParallel` averages what the losses of the processes give. With f_r the factor from the mean of
        the samples' own gradients to what rank r's passes add to `.grad`, and n_r its samples, a sample's share in the
        average is f_r / n_r: its own loss is weighted with that, over the mean of it. For batches of one size all
        weights are 1.
        """
        if self.size == 1:
            return
        local: dict[tuple[int, ...], tuple[Any, Any]] = {}  # equal results of several instruments once
        where: list[dict[str, tuple[int, ...]]] = []
        for k, quantities in enumerate(asked):
            where.append({})
            for q in (q for q in quantities if q.savefield not in (Count.savefield, Mean.savefield)):
                field = q.savefield
                key = tuple(id(p.results[k].get(field)) if p.results else 0 for p in step.passes)
                local[key] = q, _attempt(lambda k=k, field=field: _layers(step, k, field))
                where[-1][field] = key
        names = [(q.savefield, v if isinstance(v, str) else list(v)) for q, v in local.values()]
        mine = {
            "passes": len(step.passes), "names": names, "counts": [p.n for p in step.passes],
            "n": _attempt(lambda: step.n), "factor": _attempt(lambda: step.factor),
            "square": _attempt(lambda: step.factor**2 * square(step._gradient)),
            "loss": _attempt(lambda: step.loss), "losses": _attempt(lambda: step.losses.cpu()),
            "samples": step.samples, "empty": step._empty, "balances": [p.balance for p in step.passes],
        }  # fmt: skip
        everyone = self.gather(mine)
        if not any(r["passes"] for r in everyone):
            return
        step._void = _disagreement(everyone)
        if step._void:
            return
        factors, counts = [r["factor"] for r in everyone], [r["n"] for r in everyone]
        mean = factors[0] if len(set(factors)) == 1 else sum(factors) / self.size
        total = None if any(isinstance(n, str) for n in counts) else sum(counts)
        weights = [1.0] * self.size
        if total is not None:
            shares = [f / n for f, n in zip(factors, counts, strict=True)]
            if len(set(shares)) > 1:
                weights = [s * total / (mean * self.size) for s in shares]
        if factors[self.rank] != mean:
            step._gradient = {k: g * (factors[self.rank] / mean) for k, g in step._gradient.items()}
        weighing = Weighing(
            self.sum, self.rank, [f / (mean * self.size) for f in factors], weights, [r["counts"] for r in everyone],
            step.passes[0].multiplier, step._gradient,
        )  # fmt: skip
        done = self._results(local, step, weighing)
        merged = Pass(0, {}, n=total, share=1 / mean)
        merged.calls = [_call(step.passes[0].calls[0][0].kind, everyone, factors, weights, mean)]
        step._counts = [n or 0 for r in everyone for n in r["counts"]]
        step._several, step._empty = len(step.passes) > 1, sum(r["empty"] for r in everyone)
        merged.results = [{("grad_dot" if f == "kept" else f): done[key] for f, key in part.items()} for part in where]
        step.passes = [merged]
        indices = [r["samples"] for r in everyone]
        step.samples = None if any(part is None for part in indices) else torch.cat(indices)
        step._shared.clear()  # it holds what this process alone has seen
        if step._several:
            _compare_passes(step, [r["balances"] for r in everyone])
        else:
            _compare(step, merged)

    def _results(self, local: dict[Any, tuple[Any, Any]], step: Step, weighing: Weighing) -> dict[Any, Any]:
        """Results of all processes, by the same keys."""
        mine: dict[int, dict[str, Any]] = {}
        done: dict[Any, Any] = {}
        for position, (key, (quantity, found)) in enumerate(local.items()):
            if isinstance(found, str):
                done[key] = found
            elif (added := weighing.added(quantity.savefield, found)) is not None:
                done[key] = added
            else:
                mine[position] = weighing.sent(quantity.savefield, found)
        gathered = self.gather(mine)
        for position, (key, (q, _)) in enumerate(local.items()):
            if position in mine:
                done[key] = {}
                for name in mine[position]:
                    parts = [part[position][name] for part in gathered]
                    joined = weighing.joined(q.savefield, parts, getattr(q, "samples", 0), step.number)
                    done[key][name] = _moved(joined, step.parameters[name].device)
        return done

    def gather(self, mine: Any) -> list[Any]:
        """What each process has given, in their order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def sum(self, mine: Tensor) -> Tensor:
        """The sum over the processes."""
        total = mine.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total

    def mean(self, mine: Tensor) -> Tensor:
        """The mean over the processes."""
        return self.sum(mine) / self.size


def _layers(step: Step, k: int, field: str) -> dict[str, Any]:
    """Results of an instrument by parameter; of a variance with the mean that it is about."""
    view = step.seen_by(k, (field, Mean.savefield))
    view._empty = 0  # which is told when all processes are together
    if field == "kept" and len(step.passes) > 1:  # by its name
        raise Absent(f"grad_dot is defined within one backward pass; this step had {len(step.passes)}")
    found = view.layers(field)
    if field != px.Variance.savefield:
        return found
    means = view.layers(Mean.savefield)
    return {name: (value, means[name]) for name, value in found.items()}


def _moved(value: Any, device: torch.device) -> Any:
    return Drawn(*(t.to(device) for t in value)) if isinstance(value, Drawn) else value.to(device)


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Absent as reason:
        return str(reason)


def _disagreement(ranks: list[dict[str, Any]]) -> str:
    """Why the processes' parts of a step do not make a whole; empty if they do."""
    if len({r["passes"] for r in ranks}) > 1:
        return f"the processes had different numbers of backward passes: {[r['passes'] for r in ranks]}"
    for r in ranks:
        if isinstance(r["factor"], str):
            return r["factor"]
        if r["names"] != ranks[0]["names"]:
            return "the backward passes of the processes have reached different parameters"
        if isinstance(r["loss"], str):
            return r["loss"]
        if abs(r["square"] - ranks[0]["square"]) > 1e-6 * ranks[0]["square"]:
            return (
                "`.grad` differs between the processes: the model was called without its DistributedDataParallel, or "
                "all of the step was in no_sync()"
            )
    return ""


def _call(kind: str, ranks: list[Any], factors: list[float], weights: list[float], mean: float) -> tuple[Call, Tensor]:
    """The loss of all processes, and the gradient with which the average of them arrives at it."""
    parts = [r["losses"] for r in ranks]
    reason = next((p for p in parts if isinstance(p, str)), None)
    if reason is None:
        each = torch.cat([w * p for w, p in zip(weights, parts, strict=True)])
        return Call(kind, "none", each, each), torch.full_like(each, mean / len(each))
    loss = sum(f * r["loss"] for f, r in zip(factors, ranks, strict=True)) / sum(factors)
    assert reason is not None
    return Call(kind, "mean", torch.tensor(loss, dtype=torch.float64), reason), torch.tensor(mean, dtype=torch.float64)


def _compare(step: Step, merged: Pass) -> None:
    """Note if `.grad` is not the mean of the individual gradients: then their inner products with it say nothing."""
    asked = [part for part in merged.results if isinstance(part.get("grad_dot"), dict)]
    dots = next((part["grad_dot"] for part in asked if part["grad_dot"]), {})
    rows = sum(float(v.double().mean()) for v in dots.values())
    why = outside(rows, square(step._of(step._gradient))) if dots else ""
    if why:
        step._outside = why
        for part in asked:
            part["grad_dot"] = why


def _compare_passes(step: Step, balances: list[list[Any]]) -> None:
    """Of several passes: a pass that was averaged balances over all processes, another one in each."""
    for of_pass in zip(*balances, strict=True):
        if any(b is None for b in of_pass):
            return  # nothing that needs it
        rows, added, whole = (sum(each) for each in zip(*of_pass, strict=True))
        if not abs(rows - added) <= 0.01 * whole:
            step._outside = outside(rows, added) or OUTSIDE
