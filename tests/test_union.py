"""Results of several passes, and of several ranks, are those of one pass with all samples."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import packext as px
from packext import linalg
from packext._quantity import Quantity
from tests.cases import Routed, Tied, TwoHeads
from tests.helpers import double_precision

pytestmark = pytest.mark.usefixtures("double")

N = 10
PARTS = (3, 5, 2)


def asked() -> list[Any]:
    return [
        px.BatchGrad(), px.BatchL2Grad(), px.SumGradSquared(), px.Variance(), px.ProjectedGrad((2, 3)),
        px.ClippedGrad(0.3), px.GradHistogram(range=(-0.5, 0.6)), px.DiagGGNExact(), px.BatchDiagGGNExact(),
        px.SqrtGGNExact(), px.DiagEF(), px.DiagHessian(), px.BatchDiagHessian(), px.KFLR(),
        px.KFAC(fisher="empirical", approx="reduce"),
    ]  # fmt: skip


def problem() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(9, 4), nn.Sigmoid(), nn.Linear(4, 3)
    )
    return px.extend(model), px.extend(nn.CrossEntropyLoss()), torch.randn(N, 2, 4), torch.randint(3, (N,))


def values(model: nn.Module, quantities: list[Any]) -> dict[str, list[Any]]:
    return {
        name: [getattr(p, q.savefield) for q in quantities if hasattr(p, q.savefield)]
        for name, p in model.named_parameters()
    }


def run(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, **options: Any) -> px.Results:
    with px.backpack(*asked(), **options) as results:
        loss(model(x), y).backward()
    return results


def in_parts(share: Callable[[int], float], **options: Any) -> tuple[nn.Module, px.Results]:
    model, loss, x, y = problem()
    with px.backpack(*asked(), accumulate=True, **options) as results:
        for inputs, targets in zip(x.split(PARTS), y.split(PARTS), strict=True):
            (loss(model(inputs), targets) * share(len(inputs))).backward()
    return model, results


# -- passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["loss", "sample", 3.0])
def test_passes_add_up_to_one(scale: Any) -> None:
    """Each part with its share of the mean: as written, the parts' losses add up to that of all."""
    whole, loss, x, y = problem()
    results = run(whole, loss, x, y, scale=scale)
    parts, united = in_parts(lambda n: n / N, scale=scale)
    torch.testing.assert_close(values(parts, asked()), values(whole, asked()))
    torch.testing.assert_close(united.batch_l2, results.batch_l2)
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_samples_own_losses_know_of_no_weight() -> None:
    """With scale "sample" it makes no difference what the loss is multiplied with before backward."""
    whole, loss, x, y = problem()
    run(whole, loss, x, y, scale="sample")
    parts, _ = in_parts(lambda n: 1024.0 / 3, scale="sample")
    torch.testing.assert_close(values(parts, asked()), values(whole, asked()))


def test_a_context_begins_anew() -> None:
    model, loss, x, y = problem()
    context = px.backpack(px.BatchL2Grad(), accumulate=True)
    for _ in range(2):
        with context as results:
            for half in (slice(0, 4), slice(4, N)):
                loss(model(x[half]), y[half]).backward()
        assert results.batch_l2.shape == (N,)


def test_parameters_that_some_passes_do_not_reach() -> None:
    torch.manual_seed(3)
    model, loss = px.extend(Routed(sort=False)), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 1, 4), torch.randint(3, (N,))
    quantities = [px.BatchGrad(), px.SumGradSquared(), px.Variance(), px.DiagGGNExact(), px.SqrtGGNExact()]
    found = []
    for parts in ((N,), (1, 1, N - 2)):
        with px.backpack(*quantities, accumulate=True, scale="sample"):
            for inputs, targets in zip(x.split(parts), y.split(parts), strict=True):
                loss(model(inputs), targets).backward()
        found.append(values(model, quantities))
    torch.testing.assert_close(*found)


def test_sums_of_many_passes_are_not_kept_in_half_precision() -> None:
    """In bfloat16, a sum that is 256 times as large as what is added stays where it is."""
    torch.manual_seed(0)
    model, x = px.extend(nn.Linear(4, 2).bfloat16()), torch.randn(1, 4).bfloat16()
    found = []
    for count in (1, 600):
        with px.backpack(px.ClippedGrad(0.01), accumulate=True, scale=1.0, attach=False) as results:
            for _ in range(count):
                model(x).float().square().sum().backward()
        found.append(results["weight"].clipped_grad)
    assert found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[1], 600 * found[0], rtol=0.01, atol=0.0)


