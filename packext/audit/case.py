"""The model, the data and what leaves a client, as every section takes them."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import Cohort, Head, Shared, share, share_update
from packext.audit.sharing import Budget, Data, Sharing, fresh, name_of
from packext.defences import replaces_share

Train = Callable[[Tensor, Tensor], nn.Module]
Utility = Callable[[Callable[..., Shared]], float]


class Clock:
    """The time of one section."""

    def __init__(self, seconds: float, tell: Callable[[float], None] = lambda done: None) -> None:
        """Start."""
        self.start, self.seconds, self.tell = perf_counter(), seconds, tell

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds that are left, not below zero."""
        return max(0.0, self.seconds - self.spent)

    def go_on(self, made: int, of: int) -> bool:
        """Whether to make one more attempt: the first always, then while there is time for another like those made."""
        self.tell(made / of)
        return made < of and (made == 0 or self.spent * (made + 1) / made <= self.seconds)


class Case:
    """What is audited. Everything runs on copies: the user's model, loss and defence are never touched."""

    def __init__(
        self, model: nn.Module, loss_fn: nn.Module, data: Any, sharing: Sharing, budget: Budget, seed: int = 0
    ) -> None:
        """Check that all of it fits together."""
        if not isinstance(model, nn.Module) or not isinstance(loss_fn, nn.Module):
            raise px.PackextError(
                f"An audit is of a torch.nn.Module and a loss that is one (nn.CrossEntropyLoss()), got "
                f"{type(model).__name__} and {type(loss_fn).__name__}."
            )
        if not isinstance(sharing, Sharing):
            raise px.PackextError(f"sharing must be a px.audit.Sharing, got {type(sharing).__name__}.")
        if getattr(loss_fn, "reduction", None) not in ("mean", "sum"):
            raise px.PackextError(
                f'The loss must have reduction "mean" or "sum", which says what a gradient is a sum of; got {loss_fn}.'
            )
        self.model, self.loss_fn = copy.deepcopy(model), copy.deepcopy(loss_fn)
        for module in (self.model, self.loss_fn):
            if px.is_extended(module):
                px.unextend(module)
        self.sharing, self.budget, self.seed = sharing, budget, seed
        self.data = Data.of(data)
        place = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.x, self.y = (t.to(place) for t in self.data.members)
        self.held = None if self.data.heldout is None else tuple(t.to(place) for t in self.data.heldout)
        self.auxiliary = None if self.data.auxiliary is None else self.data.auxiliary.to(place)
        if len(self.x) < sharing.behind:
            raise px.PackextError(
                f"{sharing.behind} samples are behind what the server sees of a round ({sharing.held} of a client); "
                f"members are only {len(self.x)}."
            )
        self._messages = 0
        self._runs()

    def _runs(self) -> None:
        n = min(len(self.x), max(2, self.sharing.batch_size))
        try:
            with torch.no_grad():
                self.output = copy.deepcopy(self.model)(self.x[:n])
            copied = copy.deepcopy(self.loss_fn)
            value = copied(self.output, self.y[:n]) if isinstance(self.output, Tensor) else None
        except Exception as error:  # whatever the user's model says about its inputs
            raise px.PackextError(
                f"{type(self.model).__name__} and {type(self.loss_fn).__name__} do not run on inputs "
                f"{list(self.x[:n].shape)} of {self.x.dtype} and labels {list(self.y[:n].shape)} of {self.y.dtype}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if value is None or value.dim():
            raise px.PackextError(
                "An audit is of a model that gives one tensor, and a loss that makes one number of it; "
                f"{type(self.model).__name__} gives {type(self.output).__name__}."
            )
        if isinstance(self.loss_fn, nn.CrossEntropyLoss):
            for name, y in (("members", self.y), ("heldout", self.held[1] if self.held else self.y)):
                outside = (y < 0) | (y >= self.output.shape[1])
                if not y.is_floating_point() and bool((outside & (y != self.loss_fn.ignore_index)).any()):
                    raise px.PackextError(
                        f"Labels of {name} lie between {int(y.min())} and {int(y.max())}; the model tells "
                        f"{self.output.shape[1]} classes apart."
                    )
        if not value.isfinite():
            raise px.PackextError(f"The loss of the first {n} members is {float(value)}: there is nothing to audit.")
        if not any(p.requires_grad for p in self.model.parameters()):
            raise px.PackextError(f"No parameter of {type(self.model).__name__} is trained: no gradient leaves anyone.")

    @property
    def frequencies(self) -> Tensor:
        """How many members each class has `[C]`."""
        return torch.bincount(self.y.cpu(), minlength=self.classes)

    @property
    def classes(self) -> int:
        """Of a classifier with one label for each sample.

        Raises:
            PackextError: if it is none.
        """
        c = self.output.shape[1] if self.output.dim() == 2 else 0
        whole = not self.y.is_floating_point() and self.y.dim() == 1
        if not c or not whole or not isinstance(self.loss_fn, nn.CrossEntropyLoss):
            raise px.PackextError(
                f"Labels are counted for nn.CrossEntropyLoss with one class for each sample; here it is "
                f"{type(self.loss_fn).__name__} with outputs {list(self.output.shape)} and labels "
                f"{list(self.y.shape)} of {self.y.dtype}."
            )
        if int(self.y.min()) < 0 or int(self.y.max()) >= c:
            raise px.PackextError(
                f"Labels lie between {int(self.y.min())} and {int(self.y.max())}, and the model tells {c} classes: "
                "with targets that the loss ignores, the number of samples behind a gradient is not known."
            )
        if bool((self.y == self.loss_fn.ignore_index).any()):
            raise px.PackextError(
                f"The loss ignores class {self.loss_fn.ignore_index}, which some members have: the number of samples "
                "behind a gradient is not known."
            )
        head = Head.of(self.model)
        if len(head.weight) != c:
            raise px.PackextError(
                f"{head.name!r} makes {len(head.weight)} outputs, not the {c} logits: an audit takes the nn.Linear "
                "that the model was given last for its last layer."
            )
        return c

    @property
    def continuous(self) -> bool:
        """Whether inputs can be searched for by descent."""
        return self.x.is_floating_point()

    @property
    def images(self) -> bool:
        """Whether inputs can be shown."""
        return self.continuous and self.x.dim() == 4 and self.x.shape[1] in (1, 3)

    def bounds(self) -> tuple[float, float]:
        """The range of the inputs, which an attacker is taken to know."""
        return float(self.x.min()), float(self.x.max())

    def draw(self, k: int, n: int) -> Tensor:
        """Indices of members of the k-th batch of n samples, without repeats."""
        generator = torch.Generator().manual_seed(self._numbered(k))
        return torch.randperm(len(self.x), generator=generator)[:n].to(self.x.device)

    def client(self, x: Tensor, y: Tensor, defended: bool = True, defence: Any = None) -> Shared:
        """What one client sends: with the audited defence, with another one, or without."""
        defence = defence if defence is not None else (self.sharing.defence if defended else None)
        local, instead = self.sharing.local, defence is not None and replaces_share(defence)
        if local is not None and instead:
            raise px.PackextError(
                f"{defence!r} takes the place of one gradient; what leaves the client is an update of {local.steps} "
                "local steps."
            )
        defence = self._first_of(defence)
        if instead:
            return defence(self.model, self.loss_fn, x, y)
        args = self.model, self.loss_fn, x, y
        sent = share(*args) if local is None else share_update(*args, local)
        return sent if defence is None else defence(sent)

    def _first_of(self, defence: Any) -> Any:
        """A defence as a client has it that sends for the first time, with noise of its own."""
        self._messages += 1
        return fresh(defence, self._messages - 1)

    def begin(self, k: int) -> None:
        """Draw noise and masks from here on as the k-th part of an audit, however many messages others have sent."""
        self._messages = k << 20  # torch seeds by the lowest 32 bits
        torch.default_generator.manual_seed(self._numbered(k))
        if self.x.device.type == "cuda":  # alone: `torch.manual_seed` would set those of devices that are not put back
            with torch.cuda.device(self.x.device):
                torch.cuda.manual_seed(self._numbered(k))

    def _numbered(self, k: int) -> int:
        return (1_000_003 * self.seed + k) % 2**63

    def by_client(self, samples: Tensor) -> tuple[Tensor, ...]:
        """Samples behind what the server sees, as the clients hold them."""
        return samples.chunk(self.sharing.clients)

    def message(self, x: Tensor, y: Tensor, **how: Any) -> Shared:
        """What the server sees: a client's, or the mean over clients of equal size (their sum for a summed loss)."""
        if not self.sharing.secure_aggregation:
            return self.client(x, y, **how)
        sent = [self.client(a, b, **how) for a, b in zip(self.by_client(x), self.by_client(y), strict=True)]
        total = {name: sum((s.gradient[name] for s in sent[1:]), sent[0].gradient[name]) for name in sent[0].gradient}
        factor = 1 / len(sent) if self.loss_fn.reduction == "mean" else 1.0
        n = sum(s.n for s in sent)
        labels = None if any(s.labels is None for s in sent) else sum(s.labels or 0 for s in sent)
        return Shared({name: g * factor for name, g in total.items()}, n, self.loss_fn, labels)

    def as_gradient(self, shared: Shared) -> Shared:
        """An update as what whole epochs are to first order in the learning rate: the mean, or sum, over batches."""
        local = self.sharing.local
        if local is None:
            return shared
        epochs = local.steps / math.ceil(self.sharing.held / self.sharing.batch_size)  # the last batch may be smaller
        factor = 1 / (local.steps if self.loss_fn.reduction == "mean" else epochs)
        return replace(shared, gradient={name: g * factor for name, g in shared.gradient.items()})

    def cohort(self, batches: list[tuple[Tensor, Tensor]]) -> Cohort:
        """Clients that send what the audited ones do, behind a secure sum."""
        defence = self.sharing.defence
        if defence is None:
            return Cohort(self.model, self.loss_fn, batches)

        def own(*args: Any) -> Shared:
            return self._first_of(defence)(*args)

        part: dict[str, Any] = {"local" if replaces_share(defence) else "send": own}
        return Cohort(self.model, self.loss_fn, batches, **part)

    def precise(self) -> tuple[nn.Module, torch.dtype]:
        """A copy of the model in which to search: float64 on a CPU, and float32 for half precision elsewhere."""
        p = next(self.model.parameters())
        wide = torch.float64 if p.device.type == "cpu" else torch.promote_types(p.dtype, torch.float32)
        return copy.deepcopy(self.model).to(wide), wide

    def readable(self, evaluating: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """A copy for individual gradients, in float32 where the model is shorter, and what makes its inputs so."""
        model = copy.deepcopy(self.model)
        if evaluating:
            model.eval()
        if next(model.parameters()).dtype.itemsize >= 4:
            return model, lambda x: x
        return model.float(), lambda x: x.float() if x.is_floating_point() else x

    def key(self) -> dict[str, Any]:
        """By which a record is known to be of the same audit."""
        parts = [*self.data.members, *(self.data.heldout or ())]
        parts += [] if self.data.auxiliary is None else [self.data.auxiliary]
        return {
            "model": fingerprint(self.model),
            "loss": repr(self.loss_fn),
            "data": digest(parts),
            "decode": name_of(self.data.decode),
            "sharing": self.sharing.words(),
            "budget": vars(self.budget),
            "seed": self.seed,
        }


def fingerprint(model: nn.Module) -> str:
    """A hash of architecture, mode, parameters and buffers.

    Args:
        model: any.

    Returns:
        SHA-256, hexadecimal.
    """
    state = model.state_dict()
    words = [repr(model), *(f"{k} {m.training}" for k, m in model.named_modules())]
    words += [f"{k} {p.requires_grad}" for k, p in model.named_parameters()]
    words += [f"{k} {v.dtype} {list(v.shape)}" for k, v in state.items() if isinstance(v, Tensor)]
    return digest([v for v in state.values() if isinstance(v, Tensor)], "\n".join(words))


def digest(tensors: list[Tensor], words: str = "") -> str:
    """A hash of what tensors hold.

    Args:
        tensors: any.
        words: hashed first.

    Returns:
        SHA-256, hexadecimal.
    """
    found = hashlib.sha256(words.encode())
    for t in tensors:
        found.update(f"{t.dtype}{list(t.shape)}".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
