"""Architecture search: scores of untrained networks, and the search of paths with gates."""

from packext.search.proxies import PROXIES as PROXIES
from packext.search.proxies import Proxy as Proxy
from packext.search.proxies import scores as scores
