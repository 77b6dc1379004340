"""Scripts written for BackPACK 1.7.1 give the same with only the import changed, on models where BackPACK is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

backpack = pytest.importorskip("backpack", reason="backpack-for-pytorch is not installed")
pytest.importorskip("backpack.extensions", reason="backpack-for-pytorch is not complete")

FIELDS = {
    "BatchGrad": "grad_batch",
    "BatchL2Grad": "batch_l2",
    "SumGradSquared": "sum_grad_squared",
    "Variance": "variance",
}

# BackPACK registers torch's full backward hooks, which warn where inputs do not require grad.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

SCRIPT = """
from {library} import backpack, disable, extend
from {library}.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance

model = extend(model)
loss_fn = extend(loss_fn)
loss = loss_fn(model(x), y)
hooked = []
with backpack(*(eval(name)() for name in quantities), extension_hook=hooked.append):
    loss.backward()
found = {{}}
for name, p in model.named_parameters():
    found[name] = {{field: getattr(p, field).detach().clone() for field in fields}}
    found[name]["grad"] = p.grad.clone()
"""


def flat() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 3)), torch.randn(6, 5)


def image() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, dilation=2, padding=1), nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 2, stride=2), nn.BatchNorm2d(3).eval(), nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip
    return model, torch.randn(6, 2, 9, 9)


def volumes() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.ELU(), nn.Flatten(), nn.Linear(16, 3)), torch.randn(4, 1, 3, 3, 3)


def tokens() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), torch.randint(
        7, (5, 3)
    )


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "flat": flat,
    "image": image,
    "volumes": volumes,
    "tokens": tokens,
}


def run(library: str, build: Any, reduction: str, quantities: list[str]) -> tuple[dict[str, dict[str, Tensor]], int]:
    torch.manual_seed(0)
    model, x = build()
    y = torch.randint(3, (len(x),))
    if x.is_floating_point():  # BackPACK's Embedding knows float32 only
        model, x = model.double(), x.double()
    scope = {
        "model": model, "x": x, "y": y,
        "loss_fn": nn.CrossEntropyLoss(reduction=reduction),
        "quantities": quantities, "fields": [FIELDS[q] for q in quantities],
    }  # fmt: skip
    exec(SCRIPT.format(library=library), scope)
    return scope["found"], len(scope["hooked"])


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_only_the_import_changes(build: Any, reduction: str) -> None:
    want, _ = run("backpack", build, reduction, list(FIELDS))
    got, hooked = run("packext", build, reduction, list(FIELDS))
    assert got.keys() == want.keys() and hooked > 0
    for name, fields in want.items():
        for field, value in fields.items():
            mine = got[name][field]
            assert mine.shape == value.shape and mine.dtype == value.dtype, (name, field)
            # BackPACK's variance is a difference of moments.
            relative, absolute = (1e-9, 1e-14) if value.dtype == torch.float64 else (1e-4, 1e-8)
            torch.testing.assert_close(
                mine, value, rtol=relative, atol=absolute, msg=lambda m, at=(name, field): f"{at}: {m}"
            )


def test_recurrent_layers() -> None:
    from backpack.custom_module.reduce_tuple import ReduceTuple

    def build() -> tuple[nn.Module, Tensor]:
        return nn.Sequential(
            nn.LSTM(4, 5, batch_first=True), ReduceTuple(index=0), nn.Flatten(), nn.Linear(15, 3)
        ), torch.randn(4, 3, 4)

    want, _ = run("backpack", build, "mean", list(FIELDS))
    got, _ = run("packext", build, "mean", list(FIELDS))
    for name, fields in want.items():
        for field, value in fields.items():
            torch.testing.assert_close(got[name][field], value, rtol=1e-9, atol=1e-14)


CURVATURE = {
    "DiagGGNExact": "diag_ggn_exact",
    "BatchDiagGGNExact": "diag_ggn_exact_batch",
    "SqrtGGNExact": "sqrt_ggn_exact",
}


@pytest.mark.parametrize("build", [flat, image, volumes], ids=["flat", "image", "volumes"])
@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_curvature(build: Any, loss: str, reduction: str) -> None:
    from backpack import extensions as theirs

    import packext as px

    torch.manual_seed(0)
    model, x = build()
    model, x = model.double(), x.double()
    y = torch.randint(3, (len(x),)) if loss == "CrossEntropyLoss" else torch.randn(len(x), 3).double()
    names = [*CURVATURE, *(["KFLR"] if build is flat else [])]
    fields = [*CURVATURE.values(), *(["kflr"] if build is flat else [])]
    found = {}
    for library, module in ((backpack, theirs), (px, px)):
        net = library.extend(copy.deepcopy(model))
        loss_fn = library.extend(getattr(nn, loss)(reduction=reduction))
        with library.backpack(*(getattr(module, name)() for name in names)):
            loss_fn(net(x), y).backward()
        found[library] = {k: {f: getattr(p, f) for f in fields} for k, p in net.named_parameters()}
    for name, mine in found[px].items():
        for field, value in mine.items():
            if field == "kflr":
                want = found[backpack][name][field]
                assert [t.shape for t in value] == [t.shape for t in want]
                for got, other in zip(value, want, strict=True):
                    torch.testing.assert_close(got, other)
            else:
                torch.testing.assert_close(value.abs(), found[backpack][name][field].abs())


def smooth() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ELU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip
    return model, torch.randn(6, 2, 9, 9)


@pytest.mark.parametrize("build", [flat, smooth, volumes])
@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_diagonal_of_the_hessian(build: Any, loss: str, reduction: str) -> None:
    from backpack import extensions as theirs

    import packext as px

    torch.manual_seed(0)
    model, x = build()
    model, x = model.double(), x.double()
    y = torch.randint(3, (len(x),)) if loss == "CrossEntropyLoss" else torch.randn(len(x), 3).double()
    found = {}
    for library, module in ((backpack, theirs), (px, px)):
        net = library.extend(copy.deepcopy(model))
        loss_fn = library.extend(getattr(nn, loss)(reduction=reduction))
        with library.backpack(module.DiagHessian(), module.BatchDiagHessian()):
            loss_fn(net(x), y).backward()
        found[library] = dict(net.named_parameters())
    for name, p in found[px].items():
        torch.testing.assert_close(p.diag_h, found[backpack][name].diag_h)
        torch.testing.assert_close(p.diag_h_batch, found[backpack][name].diag_h_batch)


def passed(library: Any, model: nn.Module, x: Tensor, y: Tensor, *asked: Any, **options: Any) -> nn.Module:
    """A copy of the model after a pass."""
    net, loss_fn = library.extend(copy.deepcopy(model)), library.extend(nn.CrossEntropyLoss())
    with library.backpack(*asked):
        loss_fn(net(x), y).backward(**options)
    return net


def test_kronecker_factors_of_a_convolution_are_others() -> None:
    """As docs/migrate/backpack.md says: B of "reduce", and A of "expand" times the number of positions."""
    from backpack import extensions as theirs

    import packext as px

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()  # of 4 positions
    x, y = torch.randn(5, 2, 3, 3).double(), torch.randint(3, (5,))
    mixed = passed(backpack, model, x, y, theirs.KFLR())[0]
    expand, reduce = (passed(px, model, x, y, px.KFAC(fisher="exact", approx=a))[0] for a in ("expand", "reduce"))
    torch.testing.assert_close(mixed.weight.kflr, [reduce.weight.kfac[0], 4 * expand.weight.kfac[1]])
    torch.testing.assert_close(mixed.bias.kflr, reduce.bias.kfac)


def test_norms_of_a_convolution_in_groups_are_others() -> None:
    """As docs/migrate/backpack.md says: those of the individual gradients, on which both agree."""
    from backpack import extensions as theirs

    import packext as px

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(5, 4, 3, 3).double(), torch.randint(3, (5,))
    other = passed(backpack, model, x, y, theirs.BatchGrad(), theirs.BatchL2Grad())[0].weight
    own = passed(px, model, x, y, px.BatchGrad(), px.BatchL2Grad())[0].weight
    torch.testing.assert_close(own.grad_batch, other.grad_batch)
    torch.testing.assert_close(own.batch_l2, own.grad_batch.flatten(1).square().sum(1))
    assert not torch.allclose(own.batch_l2, other.batch_l2, rtol=0.1)


def test_products_in_fields_of_ones_own() -> None:
    """As in BackPACK's example of all extensions: two kinds of one product in one pass."""
    import packext as px

    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 9, 9).double(), torch.randint(3, (6,))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(147, 3)).double()
    asked = {
        "clipped": ("PCHMP", {"modify": "clip"}), "turned": ("PCHMP", {"modify": "abs"}),
        "hessian": ("HMP", {}), "ggn": ("GGNMP", {}),
    }  # fmt: skip
    nets = []
    for library in (backpack, px):
        products = [getattr(library.extensions, kind)(savefield=k, **how) for k, (kind, how) in asked.items()]
        nets.append(passed(library, model, x, y, *products))  # without retain_graph, as in that example
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        v = torch.randn(2, *p.shape).double()
        for field in asked:
            torch.testing.assert_close(getattr(q, field)(v), getattr(p, field)(v))


