"""The scripts of the gallery run, and do what they claim; its page says what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from packext import testing

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a script at its small size; give its numbers back."""
    monkeypatch.syspath_prepend(str(GALLERY))

    def run(name: str) -> dict[str, Any]:
        with torch.random.fork_rng():
            figure, numbers = runpy.run_path(str(GALLERY / f"{name}.py"))["show"](small=True)
        assert figure.axes
        return numbers

    return run


def test_all_in_one(shown: Any) -> None:
    found = shown("all_in_one")
    assert found["all within rounding of it, in float64"] is True
    assert found["quantities and parameters compared with the slow computation"] >= 16
    assert found["largest difference of diag_h and diag_ggn_exact, relative; the model is linear"] < 1e-5
    assert found["grad_batch"] == "[32, 10, 64]" and found["ggn_gram"] == "[10, 32, 10, 32]"


def test_batched_jacobians(shown: Any) -> None:
    found = shown("batched_jacobians")
    assert found["largest difference to torch.func"] < 1e-12
    (inside, across), (later_inside, later_across) = (
        found[f"{when}: mean cosine in a class, and across classes"] for when in ("before training", "after 100 steps")
    )
    assert later_inside - later_across > 2 * (inside - across)


def test_cg_newton(shown: Any) -> None:
    found = shown("cg_newton")
    for kind in ("HMP", "GGNMP", "PCHMP"):
        first, last = found[f"loss at first and last, {kind}"]
        assert first > 2.2 and last < 0.75 * first


def test_custom_module(shown: Any) -> None:
    found = shown("custom_module")
    asked = len(testing.all_quantities()) + 1  # and .grad, of five parameters
    assert found["first-order quantities of parameters compared"] == 5 * asked
    assert found["their largest relative error"] < 1e-10 and found["the same of the GGN's diagonal"] < 1e-10
    assert found["with the mean over the batch"].startswith("Samples influence each other")


def test_diag_ggn_optimizer(shown: Any) -> None:
    first, last = shown("diag_ggn_optimizer")["divided by the GGN's diagonal: loss of the first and the last 10 steps"]
    assert last < 0.4 * first


def test_differential_privacy(shown: Any) -> None:
    pytest.importorskip("dp_accounting")
    found = shown("differential_privacy")
    epsilon, accuracy = found["noise 1: epsilon and accuracy on held-out digits"]
    assert 3 < epsilon < 5 and accuracy > 0.7
    before, clipped, mistaken = found["largest norm: before, clipped, by the mistake"]
    assert clipped <= 1 + 1e-6 < before == mistaken


def test_extension_hook(shown: Any) -> None:
    found = shown("extension_hook")
    assert found.pop("diagonals that are left") == 0
    assert len(found) == 3
    assert all(abs(exact - estimate) < 3 * error < 3 * exact for exact, estimate, error in found.values())


def test_resnet(shown: Any) -> None:
    found = shown("resnet")
    assert found["with shortcuts: largest relative error of the GGN's diagonal"] < 1e-10
    for what in ("norm of an individual gradient", "trace of the GGN"):
        (first, last), (other, behind) = (
            found[f"{which} shortcuts: {what}, first and last convolution"] for which in ("with", "without")
        )
        assert other / behind > 1.5 * first / last > 0
    assert found["in training mode"] == "BatchNorm uses the statistics of the batch"


def test_gradient_of_variance(shown: Any) -> None:
    found = shown("gradient_of_variance")
    assert found["largest difference of the gradient to that of the loop"] < 1e-12
    (loss, variance), (other_loss, less) = (
        found[f"weight {w:g}: loss and variance, means of the last 20 steps"] for w in (0, 0.05)
    )
    assert less < 0.8 * variance and max(loss, other_loss) < 1.3


def test_retain_graph(shown: Any) -> None:
    found = shown("retain_graph")
    assert found["sum over the pixels"] == pytest.approx(found["trace of the GGN, whole loss"], rel=1e-12)


def test_rnn(shown: Any) -> None:
    found = shown("rnn")
    for kind in ("RNN", "GRU", "LSTM"):
        assert found[f"{kind}: largest relative error of an individual gradient"] < 1e-12
    left = {k: found[f"{k}: norm for the first of 2 and of 8 characters"] for k in ("RNN", "GRU", "LSTM")}
    assert left["RNN"][1] / left["RNN"][0] < 0.5 * left["GRU"][1] / left["GRU"][0] < 0.1
    assert left["RNN"][1] / left["RNN"][0] < 0.5 * left["LSTM"][1] / left["LSTM"][0] < 0.1


def test_save_memory_convolutions(shown: Any) -> None:
    found = shown("save_memory_convolutions")
    plain, norms, variance, rows = (
        found[f"{name}: peak of memory at 32 samples, in that of the plain gradient"]
        for name in ("plain gradient", "norms", "variance", "individual gradients")
    )
    assert plain == 1 and norms < 1.5 and variance < 0.6 * rows


