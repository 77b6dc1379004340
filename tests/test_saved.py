"""What is kept from the forward pass to the backward pass: as little as without packext, where it is told to be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import packext as px

WIDTH, N, DEPTH = 16, 128, 6


class Live(TorchDispatchMode):
    """Bytes of results of torch's operations that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self.seen = {key: entry for key, entry in self.seen.items() if not entry[0].expired()}
        return sum(size for _, size in self.seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        storages = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)]
        known = {key for key, (ref, _) in self.seen.items() if not ref.expired()}  # addresses are used again
        fresh = {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in storages if s._cdata not in known}
        if fresh:
            self.seen.update(fresh)
            self.peak = max(self.peak, self.now())
        return out


class Deep(nn.Module):
    def __init__(self, save: bool, reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(DEPTH)
        )
        self.head, self.save, self.reentrant = nn.Linear(WIDTH, 3), save, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=self.reentrant) if self.save else block(x))
        return self.head(x)


def measure(
    save: bool, packed: Callable[[], AbstractContextManager[Any]], *quantities: Any, reentrant: bool = False
) -> tuple[int, int, Any]:
    """Bytes after the forward pass, at most in a step after the first, and results."""
    torch.manual_seed(0)
    model, loss_fn = Deep(save, reentrant).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(N, WIDTH).double().requires_grad_(save), torch.randint(3, (N,))
    if quantities:
        px.extend(model), px.extend(loss_fn)
    for count in (False, True):  # the first step of a structure probes it
        model.zero_grad()
        live = Live()
        with live if count else nullcontext(), px.backpack(*quantities, scale="sample") as results:
            with packed():
                loss = loss_fn(model(x), y)
            after = live.now()
            loss.backward()
    return after, live.peak, results


QUANTITIES = (px.BatchL2Grad(), px.DiagGGNExact())


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_saves(reentrant: bool) -> None:
    """Within a twentieth of what it saves without packext, in the forward pass; and at the peak as much in bytes."""
    plain, peak, _ = measure(False, nullcontext)
    saving, low, _ = measure(True, nullcontext, reentrant=reentrant)
    ours, ours_peak, want = measure(False, nullcontext, *QUANTITIES)
    kept, kept_peak, got = measure(True, nullcontext, *QUANTITIES, reentrant=reentrant)
    assert saving < 0.2 * plain
    assert kept < 1.05 * saving + 0.01 * plain
    assert ours_peak - kept_peak > 0.9 * (peak - low)
    for name, r in want.items():
        torch.testing.assert_close(got[name].batch_l2, r.batch_l2, rtol=1e-10, atol=0)
        torch.testing.assert_close(got[name].diag_ggn_exact, r.diag_ggn_exact, rtol=1e-10, atol=1e-14)


class Store:
    """Somewhere else: saved tensors are given away, and come back as copies."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def pack(self, t: Tensor) -> int:
        self.held.append((t.detach().numpy().copy(), isinstance(t, nn.Parameter), t))
        if not isinstance(t, nn.Parameter):
            self.held[-1] = (*self.held[-1][:2], None)
        return len(self.held) - 1

    def unpack(self, key: int) -> Tensor:
        array, parameter, t = self.held[key]
        return t if parameter else torch.from_numpy(array.copy())


@pytest.mark.parametrize("how", ["own hooks", "save_on_cpu"])
def test_offloading(how: str) -> None:
    """Nothing of the forward pass stays in memory that was given away, and the results are the same."""
    store = Store()

    def away() -> AbstractContextManager[Any]:
        if how == "save_on_cpu":
            return torch.autograd.graph.save_on_cpu()
        return torch.autograd.graph.saved_tensors_hooks(store.pack, store.unpack)

    _, _, want = measure(False, nullcontext, *QUANTITIES)
    plain, _, _ = measure(False, away)
    kept, _, got = measure(False, away, *QUANTITIES)
    assert kept < 1.05 * plain + N * WIDTH * 8
    for name, r in want.items():
        torch.testing.assert_close(got[name].batch_l2, r.batch_l2, rtol=1e-12, atol=0)
        torch.testing.assert_close(got[name].diag_ggn_exact, r.diag_ggn_exact, rtol=1e-12, atol=0)