def test_products_inverses_and_damping() -> None:
    """The rows of docs/migrate/backpack.md on `utils.kroneckers` and `hessianfree`."""
    from backpack.hessianfree.ggnvp import ggn_vector_product
    from backpack.hessianfree.hvp import hessian_vector_product
    from backpack.utils import kroneckers

    import packext as px

    torch.manual_seed(0)
    model, x = flat()
    model, x, y = model.double(), x.double(), torch.randint(3, (len(x),))
    net = passed(px, model, x, y, px.KFLR(), px.HMP(), px.GGNMP(), retain_graph=True)
    named = list(net.parameters())
    for k, p in enumerate(named):
        f, v = p.kflr, torch.randn(2, *p.shape).double()
        columns = v.flatten(1).T
        torch.testing.assert_close(px.linalg.kron(f), kroneckers.kfacs_to_mat(f))
        got = px.linalg.kron_matvec(f, v).flatten(1).T
        torch.testing.assert_close(got, kroneckers.apply_kfac_mat_prod(f, columns))
        torch.testing.assert_close(px.linalg.kron_inv(f, 0.1 ** len(f), pi=False), kroneckers.inv_kfacs(f, shift=0.1))
        shifts = [0.1, 0.02][: len(f)]
        each = [px.linalg.kron_inv([one], s)[0] for one, s in zip(f, shifts, strict=True)]
        torch.testing.assert_close(each, kroneckers.inv_kfacs(f, shift=shifts))
        output = net(x)  # of the extended model, which BackPACK's functions take
        loss = nn.CrossEntropyLoss()(output, y)
        alone = [v[0] if i == k else torch.zeros_like(q) for i, q in enumerate(named)]
        torch.testing.assert_close(p.hmp(v)[0], hessian_vector_product(loss, named, alone)[k])
        torch.testing.assert_close(p.ggnmp(v)[0], ggn_vector_product(loss, output, net, alone)[k])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss"])
