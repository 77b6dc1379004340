"""Roots of loss Hessians against the Hessian of the same loss by `torch.func`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packext import PackextError, _roots
from packext._errors import CoupledSamplesError
from packext._roots import Call

pytestmark = pytest.mark.usefixtures("double")

N, C = 4, 3


def hessian(loss: nn.Module, output: Tensor, args: tuple, g: Tensor, kwargs: dict | None = None) -> Tensor:
    """The whole Hessian of `sum(g * loss)`, samples and entries flattened, `[N D, N D]`."""

    def total(o: Tensor) -> Tensor:
        return (g * loss.forward(o, *args, **(kwargs or {}))).sum()

    full = torch.func.jacrev(torch.func.jacrev(total))(output.detach())  # func.hessian warns of torch.jit's end
    return full.reshape(output.numel(), output.numel())


def assembled(cotangents: Iterator[Tensor], output: Tensor) -> Tensor:
    """Outer products within samples, summed over the cotangents, as a block-diagonal matrix `[N D, N D]`."""
    n = len(output)
    blocks = torch.zeros(n, output[0].numel(), output[0].numel())
    for s in cotangents:
        assert s.shape == output.shape and s.dtype == output.dtype and not s.requires_grad
        blocks += torch.einsum("na,nb->nab", s.reshape(n, -1), s.reshape(n, -1))
    return torch.block_diag(*blocks)


def compare(loss: nn.Module, output: Tensor, args: tuple, g: Tensor, compact: bool = False) -> float:
    """The largest difference of an entry from the Hessian's, relative to its largest."""
    expected = hessian(loss, output, args, g)
    assert expected.abs().max() > 1e-3, "nothing to compare"
    found = assembled(_roots.exact(Call(loss, output, args, {}, g), compact), output)
    return float((found - expected).abs().max() / expected.abs().max())


def gradient(loss: nn.Module, output: Tensor, args: tuple, factor: float = 0.7) -> Tensor:
    """A gradient at the loss: a scalar, or one positive weight per entry; the weights differ."""
    shape = loss.forward(output, *args).shape
    return factor * (1 + torch.arange(math.prod(shape)).reshape(shape) / 5)


# -- losses in closed form --------------------------------------------------------------------------------


def real(*shape: int) -> tuple[Tensor, tuple]:
    return torch.randn(shape), (torch.randn(shape),)


def binary(*shape: int) -> tuple[Tensor, tuple]:
    return 2 * torch.randn(shape), (torch.rand(shape),)


def counts(*shape: int) -> tuple[Tensor, tuple]:
    return torch.rand(shape) + 0.5, (torch.randint(1, 5, shape).double(),)


def indices(*rest: int, n: int = N, classes: int = C) -> tuple[Tensor, tuple]:
    return 2 * torch.randn(n, classes, *rest), (torch.randint(classes, (n, *rest)),)


def ignoring(index: int, *rest: int) -> tuple[Tensor, tuple]:
    output, (target,) = indices(*rest)
    target.view(-1)[[0, 2]] = index
    return output, (target,)


def soft(*rest: int, unnormalised: bool = False) -> tuple[Tensor, tuple]:
    output = 2 * torch.randn(N, C, *rest)
    target = torch.rand(output.shape)
    return output, (target if unnormalised else target.softmax(1),)


def noisy(*shape: int, var: tuple[int, ...] | float) -> tuple[Tensor, tuple]:
    variance = var if isinstance(var, float) else torch.rand(var)
    if isinstance(variance, Tensor):
        variance.view(-1)[0] = 0  # where eps counts
    return torch.randn(shape), (torch.randn(shape), variance)


