"""What private steps cost together, by the accountants of dp-accounting: none of them is ours.

That is an optional dependency: `pip install 'packext[privacy]'`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

#: Noise multipliers below are not looked for.
LEAST = 0.1


class Spent(NamedTuple):
    """Private steps of one kind.

    Attributes:
        noise_multiplier: of each step, with everything that the step releases: the standard deviation of its noise
            over the sensitivity of what it is added to.
        expected_batch_size: samples in a batch, on average.
        steps: how many there were.
    """

    noise_multiplier: float
    expected_batch_size: float | int
    steps: int


def epsilon(spent: Iterable[Spent], samples: int, delta: float, method: str = "pld") -> float:
    """Epsilon of steps on Poisson-sampled batches, for data sets that differ by adding or removing a sample.

    Holds for batches to which each sample belongs with probability `expected_batch_size / samples`, independently of
    others and anew in each step (`PoissonSampler`), and not for shuffled ones.

    Args:
        spent: steps that were taken (`DPSGD.spent`) or are planned.
        samples: in the data set.
        delta: of the guarantee, usually well below `1 / samples`.
        method: "pld" (privacy loss distributions, tight) or "rdp" (Renyi divergences, an upper bound, faster).

    Returns:
        Epsilon; infinite where a step had no noise, 0 for no steps.

    Raises:
        TypeError: for an optimizer, or one kind of steps that is not in a list.
        ValueError: if a number is out of its range.
    """
    if isinstance(spent, Spent) or not isinstance(spent, Iterable):
        raise TypeError(f"spent must be a list of Spent, such as DPSGD(...).spent, got one {type(spent).__name__}.")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, got {delta}.")
    return _composed([Spent(*kind) for kind in spent], samples, delta, method)


def noise_multiplier(
    epsilon: float, delta: float, steps: int, expected_batch_size: float | int, samples: int, method: str = "pld"
) -> float:
    """The least noise multiplier with which steps on Poisson-sampled batches stay within `epsilon`.

    Args:
        epsilon: of the guarantee, at most.
        delta: of the guarantee.
        steps: to be taken, 1 or more.
        expected_batch_size: samples in a batch, on average.
        samples: in the data set.
        method: as in `epsilon`.

    Returns:
        For `DPSGD(noise_multiplier=...)`, up to 1e-4 above the least one.

    Raises:
        ValueError: if a number is out of its range, or noise of a tenth of the norm is more than enough.
    """
    _fresh(method)
    if not (epsilon > 0 and 0 < delta < 1 and steps >= 1):
        raise ValueError(f"need epsilon > 0, 0 < delta < 1, steps >= 1, got {epsilon}, {delta}, {steps}.")
    import dp_accounting  # pyright: ignore[reportMissingImports]

    def calibrated(by: str, bracket: Any) -> float:
        return dp_accounting.calibrate_dp_mechanism(
            lambda: _fresh(by),
            lambda z: _event(Spent(z, expected_batch_size, steps), samples),
            epsilon,
            delta,
            bracket,
            tol=1e-4,
        )

    if _composed([Spent(LEAST, expected_batch_size, steps)], samples, delta, "rdp") <= epsilon:
        raise ValueError(
            f"epsilon {epsilon} is so large that a noise multiplier of {LEAST} stays within it, which hides no sample: "
            "no noise is calibrated to that. Ask for a smaller epsilon."
        )
    bound = calibrated("rdp", dp_accounting.LowerEndpointAndGuess(LEAST, 1.0))
    if method == "rdp":
        return bound
    # The tight value is below the bound, mostly not far: privacy loss distributions of little noise take minutes.
    low = bound / 2
    while _composed([Spent(low, expected_batch_size, steps)], samples, delta, "pld") <= epsilon:
        low /= 2
    return calibrated("pld", dp_accounting.ExplicitBracketInterval(low, bound))


def _composed(spent: list[Spent], samples: int, delta: float, method: str) -> float:
    accountant = _fresh(method)
    events = [_event(kind, samples) for kind in spent]
    if any(event is None for event in events):
        return math.inf
    for event in events:
        accountant.compose(event)
    return float(accountant.get_epsilon(delta)) if spent else 0.0


def _fresh(method: str) -> Any:
    if method not in ("pld", "rdp"):
        raise ValueError(f'method must be "pld" or "rdp", got {method!r}.')
    try:
        from dp_accounting import pld, rdp  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("Accounting needs dp-accounting: pip install 'packext[privacy]'.") from None
    return pld.PLDAccountant() if method == "pld" else rdp.RdpAccountant()


def _event(kind: Spent, samples: int) -> Any:
    """As dp-accounting describes it; None without noise."""
    rate = kind.expected_batch_size / samples if samples > 0 else 0.0
    if not (0 < rate <= 1 and kind.steps >= 1 and 0 <= kind.noise_multiplier < math.inf):
        raise ValueError(f"{kind} is no number of private steps on {samples} samples.")
    if not kind.noise_multiplier:
        return None
    import dp_accounting as dp  # pyright: ignore[reportMissingImports]

    step: Any = dp.GaussianDpEvent(kind.noise_multiplier)
    return dp.SelfComposedDpEvent(step if rate == 1 else dp.PoissonSampledDpEvent(rate, step), kind.steps)
