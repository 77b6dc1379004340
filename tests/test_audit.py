"""The audit: planted leaks are reported, what is undefined is said to be, and nothing is touched."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import _cli, attacks, defences, demo
from packext.audit import Budget, Data, Interval, Sharing, run
from packext.audit._run import _Store
from packext.audit.case import Case, Clock, fingerprint
from packext.audit.closed import LayerCheck, closed, divided, read_off
from packext.audit.findings import BY_CHANCE, _sweep, _told, beyond, findings, odds, percent
from packext.audit.inversion import Attempt, SearchResult, _identified, _summary, attempt, guess, inversion
from packext.audit.labels import by_chance, labels
from packext.audit.records import ScoreResult, _rate, epsilon, membership, records, roc
from packext.audit.section import plain, restored
from packext.audit.setting import integrity, setting
from packext.audit.sharing import fresh, name_of
from packext.audit.sweep import Defended, _time, candidates, expected, known, local, misfit_of, sweep

FEW = Budget(1e6, draws=2, seeds=1, restarts=1, iterations=2, shadows=4)
LOSS = nn.CrossEntropyLoss()


def images(n: int = 40, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 4, 4, generator=generator), torch.randint(classes, (n,), generator=generator)


def linear(classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 12), nn.BatchNorm1d(12),
        nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip


def case(model: nn.Module | None = None, data: Any = None, sharing: Sharing | None = None, loss: Any = LOSS) -> Case:
    return Case(linear() if model is None else model, loss, data or images(), sharing or Sharing(), FEW)


def titles(audit: px.audit.Audit, severity: str) -> str:
    return " ".join(f.title for f in audit.findings if f.severity == severity)


def flat(shared: attacks.Shared) -> Tensor:
    return torch.cat([g.flatten().double() for g in shared.gradient.values()])


@pytest.fixture(autouse=True)
def short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer draws for labels and direction, and fewer alternations for time."""
    monkeypatch.setattr("packext.audit.sweep.DRAWS", 2)
    monkeypatch.setattr("packext.audit.sweep.TURNS", 6)


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the longest section."""
    monkeypatch.setattr("packext.audit._run.sweep", lambda *args: px.audit.Sweep())


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, no_sweep: None) -> None:
    """Without searches either."""
    monkeypatch.setattr("packext.audit._run.inversion", lambda *args: px.audit.Inversion())


# The whole


@pytest.mark.usefixtures("no_sweep")
def test_a_biased_layer_and_one_sample_is_reported_as_exact(tmp_path: Path) -> None:
    audit = run(linear(), LOSS, images(), Sharing(batch_size=1), budget=FEW, out=tmp_path)
    (layer,) = audit.closed.layers
    assert layer.is_input and layer.divided is not None and layer.divided.value == 1.0 and layer.rank == 1.0
    assert audit.findings[0].severity == "high" and "the clients' inputs themselves" in titles(audit, "high")
    rules = {r.rule: r for r in audit.labels.rules}
    assert rules["iDLG"].accuracy.value == 1.0 and audit.labels.identity == 1.0
    page = (tmp_path / "audit.html").read_text()
    assert "the clients&#x27; inputs themselves" in page and page.count("data:image/png;base64") == 3
    assert "http" not in page and "<script" not in page  # it opens without a network
    assert (tmp_path / "inversion.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written == audit.to_json() and written["sections"]["closed"]["layers"][0]["divided"]["value"] == 1.0


@pytest.mark.usefixtures("bare")
def test_a_fishing_model_is_reported() -> None:
    model, (x, y) = normed().eval(), images(80)
    assert not integrity(case(model, (x, y)), Clock(1.0)).reasons
    plan = attacks.SecureAggregationLabels().plan(model, x[:4], 4)
    model.load_state_dict(plan.states[1], strict=False)
    audit = run(model, LOSS, (x, y), Sharing(server="malicious"), budget=FEW)
    assert audit.integrity.reasons and audit.findings[0].section == "integrity"
    assert "bears the traces of a fishing model" in titles(audit, "high")


def test_an_audit_that_is_killed_while_it_writes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, key = Path.write_text, {"seed": 0}

    def killed(self: Path, text: str, *args: Any) -> int:
        write(self, text[:3], *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_text", killed)
        _Store(tmp_path, key, False)
    assert _Store(tmp_path, key, False).read("closed", px.audit.Closed) is None
    with pytest.raises(px.PackextError, match="an audit of something else: seed differ"):
        _Store(tmp_path, {"seed": 1}, False)


@pytest.mark.usefixtures("no_sweep")
def test_an_audit_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str, done: float) -> None:
        if name == "inversion":
            raise KeyboardInterrupt

    data = Data(images(), images(seed=1))
    with pytest.raises(KeyboardInterrupt):
        run(linear(), LOSS, data, budget=FEW, out=tmp_path, progress=interrupt)
    kept = {p.name for p in (tmp_path / "audit-sections").glob("*.json")}
    assert kept == {"key.json", "setting.json", "integrity.json", "closed.json", "labels.json"}
    whole = run(linear(), LOSS, data, budget=FEW)
    with monkeypatch.context() as patch:
        patch.setattr("packext.audit._run.labels", lambda *args: pytest.fail("was done already"))
        audit = run(linear(), LOSS, data, budget=FEW, out=tmp_path)
        assert audit.labels.rules == whole.labels.rules and audit.inversion.searches == whole.inversion.searches
        again = run(linear(), LOSS, data, budget=FEW, out=tmp_path)
    assert again.to_json() == audit.to_json() and again.inversion.arrays.keys() == audit.inversion.arrays.keys()
    for changed, what in (
        ({"model": linear(seed=1)}, "model"),
        ({"data": images(seed=3)}, "data"),
        ({"sharing": Sharing(batch_size=4)}, "sharing"),
        ({"seed": 1}, "seed"),
    ):
        arguments: dict[str, Any] = {"model": linear(), "data": data, "sharing": Sharing()} | changed
        with pytest.raises(px.PackextError, match=f"something else: .*{what}.*fresh=True"):
            run(loss_fn=LOSS, budget=FEW, out=tmp_path, **arguments)
    (tmp_path / "mine.txt").write_text("stays")
    other = run(linear(), LOSS, images(seed=3), budget=FEW, out=tmp_path, fresh=True)
    assert other.setting.fingerprint == whole.setting.fingerprint and (tmp_path / "mine.txt").exists()


def test_names_in_the_json_are_stable() -> None:
    data = Data(images(), images(seed=1))
    audit = run(linear(), LOSS, data, budget=FEW, train=lambda x, y: linear(), utility=lambda share: 0.5)
    found = audit.to_json()
    assert found["schema"] == px.audit.SCHEMA == 1
    section = {"threats", "absent", "seconds"}
    names = {
        "setting": "shared server sharing behind model architecture fingerprint parameters batchnorm mode dtype "
        "loss_fn members heldout training_stage versions date",
        "integrity": "feature_variance rank_ratio without_gradient zero_scales reasons samples",
        "closed": "layers embeddings draws samples",
        "labels": "samples classes guess identity rules cohort capacity clients_exact rounds doubt",
        "inversion": "searches texts words planned psnr_guess",
        "records": "samples batch worst norm_quantiles share_quantiles dominating suggested_clip norms leverages "
        "indices",
        "membership": "members others scores bound bound_by_chance shadows",
        "epsilon": "claimed delta measured confidence correct guesses canaries choices",
        "sweep": "rows iterations psnr_guess",
    }
    assert {k: set(v) for k, v in found["sections"].items()} == {k: set(v.split()) | section for k, v in names.items()}
    rows = {
        ("closed", "layers"): "name features outputs is_input inputs divided alone rank spanned false_alarms",
        ("labels", "rules"): "rule accuracy exact over_guess draws chance",
        ("inversion", "searches"): "search samples seeds restarts iterations recovered identified candidates mse "
        "mse_best mse_worst psnr psnr_best psnr_worst labels matched objective",
        ("records", "worst"): "index label loss norm leverage share",
        ("membership", "scores"): "score auc tpr_001 tpr_01 advantage",
        ("sweep", "rows"): "name adapted labels rule guess divided psnr psnr_best recovered seeds signal accuracy time",
    }
    for (name, part), keys in rows.items():
        assert set(found["sections"][name][part][0]) == set(keys.split()), (name, part)
    assert set(found["findings"][0]) == {"severity", "section", "title", "evidence", "advice"}
    order = [px.audit.findings.SEVERITIES.index(f["severity"]) for f in found["findings"]]
    assert order == sorted(order)
    for name in names:
        made = getattr(audit, name)
        back = restored(type(made), json.loads(json.dumps(plain(made), allow_nan=False)))
        assert plain(back) == plain(made) and type(back) is type(made)
    assert audit.membership.shadows == 4 and audit.sweep.rows[0].accuracy == 0.5
    assert isinstance(audit.membership.scores[0].auc, Interval) and "MEDIUM" in str(audit)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_is_touched(mode: str, request: pytest.FixtureRequest) -> None:
    if mode == "eval":
        request.getfixturevalue("no_sweep")
    model = getattr(normed(), mode)()
    x, y = images()
    LOSS(model(x), y).backward()
    model[4].register_forward_hook(lambda module, args, out: None)
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    state = torch.get_rng_state()
    noise = defences.GaussianNoise(0.1)
    held = copy.deepcopy(noise._generator.get_state())

    def utility(share: Any) -> float:
        torch.manual_seed(5)
        return float(len(share(model, LOSS, x, y).gradient) > 0)

    audit = run(model, LOSS, Data((x, y), images(seed=1)), Sharing(defence=noise), budget=FEW, utility=utility)
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[1], strict=True))
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(noise._generator.get_state(), held)
    assert not px.is_extended(model) and not px.is_extended(LOSS)
    assert audit.setting.batchnorm == ("training" if mode == "train" else "evaluation")
    if mode == "train":  # samples influence each other: they have no gradients of their own
        assert "BatchNorm" in audit.records.absent["individual gradients"] and not audit.records.norms
        assert audit.membership.scores  # of the trained model, in evaluation mode
        assert any("clip" in k for k in audit.sweep.absent)
        own = audit.sweep.rows[1]
        assert own.name.startswith("as audited: GaussianNoise(std=0.1") and own.accuracy == 1


# What leaves a client


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_over_clients_is_the_gradient_of_all_samples(reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    seen = case(sharing=Sharing(batch_size=4, secure_aggregation=True, clients=3), loss=loss)
    x, y = seen.x[:12], seen.y[:12]
    torch.testing.assert_close(
        flat(seen.message(x, y)), flat(attacks.share(linear(), loss, x, y)), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("steps", "samples"), [(3, 4), (2, 8), (4, 8), (4, 6)])
def test_an_update_is_a_gradient_to_first_order(reduction: str, steps: int, samples: int) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    sharing = Sharing("update", batch_size=4, local_steps=steps, lr=1e-7, samples=samples)
    seen = case(linear().double(), (images()[0].double(), images()[1]), sharing, loss)
    x, y = seen.x[:samples], seen.y[:samples]
    batches = [flat(attacks.share(seen.model, loss, *b)) for b in zip(x.split(4), y.split(4), strict=True)]
    want = sum(batches) / (len(batches) if reduction == "mean" else 1)
    torch.testing.assert_close(flat(seen.as_gradient(seen.message(x, y))), want, rtol=1e-4, atol=1e-7)


def test_a_defence_is_that_of_a_client_which_sends_for_the_first_time() -> None:
    noise, top = defences.GaussianNoise(0.1, seed=3), defences.TopK(0.5)
    seen = case(sharing=Sharing(defence=defences.Compose(noise, top)))
    x, y = seen.x[:8], seen.y[:8]
    first, second = (flat(seen.message(x, y)) for _ in range(2))
    assert not torch.equal(first, second) and not top.residual
    again = case(sharing=Sharing(defence=defences.Compose(noise, top)))
    assert torch.equal(flat(again.message(x, y)), first)
    assert torch.equal(flat(seen.message(x, y, defended=False)), flat(attacks.share(seen.model, LOSS, x, y)))
    clipped = case(sharing=Sharing(defence=defences.Clipped(0.1)))
    want = defences.Clipped(0.1)(clipped.model, LOSS, x, y)
    assert torch.equal(flat(clipped.message(x, y)), flat(want))
    further = defences.Compose(defences.Clipped(0.1), defences.Pruning(0.5))
    both = case(sharing=Sharing(defence=further))
    assert torch.equal(flat(both.message(x, y)), flat(defences.Pruning(0.5)(want)))
    assert fresh(None, 1) is None and name_of(len) == "builtins.len"
    twice = fresh(defences.Compose(defences.GaussianNoise(1.0), defences.GaussianNoise(1.0)), 1)
    assert abs(float(flat(twice(attacks.Shared({"w": torch.zeros(10_000)}, 1, LOSS))).std()) - 2**0.5) < 0.05
    top(attacks.share(seen.model, LOSS, x, y))  # which holds something back from now on
    assert top.residual and torch.equal(flat(again.message(x, y)), second)
    assert name_of(defences.Compose(noise, top)) == "GaussianNoise(std=0.1, seed=3) + TopK(share=0.5)"
    assert name_of(defences.Clipped(1.0)) == repr(defences.Clipped(1.0))  # which has no seed
    assert name_of((480, 500, 500)) == "(480, 500, 500)"  # of other canaries a record is of another audit


def test_each_client_of_a_cohort_holds_back_by_itself() -> None:
    sharing = Sharing(batch_size=4, secure_aggregation=True, clients=3, defence=defences.TopK(0.2))
    seen = case(sharing=sharing)
    batches = [(seen.x[4 * k : 4 * k + 4], seen.y[4 * k : 4 * k + 4]) for k in range(3)]
    total = seen.cohort(batches).round([{}] * 3)
    want = sum(flat(defences.TopK(0.2)(attacks.share(seen.model, LOSS, x, y))) for x, y in batches)
    torch.testing.assert_close(torch.cat([g.flatten() for g in total.values()]), want, rtol=0, atol=1e-6)


def test_samples_that_are_withheld_are_not_counted() -> None:
    sharing = Sharing(batch_size=4, secure_aggregation=True, clients=2, defence=defences.Withholding(1))
    seen = case(sharing=sharing)
    assert seen.message(seen.x[:8], seen.y[:8]).n == 6
    absent = inversion(seen, Clock(1e6)).absent
    assert "6 of 8 samples are behind the message" in absent["Inverting Gradients, 8 samples"]


# Sections


@pytest.mark.usefixtures("bare")
def test_a_model_that_is_a_layer_itself() -> None:
    x, y = images()
    audit = run(nn.Linear(16, 5), LOSS, (x.flatten(1), y), Sharing(batch_size=1), budget=FEW)
    (layer,) = audit.closed.layers
    assert layer.name == "Linear" and layer.divided is not None and layer.divided.value == layer.rank == 1.0
    assert "Layer 'Linear' gives the clients' inputs themselves away" in titles(audit, "high")


def test_a_model_that_does_not_run_on_one_sample_is_audited_as_far_as_it_goes(no_sweep: None) -> None:
    audit = run(normed().train(), LOSS, images(), Sharing(batch_size=1), budget=FEW)
    for section in (audit.closed, audit.labels):
        assert "more than 1 value per channel" in section.absent["message"]
    assert not audit.closed.layers and audit.integrity.feature_variance
    swept = sweep(case(normed().train(), sharing=Sharing(batch_size=1)), Clock(1.0))
    assert "more than 1 value per channel" in swept.absent["noise"] and swept.rows[0].signal is None
    few = closed(case(normed().train(), images(9)), Clock(1.0))  # one sample is left over
    assert few.layers[0].rank and "more than 1 value" in few.absent["inputs that were not in the batch"]


def test_what_a_client_s_batchnorm_sees_is_its_own_batch() -> None:
    """Inputs of layers behind it are those of each client by itself, and lie in the span of the sum."""
    sharing = Sharing(batch_size=2, secure_aggregation=True, clients=2)
    found = closed(case(normed().train(), images(80), sharing), Clock(1e6))
    assert found.layers[-1].spanned is not None and found.layers[-1].spanned.value == 1.0


@pytest.mark.usefixtures("bare")
def test_samples_without_a_gradient() -> None:
    """More than half of them: there is no median to clip to, and single ones make up a batch's gradient."""
    torch.manual_seed(0)
    x = torch.zeros(40, 16)
    x[:, 0], y = 10.0, torch.zeros(40, dtype=torch.int64)
    y[::10] = 1
    model = nn.Linear(16, 2)
    with torch.no_grad():
        model.weight.zero_()[0, 0] = 1.0
    audit = run(model, nn.MultiMarginLoss(), (x, y), Sharing(batch_size=4), budget=FEW)
    assert audit.records.suggested_clip is None and audit.records.dominating
    (finding,) = (f for f in audit.findings if f.section == "records")
    assert finding.advice == "Look at these records; clip gradients of samples."


