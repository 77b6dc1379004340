"""What stops gradients from telling: what a client does to its own before it leaves, and checks of what it receives.

`DPSGD`, `DPAdam` and their accounting (`epsilon`, `noise_multiplier`) are those of `packext.optim`.
"""

from packext.defences.gradient import Clipped as Clipped
from packext.defences.gradient import Compose as Compose
from packext.defences.gradient import GaussianNoise as GaussianNoise
from packext.defences.gradient import LaplacianNoise as LaplacianNoise
from packext.defences.gradient import Pruning as Pruning
from packext.defences.gradient import Quantisation as Quantisation
from packext.defences.gradient import TopK as TopK
from packext.defences.gradient import replaces_share as replaces_share
from packext.defences.nopeek import NoPeek as NoPeek
from packext.defences.nopeek import distance_correlation as distance_correlation
from packext.defences.nopeek import u_distance_correlation_sqr as u_distance_correlation_sqr
from packext.defences.precode import Precode as Precode
from packext.defences.precode import PrecodeLoss as PrecodeLoss
from packext.defences.received import Received as Received
from packext.defences.received import check_received as check_received
from packext.defences.soteria import Soteria as Soteria
from packext.defences.soteria import sensitivity as sensitivity
from packext.defences.withholding import Withholding as Withholding
from packext.optim import DPSGD as DPSGD
from packext.optim import DPAdam as DPAdam
from packext.optim import epsilon as epsilon
from packext.optim import noise_multiplier as noise_multiplier