CLASSES, SPREAD = torch.tensor([[0.5, 2.0, 1.3], [0.2, 1.0, 3.0]], dtype=torch.float64)
Case = tuple[Callable[[str], nn.Module], Callable[[], tuple[Tensor, tuple]]]
CASES: dict[str, Case] = {
    "mse": (lambda r: nn.MSELoss(reduction=r), lambda: real(N, C)),
    "mse 1d": (lambda r: nn.MSELoss(reduction=r), lambda: real(N)),
    "mse image": (lambda r: nn.MSELoss(reduction=r), lambda: real(2, 3, 2, 2)),
    "mse one sample": (lambda r: nn.MSELoss(reduction=r), lambda: real(1, C)),
    "huber": (lambda r: nn.HuberLoss(r, delta=0.8), lambda: real(N, C)),
    "smooth l1": (lambda r: nn.SmoothL1Loss(reduction=r, beta=1.7), lambda: real(N, C)),
    "poisson": (lambda r: nn.PoissonNLLLoss(full=True, reduction=r), lambda: counts(N, C)),
    "poisson rate": (lambda r: nn.PoissonNLLLoss(log_input=False, eps=0.1, reduction=r), lambda: counts(N, C)),
    "gaussian": (lambda r: nn.GaussianNLLLoss(eps=0.3, reduction=r), lambda: noisy(N, C, var=(N, C))),
    "gaussian row": (lambda r: nn.GaussianNLLLoss(eps=0.3, reduction=r), lambda: noisy(N, C, var=(N,))),
    "gaussian column": (lambda r: nn.GaussianNLLLoss(full=True, eps=0.3, reduction=r), lambda: noisy(N, C, var=(N, 1))),
    "gaussian square": (lambda r: nn.GaussianNLLLoss(eps=0.3, reduction=r), lambda: noisy(3, 3, var=(3,))),
    "gaussian number": (lambda r: nn.GaussianNLLLoss(reduction=r), lambda: noisy(N, C, var=0.5)),
    "bce": (lambda r: nn.BCEWithLogitsLoss(reduction=r), lambda: binary(N, 1)),
    "bce 1d": (lambda r: nn.BCEWithLogitsLoss(reduction=r), lambda: binary(N)),
    "bce weight": (lambda r: nn.BCEWithLogitsLoss(weight=SPREAD, reduction=r), lambda: binary(N, C)),
    "bce weight per sample": (
        lambda r: nn.BCEWithLogitsLoss(weight=torch.tensor([[1.0], [0.0], [2.0], [0.5]]), reduction=r),
        lambda: binary(N, C),
    ),
    "bce pos_weight": (lambda r: nn.BCEWithLogitsLoss(pos_weight=SPREAD, reduction=r), lambda: binary(N, C)),
    "bce both, image": (
        lambda r: nn.BCEWithLogitsLoss(weight=torch.tensor(0.4), pos_weight=SPREAD, reduction=r),
        lambda: binary(2, 2, C),
    ),
    "ce": (lambda r: nn.CrossEntropyLoss(reduction=r), indices),
    "ce one sample": (lambda r: nn.CrossEntropyLoss(reduction=r), lambda: indices(n=1)),
    "ce two classes": (lambda r: nn.CrossEntropyLoss(reduction=r), lambda: indices(classes=2)),
    "ce axes": (lambda r: nn.CrossEntropyLoss(reduction=r), lambda: indices(2, 2)),
    "ce weight": (lambda r: nn.CrossEntropyLoss(CLASSES, reduction=r), indices),
    "ce smooth": (lambda r: nn.CrossEntropyLoss(label_smoothing=0.3, reduction=r), indices),
    "ce weight smooth": (lambda r: nn.CrossEntropyLoss(CLASSES, label_smoothing=0.3, reduction=r), lambda: indices(2)),
    "ce ignore": (lambda r: nn.CrossEntropyLoss(reduction=r), lambda: ignoring(-100)),
    "ce ignore class": (lambda r: nn.CrossEntropyLoss(ignore_index=1, reduction=r), lambda: ignoring(1, 3)),
    "ce ignore all options": (
        lambda r: nn.CrossEntropyLoss(CLASSES, ignore_index=-1, label_smoothing=0.2, reduction=r),
        lambda: ignoring(-1, 2, 2),
    ),
    "ce soft": (lambda r: nn.CrossEntropyLoss(reduction=r), soft),
    "ce soft weight": (lambda r: nn.CrossEntropyLoss(CLASSES, reduction=r), soft),
    "ce soft all options": (
        lambda r: nn.CrossEntropyLoss(CLASSES, label_smoothing=0.3, reduction=r),
        lambda: soft(2, 2, unnormalised=True),
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_exact_equals_the_hessian(case: str, reduction: str) -> None:
    make, data = CASES[case]
    loss, (output, args) = make(reduction), data()
    g = gradient(loss, output, args)
    assert g.shape == (() if reduction != "none" else g.shape)
    assert compare(loss, output, args, g) < 1e-10
    softmax = isinstance(loss, nn.CrossEntropyLoss)
    for compact in (False, True):
        found = list(_roots.exact(Call(loss, output, args, {}, g), compact))
        fewer = output[0].numel() // output.shape[1] if softmax and compact else 0
        assert len(found) == output[0].numel() - fewer
    if softmax:
        assert compare(loss, output, args, g, compact=True) < 1e-10


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_sampled_has_the_hessian_as_its_expectation(case: str, reduction: str) -> None:
    """The mean of many draws, each entry within 5.5 standard errors: some 10000 entries, a false alarm in 2000 seeds.

    20000 draws of one case per family and reduction "none", where each entry has another weight; 1000 elsewhere.
    """
    make, data = CASES[case]
    loss, (output, args) = make(reduction), data()
    if isinstance(loss, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss):
        output = output / 4  # no label so rare that few are drawn
    g, n, draws = gradient(loss, output, args), len(output), 1000
    if reduction == "none" and case in ("mse", "huber", "gaussian", "bce pos_weight", "ce", "ce ignore all options"):
        draws = 20_000
    expected = hessian(loss, output, args, g).reshape(n, output[0].numel(), n, output[0].numel())
    expected = torch.einsum("nanb->nab", expected)
    generator = torch.Generator().manual_seed(1)
    found = _roots.sampled(Call(loss, output, args, {}, g), draws, generator)
    s = math.sqrt(draws) * torch.stack([s.reshape(n, -1) for s in found])
    products = torch.einsum("vna,vnb->vnab", s, s)
    error = (products.mean(0) - expected).abs()
    assert (error <= 5.5 * products.std(0) / math.sqrt(draws) + 1e-9 * expected.abs().max()).all()


def test_breaking_a_coefficient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _roots._weighted
    loss, (output, args) = nn.CrossEntropyLoss(CLASSES), indices()
    g = torch.tensor(0.5)
    assert compare(loss, output, args, g) < 1e-10
    monkeypatch.setattr(_roots, "_weighted", lambda *a: right(*a) * (1 + 1e-8))
    assert compare(loss, output, args, g) > 5e-9
    monkeypatch.setattr(_roots, "_weighted", lambda call, h, total: right(call, h, len(call.output)))
    assert compare(loss, output, args, g) > 1e-3


def test_columns_of_softmax_are_those_of_backpack() -> None:
    loss, (output, args) = nn.CrossEntropyLoss(reduction="sum"), indices(2)
    p = output.softmax(1)
    found = list(_roots.exact(Call(loss, output, args, {}, torch.tensor(1.0))))
    for v in range(C):
        for at in range(2):
            s = torch.zeros(N, C, 2)
            s[:, :, at] = p[:, v, at].sqrt()[:, None] * (F.one_hot(torch.tensor(v), C) - p[:, :, at])
            torch.testing.assert_close(found[2 * v + at], s)


def test_all_targets_ignored() -> None:
    loss, output, target = nn.CrossEntropyLoss(), torch.randn(N, C), torch.full((N,), -100)
    for compact in (False, True):
        assert all((s == 0).all() for s in _roots.exact(Call(loss, output, (target,), {}, torch.tensor(1.0)), compact))
    found = _roots.sampled(Call(loss, output, (target,), {}, torch.tensor(1.0)), 2, torch.Generator())
    assert all((s == 0).all() for s in found)


@pytest.mark.parametrize("case", ["ce", "ce axes"])
def test_extreme_logits(case: str) -> None:
    loss, (output, args) = nn.CrossEntropyLoss(), CASES[case][1]()
    output = output * 1000
    output[0] = 0
    assert compare(loss, output, args, torch.tensor(1.0), compact=True) < 1e-10
    found = _roots.sampled(Call(loss, output, args, {}, torch.tensor(1.0)), 20, torch.Generator().manual_seed(0))
    assert all(s.isfinite().all() and (s[1:].abs().amax() < 1e-8) for s in found)


@pytest.mark.parametrize("likely", range(C))
@pytest.mark.parametrize("gap", [10.0, 20.0, 28.0, 36.0])
def test_confident_predictions_in_float32(gap: float, likely: int) -> None:
    """Whichever class is likely, the curvature of all is as exact as their probabilities."""
    loss, target = nn.CrossEntropyLoss(reduction="sum"), torch.arange(N) % C
    output = (torch.randn(N, C) - gap * (torch.arange(C) != likely)).float()
    output[0] = output[0].roll(1)  # samples may differ in what is likely
    p = output.double().softmax(1)
    others = torch.stack([p[:, [c for c in range(C) if c != k]].sum(1) for k in range(C)], 1)
    for compact in (False, True):
        found = list(_roots.exact(Call(loss, output, (target,), {}, torch.tensor(1.0)), compact))
        diagonal = sum(s.double().square() for s in found)
        torch.testing.assert_close(diagonal, p * others, rtol=1e-5, atol=0)
        products = sum(s.double()[:, :, None] * s.double()[:, None] for s in found)
        off = ~torch.eye(C, dtype=torch.bool)
        if compact:
            torch.testing.assert_close(products[:, off], -(p[:, :, None] * p[:, None])[:, off], rtol=1e-4, atol=0)


def test_one_class_has_no_curvature() -> None:
    loss, output, target = nn.CrossEntropyLoss(), torch.randn(N, 1, 2), torch.zeros(N, 2).long()
    for compact in (False, True):
        found = list(_roots.exact(Call(loss, output, (target,), {}, torch.tensor(1.0)), compact))
        assert len(found) == 2 and not torch.stack(found).any()


def test_keyword_arguments_and_subclasses() -> None:
    class Mine(nn.GaussianNLLLoss):
        """As its parent."""

    output, (target, var) = noisy(N, C, var=(N, C))
    g, kwargs = torch.tensor(2.0), {"var": var, "target": target}
    found = assembled(_roots.exact(Call(Mine(eps=0.1), output, (), kwargs, g)), output)
    torch.testing.assert_close(found, hessian(Mine(eps=0.1), output, (), g, kwargs))
    assert _roots._kind(Mine()) is nn.GaussianNLLLoss


def test_a_subclass_with_its_own_forward_is_another_loss() -> None:
    class Sharper(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(3 * input, target)

    output, args = indices()
    assert compare(Sharper(), output, args, torch.tensor(0.5)) < 1e-10
    changed = nn.MSELoss()
    changed.forward = lambda input, target: F.mse_loss(2 * input, target)  # type: ignore[method-assign]
    assert compare(changed, *real(N, C), torch.tensor(0.5)) < 1e-10
    assert _roots._kind(Sharper()) is None and _roots._kind(changed) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", ["mse", "bce pos_weight", "ce weight smooth", "ce soft", "poisson", "gaussian", "log-cosh", "bce"]
)
def test_lower_precision(case: str, dtype: torch.dtype) -> None:
    make, data = {**CASES, "log-cosh": (lambda r: LogCosh(), lambda: real(N, C))}[case]
    loss, (output, args) = make("mean"), data()
    output, args = output.to(dtype), tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    g = torch.tensor(0.5, dtype=dtype)
    found = list(_roots.exact(Call(loss.to(dtype), output, args, {}, g)))
    found += list(_roots.sampled(Call(loss, output, args, {}, g), 2, torch.Generator()))
    assert all(s.dtype == dtype and s.isfinite().all() for s in found)
    found = assembled((s.double() for s in found[:-2]), output.double())
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    expected = hessian(loss.double(), output.double(), args, g.double())
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.02) * expected.abs().max()


class Holding(nn.Module):
    """A cross entropy with class weights in a buffer and a matrix in an attribute, both in the loss's dtype."""

    reduction = "mean"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("classes", CLASSES.to(dtype))
        self.matrix = (torch.eye(C) + 0.25).to(dtype)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x @ self.matrix, target, self.classes)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_loss_holds_in_lower_precision(autocast: bool) -> None:
    output, args = indices()
    output, loss, g = output.bfloat16(), Holding(torch.bfloat16), torch.tensor(0.5, dtype=torch.bfloat16)
    held = loss.classes, loss.matrix
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = [*_roots.exact(Call(loss, output.float(), args, {}, g.float()))]
        assert len(list(_roots.sampled(Call(loss, output, args, {}, g), 2, torch.Generator()))) == 2
    assert loss.classes is held[0] and loss.matrix is held[1]
    twin = Holding(torch.float64)
    twin.classes, twin.matrix = (t.double() for t in held)
    expected = hessian(twin, output.double(), args, g.double())
    found = assembled((s.double() for s in found), output.double())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_loss_that_has_to_compute_in_lower_precision_is_refused() -> None:
    loss = Own(lambda x: (x @ torch.eye(C, dtype=torch.bfloat16)).square().sum())
    with pytest.raises(PackextError, match=r"Own of an output \[4, 3\] cannot be computed again, in torch.float32"):
        _roots.exact(Call(loss, torch.randn(N, C).bfloat16(), (), {}, torch.tensor(1.0).bfloat16()))


