"""The callback of transformers' Trainer, against gradients of one sample at a time."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from scipy.sparse import linalg as sparse

import packext as px
from packext import optim
from packext.diagnostics import (
    Alpha,
    Finding,
    GradNorm,
    HessMaxEV,
    HessTrace,
    InnerTest,
    Instrument,
    Loss,
    NormTest,
    Rule,
    Run,
    SampleNorms,
    Step,
)
from packext.diagnostics._observe import _HERE

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from packext.diagnostics.huggingface import CockpitCallback  # noqa: E402


def model(kind: str = "gpt2") -> Any:
    torch.manual_seed(0)
    if kind.startswith("gpt2"):
        config = transformers.GPT2Config(
            vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    if kind == "bert, some ignored":
        return transformers.BertForMaskedLM(config)
    return transformers.BertForSequenceClassification(config)


def data(kind: str = "gpt2", n: int = 12) -> list[dict[str, Any]]:
    """Sequences of 8 tokens, of which some count as padding; "some ignored": of one in each batch all."""
    draw, rows = torch.Generator().manual_seed(1), []
    for k in range(n):
        ids = torch.randint(13, (8,), generator=draw)
        labels = torch.where(torch.arange(8) < 4 + k % 5, ids, -100) if kind != "bert" else ids[0] % 3
        if "some ignored" in kind and k >= n - 3:
            labels[1:] = -100  # the first label of a causal model is of no token before
            labels[0] = ids[0] if kind.startswith("gpt2") else -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), "labels": labels})
    return rows


def fit(
    net: Any,
    folder: Any,
    *callbacks: Any,
    kind: str = "gpt2",
    optimizer: Any = None,
    make: Any = None,
    scaler: float = 0.0,
    **options: Any,
) -> None:
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, report_to=[], seed=3,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-2, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on devices
        trainer = (make or transformers.Trainer)(
            net, args, train_dataset=data(kind), callbacks=list(callbacks), optimizers=(optimizer, None)
        )
        if scaler:  # as with fp16, which needs a GPU
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scaler)
        trainer.train()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("gpt2", {}), ("gpt2", {"gradient_accumulation_steps": 2}), ("bert", {}),
        ("bert", {"torch_compile": True, "torch_compile_backend": "eager"}),
    ],
    ids=str,
)  # fmt: skip
def test_training_is_the_same_to_the_last_bit(kind: str, options: dict[str, Any], tmp_path: Any) -> None:
    plain, watched, callback = model(kind), model(kind), CockpitCallback(every=3 if "torch_compile" in options else 1)
    fit(plain, tmp_path, kind=kind, **options)
    fit(watched, tmp_path, callback, kind=kind, **options)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not px.is_extended(watched) and not watched._forward_hooks
    assert callback.monitor.steps == (4 if "gradient_accumulation_steps" in options else 6)
    assert {"Loss", "GradNorm", "NormTest", "NoiseScale.trace"} <= callback.monitor.values.keys()


@pytest.mark.parametrize("kind, level", [("gpt2, some ignored", "economy"), ("bert, some ignored", None)])
def test_samples_of_which_no_token_counts(kind: str, level: str | None, tmp_path: Any) -> None:
    net, empty = model(kind), []
    spy, asked = Spy(net), [] if level else [Loss(), GradNorm(), NormTest(), SampleNorms()]

    def count(module: Any, args: Any, kwargs: Any) -> None:
        labels = kwargs["labels"][:, 1:] if kind.startswith("gpt2") else kwargs["labels"]
        empty.append(sum(set(row) == {-100} for row in labels.tolist()))

    net.register_forward_pre_hook(count, with_kwargs=True)
    fit(net, tmp_path, CockpitCallback(level, sinks=[spy], instruments=asked), kind=kind)
    lines = [(values, absent) for _, values, absent in spy.lines if "Loss" in values]
    assert len(lines) == len(empty) == 6 and 0 in empty and any(empty)
    for (values, absent), none in zip(lines, empty, strict=True):
        assert "GradNorm" in values
        for name in ("NormTest", "SampleNorms"):
            assert name in values if not none else f"{none} of 4 samples have no target that counts" in absent[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_numbers_to_be_predicted_are_no_labels_that_do_not_count(dtype: torch.dtype, tmp_path: Any) -> None:
    """A loss of its own that takes -100 for a number, as any other."""

    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(8, 1)

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
            logits = self.head(input_ids.float())
            own = (logits[:, 0] - labels).square().mean()
            return transformers.modeling_outputs.SequenceClassifierOutput(loss=own, logits=logits)

    rows = [{**row, "labels": torch.tensor(-100 + k % 3, dtype=dtype)} for k, row in enumerate(data())]
    callback = CockpitCallback(None, instruments=[NormTest(), Each()])
    fit(Regression(), tmp_path, callback, make=lambda *a, **k: transformers.Trainer(*a, **{**k, "train_dataset": rows}))
    assert callback.monitor.values["NormTest"] > 0
    assert callback.monitor.absent["Each"] == "the samples' parts of the loss are not known"


class Spy:
    """A sink, and the batches and parameters of each step."""

    def __init__(self, net: Any) -> None:
        self.net, self.lines, self.starts, self.batches = net, [], [], []

    def begin(self, names: list[str]) -> None:
        pass

    def write(self, step: int, values: Any, absent: Any) -> None:
        self.lines.append((step, dict(values), dict(absent)))

    def say(self, verdict: Any) -> None:
        pass


class Each(Instrument):
    """Individual losses."""

    losses = True
    needs = (px.BatchL2Grad(),)

    def measure(self, step: Step) -> torch.Tensor:
        return step.losses


def trace_of_ggn(net: Any, logits: torch.Tensor) -> float:
    """Of the cross-entropy of one sample with logits `[C]`, by the columns of a root of its Hessian."""
    p = logits.detach().softmax(0)
    values, vectors = torch.linalg.eigh(p.diag() - p[:, None] * p)
    total = 0.0
    for column in (vectors * values.clamp(min=0).sqrt()).mT:
        grads = torch.autograd.grad(logits, list(net.parameters()), column, retain_graph=True, allow_unused=True)
        total += sum(float(g.square().sum()) for g in grads if g is not None)
    return total


def largest(net: Any, loss: torch.Tensor) -> float:
    """Largest eigenvalue of the Hessian of a loss, by scipy's Lanczos."""
    parameters = list(net.parameters())
    slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    pairs = [(s, p) for s, p in zip(slopes, parameters, strict=True) if s is not None]
    flat = torch.cat([s.flatten() for s, _ in pairs])

    def product(v: Any) -> Any:
        found = torch.autograd.grad(flat, [p for _, p in pairs], torch.as_tensor(v).flatten(), retain_graph=True)
        return torch.cat([f.flatten() for f in found]).numpy()

    operator = sparse.LinearOperator((len(flat), len(flat)), product, dtype="float64")
    return float(sparse.eigsh(operator, 1, which="LA", tol=1e-6, return_eigenvectors=False)[0])


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("parts", [1, 2])  # of 3 batches to an epoch: with 2, its last step has a single one
def test_values_against_one_sample_at_a_time(kind: str, parts: int, tmp_path: Any) -> None:
    """One with a `GradScaler`, whose factor is in no value."""
    scaler = 1024.0 if (kind, parts) in (("gpt2", 2), ("bert", 1)) else 0.0
    net = model(kind)
    for m in net.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        for name in ("dropout_prob", "attn_dropout"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)
    spy = Spy(net)
    net.config._attn_implementation = "eager"
    seen: list[Any] = []

    class Watcher(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seen.append((copy.deepcopy({k: p.detach() for k, p in net.named_parameters()}), []))

    asked = [Loss(), GradNorm(), NormTest(), InnerTest(), SampleNorms(), Alpha(), Each()]
    if kind == "bert":
        asked += [HessTrace("ggn"), HessMaxEV(tol=1e-3)]
    callback = CockpitCallback(None, sinks=[spy], instruments=asked)

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            seen[-1][1].append({k: v for k, v in kwargs.items() if torch.is_tensor(v)})

    handle = net.register_forward_pre_hook(keep, with_kwargs=True)
    fit(net, tmp_path, Watcher(), callback, kind=kind, gradient_accumulation_steps=parts, scaler=scaler)
    handle.remove()
    lines = [line for line in spy.lines if "Loss" in line[1]]
    assert len(lines) == len(seen) == (6 if parts == 1 else 4)
    alphas = [line for line in spy.lines if "Alpha" in {**line[1], **line[2]}]
    assert any("Alpha" in values for _, values, _ in alphas)
    net.double()
    for (number, values, _), (start, batches) in zip(lines, seen, strict=True):
        net.load_state_dict(start, strict=False)
        rows, losses, n = [], [], sum(len(b["labels"]) for b in batches)
        ggn = 0.0
        total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches) if kind == "gpt2" else 0
        for b in batches:
            for k in range(len(b["labels"])):
                one = {name: v[k : k + 1] for name, v in b.items() if v.dim()}
                output = net(input_ids=one["input_ids"], attention_mask=one["attention_mask"], labels=one["labels"])
                own = output.loss  # a mean over the sample's tokens
                if kind == "gpt2":
                    items = b.get("num_items_in_batch", torch.tensor(total))
                    own = own * (one["labels"][:, 1:] != -100).sum() / items * n
                else:  # the model ignores the number of items, and the Trainer adds the means of the batches up
                    own = own * len(batches)
                    ggn += trace_of_ggn(net, output.logits[0]) * len(batches) / n
                net.zero_grad()
                own.backward()
                rows.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
                losses.append(float(own.detach()))
        g = torch.stack(rows)
        assert values["Loss"] == pytest.approx(sum(losses) / n, rel=1e-4)
        assert values["Each"] == pytest.approx(losses, rel=1e-4)
        assert values["GradNorm"] == pytest.approx(float(g.mean(0).norm()), rel=1e-3)
        assert values["SampleNorms"] == pytest.approx(float(g.norm(dim=1).mean()), rel=1e-3)
        trace = (g - g.mean(0)).square().sum() / (n - 1)
        assert values["NormTest"] == pytest.approx(float((trace / n).sqrt() / g.mean(0).norm()), rel=1e-3)
        if kind == "bert":
            assert values["HessTrace"] == pytest.approx(ggn, rel=1e-3)
        if kind == "bert" and number == 0 and parts == 1:
            named = {name: v for name, v in batches[0].items() if v.dim()}
            top = largest(net, net(**named).loss)
            assert abs(values["HessMaxEV"] - top) <= values["HessMaxEV.residual"] + 1e-3 * top
        if len(batches) == 1:
            along = g @ g.mean(0)
            assert values["InnerTest"] == pytest.approx(
                float(along.std() / n**0.5 / g.mean(0).square().sum()), rel=1e-3
            )


