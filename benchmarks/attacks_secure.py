"""Labels through defences and through Flower's SecAgg+: ``python -m benchmarks.attacks_secure`` (packext[flower])."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.attacks import cells, cifar_nets, drawn, put, save, spread
from packext import attacks, defences
from packext.attacks import SecureAggregationLabels

RESULTS = Path(__file__).parent / "results" / "attacks-secure.json"
TITLES = {"flower": "clients, shift", "defended": "what clients do"}


def exact(clients: int, attack: SecureAggregationLabels, seeds: int = 3, flower: bool = False, **cohort: Any) -> dict:
    """Share of the clients whose counts are all exact, by network in evaluation mode, frozen but for its last layer."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, model in cifar_nets().items():
            batches, loss = drawn(clients), nn.CrossEntropyLoss()
            model.requires_grad_(False)[-1].requires_grad_()
            sizes = [len(y) for _, y in batches]
            if flower:
                from packext.attacks.flower import SecAggPlus

                cohort = {"sum": SecAggPlus(sizes, seed=seed)}
            group = attacks.Cohort(model.eval(), loss, batches, weighted=not flower, **cohort)
            plan = attack.plan(model, torch.rand(4, 3, 32, 32), clients)
            counts, _ = attack.counts(plan, group.round(plan.states), sizes, loss, weighted=True)
            true = torch.stack([torch.bincount(y, minlength=100) for _, y in batches])
            found.setdefault(name, []).append(float((counts == true).all(1).double().mean()))
    return {"cells": {name: spread(values) for name, values in found.items()}}


def defended() -> dict[str, Callable[[], dict]]:
    """Rows of the table of defences, 8 clients each."""
    strong, small = SecureAggregationLabels(), SecureAggregationLabels(magnitude=3.0)
    aware = SecureAggregationLabels(magnitude=3.0, clip=1.0)
    return {
        "pruning 90 %": lambda: exact(8, strong, send=defences.Pruning(0.9)),
        "int8": lambda: exact(8, strong, send=defences.Quantisation("int8")),
        "clipping to 1, which the server ignores": lambda: exact(8, small, local=defences.Clipped(1.0)),
        "clipping to 1, which the server knows": lambda: exact(8, aware, local=defences.Clipped(1.0)),
        "the same, noise of 0.01": lambda: exact(8, aware, local=defences.Clipped(1.0, 0.01, seed=0)),
        "the same, noise of 1": lambda: exact(8, aware, local=defences.Clipped(1.0, 1.0, seed=0)),
    }


def flower() -> dict[str, Callable[[], dict]]:
    """Rows of the table of SecAgg+, with its default ranges."""
    import flwr  # sets its level

    logging.getLogger(flwr.__name__).setLevel(logging.WARNING)
    return {
        f"{clients}, {shift:g}": lambda clients=clients, shift=shift: exact(
            clients, SecureAggregationLabels(magnitude=shift), flower=True
        )
        for clients in (8, 32)
        for shift in (10.0, 100.0, 1000.0)
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks_secure", description=__doc__)
    parser.add_argument("--only", choices=list(TITLES), nargs="+", default=list(TITLES), help="some of the tables")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    console = Console()
    rows = {"flower": flower, "defended": defended}
    for key in parser.parse_args().only:
        results[key] = {}
        for name, row in rows[key]().items():
            results[key][name] = row()
            console.print(cells({name: results[key][name]}, key)[-1], highlight=False)
            save(RESULTS, results)
        put(key, cells(results[key], TITLES[key]))


if __name__ == "__main__":
    main()
