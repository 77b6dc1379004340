"""Under FSDP, with parameters in shards, quantities of all ranks' samples are those of one process."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import packext as px
from tests.test_union import N, problem, together

#: Which modules are sharded by themselves; what is left is sharded with the model.
LEAVES = (0, 2, 4, 6)


def sharded(extend_first: bool) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model, loss, x, y = problem()
    if not extend_first:
        px.unextend(model)
    for k in LEAVES:
        fully_shard(model[k])
    fully_shard(model)
    return model if extend_first else px.extend(model), loss, x, y


def asked() -> list[Any]:
    return [
        px.BatchGrad(), px.BatchL2Grad(), px.Variance(), px.ProjectedGrad((2, 3)), px.ClippedGrad(0.3),
        px.DiagGGNExact(), px.KFLR(),
    ]  # fmt: skip


def _all(rank: int, world: int) -> None:
    whole, loss, x, y = problem()
    with px.backpack(*asked(), scale="sample") as plain:
        loss(whole(x), y).backward()
    mine = slice(0, N // 2) if rank == 0 else slice(N // 2, N)
    for extend_first in (True, False):
        model, loss, x, y = sharded(extend_first)
        for _ in range(2 if extend_first else 1):  # with the probe, and without
            with px.backpack(*asked(), scale="sample", group=dist.group.WORLD) as united:
                loss(model(x[mine]), y[mine]).backward()
        assert list(united) == list(plain)
        torch.testing.assert_close(united.grad_projected, plain.grad_projected)
        for name in plain:
            for q in asked():
                got, want = getattr(united[name], q.savefield), getattr(plain[name], q.savefield)
                torch.testing.assert_close(got, want, msg=lambda text, n=name, q=q: f"{n} {q.savefield}: {text}")
        torch.testing.assert_close(united.batch_l2, plain.batch_l2)
        if not extend_first:
            continue
        halves = (slice(0, 2), slice(2, N // 2)), (slice(N // 2, N // 2 + 2), slice(N // 2 + 2, N))
        with px.backpack(px.BatchL2Grad(), px.Variance(), scale="sample", group=dist.group.WORLD, accumulate=True) as r:
            for part in halves[rank]:
                loss(model(x[part]), y[part]).backward()
        order = torch.cat([torch.arange(N)[part] for rows in halves for part in rows])
        torch.testing.assert_close(r.batch_l2, plain.batch_l2[order])
        for name in plain:
            torch.testing.assert_close(r[name].variance, plain[name].variance)


def _refused(rank: int, world: int) -> None:
    """FSDP2 hooks the gradient between modules by a function that torch differentiates once: no Hessian's diagonal."""
    model, loss, x, y = sharded(True)
    with (
        pytest.raises(px.UnsupportedUseError, match="DiagHessian.*Take DistributedDataParallel"),
        px.backpack(px.DiagHessian(), scale="sample", group=dist.group.WORLD),
    ):
        loss(model(x[:5]), y[:5]).backward()
    for p in model.parameters():
        assert not hasattr(p, "diag_h") and p.grad is None


def _uneven(rank: int, world: int) -> None:
    """Ranks with other numbers of samples, one of them with a single one, make as many passes for the probe."""
    whole, loss, x, y = problem()
    with px.backpack(px.BatchGrad(), px.Variance(), scale="sample") as plain:
        loss(whole(x), y).backward()
    for first in (8, 1, N - 1):
        model, loss, x, y = sharded(True)
        mine = slice(0, first) if rank == 0 else slice(first, N)
        for _ in range(3):  # FSDP2's own first forward pass runs other functions than those after it
            with px.backpack(px.BatchGrad(), px.Variance(), scale="sample", group=dist.group.WORLD) as united:
                loss(model(x[mine]), y[mine]).backward()
            for name in plain:
                torch.testing.assert_close(united[name].grad_batch, plain[name].grad_batch)
                torch.testing.assert_close(united[name].variance, plain[name].variance)
    part, match = ((x[:0], "batch is empty"), (x[:3], r"have \[0, 3\] samples"))[rank]
    model, loss, *_ = sharded(True)
    with pytest.raises(px.PackextError, match=match), px.backpack(px.BatchGrad(), scale="sample"):
        loss(model(part), y[: len(part)]).backward()


