"""How much of a gradient is noise: tests of the batch size, noise scale, and signal-to-noise ratios.

All are of the samples' own gradients g_n, with mean g over the N samples of the step. The trace of their covariance is
tr = (sum |g_n|² - N |g|²) / (N - 1), unbiased; |g|² - tr / N is an unbiased estimate of the squared norm of the true
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import OVERFLOW, Absent, Step


def _samples(step: Step) -> int:
    n = step.n
    if n < 2:
        raise Absent("one sample: no variance")
    return n


def _traces(step: Step) -> tuple[list[str], Tensor, Tensor, int]:
    """Names; of each parameter |g|² and the trace of the covariance `[L]`, in float64; N."""
    return step.once("traces", lambda: _covariances(step))


def _covariances(step: Step) -> tuple[list[str], Tensor, Tensor, int]:
    n, squares = _samples(step), step.layers("batch_l2")
    if not step.several:
        dots = step.layers("grad_dot")
        mean = torch.stack([dots[k] for k in squares]).double().mean(1)
    else:
        gradient = step.pure_gradient
        mean = torch.stack([gradient[k].double().square().sum() for k in squares])
    total = torch.stack(list(squares.values())).double().sum(1)
    _finite(mean, total)
    return list(squares), mean, (total - n * mean).clamp(min=0) / (n - 1), n


def _finite(*found: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in found):
        raise Absent(OVERFLOW)


def _no_gradient(square: float) -> None:
    if not square > 0:
        raise Absent("the mean gradient is zero")


class NormTest(Instrument):
    """Standard error of the gradient in units of its norm. Small is sure; at 1, noise is as large as the gradient.

    - Formula: `sqrt(tr / N) / |g|`
    - Units: none
    - Cost: `BatchL2Grad` and `GradDot`, in the pass that runs anyway
    - Source: Byrd, Chin, Nocedal & Wu 2012
    - Absent: for one sample; where g is zero or a gradient is not finite
    """

    needs = (px.BatchL2Grad(), px.GradDot())

    def measure(self, step: Step) -> float:
        _, mean, trace, n = _traces(step)
        _no_gradient(float(mean.sum()))
        return float((trace.sum() / n / mean.sum()).sqrt())


def _along(step: Step) -> tuple[Tensor, float, int]:
    n, dots = _samples(step), step["grad_dot"].double()
    _finite(dots)
    square = float(dots.mean())
    _no_gradient(square)
    return dots, square, n


class InnerTest(Instrument):
    """Standard error of the gradient's length along itself, in units of it: the inner product test.

    - Formula: `sqrt(var(g_n·g) / N) / |g|²`, with the unbiased variance
    - Units: none
    - Cost: `GradDot`, in the pass that runs anyway
    - Source: Bollapragada, Byrd & Nocedal 2018
    - Absent: for one sample; where g is zero or a gradient is not finite; in a step of several backward passes
    """

    needs = (px.GradDot(),)

    def measure(self, step: Step) -> float:
        dots, square, n = _along(step)
        return float((dots.var() / n).sqrt() / square)


class OrthoTest(Instrument):
    """Standard error of the gradient across its own direction, in units of its norm.

    The squares of `InnerTest` and `OrthoTest` add up to that of `NormTest`.

    - Formula: `sqrt(sum over n of |g_n - (g_n·g / |g|²) g|² / (N (N - 1))) / |g|`
    - Units: none
    - Cost: `BatchL2Grad` and `GradDot`, in the pass that runs anyway
    - Source: Bollapragada, Byrd & Nocedal 2018
    - Absent: for one sample; where g is zero or a gradient is not finite; in a step of several backward passes
    """

    needs = (px.BatchL2Grad(), px.GradDot())

    def measure(self, step: Step) -> float:
        dots, square, n = _along(step)
        _finite(step["batch_l2"])
        across = (step["batch_l2"].double() - dots.square() / square).clamp(min=0).sum()
        return float((across / (n * (n - 1) * square)).sqrt())


class NoiseScale(Instrument):
    """The gradient noise scale, whole and of each parameter: the batch size at which noise is as large as the gradient.

    "NoiseScale.trace" and "NoiseScale.signal" are the unbiased estimates of tr and |G|², and
    "NoiseScale.critical_batch" is the ratio of their moving averages over tracked steps: the estimate of the critical
    batch size. That of one step alone is very noisy.

    - Formula: `tr / |G|²`, with `|G|² = |g|² - tr / N`
    - Units: samples; of the trace and the signal, a squared gradient of a sample's own loss
    - Cost: `BatchL2Grad` and `GradDot`, in the pass that runs anyway
    - Source: McCandlish, Kaplan & Amodei 2018, appendix A.1, the "simple" noise scale
    - Absent: for one sample; where the estimate of |G|² is not positive; where a gradient is not finite
    """

    needs = (px.BatchL2Grad(), px.GradDot())

    def __init__(self, decay: float = 0.95) -> None:
        """Choose the weight that the moving averages keep of the past, per tracked step.

        Raises:
            ValueError: if it is not at least 0 and less than 1.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay!r}.")
        self.decay = decay

    def start(self, step: int) -> None:
        self._trace = self._signal = 0.0

    def measure(self, step: Step) -> dict[str, Any]:
        return self._found(*_traces(step))

    def _found(self, names: list[str], mean: Tensor, traces: Tensor, n: int) -> dict[str, Any]:
        """What it shows of the |g|² and the traces of parameters with these names `[L]`, of n samples."""
        signals = mean - traces / n
        trace, signal = float(traces.sum()), float(signals.sum())
        # Both start at zero, with weights that do not add up to one: alike for both, they drop out of the ratio.
        self._trace = self.decay * self._trace + (1 - self.decay) * trace
        self._signal = self.decay * self._signal + (1 - self.decay) * signal
        found = {"": _ratio(trace, signal), ".critical_batch": _ratio(self._trace, self._signal)}
        layers = zip(names, traces.tolist(), signals.tolist(), strict=True)
        return {**found, ".trace": trace, ".signal": signal, **{k: _ratio(t, s) for k, t, s in layers}}