class Emitting(transformers.Trainer):
    """Hands each of its passes to an optimizer of packext's."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with optim.emit(self.optimizer.optimizer):
            return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("private", [False, True])
def test_an_optimizer_that_reads_the_same_passes(private: bool, tmp_path: Any) -> None:
    ends = []
    for callbacks in ([], [CockpitCallback()]):
        net = px.extend(model()) if not callbacks else model()
        optimizer: Any = optim.MSVAG(net.parameters(), lr=1e-2)
        if private:
            optimizer = optim.DPSGD(
                net.parameters(), 0.1, max_norm=0.5, noise_multiplier=0.5, expected_batch_size=8.0, seed=1
            )
        options = {"optimizer": optimizer, "make": Emitting, "max_grad_norm": 0.0 if private else 1.0}
        fit(net, tmp_path, *callbacks, gradient_accumulation_steps=2, **options)
        ends.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    assert {"NormTest", "GradNorm", "UpdateSize"} <= callbacks[0].monitor.values.keys()


def test_what_is_refused(tmp_path: Any) -> None:
    with pytest.raises(px.PackextError, match="does not work with label_smoothing_factor"):
        fit(model(), tmp_path, CockpitCallback(), label_smoothing_factor=0.1)


def test_after_an_error(tmp_path: Any) -> None:
    net, callback = model(), CockpitCallback()

    def boom(*_: Any) -> None:
        raise ZeroDivisionError

    handle = net.lm_head.register_forward_hook(boom)
    with pytest.raises(ZeroDivisionError):
        fit(net, tmp_path, callback)
    handle.remove()
    assert px.is_extended(net)
    callback.close()
    assert not px.is_extended(net) and not net._forward_hooks and not _HERE.steps
    fit(net, tmp_path, callback)
    assert "NormTest" in callback.monitor.values
    handle = net.lm_head.register_forward_hook(boom)
    with pytest.raises(ZeroDivisionError):
        fit(net, tmp_path, callback)
    handle.remove()
    fit(net, tmp_path, callback)  # which leaves nothing behind of what has failed before
    assert "NormTest" in callback.monitor.values
    assert not px.is_extended(net) and not net._forward_hooks and not _HERE.steps


def test_after_an_error_another_callback_is_not_disturbed(tmp_path: Any) -> None:
    """Whose loss nothing is known of is refused for curvature; the next training asks for none."""

    class Elsewhere(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(**inputs).logits.square().mean()

    failed = CockpitCallback(None, instruments=[HessTrace()])
    with pytest.raises(px.NotExtendedError, match="no extended loss"):
        fit(model(), tmp_path, failed, make=Elsewhere)
    with pytest.raises(px.PackextError, match=r"different scales.*whose training has failed.*close\(\)"):
        layer = px.extend(torch.nn.Linear(2, 2))
        monitor = px.diagnostics.Cockpit(layer, torch.optim.SGD(layer.parameters(), 0.1))
        with monitor.step():
            pass
    callback = CockpitCallback(None, instruments=[Loss(), NormTest()])
    fit(model(), tmp_path, callback)
    assert {"Loss", "NormTest"} <= callback.monitor.values.keys() and not _HERE.steps
    failed.close()


class Own(torch.nn.Module):
    """A module that is none of transformers' and computes its loss itself, by a module that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.loss = torch.nn.Linear(8, 3), torch.nn.CrossEntropyLoss()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        logits = self.head(input_ids.float())
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=self.loss(logits, labels), logits=logits)


