"""Callbacks hand on the quantities of each step, and the training is as it was without them."""

from __future__ import annotations

import copy
import gc
import os
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import packext as px
from packext import testing
from tests import test_diagnostics_huggingface as hugging
from tests import test_diagnostics_lightning as lightning
from tests.helpers import processes
from tests.test_diagnostics import traces

from lightning.pytorch.strategies import DDPStrategy  # isort: skip
from packext.adapters.huggingface import EmitCallback as ForTransformers  # isort: skip
from packext.adapters.lightning import EmitCallback as ForLightning  # isort: skip


class Keep:
    """Receives, and logs the largest norm."""

    def __init__(self, model: Any) -> None:
        self.model, self.steps, self.norms, self.parameters = model, [], [], []

    def __call__(self, step: int, results: px.Results) -> dict[str, Any]:
        self.steps.append(step)
        self.norms.append(results.batch_l2)
        self.parameters.append(copy.deepcopy(self.model.state_dict()))
        return {"largest": results.batch_l2.max().sqrt()}


@pytest.mark.parametrize(
    "options, every, compiled",
    [
        ({"accumulate_grad_batches": 4}, 1, False), ({}, 5, False), ({"precision": "bf16-mixed"}, 1, False),
        ({}, 5, True),
    ],
    ids=str,
)  # fmt: skip
def test_lightning(options: dict[str, Any], every: int, compiled: bool) -> None:
    plain, model = lightning.Net(), lightning.Net()
    if compiled:
        plain.net, model.net = (torch.compile(m.net, backend="eager") for m in (plain, model))
    before = traces(model)
    lightning.fit(plain, **options)
    keep = Keep(model)
    lightning.fit(model, ForLightning(px.BatchL2Grad(), px.Variance(), receive=keep, every=every), **options)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    assert not px.is_extended(model) and traces(model)[1] == before[1]
    parts = options.get("accumulate_grad_batches", 1)
    steps = {1: 12, 4: 4}[parts]  # of 6 batches in each of 2 epochs
    assert keep.steps == list(range(0, steps, every))
    assert [len(n) for n in keep.norms] == ([4] * len(keep.steps) if parts == 1 else [16, 8, 16, 8])


@pytest.mark.parametrize("scale, options", [("sample", {}), ("sample", {"scaler": 64.0}), (4.0, {"scaler": 64.0})])
def test_lightning_values(scale: str | float, options: dict[str, Any]) -> None:
    """Of a network without dropout, against gradients of one sample at a time; a `GradScaler` is no part of them."""
    model = lightning.Net().double()
    model.net[2] = torch.nn.Identity()
    keep, logged = Keep(model), {}
    model.log_dict = lambda values: logged.setdefault(len(keep.steps) - 1, values)
    x, y = lightning.loader().dataset.tensors
    data = lightning.DataLoader(lightning.TensorDataset(x.double(), y), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning, "loader", lambda: data)
        lightning.fit(model, ForLightning(px.BatchL2Grad(), receive=keep, scale=scale), epochs=1, **options)
    assert len(keep.steps) == len(data) == 6
    for k, (x, y) in enumerate(data):
        model.load_state_dict(keep.parameters[k])
        rows = testing.individual_gradients(model, model.loss, x, y)
        want = torch.cat([r.flatten(1) for r in rows.values()], 1).square().sum(1)
        torch.testing.assert_close(keep.norms[k], want)
        assert logged[k] == {"largest": pytest.approx(float(want.max().sqrt()))}


