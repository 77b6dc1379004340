"""The callback sees what a monitor in a loop of one's own sees, and changes nothing."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import packext as px
from packext import optim
from packext.diagnostics import (
    Alpha,
    Cockpit,
    Finding,
    GradNorm,
    InputScale,
    Loss,
    NormTest,
    OutputScale,
    Rule,
    SampleNorms,
    UpdateSize,
)
from tests.test_diagnostics import traces

lightning = pytest.importorskip("lightning")

from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from packext.diagnostics.lightning import CockpitCallback  # noqa: E402


class Net(lightning.LightningModule):
    def __init__(self, optimizers: int = 1, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.loss = nn.CrossEntropyLoss()
        self.count, self.automatic_optimization = optimizers, not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self) -> Any:
        made = [torch.optim.SGD(self.parameters(), 0.1, momentum=0.5) for _ in range(self.count)]
        return made[0] if len(made) == 1 else made


class Functional(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)


def loader() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(24, 5, generator=draw), torch.randint(3, (24,), generator=draw)), 4)


class Keep:
    def __init__(self) -> None:
        self.lines: list[Any] = []

    def begin(self, names: list[str]) -> None:
        pass

    def write(self, step: int, values: Any, absent: Any) -> None:
        self.lines.append((step, dict(values), dict(absent)))

    def say(self, verdict: Any) -> None:
        pass


class Scaled(MixedPrecision):
    """A `GradScaler` as with float16, in float32, where what differs is the factor alone."""

    def __init__(self, factor: float) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=factor))

    def autocast_context_manager(self) -> Any:
        return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if "scaler" in options:
        options["plugins"] = [Scaled(options.pop("scaler"))]
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and devices
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **quiet, **options)
        trainer.fit(model, loader())


class Unforwarded(Net):
    """Calls its parts, as most do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(1000 * x), y)


def test_inputs_and_outputs_of_a_module_whose_forward_is_not_called() -> None:
    callback, inputs = CockpitCallback(None, instruments=[InputScale(), OutputScale()]), next(iter(loader()))[0]
    fit(Unforwarded(), callback, max_steps=3)
    assert callback.monitor.absent == {} and callback.monitor.values["OutputScale.spread"] > 0
    assert 0.1 < callback.monitor.values["InputScale"] / float(1000 * inputs.square().mean() ** 0.5) < 10
    assert [v.name for v in callback.monitor.verdicts] == ["bad input scaling"]


class Validated(Net):
    """Hands its validation loss to the monitor."""

    def __init__(self, callback: Any) -> None:
        super().__init__()
        self.callback = callback

    def val_dataloader(self) -> Any:
        return loader()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def on_train_epoch_end(self) -> None:
        self.callback.monitor.log(valid_loss=self.trainer.callback_metrics["val_loss"])


class Rising(Rule):
    failure, advice, reads, hold = "validated", "Nothing.", ("valid_loss",), 2

    looks = 0

    def look(self, step: int, values: Any) -> Finding:
        self.looks += 1
        return Finding(f"Look {self.looks}.")