def test_who_sees_a_gradient_of_zero_guesses() -> None:
    """Samples that a hinge loss has learnt count among those that are not recovered, and not as if never attacked."""
    x = torch.cat([10 + torch.rand(40, 1), torch.rand(40, 15)], 1)
    model = nn.Linear(16, 3)
    with torch.no_grad():
        model.weight.zero_()[0, 0] = 1.0
    seen = case(model, (x, torch.zeros(40, dtype=torch.int64)), Sharing(batch_size=2), nn.MultiMarginLoss())
    found = inversion(seen, Clock(1e6))
    assert [(r.samples, r.seeds, r.matched, r.recovered.value) for r in found.searches] == [(1, 1, 0, 0), (2, 1, 0, 0)]
    assert all(r.objective is None for r in found.searches)
    for r in found.searches:
        mse = (x.double().mean(0) - x[seen.draw(100, r.samples)]).square().mean(1)
        assert abs(r.psnr - float((10 * ((x.max() - x.min()) ** 2 / mse).log10()).mean())) < 1e-5


@pytest.mark.usefixtures("bare")
def test_a_loss_that_is_not_finite_is_absent(tmp_path: Path) -> None:
    data = Data(images(), (3e38 * images(seed=1)[0], images(seed=1)[1]))
    for _ in range(2):  # the second time, sections are read
        audit = run(linear(), LOSS, data, budget=FEW, out=tmp_path)
        assert "their mean loss is" in audit.setting.absent["loss of others"]
        assert set(audit.setting.training_stage) == {"loss of members", "accuracy of members"}


def test_generators_of_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch, bare: None) -> None:
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds all devices"))
    assert run(nn.Linear(16, 5), LOSS, (images()[0].flatten(1), images()[1]), budget=FEW).labels.rules


def test_labels_of_a_class_that_the_loss_ignores() -> None:
    found = labels(case(loss=nn.CrossEntropyLoss(ignore_index=0)), Clock(1.0))
    assert "ignores class 0" in found.absent["labels"] and found.identity is None


@pytest.mark.parametrize("what", [{"label_smoothing": 0.1}, {"weight": torch.ones(5)}])
def test_a_cross_entropy_that_no_rule_reads(what: dict[str, Any]) -> None:
    found = labels(case(loss=nn.CrossEntropyLoss(**what)), Clock(1.0))
    assert not found.rules and found.identity is None and found.guess is not None
    assert all("Labels are read off" in found.absent[rule] for rule in ("LLG", "iLRG", "LLG*"))


