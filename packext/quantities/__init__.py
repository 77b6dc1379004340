"""Quantities, one question each; no layer and no torch function is mentioned in here."""

from torch.serialization import add_safe_globals

from packext.linalg import Joint, KronEigh
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
from packext.quantities.hessian import (
    GGNMP,
    HMP,
    PCHMP,
    DiagHessianMC,
    Eigen,
    Estimate,
    HessianTrace,
    TopEigenvalues,
    TraceEstimate,
)
from packext.quantities.histogram import GradHistogram, Histogram
from packext.quantities.kfac import EKFAC, KFAC, KFLR, KFRA
from packext.quantities.moments import SumGradSquared, Variance
from packext.quantities.norms import BatchDotGrad, BatchL2Grad, GradDot
from packext.quantities.projected import ProjectedGrad

# What is saved with the parameters that have it: tensors and numbers, of which torch.load may make these.
add_safe_globals([Eigen, Estimate, Histogram, Joint, KronEigh, TraceEstimate])

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
