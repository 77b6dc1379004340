"""Merging by samples through hivemind: with a stand-in for its averager, and with itself where it is installed."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import packext as px
from packext.optim.distributed import Gathered, Swarm

LIKE = {"b": torch.zeros(5), "a": torch.zeros(2, 3, dtype=torch.float64), "s": torch.zeros(())}


class Averager:
    """One peer that has another, which says `there`; `fail` changes what arrives."""

    there: Any = None
    fail: Any = None

    def __init__(self, tensors: list[Tensor], dht: Any, prefix: str, start: bool, **options: Any) -> None:
        self.tensors, self.down = tensors, False

    @contextmanager
    def get_tensors(self) -> Iterator[list[Tensor]]:
        yield self.tensors

    def step(self, gather: Any, timeout: float, allow_retries: bool) -> Any:
        assert not allow_retries
        if self.there is None:
            return None
        samples, sums, mark = self.there
        own = self.tensors[0].clone()
        other = torch.stack([sums, torch.full_like(sums, mark)], 1)
        self.tensors[0].copy_((own + other) / 2)
        if self.fail is not None:
            self.fail(self.tensors[0], own, other)
        return {"Qb": (samples, mark), "Qa": gather}

    def shutdown(self) -> None:
        self.down = True


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Swarm]:
    module = types.ModuleType("hivemind.averaging")
    module.DecentralizedAverager = Averager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hivemind", types.ModuleType("hivemind"))
    monkeypatch.setitem(sys.modules, "hivemind.averaging", module)
    with Swarm(LIKE, None, "run") as made:
        yield made
    assert made.averager.down


def sums(factor: float) -> dict[str, Tensor]:
    return {
        "s": torch.tensor(1.0),
        "b": torch.arange(5.0) * factor,
        "a": torch.full((2, 3), factor, dtype=torch.float64),
    }


def flat(given: dict[str, Tensor]) -> Tensor:
    return torch.cat([given[key].float().reshape(-1) for key in ("a", "b", "s")])


def expect(found: Gathered, samples: int, shares: list[int]) -> None:
    assert found.samples == samples and found.shares == shares
    for key, value in sums(3.0).items():
        expected = torch.tensor(2.0) if key == "s" else value
        torch.testing.assert_close(found.sums[key], expected)
        torch.testing.assert_close(found.mean(key), expected / samples)


def test_sums_and_samples_of_both(swarm: Swarm) -> None:
    swarm.averager.there = (3, flat(sums(2.0)), 0.25)
    expect(swarm.merge(1, sums(1.0)), 4, [1, 3])


@pytest.mark.parametrize("mine", [1, 3])
def test_a_peer_that_fails_on_the_way_is_noticed(swarm: Swarm, mine: int) -> None:
    def own_part(held: Tensor, own: Tensor, other: Tensor) -> None:
        held[7:9] = own[7:9]

    def without_sender(held: Tensor, own: Tensor, other: Tensor) -> None:
        held[-1] = other[-1]

    for fail in (own_part, without_sender):
        swarm.averager.there, swarm.averager.fail = (3, flat(sums(2.0)), 0.25), fail
        with pytest.raises(px.PackextError, match="a peer failed during the merge"):
            swarm.merge(mine, sums(1.0))


def test_wrong_inputs(swarm: Swarm) -> None:
    with pytest.raises(px.PackextError, match=r"no peers were found within 60\.0 s"):
        swarm.merge(1, sums(1.0))
    with pytest.raises(px.PackextError, match="a sum is not finite in float32, and nothing was sent"):
        swarm.merge(1, sums(float("inf")))
    for samples, given in ((0, sums(1.0)), (1, {"a": torch.zeros(2, 3)}), (1, {**sums(1.0), "b": torch.zeros(4)})):
        with pytest.raises(ValueError, match="need samples and sums of"):
            swarm.merge(samples, given)


def test_without_hivemind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hivemind.averaging", None)
    with pytest.raises(ImportError, match=r"pip install 'packext\[hivemind\]'"):
        Swarm(LIKE, None, "run")


def test_with_hivemind() -> None:
    hivemind = pytest.importorskip("hivemind")
    first = hivemind.DHT(start=True)
    tables = [first, hivemind.DHT(initial_peers=first.get_visible_maddrs(), start=True)]
    options = {"target_group_size": 2, "min_matchmaking_time": 2.0, "request_timeout": 1.0}
    peers = [Swarm(LIKE, table, "run", **options) for table in tables]
    found: list[Any] = [None, None]

    def merge(k: int) -> None:
        found[k] = peers[k].merge((1, 3)[k], sums((1.0, 2.0)[k]))

    threads = [threading.Thread(target=merge, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        expect(each, 4, each.shares)
        assert sorted(each.shares) == [1, 3]
    with pytest.raises(px.PackextError, match="no merge within 3 s, because of Allreduce"):
        peers[0].merge(1, sums(1.0), timeout=3)
    for peer, table in zip(peers, tables, strict=True):
        peer.averager.shutdown()
        table.shutdown()
