"""Distance correlation, and a training loss that keeps it low between inputs and the activations that leave a client.

In split learning and split inference a client sends the activations Z of a layer. NoPeek (Vepakomma et al. 2020,
arXiv:2008.09161) trains a model so that they tell little of the inputs X.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import packext as px


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Distance correlation of a sample, the biased V-statistic: a training loss, and no number to report.

    `R = sqrt(dCov²(X, Z) / sqrt(dCov²(X, X) dCov²(Z, Z)))` (Székely, Rizzo & Bakirov 2007, Definition 4). Of a batch of
    high-dimensional vectors it is near 1 even where X and Z are independent: report `u_distance_correlation_sqr`.
    Computed in float64. Rows that occur twice have finite gradients. What is not finite, or too little, is refused.

    Args:
        x: `[N, ...]`, floating, N >= 2.
        z: `[N, ...]`, floating.

    Returns:
        A scalar between 0 and 1, float64; 0, with a gradient of 0, if all rows of x or of z are equal.
    """
    a, b = (_doubly_centred(d) for d in _distances(x, z, 2))
    return _safe_sqrt(_ratio((a * b).mean(), a.square().mean(), b.square().mean()).clamp_min(0))


def u_distance_correlation_sqr(x: Tensor, z: Tensor) -> Tensor:
    """Squared distance correlation by the unbiased U-statistic: the number to report.

    `R*² = <A, B> / sqrt(<A, A> <B, B>)` of U-centred distances (Székely & Rizzo 2014), about 0 for independent X and
    Z of any dimension. Computed in float64. What is not finite, or too little, is refused.

    Args:
        x: `[N, ...]`, floating, N >= 4.
        z: `[N, ...]`, floating.

    Returns:
        A scalar, float64, at most 1; it may be negative. 0 if all rows of x or of z are equal, or as far from each
        other (labels as vectors of zeros and a one, all different): there is nothing to correlate with.
    """
    a, b = (_u_centred(d) for d in _distances(x, z, 4))
    return _ratio((a * b).sum(), a.square().sum(), b.square().sum())