def test_a_layer_that_not_all_rules_read() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False))
    found = labels(case(model), Clock(1.0))
    assert {r.rule for r in found.rules} == {"LLG", "LLG*"} and "has no bias" in found.absent["iLRG"]
    frozen = labels(
        case(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 5).requires_grad_(False))), Clock(1.0)
    )
    assert not frozen.rules and "'2.weight' is not in what was shared" in frozen.absent["LLG"]


class Keyword(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.norm(x.flatten(1)).relu())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"weight": torch.tensor([0.1, 1.0, 5.0])}, {"ignore_index": 1}])
def test_the_loss_of_many_members_is_that_of_all_at_once(reduction: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(600, 6), torch.randint(3, (600,))
    y[:280] = 0
    y[300:580] = 1
    loss = nn.CrossEntropyLoss(reduction=reduction, **options)
    stage = setting(Case(model, loss, (x, y), Sharing(), FEW), Clock(1.0)).training_stage
    want = float(loss(model(x), y).detach()) / (600 if reduction == "sum" else 1)
    assert stage["loss of members"] == pytest.approx(want, rel=1e-5)


def test_a_layer_that_is_called_by_keyword() -> None:
    model, (x, y) = Keyword(), images()
    model.unused = nn.Embedding(3, 2)
    found = closed(case(model), Clock(1.0))
    (layer,) = found.layers
    assert layer.alone is not None and layer.alone.value == 1.0
    assert not found.embeddings and "does not call it" in found.absent["unused"]
    assert not defences.check_received(model, LOSS, x, y).suspicious
    assert defences.sensitivity(model, x)[0].shape == (40, 16)
    assert attacks.SecureAggregationLabels().plan(model, x, 3).features.shape == (3, 16)


class Folded(nn.Module):
    """Gives its layers rows of `width` entries, in whatever shape inputs come."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.layers = width, nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(-1, self.width)).view(len(x), -1, 5).mean(1)


@pytest.mark.parametrize("defence", [None, defences.Clipped(1.0)])
def test_a_layer_behind_dropout_gives_away_what_it_saw(defence: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3)).train()
    data = torch.randn(12, 6), torch.randint(3, (12,))
    for n in (1, 2):
        found = closed(Case(model, LOSS, data, Sharing(batch_size=n, defence=defence), FEW), Clock(60.0))
        layer = found.layers[-1]
        assert layer.name == "3" and layer.alone is not None and layer.alone.value == 1.0
        assert layer.spanned is not None and layer.spanned.value == 1.0


def test_a_layer_that_sees_the_inputs_in_another_shape_sees_them() -> None:
    seen = case(Folded(4))
    first, second = closed(seen, Clock(1.0)).layers
    assert first.is_input and first.inputs == 4 * seen.sharing.batch_size and not second.is_input


def test_samples_of_one_number_each() -> None:
    """`[N]`: inputs without an axis beside that of samples."""
    seen = case(Folded(1), (images()[0][:, 0, 0, 0], images()[1]), Sharing(batch_size=2))
    first, _ = closed(seen, Clock(1.0)).layers
    assert first.is_input and integrity(seen, Clock(1.0)).samples == 40
    assert read_off(seen, seen.message(seen.x[:1], seen.y[:1]), seen.x[:1]) == 1.0
    found = inversion(seen, Clock(1e6))
    assert [r.samples for r in found.searches] == [1, 1, 2, 2] and not found.absent
    assert attacks.in_order(seen.x[[2, 0, 1]], seen.x[:3]).tolist() == [1, 2, 0]
    assert attacks.psnr(torch.full((2,), 0.5), torch.zeros(2)).tolist() == pytest.approx([-20 * np.log10(0.5)] * 2)
    assert attacks.psnr(torch.zeros(5, 3, 4), torch.zeros(1, 3, 4)).shape == (5,)  # one truth for all
    for other in ((1, 3), (5, 1, 4), (5,), (4, 3, 4)):  # which torch would stretch, or not
        with pytest.raises(ValueError, match="one to one"):
            attacks.psnr(torch.zeros(5, 3, 4), torch.zeros(other))
    assert not attacks.psnr(none := torch.zeros(0, 3), none).numel() and not attacks.in_order(none, none).numel()


def test_bias_division_by_hand() -> None:
    weight = torch.tensor([[2.0, 4.0], [0.0, 0.0], [3.0, 3.03]])
    shared = attacks.Shared({"l.weight": weight, "l.bias": torch.tensor([2.0, 0.0, 3.0])}, 3, LOSS)
    inputs = torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.0, 0.5], [0.0, 0.0]])
    nowhere = torch.zeros(2)
    assert divided(shared, "l", inputs, nowhere) == 0.5  # (1, 2) exactly, (1, 1) to 0.7 %
    assert divided(shared, "l", inputs, torch.tensor([0.9, 1.0])) == 0.25  # of which (1, 1) differs by less
    assert divided(shared, "l", torch.tensor([[1.0, 1.05]]), nowhere) == 0.0
    zero = attacks.Shared({"l.weight": weight, "l.bias": torch.zeros(3)}, 3, LOSS)
    assert divided(zero, "l", inputs, nowhere) == 0.0
    with pytest.raises(px.PackextError, match="'other' .* was not shared"):
        divided(shared, "other", inputs, nowhere)


def test_noise_is_taken_off_what_is_read_off() -> None:
    """One row over its bias's entry is blurred beyond the hundredth; all rows together are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 5))
    for k in range(6):
        x, y = (t[k : k + 1] for t in images())
        whole = attacks.share(model, LOSS, x, y)
        message = defences.GaussianNoise(0.02 * float(flat(whole).square().mean().sqrt()), seed=k)(whole)
        weight, bias = (message.gradient[f"1.{part}"] for part in ("weight", "bias"))
        alone = (weight / bias[:, None] - x.flatten()).norm(dim=1) / x.norm()
        assert alone.min() > 1e-2 and divided(message, "1", x.flatten(1), torch.zeros(16)) == 1.0


def test_inputs_that_vary_little_are_not_given_away_by_their_mean() -> None:
    """As temperatures in kelvin: each row of a sum of gradients is within a hundredth of all inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))
    data = 10 + 0.05 * torch.randn(100, 24), torch.arange(100) % 4
    first, second = closed(case(model, data, Sharing(batch_size=16)), Clock(1e6)).layers
    assert first.is_input and first.divided is not None and first.divided.value == 0.0
    assert first.alone is not None and second.alone is not None and first.alone.value == second.alone.value == 1.0


@pytest.mark.usefixtures("bare")
def test_labels_through_secure_aggregation() -> None:
    sharing = Sharing(batch_size=8, secure_aggregation=True, clients=4, server="malicious")
    audit = run(normed().eval(), LOSS, images(80), sharing, budget=FEW)
    s = audit.labels
    assert s.clients_exact is not None and s.clients_exact.value == 1.0 and s.capacity == 13 and s.cohort == 4
    assert s.rounds == 3 and s.clients_exact.low == pytest.approx(
        0.2924, abs=1e-4
    )  # of three rounds, not of 12 clients
    assert "reads every client's labels through secure aggregation" in titles(audit, "high")
    assert audit.setting.behind == s.samples == 32 and s.identity == 1.0
    assert "more than 13 it cannot tell apart" in next(f for f in audit.findings if "normalisation" in f.title).evidence
    many = labels(case(normed().eval(), images(200), Sharing(secure_aggregation=True, clients=20)), Clock(1.0))
    assert "20 clients cannot be told apart" in many.absent["labels by a fishing model"] and many.clients_exact is None
    plain_ = labels(case(sharing=Sharing(secure_aggregation=True, clients=3)), Clock(1.0))
    assert "no normalisation" in plain_.absent["labels by a fishing model"] and plain_.clients_exact is None
    for defence in (defences.Clipped(0.05), defences.Compose(defences.Clipped(0.05), defences.Quantisation("float16"))):
        clip = Sharing(secure_aggregation=True, clients=3, defence=defence)
        clipped = labels(case(normed().eval(), images(80), clip), Clock(1.0))
        assert clipped.clients_exact is not None and clipped.clients_exact.value == 1.0  # the attacker knows the norm
    update = Sharing("update", local_steps=3, lr=0.1, secure_aggregation=True, clients=3)
    steps = labels(case(normed().eval(), images(80), update), Clock(1.0))
    assert "several local steps" in steps.absent["labels by a fishing model"] and steps.identity is None


@pytest.mark.usefixtures("no_sweep")
def test_a_loss_that_tells_no_labels() -> None:
    x, _ = images()
    loss = nn.MSELoss()
    audit = run(linear(2), loss, (x, torch.rand(40, 2)), Sharing(batch_size=2), budget=FEW)
    assert "Labels are counted for nn.CrossEntropyLoss" in audit.labels.absent["labels"] and not audit.labels.rules
    assert {s.search for s in audit.inversion.searches} == {"Inverting Gradients"}
    assert audit.membership.absent["membership"].startswith("no data were held out") and audit.records.norms
    ignored = images()[1].clone()
    ignored[3] = -100
    found = labels(case(data=(x, ignored)), Clock(1.0))
    assert "Labels lie between -100 and 4" in found.absent["labels"]


@pytest.mark.usefixtures("no_sweep")
def test_tokens() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).mean(1))

    torch.manual_seed(0)
    x, y = torch.randint(50, (40, 6)), torch.randint(3, (40,))
    x[:, -1] = 0
    audit = run(Bag(), LOSS, (x, y), Sharing(batch_size=2), budget=FEW)
    (embedding,) = audit.closed.embeddings
    assert embedding.found.value == 1.0 and "'embed' names the tokens" in titles(audit, "high")
    true = [len(set(x[drawn(k, 2)].flatten().tolist()) - {0}) for k in range(2)]
    assert embedding.tokens == pytest.approx(sum(true) / 2)
    assert audit.inversion.texts and not audit.inversion.searches and not audit.inversion.absent
    assert "inputs are torch.int64" in audit.labels.absent["LLG*"] and audit.records.norms


def test_positions_that_are_looked_up_twice() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.position, self.head = nn.Embedding(50, 8), nn.Embedding(7, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            at = torch.arange(x.shape[1])
            return self.head(((self.word(x) + self.position(at)).tanh() + self.position(at)).mean(1))

    data = torch.randint(50, (40, 6)), torch.randint(3, (40,))
    found = closed(case(Encoder(), data), Clock(1e6))
    assert [(e.name, e.tokens > 6, e.found.value) for e in found.embeddings] == [
        ("word", True, 1.0),
        ("position", False, 1.0),
    ]


@pytest.mark.usefixtures("bare")
def test_positions_name_no_tokens() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.position, self.kind = nn.Embedding(99, 8), nn.Embedding(16, 8), nn.Embedding(2, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            at = self.position(torch.arange(x.shape[1])) + self.kind(torch.zeros_like(x))
            return self.head((self.word(x) + at).tanh().mean(1))

    torch.manual_seed(0)
    data = torch.randint(99, (40, 6)), torch.randint(3, (40,))
    audit = run(Encoder(), LOSS, data, Sharing(batch_size=8), budget=FEW)
    found = {e.name: (e.found.value, e.false_alarms) for e in audit.closed.embeddings}
    assert found == {"word": (1.0, 0.0), "position": (1.0, 1.0), "kind": (1.0, 1.0)}
    assert [f.title for f in audit.findings if "names the tokens" in f.title] == [
        "The gradient of 'word' names the tokens of a batch."
    ]
    every = closed(case(Encoder(), data, Sharing(batch_size=40)), Clock(1.0))  # nothing to compare with
    assert all(e.false_alarms is None for e in every.embeddings)
    assert "all members are in every batch" in every.absent["inputs that were not in the batch"]


def drawn(k: int, n: int) -> Tensor:
    return torch.randperm(40, generator=torch.Generator().manual_seed(k))[:n]


@pytest.mark.usefixtures("no_sweep")
def test_half_precision() -> None:
    x, y = images()
    audit = run(
        linear().bfloat16(),
        LOSS,
        Data((x.bfloat16(), y), (x[:20].bfloat16(), y[:20])),
        Sharing(batch_size=1),
        budget=FEW,
    )
    assert audit.setting.dtype == "bfloat16" and audit.membership.scores
    wide = case(linear().bfloat16().float(), (x.bfloat16().float(), y), Sharing(batch_size=1))
    assert audit.records.norms == records(wide, Clock(1.0)).norms  # of bfloat16 they would have ties
    assert audit.inversion.searches and audit.labels.rules
    json.dumps(audit.to_json(), allow_nan=False)


def test_chances_are_written_as_people_do() -> None:
    assert [odds(p) for p in (1.0, 0.25, 0.0321, 0.00012)] == ["100 %", "25 %", "3.2 %", "0.012 %"]
    shares = [percent(Interval(p, 0.0, 0.5)) for p in (0.0, 0.00062, 0.0051, 1.0)]
    assert shares == ["0 % (0 to 50)", "0.06 % (0 to 50)", "1 % (0 to 50)", "100 % (0 to 50)"]


def test_samples_of_one_message_are_no_evidence_each() -> None:
    """One search finds all of its message, the other none."""
    case = Case(normed(), LOSS, images(60), Sharing(batch_size=8), FEW)
    x = torch.zeros(8)
    done = attacks.Reconstruction(x, x, (0.1,), False, 1)
    made = [
        Attempt(x, x, torch.full((8,), mse), x, None, hits, torch.full((8,), hits > 0), done)
        for mse, hits in ((1e-4, 8), (0.5, 0))
    ]
    found = _summary("Deep", 8, made, attacks.DeepLeakage(1), case)
    for share in (found.recovered, found.identified):
        assert share.value == 0.5 and share == Interval.share(1, 2) and share.low < 0.02 and share.high > 0.98
    several = replace(found, recovered=Interval(0.0, 0.0, 0.1))
    assert _told(several)  # by chance 8 of 16 are not recognised among so many
    assert not _told(replace(several, identified=Interval(1 / 16, 0.0, 0.5)))


@pytest.mark.parametrize(("samples", "members"), [(1, 1000), (8, 100), (64, 1000)])
def test_pictures_that_know_nothing_of_a_client_are_not_recognised(samples: int, members: int) -> None:
    """Drawn from where the inputs are from, and given in the order that fits best, as what a search finds is."""
    case = Case(linear(), LOSS, images(members), Sharing(batch_size=samples), FEW)
    done = attacks.Reconstruction(torch.zeros(1), torch.zeros(1), (0.1,), False, 1)
    made = []
    for k in range(20):
        true, found = case.x[case.draw(k, samples)], images(samples, seed=k + 1)[0]
        found = found[attacks.in_order(found, true)]
        mse = (found - true).square().flatten(1).mean(1)
        hits = _identified(case, found, true)
        made.append(Attempt(found, true, mse, mse, None, hits, mse < 1e-3, done))
    seen = _summary("Deep", samples, made, attacks.DeepLeakage(1), case)
    assert not seen.recovered.value and seen.identified.value <= 1.2 * samples / members
    assert not _told(seen)


def test_the_mean_of_a_table_with_outliers_is_no_reconstruction() -> None:
    """The range is many times what entries mostly differ by: the mean is within a hundredth of its square."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    x[0, 0] = 15.0
    seen = Case(nn.Linear(12, 3), LOSS, (x, torch.arange(200) % 3), Sharing(batch_size=4), FEW)
    true, spread = x[5:9], float(x.max() - x.min())
    message = attacks.share(seen.model, LOSS, true, torch.arange(4) % 3)
    for found, recovered in ((x.mean(0).expand(4, -1), 0), (torch.randn(4, 12, generator=generator), 0), (true, 4)):

        def attack(*_: Any, found: Tensor = found, **__: Any) -> attacks.Reconstruction:
            return attacks.Reconstruction(found.double(), torch.arange(4) % 3, (0.1,), False, 1)

        made = attempt(seen, attack, message, true, torch.arange(4) % 3)
        assert int(made.recovered.sum()) == recovered and (made.mse < 1e-2).sum() >= 3, found
    errors = (x - x.mean(0)).square().mean(1) / spread**2
    assert guess(seen) == pytest.approx(float((-10 * errors.log10()).mean()), abs=1e-4) and guess(seen) > 20


def test_searches_recover_what_they_should() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 5))
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    budget = Budget(1e6, seeds=2, restarts=2, iterations=40)
    x, y = images(60)
    seen = Case(model, LOSS, (3 * x - 1, y), Sharing(batch_size=1), budget)
    found = inversion(seen, Clock(1e6))
    deep = next(s for s in found.searches if s.search.startswith("Deep"))
    assert deep.recovered.value == deep.identified.value == 1.0 and deep.matched == 2 and deep.labels == 1.0
    assert deep.mse is not None and deep.mse_worst is not None and deep.mse < 1e-3 and deep.psnr_best > 30
    blurred = next(s for s in found.searches if s.search.startswith("Inverting"))
    true, got = (found.arrays[f"Inverting Gradients, 1 sample|{k}"] for k in ("true", "found"))
    errors = ((true - got) ** 2).mean((1, 2, 3)) / np.diff(seen.bounds()) ** 2
    assert blurred.mse == pytest.approx(errors.mean(), rel=1e-3)
    assert blurred.psnr == pytest.approx((-10 * np.log10(errors)).mean(), abs=0.01)


