"""What is to be audited: what leaves a client, the data, and how long the audit may take."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

import packext as px
from packext.attacks import CanaryAudit, LocalSteps
from packext.defences import Clipped, Compose, TopK, replaces_share


@dataclass(frozen=True)
class Sharing:
    """What leaves a client, and who sees it.

    Attributes:
        what: "gradient" (FedSGD), or "update" after local steps (FedAvg).
        batch_size: samples of one gradient, or of one local step.
        local_steps: of plain SGD, for an update.
        lr: learning rate of the local steps.
        samples: that a client holds for an update, taken `batch_size` at a time, no more than all steps see; one batch
            by default.
        secure_aggregation: whether the server sees the mean over clients alone.
        clients: in one aggregate; 1 without secure aggregation.
        server: "honest" if it follows the protocol and looks, "malicious" if it may send other models than agreed.
        defence: what a client does before it sends: a callable from what would be shared to what is, as in
            `packext.defences`; or one that takes the place of `packext.attacks.share`, as `packext.defences.Clipped`
            does. None for nothing.
        epsilon: that is claimed for the training, or None.
        delta: that is claimed with it.
        canaries: how the claim is measured: what `packext.attacks.GradientCanaries.audit` says of a run with canaries;
            or numbers `(correct, guesses, canaries)`, that of guesses chosen before looking; or a callable that makes
            such a run and returns either.
    """

    what: str = "gradient"
    batch_size: int = 8
    local_steps: int = 1
    lr: float | None = None
    samples: int | None = None
    secure_aggregation: bool = False
    clients: int = 1
    server: str = "honest"
    defence: Callable[..., Any] | None = None
    epsilon: float | None = None
    delta: float | None = None
    canaries: CanaryAudit | tuple[int, int, int] | Callable[[], CanaryAudit | tuple[int, int, int]] | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        for name, allowed in (("what", ("gradient", "update")), ("server", ("honest", "malicious"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("batch_size", "local_steps", "clients"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if self.what == "gradient" and (self.local_steps > 1 or self.samples is not None):
            raise ValueError('local_steps and samples belong to what="update"; a gradient is of one batch.')
        if self.what == "update" and not (self.lr is not None and 0 < self.lr < math.inf):
            raise ValueError(f"an update is of local steps with a learning rate: lr must be positive, got {self.lr}.")
        if self.samples is not None and self.samples < self.batch_size:
            raise ValueError(f"a client with {self.samples} samples has no batch of {self.batch_size}.")
        if self.what == "update" and self.local_steps * self.batch_size < self.held:
            raise ValueError(
                f"{self.local_steps} local step(s) of {self.batch_size} do not see {self.samples} samples: what a "
                "client sends is of those alone that it sees. Take more local_steps, or fewer samples."
            )
        if self.secure_aggregation != (self.clients > 1):
            raise ValueError(
                "secure_aggregation hides a client among others: it needs clients=2 or more, and clients are counted "
                f"for it alone, got {self.clients}."
            )
        if self.epsilon is not None and (not self.epsilon >= 0 or self.delta is None or not 0 <= self.delta < 1):
            raise ValueError(
                f"a claim needs epsilon >= 0 and 0 <= delta < 1, got epsilon={self.epsilon}, delta={self.delta}."
            )
        if self.canaries is not None and self.delta is None:
            raise ValueError("canaries measure epsilon at a delta: pass delta= as well.")
        if self.defence is not None:
            replaces_share(self.defence)

    @property
    def held(self) -> int:
        """Samples behind what one client sends."""
        return self.batch_size if self.samples is None else self.samples

    @property
    def behind(self) -> int:
        """Samples behind what the server sees of one round."""
        return self.held * self.clients

    @property
    def local(self) -> LocalSteps | None:
        """Local steps, where there are several: one is a gradient times the learning rate."""
        if self.what == "gradient" or self.local_steps == 1:
            return None
        return LocalSteps(self.local_steps, float(self.lr or 0.0), self.batch_size)

    def words(self) -> dict[str, Any]:
        """The settings as they are compared and written."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return named | {"defence": name_of(self.defence), "canaries": name_of(self.canaries)}


def clip_of(defence: Any) -> float | None:
    """The norm that a clipping client clips to, which an attacker who knows the defence knows.

    Args:
        defence: of a client.

    Returns:
        None without clipping.
    """
    first = defence.defences[0] if isinstance(defence, Compose) else defence
    return float(first.max_norm) if isinstance(first, Clipped) else None


def fresh(defence: Any, draw: int, place: int = 0) -> Any:
    """A defence as a client has it that sends for the first time: nothing held back, and noise of its own.

    Args:
        defence: as given; stays as it is.
        draw: another one gives other noise.
        place: among several, whose noise is not the same.

    Returns:
        A copy.
    """
    if isinstance(defence, Compose):
        return Compose(*[fresh(d, draw, k) for k, d in enumerate(defence.defences)])
    made = copy.deepcopy(defence)
    if isinstance(made, TopK):
        made.residual.clear()
    if is_dataclass(made) and any(f.name == "seed" for f in fields(made)):
        # To be repeated. Draws end below 2^28, and torch seeds by the lowest 32 bits.
        seed = place << 28 if made.seed is None else made.seed  # type: ignore[attr-defined]
        made = replace(made, seed=seed + draw)  # type: ignore[type-var]
    return made