# -- random numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mse", "huber", "bce", "ce axes", "gaussian", "log-cosh"])
def test_the_same_seed_gives_the_same_draws_and_the_global_generator_is_left_alone(case: str) -> None:
    make, data = {**CASES, "log-cosh": (lambda r: LogCosh(), lambda: real(N, C))}[case]
    loss, (output, args) = make("mean"), data()
    before = torch.get_rng_state()
    list(_roots.exact(Call(loss, output, args, {}, torch.tensor(1.0))))
    first, again, other = (
        list(_roots.sampled(Call(loss, output, args, {}, torch.tensor(1.0)), 9, torch.Generator().manual_seed(seed)))
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first) == 9 and all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other)) and not torch.equal(first[0], first[1])


def test_draws_are_gradients_for_labels() -> None:
    output, args = indices()
    p, root = output.softmax(1), math.sqrt(0.5 / N / 3)
    for s in _roots.sampled(Call(nn.CrossEntropyLoss(), output, args, {}, torch.tensor(0.5)), 3, torch.Generator()):
        labels = p - s / root
        torch.testing.assert_close(labels, labels.round())
        assert (labels.round().sum(1) == 1).all() and (labels > -0.5).all()
    output, args = binary(N, C)
    for s in _roots.sampled(Call(nn.BCEWithLogitsLoss(), output, args, {}, torch.tensor(1.0)), 1, torch.Generator()):
        labels = output.sigmoid() - s * math.sqrt(N * C)
        torch.testing.assert_close(labels, labels.round())