@pytest.mark.parametrize("parts, every, compiled", [(2, 1, False), (1, 4, False), (2, 1, True), (1, 4, True)])
def test_transformers(parts: int, every: int, compiled: bool, tmp_path: Any) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": parts, "kind": "bert"}
    options |= {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    plain, net = hugging.model("bert"), hugging.model("bert")
    hugging.fit(plain, tmp_path, **options)
    keep = Keep(net)
    callback = ForTransformers(px.BatchL2Grad(), receive=keep, every=every)
    history: list[Any] = []

    class End(hugging.transformers.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            history.extend(line for line in state.log_history if "largest" in line)

    hugging.fit(net, tmp_path, callback, End(), **options)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), net.parameters(), strict=True))
    assert not px.is_extended(net) and not net._forward_hooks
    assert keep.steps == list(range(0, 6 if parts == 1 else 4, every))
    assert [len(n) for n in keep.norms] == ([4] * len(keep.steps) if parts == 1 else [8, 4, 8, 4])
    assert [line["step"] for line in history] == keep.steps
    assert [line["largest"] for line in history] == [float(n.max().sqrt()) for n in keep.norms]


@pytest.mark.parametrize("scaler", [0.0, 1024.0])
def test_transformers_values(scaler: float, tmp_path: Any) -> None:
    """Samples of all accumulated batches, each with its share of the loss; a `GradScaler` is no part of it."""
    net = hugging.model("gpt2").double().eval()
    net.train = lambda mode=True: net  # without dropout
    keep, batches = Keep(net), []
    handle = net.register_forward_pre_hook(lambda m, a, k: batches.append(k), with_kwargs=True)
    callback = ForTransformers(px.BatchL2Grad(), receive=keep)
    hugging.fit(net, tmp_path, callback, gradient_accumulation_steps=3, scaler=scaler)
    handle.remove()
    assert keep.steps == [0, 1] and len(batches) == 6
    for k, norms in enumerate(keep.norms):
        net.load_state_dict(keep.parameters[k])
        mine, want = batches[3 * k : 3 * k + 3], []
        items = float(mine[0]["num_items_in_batch"])
        for b in mine:
            each = {n: v for n, v in b.items() if torch.is_tensor(v) and v.dim() == 2}
            rows = testing.individual_gradients(
                net, lambda out, labels: torch.nn.functional.cross_entropy(
                    out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
                ), {n: v for n, v in each.items() if n != "labels"}, each["labels"],
            )  # fmt: skip
            want.append(torch.cat([r.flatten(1) for r in rows.values()], 1).square().sum(1) / items**2)
        torch.testing.assert_close(norms, torch.cat(want), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"scaler": 64.0}], ids=str)
def test_a_controller_in_lightning(options: dict[str, Any]) -> None:
    """It has the state of one in a loop of one's own, whose passes of a step are one batch."""
    model, plain = lightning.Net(), lightning.Net()
    model.net[2] = plain.net[2] = torch.nn.Identity()
    stopping, other, said = px.optim.EvidenceStopping(2), px.optim.EvidenceStopping(2), []

    def receive(step: int, results: px.Results) -> dict[str, Any]:
        said.append(stopping.step())
        return {"evidence": stopping.evidence}

    lightning.fit(model, ForLightning(stopping, receive=receive), **options)
    model, optimizer, parts = px.extend(plain), plain.configure_optimizers(), options.get("accumulate_grad_batches", 1)
    heard, batches = [], [*lightning.loader()]
    for first in 2 * [*range(0, len(batches), parts)]:
        optimizer.zero_grad()
        with px.optim.emit(other, accumulate=True):
            for x, y in batches[first : first + parts]:
                (model.loss(model(x), y) / parts).backward()
        heard.append(other.step())
        optimizer.step()
    assert said == heard and stopping.skipped == 0
    assert stopping.evidence == pytest.approx(other.evidence, rel=1e-4)