def test_validation_losses_and_rules_of_ones_own() -> None:
    keep = Keep()
    callback = CockpitCallback(None, instruments=[Loss()], sinks=[keep], rules=[Rising()])
    fit(Validated(callback), callback)
    logged = [(step, values["valid_loss"]) for step, values, _ in keep.lines if "valid_loss" in values]
    assert [step for step, _ in logged] == [5, 11] and 0 < logged[1][1] < 3
    assert [verdict.name for verdict in callback.monitor.verdicts] == ["validated"]
    fit(Validated(callback), callback)  # with rules that have seen nothing
    assert [verdict.evidence for verdict in callback.monitor.verdicts] == ["Look 2."]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    {"accumulate_grad_batches": 4},  # the last step of an epoch has two batches
    {"precision": "bf16-mixed"},
    {"scaler": 1024.0, "accumulate_grad_batches": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_the_same_to_the_last_bit(options: dict[str, Any]) -> None:
    plain, watched = Net(), Net()
    before = traces(watched)
    fit(plain, **options)
    callback = CockpitCallback("full")
    fit(watched, callback, **options)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not px.is_extended(watched) and traces(watched)[1] == before[1]
    steps = {1: 12, 2: 6, 4: 4}[options.get("accumulate_grad_batches", 1)]
    assert callback.monitor.steps == steps and {"Loss", "GradNorm", "NormTest"} <= callback.monitor.values.keys()
    if "precision" in options:
        assert "not symmetric to rounding, as under autocast" in callback.monitor.absent["HessMaxEV"]


@pytest.mark.parametrize("kind", [Net, Functional])
@pytest.mark.parametrize("options", [*OPTIONS[:2], OPTIONS[-1]], ids=str)
def test_the_same_values_as_in_a_loop_of_ones_own(options: dict[str, Any], kind: type[Net]) -> None:
    def asked() -> list[Any]:
        alpha = [Alpha()] if kind is Net else []  # wants the samples' losses
        return [Loss(), GradNorm(), NormTest(), SampleNorms(), UpdateSize(), *alpha]

    found, wanted = Keep(), Keep()
    scale = "sample" if kind is Net else "mean"
    fit(kind(), CockpitCallback(None, sinks=[found], instruments=asked(), scale=scale), **options)
    model = px.extend(Net())
    optimizer = model.configure_optimizers()
    monitor = Cockpit(model, optimizer, None, 1, [wanted], asked())
    torch.manual_seed(7)
    parts = options.get("accumulate_grad_batches", 1)
    for _ in range(2):
        batches = list(loader())
        for k in range(0, len(batches), parts):
            with monitor.step():
                optimizer.zero_grad()
                for x, y in batches[k : k + parts]:
                    (model.loss(model(x), y) / parts).backward()
                nn.utils.clip_grad_norm_(model.parameters(), options.get("gradient_clip_val", 1e9))
                optimizer.step()
    assert len(found.lines) == len(wanted.lines) >= 6
    for (step, values, absent), (number, want, missing) in zip(found.lines, wanted.lines, strict=True):
        assert step == number and values.keys() == want.keys() and absent == missing
        for name, value in want.items():
            assert values[name] == pytest.approx(value, rel=1e-5), name


class Emitting(Net):
    """Of packext's optimizers those that read curvature emit in step(closure), and private ones where it is asked."""

    def __init__(self, private: bool) -> None:
        super().__init__()
        self.private = private

    def configure_optimizers(self) -> Any:
        if not self.private:
            return optim.KFAC(self.net.parameters(), lr=0.05, damping=1e-2)
        return optim.DPSGD(
            self.net.parameters(), 0.1, max_norm=0.5, noise_multiplier=0.5, expected_batch_size=4.0, seed=1
        )

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if not self.private:
            return super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with optim.emit(optimizer.optimizer):
            optimizer_closure()
        optimizer.step()


@pytest.mark.parametrize("private", [False, True])
def test_an_optimizer_that_reads_the_same_pass(private: bool) -> None:
    alone, watched = px.extend(Emitting(private)), Emitting(private)
    if private:
        px.extend(watched)
    fit(alone, epochs=1)
    callback = CockpitCallback("business")
    fit(watched, callback, epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), watched.parameters(), strict=True))
    assert not torch.equal(alone.net[0].weight, Net().net[0].weight)
    assert {"NormTest", "HessTrace", "UpdateSize"} <= callback.monitor.values.keys()
    assert px.is_extended(watched) == private  # as it was before


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(px.PackextError, match="automatic optimization, and Net optimizes manually"):
        fit(Net(manual=True), CockpitCallback())
    model = Functional()
    with pytest.raises(px.NotExtendedError, match="instruments .*NormTest.* loss is not extended.*scale=.mean"):
        fit(model, CockpitCallback())
    with pytest.raises(ValueError, match='scale must be "sample" or "mean", got .loss'):
        CockpitCallback(scale="loss")
    assert not px.is_extended(model)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.optimizers = [torch.optim.SGD(Net().parameters(), 0.1)] * 2
    with pytest.raises(px.PackextError, match="one optimizer, and configure_optimizers of Net gives 2"):
        CockpitCallback().on_train_start(trainer, Net())
    trainer.strategy.optimizers.pop()
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(px.PackextError, match="one process, and the Trainer has 2"):
        CockpitCallback().on_train_start(trainer, Net())