def test_draws_and_columns_are_made_one_at_a_time() -> None:
    output, args = indices(8)
    found = _roots.exact(Call(nn.CrossEntropyLoss(), output, args, {}, torch.tensor(1.0)))
    assert isinstance(found, GeneratorType) and next(found).shape == output.shape
    generator = torch.Generator().manual_seed(0)
    found = _roots.sampled(Call(nn.CrossEntropyLoss(), output, args, {}, torch.tensor(1.0)), 10**12, generator)
    assert next(found).shape == output.shape


# -- a user's own losses ----------------------------------------------------------------------------------


class LogCosh(nn.Module):
    """`log cosh (x - t)`, entry by entry and coupled within the sample, averaged over the samples."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        d = (x - target).reshape(len(x), -1)
        loss = d.cosh().log().sum(1) + 0.3 * d.logsumexp(1)
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()


class Own(nn.Module):
    """A loss given as a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(N, C), (1, C), (5,), (3, 2, 2)])
def test_a_loss_of_the_users_own(shape: tuple[int, ...], reduction: str) -> None:
    loss, (output, args) = LogCosh(reduction), real(*shape)
    g = gradient(loss, output, args)
    assert compare(loss, output, args, g) < 1e-10
    draws = 20_000 if shape == (N, C) else 1000
    found = _roots.sampled(Call(loss, output, args, {}, g), draws, torch.Generator().manual_seed(5))
    s = math.sqrt(draws) * torch.stack([s.reshape(len(output), -1) for s in found])
    products = torch.einsum("vna,vnb->vnab", s, s)
    expected = torch.block_diag(*products.mean(0)) - hessian(loss, output, args, g)
    spread = torch.block_diag(*products.std(0)) / math.sqrt(draws)
    assert (expected.abs() <= 5.5 * spread + 1e-9).all()