def test_the_bound_on_rules_holds_where_batchnorm_sees_the_batch() -> None:
    sharing = Sharing(secure_aggregation=True, clients=2)
    model = normed().train()
    with torch.no_grad():
        model[-1].weight.mul_(20)  # type: ignore[operator]
    assert labels(case(model, sharing=sharing), Clock(1.0)).identity == 1.0


def test_the_mode_is_part_of_the_fingerprint() -> None:
    assert fingerprint(normed().train()) != fingerprint(normed().eval()) == fingerprint(normed().eval())


@pytest.mark.parametrize("defence", [None, defences.Clipped(1.0)])
def test_records_are_those_before_a_defence(defence: Any, bare: None) -> None:
    audit = run(linear(), LOSS, images(), Sharing(batch_size=2, defence=defence), budget=FEW)
    (found,) = [f for f in audit.findings if f.section == "records"]
    assert ("gradient, before the defence that is audited (2 samples)" in found.evidence) == (defence is not None)


def test_no_clip_is_suggested_where_half_of_the_samples_are_learnt() -> None:
    model = linear()
    model[1].weight.data.zero_()  # type: ignore[operator, union-attr]
    model[1].bias.data = torch.tensor([12.0, 0.0, 0.0, 0.0, 0.0])  # type: ignore[union-attr]
    labels = torch.cat([torch.zeros(25), torch.ones(15)]).long()
    seen = case(model, (images()[0], labels))
    found = records(seen, Clock(1e6))
    assert 0 < found.norm_quantiles[2] < 1e-3 < 1 < found.norm_quantiles[3] and found.suggested_clip is None
    clips = [d.max_norm for d in candidates(seen, px.audit.Sweep()).values() if isinstance(d, defences.Clipped)]
    assert len(clips) == 3 and min(clips) > 1  # of the sweep: of those that are not


