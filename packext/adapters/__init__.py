"""Adapters: what other packages read, filled from packext's backward pass.

`packext.adapters.laplace` is a backend for laplace-torch, `packext.adapters.opacus` serves Opacus's optimizers,
`packext.adapters.lightning` and `packext.adapters.huggingface` are callbacks that emit quantities of your choice. Each
imports the package that it is for, so import the one you need. `Attributor` needs no other package.
"""

from packext.adapters.attribution import Attributor as Attributor