OWN: dict[str, tuple[nn.Module, Callable[[], tuple[Tensor, tuple]]]] = {
    "bce of probabilities": (nn.BCELoss(), lambda: (torch.rand(N, C) * 0.8 + 0.1, (torch.rand(N, C),))),
    "multilabel": (nn.MultiLabelSoftMarginLoss(SPREAD), lambda: (torch.randn(N, C), (torch.rand(N, C).round(),))),
    "low rank": (Own(lambda x: x.sum(1).square().sum() / 2), lambda: (torch.randn(N, C), ())),
    "flat direction": (Own(lambda x: (x.square() * torch.tensor([1, 1e-6, 1])).sum()), lambda: (torch.randn(N, C), ())),
    "in place": (Own(lambda x, t: x.sub_(t).square().mean()), lambda: real(N, C)),
    "some samples linear": (
        Own(lambda x: (x.square().sum(1) * torch.arange(N)).sum()),
        lambda: (torch.randn(N, C), ()),
    ),
    "several axes": (Own(lambda x: x.logsumexp((1, 2)).mean() + x.square().sum()), lambda: (torch.randn(2, 3, 2), ())),
}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_other_losses(name: str, compact: bool) -> None:
    loss, (output, args) = OWN[name][0], OWN[name][1]()
    kept = output.clone()
    expected = hessian(loss, output.clone(), args, torch.tensor(0.7)) if name != "in place" else None
    found = list(_roots.exact(Call(loss, output, args, {}, torch.tensor(0.7)), compact))
    assert torch.equal(output, kept)
    if expected is None:
        expected = hessian(nn.MSELoss(), output, args, torch.tensor(0.7))
    error = (assembled(iter(found), output) - expected).abs().max()
    assert error < 1e-10 * expected.abs().max()
    assert len(found) == (1 if name == "low rank" and compact else output[0].numel())


