import math

import numpy as np
import pytest
import torch
from torch import nn

import packext as px
from packext import _cli, demo, testing


def test_demo_prints_both_tables_and_writes_the_figure_and_the_report(tmp_path, capsys):
    pytest.importorskip("plotly")
    assert _cli.main(["demo", "--seconds", "1", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    for word in ("conv1", "conv2", "linear", "whole model", "λ max", "true digit", "K-FAC"):
        assert word in printed
    figure = tmp_path / "new" / "packext-demo.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    report = tmp_path / "new" / "packext-demo-run" / "report" / "report.html"
    assert printed.rstrip().endswith(f"Report of that training: {report}")
    assert "No verdict stands" in printed and report.stat().st_size > 1_000_000


def test_demo_returns_finite_statistics_that_add_up(tmp_path):
    pytest.importorskip("plotly")
    layers = demo.run(seconds=0.5, out=tmp_path)
    assert list(layers) == ["whole model", "conv1", "conv2", "linear"]
    for noise in layers.values():
        assert np.isfinite(np.array(noise)).all()
        assert (noise.scale > 0).all()  # infinite if no signal is seen
        assert (np.diff(noise.step) > 0).all()
    whole, *parts = layers.values()
    np.testing.assert_allclose(whole.gradient, sum(p.gradient for p in parts), rtol=1e-4)
    np.testing.assert_allclose(whole.trace, sum(p.trace for p in parts), rtol=1e-4)


def test_curvature_of_a_layer_and_of_the_model_equals_a_dense_computation():
    torch.manual_seed(0)
    n = demo.BATCH_SIZE
    model, loss_function = px.extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))), nn.CrossEntropyLoss()
    x, y = torch.randn(n, 4), torch.randint(3, (n,))
    with px.backpack(px.GGNGram(), scale="sample") as results:
        px.extend(loss_function)(model(x), y).backward()
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / n] * n)
    for names in (["0.weight", "0.bias"], ["2.weight", "2.bias"], list(rows)):
        root = torch.cat([rows[name].flatten(2) for name in names], 2).flatten(0, 1)
        spectrum = torch.linalg.eigvalsh(root.T @ root)
        trace, largest = demo.curvature(results, names)
        assert math.isclose(trace, spectrum.sum().item(), rel_tol=1e-4)
        assert math.isclose(largest, spectrum[-1].item(), rel_tol=1e-4)


def test_the_race_starts_from_one_network_which_the_seed_decides(monkeypatch):
    network, starts = demo.network, []

    def noted():
        model = network()
        starts.append(model.linear.weight.detach().clone())
        return model

    monkeypatch.setattr(demo, "network", noted)
    for seed in (0, 1):
        torch.manual_seed(seed)
        x, y, _ = demo.load_data()
        demo.race(x, y, 0.02)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[2], starts[3])
    assert not torch.equal(starts[0], starts[2])


def test_a_folder_that_cannot_be_made_is_said_before_the_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo, "train", None)
    with pytest.raises(SystemExit, match="2"):
        _cli.main(["demo", "--out", str(tmp_path / "file")])
    assert "must be a folder" in capsys.readouterr().err


def test_demo_replaces_the_promised_number_of_labels():
    x, y, truth = demo.load_data()
    assert x.shape == (len(y), 1, 8, 8)
    assert (y != truth).sum() == demo.WRONG_LABELS
    assert set(y.tolist()) == set(range(10))


def test_noise_of_a_layer_equals_a_computation_by_hand():
    torch.manual_seed(0)
    samples = demo.BATCH_SIZE
    x, y = torch.randn(samples, 5).double(), torch.randint(3, (samples,))
    model = px.extend(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double())
    loss = px.extend(nn.CrossEntropyLoss())(model(x), y)
    with px.backpack(px.BatchL2Grad(), px.Variance(), px.GradDot(), scale="sample") as results:
        loss.backward()
    noise = demo.measure(1, results, ["0.weight", "0.bias"])

    gradients = []
    for n in range(samples):
        sample_loss = nn.CrossEntropyLoss()(model(x[n : n + 1]), y[n : n + 1])
        found = torch.autograd.grad(sample_loss, list(model[0].parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    g = torch.stack(gradients)
    mean = g.mean(0)
    trace = (g - mean).square().sum() / (samples - 1)
    scale = trace / (mean.square().sum() - trace / samples)
    assert scale > 0
    assert noise.scale == pytest.approx(scale.item())
    assert noise.sample_norm == pytest.approx(g.norm(dim=1).mean().item())
    assert noise.opposed == pytest.approx((g @ mean < 0).double().mean().item())


def test_noise_scale_is_infinite_when_noise_explains_the_gradient():
    noise = demo.Noise(step=1, gradient=1.0, trace=2.0 * demo.BATCH_SIZE, sample_norm=1, opposed=0)
    assert noise.scale == math.inf


def test_demo_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(_cli, "find_spec", lambda name: None if name == "rich" else object())
    assert _cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "rich" in error and "pip install 'packext[demo]'" in error
