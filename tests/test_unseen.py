"""What nobody sees into: Functions, torch.func transforms, functions that take functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_
from torch._higher_order_ops.scan import scan
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import packext as px
from packext import _compiler, testing
from tests.helpers import double_precision

#: torch's compiler asks for what makes torch warn, and torch warns of its own tensors.
pytestmark = pytest.mark.filterwarnings("ignore")
N, D = 4, 3


@pytest.fixture(autouse=True)
def _compiles() -> None:
    """A forward pass that was interrupted is over when the next one begins: until then nothing is compiled."""
    px.extend(nn.Linear(1, 1))(torch.zeros(1, 1))


class Between(nn.Module):
    """A layer, what is tried, and a layer."""

    def __init__(self, through: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.scale = nn.Parameter(torch.rand(D))
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.through(self, torch.tanh(self.up(x))))


def cond(m: Between, h: Tensor) -> Tensor:
    return torch.cond(h.sum() > -99, lambda z: m.mid(z) * m.scale, lambda z: z * m.scale, (h,))


def mapped(m: Between, h: Tensor) -> Tensor:
    return map_(lambda z: m.mid(z) * m.scale, h)


def scanned(m: Between, h: Tensor) -> Tensor:
    steps = torch.stack([h, 2 * h])
    return scan(lambda c, z: (torch.tanh(c * m.scale + m.mid(z)), c * 2), torch.zeros_like(h), steps, dim=0)[0]


def plain(m: Between, h: Tensor) -> Tensor:
    return m.mid(h) * m.scale + torch.cond(h.sum() > -99, lambda z: z.sin(), lambda z: z.cos(), (h,))


def parameters_alone(m: Between, h: Tensor) -> Tensor:
    return m.mid(h) * torch.cond(torch.tensor(True), lambda z: z.sin(), lambda z: z.cos(), (m.scale,))


def flex(m: Between, h: Tensor) -> Tensor:
    q = h.detach().view(len(h), 1, D, 1)  # torch has no backward pass of it on CPUs
    return m.mid(h) * m.scale + flex_attention(q, q, q, score_mod=lambda s, b, head, i, j: s * (1 + i)).view(len(h), D)


def mixing(m: Between, h: Tensor) -> Tensor:
    return torch.cond(h.sum() > -99, lambda z: z + z.mean(0), lambda z: z.cos(), (m.mid(h) * m.scale,))


class Product(torch.autograd.Function):
    """`tanh(h w) v`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(h, w, v)
        return torch.tanh(h @ w) * v

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        (g,), (h, w, v) = gs, ctx.saved_tensors
        a = torch.tanh(h @ w)
        gz = g * v * (1 - a * a)
        return gz @ w.T, h.T @ gz, (g * a).sum(0)


class Two(torch.autograd.Function):
    """`h v`, and `h + v`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, v)
        return h * v, h + v

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        (a, b), (h, v) = gs, ctx.saved_tensors
        return a * v + b, (a * h + b).sum(0)


class Less(torch.autograd.Function):
    """`(h - mean of h) v`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(h, v)
        return (h - h.mean(0)) * v

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        (g,), (h, v) = gs, ctx.saved_tensors
        return g * v - (g * v).mean(0), (g * (h - h.mean(0))).sum(0)


def product(m: Between, h: Tensor) -> Tensor:
    return Product.apply(h, m.mid.weight, m.scale) + m.mid.bias


def forward_mode(m: Between, h: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m.mid(forward_ad.make_dual(h, h.cos()).sin() * m.scale)).tangent + m.mid.bias