def _ratio(trace: float, signal: float) -> float | Absent:
    return (
        trace / signal if signal > 0 else Absent("all noise: the estimate of the true gradient's norm is not positive")
    )


class NormLayerNoiseScale(NoiseScale):
    """The gradient noise scale of scales and shifts of normalisation layers alone: cheap, if no other asks for more.

    Parts are named as those of `NoiseScale`. The noise scale of a transformer follows that of its LayerNorms, whose
    individual gradients cost little; it is not the same number.

    - Formula: as `NoiseScale`, over the parameters of the modules that have "Norm" in the name of their class
    - Units: as `NoiseScale`
    - Cost: `BatchL2Grad` and `GradDot`, of these parameters alone unless another instrument reads quantities of others
    - Source: Gray, Tiwari, Bergsma & Hestness 2024 (arXiv:2411.00999)
    - Absent: as `NoiseScale`. A model without such a parameter is refused when the monitor is made
    """

    def parameters(self, model: nn.Module) -> list[nn.Parameter] | None:
        norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
        return [p for m in norms for p in m.parameters(recurse=False) if p.requires_grad]

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not self.parameters(model):
            raise ValueError(
                f"NormLayerNoiseScale needs parameters of normalisation layers that require grad, and "
                f"{type(model).__name__} has none: take NoiseScale."
            )

    def measure(self, step: Step) -> dict[str, Any]:
        own = set(self.parameters(step.model) or ())
        names, mean, traces, n = _traces(step)
        kept = [k for k, name in enumerate(names) if step.parameters[name] in own]
        return self._found([names[k] for k in kept], mean[kept], traces[kept], n)


class GradSNR(Instrument):
    """Signal-to-noise ratio of a sample's gradient, whole and of each parameter.

    One over the noise scale, but defined where that is infinite: not positive where no signal is seen.

    - Formula: `(|g|² - tr / N) / tr`
    - Units: none
    - Cost: `BatchL2Grad` and `GradDot`, in the pass that runs anyway
    - Source: McCandlish, Kaplan & Amodei 2018, appendix A.1: one over their noise scale
    - Absent: for one sample; where samples do not differ; where a gradient is not finite
    """

    needs = (px.BatchL2Grad(), px.GradDot())

    def measure(self, step: Step) -> dict[str, Any]:
        names, mean, traces, n = _traces(step)
        signals = mean - traces / n
        pairs = [(float(signals.sum()), float(traces.sum())), *zip(signals.tolist(), traces.tolist(), strict=True)]
        found = zip(["", *names], pairs, strict=True)
        return {k: s / t if t > 0 else Absent("no variance between samples") for k, (s, t) in found}


def _entries(step: Step) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Mean gradient and unbiased variance of each entry, of each parameter; N."""
    n, variances, gradient = _samples(step), step.layers("variance"), step.pure_gradient
    return [(gradient[k].double(), v.double() * (n / (n - 1))) for k, v in variances.items()], n


class MeanGSNR(Instrument):
    """Mean over all D entries of the gradient signal-to-noise ratio: true gradient squared over variance.

    - Formula: `1/D sum over d of (g_d² - v_d / N) / (v_d + epsilon)`, with v_d the unbiased variance over the samples
    - Units: none; epsilon has those of a squared gradient of a sample's own loss
    - Cost: `Variance` and `GradDot`, in the pass that runs anyway
    - Source: Liu, Bai, Jiang, Chen & Wang 2020, there with the biased g_d²
    - Absent: for one sample; in a step of several backward passes; where `.grad` is not the mean of the g_n
    """

    needs = (px.Variance(), px.GradDot())

    def __init__(self, epsilon: float = 1e-5) -> None:
        """Choose what is added to each variance, in units of a squared gradient of a sample's own loss."""
        self.epsilon = epsilon

    def measure(self, step: Step) -> float:
        entries, n = _entries(step)
        total = sum(float(((g.square() - v / n) / (v + self.epsilon)).sum()) for g, v in entries)
        return total / sum(g.numel() for g, _ in entries)


