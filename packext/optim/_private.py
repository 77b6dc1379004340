"""What private optimizers share: clipped sums of a step, their noise, and the state that goes with it."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import TensorWeakRef

import packext as px
from packext.optim._base import check, is_real
from packext.optim._merge import Ranks, place
from packext.optim.accounting import Spent

#: Generators that draw side by side on the CPU, and entries that one draws at a time: parts of the noise's definition,
#: as seeds are, so that it does not depend on the number of threads.
STREAMS, CHUNK = 4, 1 << 16


@dataclass(frozen=True)
class AdaptiveClipping:
    """Moves the clipping norm C of a private optimizer towards a quantile of the gradients' norms.

    The terms of the count with noise are 1/2 and -1/2, so that no batch's size is given away. It takes a part of the
    step's noise multiplier z: gradients get what is left of it, `(z^-2 - (2 count_noise)^-2)^(-1/2)`.

    - Formula: `C <- C exp(-rate (b - quantile))`, with b the share of samples within C, from a count with noise, over
      the expected batch size
    - Cost: the norms that clipping has anyway, and a part of the noise
    - Source: Andrew et al., NeurIPS 2021, Algorithm 1 and Theorem 1
    - Refused: numbers out of their range; with `per_layer`; a count whose noise takes all of z

    Attributes:
        quantile: of the norms, where C is to be.
        rate: learning rate of log C.
        count_noise: standard deviation of the noise on the count; a twentieth of the expected batch size by default.
    """

    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if not (0 <= self.quantile <= 1 and self.rate > 0 and (self.count_noise is None or self.count_noise > 0)):
            raise ValueError(f"need a quantile from 0 to 1, a positive rate and count noise, got {self}.")


class _Clipped(px.ClippedGrad):
    """Clipped sums, and how many samples more were within the norm than beyond it."""

    parts = ""  # the noise is for whole tensors
    balance: Tensor | float = 0.0

    def weight(self, norms: Tensor) -> Tensor:
        self.balance = (norms <= self.max_norm).sum() - len(norms) / 2
        return super().weight(norms)


class Private(torch.optim.Optimizer):
    """What private optimizers share: all but the step that follows the gradient."""

    #: GradScaler then calls `step`, which refuses it, and does not decide by gradients without noise.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        max_norm: float,
        noise_multiplier: float,
        expected_batch_size: float | int,
        per_layer: bool = False,
        adaptive: AdaptiveClipping | None = None,
        seed: int | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        """Say what bounds a sample's part, and how much noise hides it.

        Args:
            params: parameters, named parameters or groups, as torch takes them. Of float32 or float64.
            lr: learning rate.
            max_norm: C, of a sample's gradient over all parameters here.
            noise_multiplier: z, the noise's standard deviation over the norm that a sample adds to the sum at most. 0
                for no noise and no privacy.
            expected_batch_size: B, over all micro-batches and processes of a step.
            per_layer: whether C bounds the part of each layer (module) by itself. A sample then adds sqrt(L) C at most
                with L layers, which the noise is scaled to: for the noise of C in all, pass C / sqrt(L). Needs
                `model.named_parameters()`. Opacus has a norm for each parameter instead of each module.
            adaptive: whether and how C follows the gradients.
            seed: of the noise; unpredictable by default, and another one wherever this is loaded or copied. One that is
                given is for runs that are to be repeated: who knows it subtracts the noise, copies draw the same noise
                again, and so do optimizers whose parameters have the same shapes.
            process_group: of the processes whose samples make a step; torch's default group, if there is one.
            **options: of torch's optimizer, such as `momentum` or `betas`, and `weight_decay`.

        Raises:
            ValueError: for a number out of its range, or options that contradict each other.
        """
        super().__init__(params, lr, **options)  # type: ignore[arg-type] - of torch's optimizer, which comes next
        for group in self.param_groups:
            check(type(self).__name__, "lr", group["lr"])
        if not all(is_real(v) for v in (max_norm, noise_multiplier, expected_batch_size)):
            raise ValueError(
                "max_norm, noise_multiplier and expected_batch_size must be numbers, got "
                f"{max_norm!r}, {noise_multiplier!r} and {expected_batch_size!r}."
            )
        if not isinstance(adaptive, (AdaptiveClipping, type(None))):
            raise ValueError(f"adaptive must be an AdaptiveClipping, got {adaptive!r}.")
        if not (0 < max_norm < math.inf and 0 <= noise_multiplier < math.inf and 0 < expected_batch_size < math.inf):
            raise ValueError(
                "max_norm and expected_batch_size must be positive and noise_multiplier not negative, got "
                f"{max_norm}, {expected_batch_size} and {noise_multiplier}."
            )
        if per_layer and adaptive is not None:
            raise ValueError("Adaptive clipping is of the norm over all parameters: leave per_layer out.")
        if per_layer and not all("param_names" in group for group in self.param_groups):
            raise ValueError("per_layer=True needs to know the layers: pass model.named_parameters().")
        self._seed = seed
        self._draw_anew()
        self.max_norm, self.noise_multiplier = float(max_norm), float(noise_multiplier)
        self.expected_batch_size = float(expected_batch_size)
        self.per_layer, self.adaptive = per_layer, adaptive
        self.process_group = process_group
        place(process_group)
        self._spent: list[Spent] = []
        self._noise_of_gradients()  # raises where the count takes all of the noise
        self._start()

    def _draw_anew(self) -> None:
        """Generators of noise that was not drawn before; with a seed, from its beginning."""
        device = self.param_groups[0]["params"][0].device
        seed = secrets.randbits(32)
        if self._seed is not None:  # two optimizers of one training, with one seed, are not to draw the same
            shapes = [n for _, p in self._named() for n in (p.dim(), *p.shape)]
            seed = int(np.random.SeedSequence((self._seed, *shapes)).generate_state(1)[0])
        self._process = os.getpid()
        seeds = torch.Generator().manual_seed(seed)
        count = STREAMS if device.type == "cpu" else 1
        self.generators = [
            torch.Generator(device).manual_seed(int(s)) for s in torch.randint(1 << 32, (count,), generator=seeds)
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: for what all groups have in common.
        """
        common = ("max_norm", "noise_multiplier", "expected_batch_size", "per_layer", "adaptive", "seed")
        if isinstance(param_group, dict) and (given := [name for name in common if name in param_group]):
            raise ValueError(
                f"{given[0]} is of the whole {type(self).__name__}, and not of a group: pass it to the optimizer."
            )
        super().add_param_group(param_group)

    def _start(self) -> None:
        self._forget()
        self._asked: _Clipped | None = None
        self._account = object()  # to which the samples of a pass are counted
        self._given: list[tuple[Any, int]] = []  # private gradients in `.grad` (weak), and their versions
        # A hook and not a method `step`: hooks of torch's own step would run twice, around either of them.
        self.register_step_pre_hook(before_step)
        self.register_step_post_hook(after_step)

    def _named(self) -> list[tuple[str, Tensor]]:
        """Parameters with their names, as far as they are known."""
        return [
            (group["param_names"][i] if "param_names" in group else f"parameter {i} of group {k}", p)
            for k, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
        ]

    def _private_parameters(self) -> list[tuple[str, Tensor]]:
        """Those that get a gradient."""
        found = [(name, p) for name, p in self._named() if p.requires_grad]
        for name, p in found:
            if p.dtype not in (torch.float32, torch.float64) or type(p.data) is not Tensor:
                raise px.PackextError(
                    f"{name} {list(p.shape)} is a {type(p.data).__name__} of {p.dtype}: the noise is for whole "
                    "tensors of float32 or float64. Keep parameters so, and compute under torch.autocast."
                )
        return found

    @property
    def spent(self) -> tuple[Spent, ...]:
        """Steps that were taken, as `px.optim.epsilon` reads them."""
        return tuple(self._spent)

    @property
    def pending(self) -> tuple[Tensor, ...]:
        """Sums of the next step so far, of each parameter that requires grad; without noise, so not for release."""
        return tuple(self._sums or (torch.zeros_like(p) for _, p in self._private_parameters()))

    @property
    def sensitivity(self) -> float:
        """Norm of what one sample adds to the sum at most: C, or with L layers clipped each by itself sqrt(L) C."""
        if not self.per_layer:
            return self.max_norm
        layers = {name.rpartition(".")[0] for name, _ in self._private_parameters()}
        return math.sqrt(len(layers)) * self.max_norm

    def quantities(self) -> Sequence[Any]:
        """Sums of clipped gradients; asked for by `px.optim.emit`."""
        self._asked = _Clipped(self.max_norm, self.per_layer)
        self._asked.bounded = self._account
        return (self._asked,)

    def options(self) -> dict[str, Any]:
        """How the passes are to run: of the parameters here, without `.grad`, and with the sums handed over."""
        parameters = [p for _, p in self._private_parameters()]
        # What passes and processes have is added up here: a sample that is in a sum twice, or once for each token, is
        # more than the noise hides.
        once = {"accumulate": False, "group": None, "per": "sample"}
        return {"pass_hook": self._collect, "attach": False, "grad": False, "parameters": parameters, **once}

    @contextmanager
    def receiving(self, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """While passes are counted; `px.optim.emit` enters it."""
        self._refuse_others()
        try:
            yield options
        finally:
            for _, p, _ in self._others():
                p.grad = None  # DistributedDataParallel puts there what it has averaged, when the pass has ended

    def _others(self) -> list[tuple[str, Tensor, Tensor]]:
        """Gradients that no step here has put into `.grad`, with their parameters."""
        ours = {id(ref()): version for ref, version in self._given}
        found = [(name, p, p.grad) for name, p in self._private_parameters() if p.grad is not None]
        return [each for each in found if ours.get(id(each[2])) != each[2]._version]

    def _refuse_others(self) -> None:
        """Refuse gradients that no pass within `px.optim.emit` has made, and that a step would drop."""
        for name, _, g in self._others():
            if bool(g.any()):
                raise px.PackextError(
                    f"{name} has a gradient that no pass within px.optim.emit(optimizer) has made: run backward() "
                    "there, and call zero_grad() before the first pass of a step. In passes for another optimizer, "
                    "backward(inputs=its parameters) leaves it alone."
                )

    def _refuse_zeros(self, named: list[tuple[str, Tensor]]) -> None:
        """Refuse gradients of zeros that somebody else has made: a step would spend noise on them."""
        given = [ref() for ref, _ in self._given]
        made = [name for name, p in named if p.grad is not None and all(p.grad is not g for g in given)]
        if made and not self._sums and not any(bool(p.grad.any()) for _, p in named if p.grad is not None):
            raise px.PackextError(
                f"{made[0]} has a gradient of zeros that neither a pass within px.optim.emit(optimizer) nor a step "
                "has made. For a step of noise alone, after an empty batch, set gradients to None by zero_grad(). "
                "(torch.distributed.checkpoint.state_dict makes such gradients, and an lr of 0, to get at the "
                "state: take optimizer.state_dict(), and set lr anew.)"
            )

    def _collect(self, results: px.Results) -> None:
        """A backward pass has ended: its sums are added to those of the step."""
        named = self._private_parameters()
        missing = [f"{name} {list(p.shape)}" for name, p in named if p not in results]
        if missing:
            raise px.PackextError(
                f"No gradients of samples reached {', '.join(missing)}: what is not part of the extended model that "
                "ran cannot be made private. Freeze it (requires_grad_(False)), leave it out of this optimizer, or "
                "extend one module that holds all that it trains."
            )
        if self.per_layer:
            here, there = ({name.rpartition(".")[0] for name in names} for names in (results, dict(named)))
            if len(here) != len(there):
                raise px.PackextError(
                    f"The model has {len(here)} layers with private parameters, the names given to the optimizer "
                    f"have {len(there)}: pass the named_parameters() of the extended model itself."
                )
        assert self._asked is not None
        self._add([results[p].clipped_grad for _, p in named], self._asked)
        self._passed = True
        for _, p in named:
            p.grad = None  # incomplete, and not private

    def contribute(self, rows: Sequence[Tensor]) -> None:
        """Add individual gradients of another origin to the next step, clipped as those of a pass are.

        Args:
            rows: of each parameter that requires grad, in the optimizer's order, `[K, *p]`.

        Raises:
            ValueError: if shapes do not fit.
        """
        named = self._private_parameters()
        if [r.shape[1:] for r in rows] != [p.shape for _, p in named] or len({len(r) for r in rows}) != 1:
            raise ValueError("contribute() needs rows [K, *p] of each parameter that requires grad, in order.")
        clip = _Clipped(self.max_norm, self.per_layer)
        layers: dict[str, list[int]] = {}
        for i, (name, _) in enumerate(named):
            layers.setdefault(name.rpartition(".")[0] if self.per_layer else "", []).append(i)
        sums: dict[int, Tensor] = {}
        for indices in layers.values():
            flat = [rows[i].reshape(len(rows[i]), named[i][1].numel()) for i in indices]  # K may be 0
            norms = torch.stack([r.square().sum(1) for r in flat]).sum(0).sqrt()
            weight = clip.weight(norms)
            sums |= {i: torch.tensordot(weight, rows[i], 1) for i in indices}
        self._add([sums[i].to(p.dtype) for i, (_, p) in enumerate(named)], clip)

    def _add(self, sums: list[Tensor], clip: _Clipped) -> None:
        """Sums of the private parameters, in order, and what has clipped them."""
        self._clips.append((clip.max_norm, clip.per_layer))
        parameters = self._unchanged()
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._summed = parameters
        self._balance = self._balance + clip.balance

    def _unchanged(self) -> list[Tensor]:
        """The private parameters; refused if there are sums of others, or clipped in another way than noise is for."""
        parameters = [p for _, p in self._private_parameters()]
        if any(clip != (self.max_norm, self.per_layer) for clip in self._clips):
            raise px.PackextError(
                "max_norm or per_layer was changed between a backward pass and the step: the noise would be for other "
                "sums than these. Do it after step(), and begin this one anew with zero_grad()."
            )
        if self._sums and [*map(id, parameters)] != [*map(id, self._summed)]:
            raise px.PackextError(
                "Parameters were frozen or added between the backward pass and the step. Do it after step()."
            )
        return parameters

    def _noise_of_gradients(self) -> float:
        """What is left of the noise multiplier for gradients, beside a noisy count."""
        if self.adaptive is None or not self.noise_multiplier:
            return self.noise_multiplier
        rest = self.noise_multiplier**-2 - (2 * self._count_noise()) ** -2
        if not rest > 0:
            raise ValueError(
                f"noise_multiplier {self.noise_multiplier} must be less than twice the noise of the count "
                f"({self._count_noise()}): AdaptiveClipping(count_noise=...) is too small."
            )
        return rest**-0.5

    def _count_noise(self) -> float:
        assert self.adaptive is not None
        given = self.adaptive.count_noise
        return self.expected_batch_size / 20 if given is None else given

    @torch.no_grad()
    def _privatise(self) -> None:
        """Put the private gradient into `.grad`."""
        named = self._ready()
        if self._seed is None and self._process != os.getpid():  # a fork has a copy of the generators
            self._draw_anew()
        sums, balance = self._sums or [torch.zeros_like(p) for _, p in named], self._balance
        self._forget()
        group = self.process_group
        rank, ranks = place(group)
        draws = rank == 0  # the noise of all: the sum over processes has it once
        std = self._noise_of_gradients() * self.sensitivity if draws else 0.0
        gradients = self._noisy(sums, std, self.expected_batch_size)
        count = torch.as_tensor(balance, dtype=torch.float64, device=sums[0].device)
        if self.adaptive is not None:
            (count,) = self._noisy([count], self._count_noise() if draws and self.noise_multiplier else 0.0)
        if ranks > 1:
            for work in [dist.all_reduce(t, group=group, async_op=True) for t in (*gradients, count)]:
                assert work is not None
                work.wait()
        norms = [torch.linalg.vector_norm(g) for g in gradients]
        if not bool(torch.stack([n.to(norms[0]) for n in norms]).isfinite().all()):
            names = ", ".join(name for (name, _), n in zip(named, norms, strict=True) if not bool(n.isfinite()))
            raise px.PackextError(f"Gradients of samples are not finite in {names}: nothing was changed.")
        for _, p in self._named():
            p.grad = None  # torch moves frozen parameters, too, by a gradient that is left
        for (_, p), g in zip(named, gradients, strict=True):
            p.grad = g
        self._count_step()
        if self.adaptive is not None:
            share = 0.5 + float(count) / self.expected_batch_size
            self.max_norm *= math.exp(-self.adaptive.rate * (share - self.adaptive.quantile))

    def _ready(self) -> list[tuple[str, Tensor]]:
        """The private parameters of a step that no process refuses: if one does, all do, and none waits."""
        ranks, problem, named, bound = Ranks(self.process_group), None, [], 0.0
        try:
            named, bound = self._checked(), self.sensitivity
        except px.PackextError as error:
            if ranks.size == 1:
                raise
            problem = str(error)
        alike = self.noise_multiplier, self.expected_batch_size, self.adaptive, [list(p.shape) for _, p in named]
        found = ranks.everyone((problem, bound, alike))
        wrong = [f"rank {k}: {text}" for k, (text, _, _) in enumerate(found) if text]
        bounds = [other for _, other, _ in found]  # what one clips to a larger norm, the noise of another does not hide
        if not wrong and (max(bounds) > (1 + 1e-9) * min(bounds) or any(other != alike for _, _, other in found)):
            wrong = [
                "the processes of one private step clip to other norms, or have other noise, expected batch sizes or "
                "parameters that require grad: make their optimizers alike, and freeze the same parameters in all."
            ]
        if wrong:
            raise px.PackextError("; ".join(wrong))
        return named

    def _checked(self) -> list[tuple[str, Tensor]]:
        """The private parameters, once nothing in this process speaks against a step."""
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            self._forget()
            raise px.PackextError(
                f"{type(self).__name__} refuses GradScaler, which skips steps by gradients that have no noise yet. Use "
                "torch.autocast with bfloat16, which needs no scaling."
            )
        named = self._private_parameters()
        if not self._passed:
            self._refuse_zeros(named)
            self._given = []  # an empty batch, or a forgotten `emit`: what is left of the last step does not tell
        self._refuse_others()
        self._unchanged()
        return named

    def _noisy(self, totals: list[Tensor], std: float, divisor: float = 1.0) -> list[Tensor]:
        """Sums with noise, over `divisor`; several generators draw side by side, since torch draws in one thread."""
        totals = [total.detach().contiguous() for total in totals]
        chunks = [chunk for total in totals for chunk in total.view(-1).split(CHUNK)]

        def draw(k: int) -> None:
            generator = self.generators[k]
            for chunk in chunks[k :: len(self.generators)]:  # of a size that stays in cache
                if std:
                    noise = torch.empty(chunk.shape, dtype=chunk.dtype, device=generator.device)
                    chunk.add_(noise.normal_(0, std, generator=generator).to(chunk.device))
                chunk.div_(divisor)

        with ThreadPoolExecutor(min(len(self.generators), torch.get_num_threads())) as pool:
            list(pool.map(draw, range(len(self.generators))))
        return totals

    def _count_step(self) -> None:
        last = Spent(self.noise_multiplier, self.expected_batch_size, 1)
        if self._spent and self._spent[-1][:2] == last[:2]:
            last = last._replace(steps=self._spent.pop().steps + 1)
        self._spent.append(last)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; sums of passes since the last step are forgotten with their gradients."""
        self._forget()
        super().zero_grad(set_to_none)

    def _forget(self) -> None:
        self._sums: list[Tensor] = []
        self._summed: list[Tensor] = []  # whose they are
        self._clips: list[tuple[float, bool]] = []  # and what has clipped them
        self._balance: Tensor | float = 0.0
        self._passed = False

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the clipping norm and the steps taken under "private"; given a seed, generators of noise."""
        self._refuse_pending()
        return {**super().state_dict(), "private": self._own_state()}

    def _refuse_pending(self) -> None:
        if self._sums:
            raise px.PackextError("A step is under way, and its sums have no noise yet: save after step().")

    def _own_state(self) -> dict[str, Any]:
        return {
            "max_norm": self.max_norm,
            "noise_multiplier": self.noise_multiplier,
            "expected_batch_size": self.expected_batch_size,
            "per_layer": self.per_layer,
            "adaptive": None if self.adaptive is None else asdict(self.adaptive),
            "spent": [list(kind) for kind in self._spent],
            "generators": [] if self._seed is None else [generator.get_state() for generator in self.generators],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with its norm and its count of steps.

        Noise is drawn anew, since what comes before it may differ: the same noise on two sums gives away their
        difference. Where both optimizers were given a seed, it goes on as well.

        Args:
            state_dict: of a private optimizer.

        Raises:
            PackextError: if it is of another optimizer, whose momentum may hold gradients without noise, or if noise
                that is to go on was drawn on another kind of device.
        """
        if "private" not in state_dict:
            raise px.PackextError("The state is not of a private optimizer: what it holds may not be private.")
        lacking = [
            name
            for name in ("betas", "momentum")  # older versions of torch lack others, which torch then sets
            if name in self.defaults and any(name not in group for group in state_dict["param_groups"])
        ]
        if lacking:
            raise px.PackextError(
                f"The state is of another optimizer than {type(self).__name__}: its groups have no {lacking[0]}."
            )
        own = state_dict["private"]
        # Copies: a generator that is handed a view takes the process down.
        drawn = [] if self._seed is None else [state.cpu().clone() for state in own["generators"]]
        if drawn and [s.shape for s in drawn] != [generator.get_state().shape for generator in self.generators]:
            raise px.PackextError(
                f"The noise of the state was drawn on another kind of device than {self.generators[0].device}, and "
                "cannot go on here: move the model there before the optimizer is made."
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "private"})
        for generator, state in zip(self.generators, drawn, strict=False):
            generator.set_state(state)
        for name in ("max_norm", "noise_multiplier", "expected_batch_size", "per_layer"):
            setattr(self, name, own[name])
        self.adaptive = None if own["adaptive"] is None else AdaptiveClipping(**own["adaptive"])
        self._spent = [Spent(*kind) for kind in own["spent"]]
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_pending()
        own = ["max_norm", "noise_multiplier", "expected_batch_size", "per_layer", "adaptive", "_spent", "_seed"]
        own += ["process_group"] if self._seed is None else ["process_group", "generators"]
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if before_step not in self._optimizer_step_pre_hooks.values():  # torch leaves hooks out of what it copies
            self._start()
            if self._seed is None:
                self._draw_anew()


def before_step(optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    closure = next((c for c in (*args[1:], *kwargs.values()) if c is not None), None)
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
        args, kwargs = (args[0], lambda: loss), {}
    optimizer._privatise()
    return args, kwargs


def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """What is left in `.grad` is private; Nesterov's momentum has written to it."""
    held = [p.grad for _, p in optimizer._private_parameters() if p.grad is not None]
    optimizer._given = [(TensorWeakRef(g), g._version) for g in held]
