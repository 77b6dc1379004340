"""Optimizers on what the extended backward pass gives: each is a `torch.optim.Optimizer`, fed within `emit`."""

from packext.optim._emit import Emitting as Emitting
from packext.optim._emit import emit as emit