CASES = {
    "a Function": product,
    "two in a row": lambda m, h: product(m, torch.sin(product(m, h))),
    "one within another": lambda m, h: Product.apply(product(m, h), m.mid.weight, m.scale),
    "one around another": lambda m, h: Product.apply(Product.apply(h, m.mid.weight, m.scale), m.mid.weight, m.mid.bias),
    "around itself, and beside": lambda m, h: (
        lambda t: t + Product.apply(t, m.mid.weight, m.scale) + m.mid.bias)(Product.apply(h, m.mid.weight, m.scale)),
    "of a parameter that layers use": lambda m, h: (
        Product.apply(m.mid(h) * m.scale, m.mid.weight, m.scale) * m.scale),
    "of values made of parameters": lambda m, h: Product.apply(h, 2 * m.mid.weight, m.scale.exp()) + m.mid.bias,
    "changed in place": lambda m, h: Product.apply(h, m.mid.weight, m.scale).mul_(2.0).add_(m.mid.bias),
    "two outputs": lambda m, h: m.mid((lambda a, b: a.sin() * b)(*Two.apply(h, m.scale))),
    "one of two outputs": lambda m, h: m.mid(Two.apply(h, m.scale)[1]),
    "vmap": lambda m, h: torch.vmap(lambda row: m.mid.weight @ row * m.scale)(h) + m.mid.bias,
    "jacrev": lambda m, h: torch.vmap(torch.func.jacrev(lambda row: torch.tanh(m.mid(row) * m.scale)))(h).sum(1),
    "vmap of what closes over data": lambda m, h: torch.vmap(
        lambda i: (h.index_select(0, i[None])[0] + m.scale) @ m.mid.weight)(torch.arange(len(h))) + m.mid.bias,
    "vmap in chunks": lambda m, h: torch.vmap(lambda row: m.mid(row) * m.scale, chunk_size=3)(h),
    "hessian": lambda m, h: torch.vmap(torch.func.hessian(lambda row: (m.mid(row) * m.scale).pow(3).sum()))(h).sum(1),
    "jvp": lambda m, h: torch.func.jvp(lambda z: m.mid(z.sin() * m.scale), (h,), (h.cos(),))[1] + m.mid.bias,
    "forward mode": forward_mode,
    "halves": lambda m, h: torch.cat([Product.apply(z, m.mid.weight, m.scale) for z in h.split(2)]) + m.mid.bias,
    "vmap of two": lambda m, h: torch.vmap(lambda row, other: row * (m.scale * other))(h, h.detach()) + m.mid.bias,
    "cond": cond,
    "map": mapped,
    "scan": scanned,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_quantity(name: str) -> None:
    with double_precision():
        model, x, y = Between(CASES[name]), torch.randn(N, D), torch.randint(2, (N,))
        before = copy.deepcopy(model)
        nn.CrossEntropyLoss()(before(x), y).backward()
        loss = nn.CrossEntropyLoss()
        report = testing.check(model, loss, x, y)
        assert report.ok, report
        curvature = [px.DiagGGNExact(), px.SqrtGGNExact(), px.GGNGram(), px.DiagEF(), px.HMP()]
        report = testing.check(model, loss, x, y, curvature)
        assert report.ok, report
        px.extend(model), px.extend(loss)
        for _ in range(2):  # with the probe, and without
            model.zero_grad()
            with px.backpack(px.BatchGrad()) as results:
                loss(model(x), y).backward()
            for (key, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
                assert (key in results) == (p.grad is not None)


@pytest.mark.parametrize("where", ["around", "behind"])
def test_full_backward_hooks(where: str) -> None:
    """They pass what they are put on through a Function, whose outputs are its inputs."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.rand(D))

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(x, self.weight, self.scale)

    with double_precision():
        model, seen = nn.Sequential(nn.Linear(D, D), Inner(), nn.Linear(D, 2)), []
        report = testing.check(model, nn.CrossEntropyLoss(), x := torch.randn(N, D), y := torch.randint(2, (N,)))
        assert report.ok, report
        model[1 if where == "around" else 2].register_full_backward_hook(lambda *args: seen.append(args))
        report = testing.check(model, nn.CrossEntropyLoss(), x, y)
        assert report.ok and seen, report


def test_what_comes_out_of_the_model() -> None:
    class Last(Between):
        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(torch.tanh(self.up(x)), self.mid.weight, self.scale)

    with double_precision():
        report = testing.check(Last(product), nn.CrossEntropyLoss(), torch.randn(N, D), torch.randint(D, (N,)))
        assert report.ok, report


def test_accumulated_and_in_other_precision() -> None:
    model, x, y = px.extend(Between(CASES["vmap"])), torch.randn(N, D), torch.randint(2, (N,))
    loss = px.extend(nn.CrossEntropyLoss(reduction="sum"))
    with px.backpack(px.BatchGrad()) as results:
        loss(model(x), y).backward()
    whole = {name: found.grad_batch for name, found in results.items()}
    with px.backpack(px.BatchGrad(), accumulate=True) as results:
        for part in (slice(0, 1), slice(1, N)):
            loss(model(x[part]), y[part]).backward()
    for name, found in results.items():
        torch.testing.assert_close(found.grad_batch, whole[name])
    with torch.autocast("cpu", torch.bfloat16), px.backpack(px.BatchGrad()) as results:
        loss(model(x), y).backward()
    for name, found in results.items():
        torch.testing.assert_close(found.grad_batch, whole[name], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("quantity", [px.KFAC(), px.DiagHessian()])
def test_what_needs_more_is_refused(quantity: Any) -> None:
    model, loss = px.extend(Between(product)), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.PackextError, match=r"mid\.weight|scale"):
        with px.backpack(quantity):
            loss(model(torch.randn(N, D)), torch.randint(2, (N,))).backward()
    assert all(p.grad is None for p in model.parameters())


def tokens(m: Between, h: Tensor) -> Tensor:
    return torch.vmap(lambda row: torch.tanh(row @ m.mid.weight) * m.scale)(h)


def test_tokens_are_refused() -> None:
    model, loss = px.extend(Between(tokens)), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.UnsupportedUseError, match=r"scale.*does not tell the 5 tokens"):
        with px.backpack(px.BatchGrad(), per="token"):
            loss(model(torch.randn(N, 5, D)).transpose(1, 2), torch.randint(2, (N, 5))).backward()


@pytest.mark.parametrize("through", [tokens, lambda m, h: Product.apply(h, m.mid.weight, m.scale)])
def test_checkpointed_functions(through: Callable) -> None:
    with double_precision():
        model = Between(lambda m, h: checkpoint(through, m, h, use_reentrant=False))
        report = testing.check(model, nn.CrossEntropyLoss(), torch.randn(N, D), torch.randint(2, (N,)))
        assert report.ok, report


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_checkpointed_modules_they_are_refused(reentrant: bool) -> None:
    """Training without a context goes on as it is."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.first = Between(product), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, torch.sin(self.first(x)), use_reentrant=reentrant)

    model, loss, grads = Block(), nn.CrossEntropyLoss(), []
    x, y = torch.randn(N, D), torch.randint(2, (N,))
    for extended in (False, True):
        if extended:
            px.extend(model), px.extend(loss)
        loss(model(x), y).backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
    for _ in range(2):
        with pytest.raises(px.UnsupportedUseError, match=r"Product.*mid\.weight.*checkpointed"):
            with px.backpack(px.BatchGrad()):
                loss(model(torch.randn(N, D)), torch.randint(2, (N,))).backward()
        assert all(p.grad is None for p in model.parameters())


def test_before_any_layer_it_is_refused() -> None:
    """There is no tap at which samples that meet in there would be seen to."""

    class First(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.through(self, x))

    for through in (product, cond):
        model, loss = px.extend(First(through)), px.extend(nn.CrossEntropyLoss())
        with pytest.raises(px.UnsupportedUseError, match=r"mid\.weight.*before any layer"):
            with px.backpack(px.BatchGrad()):
                loss(model(torch.randn(N, D)), torch.randint(2, (N,))).backward()
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "through",
    [
        lambda m, h, x: torch.vmap(lambda row: row * (m.scale * x.mean(0)))(h),
        lambda m, h, x: torch.vmap(lambda row, all: row * (m.scale * all.mean(0)), (0, None))(h, x),
        lambda m, h, x: h + torch.vmap(lambda row: (row - x.mean(0)) * m.scale)(x),
        lambda m, h, x: torch.cond(
            h.sum() > -99, lambda z, x: z + (x - x.mean(0)) * m.scale, lambda z, x: z * m.scale, (h, x)
        ),
    ],
)
def test_beside_data_without_a_gradient_they_are_refused(through: Callable) -> None:
    """Samples of it that meet are seen by nothing."""

    class Beside(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(through(self, torch.tanh(self.up(x)), x))

    model, loss = px.extend(Beside(product)), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.UnsupportedUseError, match=r"data meets scale.*(data that has no gradient|before any layer)"):
        with px.backpack(px.BatchGrad()):
            loss(model(torch.randn(N, D)), torch.randint(2, (N,))).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("through", [cond, mapped, scanned])
def test_gradients_are_as_before(through: Callable, loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loaded:  # as in a process in which nothing has been compiled before
        monkeypatch.setattr(_compiler, "_loaded", lambda: None)
    with double_precision():
        model, x, y = Between(through), torch.randn(N, D), torch.randint(2, (N,))
        loss = px.extend(nn.CrossEntropyLoss())
        expected = copy.deepcopy(model)
        nn.CrossEntropyLoss()(expected(x), y).backward()
        px.extend(model)
        loss(model(x), y).backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_an_input_that_is_written_to_behind_them() -> None:
    """Autograd gives what was computed of it before another node than it has by then."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            summed = torch.func.vmap(lambda row: row + row.sum())(x)
            x += 1
            return self.b(self.a(summed).tanh())

    model, before, x = px.extend(Net()), nn.Linear(D, D), torch.randn(N, D)
    with px.backpack(px.BatchGrad()):
        model(before(x)).square().sum().backward()
    for n in range(N):
        with px.disable():
            (g,) = torch.autograd.grad(model(before(x[n : n + 1])).square().sum(), model.a.weight)
        torch.testing.assert_close(model.a.weight.grad_batch[n], g)


@pytest.mark.parametrize("through", [plain, parameters_alone, flex])
def test_of_data_or_of_parameters_alone_they_are_followed(through: Callable) -> None:
    with double_precision():
        torch.manual_seed(0)
        model = Between(through)
        report = testing.check(model, nn.CrossEntropyLoss(), torch.randn(N, D), torch.randint(2, (N,)))
        assert report.ok, report


@pytest.mark.parametrize("through", [mixing, lambda m, h: m.mid(Less.apply(h, m.scale))])
def test_samples_that_meet_in_them_are_refused(through: Callable) -> None:
    model, x = px.extend(Between(through)), torch.randn(N, D)
    with pytest.raises(px.CoupledSamplesError):
        with px.backpack(px.BatchGrad()):
            px.extend(nn.CrossEntropyLoss())(model(x), torch.randint(2, (N,))).backward()


class Normalised(torch.autograd.Function):
    """`h v`, whose gradient is scaled to one over the batch."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(h, v)
        return h * v

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        (g,), (h, v) = gs, ctx.saved_tensors
        g = g / g.norm()
        return g * v, (g * h).sum(0)


class Decayed(torch.autograd.Function):
    """`h`, with a gradient of the parameter's own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        return gs[0], 0.1 * ctx.saved_tensors[0]


@pytest.mark.parametrize("function", [Normalised, Decayed])
def test_gradients_that_do_not_add_up_are_refused(function: Any) -> None:
    model = px.extend(Between(lambda m, h: m.mid(function.apply(h, m.scale))))
    with pytest.raises(px.UnsupportedUseError, match=rf"{function.__name__}.*scale.*not proportional"):
        with px.backpack(px.BatchGrad()):
            px.extend(nn.CrossEntropyLoss())(model(torch.randn(N, D)), torch.randint(2, (N,))).backward()
    assert all(p.grad is None for p in model.parameters())


def test_nested_tensors_are_refused() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(D, D), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            ragged = torch.nested.nested_tensor([x[0, :2], *x[1:]], layout=torch.jagged)
            return self.head(self.inner(ragged).to_padded_tensor(0.0).sum(1))

    model, x = px.extend(Ragged()), torch.randn(N, 5, D)
    with pytest.raises(px.UnsupportedUseError, match=r"in module inner \[Linear\].*nested.*Pad"):
        with px.backpack(px.BatchGrad()):
            px.extend(nn.CrossEntropyLoss())(model(x), torch.randint(2, (N,))).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_sparse_inputs(kind: str) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.weight = nn.Linear(D, D), nn.Parameter(torch.randn(D, D))
            self.head = nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = getattr(x, kind)()
            return self.head(torch.tanh(self.inner(x) + x @ self.weight))

    with double_precision():
        torch.manual_seed(0)
        report = testing.check(Sparse(), nn.CrossEntropyLoss(), torch.randn(N, D), torch.randint(2, (N,)))
        assert report.ok, report


class Noting(torch.autograd.Function):
    """`tanh`, with notes of its own on the context, under names that autograd's nodes have, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.name, ctx.variable = "tanh", "x"
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gs[0] * (1 - torch.tanh(x) ** 2)


class NotedLoss(nn.Module):
    """The same behind the model."""

    reduction = "mean"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (Noting.apply(z) - y).square().mean()


@pytest.mark.parametrize("quantity", [px.BatchGrad(), px.DiagGGNExact(), px.KFAC(fisher="exact"), px.HMP()])
@pytest.mark.parametrize("behind", [False, True])
def test_a_function_may_note_on_its_context_what_it_likes(behind: bool, quantity: Any) -> None:
    with double_precision():
        x, y = torch.randn(N, D), torch.randn(N, 2)
        model = Between(lambda m, h: m.mid(h) * m.scale if behind else Noting.apply(m.mid(h) * m.scale))
        if behind:  # the GGN is split at the input of the extended loss: its Hessian is to be positive
            y = torch.tanh(testing.call(model, x).detach())
        report = testing.check(model, NotedLoss() if behind else nn.MSELoss(), x, y, [quantity])
        assert report.ok, report