@pytest.mark.parametrize("controls", [False, True])
def test_lightning_goes_on_after_a_batch_without_a_loss(controls: bool) -> None:
    """`training_step` may return None, and Lightning makes no backward pass then."""

    class Skipping(lightning.Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx != 1 else None

    seen: list[int] = []
    asked = px.optim.EvidenceStopping(2) if controls else px.BatchL2Grad()
    lightning.fit(model := Skipping(), ForLightning(asked, receive=lambda step, results: seen.append(step)))
    count = len(lightning.loader())
    assert seen == [step for step in range(2 * count) if step % count != 1] and not px.is_extended(model)


def test_a_controller_in_transformers(tmp_path: Any) -> None:
    net = hugging.model("bert").eval()
    net.train = lambda mode=True: net  # without dropout
    control, wanted, batches = px.optim.NoiseScale(4, 64), [], []
    handle = net.register_forward_pre_hook(lambda m, a, k: batches.append(k), with_kwargs=True)

    def receive(step: int, results: px.Results) -> dict[str, Any]:
        control.step()
        (batch,) = batches[step:]
        each = {n: v for n, v in batch.items() if torch.is_tensor(v) and v.dim()}
        labels = each.pop("labels")
        rows = testing.individual_gradients(
            net, lambda out, y: torch.nn.functional.cross_entropy(out.logits, y, reduction="sum"), each, labels
        )
        g = torch.cat([r.flatten(1) for r in rows.values()], 1)
        trace = float(g.var(0).sum())
        wanted.append((trace, float(g.mean(0).square().sum()) - trace / len(g)))
        del batches[step + 1 :]  # the passes of the comparison
        return {"noise scale": control.noise_scale}

    hugging.fit(net, tmp_path, ForTransformers(control, receive=receive), kind="bert")
    handle.remove()
    assert len(wanted) == 6 and control.skipped == 0
    decayed = [sum(0.05 * 0.95 ** (5 - k) * w[j] for k, w in enumerate(wanted)) for j in range(2)]
    assert control.noise_scale == pytest.approx(decayed[0] / decayed[1], rel=1e-3)


def test_what_is_refused(tmp_path: Any) -> None:
    def receive(step: int, results: px.Results) -> None:
        raise ArithmeticError("enough")

    for kind in (ForLightning, ForTransformers):
        with pytest.raises(ValueError, match="needs quantities"):
            kind(receive=receive)
        with pytest.raises(ValueError, match="every of 1"):
            kind(px.Variance(), receive=receive, every=0)
        with pytest.raises(ValueError, match="several passes"):
            kind(px.BatchDotGrad(), receive=receive)
    model = lightning.Net(manual=True)
    with pytest.raises(px.PackextError, match="manual optimization"):
        lightning.fit(model, ForLightning(px.Variance(), receive=receive))
    assert not px.is_extended(model)
    for options, what in (
        ({"n_gpu": 2}, "DataParallel"), ({"fsdp": "full_shard"}, "FSDP or DeepSpeed"),
        ({"world_size": 2}, "no process knows the loss of all"),
    ):  # fmt: skip
        usual = {"world_size": 1, "n_gpu": 0, "fsdp": "", "deepspeed": None}
        args = SimpleNamespace(**usual | options)
        with pytest.raises(px.PackextError, match=what):
            ForTransformers(px.Variance(), receive=receive).on_train_begin(args, None, None, model=model)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace())
    with pytest.raises(px.PackextError, match="one process or DDPStrategy"):
        ForLightning(px.Variance(), receive=receive, scale="sample").on_train_start(trainer, lightning.Net())
    model = lightning.Net()
    with pytest.raises(ArithmeticError, match="enough"):
        lightning.fit(model, ForLightning(px.Variance(), receive=receive))
    assert not px.is_extended(model)
    model = lightning.Functional()
    with pytest.raises(px.NotExtendedError, match="scale"):
        lightning.fit(model, ForLightning(px.Variance(), receive=receive, scale="sample"))
    assert not px.is_extended(model)
    net, callback = hugging.model("bert"), ForTransformers(px.Variance(), receive=receive)
    with pytest.raises(ArithmeticError, match="enough"):
        hugging.fit(net, tmp_path, callback, kind="bert")
    callback.close()
    assert not px.is_extended(net) and not net._forward_hooks
    with px.backpack(px.Variance()) as results:  # and no context of theirs is open
        torch.nn.functional.cross_entropy(
            px.extend(torch.nn.Linear(2, 2))(torch.ones(2, 2)), torch.ones(2).long()
        ).backward()
    assert len(results) == 2


