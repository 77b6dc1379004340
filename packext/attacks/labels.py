"""Label counts from one gradient: what the last layer tells of a batch's labels.

For cross-entropy the gradient at a sample's logits is `p - y`. Summed over a batch it is the bias's gradient, and
with the features e behind it the weight's: `db = sum (p_n - y_n)`, `dW = sum (p_n - y_n) e_nᵀ`. Each rule says how many
samples of each class there are; all read these two alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks._shared import Head, Shared, Threat, one_label_each, plain_cross_entropy, share


class LabelRule(ABC):
    """Base of the rules that read label counts off one gradient."""

    threat: ClassVar[Threat]

    def __call__(self, model: nn.Module, shared: Shared, head: str | None = None) -> Tensor:
        """Counts of the labels.

        Args:
            model: with the parameters at which the gradient was taken.
            shared: what the client sent.
            head: name of the last fully connected layer; by default the last `nn.Linear` among the modules.

        Returns:
            Counts `[C]`, int64, that sum to `shared.n`.

        Raises:
            PackextError: for another thing than what was shared, and for what labels cannot be read off.
        """
        if not isinstance(shared, Shared):
            raise px.PackextError(
                f"{type(self).__name__}()(model, shared) reads what attacks.share(model, loss_fn, x, y) returns, got a "
                f"{type(shared).__name__}."
            )
        plain_cross_entropy(shared.loss_fn)
        one_label_each(shared)
        found = Head.of(model, head)
        if head is None:
            _last(model, shared, found)
        return self.counts(model, shared, found)

    @abstractmethod
    def counts(self, model: nn.Module, shared: Shared, head: Head) -> Tensor:
        """Counts `[C]`, int64, once model, loss and layer are known to fit."""


@dataclass(frozen=True)
class IDLG(LabelRule):
    """The label of one sample: the only class whose bias gradient is negative.

    Without a bias, the class whose row of the weight's gradient is the longest: rows are `(p - y)_c e`, and the label's
    factor is as large as all others together. With two classes, or where all others but one are rounded to 0, two rows
    are as long; then it is the one with the least sum, for features that are not negative. Exact for one sample.

    - Formula: `argmin over c of db_c`; or `argmax over c of |dW_c|`, of rows as long the least `sum over d of dW_cd`
    - Cost: none beside the gradient that was shared
    - Source: Zhao, Mopuri & Bilen 2020
    - Refused: gradients of several samples; other losses than plain cross-entropy
    """

    threat = Threat(
        "one client's gradient of the last fully connected layer",
        "the model",
        "honest",
        "a batch of one sample; without a bias three classes or more, or features >= 0",
    )
    """Who attacks, and what must hold."""

    def counts(self, model: nn.Module, shared: Shared, head: Head) -> Tensor:
        """One sample's label."""
        if shared.n != 1:
            raise px.PackextError(
                f"iDLG reads the label of one sample; the gradient is of {shared.n}: use LLG or ILRG."
            )
        if head.bias is not None:
            read = head.bias_gradient(shared)
        else:
            rows = head.weight_gradient(shared)
            norms = rows.norm(dim=1)
            longest = norms >= (1 - 1e-4) * norms.max()  # or as long: its rounding tells nothing
            read = -norms if longest.sum() == 1 else rows.sum(1).where(longest, 0.0)
        _tells(head, read < 0)
        return torch.bincount(read.argmin()[None], minlength=len(head.weight))


@dataclass(frozen=True)
class Yin(LabelRule):
    """The N classes with the smallest entries in their rows of the weight's gradient.

    Knows no repeats: exact only where all labels differ, and for features that are not negative.

    - Formula: the N classes c with the least `min over d of dW_cd`
    - Cost: none beside the gradient that was shared
    - Source: Yin et al. 2021, GradInversion
    - Refused: more samples than classes; other losses than plain cross-entropy
    """

    threat = Threat(
        "one client's gradient of the last fully connected layer",
        "the model, the batch size",
        "honest",
        "no label twice; features >= 0",
    )
    """Who attacks, and what must hold."""

    def counts(self, model: nn.Module, shared: Shared, head: Head) -> Tensor:
        """At most one sample of each class."""
        c = len(head.weight)
        if shared.n > c:
            raise px.PackextError(
                f"Yin's rule knows no repeats; {shared.n} samples of {c} classes repeat: use LLG or ILRG."
            )
        least = head.weight_gradient(shared).amin(1)
        _tells(head, least < 0)
        return torch.bincount(least.argsort()[: shared.n], minlength=c)


