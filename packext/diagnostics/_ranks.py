"""Several processes under `DistributedDataParallel`: what each saw of a step becomes what all of them saw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import OUTSIDE, Absent, Call, Count, Pass, Step, apart

#: Results of which the samples of all processes are put side by side, and those that are sums over them; with the power
#: in which an individual gradient is in them.
SIDE_BY_SIDE = {"batch_l2": 2, "slope_dot": 1, "kept": 1}
SUMS = {"sum_grad_squared": 2, "diag_ggn_exact": 1, "diag_ggn_mc": 1}


class Kept(px.ClippedGrad):
    """Individual gradients held to the end of the step as for clipping, in `kept`.

    A function for each parameter that gives inner products with a direction `[*p]`: the gradient of all processes is
    known only when the backward pass has ended.
    """

    savefield = "kept"

    def __init__(self) -> None:
        """Nothing is clipped: the norm is of no account."""
        super().__init__(1.0)

    def finish(self, asks: dict[int, Any]) -> dict[int, Any]:
        """The functions."""
        return {key: functools.partial(_dots, ask) for key, ask in asks.items()}


def _dots(ask: Any, direction: Tensor) -> Tensor:
    return ask.statistics.dots(direction.to(ask.statistics.form.acc)) * ask.factor


def inside(model: Any) -> Any:
    """The model that a `DistributedDataParallel` holds; any other as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class Ranks:
    """The processes that train one model.

    Attributes:
        size: their number.
        rank: of this one among them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the model as it is trained."""
        self._parallel = model if isinstance(model, DistributedDataParallel) else None
        self._group = None if self._parallel is None else self._parallel.process_group
        self.size, self.rank = (1, 0) if self._group is None else (self._group.size(), self._group.rank())
        self._name = type(model).__name__
        self.check()

    def check(self) -> None:
        """Refuse what is not averaged by `DistributedDataParallel`."""
        if self._parallel is None:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                raise px.PackextError(
                    f"Cockpit in a process group of {dist.get_world_size()} ranks needs the DistributedDataParallel "
                    f"that averages their gradients, got {self._name}: pass it as the model. Sharded models (FSDP) "
                    "and gradients averaged by hand are not supported."
                )
        elif self._parallel._join_config.enable:
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
        known = {*SIDE_BY_SIDE, *SUMS, Count.savefield}
        for q in needs:
            if q.savefield not in known and not _mean_direction(q):
                return f"{type(q).__name__} is defined within one process, and there are {self.size}"
        if type(instrument).enter is not Instrument.enter:
            return f"it looks at modules in one process, and there are {self.size}"
        return None

    def needs(self, needs: Sequence[Any]) -> tuple[Any, ...]:
        """What to ask for in this process."""
        return tuple(Kept() if self.size > 1 and _mean_direction(q) else q for q in needs)

    def merge(self, step: Step, asked: Sequence[Sequence[Any]]) -> None:
        """Make a step of this process one of all of them, which is as if one pass had seen all samples.

        `DistributedDataParallel` averages what the losses of the processes give. With f_r the factor from the mean of
        the samples' own gradients to what rank r's passes add to `.grad`, and n_r its samples, a sample's share in the
        average is f_r / n_r: its own loss is weighted with that, over the mean of it. For batches of one size all
        weights are 1.
        """
        if self.size == 1:
            return
        local: dict[tuple[int, ...], tuple[str, Any]] = {}  # equal results of several instruments once
        where: list[dict[str, tuple[int, ...]]] = []
        for k, quantities in enumerate(asked):
            where.append({})
            for field in (q.savefield for q in quantities if q.savefield != Count.savefield):
                key = tuple(id(p.results[k].get(field)) if p.results else 0 for p in step.passes)
                view = step.seen_by(k, (field,))
                local[key] = field, _attempt(lambda view=view, field=field: view.layers(field))
                if field == "kept" and len(step.passes) > 1:
                    reason = f"grad_dot is defined within one backward pass; this step had {len(step.passes)}"
                    local[key] = field, reason
                where[-1][field] = key
        names = [(field, v if isinstance(v, str) else list(v)) for field, v in local.values()]
        mine = {
            "passes": len(step.passes), "names": names,
            "n": _attempt(lambda: step.n), "factor": _attempt(lambda: step.factor),
            "square": _attempt(lambda: step.factor**2 * _square(step._gradient)),
            "loss": _attempt(lambda: step.loss), "losses": _attempt(lambda: step.losses.cpu()),
            "samples": step.samples,
        }  # fmt: skip
        everyone = self._gather(mine)
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
        done = self._results(local, step, weights)
        merged = Pass(0, {}, n=total, share=1 / mean)
        merged.calls = [_call(step.passes[0].calls[0][0].kind, everyone, factors, weights, mean)]
        several = len(step.passes) > 1
        merged.results = [{("grad_dot" if f == "kept" else f): done[key] for f, key in part.items()} for part in where]
        step.passes = [merged]
        indices = [r["samples"] for r in everyone]
        step.samples = None if any(part is None for part in indices) else torch.cat(indices)
        step._shared.clear()  # it holds what this process alone has seen
        if several:
            step._outside = (
                "whether terms of the loss pass by the model is not checked over several backward passes in several "
                "processes"
            )
        else:
            _compare(step, merged)

    def _results(self, local: dict[Any, tuple[str, Any]], step: Step, weights: list[float]) -> dict[Any, Any]:
        """Results of all processes, by the same keys."""
        mine: dict[int, dict[str, Tensor]] = {}
        multiplier = step.passes[0].multiplier
        done: dict[Any, Any] = {}
        for position, (key, (field, found)) in enumerate(local.items()):
            if isinstance(found, str):
                done[key] = found
            elif field in SUMS:
                weight = weights[self.rank] ** SUMS[field]
                done[key] = {}
                for name, value in found.items():
                    done[key][name] = value * weight
                    dist.all_reduce(done[key][name], group=self._group)
            else:
                if field == "kept":
                    found = {name: f(step._gradient[name]) / multiplier for name, f in found.items()}
                mine[position] = {name: value.cpu() for name, value in found.items()}
        gathered = self._gather(mine)
        for position, (key, (field, _)) in enumerate(local.items()):
            if position in mine:
                done[key] = {}
                powers = [w ** SIDE_BY_SIDE[field] for w in weights]
                for name in mine[position]:
                    parts = [part[position][name] * w for part, w in zip(gathered, powers, strict=True)]
                    done[key][name] = torch.cat(parts).to(step.parameters[name].device)
        return done

    def _gather(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._group)
        return found


def _mean_direction(quantity: Any) -> bool:
    return type(quantity) is px.GradDot and quantity.direction is None


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


def _square(gradient: dict[str, Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradient.values())


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
    for part in merged.results:
        dots = part.get("grad_dot")
        if isinstance(dots, dict) and dots:
            rows = sum(float(v.double().mean()) for v in dots.values())
            if apart(rows, _square(step._gradient)):
                step._outside = OUTSIDE
            return
