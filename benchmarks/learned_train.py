"""Trains the step-size policies that packext ships: ``python -m benchmarks.learned_train``.

Writes packext/optim/learned/policies.json and, of policies that are for comparison only,
benchmarks/results/learned-policies.json; from seed 0 and nothing else. Tasks are multilayer perceptrons on parts of
scikit-learn's digits. All policies of an iteration train side by side, one network each, as batched products; a test
holds that such a run is that of `px.optim.LearnedRate` around the optimizer of torch.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import packext
from packext.optim.learned import Averages, log_rate, observation, reps
from packext.optim.learned.policy import bounds

SHIPPED = Path(packext.__file__).parent / "optim" / "learned" / "policies.json"
COMPARED = Path(__file__).parent / "results" / "learned-policies.json"
DISCOUNT = 0.9
#: Of torch.optim, with the hyperparameters that the policies are for; those of the paper.
OPTIMIZER: dict[str, Any] = {"class": "RMSprop", "alpha": 0.9, "eps": 1e-6}
#: The search: tasks for each policy in an iteration, and where it starts.
ITERATIONS, SAMPLES, TASKS, EPSILON = 30, 40, 3, 0.3
START, DEVIATION = [0.0, 0.0, 0.0, 0.0, math.log(0.01)], [0.15, 0.15, 0.1, 0.1, 2.0]
SHALLOW, DEEP = (1, 2), (1, 2, 3, 4, 5, 6, 7, 8)
#: Numbers of hidden layers in the tasks of each policy, and whether it sees no features. Those with a suffix are for
#: comparison.
TRAINED = {"rmsprop": (DEEP, False), "rmsprop-shallow": (SHALLOW, False), "rmsprop-bias": (DEEP, True)}


@dataclass(frozen=True)
class Task:
    """Data, a first network, batches `[steps, N]`, and the rate that runs start from, one for all or `[K]`."""

    x: Tensor
    y: Tensor
    layers: list[tuple[Tensor, Tensor]]
    batches: Tensor
    rate: float | Tensor


def task(seed: int, depths: tuple[int, ...]) -> Task:
    """A random one.

    Random are the samples (10 to 50 %), the pixels that are seen and their scale, the classes (digits, or digits modulo
    a number), depth, width, initialisation, batches, the number of steps, and the rate at the start, over six decades.
    """
    draw = torch.Generator().manual_seed(seed)

    def pick(values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    inputs, labels = split()[0]
    rows = torch.randperm(len(inputs), generator=draw)[: pick(range(140, 719))]
    pixels = torch.randperm(64, generator=draw)[: pick(range(16, 65))]
    x, kinds = inputs[rows][:, pixels], pick([2, 3, 5, 10, 10, 10])
    if pick([True, False]):
        x = (x - x.mean(0)) / (x.std(0) + 0.1)
    width, depth, normal = pick(range(8, 33)), pick(depths), pick([True, False])
    sizes = [len(pixels), *[width] * depth, kinds]
    layers = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        w = torch.empty(o, i, dtype=torch.float64)
        if normal:  # Xavier's, with biases of zero
            layers.append((w.normal_(0, math.sqrt(2 / (i + o)), generator=draw), torch.zeros(o, dtype=torch.float64)))
        else:  # torch's own
            b = torch.empty(o, dtype=torch.float64)
            layers.append(tuple(t.uniform_(-(i**-0.5), i**-0.5, generator=draw) for t in (w, b)))
    steps, size = pick(range(100, 301)), pick([32, 64])
    batches = torch.randint(len(x), (steps, size), generator=draw)
    rate = 10 ** (6 * float(torch.rand((), generator=draw)) - 6)
    return Task(x, labels[rows] % kinds, [(w.float(), b.float()) for w, b in layers], batches, rate)


@functools.cache
def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits for training and for tests, the same as in benchmarks/learned_rate.py."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    inputs, labels = (torch.tensor(x)[order] / 16).float(), torch.tensor(y)[order]
    return (inputs[:1437], labels[:1437]), (inputs[1437:], labels[1437:])


def run(weights: Tensor, t: Task, fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Train a network with each of K policies `[K, 5]`; where `fixed` `[steps, K]` is not NaN, with that rate.

    Returns:
        Loss of all data before and after `[2, K]`, and rates `[steps, K]`.
    """
    k, dtype = len(weights), t.layers[0][0].dtype
    params = [(w.expand(k, *w.shape).clone(), b.expand(k, 1, len(b)).clone()) for w, b in t.layers]
    squares = [tuple(torch.zeros_like(p) for p in pair) for pair in params]
    averages = Averages(DISCOUNT)
    rate = torch.as_tensor(t.rate, dtype=torch.float64).expand(k)
    rates = []
    before = evaluate(params, t)
    for step, index in enumerate(t.batches):
        x, y = t.x[index].to(dtype), t.y[index]
        n = len(y)
        inputs, losses, delta = forward(params, x, y)
        grads, deltas = [], []
        for (w, _), a in zip(reversed(params), reversed(inputs), strict=True):
            deltas.insert(0, delta)
            grads.insert(0, (delta.mT @ a / n, delta.sum(1, keepdim=True) / n))
            delta = (delta @ w) * (a > 0)
        last = rate.to(dtype)[:, None, None]
        updates = []
        for pair, averaged in zip(grads, squares, strict=True):
            for g, v in zip(pair, averaged, strict=True):
                v.mul_(OPTIMIZER["alpha"]).addcmul_(g, g, value=1 - OPTIMIZER["alpha"])
            updates.append(
                tuple(g / v.sqrt().add_(OPTIMIZER["eps"]) * -last for g, v in zip(pair, averaged, strict=True))
            )
        changes = sum(((a @ u.mT + v) * d).sum(2) for (u, v), a, d in zip(updates, inputs, deltas, strict=True))
        assert isinstance(changes, Tensor)
        rate = log_rate(weights, averages.update(observation(changes, losses))).exp()
        if fixed is not None:
            rate = torch.where(fixed[step].isnan(), rate, fixed[step])
        ratio = rate.to(dtype)[:, None, None] / last
        for pair, update in zip(params, updates, strict=True):
            for p, u in zip(pair, update, strict=True):
                p.add_(u * ratio)
        rates.append(rate)
    return torch.stack([before, evaluate(params, t)]), torch.stack(rates)


