"""The search of paths: weights are trained on one path, architecture parameters by gates of two."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.search._apart import check_apart
from packext.search._passes import refuse_function
from packext.search.latency import LatencyTable
from packext.search.mixed import MixedOp, mixed_ops, shown
from packext.search.race import Race, student


@dataclass(frozen=True)
class ArchitectureGradient:
    """What one step found at one edge: the derivative of the objective by `alpha` of two operations.

    Attributes:
        edge: path of the `MixedOp`.
        active: name of the operation whose path was taken.
        inactive: name of the one that it was compared with; its derivative is `-gradient`.
        gradient: derivative by the active one's `alpha`, latency included.
        half_width: of its confidence interval over the samples of the batch, at the search's `level`.
    """

    edge: str
    active: str
    inactive: str
    gradient: float
    half_width: float

    @property
    def certain(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.gradient) > self.half_width


class ProxylessNAS:
    """Searches a network with `MixedOp` edges by binary gates (Cai, Zhu & Han, ICLR 2019), and prunes by intervals.

    The user's loop trains the weights: `sample()` draws a path, then an ordinary step on `weights()`. Now and then,
    `step(x, y)` on other data moves the architecture. At each edge two operations are drawn by their probabilities p,
    without replacement, and one of the two to be active. Each sample's loss l_n is differentiated by their gates: with
    q the two probabilities renormalised, `dL/dalpha_a = q_a q_b mean_n(dl_n/dg_a - dl_n/dg_b)`, the other's is the
    negative. That is the gradient of the expected loss if it is linear in the gates, and an approximation otherwise.
    Adam steps, and a common offset on both `alpha` keeps the probabilities of all other operations.

    With a latency table the objective is `loss + tradeoff * E[latency] / reference`, the expectation at an edge over
    the two operations drawn: it adds `tradeoff * seconds / reference` to the derivative by each gate.

    The differences of each step also enter a `Race` at each edge. An operation is pruned when its interval excludes
    the leader's: it has probability 0 from then on. An edge with one operation left takes no part in further steps.

    Attributes:
        net: the network, changed in place: paths, `alpha`, `alive`.
        level: of the intervals, see `Race`.
        pruned: `(step, edge, operation)` in the order in which they were pruned; steps count from 1.
        steps: number of architecture steps so far.
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: nn.Module,
        lr: float = 1e-3,
        latency: LatencyTable | None = None,
        tradeoff: float = 0.1,
        reference: float | None = None,
        level: float = 0.05,
        prune: bool = True,
        seed: int = 0,
    ) -> None:
        """Prepare the search.

        Args:
            net: not extended; samples must not influence each other in the mode in which `step` runs it, so BatchNorm
                is in evaluation mode then.
            loss_fn: a loss module with `reduction` "mean" or "sum"; a copy of it is extended.
            lr: of Adam on `alpha` (betas 0 and 0.999: operations that were not drawn do not move).
            latency: what operations take; none by default.
            tradeoff: weight of the latency, in units of the loss.
            reference: seconds; by default the expectation at the start.
            level: of the intervals, in (0, 1).
            prune: whether operations that have lost are pruned; intervals are given in either case.
            seed: of the draws, which come from a generator of their own.

        Raises:
            ValueError: for a level, rate, tradeoff or reference that is out of range.
            PackextError: without a `MixedOp`, with an extended network, or if the table misses an operation.
        """
        refuse_function(type(self).__name__, loss_fn)
        self.net, self.level, self.prune, self.tradeoff = net, level, prune, tradeoff
        self._edges = mixed_ops(net)
        if any(px.is_extended(m) for m in net.modules()):
            raise px.PackextError("The network is extended: call px.unextend(net), the search extends the gates alone.")
        self._races = {edge: Race(len(m.ops), level) for edge, m in self._edges.items()}
        if not lr > 0 or not 0 <= tradeoff < math.inf:
            raise ValueError(f"lr must be positive and tradeoff 0 or more, got {lr!r} and {tradeoff!r}.")
        if latency is not None:
            with torch.no_grad():
                reference = float(latency.expected(net)) if reference is None else reference
            if not 0 < reference < math.inf:
                raise ValueError(f"reference must be a positive number of seconds, got {reference!r}.")
        self.latency, self.reference = latency, reference
        self._loss_fn = px.extend(copy.deepcopy(loss_fn))
        self._optimizer = torch.optim.Adam([m.alpha for m in self._edges.values()], lr, betas=(0.0, 0.999))
        self._generator = torch.Generator().manual_seed(seed)
        self._checked: set[Any] = set()
        self.pruned: list[tuple[int, str, str]] = []
        self.steps = 0

    def weights(self) -> Iterator[nn.Parameter]:
        """Parameters of the network but `alpha`, for the optimizer of the weights."""
        alphas = {id(m.alpha) for m in self._edges.values()}
        return (p for p in self.net.parameters() if id(p) not in alphas)

    def sample(self) -> dict[str, str]:
        """Draw a path for the passes that follow, and forget the gradients of operations that are not on it.

        So an optimizer leaves the others alone, momentum and weight decay included.

        Returns:
            Names of the operations by edge.
        """
        for m in self._edges.values():
            m.active, m.inactive = int(self._draw(m.probabilities(), 1)[0]), None
            for k, name in enumerate(m.names):
                for p in m.ops[name].parameters() if k != m.active else ():
                    p.grad = None
        return {edge: m.names[m.active or 0] for edge, m in self._edges.items()}

    def step(self, x: Any, y: Any) -> list[ArchitectureGradient]:
        """Move the architecture once. Weights, their gradients and the paths in use stay as they are.

        Args:
            x: inputs `[N, ...]` of data that the weights are not trained on, N of 2 or more.
            y: targets.

        Returns:
            What was found at each edge that is not decided.

        Raises:
            PackextError: if samples influence each other, a value is not finite, the loss is no scalar, or several
                processes take part. Nothing has changed then.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise px.PackextError("Several processes would search apart: run the search in one process.")
        if not isinstance(x, Tensor) or x.dim() < 1 or len(x) < 2:
            what = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise px.PackextError(f"Intervals need a batch x [N, ...] of two samples or more; x is {what}.")
        if not x.isfinite().all():
            raise px.PackextError(f"The inputs x {list(x.shape)} are not finite.")
        before = {edge: (m.active, m.inactive) for edge, m in self._edges.items()}
        state = self._generator.get_state()
        try:
            mode = tuple(m.training for m in self.net.modules())
            if mode not in self._checked:
                check_apart(self.net, self._edges, x)
                self._checked.add(mode)
            moves = self._moves(x, y)
            found = [self._gradient(move) for move in moves]
        except BaseException:
            self._generator.set_state(state)
            raise
        finally:
            for edge, m in self._edges.items():
                m.active, m.inactive = before[edge]
        self._move(moves, found)
        return found

    def chosen(self) -> dict[str, str]:
        """Names of the most probable operations, by edge."""
        return {edge: m.names[m.leader()] for edge, m in self._edges.items()}

    @property
    def decided(self) -> bool:
        """Whether one operation is left at each edge: further steps change nothing."""
        return all(int(m.alive.sum()) == 1 for m in self._edges.values())

    def derive(self) -> nn.Module:
        """A copy of the network with the most probable operation, as it is trained, in place of each `MixedOp`."""
        net = copy.deepcopy(self.net)
        for edge, name in self.chosen().items():
            parent, _, leaf = edge.rpartition(".")
            setattr(net.get_submodule(parent), leaf, net.get_submodule(f"{edge}.ops.{name}"))
        return net

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that the search goes on from, but for the network's `state_dict`, with `alpha` and `alive`."""
        return {
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "races": {edge: race.state_dict() for edge, race in self._races.items()},
            "generator": self._generator.get_state(),
            "pruned": list(self.pruned),
            "steps": self.steps,
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state: of a search of the same edges.

        Raises:
            PackextError: if the edges are others. Nothing has changed then.
        """
        if state["races"].keys() != self._races.keys():
            raise px.PackextError(f"The state is of edges {list(state['races'])}, the network has {list(self._races)}.")
        races = {edge: Race(len(m.ops), self.level) for edge, m in self._edges.items()}
        for edge, race in races.items():
            race.load_state_dict(state["races"][edge])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._races = races
        self._generator.set_state(state["generator"].cpu().clone())  # a view would be read from its storage's start
        self.pruned, self.steps = list(state["pruned"]), state["steps"]
        if state["reference"] is not None:  # where there was a latency table; the expectation at the start is lost
            self.reference = state["reference"]

    def _draw(self, p: Tensor, count: int) -> list[int]:
        return torch.multinomial(p.detach().cpu(), count, generator=self._generator).tolist()

    def _moves(self, x: Tensor, y: Any) -> list[_Move]:
        """Draw two paths at each edge that is not decided, and differentiate each sample's loss by their gates."""
        moves = []
        for edge, m in self._edges.items():
            m.active, m.inactive = m.leader(), None
            if int(m.alive.sum()) > 1:
                pair = self._draw(m.probabilities(), 2)
                q = m.alpha.detach().double()[pair].softmax(0)
                first = self._draw(q, 1)[0]
                m.active, m.inactive = pair[first], pair[1 - first]
                moves.append(_Move(edge, m, m.active, m.inactive, float(q.prod())))
        if not moves:
            return []
        gates = [move.op.gates for move in moves]
        with (
            torch.enable_grad(),
            px.backpack(px.BatchGrad(), parameters=gates, scale="sample", attach=False) as results,
        ):
            loss = self._loss_fn(self.net(x), y)
            if not isinstance(loss, Tensor) or loss.dim() or not loss.isfinite():
                what = loss.item() if isinstance(loss, Tensor) and not loss.dim() else f"of shape {list(loss.shape)}"
                raise px.PackextError(
                    f"The loss of the paths {shown(self._edges)} is {what}: it must be finite, and a scalar "
                    '(reduction="mean" or "sum").'
                )
            if loss.grad_fn is not None:  # no edge is reached where operations that give zeros cut the network
                loss.backward(inputs=gates)
        for move in moves:
            gate = move.op.gates
            gate.grad = None
            move.reached = gate in results
            rows = results[gate].grad_batch if move.reached else gate.new_zeros(len(x), 2)
            if len(rows) != len(x) or not rows.isfinite().all():
                raise px.PackextError(
                    f"Gradients {list(rows.shape)} of the gates at {move.edge!r} are not finite, or not of one row for "
                    f"each of {len(x)} samples; the paths are {shown(self._edges)}."
                )
            move.differences = rows[:, 0].double() - rows[:, 1].double() + self._slower(move)
        return moves

    def _slower(self, move: _Move) -> float:
        """What the latency adds to the objective's derivative by the active gate, less that by the other."""
        if self.latency is None or self.reference is None:
            return 0.0
        seconds = self.latency.of(move.edge, move.op)
        return self.tradeoff * float(seconds[move.active] - seconds[move.inactive]) / self.reference

    def _gradient(self, move: _Move) -> ArchitectureGradient:
        d, n, names = move.differences, len(move.differences), move.op.names
        half = student(self.level / 2, float(n - 1)) * float(d.std()) / math.sqrt(n)
        return ArchitectureGradient(
            move.edge, names[move.active], names[move.inactive], move.slope * float(d.mean()), move.slope * half
        )

    def _move(self, moves: list[_Move], found: list[ArchitectureGradient]) -> None:
        if not moves:
            return
        self._optimizer.zero_grad()
        before = []
        for move, value in zip(moves, found, strict=True):
            alpha, pair = move.op.alpha, [move.active, move.inactive]
            alpha.grad = torch.zeros_like(alpha)
            alpha.grad[pair] = torch.tensor([value.gradient, -value.gradient], dtype=alpha.dtype, device=alpha.device)
            before.append(alpha.detach()[pair].logsumexp(0))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        for move, total in zip(moves, before, strict=True):
            alpha, pair, race = move.op.alpha, [move.active, move.inactive], self._races[move.edge]
            with torch.no_grad():
                alpha[pair] -= alpha[pair].logsumexp(0) - total
            if not move.reached:
                continue
            race.add(move.active, move.inactive, move.differences)
            for k in race.lost(move.op.alive.cpu(), move.op.leader()) if self.prune else ():
                move.op.alive[k] = False
                self.pruned.append((self.steps, move.edge, move.op.names[k]))


@dataclass
class _Move:
    """Two paths at an edge, `slope = q_a q_b`, and what each sample's objective is more by the active gate.

    An edge is not reached where zeros of another cut it off: such a step says nothing of its operations' losses.
    """

    edge: str
    op: MixedOp
    active: int
    inactive: int
    slope: float
    reached: bool = True
    differences: Tensor = torch.empty(0)
