"""The Gaussian process of the probabilistic line search: an integrated Wiener process seen with noise."""

from __future__ import annotations

import numpy as np
import torch

#: Where the process starts, left of the line's origin: far enough not to tie it to zero there.
OFFSET = 10.0
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Covariances of values and slopes at `a` with those at `b`.

    Args:
        a: positions `[A]`.
        b: positions `[B]`.

    Returns:
        `[2, 2, A, B]`: the first two axes say whether the value or its derivative is meant, of `a` and of `b`.
    """
    a, b = a[:, None] + OFFSET, b[None, :] + OFFSET
    low = np.minimum(a, b)
    value = low**3 / 3 + np.abs(a - b) * low**2 / 2
    by_a = np.where(a > b, b**2 / 2, a * b - a**2 / 2)
    by_b = np.where(b > a, a**2 / 2, a * b - b**2 / 2)
    return np.array([[value, by_b], [by_a, low]])


class Posterior:
    """What noisy values and slopes at some positions say of values and slopes at others.

    Attributes:
        at: positions of the observations `[T]`.
    """

    def __init__(self, at: list[float], y: list[tuple[float, float]], noise: list[tuple[float, float]]) -> None:
        """Take observations.

        Args:
            at: positions `[T]`.
            y: value and slope at each.
            noise: variances of both at each.
        """
        self.at = np.array(at)
        observed, variances = np.array(y).T.ravel(), np.array(noise).T.ravel()
        covariance = _flat(kernel(self.at, self.at)) + np.diag(variances)
        # Without noise, slopes and values at positions that nearly meet leave it singular to working precision.
        covariance += 1e-12 * np.diag(covariance.diagonal())
        self._root = np.linalg.cholesky(covariance)
        self._weights = np.linalg.solve(self._root.T, np.linalg.solve(self._root, observed))

    def joint(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean `[4]` and covariance `[4, 4]` of the value at 0, the value at `t`, and the slopes at both."""
        where = np.array([0.0, t])
        cross = _flat(kernel(where, self.at))
        half = np.linalg.solve(self._root, cross.T)
        return cross @ self._weights, _flat(kernel(where, where)) - half.T @ half

    def mean(self, t: float) -> tuple[float, float]:
        """Mean of value and slope at `t`."""
        value, slope = _flat(kernel(np.array([t]), self.at)) @ self._weights
        return float(value), float(slope)

    def minima(self) -> list[float]:
        """Local minima of the mean between observations, where it is a cubic polynomial in each gap."""
        found = []
        order = np.sort(np.unique(self.at))
        for left, right in zip(order[:-1], order[1:], strict=True):
            width = right - left
            (y0, d0), (y1, d1) = self.mean(left), self.mean(right)
            # Hermite: y0 + d0 s + c s² + e s³ with s in [0, width].
            c = (3 * (y1 - y0) / width - 2 * d0 - d1) / width
            e = (d0 + d1 - 2 * (y1 - y0) / width) / width**2
            roots = np.roots([3 * e, 2 * c, d0])
            for s in roots[np.isreal(roots)].real:
                if 0 < s < width and 2 * c + 6 * e * s > 0:
                    found.append(float(left + s))
        return found

    def wolfe(self, t: float, c1: float, c2: float) -> float:
        """Probability that `t` fulfils the strong Wolfe conditions (Mahsereci & Hennig 2017, section 3.3).

        Args:
            t: the position.
            c1: of the decrease, `f(t) <= f(0) + c1 t f'(0)`.
            c2: of the slope, `|f'(t)| <= c2 |f'(0)|`; its upper side has f'(0) at its 95 % quantile.

        Returns:
            The probability.
        """
        mean, covariance = self.joint(t)
        rows = np.array([[1.0, -1.0, c1 * t, 0.0], [0.0, 0.0, -c2, 1.0]])
        upper = 2 * c2 * (abs(mean[2]) + 2 * np.sqrt(max(covariance[2, 2], 0.0)))
        return quadrant(rows @ mean, rows @ covariance @ rows.T, upper)

    def improvement(self, t: float, best: float) -> float:
        """Expected improvement of the value at `t` over `best`."""
        mean, covariance = self.joint(t)
        gain, s = best - mean[1], np.sqrt(max(covariance[1, 1], 0.0))
        if s == 0:
            return max(float(gain), 0.0)
        z = gain / s
        return float(gain * _normal(z) + s * np.exp(-z * z / 2) / np.sqrt(2 * np.pi))


def quadrant(mean: np.ndarray, covariance: np.ndarray, upper: float) -> float:
    """Probability that two Gaussian numbers (a, b) have a >= 0 and 0 <= b <= upper.

    Args:
        mean: of a and b `[2]`.
        covariance: of both `[2, 2]`.
        upper: bound of b.

    Returns:
        The probability, by quadrature over b.
    """
    s = float(np.sqrt(max(covariance[1, 1], 0.0)))
    if s <= 1e-12 * (abs(float(mean[1])) + upper):
        inside = 0 <= mean[1] <= upper
        return float(inside * _normal(mean[0] / np.sqrt(max(covariance[0, 0], 1e-300))))
    low, high = max(0.0, mean[1] - 8 * s), min(upper, mean[1] + 8 * s)
    if high <= low:
        return 0.0
    b = low + (high - low) * (NODES + 1) / 2
    density = np.exp(-(((b - mean[1]) / s) ** 2) / 2) / (s * np.sqrt(2 * np.pi))
    slope = covariance[0, 1] / covariance[1, 1]
    rest = max(covariance[0, 0] - slope * covariance[0, 1], 1e-300)
    inside = _normal((mean[0] + slope * (b - mean[1])) / np.sqrt(rest))
    return float((WEIGHTS * density * inside).sum() * (high - low) / 2)


def _normal(z: np.ndarray | float) -> np.ndarray:
    return torch.special.ndtr(torch.as_tensor(z, dtype=torch.float64)).numpy()


def _flat(blocks: np.ndarray) -> np.ndarray:
    return np.block([[blocks[0, 0], blocks[0, 1]], [blocks[1, 0], blocks[1, 1]]])
