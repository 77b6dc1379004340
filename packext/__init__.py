"""packext: per-sample quantities and curvature of any PyTorch model in one backward pass."""

from importlib import import_module as _import_module
from typing import Any as _Any

from packext import extensions as extensions
from packext import linalg as linalg
from packext._backpack import backpack as backpack
from packext._errors import CoupledSamplesError as CoupledSamplesError
from packext._errors import NotExtendedError as NotExtendedError
from packext._errors import PackextError as PackextError
from packext._errors import UnsupportedUseError as UnsupportedUseError
from packext._errors import WrongRuleError as WrongRuleError
from packext._explain import Explanation as Explanation
from packext._explain import explain as explain
from packext._extend import extend as extend
from packext._extend import is_extended as is_extended
from packext._extend import unextend as unextend
from packext._lineage import disable as disable
from packext._results import Results as Results
from packext._scale import coupled as coupled
from packext.quantities import EKFAC as EKFAC
from packext.quantities import GGNMP as GGNMP
from packext.quantities import HMP as HMP
from packext.quantities import KFAC as KFAC
from packext.quantities import KFLR as KFLR
from packext.quantities import KFRA as KFRA
from packext.quantities import PCHMP as PCHMP
from packext.quantities import BatchDiagGGNExact as BatchDiagGGNExact
from packext.quantities import BatchDiagGGNMC as BatchDiagGGNMC
from packext.quantities import BatchDiagHessian as BatchDiagHessian
from packext.quantities import BatchDotGrad as BatchDotGrad
from packext.quantities import BatchGrad as BatchGrad
from packext.quantities import BatchL2Grad as BatchL2Grad
from packext.quantities import ClippedGrad as ClippedGrad
from packext.quantities import DiagEF as DiagEF
from packext.quantities import DiagGGNExact as DiagGGNExact
from packext.quantities import DiagGGNMC as DiagGGNMC
from packext.quantities import DiagHessian as DiagHessian
from packext.quantities import DiagHessianMC as DiagHessianMC
from packext.quantities import GGNGram as GGNGram
from packext.quantities import GradDot as GradDot
from packext.quantities import GradHistogram as GradHistogram
from packext.quantities import HessianTrace as HessianTrace
from packext.quantities import Histogram as Histogram
from packext.quantities import ProjectedGrad as ProjectedGrad
from packext.quantities import SqrtGGNExact as SqrtGGNExact
from packext.quantities import SqrtGGNMC as SqrtGGNMC
from packext.quantities import SumGradSquared as SumGradSquared
from packext.quantities import TopEigenvalues as TopEigenvalues
from packext.quantities import Variance as Variance

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    # imported when first used
    if name in ("adapters", "attacks", "audit", "defences", "diagnostics", "optim", "search", "testing"):
        return _import_module(f"packext.{name}")
    raise AttributeError(f"module 'packext' has no attribute {name!r}")