class EarlyStopping(Instrument):
    """Evidence that nothing is left but noise. Positive says stop.

    - Formula: `1 - N/D sum over d of g_d² / (v_d + epsilon)` over all D entries, with v_d the unbiased variance over
      the samples
    - Units: none; epsilon has those of a squared gradient of a sample's own loss
    - Cost: `Variance` and `GradDot`, in the pass that runs anyway
    - Source: Mahsereci, Balles, Lassner & Hennig 2017, equation 7
    - Absent: for one sample; in a step of several backward passes; where `.grad` is not the mean of the g_n
    """

    needs = (px.Variance(), px.GradDot())

    def __init__(self, epsilon: float = 1e-5) -> None:
        """Choose what is added to each variance, in units of a squared gradient of a sample's own loss."""
        self.epsilon = epsilon

    def measure(self, step: Step) -> float:
        entries, n = _entries(step)
        total = sum(float((g.square() / (v + self.epsilon)).sum()) for g, v in entries)
        return 1 - n * total / sum(g.numel() for g, _ in entries)


class CABS(Instrument):
    """The batch size that plain gradient descent should have, for losses that are 0 at best.

    - Formula: `lr tr / L`, with L the mean loss
    - Units: samples
    - Cost: `BatchL2Grad` and `GradDot`, in the pass that runs anyway
    - Source: Balles, Romero & Hennig 2017, equation 22
    - Absent: for one sample; with several learning rates; where the loss is not positive, or `.grad` is a multiple of
      g. Another optimizer than `torch.optim.SGD` without momentum and weight decay is refused when the monitor is made
    """

    needs = (px.BatchL2Grad(), px.GradDot())

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if type(optimizer) is not torch.optim.SGD:
            raise ValueError(
                f"CABS is defined for torch.optim.SGD without momentum, not for {type(optimizer).__name__}."
            )
        if extras := self._extras(optimizer.param_groups):
            raise ValueError(f"CABS is defined for plain SGD; this SGD has {extras}.")

    def _extras(self, groups: list[dict[str, Any]]) -> str:
        """What is not plain in an SGD, by the names of its options."""
        return ", ".join(k for k in ("momentum", "weight_decay", "maximize") if any(group[k] for group in groups))

    def measure(self, step: Step) -> float:
        rates = {float(group["lr"]) for group in step.groups}
        if len(rates) > 1:
            raise Absent(f"the parameters have different learning rates: {sorted(rates)}")
        if extras := self._extras(step.groups):
            raise Absent(f"the optimizer has got {extras}")
        if abs(step.factor - 1) > 1e-6:
            raise Absent(f"`.grad` is {step.factor:.6g} times the mean of the samples' own gradients: no learning rate")
        _, _, traces, _ = _traces(step)
        loss = step.loss
        if not loss > 0:
            raise Absent("the loss is not positive")
        return rates.pop() * float(traces.sum()) / loss


class SampleNorms(Instrument):
    """Norms of the samples' own gradients: their mean, their distribution, and which samples have the largest.

    "SampleNorms.quantiles" has those at 0, 5, 25, 50, 75, 95 and 100 % (`[7]`); "SampleNorms.hardest" the samples with
    the largest norms, the largest first, and "SampleNorms.largest" these norms (both `[count]`); over all backward
    passes of the step, one after the other. Samples are indices in the data set where the step was given them
    (`monitor.step(samples=...)`), and otherwise positions in the batch.

    - Formula: mean of `|g_n|`
    - Units: those of the gradient of a sample's own loss
    - Cost: `BatchL2Grad`, in the pass that runs anyway
    - Source: the definition
    - Absent: where there are no individual gradients
    """

    needs = (px.BatchL2Grad(),)

    def __init__(self, count: int = 8) -> None:
        """Choose how many samples to name.

        Raises:
            ValueError: if that is less than one.
        """
        if count < 1:
            raise ValueError(f"count must be an int of 1 or more, got {count!r}.")
        self.count = count

    def measure(self, step: Step) -> dict[str, Any]:
        norms = step["batch_l2"].double().sqrt()
        top = norms.topk(min(self.count, len(norms)))
        named = step.indices(top.indices)
        hardest = top.indices if named is None else named
        return {"": norms.mean(), ".quantiles": quantiles(norms), ".hardest": hardest, ".largest": top.values}


def quantiles(values: Tensor) -> Tensor:
    """Those at 0, 5, 25, 50, 75, 95 and 100 % `[7]`."""
    at = torch.tensor([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], dtype=values.dtype, device=values.device)
    return values.quantile(at)
