"""Quantities, one question each; no layer and no torch function is mentioned in here."""

from packext.quantities.batch_grad import BatchGrad
from packext.quantities.clipped import ClippedGrad
from packext.quantities.diag_hessian import BatchDiagHessian, DiagHessian
from packext.quantities.ggn import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    DiagEF,
    DiagGGNExact,
    DiagGGNMC,
    GGNGram,
    SqrtGGNExact,
    SqrtGGNMC,
)
from packext.quantities.hessian import GGNMP, HMP, PCHMP, DiagHessianMC, HessianTrace, TopEigenvalues
from packext.quantities.histogram import GradHistogram, Histogram
from packext.quantities.kfac import EKFAC, KFAC, KFLR, KFRA
from packext.quantities.moments import SumGradSquared, Variance
from packext.quantities.norms import BatchDotGrad, BatchL2Grad, GradDot
from packext.quantities.projected import ProjectedGrad

__all__ = [
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchDotGrad",
    "BatchGrad",
    "BatchL2Grad",
    "ClippedGrad",
    "DiagEF",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "DiagHessianMC",
    "EKFAC",
    "GGNGram",
    "GGNMP",
    "GradDot",
    "GradHistogram",
    "HMP",
    "HessianTrace",
    "Histogram",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCHMP",
    "ProjectedGrad",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "TopEigenvalues",
    "Variance",
]
