"""Quantities, one question each; no layer and no torch function is mentioned in here."""

from packext.quantities.batch_grad import BatchGrad
from packext.quantities.clipped import ClippedGrad
from packext.quantities.histogram import GradHistogram, Histogram
from packext.quantities.moments import SumGradSquared, Variance
from packext.quantities.norms import BatchDotGrad, BatchL2Grad, GradDot
from packext.quantities.projected import ProjectedGrad

__all__ = [
    "BatchDotGrad",
    "BatchGrad",
    "BatchL2Grad",
    "ClippedGrad",
    "GradDot",
    "GradHistogram",
    "Histogram",
    "ProjectedGrad",
    "SumGradSquared",
    "Variance",
]
