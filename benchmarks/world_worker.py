"""One process of `benchmarks.world`: takes commands from its standard input, one JSON object a line."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.optimizers import digits
from packext.optim import distributed as pd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, of its own torch.jit
    from torch.distributed.optim import PostLocalSGDOptimizer

LOSS = nn.CrossEntropyLoss()


class Training:
    """A model, and how it is trained together."""

    def __init__(self, method: str, widths: list[int], lr: float, seed: int, momentum: float = 0.9) -> None:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for one, two in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(one, two), nn.ReLU()]
        self.model: Any = nn.Sequential(*layers[:-1])
        self.inner = self.model
        self.counts: Any = None
        kind, *numbers = method.split()
        sgd = torch.optim.SGD(self.model.parameters(), lr, momentum=0.0 if kind == "DGC" else momentum)
        self.optimizer: Any = sgd
        if kind == "DSSGD":
            self.optimizer = self.counts = pd.DSSGD(sgd, int(numbers[0]), int(numbers[1]))
        elif kind == "ADPSGD":
            self.counts = pd.AdaptiveAverager(4, calibration=40)
            self.optimizer = PostLocalSGDOptimizer(sgd, self.counts)
        else:
            self.model = DistributedDataParallel(self.model)
            named = self.inner.named_parameters()
            if kind != "synchronous":
                ratio = float(numbers[0])
                make = {"TopK": pd.TopK, "GaussianK": pd.GaussianK}.get(kind)
                self.counts = pd.DGC(named, sgd, ratio, momentum=momentum) if make is None else make(named, ratio)
                self.model.register_comm_hook(self.counts, pd.compression_hook)

    def step(self, x: Any, y: Any) -> None:
        self.optimizer.zero_grad()
        LOSS(self.model(x), y).backward()
        self.optimizer.step()

    def flush(self) -> None:
        if isinstance(self.counts, pd.DSSGD):
            self.counts.flush()
        elif isinstance(self.counts, pd.AdaptiveAverager):
            self.counts.flush(self.optimizer.param_groups)


def pace(method: str, widths: list[int], compute: float, warm: int, steps: int) -> dict[str, Any]:
    """How long a step takes whose own work takes `compute` seconds: the forward pass, and sleep for the rest."""
    training = Training(method, widths, 0.01, 0)
    x, y = torch.randn(8, widths[0]), torch.randint(10, (8,))
    late, begin = 0, 0.0
    for step in range(warm + steps):
        if step == warm:
            begin = time.perf_counter()
        start = time.perf_counter()
        training.optimizer.zero_grad()
        loss = LOSS(training.model(x), y)
        rest = compute - (time.perf_counter() - start)
        late += rest < 0
        time.sleep(max(0.0, rest))
        loss.backward()
        training.optimizer.step()
    seconds = time.perf_counter() - begin if steps else 0.0
    training.flush()
    return {"seconds": seconds / max(1, steps), "late": late}


def train(method: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Digits, 64-100-10, 32 samples a process and step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y, test_x, test_y = digits()
    training = Training(method, [64, 100, 10], lr, seed)
    order = torch.Generator().manual_seed(1000 * seed + rank)
    mine = torch.arange(rank, len(x), world)
    for _ in range(steps):
        index = mine[torch.randint(len(mine), (32,), generator=order)]
        training.step(x[index], y[index])
    training.flush()
    with torch.no_grad():
        loss = LOSS(training.inner(x), y).item()
        right = (training.inner(test_x).argmax(1) == test_y).float().mean().item()
    plain = sum(p.numel() * 4 for p in training.inner.parameters()) * steps
    return {"loss": loss, "accuracy": right, "payload": plain if training.counts is None else training.counts.payload}


def main() -> None:
    rank, world, address, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.environ["GLOO_SOCKET_IFNAME"] = device
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=world)
    dist.all_reduce(torch.zeros(1))
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps({"pace": pace, "train": train}[command.pop("do")](**command)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
