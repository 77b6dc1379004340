"""The audit: sections one after the other, each written down as it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

import packext as px
from packext.audit.case import Case, Clock, Train, Utility
from packext.audit.closed import Closed, closed
from packext.audit.findings import Finding, findings
from packext.audit.inversion import Inversion, inversion
from packext.audit.labels import Labels, labels
from packext.audit.records import Epsilon, Membership, Records, epsilon, membership, records
from packext.audit.section import Section, plain, restored
from packext.audit.setting import Integrity, Setting, integrity, setting
from packext.audit.sharing import Budget, Sharing
from packext.audit.sweep import Sweep, sweep
from packext.audit.text import text

#: Of `audit.json`; another number says that names have changed.
SCHEMA = 1

#: Sections in their order, with their share of the time.
SECTIONS: dict[str, tuple[type[Section], float]] = {
    "setting": (Setting, 0.02),
    "integrity": (Integrity, 0.02),
    "closed": (Closed, 0.07),
    "labels": (Labels, 0.08),
    "inversion": (Inversion, 0.36),
    "records": (Records, 0.05),
    "membership": (Membership, 0.10),
    "epsilon": (Epsilon, 0.0),
    "sweep": (Sweep, 0.30),
}


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        setting: the threat model.
        integrity: whether the received model looks like a fishing model.
        closed: closed forms.
        labels: label leakage.
        inversion: reconstruction.
        records: individual gradients.
        membership: who was trained on.
        epsilon: claimed and measured.
        sweep: defences.
        findings: in plain words, the most severe first.
    """

    setting: Setting
    integrity: Integrity
    closed: Closed
    labels: Labels
    inversion: Inversion
    records: Records
    membership: Membership
    epsilon: Epsilon
    sweep: Sweep
    findings: list[Finding] = field(default_factory=list)

    @property
    def absent(self) -> dict[str, str]:
        """What was not measured, and why, by section and name."""
        return {f"{name}: {what}": why for name in SECTIONS for what, why in getattr(self, name).absent.items()}

    def to_json(self) -> dict[str, Any]:
        """The audit as JSON has it: `audit.json`."""
        sections = {name: plain(getattr(self, name)) for name in SECTIONS}
        return {"schema": SCHEMA, "findings": plain(self.findings), "sections": sections}

    def write(self, out: str | Path) -> Path:
        """Write `audit.json`, `audit.html` (one file that needs no network) and a PNG for each picture.

        Args:
            out: folder, which is created.

        Returns:
            The path of `audit.html`.
        """
        from packext.audit.report import write

        return write(self, Path(out))

    def __str__(self) -> str:  # noqa: D105
        return "\n\n".join(f"{f.severity.upper():8}{f}" for f in self.findings)


