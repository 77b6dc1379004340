"""Architecture search: scores of untrained networks, and the search of paths with gates."""

from packext.search.latency import LatencyTable as LatencyTable
from packext.search.mixed import MixedOp as MixedOp
from packext.search.mixed import Zero as Zero
from packext.search.proxies import PROXIES as PROXIES
from packext.search.proxies import Proxy as Proxy
from packext.search.proxies import Scores as Scores
from packext.search.proxies import scores as scores
from packext.search.proxyless import ArchitectureGradient as ArchitectureGradient
from packext.search.proxyless import ProxylessNAS as ProxylessNAS
from packext.search.race import Race as Race
