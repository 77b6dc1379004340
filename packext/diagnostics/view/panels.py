"""What the instruments look like: one table, which the page and the PNGs of a report both read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: The columns of the page, as Cockpit lays them out (Schneider et al. 2021, figure 2), and what else a record has.
COLUMNS = ("Step size", "Gradients", "Curvature", "Other")


@dataclass(frozen=True)
class Panel:
    """One panel of the page.

    Attributes:
        title: of the panel.
        column: one of `COLUMNS`.
        kind: "lines" over the steps; "alpha", a distribution on a parabola; "bars" and "image", histograms of one step
            over one and two axes; "samples", a bar for each of some samples of one step.
        names: of what it shows in the record, with their labels.
        axis: what the vertical axis shows (of histograms: the horizontal one), with its unit.
        log: whether that axis is logarithmic, where all values are positive.
        marks: heights of reference lines, with labels.
        says: a sentence on how to read it.
    """

    title: str
    column: str
    names: dict[str, str]
    axis: str
    kind: str = "lines"
    log: bool = True
    marks: tuple[tuple[float, str], ...] = ()
    says: str = ""


PANELS = (
    Panel("Loss", "Step size", {"Loss": "loss"}, "loss", says="Mean over the samples of the batch."),
    Panel(
        "Alpha", "Step size", {"Alpha": "alpha"}, "share of steps", "alpha", False,
        says="Where steps end on the parabola of the loss along them: 0 at its minimum, -1 not moved, 1 as far beyond.",
    ),
    Panel(
        "Alpha over steps", "Step size", {"Alpha": "alpha"}, "alpha", log=False,
        marks=((-1.0, "not moved"), (0.0, "minimum"), (1.0, "as far beyond")),
    ),
    Panel(
        "Distance and update size", "Step size", {"Distance": "distance from the start", "UpdateSize": "update"},
        "norm over parameters",
    ),
    Panel(
        "Gradient norm", "Gradients", {"GradNorm": "mean gradient", "SampleNorms": "of one sample, on average"},
        "norm over parameters", says="Before clipping.",
    ),
    Panel(
        "Noise tests", "Gradients", {"NormTest": "norm", "InnerTest": "inner", "OrthoTest": "orthogonal"},
        "standard error / norm", marks=((1.0, "noise = gradient"),),
        says="Standard error of the gradient; small is sure.",
    ),
    Panel(
        "Noise scale", "Gradients", {"NoiseScale": "one step", "NoiseScale.critical_batch": "critical batch size",
        "NormLayerNoiseScale": "normalisations, one step",
        "NormLayerNoiseScale.critical_batch": "critical, by normalisations"},
        "samples", says="The batch size at which noise is as large as the gradient.",
    ),
    Panel(
        "Signal to noise", "Gradients", {"GradSNR": "of a sample's gradient"}, "signal / noise", log=False,
        marks=((0.0, "no signal"),),
    ),
    Panel(
        "Gradient entries", "Gradients", {"GradHist1d": "share of entries"}, "entry of a sample's gradient", "bars",
        says="Share of the entries of individual gradients in each bin, some samples of one step.",
    ),
    Panel(
        "Gradient entries and parameters", "Gradients", {"GradHist2d": "share of entries"},
        "entry of a sample's gradient", "image", says="Share of entries by their gradient and their parameter's value.",
    ),
    Panel(
        "Hardest samples", "Gradients", {"SampleNorms.largest": "norm"}, "gradient norm", "samples",
        says="The largest norms of single samples' gradients in one step, and their shares in the sum of all; by index "
        "in the data set, or in the batch where the step was given none.",
    ),
    Panel("Mean GSNR", "Gradients", {"MeanGSNR": "mean over entries"}, "signal / noise", log=False),
    Panel(
        "Early stopping", "Gradients", {"EarlyStopping": "evidence"}, "evidence", log=False,
        marks=((0.0, "stop above"),),
    ),
    Panel("CABS", "Gradients", {"CABS": "batch size"}, "samples", says="Batch size suggested for plain SGD."),
    Panel(
        "Effective rank", "Gradients", {"EffectiveRank": "entropy", "EffectiveRank.participation": "participation"},
        "directions", log=False,
    ),
    Panel("Trace", "Curvature", {"HessTrace": "trace"}, "loss / parameter²"),
    Panel(
        "Largest eigenvalue", "Curvature", {"HessMaxEV": "of the Hessian", "HessMaxEV.residual": "residual"},
        "loss / parameter²", says="An eigenvalue lies within the residual of the value.",
    ),
    Panel(
        "Curvature along the update", "Curvature", {"UpdateCurvature": "second derivative"}, "loss / parameter²",
        log=False, marks=((0.0, ""),),
    ),
    Panel("TIC", "Curvature", {"TICDiag": "diagonal", "TICTrace": "trace"}, "loss × samples"),
    Panel("Condition of the tangent kernel", "Curvature", {"NTKCondition": "condition"}, "largest / smallest"),
    Panel(
        "Losses of samples", "Step size", {"SampleLosses": "median over the batch"}, "loss of a sample",
        says="Beside the mean: few samples of a large loss lift that, not this.",
    ),
    Panel(
        "Ranks of targets", "Step size",
        {"TargetRanks": "mean over the batch", "TargetRanks.same": "other targets that change nothing"}, "share",
        log=False, marks=((0.5, "outputs tell nothing of the targets"),),
        says="The share of other samples' targets that would fit a sample's output better than its own does.",
    ),
    Panel(
        "Learning rate", "Step size", {"LearningRate": "largest of the optimizer"}, "learning rate",
    ),
    Panel(
        "Curvature at the edge", "Curvature",
        {"LearningRate.edge": "steps of SGD turn unstable", "HessMaxEV": "largest eigenvalue"},
        "loss / parameter²", says="Above the edge, steps of gradient descent grow along that eigenvector.",
    ),
    Panel("Batch size", "Gradients", {"BatchSize": "samples"}, "samples", log=False),
    Panel("Norm of the parameters", "Other", {"ParamNorm": "all"}, "norm over parameters"),
    Panel(
        "Inputs", "Other",
        {"InputScale": "root mean square", "InputScale.largest": "largest", "InputScale.mean": "mean"}, "input",
        says="What the model receives.",
    ),
    Panel(
        "Outputs", "Other", {"OutputScale": "root mean square", "OutputScale.spread": "differs between samples"},
        "output", says="What the model puts out.",
    ),
    Panel("Untrained parameters", "Other", {"Untrained": "how many"}, "tensors", log=False),
    Panel("Dead units", "Other", {"DeadUnits": "of all"}, "share of units", log=False),
    Panel("Time of a step", "Other", {"Time.step": "time"}, "seconds"),
)  # fmt: skip

#: Parts of instruments that belong to others, or would say nothing as a line.
HIDDEN = {"Time", "NoiseScale.trace", "NoiseScale.signal", "NormLayerNoiseScale.trace", "NormLayerNoiseScale.signal",
          "GradHist1d.limit", "GradHist2d.limit",
          "GradHist2d.param_limit", "HessTrace.standard_error", "InputScale.infinite", "Untrained.share",
          "InitialScale.alike", "InitialScale.usual", "InputScale.zeros", "GradNorm.before"}  # fmt: skip


@dataclass(frozen=True)
class Heat:
    """A map of an instrument over layers and steps.

    Attributes:
        title: of the map.
        axis: what colour shows.
        log: whether colour is logarithmic; if not, it is that of a share.
    """

    title: str
    axis: str
    log: bool = True


#: By instrument.
HEATS = {
    "GradNorm": Heat("Gradient norm", "norm"),
    "UpdateSize": Heat("Update size", "norm"),
    "GradSNR": Heat("Signal to noise", "signal / noise"),
    "NoiseScale": Heat("Noise scale", "samples"),
    "NormLayerNoiseScale": Heat("Noise scale of normalisations", "samples"),
    "HessTrace": Heat("Trace of the curvature", "loss / parameter²"),
    "ActivationScale": Heat("Activations", "root mean square"),
    "DeadUnits": Heat("Dead units", "share of units", log=False),
    "IdleUnits": Heat("Idle units", "share of units", log=False),
    "ParamNorm": Heat("Norm of the parameters", "norm"),
}


def panels_of(names: Iterable[str], arrays: Iterable[str]) -> list[Panel]:
    """The panels that have something to show.

    Args:
        names: of numbers in the record.
        arrays: names of arrays.

    Returns:
        Panels in the order of the table, and one for each other name of a number of the whole model. No two have one
        title, by which the page knows them.
    """
    known, titles = {name for panel in PANELS for name in panel.names} | HIDDEN, {panel.title for panel in PANELS}
    there = {name for name in names if "/" not in name}
    own = [
        Panel(f"{name} (your own)" if name in titles else name, "Other", {name: name}, name, log=False)
        for name in names
        if name in there - known
    ]
    there |= {name for name in arrays if "/" not in name}
    return [panel for panel in PANELS if there & panel.names.keys()] + own
