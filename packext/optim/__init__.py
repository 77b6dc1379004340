"""Optimizers on what the extended backward pass gives: each is a `torch.optim.Optimizer`, fed within `emit`."""

from packext.optim._emit import Emitting as Emitting
from packext.optim._emit import emit as emit
from packext.optim._private import AdaptiveClipping as AdaptiveClipping
from packext.optim.accounting import Spent as Spent
from packext.optim.accounting import epsilon as epsilon
from packext.optim.accounting import noise_multiplier as noise_multiplier
from packext.optim.private import DPSGD as DPSGD
from packext.optim.private import DPAdam as DPAdam
from packext.optim.private import PoissonSampler as PoissonSampler
