"""Rules: how a torch function turns (inputs, g) into a factored per-sample gradient.

A handler is called when a torch function receives a parameter together with data. It binds the
arguments to names and places a tap whose rule, in the backward pass, gives a form for each parameter.
Functions without a handler go to `generic`, which is exact for every function that is deterministic
and does not write in place.
"""

from __future__ import annotations

from packext.rules import convolution, embedding, grouped, linear, norm, recurrent  # noqa: F401 - they register handlers
from packext.rules._common import FIRST_ONLY, HANDLERS, generic, mutates
from packext.rules.elementwise import ARGUMENT
from packext.rules.opaque import OPAQUE, named

__all__ = ["ARGUMENT", "FIRST_ONLY", "HANDLERS", "OPAQUE", "generic", "mutates", "named"]
