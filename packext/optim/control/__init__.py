"""Controllers: batch sizes, step sizes, samples and the end of training, by statistics of the backward pass."""

from packext.optim.control._base import Controller as Controller
from packext.optim.control._batch_size import AdaptiveBatchSampler as AdaptiveBatchSampler
from packext.optim.control._batch_size import BatchSizeController as BatchSizeController
from packext.optim.control.alpha import Alpha as Alpha
from packext.optim.control.cabs import CABS as CABS
from packext.optim.control.early_stopping import EvidenceStopping as EvidenceStopping
from packext.optim.control.importance import ImportanceSampler as ImportanceSampler
from packext.optim.control.line_search import ProbabilisticLineSearch as ProbabilisticLineSearch
from packext.optim.control.noise_scale import NoiseScale as NoiseScale
from packext.optim.control.sampling_tests import InnerProductTest as InnerProductTest
from packext.optim.control.sampling_tests import NormTest as NormTest