class Couples(nn.Sequential):
    """What a sample gives depends on the others, where there are any."""

    def forward(self, x: Tensor) -> Tensor:
        h = self[0](x)
        return self[1](h - h.mean(0))


def _coupled(rank: int, world: int) -> None:
    """Found on one rank, it is refused on all, and none waits."""
    torch.manual_seed(0)
    for sizes in ((1, 6), (3, 6)):
        model = px.extend(fully_shard(Couples(nn.Linear(4, 5), nn.Linear(5, 3))))
        with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad(), scale="sample"):
            loss = px.extend(nn.CrossEntropyLoss())
            loss(model(torch.randn(sizes[rank], 4)), torch.ones(sizes[rank]).long()).backward()


def _lengths(rank: int, world: int) -> None:
    """Sequences of other lengths on other ranks: drawn targets take as many passes, exact roots are refused on all."""
    loss, x = px.extend(nn.MSELoss()), torch.randn(2, 3 + rank, 4)
    model = px.extend(fully_shard(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))))
    for quantity in (px.KFLR(), px.DiagGGNMC(), px.DiagGGNExact()):
        drawn = isinstance(quantity, px.DiagGGNMC)
        refused = pytest.raises(px.PackextError, match=r"outputs have \[\[9\], \[12\]\] entries.*Pad batches")
        with nullcontext() if drawn else refused, px.backpack(quantity, scale="sample"):
            loss(model(x), torch.zeros(2, 3 + rank, 3)).backward()


