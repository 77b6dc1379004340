"""A secure sum that was not written here: Flower's SecAgg+, for `packext.attacks.Cohort(sum=...)`.

Flower's own server workflow talks with a `ClientApp` for each client through its own modifier: keys, shares, masks,
rounding and unmasking are Flower's. Messages are handed over in this process.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import packext as px
from packext.attacks.secure import Gradient

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.client import NumPyClient
    from flwr.client.mod import secaggplus_mod
    from flwr.clientapp import ClientApp
    from flwr.common import FitIns, parameters_to_ndarrays
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.server import LegacyContext
    from flwr.server.compat.grid_client_proxy import GridClientProxy
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:
    raise ImportError("Flower is not installed: pip install 'packext[flower]'.") from None


@dataclass(frozen=True)
class SecAggPlus:
    """The mean of messages by Flower's SecAgg+ (Bell et al., CCS 2020), weighted with the clients' samples.

    A client multiplies its message with `samples / max_weight`, cuts off what lies outside of ±`clipping_range`, and
    rounds at random to one of `quantization_range` levels. So the server receives entries up to
    `clipping_range * max_weight / samples` of each client; larger ones are cut off in silence. It is the server who
    chooses all of this.

    Attributes:
        samples: of each client, which it sends as its weight; from 1 to `max_weight`.
        max_weight: largest possible weight.
        clipping_range: of weighted entries.
        quantization_range: number of levels.
        modulus_range: of the masked integers, a power of 2.
        shares: clients that hold a part of each client's secrets, an odd number; two of them can unmask.
        seed: of the random rounding. Keys and masks are drawn by the operating system, and cancel.

    Example:
        >>> cohort = Cohort(model, loss_fn, batches, sum=SecAggPlus(sizes))
        >>> attack.counts(plan, cohort.round(plan.states), sizes, loss_fn, weighted=True)
    """

    samples: Sequence[int]
    max_weight: float = 1000.0
    clipping_range: float = 8.0
    quantization_range: int = 2**22
    modulus_range: int = 2**32
    shares: int = 3
    seed: int = 0

    def __call__(self, messages: Sequence[Gradient]) -> dict[str, Tensor]:
        """What the server receives of a round.

        Args:
            messages: of each client, tensors by name.

        Returns:
            The sum of messages, each times its client's share of all samples, by name, float64.

        Raises:
            PackextError: if messages do not have the same names and shapes or hold what is not finite, if weights do
                not fit, if the sum can exceed the modulus (Flower would let it wrap around), or if Flower gives up.
        """
        self._check(messages)
        names, server = list(messages[0]), _Server()
        with _round(self.seed):
            clients = [
                _client([m[name].detach().cpu().double().numpy() for name in names], samples)
                for m, samples in zip(messages, self.samples, strict=True)
            ]
            grid = _InProcess(clients)
            server.asked = [GridClientProxy(node, grid, run_id=0) for node in range(1, len(clients) + 1)]
            context = LegacyContext(_context(0), strategy=server)
            context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
            context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
            workflow = SecAggPlusWorkflow(
                self.shares,
                2,
                max_weight=self.max_weight,
                clipping_range=self.clipping_range,
                quantization_range=self.quantization_range,
                modulus_range=self.modulus_range,
            )
            workflow(grid, context)
        if server.received is None:
            raise px.PackextError(f"Flower's SecAgg+ gave up on {len(messages)} messages; its log says why.")
        return {name: torch.from_numpy(np.array(v)) for name, v in zip(names, server.received, strict=True)}

    def _check(self, messages: Sequence[Gradient]) -> None:
        k, shapes = len(messages), [{name: value.shape for name, value in m.items()} for m in messages]
        if k < 2 or any(s != shapes[0] for s in shapes):
            raise px.PackextError(f"SecAgg+ sums tensors of the same names and shapes of two clients or more; got {k}.")
        if k != len(self.samples) or not all(1 <= n <= self.max_weight for n in self.samples):
            raise px.PackextError(
                f"{k} messages need {k} weights from 1 to max_weight = {self.max_weight:g}; got {list(self.samples)}."
            )
        if k * self.quantization_range > self.modulus_range:
            raise px.PackextError(
                f"A sum of {k} messages of {self.quantization_range} levels can exceed the modulus "
                f"{self.modulus_range}: take a smaller quantization_range or fewer clients."
            )
        for i, message in enumerate(messages):
            bad = [name for name, value in message.items() if not value.isfinite().all()]
            if bad:
                raise px.PackextError(f"Client {i} sends {bad[0]!r} with entries that are not finite.")


class _Server(FedAvg):
    """Asks all clients, and keeps what SecAgg+ gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []
        self.received: list[np.ndarray] | None = None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        return [(client, FitIns(parameters, {})) for client in self.asked]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        self.received = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


class _InProcess:
    """All that the workflow wants of a grid: hands messages to clients, numbered from 1, and brings replies."""

    def __init__(self, clients: Sequence[ClientApp]) -> None:
        self.clients = {node: (app, _context(node)) for node, app in enumerate(clients, 1)}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            app, context = self.clients[message.metadata.dst_node_id]
            replies.append(app(copy.deepcopy(message), context))  # a client takes messages apart
        return replies


@contextmanager
def _round(seed: int) -> Iterator[None]:
    """What Flower expects of a process, and the generators that it draws from; afterwards as they were."""
    states = random.getstate(), np.random.get_state()
    task, run, node = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    try:
        random.seed(seed)
        np.random.seed(seed)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, SUPERLINK_NODE_ID
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, run, node


def _client(message: list[np.ndarray], samples: int) -> ClientApp:
    class Client(NumPyClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            return message, samples, {}

    return ClientApp(lambda context: Client().to_client(), mods=[secaggplus_mod])


def _context(node: int) -> Context:
    return Context(run_id=0, node_id=node, node_config={}, state=RecordDict(), run_config={})
