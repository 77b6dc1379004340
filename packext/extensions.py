"""The quantities under the module name that BackPACK's users import them from."""

from packext.quantities import EKFAC as EKFAC
from packext.quantities import GGNMP as GGNMP
from packext.quantities import HMP as HMP
from packext.quantities import KFAC as KFAC
from packext.quantities import KFLR as KFLR
from packext.quantities import BatchDiagGGNExact as BatchDiagGGNExact
from packext.quantities import BatchDiagGGNMC as BatchDiagGGNMC
from packext.quantities import BatchDotGrad as BatchDotGrad
from packext.quantities import BatchGrad as BatchGrad
from packext.quantities import BatchL2Grad as BatchL2Grad
from packext.quantities import ClippedGrad as ClippedGrad
from packext.quantities import DiagEF as DiagEF
from packext.quantities import DiagGGNExact as DiagGGNExact
from packext.quantities import DiagGGNMC as DiagGGNMC
from packext.quantities import DiagHessianMC as DiagHessianMC
from packext.quantities import GGNGram as GGNGram
from packext.quantities import GradDot as GradDot
from packext.quantities import GradHistogram as GradHistogram
from packext.quantities import HessianTrace as HessianTrace
from packext.quantities import ProjectedGrad as ProjectedGrad
from packext.quantities import SqrtGGNExact as SqrtGGNExact
from packext.quantities import SqrtGGNMC as SqrtGGNMC
from packext.quantities import SumGradSquared as SumGradSquared
from packext.quantities import TopEigenvalues as TopEigenvalues
from packext.quantities import Variance as Variance