def test_the_table_of_records() -> None:
    assert len(records(case(sharing=Sharing(batch_size=40)), Clock(1.0)).share_quantiles) == 6  # one batch of all
    seen = case(sharing=Sharing(batch_size=4))
    found = records(seen, Clock(1e6))
    want = []
    for i in found.indices:
        one = attacks.share(seen.model, LOSS, seen.x[i : i + 1], seen.y[i : i + 1])
        want.append(float(flat(one).norm()))
    np.testing.assert_allclose(found.norms, want, rtol=1e-4)
    assert found.suggested_clip == pytest.approx(float(np.median(want)), rel=1e-4) and sorted(found.indices) == list(
        range(40)
    )
    worst = found.worst[0]
    place = found.indices.index(worst.index)
    assert worst.leverage == max(found.leverages) and worst.label == int(seen.y[worst.index])
    batch = found.indices[place // 4 * 4 : place // 4 * 4 + 4]
    whole = flat(attacks.share(seen.model, LOSS, seen.x[batch], seen.y[batch])).norm() * 4
    assert worst.share == pytest.approx(want[place] / float(whole), rel=1e-4)
    # Those that are named have one although there was time for a single batch; who is in no whole batch, in the last n.
    seen = case(sharing=Sharing(batch_size=7))
    hurried = records(seen, Clock(0.0))
    for worst in hurried.worst:
        start = min(hurried.indices.index(worst.index) // 7 * 7, 33)
        batch = hurried.indices[start : start + 7]
        whole = flat(attacks.share(seen.model, LOSS, seen.x[batch], seen.y[batch])).norm() * 7
        assert worst.share == pytest.approx(want[found.indices.index(worst.index)] / float(whole), rel=1e-4)
    first = hurried.indices[:7]
    whole = flat(attacks.share(seen.model, LOSS, seen.x[first], seen.y[first])).norm() * 7
    parts = [want[found.indices.index(i)] / float(whole) for i in first]
    assert hurried.share_quantiles[-1] == pytest.approx(max(parts), rel=1e-4)  # of what was drawn, and no others
    alone = records(case(sharing=Sharing(batch_size=1)), Clock(1.0))
    assert alone.worst[0].share is None and "a batch of one" in alone.absent["share of the batch gradient"]


@pytest.mark.usefixtures("bare")
def test_a_loss_that_takes_the_mean_whatever_its_reduction_says() -> None:
    class Focal(nn.Module):
        reduction = "mean"

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            own = logits.log_softmax(1).gather(1, y[:, None])
            return (-((1 - own.exp()) ** 2) * own).mean()

    model, (x, y) = linear(), images()
    audit = run(model, Focal(), Data((x, y), images(seed=1)), Sharing(batch_size=4), budget=FEW)
    found = audit.records
    norms = [float(flat(attacks.share(model, Focal(), x[i : i + 1], y[i : i + 1])).norm()) for i in found.indices]
    np.testing.assert_allclose(found.norms, norms, rtol=1e-4)
    assert found.suggested_clip == pytest.approx(float(np.median(norms)), rel=1e-4)
    part = found.indices[:4]
    whole = 4 * float(flat(attacks.share(model, Focal(), x[part], y[part])).norm())
    first = next((r for r in found.worst if r.index in part), None)
    assert first is not None and first.share == pytest.approx(norms[part.index(first.index)] / whole, rel=1e-4)
    assert {s.score for s in audit.membership.scores} == {"loss", "gradient norm", "leverage"}


@pytest.mark.usefixtures("bare")
def test_membership_of_a_model_that_has_learnt_by_heart() -> None:
    torch.manual_seed(0)
    x, y, other = *images(60), images(120, seed=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 5)).eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    audit = run(model.train(), LOSS, Data((x, y), other), budget=FEW)  # as clients run it; attackers as they like
    model.eval()
    s = audit.membership
    loss = s.scores[0]
    each = nn.CrossEntropyLoss(reduction="none")
    inside, outside = -each(model(x), y).detach(), -each(model(other[0]), other[1]).detach()
    pairs = (inside[:, None] > outside).double().mean() + 0.5 * (inside[:, None] == outside).double().mean()
    assert loss.score == "loss" and loss.auc.value == pytest.approx(float(pairs), abs=1e-3) and loss.auc.value > 0.8
    assert s.bound == pytest.approx(loss.advantage) and s.bound_by_chance is not None and s.bound > s.bound_by_chance
    assert loss.tpr_01 is not None and loss.tpr_01.low <= loss.tpr_01.value <= loss.tpr_01.high
    assert loss.tpr_01.value == pytest.approx(float((inside > outside.topk(2).values[-1]).double().mean()), abs=0.02)
    assert loss.tpr_001 is None and "1000 are needed" in s.absent["true positives at 0.1 % false positives"]
    assert "true positives at 1 % false positives" not in s.absent and "loss" in s.threats
    assert "can be told from others" in titles(audit, "high")
    assert "pass train=" in membership(case(data=Data((x, y), other)), Clock(1.0)).absent["LiRA"]


@pytest.mark.parametrize("others", [100, 200, 400])
def test_the_interval_of_a_true_positive_rate_holds_for_few_others(others: int) -> None:
    """By bootstrap and the hits alone it holds the true rate in 76, 89 and 89 % of the cases."""
    generator, held, normal = torch.Generator().manual_seed(0), [], NormalDist()
    true = 1 - normal.cdf(normal.inv_cdf(0.99) - 3)
    for _ in range(100):
        m, o = (torch.randn(n, generator=generator) + by for n, by in ((500, 3.0), (others, 0.0)))
        rate = _rate(m, o, 0.01, attacks.judge(m, o, draws=2).tpr[0.01], draws=50)
        assert rate is not None
        held.append(rate.low <= true <= rate.high)
    assert sum(held) >= 0.95 * len(held)
    apart = _rate(m + 100, o, 0.01, 1.0)
    assert apart is not None and (apart.low > 0.99) == (others >= 368) and apart.high == 1.0


def test_the_curve_has_the_area() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    m, o = (torch.randint(-20, 20, (n,), generator=generator) + s for n, s in ((150, 4), (170, 0)))
    fpr, tpr = roc(m, o)
    want = sklearn.roc_auc_score(np.r_[np.ones(150), np.zeros(170)], torch.cat([m, o]).numpy())
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and np.trapezoid(tpr, fpr) == pytest.approx(
        want, abs=1e-6
    )


def test_intervals() -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for hits, of in ((0, 10), (3, 10), (3, 3), (10, 10), (1, 1), (70, 400)):
        want = binomtest(hits, of).proportion_ci(method="exact")
        found = Interval.share(hits, of)
        assert (found.value, found.low, found.high) == pytest.approx((hits / of, want.low, want.high), abs=1e-6)
        nearly = Interval.mean([1.0 - 1e-9] * hits + [1e-9] * (of - hits))
        assert (nearly.low, nearly.high) == pytest.approx((want.low, want.high), abs=0.02)
    assert Interval.mean([1.0] * 5) == Interval.share(5, 5)
    values = torch.rand(400, generator=torch.Generator().manual_seed(0)).tolist()
    found, half = Interval.mean(values), 1.96 * float(np.std(values)) / 20
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.1 * half)
    same, least = Interval.mean([0.75] * 8), Interval.share(8, 8).low  # is no point: others may come
    assert same.low == pytest.approx(0.75 * least, abs=0.02) and same.high == pytest.approx(1 - 0.25 * least, abs=0.02)
    assert beyond(found, 1) == pytest.approx(found.low) and beyond(found, 4) < found.low
    assert beyond(Interval(0.0, -1.0, 1.0), 5) == pytest.approx(-2.5758 / 1.95996, abs=1e-4)


@pytest.mark.parametrize("n", [3, 8, 20])
def test_intervals_of_few_values_hold(n: int) -> None:
    """Of a distribution with a rare value far from the others, which few draws do not show."""
    values, odds = torch.tensor([0.2, 0.875, 1.0]).double(), torch.tensor([0.1, 0.6, 0.3]).double()
    drawn = values[odds.multinomial(200 * n, True, generator=torch.Generator().manual_seed(0))].view(200, n)
    found = [Interval.mean(row, draws=1000) for row in drawn.tolist()]
    assert sum(i.low <= float(values @ odds) <= i.high for i in found) >= 185  # 190 are expected at least


@pytest.mark.parametrize(("k", "rules"), [(3, 1), (3, 4), (8, 4), (20, 4)])
def test_rules_that_only_guess_beat_guessing_no_more_often_than_is_said(k: int, rules: int) -> None:
    values, generator = torch.tensor([-0.25, -0.125, 0.0, 0.125, 0.25]).double(), torch.Generator().manual_seed(0)
    drawn = values[torch.randint(5, (200, rules, k), generator=generator)]
    found = sum(bool((by_chance(above) <= BY_CHANCE).any()) for above in drawn)
    assert found <= 12  # 5 of 200 are expected at most
    if k == 3:
        assert found == 0  # the best of 3 messages is nothing
    else:
        assert by_chance(drawn[0].abs() + 0.01).min() <= 2.0**-k + 1 / 4096  # and one that is better is told