def test_subsampling(shown: Any) -> None:
    found = shown("subsampling")
    assert (found["shape of all gradients"], found["shape of these"]) == ("[256, 10, 64]", "[8, 10, 64]")
    assert found["largest difference of these to the same of all"] == 0
    assert int(found["of these, digits that are taken for another"].split()[0]) >= 6


def test_trace_estimation(shown: Any) -> None:
    found = shown("trace_estimation")
    errors = [value for what, value in found.items() if "estimates" in what]
    assert errors[-1][0] < 0.5 * errors[0][0]
    assert all(0.4 < stated / measured < 2.5 for measured, stated in errors)


def test_influence(shown: Any) -> None:
    found = shown("influence")
    low, high = (found[f"correlation with exact cosines, projected to {d} by {d} for each weight"] for d in (2, 8))
    assert low < high and high > 0.8
    (share, accuracy), (drawn, other) = (
        found[f"200 {name}: share of turned digits, accuracy on those held out"]
        for name in ("chosen by examples", "at random")
    )
    assert share > 2 * drawn and accuracy > other


def test_pruning(shown: Any) -> None:
    found = shown("pruning")
    correlations = found["correlation with the curvature of the loss along single weights: Hessian, GGN"]
    assert min(correlations) > 0.9
    for share in ("50%", "70%"):
        loss = {
            k: found[f"{k}: loss and accuracy without {share}"][0] for k in ("Hessian", "GGN", "magnitude", "random")
        }
        assert max(loss["Hessian"], loss["GGN"]) < 0.8 * loss["magnitude"] < loss["random"]
    nearly_all = {k: found[f"{k}: loss and accuracy without 90%"][0] for k in ("Hessian", "GGN", "magnitude")}
    assert nearly_all["magnitude"] < min(nearly_all["Hessian"], nearly_all["GGN"])


def test_elastic_weights(shown: Any) -> None:
    found = shown("elastic_weights")
    before, _ = found["accuracy on both tasks after the first"]
    forgotten, _ = found["after the second, nothing held"]
    kept, learned = found["after the second, held by Fisher, at the best strength"]
    assert forgotten < before - 0.2 and kept > before - 0.1 and learned > 0.75
    for other in ("gradient, squared", "the same for all"):
        assert kept + learned > sum(found[f"after the second, held by {other}, at the best strength"]) + 0.05


def test_laplace(shown: Any) -> None:
    found = shown("laplace")
    for noise, factor in ((0, 1), (0.4, 0.95)):
        (right, likelihood, error), (other, less, lower) = (
            found[f"{name}, noise {noise}: accuracy, negative log-likelihood, calibration error"]
            for name in ("trained weights", "Laplace")
        )
        assert less < factor * likelihood and lower < error and abs(right - other) < 0.02


def test_noise_scale(shown: Any) -> None:
    found = shown("noise_scale")
    assert found["noise of the first batch, difference to one by one"] < 1e-5
    for name in ("all weights", "normalisations"):
        first, last = (found[f"noise scale, {name}, {when} tenth of the training"] for when in ("first", "last"))
        assert 0 < 5 * first < last
    assert found["correlation of the two, of logarithms of running means"] > 0.9


def test_ntk(shown: Any) -> None:
    narrow, wide = shown("ntk").values()
    assert wide[0] < 0.5 * narrow[0] and wide[1] < narrow[1] < 0.3


def test_importance_sampling(shown: Any) -> None:
    found = shown("importance_sampling")
    assert found["at the end: noise by the norms in that of uniform draws"] < 0.7
    assert found["largest relative difference of a measured noise to the formula"] < 0.15


def test_mislabelled(shown: Any) -> None:
    found = shown("mislabelled")
    assert found["wrong among the first 89 by norm"] > 10 * found["wrong among 89 at random, on average"]


def test_the_page_is_made_of_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GALLERY))
    page = runpy.run_path(str(GALLERY / "page.py"))
    assert page["PAGE"].read_text() == page["page"](), "run docs/gallery/page.py"
    scripts = {file.stem for file in GALLERY.glob("*.py")} - {"frame", "page"}
    assert scripts == set(page["NAMES"]) == {file.stem for file in GALLERY.glob("*.png")}


def test_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(GALLERY))
    monkeypatch.setattr(sys, "argv", ["subsampling", "--small", "--out", str(tmp_path)])
    runpy.run_path(str(GALLERY / "subsampling.py"), run_name="__main__")
    assert (tmp_path / "subsampling.png").stat().st_size > 5000
    assert "shape of these: [8, 10, 64]\n" in capsys.readouterr().out
