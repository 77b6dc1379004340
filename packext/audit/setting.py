"""The threat model: what the audit's numbers are numbers of. And whether the model itself is what it should be."""

from __future__ import annotations

import copy
import math
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import SecureAggregationLabels
from packext.audit.case import Case, Clock, fingerprint
from packext.audit.section import Section
from packext.defences import check_received


@dataclass(kw_only=True)
class Setting(Section):
    """What was audited.

    Attributes:
        shared: in words.
        server: in words.
        sharing: as given.
        behind: samples behind what the server sees of one round.
        model: class of the model.
        architecture: as torch prints it.
        fingerprint: SHA-256 of architecture, mode, parameters and buffers.
        parameters: how many are trained.
        batchnorm: "none", "evaluation" or "training" (then samples of a batch influence each other).
        mode: "train" or "eval".
        dtype: of the parameters.
        loss_fn: as torch prints it.
        members: how many.
        heldout: how many.
        training_stage: loss and accuracy now, of members and others, in evaluation mode.
        versions: of Python, torch and packext.
        date: when, UTC.
    """

    shared: str = ""
    server: str = ""
    sharing: dict[str, Any] = field(default_factory=dict)
    behind: int = 0
    model: str = ""
    architecture: str = ""
    fingerprint: str = ""
    parameters: int = 0
    batchnorm: str = "none"
    mode: str = "eval"
    dtype: str = ""
    loss_fn: str = ""
    members: int = 0
    heldout: int = 0
    training_stage: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""


def setting(case: Case, clock: Clock) -> Setting:
    """Say what is audited.

    Args:
        case: model, data and sharing.
        clock: of the section.

    Returns:
        The threat model block.
    """
    s, model = case.sharing, case.model
    if s.what == "gradient":
        shared = f"the gradient of one batch of {s.batch_size}"
    else:
        shared = f"the update by {s.local_steps} local steps (lr {s.lr:g}) on {s.held} samples, {s.batch_size} a step"
    if s.defence is not None:
        shared += f", defended by {case.sharing.words()['defence']}"
    seen = f"the mean over {s.clients} clients alone" if s.secure_aggregation else "what each client sends"
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    training = any(m.training or not m.track_running_stats for m in norms)
    found = Setting(
        shared=shared,
        server=f"{s.server}; sees {seen}",
        sharing=s.words(),
        behind=s.behind,
        model=type(model).__name__,
        architecture=repr(model),
        fingerprint=fingerprint(model),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        batchnorm="none" if not norms else "training" if training else "evaluation",
        mode="train" if model.training else "eval",
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        loss_fn=repr(case.loss_fn),
        members=len(case.x),
        heldout=len(case.held[0]) if case.held else 0,
        versions={"python": platform.python_version(), "torch": str(torch.__version__), "packext": px.__version__},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    for name, pair in (("members", (case.x, case.y)), ("others", case.held)):
        if pair is None:
            found.absent["loss of others"] = "no data were held out"
            continue
        with found.unless_refused(f"loss of {name}"):
            loss, accuracy = _now(case, *pair)
            found.training_stage[f"loss of {name}"] = loss
            if accuracy is not None:
                found.training_stage[f"accuracy of {name}"] = accuracy
    return found


def _now(case: Case, x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """Mean loss, and the accuracy of a classifier; a loss that is not finite is refused."""
    model, loss_fn = copy.deepcopy(case.model).eval(), copy.deepcopy(case.loss_fn)
    total, whole, right = 0.0, 0.0, 0
    classifier = isinstance(loss_fn, nn.CrossEntropyLoss) and not y.is_floating_point() and y.dim() == 1
    with torch.no_grad():
        for a, b in zip(x.split(256), y.split(256), strict=True):
            output = model(a)
            part = _divisor(loss_fn, b)
            if part:  # not of samples all of which are ignored
                total += float(loss_fn(output, b)) * (part if loss_fn.reduction == "mean" else 1)
            whole += part if loss_fn.reduction == "mean" else len(b)
            right += int((output.argmax(1) == b).sum()) if classifier else 0
    if not math.isfinite(total) or not whole:
        raise px.PackextError(f"their mean loss is {total}.")
    return total / whole, right / len(x) if classifier else None


def _divisor(loss_fn: nn.Module, y: Tensor) -> float:
    """What a mean is over: samples, or of classes the weights of those that are not ignored."""
    if not isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)) or y.is_floating_point():
        return float(len(y))
    counted = y[y != loss_fn.ignore_index]
    return float(len(counted) if loss_fn.weight is None else loss_fn.weight[counted].double().sum())


@dataclass(kw_only=True)
class Integrity(Section):
    """Whether the model that clients received bears the traces of one that is made for fishing.

    Attributes:
        feature_variance: of the last layer's input over a batch, relative to its mean square.
        rank_ratio: second singular value of the last layer's gradient over the first.
        without_gradient: parameters whose gradient is exactly zero.
        zero_scales: normalisation layers whose scale is zero.
        reasons: what speaks for a fishing model.
        samples: that were looked at.
    """

    feature_variance: float | None = None
    rank_ratio: float | None = None
    without_gradient: list[str] = field(default_factory=list)
    zero_scales: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    samples: int = 0


def integrity(case: Case, clock: Clock) -> Integrity:
    """Look for traces of a fishing model.

    Args:
        case: model, data and sharing.
        clock: of the section.

    Returns:
        What `packext.defences.check_received` says of 64 members.
    """
    found = Integrity(threats={"a fishing model": SecureAggregationLabels.threat})
    index = case.draw(0, min(64, len(case.x)))
    with found.unless_refused("traces of a fishing model"):
        seen = check_received(case.model, case.loss_fn, case.x[index], case.y[index])
        found.feature_variance, found.rank_ratio = seen.feature_variance, seen.rank_ratio
        found.without_gradient, found.zero_scales = list(seen.without_gradient), list(seen.zero_scales)
        found.reasons, found.samples = list(seen.reasons), len(index)
    return found
