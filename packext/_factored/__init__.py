"""The forms that a per-sample gradient takes, and the questions that can be put to it.

A per-sample gradient of one tensor is `[N, *shape]`. It is held in factors and formed only
tile by tile. The forms are a closed handful:

    Outer   sum over S of g aᵀ, with a [N, G, S, I] and g [N, G, O, S]      linear, convolution, ...
    Lookup  rows of a table, addressed by indices [N, S] with g [N, S, E]   embedding
    Dense   the rows themselves [N, *shape]                                 bias, norm, elementwise
    Pulled  a form of a value made of parameters, pulled back to one        weight norm, merged weights
    Masked  anything else: the vjp of the call, cotangent masked to one sample at a time
    Sum     several uses of the same parameter

Axis letters: N samples, G groups, S shared positions, I features in, O features out, P entries.
Every form answers `rows(lo, hi)`; the other questions have a default through tiles of rows (see
`_statistics`) and are answered by a form itself only where its factors make that cheaper.
All arithmetic happens in `acc`: float32, or float64 where the inputs are.
"""

from packext._factored.base import Dense, Factored, Terms, accumulation_dtype, two_sided
from packext._factored.kronecker import Kronecker, added
from packext._factored.merging import merge, side_by_side
from packext._factored.other import Lookup, Masked, Sum, Traced
from packext._factored.outer import Outer, Patches, gram
from packext._factored.pulled import Pulled
from packext._factored.tables import View, rows_in

__all__ = [
    "Dense",
    "Factored",
    "Kronecker",
    "Lookup",
    "Masked",
    "Outer",
    "Patches",
    "Pulled",
    "Sum",
    "Terms",
    "Traced",
    "View",
    "accumulation_dtype",
    "added",
    "gram",
    "merge",
    "rows_in",
    "side_by_side",
    "two_sided",
]