def test_counting_the_usual_class_beats_no_guess(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine in ten members have one label: a rule that always says so has read nothing."""

    class Usual(attacks.LabelRule):
        threat = attacks.LLG.threat

        def counts(self, model: nn.Module, shared: attacks.Shared, head: attacks.Head) -> Tensor:
            return torch.tensor([shared.n, 0, 0, 0, 0])

    monkeypatch.setattr("packext.audit.labels.rules_for", lambda case, absent: {"usual": Usual()})
    x, _ = images(200)
    y = torch.tensor([0] * 9 + [1]).repeat(20)
    audit = run(linear(), LOSS, (x, y), Sharing(batch_size=8), budget=replace(FEW, draws=20))
    assert audit.labels.rules[0].accuracy.value > 0.85 and audit.labels.guess == pytest.approx(0.9, abs=0.06)
    assert "No label rule beats guessing" in titles(audit, "note")


def test_chance_by_hand() -> None:
    """Two rules, two messages: of the four ways to flip signs, the best is (3, 1), (1, 3), (1, 3), (-1, -3)."""
    above = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert by_chance(above).tolist() == [0.25, 0.75]


def test_few_messages_show_nothing_of_a_rule(bare: None) -> None:
    audit = run(linear(), LOSS, images(), Sharing(batch_size=1), budget=FEW)
    assert {r.rule: r.chance for r in audit.labels.rules}["iDLG"] >= 0.25
    assert "Too few messages (2) to say whether a label rule beats guessing." in titles(audit, "note")
    many = run(linear(), LOSS, images(), Sharing(batch_size=1), budget=replace(FEW, draws=12))
    assert "The labels of a batch can be counted from what is shared." in titles(many, "high")


def test_words_of_the_pictures_stand_apart() -> None:
    """Names of defences, ticks of a narrow histogram, and what a line across means, which is above the axes."""
    pictures = pytest.importorskip("packext.audit.pictures")
    long = "as audited: " + repr(defences.Clipped(1.0, 0.5, seed=0))
    rows = [Defended(name, psnr=3.0, psnr_best=3.0, signal=1.0) for name in ("nothing", long, long, "8 bits")]
    norms = np.geomspace(2.5, 30, 50).tolist()
    rule = px.audit.RuleResult("LLG", *[Interval(0.5, 0.4, 0.6)] * 3, draws=9)
    swept = pictures._sweep(px.audit.Sweep(rows=rows, psnr_guess=3.0))
    counted = pictures._labels(px.audit.Labels(rules=[rule], guess=0.5))
    recorded = pictures._records(px.audit.Records(norms=norms, suggested_clip=9.0))
    for figure, axes in ((swept, swept.axes[0].yaxis), (recorded, recorded.axes[0].xaxis)):
        figure.savefig(io.BytesIO())
        boxes = [t.get_window_extent() for t in axes.get_ticklabels(which="both") if t.get_text()]
        assert len(boxes) > 2 and not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    for figure, axes in ((swept, swept.axes[1]), (counted, counted.axes[0])):
        figure.savefig(io.BytesIO())
        (word,) = axes.texts
        assert word.get_text() == "guessing" and word.get_window_extent().y0 >= axes.get_window_extent().y1


def test_what_was_not_measured_for_one_reason_is_said_once() -> None:
    report = pytest.importorskip("packext.audit.report")
    audit = SimpleNamespace(
        sweep=px.audit.Sweep(absent={"a: labels": "no classes", "b": "else", "c: labels": "no classes"})
    )
    page = report._section("sweep", audit, None)
    assert page.count("<li>") == 2 and "<b>a: labels; c: labels</b> were not measured: no classes" in page


def test_columns_of_tables() -> None:
    """Numbers stand under their names, what is missing as its column does, and a column of nothing is left out."""
    report = pytest.importorskip("packext.audit.report")
    made = report.table(["a", "b", "c"], [["x<", 2.5, None], [None, None, None]])
    assert made.count("<tr>") == 3 and "c</th>" not in made
    assert '<th>a</th><th class="number">b</th>' in made and '<td>x&lt;</td><td class="number">2.5</td>' in made
    assert '<td class="quiet">–</td><td class="number quiet">–</td>' in made
    assert report.table(["a"], []) == "" == report.table(["a"], [[None]])


def test_an_update_is_not_clipped_by_samples() -> None:
    seen = case(sharing=Sharing(what="update", batch_size=4, local_steps=2, lr=0.1))
    found = sweep(seen, Clock(1e6))
    assert not any(r.name.startswith("clip") for r in found.rows) and "several local steps" in found.absent["clipping"]


def test_all_defences_of_a_sweep_can_be_seen(bare: None) -> None:
    """Where they change nothing as well: each has a line of its own in each part of the picture."""
    pictures = pytest.importorskip("packext.audit.pictures")
    names = [f"defence {k}" for k in range(9)]
    rows = [Defended(name, labels=0.5, guess=0.2, psnr=30.0, psnr_best=30.0, signal=1.0) for name in names]
    figure = pictures._sweep(px.audit.Sweep(rows=rows))
    assert len(figure.axes) == 3 and [t.get_text() for t in figure.axes[0].get_yticklabels()] == names
    for axes in figure.axes:
        marks = [float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() in ("o", "D")]
        assert marks == list(range(9))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("canaries", [(480, 500, 500), lambda: (480, 500, 500)])
def test_a_claim_below_what_canaries_show(canaries: Any) -> None:
    sharing = Sharing(epsilon=1.0, delta=1e-5, canaries=canaries)
    audit = run(linear(), LOSS, images(), sharing, budget=FEW)
    want = attacks.epsilon_lower_bound(480, 500, 500, 1e-5)
    assert audit.epsilon.measured == want > 1.0 and "its differential privacy has a bug" in titles(audit, "high")
    silent = run(linear(), LOSS, images(), Sharing(epsilon=1.0, delta=1e-5), budget=FEW)
    assert silent.epsilon.measured is None and "pass Sharing(canaries=)" in silent.epsilon.absent["measured epsilon"]


@pytest.mark.parametrize("called", [False, True])
def test_canaries_that_were_chosen_after_looking_are_paid_for(called: bool) -> None:
    model = px.extend(nn.Linear(3, 2))
    optimizer = px.optim.DPSGD(model.parameters(), max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0)
    canaries = attacks.GradientCanaries(optimizer, 200)
    canaries.scores = 2.0 * canaries.included + 0.9 * torch.linspace(0, 1, 200).double()  # all guesses are right
    seen = canaries.audit(1e-5)
    sharing = Sharing(epsilon=1.0, delta=1e-5, canaries=(lambda: seen) if called else seen)
    found = epsilon(case(sharing=sharing), Clock(1.0))
    assert found.measured == seen.epsilon > 1.0 and (found.choices, found.guesses) == (5, seen.guesses)
    assert found.measured < attacks.epsilon_lower_bound(seen.correct, seen.guesses, 200, 1e-5)


def test_a_sweep() -> None:
    seen = case(sharing=Sharing(batch_size=4, defence=defences.Pruning(0.5)))
    found = sweep(seen, Clock(1e6), lambda share: len(share(seen.model, LOSS, seen.x[:2], seen.y[:2]).gradient) / 4)
    rows = {r.name: r for r in found.rows}
    assert list(rows)[:2] == ["nothing", "as audited: Pruning(share=0.5)"] and len(rows) == 9
    assert rows["nothing"].signal == pytest.approx(1.0) and all(r.accuracy == 0.5 and r.seeds == 1 for r in found.rows)
    assert not any(what.endswith("accuracy") for what in found.absent)
    cosines = []
    for k in range(2):
        index = seen.draw(60 + k, 4)
        g = attacks.share(seen.model, LOSS, seen.x[index], seen.y[index])
        cosines.append(float(torch.cosine_similarity(flat(g), flat(defences.Pruning(0.5)(g)), dim=0)))
    assert found.rows[1].signal == pytest.approx(np.mean(cosines))
    clip = next(r for r in found.rows if r.name.startswith("clip") and "noise" not in r.name)
    assert clip.psnr == pytest.approx(found.rows[0].psnr, abs=0.5)  # one sample clipped is one sample scaled
    assert clip.time is not None and clip.time > 1
    assert all(r.adapted for r in found.rows) and set(found.iterations) > {"Maximum posterior", "Inverting Gradients"}
    # Who knows what was set to zero matches the rest, and loses little by it.
    assert rows["as audited: Pruning(share=0.5)"].psnr > rows["noise of 1 x RMS"].psnr


def test_the_time_of_clipping_is_that_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Clipped` copies the model and probes it in each call."""
    seen, clipped = case(sharing=Sharing(batch_size=4)), defences.Clipped(1.0, 0.5)
    before = flat(attacks.share(seen.model, LOSS, seen.x, seen.y))
    calls: list[Any] = []
    monkeypatch.setattr(seen, "client", lambda *batch, **how: calls.append(how))
    assert _time(seen, clipped) > 0 and len(calls) > 5 and all(how == {"defended": False} for how in calls)
    assert torch.equal(flat(attacks.share(seen.model, LOSS, seen.x, seen.y)), before)
    with pytest.raises(px.PackextError, match="takes the place of one gradient"):
        _time(case(sharing=Sharing(what="update", batch_size=4, local_steps=2, lr=0.1)), clipped)


def test_numbers_do_not_depend_on_how_many_calls_were_timed(monkeypatch: pytest.MonkeyPatch, bare: None) -> None:
    """Of a random model, whose masks torch's own generator draws, with a defence that draws as well."""
    swept, noise = [], {"noise": defences.GaussianNoise(0.1)}
    monkeypatch.setattr("packext.audit.sweep.candidates", lambda case, found: noise)
    for turns in (6, 8):
        monkeypatch.setattr("packext.audit.sweep.TURNS", turns)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 5))
        rows = sweep(case(model, sharing=Sharing(batch_size=4)), Clock(1e6)).rows
        swept.append([{**plain(row), "time": None} for row in rows])
    assert swept[0] == swept[1] and all(row["signal"] and row["labels"] and row["psnr"] for row in swept[0])
    one, other = (case(sharing=Sharing(defence=defences.GaussianNoise(0.1))) for _ in range(2))
    other.message(other.x[:8], other.y[:8])  # one more, of a section that had more time
    for seen in (one, other):
        seen.begin(3)
    assert torch.equal(*(flat(seen.message(seen.x[:8], seen.y[:8])) for seen in (one, other)))
    one.begin(4)
    assert not torch.equal(*(flat(seen.message(seen.x[:8], seen.y[:8])) for seen in (one, other)))


@pytest.mark.parametrize("what", [{"label_smoothing": 0.1}, {"weight": torch.arange(1.0, 6.0)}])
def test_labels_that_cannot_be_read_are_searched_for(what: dict[str, Any]) -> None:
    seen = case(sharing=Sharing(batch_size=2), loss=nn.CrossEntropyLoss(**what))
    found = sweep(seen, Clock(1e6))
    assert "reconstruction" not in found.absent and all(r.seeds == 1 for r in found.rows)
    both = inversion(seen, Clock(1e6))
    assert len(both.searches) == 4 and not both.absent