def run(
    model: nn.Module,
    loss_fn: nn.Module,
    data: Any,
    sharing: Sharing | None = None,
    *,
    budget: str | float | int | Budget = "quick",
    train: Train | None = None,
    utility: Utility | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Audit:
    """Measure what is given away by sharing gradients of a model.

    All in this process, on copies: model, gradients, buffers, hooks and torch's random numbers stay as they are.

    Args:
        model: as clients receive it, in the mode (`train` or `eval`) in which they run it.
        loss_fn: of the clients, a module with `reduction` "mean" or "sum".
        data: `(x, y)` of members, or a `Data` with held-out and auxiliary data as well.
        sharing: what leaves a client, and who sees it.
        budget: "quick", "full", a number of seconds, or a `Budget`.
        train: `train(x, y)` trains a model as this one was and returns it in `eval` mode, for LiRA.
        utility: `utility(share)` trains with a way to share, which is called as `packext.attacks.share` is, and returns
            the accuracy, from 0 to 1, for the sweep over defences.
        out: folder for what `Audit.write` writes. Sections are kept there as they end, and a second run with the same
            model, data and settings goes on after the last.
        fresh: starts anew in a folder that holds another audit, which is removed.
        seed: of batches and searches.
        progress: called with the section's name and the share of the whole audit that is done.

    Returns:
        All sections, and what they mean.

    A budget that is none is refused with a ValueError; a model, data and sharing that do not fit each other, and a
    folder that holds an audit of something else, with a PackextError; and `out` without matplotlib with an ImportError.
    """
    case = Case(model, loss_fn, data, Sharing() if sharing is None else sharing, Budget.of(budget), seed)
    made_with = {"packext": px.__version__, "train": train is not None, "utility": utility is not None}
    store = None if out is None else _Store(Path(out), case.key() | made_with, fresh)
    if out is not None:
        from packext.audit import report  # noqa: F401 - what is missing is said before the work
    makers: dict[str, Callable[[Case, Clock], Section]] = {
        "setting": setting,
        "integrity": integrity,
        "closed": closed,
        "labels": labels,
        "inversion": inversion if case.continuous else text,
        "records": records,
        "membership": lambda case, clock: membership(case, clock, train),
        "epsilon": epsilon,
        "sweep": lambda case, clock: sweep(case, clock, utility),
    }
    made: dict[str, Any] = {}
    before, devices = 0.0, [case.x.device] if case.x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for k, (name, (kind, share)) in enumerate(SECTIONS.items()):
            case.begin(k)
            done = store.read(name, kind) if store else None
            if done is None:
                tell = _teller(progress, name, before, share)
                tell(0.0)
                start = perf_counter()
                done = makers[name](case, Clock(share * case.budget.seconds, tell))
                done.seconds = perf_counter() - start
                if store:
                    store.write(name, done)
            made[name] = done
            before += share
    audit = Audit(**made)
    audit.findings = findings(audit)
    if progress is not None:
        progress("done", 1.0)
    if out is not None:
        audit.write(out)
    return audit


def _teller(
    progress: Callable[[str, float], None] | None, name: str, before: float, share: float
) -> Callable[[float], None]:
    def tell(done: float) -> None:
        if progress is not None:
            progress(name, min(1.0, before + share * min(1.0, done)))

    return tell


class _Store:
    """Sections on disk, under a key that says of what audit they are."""

    def __init__(self, out: Path, key: dict[str, Any], fresh: bool) -> None:
        self.path = out / "audit-sections"
        text = json.dumps(plain(key), indent=1, default=str)
        file = self.path / "key.json"
        if fresh and file.exists():  # nothing that this package has not written
            shutil.rmtree(self.path)
        if file.exists() and file.read_text("utf-8") != text:
            old = json.loads(file.read_text("utf-8"))
            changed = [k for k, v in json.loads(text).items() if old.get(k) != v]
            raise px.PackextError(
                f"{out} holds an audit of something else: {', '.join(changed)} differ. Take another folder, or start "
                "anew with fresh=True (--fresh on the command line), which removes it."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        _whole(file, text)

    def read(self, name: str, kind: type[Section]) -> Section | None:
        """A section that has ended, or None."""
        file = self.path / f"{name}.json"
        if not file.exists():
            return None
        section = restored(kind, json.loads(file.read_text("utf-8")))
        arrays = file.with_suffix(".npz")
        if arrays.exists():
            with np.load(arrays) as kept:
                section.arrays = {k: kept[k] for k in kept.files}
        return section

    def write(self, name: str, section: Section) -> None:
        """Keep a section; the JSON last, by which it is known to be whole."""
        file = self.path / f"{name}.json"
        if section.arrays:
            # To NumPy 2.1 and older, allow_pickle=False would be one more array.
            np.savez_compressed(file.with_suffix(".npz"), **section.arrays)  # pyright: ignore[reportArgumentType]
        _whole(file, json.dumps(plain(section), allow_nan=False))


def _whole(file: Path, text: str) -> None:
    """Write a file so that a process that is killed leaves the old one, or none, and never half of it."""
    part = file.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(file)