def name_of(value: Any) -> Any:
    """A name that is the same in the next process, which the default repr of a function or an object is not."""
    if isinstance(value, Compose):
        return " + ".join(name_of(d) for d in value.defences)
    if value is None:
        return None
    if isinstance(value, tuple) or is_dataclass(value):
        return repr(value)
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True)
class Data:
    """What the audit is made with.

    Attributes:
        members: inputs `[N, ...]` and labels `[N, ...]` that the model is trained on, and clients send gradients of.
        heldout: of the same kind, not trained on; None if there are none.
        auxiliary: inputs `[M, ...]` that an attacker has of the same kind: candidates among which a reconstruction is
            to be recognised.
        decode: where inputs are tokens, what a list of them says, for the report: such as `tokenizer.decode`, which is
            asked for each token by itself.
    """

    members: tuple[Tensor, Tensor]
    heldout: tuple[Tensor, Tensor] | None = None
    auxiliary: Tensor | None = None
    decode: Callable[[list[int]], str] | None = None

    @classmethod
    def of(cls, data: Any) -> Data:
        """Check it, or make it of a pair `(x, y)` of members.

        Args:
            data: a pair, or a `Data`.

        Returns:
            Data whose parts fit each other.

        Raises:
            PackextError: if something is empty, has another shape or length, or is not finite.
        """
        made = data if isinstance(data, cls) else cls(data)
        for name in ("members", "heldout"):
            pair = getattr(made, name)
            if pair is None and name == "heldout":
                continue
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
                parts = f" of {', '.join(type(t).__name__ for t in pair)}" if isinstance(pair, (tuple, list)) else ""
                raise px.PackextError(
                    f"{name} must be a pair of tensors (x, y), got {type(pair).__name__}{parts}. Of arrays take "
                    "torch.from_numpy, of a data set next(iter(DataLoader(dataset, len(dataset))))."
                )
            x, y = pair
            if not x.dim() or not y.dim() or len(x) != len(y) or not len(x):
                raise px.PackextError(
                    f"{name}: inputs {list(x.shape)} and labels {list(y.shape)} must have the same number of samples."
                )
            _finite(x, f"inputs of {name}")
            _finite(y, f"labels of {name}")
        x, y = made.members
        if made.decode is not None and (x.is_floating_point() or not callable(made.decode)):
            raise px.PackextError(
                f"decode says what tokens are: it must be a callable of a list of them, such as tokenizer.decode, got "
                f"{type(made.decode).__name__} for inputs of {x.dtype}."
            )
        others = [("auxiliary", "inputs", made.auxiliary, x)]
        if made.heldout is not None:
            others += [("heldout", "inputs", made.heldout[0], x), ("heldout", "labels", made.heldout[1], y)]
        for name, what, other, own in others:
            if other is not None and (other.shape[1:] != own.shape[1:] or other.dtype != own.dtype or not len(other)):
                raise px.PackextError(
                    f"{name} has {what} {list(other.shape)} of {other.dtype}, and members {list(own.shape)} of "
                    f"{own.dtype}."
                )
        if made.auxiliary is not None:
            _finite(made.auxiliary, "auxiliary")
        return made


def _finite(value: Tensor, name: str) -> None:
    bad = (~value.isfinite()).flatten(1).any(1) if value.dim() > 1 else ~value.isfinite()
    if bad.any():
        raise px.PackextError(f"{name}: samples {bad.nonzero().flatten()[:10].tolist()} are not finite.")


@dataclass(frozen=True)
class Budget:
    """How much an audit tries. Loops end early when the time is over, and the report says how far they came.

    Attributes:
        seconds: for all sections; each has a share, and makes one attempt at least.
        draws: batches for label rules and closed forms.
        seeds: of reconstructions, each of another batch.
        restarts: of each search.
        iterations: of L-BFGS (Adam makes ten times as many).
        shadows: models of LiRA.
    """

    seconds: float
    draws: int = 20
    seeds: int = 10
    restarts: int = 2
    iterations: int = 100
    shadows: int = 16

    @classmethod
    def of(cls, budget: str | float | int | Budget) -> Budget:
        """By name or seconds.

        Args:
            budget: "quick" (about 20 seconds on a small model), "full" (up to half an hour), or a number of seconds.

        Returns:
            The budget.

        Raises:
            ValueError: if it is none of these.
        """
        if isinstance(budget, cls):
            return budget
        if budget == "quick":
            return cls(20.0, draws=8, seeds=4, restarts=1, iterations=30, shadows=4)
        if budget == "full":
            return cls(1800.0, draws=50, seeds=20, restarts=4, iterations=300, shadows=32)
        if isinstance(budget, (int, float)) and not isinstance(budget, bool) and 0 < budget < math.inf:
            return cls(float(budget))
        raise ValueError(f'budget must be "quick", "full" or a positive number of seconds, got {budget!r}.')
