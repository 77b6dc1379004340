"""Updates that are averaged over the processes while the training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import packext as px
from packext.optim._base import Optimizer
from packext.optim._work import name_of
from packext.optim.distributed._processes import same_world, waiting, world


@dataclass(eq=False)
class _Block:
    """What `every` steps have changed.

    Attributes:
        due: the step after which the mean replaces what this process did.
        own: the change of the parameters here `[n]`.
        total: its sum over all processes, once `work` is done; the mean, when that is None.
        work: the sum under way.
    """

    due: int
    own: Tensor
    total: Tensor
    work: Any


class DSSGD(torch.optim.Optimizer):
    """Delayed and temporally sparse synchronisation around any optimizer.

    Each process j steps on its own gradients. After every T steps what they have changed, u_j, is sent to be averaged;
    nobody waits. d steps later the mean is there, and replaces what the process did on its own.
    So processes differ by what is under way alone, and a delay of at most d steps costs no
    time. d = 0 and T = 1 with SGD (momentum included) is synchronous SGD; d = 0 alone is local SGD. As changes
    of parameters are averaged and not gradients, schedules and any optimizer are allowed; but an adaptive one adapts to
    the process's own gradients, even with d = 0.

    Parameters are the sum of a part that all processes share to the last bit and of what is under way. So rounding does
    not drive processes apart. At the beginning all take the parameters of the first process.

    The model is not wrapped in `DistributedDataParallel`, and buffers (BatchNorm's) stay each process's own. Every
    process takes equally many steps; a process that has died, or is late by more than the time limit, ends the others
    with an error.

    - Formula: `w_j <- w_j - u_j + mean(u)`
    - Cost: the parameters are sent once in T steps; holds one copy of them, and two for each block under way, d / T
      rounded up
    - Source: Zhu et al., NeurIPS 2021, Delayed Gradient Averaging
    - Refused: parameters of several types, or of others than float32 and float64, or thawed since; `GradScaler`; a mean
      that is not finite; the state of another rank, world or schedule with work under way; optimizers of `px.optim`
      without a `process_group` of this process alone

    Example:
        >>> optimizer = DSSGD(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), delay=20, every=12)
        >>> for x, y in batches:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.flush()  # before the model is evaluated or saved for use

    Attributes:
        optimizer: the one that is wrapped.
        delay: d, in steps.
        every: T, in steps.
        steps: that were taken.
        payload: bytes that this process has handed over to be summed.
    """

    _step_supports_amp_scaling = True  # so that GradScaler calls `step`, which refuses it

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        delay: int = 0,
        every: int = 1,
        *,
        process_group: Any = None,
        timeout: timedelta | None = None,
    ) -> None:
        """Wrap an optimizer; all processes do so at the same time.

        Args:
            optimizer: of parameters in float32 or float64, of one dtype and device.
            delay: d, how many steps later the mean is taken over.
            every: T, how many steps are sent at once.
            process_group: of the processes that train together; by default all.
            timeout: how long to wait for an average that is due; by default as long as the process group's.

        Raises:
            ValueError: for a negative delay, or a period below one.
            PackextError: for parameters of another dtype, or of several, and an optimizer of `px.optim` that reads of
                other processes.
        """
        if delay < 0 or every < 1:
            raise ValueError(f"need a delay of at least 0 and a period of at least 1, got {delay} and {every}.")
        self.optimizer, self.delay, self.every = optimizer, delay, every
        self.process_group, self.timeout = process_group, timeout
        self.size, self.rank = world(process_group)
        if isinstance(optimizer, Optimizer) and optimizer.ranks.size > 1:
            raise px.PackextError(
                f"DSSGD steps on the gradients of one process, and {type(optimizer).__name__} would put what it reads "
                f"beside them together over {optimizer.ranks.size} processes: give it a group of this process alone, "
                "process_group=[torch.distributed.new_group([k]) for k in range(world_size)][rank]."
            )
        self._parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        kinds = {(p.dtype, p.device) for p in self._parameters}
        if len(kinds) != 1 or next(iter(kinds))[0] not in (torch.float32, torch.float64):
            raise px.PackextError(
                "DSSGD needs parameters of one dtype, float32 or float64, on one device, and has "
                f"{sorted(map(str, kinds))}: keep them in float32, and use autocast."
            )
        self.steps = self.payload = self._since = 0
        self._pending: list[_Block] = []
        self._shared = self._flat()
        with waiting("DSSGD, at its beginning"):
            dist.broadcast(self._shared, self._source(), group=process_group)
        self._write(self._shared)

    # -- what torch.optim.Optimizer has, of the wrapped one -------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore
        """Of the wrapped optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore
        """Of the wrapped optimizer."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore
        """Of the wrapped optimizer."""
        return self.optimizer.defaults

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Of the wrapped optimizer's step."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Of the wrapped optimizer's step, before anything is sent."""
        return self.optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Of the wrapped optimizer's state, before it is made."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Of the wrapped optimizer's state, after it is made."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Of the wrapped optimizer's state, before it is loaded."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Of the wrapped optimizer's state, after it is loaded."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what is under way has no room for other parameters.

        Raises:
            PackextError: always.
        """
        raise px.PackextError("DSSGD: add the group to the optimizer before it is wrapped.")

    # -- steps -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """A step of the wrapped optimizer; then send what is to be sent, and take over what is due.

        Args:
            closure: for the wrapped optimizer.

        Returns:
            What its step returns.

        Raises:
            PackextError: if a process does not answer, for a mean that is not finite, with a GradScaler, or for a
                parameter that was frozen when the optimizer was wrapped. Nothing has changed in the last two cases.
        """
        if getattr(self, "found_inf", None) is not None:
            raise px.PackextError(
                "DSSGD: GradScaler skips steps of one process, and all have to take equally many: use bfloat16, "
                "without a loss scale."
            )
        common = {*map(id, self._parameters)}
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.requires_grad and id(p) not in common:
                raise px.PackextError(
                    f"DSSGD: {name_of(self.optimizer, p)} was frozen when the optimizer was wrapped, and processes do "
                    "not have it in common: call flush(), and wrap the optimizer anew."
                )
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.steps += 1
        self._since += 1
        if self._since == self.every:
            self._send(self.steps + self.delay)
        if self._pending and self._pending[0].due <= self.steps:
            self._take_over(self.steps)
        return result

    @torch.no_grad()
    def flush(self) -> None:
        """Send the rest and wait for all that is under way: then processes have the same parameters, to the last bit.

        All call it after the same step: before an evaluation, or a checkpoint for another number of processes.
        """
        if self._since:
            self._send(self.steps)
        self._take_over(self.steps + self.delay)

    @torch.no_grad()
    def _send(self, due: int) -> None:
        own = self._flat() - self._base()
        total, self._since = own.clone(), 0
        with waiting(f"DSSGD, step {self.steps}"):
            work = dist.all_reduce(total, group=self.process_group, async_op=True)
        self._pending.append(_Block(due, own, total, work))
        self.payload += own.numel() * own.element_size()

    @torch.no_grad()
    def _take_over(self, now: int) -> None:
        """Replace by means what this process did in the blocks that are due."""
        rest = self._flat() - self._base() if self._since else 0  # what is not sent yet; nothing, and not its rounding
        shared = self._shared
        while self._pending and self._pending[0].due <= now:
            mean = self._mean(self._pending[0])
            if not mean.isfinite().all():
                raise px.PackextError(
                    f"DSSGD, step {self.steps}: the mean of what processes have changed is not finite, so "
                    "gradients or parameters of one were not. Start again from the last checkpoint."
                )
            shared = shared + mean
            self._pending.pop(0)
            self._shared = shared
        self._write(self._base() + rest)

    def _mean(self, block: _Block) -> Tensor:
        if block.work is not None:
            with waiting(f"DSSGD, step {self.steps}, the mean due after step {block.due}"):
                done = block.work.wait() if self.timeout is None else block.work.wait(self.timeout)
                if not done:
                    raise RuntimeError("the sum was not completed")
            block.total /= self.size
            block.work = None
        return block.total

    def _source(self) -> int:
        return 0 if self.process_group is None else dist.get_global_rank(self.process_group, 0)

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def _base(self) -> Tensor:
        """Parameters as after the last step that was sent: what is shared, and what is under way."""
        base = self._shared
        for block in self._pending:
            base = base + block.own
        return base

    @torch.no_grad()
    def _write(self, flat: Tensor) -> None:
        sizes = [p.numel() for p in self._parameters]
        for p, part in zip(self._parameters, flat.split(sizes), strict=True):
            p.copy_(part.view_as(p))

    # -- saving ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore
        """All of the training's state, the parameters of this process included; a file for each rank.

        Waits for what is under way, and leaves it under way: training goes on as if nothing had been saved.

        Returns:
            Tensors are copies.
        """
        return {
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "world": (self.size, self.rank),
            "schedule": (self.delay, self.every),
            "steps": self.steps,
            "since": self._since,
            "payload": self.payload,
            "shared": self._shared.clone(),
            "parameters": self._flat(),
            "pending": [(b.due, b.own.clone(), self._mean(b).clone()) for b in self._pending],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, by all processes; it writes the parameters as well.

        A state that was saved after `flush` may be loaded by any number of processes, all from the same file.

        Raises:
            PackextError: for a state with pending work of another rank, world or schedule, or of other parameters.
        """
        if len(state_dict["shared"]) != len(self._shared):
            raise px.PackextError(
                f"DSSGD: the state is of {len(state_dict['shared'])} parameters, and here are {len(self._shared)}: "
                "load that of the same model."
            )
        if state_dict["since"] or state_dict["pending"]:
            same_world(state_dict["world"], self.process_group, "state of DSSGD")
            if state_dict["schedule"] != (self.delay, self.every):
                raise px.PackextError(
                    f"DSSGD: the state has work under way with delay and period {state_dict['schedule']}, and here "
                    f"they are {(self.delay, self.every)}: call flush() before state_dict() to change them."
                )
        self._mean_of_all()
        self.optimizer.load_state_dict(copy.deepcopy(state_dict["optimizer"]))
        place = self._shared
        self._shared = state_dict["shared"].to(place, copy=True)
        self._pending = [
            _Block(due, own.to(place, copy=True), mean.to(place, copy=True), None)
            for due, own, mean in state_dict["pending"]
        ]
        self.steps, self._since = state_dict["steps"], state_dict["since"]
        self.payload = state_dict["payload"]
        self._write(state_dict["parameters"].to(place))

    def __getstate__(self) -> dict[str, Any]:
        """For copies; waits for what is under way.

        Returns:
            All of it.

        Raises:
            PackextError: with a process group of its own, which cannot be copied.
        """
        if self.process_group is not None:
            raise px.PackextError(
                "DSSGD: a process group can be neither copied nor pickled. Wrap a copy of the optimizer, and give it "
                "state_dict()."
            )
        self._mean_of_all()
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take it; torch's own would put a `step` around that of this class."""
        vars(self).update(state)

    def _mean_of_all(self) -> None:
        """Wait for what is under way, so that nobody writes into it any more."""
        for block in self._pending:
            self._mean(block)