def forward(params: Any, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs of the layers, individual losses `[K, N]`, and their gradients at the logits `[K, N, C]`."""
    a, inputs = x.expand(len(params[0][0]), *x.shape), []
    for j, (w, b) in enumerate(params):
        inputs.append(a)
        a = torch.baddbmm(b, a, w.mT)
        a = a.relu() if j + 1 < len(params) else a
    logs = a.log_softmax(2)
    chosen = y[None, :, None].expand(len(a), -1, 1)
    return inputs, -logs.gather(2, chosen)[..., 0], logs.exp().scatter_add(2, chosen, -torch.ones_like(logs[..., :1]))


def evaluate(params: Any, t: Task) -> Tensor:
    return forward(params, t.x.to(t.layers[0][0].dtype), t.y)[1].double().mean(1)


def reward(weights: Tensor, tasks: list[Task]) -> Tensor:
    """Decrease of the training loss's logarithm, as a share of the best policy's, in the mean over the tasks.

    0 for a run that has learned nothing, or crashed. As shares, since a deep network's loss falls by less.
    """
    total = torch.zeros(len(weights), dtype=torch.float64)
    for t in tasks:
        before, after = run(weights, t)[0]
        fall = (before.log() - after.clamp(min=1e-12).log()).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        total += fall / fall.max().clamp(min=1e-12)
    return total / len(tasks)


def train(depths: tuple[int, ...], bias_only: bool, seed: int = 0) -> dict[str, Any]:
    """Search for one policy. `bias_only` leaves the rate constant: what is left when no feature is seen."""
    deviation, iterations = torch.tensor(DEVIATION), ITERATIONS
    if bias_only:  # one number is found sooner
        deviation[:4], iterations = 0, ITERATIONS // 4

    def of(weights: Tensor, k: int) -> Tensor:
        first = (seed * ITERATIONS + k) * TASKS
        return reward(weights, [task(10_000 + first + j, depths) for j in range(TASKS)])

    begin = time.perf_counter()
    found = reps(of, torch.tensor(START), deviation, iterations, SAMPLES, EPSILON, bounds=bounds(DISCOUNT), seed=seed)
    return {
        "weights": [round(float(w), 6) for w in found.mean],
        "discount": DISCOUNT,
        "optimizer": OPTIMIZER,
        "depths": list(depths),
        "deviations": [round(float(v), 6) for v in found.covariance.diagonal().sqrt()],
        "rewards": [round(r, 6) for r in found.rewards],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(TRAINED)}; all by default")
    torch.set_num_threads(1)
    for name in parser.parse_args().names or TRAINED:
        entry = train(*TRAINED[name])
        print(name, entry["weights"], f"{entry['rewards'][-1]:.4f}", f"{entry['seconds']:.0f} s", flush=True)
        path = COMPARED if "-" in name else SHIPPED
        entries = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**entries, name: entry}, indent=1) + "\n")


if __name__ == "__main__":
    main()
