"""The quantities under the module name that BackPACK's users import them from, and its `HBP`."""

from packext._errors import PackextError
from packext._quantity import Quantity
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
from packext.quantities import ProjectedGrad as ProjectedGrad
from packext.quantities import SqrtGGNExact as SqrtGGNExact
from packext.quantities import SqrtGGNMC as SqrtGGNMC
from packext.quantities import SumGradSquared as SumGradSquared
from packext.quantities import TopEigenvalues as TopEigenvalues
from packext.quantities import Variance as Variance


class Curvature:
    """What `HBP` approximates; of these, the GGN is there."""

    HESSIAN, GGN, PCH_ABS, PCH_CLIP = "hessian", "ggn", "pch-abs", "pch-clip"


class LossHessianStrategy:
    """What `HBP` takes of the loss: a root of its Hessian, exact or sampled, or the sum of its Hessians."""

    EXACT, SAMPLING, SUM = "exact", "sampling", "sum"


class BackpropStrategy:
    """How `HBP` goes back through the layers: with a root for each sample, or with an average over them."""

    SQRT, BATCH_AVERAGE = "sqrt", "average"


class ExpectationApproximation:
    """Whether `HBP` averages Jacobians (Chen) or their products with the curvature; of these, the second is there."""

    BOTEV_MARTENS, CHEN = "E[J^T E(H) J]", "E(J^T) E(H) E(J)"


def HBP(  # noqa: N802 - the name that BackPACK's users type
    curv_type: str,
    loss_hessian_strategy: str,
    backprop_strategy: str,
    ea_strategy: str,
    savefield: str = "hbp",
) -> Quantity:
    """`KFAC`, `KFLR` or `KFRA` by what they do, in another field.

    Args:
        curv_type: `Curvature.GGN`.
        loss_hessian_strategy: `LossHessianStrategy.SAMPLING` for KFAC and `EXACT` for KFLR, both with
            `BackpropStrategy.SQRT`; `SUM` for KFRA.
        backprop_strategy: see there; `BackpropStrategy.BATCH_AVERAGE` for KFRA.
        ea_strategy: `ExpectationApproximation.BOTEV_MARTENS`.
        savefield: under which the factors are found.

    Returns:
        The quantity.

    Raises:
        PackextError: for any other combination.
    """
    kinds: dict[tuple[str, str], type[Quantity]] = {
        (LossHessianStrategy.SAMPLING, BackpropStrategy.SQRT): KFAC,
        (LossHessianStrategy.EXACT, BackpropStrategy.SQRT): KFLR,
        (LossHessianStrategy.SUM, BackpropStrategy.BATCH_AVERAGE): KFRA,
    }
    kind = kinds.get((loss_hessian_strategy, backprop_strategy))
    if kind is None or (curv_type, ea_strategy) != (Curvature.GGN, ExpectationApproximation.BOTEV_MARTENS):
        raise PackextError(
            f"HBP with {curv_type!r}, {loss_hessian_strategy!r}, {backprop_strategy!r} and {ea_strategy!r} is none of "
            "KFAC, KFLR and KFRA, and there is no other. Ask for one of these; for products with other curvatures, for "
            "HMP or PCHMP."
        )
    quantity = kind()
    quantity.savefield = savefield
    return quantity