def test_a_module_of_ones_own(tmp_path: Any) -> None:
    callback = CockpitCallback(None, instruments=[Loss(), NormTest(), Each()])
    fit(Own(), tmp_path, callback, kind="bert", remove_unused_columns=False)
    assert {"Loss", "NormTest"} <= callback.monitor.values.keys()
    assert float(callback.monitor.values["Each"].mean()) == pytest.approx(callback.monitor.values["Loss"])


class Said(Rule):
    failure, advice, reads, hold = "said", "Nothing.", ("Loss",), 1
    looks = 0

    def look(self, step: int, values: Any) -> Finding:
        self.looks += 1
        return Finding(f"Look {self.looks}.")


def test_evaluations_within_the_training_and_rules_of_ones_own(tmp_path: Any) -> None:
    net, callback, losses = model("bert"), CockpitCallback(sinks=[Run(tmp_path / "run")], rules=[Said()]), []
    trainers: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        trainers.append(transformers.Trainer(*args, **kwargs, eval_dataset=data("bert")))
        trainers[0].evaluate()  # before there is a monitor
        return trainers[0]

    fit(net, tmp_path, callback, kind="bert", make=make, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    losses = [row["eval_loss"] for row in trainers[0].state.log_history if "eval_loss" in row and row["step"] > 0]
    trainers[0].evaluate()  # nor is this one a part of the training
    found = Run.open(tmp_path / "run")
    logged = found.column("valid_loss")
    assert [found.steps[k] for k in range(6) if logged[k] == logged[k]] == [1, 3, 5]
    assert logged[logged == logged].tolist() == losses and len(losses) == 3
    assert [verdict.name for verdict in callback.monitor.verdicts] == ["said"]


def test_a_second_training_has_rules_that_have_seen_nothing(tmp_path: Any) -> None:
    callback = CockpitCallback(None, instruments=[Loss(), NormTest()], rules=[Said()])
    for _ in range(2):
        fit(model("bert"), tmp_path, callback, kind="bert", max_steps=2)
        assert [verdict.evidence for verdict in callback.monitor.verdicts] == ["Look 2."]


def test_a_record(tmp_path: Any) -> None:
    fit(model(), tmp_path, CockpitCallback(every=2, sinks=[Run(tmp_path / "run")]))
    assert Run.open(tmp_path / "run").steps == [0, 2, 4]
