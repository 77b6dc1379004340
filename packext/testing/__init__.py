"""Slow oracles, and a check of a user's own model against them in one call.

The reference is the definition: one sample at a time, plain autograd, float64. It knows nothing of taps,
rules or factors.
"""

from packext.testing._checking import against as against
from packext.testing._checking import check as check
from packext.testing._curvature import curvature_rows as curvature_rows
from packext.testing._curvature import ggn_root as ggn_root
from packext.testing._curvature import hessian as hessian
from packext.testing._curvature import hessian_diagonals as hessian_diagonals
from packext.testing._first_order import ORACLES as ORACLES
from packext.testing._first_order import all_quantities as all_quantities
from packext.testing._first_order import compare as compare
from packext.testing._reference import NoOracle as NoOracle
from packext.testing._reference import Reference as Reference
from packext.testing._report import Entry as Entry
from packext.testing._report import Report as Report
from packext.testing._report import relative_error as relative_error
from packext.testing._samples import Rows as Rows
from packext.testing._samples import batch_size as batch_size
from packext.testing._samples import call as call
from packext.testing._samples import individual_gradients as individual_gradients
from packext.testing._samples import select as select
from packext.testing._second_order import CURVATURE_ORACLES as CURVATURE_ORACLES
from packext.testing._second_order import Definition as Definition
from packext.testing._second_order import exact_curvature as exact_curvature