@dataclass(frozen=True)
class LLG(LabelRule):
    """Label leakage from gradients: each sample lowers its class's row sum of the weight's gradient by an impact.

    The impact is taken to be the same for all samples. With s the row sums for the sum over samples, one sample is
    counted for each negative row sum, lowest first, and then one at a time where the sum is lowest; each raises the sum
    of its class by minus the impact.

    - Formula: impact `(1 + 1/C) / N` times the sum of the negative s_c, with `s_c = sum over d of dW_cd`
    - Cost: none beside the gradient that was shared
    - Source: Wainakh et al., PoPETs 2022
    - Refused: other losses than plain cross-entropy
    """

    threat = Threat(
        "one client's gradient of the last fully connected layer",
        "the batch size",
        "honest",
        "an untrained model; features >= 0",
    )
    """Who attacks, and what must hold."""

    def counts(self, model: nn.Module, shared: Shared, head: Head) -> Tensor:
        """One sample for each negative row sum, then one at a time where the sum is lowest."""
        sums = head.weight_gradient(shared).sum(1)
        _tells(head, sums < 0)
        impact = (1 + 1 / len(sums)) / shared.n * sums[sums < 0].sum()
        return emitted(sums, impact, torch.zeros_like(sums), shared.n)


@dataclass(frozen=True)
class LLGStar(LabelRule):
    """LLG*: impact and each class's offset from runs of the model on inputs of noise.

    For each class k and each run, a batch of N uniform inputs with the label k gives row sums s. Counts are then taken
    as by `LLG`, from row sums less the offset.

    - Formula: impact `(1 + 1/C) mean of s_k / N`; offset of a class c, mean of s_c over the batches of other labels
    - Cost: `C * runs` gradients of the attacker's own
    - Source: Wainakh et al., PoPETs 2022
    - Refused: other losses than plain cross-entropy

    Args:
        shape: of one input, without the batch axis.
        runs: batches of noise for each class.
        seed: of the noise.
    """

    shape: tuple[int, ...]
    runs: int = 10
    seed: int = 0

    threat = Threat(
        "one client's gradient of the last fully connected layer",
        "the model, the batch size, the input's shape",
        "honest",
        "an untrained model",
    )
    """Who attacks, and what must hold."""

    def counts(self, model: nn.Module, shared: Shared, head: Head) -> Tensor:
        """As LLG, with what the model itself says of a sample's impact."""
        n, c = shared.n, len(head.weight)
        sums = head.weight_gradient(shared).sum(1)
        _tells(head, sums < 0)
        generator = torch.Generator().manual_seed(self.seed)
        impact, offset = torch.zeros((), dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
        for k in range(c):
            for _ in range(self.runs):
                x = torch.rand(n, *self.shape, generator=generator).to(head.weight)
                noise = share(model, shared.loss_fn, x, torch.full((n,), k, device=x.device))
                own = head.weight_gradient(noise).sum(1).cpu()
                impact += own[k] / n / (c * self.runs)
                others = torch.arange(c) != k
                offset[others] += own[others] / ((c - 1) * self.runs)
        return emitted(sums, impact * (1 + 1 / c), offset.to(sums.device), n)


def _last(model: nn.Module, shared: Shared, head: Head) -> None:
    """Refuse a layer that makes no logits where another one does: there, what reaches the bias sums to 0 over classes.

    Noise and pruning leave no layer of which this can be said, and are not taken for another layer.

    Raises:
        PackextError: which names the other one.
    """

    def excess(name: str) -> float:
        g = shared.gradient.get(f"{name}.weight".removeprefix("."))
        return float(g.double().sum(0).norm() / g.double().norm()) if g is not None and g.any() else torch.inf

    if 1e-2 < excess(head.name) < torch.inf:
        others = [k for k, m in model.named_modules() if isinstance(m, nn.Linear) and excess(k) < 1e-4]
        if others:
            raise px.PackextError(
                f"{head.name!r} {list(head.weight.shape)} is the last nn.Linear that {type(model).__name__} was given, "
                f"but makes no logits: its gradient does not sum to 0 over outputs, as that of {', '.join(others)} "
                f"does. Say which layer is the last: head={others[-1]!r}."
            )


def _tells(head: Head, entries: Tensor) -> None:
    """Refuse a gradient that has none of the entries that a rule reads, such as one that is zero."""
    if not entries.any():
        raise px.PackextError(
            f"The gradient of {head.name!r} has no negative entry, as each label leaves one: it tells no labels. It is "
            "zero where the model is so sure of its samples that probabilities are rounded to 0 and 1."
        )


def emitted(sums: Tensor, impact: Any, offset: Tensor, n: int) -> Tensor:
    """The two stages of LLG.

    Args:
        sums: row sums of the weight's gradient `[C]`, for the sum over samples.
        impact: of one sample on its class's sum, negative.
        offset: of each class's sum without a sample of it `[C]`.
        n: samples to emit.

    Returns:
        Counts `[C]`.
    """
    left, counts = sums - offset, torch.zeros(len(sums), dtype=torch.int64, device=sums.device)
    for k in sums.argsort()[: int((sums < 0).sum())][:n].tolist():
        counts[k] += 1
        left[k] -= impact
    while int(counts.sum()) < n:
        k = int(left.argmin())
        counts[k] += 1
        left[k] -= impact
    return counts


@dataclass(frozen=True)
class ILRG(LabelRule):
    """Instance-wise batch label restoration: a linear system for the counts c.

    Row j of the weight's gradient over entry j of the bias's is taken for the features of class j, whose probabilities
    p_j follow from the layer. The solution is rounded to whole numbers that sum to N.

    - Formula: `sum_j c_j (p_j - y_j) = db` and `sum_j c_j = N` by least squares, y_j the unit vector of class j
    - Cost: a pseudo-inverse `[C + 1, C]`
    - Source: Ma et al., ICLR 2023
    - Refused: a layer without bias; other losses than plain cross-entropy
    """

    threat = Threat(
        "one client's gradient of the last fully connected layer",
        "the model, the batch size",
        "honest",
        "an untrained model; a bias; like features in a class",
    )
    """Who attacks, and what must hold."""

    def counts(self, model: nn.Module, shared: Shared, head: Head) -> Tensor:
        """The rounded solution."""
        db, dw = head.bias_gradient(shared), head.weight_gradient(shared)
        c = len(db)
        _tells(head, torch.cat([db[:, None], dw], 1) < 0)
        features = torch.where(db[:, None] != 0, dw / db[:, None], 0.0)
        logits = features @ head.weight.double().T + head.bias.double()  # type: ignore[union-attr]
        system = torch.cat([torch.ones(1, c).to(db), logits.softmax(1).T - torch.eye(c).to(db)])
        target = torch.cat([torch.tensor([float(shared.n)]).to(db), db])
        return rounded(torch.linalg.pinv(system) @ target, shared.n)


def identity(probabilities: Tensor, bias_gradient: Tensor) -> Tensor:
    """The counts themselves, from what no attacker has: `c = sum p_n - db`. The bound on all rules.

    Args:
        probabilities: of the model on the batch `[N, C]`.
        bias_gradient: of the last layer for the sum over samples `[C]`.

    Returns:
        Counts `[C]`, not rounded; their distance from whole numbers is rounding of the gradient.
    """
    return probabilities.double().sum(0) - bias_gradient.double()


def rounded(counts: Tensor, n: int) -> Tensor:
    """Whole numbers that sum to n, next to given ones: of largest remainders after what is negative was dropped."""
    left = counts.clamp_min(0)
    total = left.sum()
    left = left * (n / total) if total > 0 else torch.full_like(left, n / len(left))
    found = left.floor().long()
    missing = n - int(found.sum())
    found[(left - found).argsort(descending=True)[:missing]] += 1
    return found


def count_accuracy(found: Tensor, labels: Tensor) -> float:
    """Share of the samples whose label was counted: `1 - |c' - c|_1 / 2N`.

    Args:
        found: counts `[C]`.
        labels: the true ones `[N]`.

    Returns:
        Between 0 and 1.
    """
    true = torch.bincount(labels.cpu(), minlength=len(found))
    return 1 - float((found.cpu() - true).abs().sum()) / (2 * len(labels))


def guessed(labels: Tensor, classes: int, frequencies: Tensor | None = None) -> float:
    """`count_accuracy` of who knows N and how frequent classes are, and sees no gradient: what a rule must beat.

    Args:
        labels: the true ones `[N]`.
        classes: their number.
        frequencies: of the classes in the data, or counts `[C]`; all the same by default.

    Returns:
        Between 0 and 1.
    """
    known = torch.ones(classes) if frequencies is None else frequencies.cpu()
    return count_accuracy(rounded(known.double(), len(labels)), labels)