@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_pooled_factors_are_means_over_all_samples(bias: str) -> None:
    """Also over those of a pass that did not reach the parameter, as in one pass with all."""
    torch.manual_seed(0)
    model, loss = px.extend(TwoHeads(), batch_axis=None), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    x, first = x[x[:, 0].argsort()], int((x[:, 0] <= 0).sum())
    asked = px.KFAC(approx="reduce", fisher="exact", bias=bias)
    found = []
    for parts in ([N], [2, N - 2], [first, N - first], [first, 1, N - first - 1]):
        with px.backpack(asked, accumulate=True, scale="sample", attach=False) as results:
            for inputs, targets in zip(x.split(parts), y.split(parts), strict=True):
                loss(model(inputs), targets).backward()
        found.append({name: r.kfac for name, r in results.items() if isinstance(r.kfac, list)})
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])
    h = torch.tanh(model.body(x[:first])).detach()
    h = torch.cat([h, torch.ones(first, 1)], 1) if bias == "joint" else h
    torch.testing.assert_close(found[0]["heads.0.weight"][1], h.T @ h / N)


class TiedBeside(nn.Module):
    """A table that is its own head, which a batch of ones leaves out, and an output of one feature."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(6, 4), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale(x) * torch.ones(6).to(x)
        return out if (x == 1).all() else out + self.table(x[:, 0].long()).tanh() @ self.table.weight.T


def test_factors_of_a_pass_that_leaves_a_parameter_out() -> None:
    """It has no terms in A and adds nothing to B, also where a weight meets data in both ways; others go on."""
    model, loss = px.extend(TiedBeside()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    y, without = torch.randint(6, (N,)), torch.ones(3, 2)
    reached = torch.stack([torch.randint(6, (N,)), torch.arange(N) + 2], 1).to(without)

    def factors(*batches: Tensor, asked: Any = None) -> dict[str, Any]:
        with px.backpack(asked or px.KFAC(fisher="exact"), accumulate=True, attach=False) as results:
            for x in batches:
                loss(model(x), y[: len(x)]).backward()
        return {name: result.ekfac if asked else result.kfac for name, result in results.items()}

    one, other = factors(reached), factors(without)
    for found in (factors(reached, without), factors(without, reached)):
        torch.testing.assert_close(found["table.weight"], one["table.weight"])
        b, a = found["scale.weight"]
        torch.testing.assert_close(b, one["scale.weight"][0] + other["scale.weight"][0])
        torch.testing.assert_close(a, (N * one["scale.weight"][1] + 3 * other["scale.weight"][1]) / (N + 3))
    corrected = px.EKFAC({name: linalg.KronEigh.of(held) for name, held in one.items()}, fisher="exact")
    want = factors(reached, asked=corrected)["table.weight"].eigenvalues
    for batches in ((reached, without), (without, reached)):
        torch.testing.assert_close(factors(*batches, asked=corrected)["table.weight"].eigenvalues, want)


def test_estimates_of_the_hessian() -> None:
    model, loss, x, y = problem()
    exact = [torch.autograd.functional.hessian(lambda v: loss_at(model, loss, v, x, y), flat(model)).trace() * N]
    with px.backpack(px.HessianTrace(400), px.DiagHessianMC(400), accumulate=True, scale="sample") as results:
        for inputs, targets in zip(x.split(PARTS), y.split(PARTS), strict=True):
            loss(model(inputs), targets).backward()
    value, error, _ = results.hessian_trace
    assert abs(value - exact[0]) < 5 * error and 0 < error < abs(exact[0])
    total = sum(p.diag_h_mc.value.sum() for p in model.parameters())
    bound = sum(p.diag_h_mc.standard_error.square().sum() for p in model.parameters()).sqrt()
    assert abs(total - exact[0]) < 5 * bound


def estimates() -> list[Any]:
    """The same draws each time that they are made."""
    return [kind(3, torch.Generator().manual_seed(1)) for kind in (px.HessianTrace, px.DiagHessianMC)]


def test_estimates_of_passes_add_up() -> None:
    """Draw by draw for the trace; errors of the diagonal are independent."""
    model, loss, x, y = problem()
    alone, asked_for = [], estimates()
    for inputs, targets in zip(x.split(PARTS), y.split(PARTS), strict=True):
        with px.backpack(*asked_for, scale="sample", attach=False) as results:
            loss(model(inputs), targets).backward()
        alone.append(results)
    with px.backpack(*estimates(), accumulate=True, scale="sample") as united:
        for inputs, targets in zip(x.split(PARTS), y.split(PARTS), strict=True):
            loss(model(inputs), targets).backward()
    for name in united:
        draws = torch.stack([r[name].hessian_trace.draws for r in alone]).sum(0)
        torch.testing.assert_close(united[name].hessian_trace, (draws.mean(), draws.std() / 3**0.5, draws))
        values, errors = map(torch.stack, zip(*[r[name].diag_h_mc for r in alone], strict=True))
        torch.testing.assert_close(united[name].diag_h_mc, (values.sum(0), errors.square().sum(0).sqrt()))


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def loss_at(model: nn.Module, loss: nn.Module, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    state, start = {}, 0
    for name, p in model.named_parameters():
        state[name], start = v[start : start + p.numel()].view_as(p), start + p.numel()
    with px.disable():
        return loss(torch.func.functional_call(model, state, (x,)), y)


def test_eigenvalues_in_a_basis() -> None:
    model, loss, x, y = problem()
    with px.backpack(px.EKFAC(fisher="exact", bias="joint")) as results:
        loss(model(x), y).backward()
    basis = {p: p.ekfac for p in model.parameters()}
    found = []
    for parts in ((N,), PARTS):
        with px.backpack(px.EKFAC(basis, fisher="exact", bias="joint"), accumulate=True, scale="sample"):
            for inputs, targets in zip(x.split(parts), y.split(parts), strict=True):
                loss(model(inputs), targets).backward()
        found.append([p.ekfac.eigenvalues for p in model.parameters() if isinstance(p.ekfac, linalg.KronEigh)])
    torch.testing.assert_close(*found)
    assert len(results) == len(basis)


@pytest.mark.parametrize(
    "quantity",
    [
        px.BatchDotGrad(), px.GradDot(), px.GGNGram(), px.TopEigenvalues(), px.HMP(), px.KFRA(), px.EKFAC(),
        px.BatchGrad(subsampling=[0]), px.SqrtGGNMC(subsampling=[0]),
    ],
    ids=repr,
)  # fmt: skip
def test_what_parts_do_not_tell_is_refused(quantity: Quantity) -> None:
    with pytest.raises(ValueError, match="several passes or ranks cannot be had from each by itself"):
        px.backpack(quantity, accumulate=True)


def test_hooks_would_see_what_is_not_complete() -> None:
    with pytest.raises(ValueError, match="extension_hook is called before"):
        px.backpack(px.BatchGrad(), accumulate=True, extension_hook=print)


def test_a_pass_that_fails_adds_nothing() -> None:
    model, loss, x, y = problem()
    with px.backpack(px.BatchL2Grad(), accumulate=True) as results:
        loss(model(x), y).backward()
        before = model[0].weight.batch_l2.clone()
        model[2].register_full_backward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss(model(x), y).backward()
        model[2]._backward_hooks.clear()
        torch.testing.assert_close(model[0].weight.batch_l2, before)
        loss(model(x), y).backward()
        assert results.batch_l2.shape == (2 * N,)


@pytest.mark.parametrize("first", ["graph", "no graph", "no formula"])
def test_derivatives_of_several_passes(first: str) -> None:
    """Those of all passes; what one has found without a graph is no constant in silence."""
    model, loss, x, y = problem()
    parameters, w = list(model.parameters()), model.get_parameter("0.weight")
    refused = {"graph": [], "no graph": ["sum_grad_squared", "diag_ggn_exact"], "no formula": ["diag_ggn_exact"]}[first]

    def one(criterion: nn.Module, some: slice, target: Tensor, graph: bool = True) -> None:
        torch.autograd.grad(criterion(model(x[some]), target) / 2, parameters, create_graph=graph)

    with px.backpack(px.SumGradSquared(), px.DiagGGNExact(), accumulate=True):
        if first == "no formula":
            one(px.extend(nn.SoftMarginLoss()), slice(5), torch.ones(5, 3))
        else:
            one(loss, slice(5), y[:5], graph=first == "graph")
        one(loss, slice(5, 10), y[5:])
    found = {field: getattr(w, field) for field in ("sum_grad_squared", "diag_ggn_exact")}
    with px.backpack(px.SumGradSquared(), px.DiagGGNExact()):
        torch.autograd.grad(loss(model(x), y), parameters, create_graph=True)
    for field, value in found.items():
        if field in refused:
            with pytest.raises(px.UnsupportedUseError, match="has no derivative.*accumulate=True"):
                torch.autograd.grad(w.sum() + value.sum(), w)
        elif first == "graph":
            (got,), (want,) = (torch.autograd.grad(v.sum(), w, retain_graph=True) for v in (value, getattr(w, field)))
            torch.testing.assert_close(got, want)


# -- ranks -----------------------------------------------------------------------------------------------------


def _rank(rank: int, world: int, port: int, work: Callable[[int, int], None]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    try:
        with double_precision():
            work(rank, world)
    finally:
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def together(work: Callable[[int, int], None], world: int = 2) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_rank, (world, port, work), nprocs=world, start_method="fork")


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    """An extended model "plain", under "DDP", or each part that has parameters, and the whole, under "FSDP2"."""
    if kind == "DDP":
        return DistributedDataParallel(model)
    if kind == "FSDP2":
        for module in [m for m in model.children() if next(m.parameters(), None) is not None]:
            fully_shard(module)
        fully_shard(model)
    return model


def agree(found: px.Results, wanted: px.Results, quantities: Sequence[Quantity], kind: str) -> None:
    """Whether what a wrapped model gives is what the model itself gives in one process."""
    for name in wanted:
        key = f"module.{name}" if f"module.{name}" in found else name
        for q in quantities:
            got, want = getattr(found[key], q.savefield), getattr(wanted[name], q.savefield)
            torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{kind} {n}: {m}")


def own(t: Tensor, rank: int, world: int) -> Tensor:
    """Uneven parts of a batch."""
    return t.split((7, 3) if world == 2 else PARTS)[rank]


def _tied(rank: int, world: int) -> None:
    """Uses in both orientations, whose nearest product is that of the sums over all ranks; and experts."""
    for make, x, y in (
        (Tied, torch.randint(8, (N, 4)), torch.randint(8, (N,))),
        (lambda: Routed(sort=True), torch.randn(N, 3, 4), torch.randint(3, (N,))),
    ):
        dist.broadcast(x, 0)
        dist.broadcast(y, 0)
        found = []
        for group in (None, dist.group.WORLD):
            torch.manual_seed(0)
            model, loss = px.extend(make()), px.extend(nn.CrossEntropyLoss())
            inputs, targets = (x, y) if group is None else (own(x, rank, world), own(y, rank, world))
            with px.backpack(px.KFLR(), px.KFAC(fisher="empirical"), scale="sample", group=group):
                loss(model(inputs), targets).backward()
            found.append(values(model, [px.KFLR(), px.KFAC()]))
        torch.testing.assert_close(*found)


def _all_quantities(rank: int, world: int) -> None:
    whole, loss, x, y = problem()
    results = run(whole, loss, x, y, scale="sample")
    for wrap in (lambda m: m, DistributedDataParallel):
        model, loss, x, y = problem()
        wrapped = wrap(model)
        mine = own(x, rank, world), own(y, rank, world)
        united = run(wrapped, loss, *mine, scale="sample", group=dist.group.WORLD)
        torch.testing.assert_close(values(model, asked()), values(whole, asked()))
        torch.testing.assert_close(united.batch_l2, results.batch_l2)
    model, loss, x, y = problem()
    with px.backpack(px.BatchGrad(), px.Variance(), scale="sample", group=dist.group.WORLD, accumulate=True):
        for part in own(torch.arange(N), rank, world).tensor_split(2):
            loss(model(x[part]), y[part]).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.variance, q.variance)
        torch.testing.assert_close(p.grad_batch.sum(0), q.grad_batch.sum(0))
    found = []
    for net, inputs, group in ((whole, (x, y), None), (model, mine, None), (model, mine, dist.group.WORLD)):
        with px.backpack(*estimates(), scale="sample", group=group, attach=False) as results:
            loss(net(inputs[0]), inputs[1]).backward()
        found.append(results)
    plain, part, united = found
    for name in plain:
        torch.testing.assert_close(united[name].hessian_trace, plain[name].hessian_trace)
        error = part[name].diag_h_mc.standard_error.clone()
        dist.all_reduce(error)  # of ranks that may have drawn the same signs
        torch.testing.assert_close(united[name].diag_h_mc, (plain[name].diag_h_mc.value, error))


def _constants(rank: int, world: int) -> None:
    model, loss, x, y = problem()
    with px.backpack(px.DiagGGNExact(), px.Variance(), group=dist.group.WORLD, scale="sample"):
        torch.autograd.grad(loss(model(x), y), list(model.parameters()), create_graph=True)
    w: Any = model.get_parameter("0.weight")
    for value in (w.diag_ggn_exact, w.variance):
        with pytest.raises(px.UnsupportedUseError, match="has no derivative.*of one process"):
            (w.sum() + value.sum()).backward()


def test_results_of_several_ranks_have_no_derivative() -> None:
    together(_constants)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_uneven_batches(world: int) -> None:
    together(_all_quantities, world)


def test_ranks_with_several_uses() -> None:
    together(_tied)


def _fails(rank: int, world: int) -> None:
    model, loss, x, y = problem()
    expected = RuntimeError if rank else px.PackextError
    with (
        pytest.raises(expected, match="out of patience"),
        px.backpack(px.BatchGrad(), scale="sample", group=dist.group.WORLD),
    ):
        if rank == 1:
            raise RuntimeError("out of patience")
        loss(model(x), y).backward()
    before = [dict(p.__dict__) for p in model.parameters()]
    assert not any("grad_batch" in fields for fields in before)
    run(model, loss, x, y, scale="sample", group=dist.group.WORLD)  # and the group is as good as before


def test_a_rank_that_fails_ends_the_others() -> None:
    together(_fails)


def _differ(rank: int, world: int) -> None:
    model, loss, x, y = problem()
    if rank:
        model[6].weight.requires_grad_(False)
    with (
        pytest.raises(px.PackextError, match=r"reached different parameters \(6\.weight\)"),
        px.backpack(px.BatchGrad(), scale="sample", group=dist.group.WORLD),
    ):
        loss(model(x), y).backward()
    model, loss = px.extend(nn.Linear(4, 3)), px.extend(nn.MSELoss())
    with (
        pytest.raises(px.PackextError, match=r"a root of \d+ columns.* on rank"),
        px.backpack(px.SqrtGGNExact(), scale="sample", group=dist.group.WORLD),
    ):
        loss(model(torch.ones(2, 3 + rank, 4)), torch.zeros(2, 3 + rank, 3)).backward()


def test_roots_of_passes_with_other_lengths() -> None:
    model, loss = px.extend(nn.Linear(4, 3)), px.extend(nn.MSELoss())
    with px.backpack(px.SqrtGGNExact(), accumulate=True):
        loss(model(torch.ones(2, 3, 4)), torch.zeros(2, 3, 3)).backward()
        with pytest.raises(px.PackextError, match=r"\[9, 12\] columns.*pad the batches"):
            loss(model(torch.ones(2, 4, 4)), torch.zeros(2, 4, 3)).backward()


def test_ranks_of_different_models() -> None:
    together(_differ)


def _more(rank: int, world: int) -> None:
    model, loss, x, y = problem()
    with (
        pytest.raises(px.PackextError, match="different numbers of backward passes"),
        px.backpack(px.BatchL2Grad(), scale="sample", group=dist.group.WORLD, accumulate=True),
    ):
        for _ in range(1 + rank):
            loss(model(x), y).backward()


def test_ranks_of_different_numbers_of_passes() -> None:
    together(_more)


def _drawn(rank: int, world: int) -> None:
    """The same samples on both ranks, of which draws that are shared would be the same."""
    model, loss, x, y = problem()
    mc = px.SqrtGGNMC()
    for quantities in ([mc], [mc, px.DiagGGNMC()]):
        with px.backpack(*quantities, scale="sample", group=dist.group.WORLD) as results:
            loss(model(x), y).backward()
        root = results["6.weight"].sqrt_ggn_mc
        assert not torch.equal(root[:, :N], root[:, N:])
    torch.testing.assert_close(results["6.weight"].diag_ggn_mc, root.square().sum((0, 1)))


def test_ranks_draw_targets_of_their_own() -> None:
    together(_drawn)


def _some(rank: int, world: int) -> None:
    """A group of some of the ranks, in which the others hear nothing and are not heard."""
    group, (whole, loss, x, y) = dist.new_group([1, 2]), problem()
    if rank == 0:
        with pytest.raises(ValueError, match="rank 0 is not in this process group"):
            px.backpack(px.BatchL2Grad(), scale="sample", group=group)
        return
    results = run(whole, loss, x, y, scale="sample")
    model, loss, x, y = problem()
    united = run(model, loss, own(x, rank - 1, 2), own(y, rank - 1, 2), scale="sample", group=group)
    torch.testing.assert_close(values(model, asked()), values(whole, asked()))
    torch.testing.assert_close(united.batch_l2, results.batch_l2)


def test_ranks_outside_of_the_group() -> None:
    together(_some, 3)


def test_no_rank_knows_the_loss_of_all() -> None:
    with pytest.raises(ValueError, match='scale="sample"'):
        px.backpack(px.BatchGrad(), group=object())