class Scaled(nn.Module):
    """A parameter of the model itself beside a layer; of an elementwise product torch does not ask for its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.loss = nn.Linear(8, 3), nn.Parameter(torch.randn(3)), nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        z = self.layer(x.flatten(1)) * self.scale
        return z if y is None else self.loss(z, y)


def _resharded(rank: int, world: int) -> None:
    """What is sharded with the model alone is gathered for passes from a loss, outside of the model or in it."""
    curved = [px.DiagGGNExact(), px.KFLR(), px.Variance()]
    _, loss, x, y = problem()
    for inside, extend_first, apart in itertools.product((False, True), repeat=3):
        torch.manual_seed(0)
        model = Scaled()
        whole = px.extend(copy.deepcopy(model))
        if extend_first:
            px.extend(model)
        if apart:
            fully_shard(model.layer)
        fully_shard(model, reshard_after_forward=True)
        if not extend_first:
            px.extend(model)
        found = []
        for m in (whole, model, model):  # the last without the probe
            m.zero_grad()
            with px.backpack(*curved, scale="sample") as results:
                (m(x, y) if inside else loss(m(x), y)).backward()
            found.append({n: [getattr(results[n], q.savefield) for q in curved] for n in results})
        torch.testing.assert_close(found[1], found[0])
        torch.testing.assert_close(found[2], found[0])
        for p, want in zip(model.parameters(), whole.parameters(), strict=True):
            grad: Any = p.grad
            torch.testing.assert_close(grad.full_tensor(), want.grad)
    for quantity in (px.HessianTrace(), px.DiagHessian(), px.HMP()):
        with pytest.raises(px.UnsupportedUseError, match=f"{type(quantity).__name__}.*Take DistributedDataParallel"):
            with px.backpack(quantity):
                loss(model(x), y).backward()


def _around(rank: int, world: int) -> None:
    """What is sharded with a module around the extended one is there when the gradient arrives, and not before."""
    _, loss, x, y = problem()
    part = px.extend(Scaled())
    model = nn.Sequential(part, nn.Tanh())
    fully_shard(model, reshard_after_forward=True)
    for _ in range(2):
        with px.backpack(px.Variance()) as results:
            loss(model(x), y).backward()
        assert "scale" in results
    with pytest.raises(px.UnsupportedUseError, match="layer.weight.*a module around the extended one"):
        with px.backpack(px.DiagGGNExact()):
            loss(model(x), y).backward()


# -- FullyShardedDataParallel, with parameters that are views of a flat one ------------------------------------------


def flat(module: nn.Module, whole: bool = True, orig: bool = True) -> nn.Module:
    """Wrapped as one, or layer by layer as well; with parameters as the module has them, or all in one."""
    policy = None if whole else ModuleWrapPolicy({nn.Linear, nn.Conv1d})
    place = torch.device("cpu")
    return FullyShardedDataParallel(module, auto_wrap_policy=policy, device_id=place, use_orig_params=orig)


def _flat(rank: int, world: int) -> None:
    """First-order quantities, by name: of as many samples on each rank, and of more on one."""
    first = [*asked()[:5], px.SumGradSquared()]
    whole, loss, x, y = problem()
    with px.backpack(*first, scale="sample") as plain:
        loss(whole(x), y).backward()
    for as_one in (True, False):
        for cut in (N // 2, N // 2 + 1, 1):  # with one sample, only the other rank looks at samples
            mine = slice(0, cut) if rank == 0 else slice(cut, N)
            model, loss, x, y = problem()
            model = flat(model, as_one)
            for _ in range(2):  # with the probe, and without
                model.zero_grad()
                with px.backpack(*first, scale="sample", group=dist.group.WORLD) as united:
                    loss(model(x[mine]), y[mine]).backward()
            assert list(united) == list(plain)
            torch.testing.assert_close(united.batch_l2, plain.batch_l2)
            torch.testing.assert_close(united.grad_projected, plain.grad_projected)
            for name in plain:
                for q in first:
                    torch.testing.assert_close(getattr(united[name], q.savefield), getattr(plain[name], q.savefield))
            if cut == N // 2:
                with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                    found = {n.replace("_fsdp_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}
                    for name, p in whole.named_parameters():
                        torch.testing.assert_close(found[name], p.grad)


def _flat_refused(rank: int, world: int) -> None:
    """More passes, tensors that the user holds, and other ways to wrap; the plain pass after it is as ever."""
    extended, loss, x, y = problem()
    plain = px.unextend(problem()[0])
    assert isinstance(plain, nn.Sequential)
    part = nn.Sequential(flat(plain[:4]), *plain[4:])
    for model, told, options in (
        (flat(extended), "carry curvature .KFAC", {"asked": px.KFAC()}),
        (flat(problem()[0], whole=False), "carry curvature .HessianTrace", {"asked": px.HessianTrace()}),
        (flat(problem()[0]), "read results by name", {"extension_hook": print}),
        (flat(problem()[0]), "read results by name", {"parameters": list(problem()[0].parameters())}),
        (flat(problem()[0], orig=False), "Extend the module first .* use_orig_params=True", {}),
        (px.extend(flat(px.unextend(problem()[0]))), "Extend the module first", {}),
        (px.extend(part), "Extend the module first", {}),
    ):
        quantity: Any = options.pop("asked", px.BatchL2Grad())
        with pytest.raises(px.UnsupportedUseError, match=told), px.backpack(quantity, **options):
            loss(model(x), y).backward()
        if told.endswith("use_orig_params=True"):
            continue  # after an error in a backward pass, gradients of one flat parameter are lost, in torch as well
        loss(model(x), y).backward()
        assert any(p.grad is not None and p.grad.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "work", [_all, _refused, _resharded, _around, _uneven, _coupled, _lengths, _flat, _flat_refused]
)
def test_sharded_parameters(work: Any) -> None:
    together(work)