def test_what_dropout_draws_is_not_laid_to_a_defence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two messages with masks of their own have little in common."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    same = {"8 bits": defences.Quantisation("int8"), "clip": defences.Clipped(1e6)}
    monkeypatch.setattr("packext.audit.sweep.candidates", lambda case, found: same)
    for sharing in (Sharing(batch_size=2), Sharing(batch_size=2, secure_aggregation=True, clients=3)):
        rows = sweep(case(model, sharing=sharing), Clock(0.0)).rows
        assert [r.signal for r in rows] == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)


def test_defences_are_swept_for_what_is_read_off(monkeypatch: pytest.MonkeyPatch, bare: None) -> None:
    """Of batches whose samples each have a unit of their own, as with ReLUs that few samples reach."""
    levels = {"fp16": defences.Quantisation("float16"), "noise": defences.GaussianNoise(1.0, seed=0)}
    monkeypatch.setattr("packext.audit.sweep.candidates", lambda case, found: levels)
    torch.manual_seed(0)
    x, y = torch.eye(12) + 0.1 * torch.rand(12, 12), torch.arange(12) % 3
    first = nn.Linear(12, 12)
    first.weight.data, first.bias.data = torch.eye(12), torch.full((12,), -0.5)
    for model, want in (
        (nn.Sequential(first, nn.ReLU(), nn.Linear(12, 3)), [1, 1, 0]),
        (nn.Linear(12, 3, False), None),
    ):
        found = sweep(case(model, (x, y), Sharing(batch_size=4)), Clock(0.0))
        assert [r.divided for r in found.rows] == (want or [None] * 3)
        audit = SimpleNamespace(sweep=found)
        told = [f for f in _sweep(audit) if "read off" in f.title]
        assert len(told) == (want is not None) and all("with fp16." in f.evidence for f in told)


def test_why_no_rule_counts_labels_of_a_defence_is_said() -> None:
    """Of a model that is sure of its samples, whose gradient is zero."""
    model = linear()
    model[1].bias.data[0] = 1e4  # type: ignore[operator, union-attr]
    found = sweep(case(model, (images()[0], torch.zeros(40, dtype=torch.int64))), Clock(0.0))
    assert found.rows[0].labels is None and "it tells no labels" in found.absent["nothing: labels"]


def test_levels_of_noise_are_of_several_batches() -> None:
    """One batch of a trained model may have a hundredth of the others' gradient."""
    seen = case(sharing=Sharing(batch_size=4))
    drawn = [seen.draw(60 + k, 4) for k in range(2)]
    sizes = [flat(attacks.share(seen.model, LOSS, seen.x[i], seen.y[i])).square().mean().sqrt() for i in drawn]
    found = candidates(seen, px.audit.Sweep())["noise of 1 x RMS"].std
    assert found == pytest.approx(float(sum(sizes)) / 2) and sizes[0] != sizes[1]


def test_a_way_to_share_is_called_as_share_is() -> None:
    x, y = images(8)
    for defence in (defences.Pruning(0.5), defences.Clipped(1.0)):
        assert local(defence)(linear(), LOSS, x, y, state={"1.bias": torch.zeros(5)}).n == 8


@pytest.mark.parametrize(
    ("psnr", "recovered", "title"),
    [
        (30.0, 4, "Some defences change next to nothing."),
        (20.0, 0, "Some defences change next to nothing."),  # not recovered, and still far better than guessing
        (8.0, 0, "was not seen: without one, the searches find nothing either."),
    ],
)
def test_defences_are_compared_where_there_is_something_to_lose(
    psnr: float, recovered: int, title: str, bare: None
) -> None:
    audit = run(linear(), LOSS, images(), budget=FEW)
    levels = {"nothing": psnr, "8 bits": psnr, "noise": psnr - 5}
    audit.sweep.rows = [
        Defended(name, psnr=v, psnr_best=v, recovered=recovered * (v == psnr), seeds=4, signal=1.0)
        for name, v in levels.items()
    ]
    audit.sweep.psnr_guess = 10.0
    found = [f for f in findings(audit) if f.section == "sweep"]
    stopped = ["Some defences stop searches that do not know of them, and no other was tried."] * (psnr > 10)
    assert found[0].title.endswith(title) and [f.title for f in found[1:]] == stopped


def test_findings_say_no_more_than_the_numbers(bare: None) -> None:
    some, none = Interval(1.0, 0.5, 1.0), Interval(0.0, 0.0, 0.5)
    audit = run(linear(), LOSS, images(), Sharing(batch_size=4), budget=FEW)

    def said(section: str) -> list[Any]:
        return [f for f in findings(audit) if f.section == section]

    assert not said("integrity") and not said("inversion") and not said("sweep")
    audit.closed.layers = [LayerCheck("a", 9, 3, False, 4, none, none, 1.0, some, None)]
    assert not said("closed")
    for is_input, level in ((False, "low"), (True, "medium")):
        audit.closed.layers = [LayerCheck("a", 9, 3, is_input, 4, none, some)]
        assert [f.severity for f in said("closed")] == [level]

    one = SearchResult("a", 4, 5, 1, 9, none, none, 100, 0.1, 0.1, 0.1, 9.0, 9.0, 9.0, None, 0, 0.1)
    audit.inversion.searches = [one]
    assert said("inversion")[0].title.endswith("none has matched it either.")
    alone = replace(one, samples=1, recovered=some)
    audit.inversion.searches = [one, alone]
    assert said("inversion")[0].title.startswith("The gradient of a single sample gives its input away")
    better = replace(one, search="b", recovered=Interval(0.5, 0.1, 0.9), identified=some)
    audit.inversion.searches = [replace(one, recovered=some), better, alone]
    (finding,) = said("inversion")
    assert finding.severity == "high"
    assert finding.evidence.startswith("b, 4 samples") and "a, 1 sample:" in finding.evidence
    # Of ten candidates an input is recognised by chance: what was recovered counts before it.
    seen = replace(one, identified=Interval(1.0, 0.4, 1.0), candidates=10)
    audit.inversion.searches = [seen, replace(one, search="b", recovered=some, candidates=10)]
    assert said("inversion")[0].evidence.startswith("b, 4 samples")

    area, few, many = Interval(0.52, 0.48, 0.55), Interval(0.01, 0.0, 0.02), Interval(0.2, 0.1, 0.3)
    loss, lira = (
        ScoreResult("loss", area, None, few, 0.1),
        ScoreResult("LiRA", replace(area, value=0.51), few, many, 0.1),
    )
    for scores, level in (([loss], "note"), ([loss, lira], "high"), ([lira, loss], "high")):
        audit.membership.scores = scores
        (finding,) = said("membership")
        assert finding.severity == level and ("LiRA: " in finding.evidence) == (lira in scores)


def test_what_costs_the_least_is_said_of_accuracies_or_of_cosines(bare: None) -> None:
    audit = run(linear(), LOSS, images(), budget=FEW)
    audit.sweep.rows = [
        Defended(name, True, psnr=db, psnr_best=db, recovered=hits, seeds=4, accuracy=accuracy, signal=cosine)
        for name, db, hits, accuracy, cosine in (
            ("nothing", 30.0, 4, 0.9, 1.0), ("a", 9.0, 0, 0.5, 0.3), ("b", 9.0, 0, None, 0.99), ("c", 9.0, 0, 0.7, 0.2)
        )
    ]  # fmt: skip
    (finding,) = (f for f in findings(audit) if f.section == "sweep")
    assert "c costs the least" in finding.title and "accuracy 70 % (without: accuracy 90 %)" in finding.evidence
    for row in audit.sweep.rows:
        row.accuracy = None
    (finding,) = (f for f in findings(audit) if f.section == "sweep")
    assert "b costs the least" in finding.title


