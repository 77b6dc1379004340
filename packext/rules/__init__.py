"""Rules: how a torch function turns (inputs, g) into a factored per-sample gradient.

A handler is called when a torch function receives a parameter together with data. It binds the
arguments to names and places a tap whose rule, in the backward pass, gives a form for each parameter.
Functions without a handler go to `generic`, which is exact for every function that is deterministic
and does not write in place.
"""

from __future__ import annotations

from packext.rules import attention, convolution, elementwise, embedding, grouped, linear, norm, opaque, recurrent
from packext.rules._common import (
    FIRST_ONLY,
    HANDLERS,
    Handler,
    bind,
    generic,
    handles,
    writes_in_place,
)
from packext.rules.elementwise import ARGUMENT
from packext.rules.opaque import OPAQUE, named

__all__ = [
    "ARGUMENT",
    "FIRST_ONLY",
    "HANDLERS",
    "OPAQUE",
    "Handler",
    "attention",
    "bind",
    "convolution",
    "elementwise",
    "embedding",
    "generic",
    "grouped",
    "handles",
    "linear",
    "named",
    "norm",
    "opaque",
    "recurrent",
    "writes_in_place",
]
