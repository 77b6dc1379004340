"""Training over slow networks, and with processes that come and go, on `torch.distributed`."""

from packext.optim.distributed.averaging import AdaptiveAverager as AdaptiveAverager
from packext.optim.distributed.collaborative import Gathered as Gathered
from packext.optim.distributed.collaborative import TargetBatch as TargetBatch
from packext.optim.distributed.collaborative import catch_up as catch_up
from packext.optim.distributed.compression import Compression as Compression
from packext.optim.distributed.compression import compression_hook as compression_hook
from packext.optim.distributed.compressors import DGC as DGC
from packext.optim.distributed.compressors import GaussianK as GaussianK
from packext.optim.distributed.compressors import TopK as TopK
from packext.optim.distributed.delayed import DSSGD as DSSGD
from packext.optim.distributed.swarm import Swarm as Swarm