class Own(torch.nn.Module):
    """A classifier with a loss that is no function of torch's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = torch.nn.Embedding(13, 4), torch.nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.words(input_ids).mean(1))
        chosen = logits.softmax(1).gather(1, labels[:, None])
        return hugging.transformers.modeling_outputs.SequenceClassifierOutput(loss=(1 - chosen).mean(), logits=logits)


def test_a_loss_of_the_models_own(tmp_path: Any) -> None:
    net = Own()
    keep = Keep(net)
    hugging.fit(net, tmp_path, ForTransformers(px.BatchL2Grad(), receive=keep), kind="bert")
    assert [len(n) for n in keep.norms] == [4] * 6 and all((n > 0).all() for n in keep.norms)


def norms_of(model: Any, loss: Any, x: Any, y: Tensor) -> Tensor:
    rows = testing.individual_gradients(model, loss, x, y)
    return torch.cat([r.flatten(1) for r in rows.values()], 1).square().sum(1)


class Noting(lightning.Net):
    """Keeps its batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = [*getattr(self, "seen", []), batch]
        return super().training_step(batch, batch_idx)


def in_lightning(rank: int) -> None:
    model = Noting().double()
    model.net[2] = torch.nn.Identity()
    keep, (x, y) = Keep(model), lightning.loader().dataset.tensors
    lightning.loader = lambda: lightning.DataLoader(lightning.TensorDataset(x.double(), y), 4)
    callback = ForLightning(px.BatchL2Grad(), receive=keep, scale="sample")
    strategy = DDPStrategy(process_group_backend="gloo")
    lightning.fit(model, callback, epochs=1, devices=2, strategy=strategy)
    assert [len(n) for n in keep.norms] == [8, 8, 8] and not px.is_extended(model)
    for k, norms in enumerate(keep.norms):
        model.load_state_dict(keep.parameters[k])
        torch.testing.assert_close(norms.chunk(2)[rank], norms_of(model, model.loss, *model.seen[k]))
    assert not torch.equal(*keep.norms[0].chunk(2))


def in_transformers(rank: int, folder: str) -> None:
    net = hugging.model("bert").double().eval()
    net.train = lambda mode=True: net  # without dropout
    keep, batches = Keep(net), []
    handle = net.register_forward_pre_hook(lambda m, a, k: batches.append(k), with_kwargs=True)
    callback = ForTransformers(px.BatchL2Grad(), receive=keep, scale="sample")
    hugging.fit(net, folder, callback, kind="bert", ddp_backend="gloo", gradient_accumulation_steps=2)
    handle.remove()
    assert [len(n) for n in keep.norms] == [16, 16] and len(batches) == 4
    for k, norms in enumerate(keep.norms):
        net.load_state_dict(keep.parameters[k])
        for part, b in zip(norms.chunk(2)[rank].chunk(2), batches[2 * k :], strict=False):
            inputs = {name: b[name] for name in ("input_ids", "attention_mask")}
            loss = lambda out, labels: torch.nn.functional.cross_entropy(out.logits, labels)  # noqa: E731
            torch.testing.assert_close(part, norms_of(net, loss, inputs, b["labels"]), rtol=1e-5, atol=0.0)


def worker(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")  # advice on devices and loaders
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        NODE_RANK="0", LOCAL_WORLD_SIZE="2",
    )  # fmt: skip
    in_lightning(rank)
    in_transformers(rank, folder)
    torch.distributed.barrier()
    gc.collect()  # groups that outlive this in a model abort the process at its end
    torch.distributed.destroy_process_group()


def test_results_of_two_processes(tmp_path: Any) -> None:
    processes(worker, str(tmp_path))