@pytest.mark.parametrize("returned", [93.0, -0.1, float("nan")])
def test_an_accuracy_that_is_none_is_refused(returned: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packext.audit.sweep.candidates", lambda case, found: {})
    monkeypatch.setattr("packext.audit.sweep._reconstruct", lambda *args: None)
    found = sweep(case(), Clock(1e6), lambda share: returned)
    assert found.rows[0].accuracy is None and "from 0 to 1, and returned" in found.absent["nothing: accuracy"]


def test_clipping_stops_no_search_that_knows_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single sample: where the search by L-BFGS is the better one as well."""
    monkeypatch.setattr("packext.audit.sweep.candidates", lambda case, found: {"clip": defences.Clipped(0.01)})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    budget = Budget(1e6, draws=1, seeds=1, restarts=1, iterations=20, shadows=4)
    for defence in (None, defences.Compose(defences.Compose(defences.Clipped(0.01)), defences.Quantisation("float16"))):
        seen = Case(model, LOSS, images(), Sharing(batch_size=2, defence=defence), budget)
        searches = inversion(seen, Clock(1e6)).searches
        assert sorted(r.samples for r in searches) == [1, 1, 2, 2]
        alone = {r.search: r for r in searches if r.samples == 1}
        deep, adam = alone["Deep Leakage from Gradients"], alone["Inverting Gradients"]
        assert deep.recovered.value == 1 and deep.psnr > adam.psnr + 10
    rows = sweep(Case(model, LOSS, images(), Sharing(batch_size=2), budget), Clock(1e6)).rows
    assert [r.recovered for r in rows] == [1, 1] and rows[0].psnr is not None and rows[0].psnr > 40


def mine(shared: attacks.Shared) -> attacks.Shared:
    """A defence of one's own."""
    return shared


@pytest.mark.parametrize(
    ("defence", "misfit", "told"),
    [
        (defences.Clipped(2.0, 0.5), attacks.GaussianMisfit(1.0), True),
        (defences.Clipped(2.0), None, True),
        (defences.GaussianNoise(0.1), attacks.GaussianMisfit(0.1), True),
        (defences.GaussianNoise(0.0), None, True),
        (defences.LaplacianNoise(0.1), attacks.LaplacianMisfit(0.1), True),
        (defences.Quantisation("int8", True), attacks.RoundingMisfit("int8", True), True),
        (defences.Compose(defences.Clipped(2.0), defences.Quantisation("int8")), attacks.RoundingMisfit("int8"), True),
        (defences.Compose(defences.Pruning(0.5), defences.Quantisation("int8")), attacks.RoundingMisfit("int8"), True),
        (defences.Compose(defences.GaussianNoise(0.1), defences.Pruning(0.5)), attacks.GaussianMisfit(0.1), True),
        (defences.Compose(defences.Pruning(0.5), defences.GaussianNoise(0.1)), attacks.GaussianMisfit(0.1), False),
        (defences.Compose(defences.Clipped(1.0, 1.0), defences.GaussianNoise(1.0)), attacks.GaussianMisfit(1.0), False),
        (defences.Compose(mine, defences.Quantisation("int8")), attacks.RoundingMisfit("int8"), False),
        (defences.Withholding(1), None, False),
        (mine, None, False),
    ],
)  # fmt: skip
def test_what_searches_know_of_a_defence(defence: Any, misfit: Any, told: bool) -> None:
    assert misfit_of(defence) == misfit and known(defence) == told


@pytest.mark.parametrize("inputs", ["images", "numbers"])
def test_searches_that_know_of_noise_and_of_8_bits_find_more(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in what is no image."""
    torch.manual_seed(0)
    common = torch.rand(60, 3) @ torch.rand(3, 16) / 3  # as inputs have something in common
    x, y = common.view(60, 1, 4, 4) if inputs == "images" else common, torch.arange(60) % 5
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    seen = Case(model, LOSS, (x, y), Sharing(batch_size=4), Budget(1e6, seeds=3, restarts=1, iterations=20))
    levels = {"noise": defences.GaussianNoise(0.1, seed=0), "8 bits": defences.Quantisation("int8")}
    monkeypatch.setattr("packext.audit.sweep.candidates", lambda case, found: levels)
    informed = {r.name: r for r in sweep(seen, Clock(1e6)).rows}
    monkeypatch.setattr("packext.audit.sweep.misfit_of", lambda defence: None)
    blind = {r.name: r for r in sweep(seen, Clock(1e6)).rows}
    assert informed["nothing"].psnr == blind["nothing"].psnr
    assert all(informed[name].adapted for name in levels)
    assert informed["noise"].psnr > blind["noise"].psnr + 10 and informed["8 bits"].psnr > blind["8 bits"].psnr + 3


def test_the_client_s_own_input_is_not_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(12)
    x[1] = x[0]
    prior = expected(case(data=(x, y)), x[:1])
    assert prior is not None and torch.allclose(prior.mean, x[2:].double().mean(0))
    monkeypatch.setattr("packext.audit.sweep.EFFORT", 16 * 5**2)
    few = expected(case(data=(x, y)), x[:1])
    assert few is not None and few.directions.shape == (5, 16)
    assert expected(case(data=(x[:3], y[:3]), sharing=Sharing(batch_size=1)), x[:1]) is None  # of one other


def test_the_better_search_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(case: Case, attack: Any, *args: Any) -> Any:
        good = isinstance(attack, tuple)
        found = torch.zeros(1, 1, 4, 4)
        return SimpleNamespace(psnr=torch.tensor([30.0 if good else 10.0]), recovered=torch.tensor([good]), found=found)

    monkeypatch.setattr("packext.audit.sweep.attempt", fake)
    monkeypatch.setattr("packext.audit.sweep.candidates", lambda case, found: {"8 bits": defences.Quantisation("int8")})
    found = sweep(case(sharing=Sharing(batch_size=2)), Clock(1e6))
    assert len(found.iterations) == 3 and [r.psnr for r in found.rows] == [30.0, 30.0]
    assert [(r.recovered, r.seeds) for r in found.rows] == [(1, 1), (1, 1)]


def test_an_extended_model_stays_extended() -> None:
    model, loss = px.extend(linear()), px.extend(nn.CrossEntropyLoss())
    seen = case(model, loss=loss)
    assert px.is_extended(model) and px.is_extended(loss) and not px.is_extended(seen.model)


# What does not fit


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"what": "weights"}, "what must be one of"),
        ({"server": "curious"}, "server must be one of"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"local_steps": 3}, 'belong to what="update"'),
        ({"what": "update", "local_steps": 3}, "lr must be positive"),
        ({"what": "update", "lr": 0.1, "samples": 2}, "has no batch of 8"),
        ({"what": "update", "lr": 0.1, "samples": 20, "local_steps": 2}, r"2 local step\(s\) of 8 do not see 20"),
        ({"secure_aggregation": True}, "clients=2 or more"),
        ({"clients": 3}, "counted for it alone, got 3"),
        ({"epsilon": 1.0}, "needs epsilon >= 0 and 0 <= delta < 1"),
        ({"canaries": (1, 2, 3)}, "pass delta="),
        ({"defence": lambda a, b: a}, "is neither"),
    ],
)
def test_sharing_that_contradicts_itself_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Sharing(**arguments)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    x, y = images()
    bad = x.clone()
    bad[3] = float("nan")
    frozen = linear().requires_grad_(False)
    for arguments, match in (
        ({"data": (x, y[:3])}, "same number of samples"),
        ({"data": (x[:0], y[:0])}, "same number of samples"),
        ({"data": (bad, y)}, r"inputs of members: samples \[3\] are not finite"),
        ({"data": Data((x, y), (x[:, :, :2], y))}, "heldout has inputs"),
        ({"data": Data((x, y), (x, y.float()))}, "heldout has labels"),
        ({"data": Data((x, y), auxiliary=x.double())}, "auxiliary has inputs"),
        ({"data": (x[:, :, :2], y)}, "do not run on inputs"),
        ({"data": (x, y + 5)}, "do not run on inputs"),
        ({"data": (x[:4], y[:4])}, "members are only 4"),
        ({"data": (x, torch.cat([y[:30], y[30:] + 5]))}, "Labels of members lie between 0 and 9; the model tells 5"),
        ({"data": Data((x, y), (x, y - 1))}, "Labels of heldout lie between -1 and 3; the model tells 5"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, 'reduction "mean" or "sum"'),
        (
            {"model": defences.Precode(nn.Flatten(), nn.Linear(16, 5), 3), "loss_fn": defences.PrecodeLoss()},
            "gives one tensor, .*; Precode gives tuple",
        ),
        ({"model": frozen}, "No parameter"),
    ):
        with pytest.raises(px.PackextError, match=match):
            run(**({"model": linear(), "loss_fn": LOSS, "data": (x, y), "out": tmp_path / "new"} | arguments))
    assert not (tmp_path / "new").exists()
    for budget in ("slow", 0, float("nan"), True):
        with pytest.raises(ValueError, match="budget must be"):
            run(linear(), LOSS, (x, y), budget=budget)
    assert Budget.of(60).seconds == 60 and Budget.of("quick").seconds < 60 < Budget.of("full").seconds


def test_an_update_of_local_steps() -> None:
    sharing = Sharing("update", batch_size=2, local_steps=2, lr=0.1, samples=4)
    seen = case(sharing=sharing)
    found = inversion(seen, Clock(1e6))
    assert {(s.search, s.samples) for s in found.searches} == {("Inverting Gradients", 1), ("Inverting Gradients", 4)}
    assert "does not unroll local steps" in found.absent["Deep Leakage from Gradients"]
    several = Sharing("update", batch_size=2, local_steps=2, lr=0.1, secure_aggregation=True, clients=2)
    assert "several clients" in inversion(case(sharing=several), Clock(1e6)).absent["reconstruction"]
    clipped = Sharing("update", batch_size=2, local_steps=2, lr=0.1, defence=defences.Clipped(1.0))
    assert "takes the place of one gradient" in labels(case(sharing=clipped), Clock(1.0)).absent["message"]


def test_time_bounds_attempts() -> None:
    clock = Clock(0.0)
    assert clock.go_on(0, 5) and not clock.go_on(1, 5) and not Clock(1e6).go_on(5, 5) and Clock(1e6).go_on(4, 5)
    seen = Case(linear(), LOSS, images(), Sharing(batch_size=2), Budget(0.01, seeds=9, iterations=100))
    found = inversion(seen, Clock(0.01))
    assert all(s.seeds == 1 and s.iterations <= 200 for s in found.searches) and found.planned == 9


# The command line


@pytest.mark.usefixtures("no_sweep")
def test_the_command_audits_the_demo(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Budget(2.0, draws=2, seeds=1, restarts=1, iterations=2, shadows=4)
    digits = tuple(t[:240] for t in demo.load_data())
    monkeypatch.setattr(demo, "load_data", lambda: digits)
    monkeypatch.setattr(demo, "MEMBERS", 120)
    monkeypatch.setattr(demo, "fit", lambda x, y, *args, fit=demo.fit, **how: fit(x, y, *args, steps=20))
    monkeypatch.setattr(Budget, "of", classmethod(lambda cls, budget: small))
    threads = torch.get_num_threads()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    assert _cli.main(["audit", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "What to do:" in printed and printed.rstrip().endswith(f"Report: {tmp_path / 'audit.html'}")
    assert torch.get_num_threads() == threads and (tmp_path / "labels.png").exists()
    monkeypatch.setattr(demo, "fit", interrupt)
    assert _cli.main(["audit", "--quick", "--out", str(tmp_path)]) == 1
    assert "The same command goes on" in capsys.readouterr().err and torch.get_num_threads() == threads
    monkeypatch.setattr(demo, "fit", lambda x, y: demo.network())
    assert _cli.main(["audit", "--quick", "--seed", "1", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "packext audit: " in error and "--fresh" in error and "Traceback" not in error


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seconds", "nan"], ["--quick", "--seconds", "3"]])
def test_the_command_refuses(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        _cli.main(["audit", *arguments])
    assert left.value.code == 2 and "packext audit: error" in capsys.readouterr().err
