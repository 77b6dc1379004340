"""Optimizers on what the extended backward pass gives: each is a `torch.optim.Optimizer`, fed within `emit`."""

from packext.optim._base import Optimizer as Optimizer
from packext.optim._base import SkippedStep as SkippedStep
from packext.optim._emit import Emitting as Emitting
from packext.optim._emit import emit as emit
from packext.optim._private import AdaptiveClipping as AdaptiveClipping
from packext.optim.accounting import Spent as Spent
from packext.optim.accounting import epsilon as epsilon
from packext.optim.accounting import noise_multiplier as noise_multiplier
from packext.optim.private import DPSGD as DPSGD
from packext.optim.private import DPAdam as DPAdam
from packext.optim.private import PoissonSampler as PoissonSampler
from packext.optim._parts import L2 as L2
from packext.optim._parts import Adam as Adam
from packext.optim._parts import ClipNorm as ClipNorm
from packext.optim._parts import DecoupledDecay as DecoupledDecay
from packext.optim._parts import Descend as Descend
from packext.optim._parts import KLClip as KLClip
from packext.optim._parts import Momentum as Momentum
from packext.optim._precondition import Diagonal as Diagonal
from packext.optim._precondition import Kronecker as Kronecker
from packext.optim._work import Part as Part
from packext.optim._work import Work as Work
from packext.optim.preconditioned import Preconditioned as Preconditioned