def test_a_concave_loss_that_is_maximised() -> None:
    output, g = torch.randn(N, C), torch.tensor(-2.0)
    assert compare(Own(lambda x: -x.logsumexp(1).sum()), output, (), g) < 1e-10


def test_within_a_backward_pass() -> None:
    found: list[Tensor] = []

    class Tap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.detach()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            found.extend(_roots.exact(Call(LogCosh(), output, args, {}, g[0])))
            return g[0]

    output, args = real(N, C)
    output.requires_grad_()
    (3 * Tap.apply(LogCosh()(output, *args))).backward()
    torch.testing.assert_close(assembled(iter(found), output), hessian(LogCosh(), output, args, torch.tensor(3.0)))


# -- refusals ---------------------------------------------------------------------------------------------


def drawn(x: Tensor) -> Tensor:
    return (x.square() * torch.rand_like(x)).mean()


def counting(loss: Own) -> Own:
    loss.function = lambda x: (loss.seen.add_(1), x.square().mean())[1]
    return loss


def pairs(x: Tensor) -> Tensor:
    return x.square().sum() + 0.5 * (x[0] * x[2]).sum()


class Crooked(torch.autograd.Function):
    """Says of a sum that its gradient is `(x_1, 0, ...)`, which is the gradient of nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] * torch.cat((ctx.saved_tensors[0][:, 1:2], torch.zeros(N, C - 1)), 1)


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return 2 * g[0] * ctx.saved_tensors[0]


_numbers = torch.Generator().manual_seed(0)
x, t = torch.randn(2, N, C, dtype=torch.float64, generator=_numbers)
t, y, one = t.sigmoid(), torch.tensor([0, 1, 2, 1]), torch.tensor(1.0, dtype=torch.float64)
REFUSED: dict[str, tuple[nn.Module, Tensor, tuple, Tensor, str]] = {
    "nll": (nn.NLLLoss(), x, (y,), one, "split between the network and a loss that is linear.*CrossEntropyLoss"),
    "kl": (nn.KLDivLoss(reduction="batchmean"), x, (t,), one, "linear in its input.*class probabilities"),
    "l1": (nn.L1Loss(), x, (t,), one, "piecewise linear"),
    "smooth l1 without zone": (nn.SmoothL1Loss(beta=0), x, (t,), one, "beta=0.*piecewise linear"),
    "negative g": (nn.MSELoss(), x, (t,), -one, "MSELoss.*negative gradient arrives"),
    "a negative g": (nn.MSELoss(reduction="none"), x, (t,), x.sign(), "negative gradient arrives"),
    "negative g at softmax": (nn.CrossEntropyLoss(), x, (y,), -one, "CrossEntropyLoss.*negative gradient"),
    "negative weight": (nn.CrossEntropyLoss(-CLASSES, reduction="sum"), x, (y,), one, "weight or target.*negative"),
    "negative target": (nn.PoissonNLLLoss(log_input=False), t + 1, (-t,), one, "weight or target.*negative"),
    "negative pos_weight": (nn.BCEWithLogitsLoss(pos_weight=-9 * SPREAD), x, (t,), one, "weight or target"),
    "unbatched softmax": (nn.CrossEntropyLoss(), x[0], (y[0],), one, r"no axis of samples.*\[N, C\]"),
    "a number": (nn.MSELoss(), x[0, 0], (t[0, 0],), one, "axis 0"),
    "no sample": (nn.MSELoss(), x[:0], (t[:0],), one, "axis 0"),
    "complex": (Own(lambda x: x.abs().mean()), x.to(torch.complex128), (), one, "real numbers"),
    "reduction": (Own(lambda x: x), x, (), one, "returned"),
    "unknown reduction": (nn.MSELoss(reduction="median"), x, (t,), one, "reduction='median'"),
    "g's shape": (nn.MSELoss(), x, (t,), torch.ones(2), r"gradient \[2\], where one of \[\]"),
    "g's shape, none": (nn.MSELoss(reduction="none"), x, (t,), one, r"gradient \[\], where one of \[4, 3\]"),
    "broadcast target": (nn.MSELoss(), x[:, :1], (t,), one, r"\[4, 1\] with a target \[4, 3\].*output's shape"),
    "broadcast weight": (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(2, 1, 1)), x, (t,), one, "broadcasts to more entries",
    ),
    "variance requires grad": (
        nn.GaussianNLLLoss(), x, (t, t.clone().requires_grad_()), one, "another argument.*requires grad.*detach",
    ),
    "nested": (Own(lambda x, d: x), x, ({"a": [t.clone().requires_grad_()]},), one, "requires grad"),
    "coupled": (Own(lambda x: x.square().sum().sqrt()), x, (), one, "couples samples"),
    "coupled by a mean": (Own(lambda x: x.square().mean() + x.mean(0).square().sum()), x, (), one, "couples"),
    "coupled, and small": (Own(lambda x: 1e-9 * x.square().sum().sqrt()), x, (), one, "couples samples"),
    "one pair": (Own(pairs), x, (), one, "couples samples"),
    "concave": (Own(lambda x: -x.square().mean()), x, (), one, "not convex.*need no root"),
    "a concave direction": (Own(lambda x: (x[:, 0] * x[:, 1]).sum()), x, (), one, "not convex"),
    "a small concave sample": (
        Own(lambda x: (x.square().sum(1) * torch.tensor([1, 1, 1, -1e-8])).sum()), x, (), one, "not convex",
    ),
    "linear": (Own(lambda x: 3 * x.mean()), x, (), one, "linear in its first argument"),
    "piecewise linear": (Own(lambda x: x.clamp(min=0).mean()), x, (), one, "linear in its first argument"),
    "constant": (Own(lambda x: torch.ones(())), x, (), one, "linear in its first argument"),
    "not symmetric": (Own(lambda x: Crooked.apply(x) + x.square().sum()), x, (), one, "not symmetric"),
    "not finite": (Own(lambda x: (x - x.detach()).abs().pow(1.5).sum()), x, (), one, "not finite"),
    "once": (Own(lambda x: Once.apply(x).sum()), x, (), one, "differentiated twice.*once"),
    "a part once": (Own(lambda x: (Once.apply(x) + x.exp()).sum()), x, (), one, "differentiated twice.*once"),
    "never": (nn.CTCLoss(), x[:, None].log_softmax(-1), (y[None, :2], (4,), (2,)), one, "twice.*_ctc_loss"),
    "random": (Own(drawn), x, (), one, "random numbers"),
    "buffers": (counting(Own(drawn)), x, (), one, "changes its buffers"),
    "several": (Own(lambda x: (x.mean(), x.sum())), x, (), one, "returned tuple"),
    "too large": (Own(lambda x: x.square().mean()), torch.zeros(1, 5000), (), one, "5000 x 5000"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    loss, output, args, g, match = REFUSED[name]
    state = torch.get_rng_state()
    with pytest.raises(PackextError, match=match) as error:  # by the call, before anything is asked of the iterator
        _roots.exact(Call(loss, output, args, {}, g))
    assert type(error.value) in (PackextError, CoupledSamplesError)  # which users can name
    assert type(loss).__name__ in str(error.value) and str(list(output.shape)) in str(error.value)
    assert isinstance(error.value, CoupledSamplesError) == ("couple" in match)
    with pytest.raises(PackextError, match=match):
        _roots.sampled(Call(loss, output, args, {}, g), 1, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sampled_root_needs_a_draw() -> None:
    with pytest.raises(PackextError, match="at least 1 draw, got 0"):
        _roots.sampled(Call(nn.MSELoss(), x, (t,), {}, one), 0, torch.Generator())


def test_coupling_is_found_in_float32_too() -> None:
    loss, output = Own(pairs), x.float()
    with pytest.raises(CoupledSamplesError):
        _roots.exact(Call(loss, output, (), {}, torch.tensor(1.0, dtype=torch.float32)))