def _distances(x: Tensor, z: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Euclidean distances of all rows `[N, N]`, float64."""
    for name, t in (("x", x), ("z", z)):
        if not t.is_floating_point() or t.dim() == 0 or t.numel() == 0:
            raise px.PackextError(
                f"Distance correlation is of floating vectors, one row per sample; {name} is {t.dtype} of shape "
                f"{list(t.shape)}. Of tokens, take their embeddings."
            )
        if not t.isfinite().all():
            rows = (~t.detach().isfinite().reshape(len(t), -1).all(1)).nonzero().flatten().tolist()
            raise px.PackextError(f"Distance correlation: {name} {list(t.shape)} is not finite in rows {rows[:10]}.")
    if len(x) != len(z) or len(x) < least:
        raise px.PackextError(
            f"Distance correlation needs as many rows of x as of z, and at least {least}; got {len(x)} and {len(z)} "
            f"(shapes {list(x.shape)} and {list(z.shape)})."
        )
    # Not by inner products: they cancel between near rows, and the root of what is left has no finite gradient at 0.
    first, second = (t.reshape(len(t), -1).double() for t in (x, z))
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(first, first, compute_mode=exact), torch.cdist(second, second, compute_mode=exact)


def _doubly_centred(d: Tensor) -> Tensor:
    return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()


def _u_centred(d: Tensor) -> Tensor:
    n = len(d)
    a = d - d.sum(0, keepdim=True) / (n - 2) - d.sum(1, keepdim=True) / (n - 2) + d.sum() / ((n - 1) * (n - 2))
    a = a * (1 - torch.eye(n, dtype=d.dtype, device=d.device))
    return torch.where(a.abs().amax() > 64 * torch.finfo(d.dtype).eps * d.amax(), a, 0.0)  # else it is rounding


def _ratio(both: Tensor, one: Tensor, other: Tensor) -> Tensor:
    scale = _safe_sqrt(one) * _safe_sqrt(other)
    return torch.where(scale > 0, both / torch.where(scale > 0, scale, 1.0), 0.0 * both)


def _safe_sqrt(value: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0."""
    return torch.where(value > 0, torch.where(value > 0, value, 1.0).sqrt(), 0.0 * value)


class NoPeek(nn.Module):
    """NoPeek's training loss: keeps the distance correlation R of inputs and activations low.

    X is the model's first argument and Z the output of the layer whose activations leave the client, both seen by
    hooks. Called as any loss is::

        with defences.NoPeek(model, "client", nn.CrossEntropyLoss(), alpha=0.5) as loss_fn:
            for x, y in batches:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()

    R is of the whole batch and couples its samples: the loss has no individual gradients. It is the biased one of
    `distance_correlation`; measure leakage on data of its own, with `u_distance_correlation_sqr`.

    - Formula: `alpha R(X, Z) + (1 - alpha) task(model(x), y)`
    - Cost: distances between all pairs of rows of X and of Z, N² each, in float64
    - Source: Vepakomma, Singh, Gupta & Raskar 2020 (arXiv:2008.09161), in its convex form
    - Refused: within `packext.backpack`; outputs that are not those of the model's last run; a layer that ran twice or
      not; batches of one; activations that are not finite, or that no gradient reaches

    Attributes:
        task: the loss of the outputs.
        alpha: weight of R, from 0 to 1.
        correlation: R of the last batch, detached; None before.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str, task: nn.Module, alpha: float) -> None:
        """Put hooks on the model and the layer, until `close()`.

        Args:
            model: called with the inputs X `[N, ...]`, floating, as its first argument.
            layer: a module of it, or its name, that runs once per call and gives a tensor `[N, ...]`.
            task: called with the model's output and the targets; gives a scalar.
            alpha: weight of R.

        Raises:
            ValueError: if alpha is not between 0 and 1, or the layer is none of the model's modules.
        """
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}.")
        modules = {name: m for name, m in model.named_modules() if m is not model}
        named = layer if isinstance(layer, str) else next((name for name, m in modules.items() if m is layer), None)
        if named not in modules:
            raise ValueError(
                f"layer must be a module of the {type(model).__name__}, or its name ({', '.join(modules) or 'none'}); "
                f"got {layer!r}."
            )
        self.task, self.alpha, self.layer = task, alpha, named
        self.correlation: Tensor | None = None
        self._forget()
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            modules[named].register_forward_hook(self._leave),
            model.register_forward_hook(self._end, always_call=True),  # after an error as well
        ]

    def forward(self, output: Any, y: Any) -> Tensor:
        """The loss of the model's last run.

        Args:
            output: what the model returned; of a tensor a view will do, but no other function.
            y: targets.

        Returns:
            A scalar.

        Raises:
            PackextError: if the output is not that of the model's last run, the layer did not run in it, what left is
                not finite or holds fewer than 2 samples, or no gradient reaches what left.
        """
        x, z, expected = self._x, self._z, self._output
        self._forget()
        if not _same(expected, output):
            raise px.PackextError(
                "NoPeek was called with something else than what the model returned when it last ran. Call it once "
                "after each run, as loss_fn(model(x), y), with the model that it was made for (not a copy), and before "
                "close()."
            )
        where = f"the activations that leave {self.layer!r}"
        if not isinstance(x, Tensor) or not isinstance(z, Tensor):
            raise px.PackextError(
                f"NoPeek needs tensors: the model's first argument was a {type(x).__name__}, {where} "
                + ("were not made: the layer did not run." if z is None else f"a {type(z).__name__}.")
            )
        task = self.task(output, y)
        if task.dim():
            raise px.PackextError(
                f"NoPeek needs a scalar; {type(self.task).__name__} gave shape {list(task.shape)}: use "
                'reduction="mean" or "sum".'
            )
        if torch.is_grad_enabled() and task.requires_grad and not z.requires_grad:
            raise px.PackextError(
                f"No gradient reaches {where}: all parameters below are frozen, or the layer ran under torch.no_grad() "
                "or reentrant checkpointing (pass use_reentrant=False). NoPeek would train nothing."
            )
        try:
            correlation = distance_correlation(x.detach(), z)
        except px.PackextError as error:
            raise px.PackextError(f"NoPeek, x the model's input, z {where}: {error}") from None
        self.correlation = correlation.detach()
        loss = self.alpha * correlation.to(task.dtype) + (1 - self.alpha) * task
        return px.coupled(
            loss,
            f"NoPeek couples samples: the distance correlation of {self.layer!r} is of the whole batch, and no sample "
            "has a gradient of its own. Take per-sample quantities of the task's loss in a pass of its own, or run "
            "backward() outside of the context.",
        )

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._forget()

    def __enter__(self) -> NoPeek:
        """The loss itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def extra_repr(self) -> str:
        """The layer and alpha."""
        return f"layer={self.layer!r}, alpha={self.alpha}"

    def __getstate__(self) -> dict[str, Any]:
        """Without what was seen: a copy of the model copies its hooks, and tensors with a graph have no copies."""
        return {**self.__dict__, "_running": False, "_x": None, "_z": None, "_output": None}

    def _forget(self) -> None:
        self._running, self._x, self._z, self._output = False, None, None, None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        self._running, self._x = True, _kept(next(iter([*args, *kwargs.values()]), None))

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self._running:  # alone, or again under checkpointing
            return
        if self._z is not None:
            raise px.PackextError(
                f"{self.layer!r} ({type(layer).__name__}) ran twice in one run of the model: which of its outputs "
                "leave is not known. Name a layer that runs once."
            )
        self._z = _kept(output)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._running, self._output = False, output


def _kept(value: Any) -> Any:
    """A copy of a tensor: what comes next may write into it, as `nn.ReLU(inplace=True)` does."""
    return value.clone() if isinstance(value, Tensor) else value


def _same(expected: Any, output: Any) -> bool:
    """Whether one is the other, or shares its memory: hooks that run later may put a view in an output's place."""
    if isinstance(expected, Tensor) and isinstance(output, Tensor):
        return expected.data_ptr() == output.data_ptr() and expected.numel() == output.numel()
    return expected is not None and expected is output