def test_results_are_differentiated(loss: str) -> None:
    """As in a penalty on them."""
    import packext as px

    torch.manual_seed(0)
    model, x = image()
    model, x = model.double(), x.double()
    y = torch.randint(3, (len(x),)) if loss == "CrossEntropyLoss" else torch.randn(len(x), 3).double()
    names = {**FIELDS, "DiagGGNExact": "diag_ggn_exact", "BatchDiagGGNExact": "diag_ggn_exact_batch"}
    found = []
    for library in (backpack, px):
        net, loss_fn = library.extend(copy.deepcopy(model)), library.extend(getattr(nn, loss)())
        with library.backpack(*(getattr(library.extensions, name)() for name in names)):
            loss_fn(net(x), y).backward(create_graph=True)
        parameters = list(net.parameters())
        penalties = [sum(getattr(p, field).sum() for p in parameters) for field in names.values()]
        found.append([torch.autograd.grad(t, parameters, retain_graph=True, allow_unused=True) for t in penalties])
    for theirs, ours in zip(*found, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-14)


def test_what_the_hook_is_called_with() -> None:
    from backpack import extensions as theirs

    import packext as px

    model, x = flat()
    y, seen = torch.randint(3, (len(x),)), {}
    for library, asked in ((backpack, theirs.BatchGrad()), (px, px.BatchGrad())):
        seen[library] = []
        net, loss_fn = library.extend(copy.deepcopy(model)), library.extend(nn.CrossEntropyLoss())
        with library.backpack(asked, extension_hook=seen[library].append):
            loss_fn(net(x), y).backward()
    assert [type(m) for m in seen[px]] == [nn.Linear] * 3
    assert [type(m) for m in seen[backpack]] == [
        nn.CrossEntropyLoss, nn.Linear, nn.Sigmoid, nn.Linear, nn.ReLU, nn.Linear
    ]  # fmt: skip


def test_signatures() -> None:
    """Arguments of BackPACK's public calls are accepted by name, and those of its extensions at their places, too."""
    import inspect

    import packext
    from packext import extensions

    for name in ("extend", "backpack", "disable"):
        theirs = inspect.signature(getattr(backpack, name)).parameters
        ours = inspect.signature(getattr(packext, name)).parameters
        assert theirs.keys() <= {"extensions" if k == "exts" else k for k in ours} | {"exts"}, name
    assert len(backpack.extensions.__all__) == 19
    for name in backpack.extensions.__all__:
        theirs = list(inspect.signature(getattr(backpack.extensions, name)).parameters)
        assert list(inspect.signature(getattr(extensions, name)).parameters)[: len(theirs)] == theirs, name
    assert packext.BatchGrad([1]).subsampling == [1]
    assert backpack.extensions.BatchGrad().savefield == packext.BatchGrad().savefield == packext.BatchGrad.savefield
