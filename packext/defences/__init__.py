"""What stops gradients from telling: what a client does to its own before it leaves, and checks of what it receives."""

from packext.defences.gradient import Clipped as Clipped
from packext.defences.gradient import Compose as Compose
from packext.defences.gradient import GaussianNoise as GaussianNoise
from packext.defences.gradient import LaplacianNoise as LaplacianNoise
from packext.defences.gradient import Pruning as Pruning
from packext.defences.gradient import Quantisation as Quantisation
from packext.defences.gradient import TopK as TopK
from packext.defences.received import Received as Received
from packext.defences.received import check_received as check_received
