"""A part of each gradient is sent, and the rest kept for later: communication hooks of DistributedDataParallel."""

# No `from __future__ import annotations`: DistributedDataParallel compares the hook's annotations with types.

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore

import packext as px
from packext.optim._work import at_least_float32
from packext.optim.distributed._processes import same_world, world

#: Bytes of an index.
INDEX = 4


@dataclass(eq=False)
class _Pass:
    """A pass under way.

    Attributes:
        ratio: share of the entries that is sent.
        found: what is to be kept, if it ends well.
        ended: whether its last bucket was compressed.
        failed: what is wrong with what has arrived, if anything.
        buckets: results of those so far.
    """

    ratio: float = 1.0
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ended: bool = False
    failed: str = ""
    buckets: list[torch.futures.Future[Tensor]] = field(default_factory=list)


class Compression(ABC):
    """State of `compression_hook`: which entries are sent, and what has not been sent yet.

    `DistributedDataParallel.register_comm_hook(state, compression_hook)` once, before the first pass. The hook runs for
    each bucket, asynchronously as torch's own does. What is kept is kept by parameter: buckets change after the first
    pass, and which entries are sent does not depend on them.

    Of a parameter with n entries, k = ratio n (rounded, at least one) are sent, each as a value and an index of 4
    bytes, to all processes, which add them up and divide by the number of processes. A parameter for which that would
    not be less than all n values is sent whole, by the same all-reduce as without a hook. So ratio 1 is plain
    DistributedDataParallel.

    What a pass has found replaces what was kept when it has ended well: a pass that fails changes nothing. A gradient
    that is exactly zero here sends nothing of what is kept, as the parameter may be unused in all processes, where
    DistributedDataParallel would not write what arrives.

    Under `no_sync()` gradients add up in `.grad` and are compressed with the pass that synchronises. A `GradScaler`
    must not be used: what is kept has the scale of its pass. Values that are not finite are an error in all processes.

    Attributes:
        payload: bytes that this process has handed over in all passes, before the backend copies them.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        ratio: float,
        *,
        warmup: Sequence[float] = (),
        warmup_passes: int = 0,
        process_group: Any = None,
    ) -> None:
        """Say what is compressed, and how much.

        Args:
            named_parameters: of the model, with the names under which `state_dict` has them.
            ratio: share of the entries that is sent, in (0, 1].
            warmup: ratios of the first passes, one after the other.
            warmup_passes: how many passes each of them holds.
            process_group: that of DistributedDataParallel.

        Raises:
            ValueError: for a ratio outside (0, 1], or a warm-up without passes.
        """
        if not all(0 < r <= 1 for r in (ratio, *warmup)):
            raise ValueError(f"ratios are in (0, 1], got {(ratio, *warmup)}.")
        if bool(warmup) != (warmup_passes > 0):
            raise ValueError(f"a warm-up needs ratios and passes, got {tuple(warmup)} and {warmup_passes}.")
        self.warmup, self.warmup_passes, self.process_group = tuple(warmup), warmup_passes, process_group
        self.final_ratio = ratio
        self.size, self.rank = world(process_group)
        self._names: dict[Tensor, str] = {p: name for name, p in named_parameters if p.requires_grad}
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._pass = _Pass()
        self._passes = self.payload = 0

    @property
    def passes(self) -> int:
        """How many have been compressed."""
        self._settle()
        return self._passes

    @property
    def ratio(self) -> float:
        """Share of the entries that the next pass sends."""
        stage = self.passes // self.warmup_passes if self.warmup else 0
        return self.warmup[stage] if stage < len(self.warmup) else self.final_ratio

    @abstractmethod
    def _add(self, kept: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
        """What is kept, and the gradient `[n]`, as what is to be kept if nothing were sent: new tensors `[n]`.

        What may be sent is `residual`.
        """

    def _capacity(self, count: int, n: int) -> int:
        """Room of a message for `count` of `n` entries."""
        return count

    def _pick(self, values: Tensor, count: int) -> Tensor:
        """Indices of the entries to send, at most as many as there is room for."""
        return values.abs().topk(count, sorted=False).indices

    def _whole(self, parameter: Tensor, count: int) -> bool:
        return self._capacity(count, parameter.numel()) * (INDEX + parameter.element_size()) >= (
            parameter.numel() * parameter.element_size()
        )

    def _settle(self) -> None:
        """Keep what the last pass has found, if it has ended, and well."""
        if self._pass.ended and not self._pass.failed:
            self._kept.update(self._pass.found)
            self._pass = _Pass()
            self._passes += 1

    def kept(self, name: str) -> Tensor | None:
        """What a parameter's gradients have left over here.

        Args:
            name: of the parameter.

        Returns:
            In the parameter's shape; None if all was sent. The mean over the processes is what is missing from the
            updates so far.
        """
        self._settle()
        left = self._kept.get(name, {}).get("residual")
        shapes = {other: p.shape for p, other in self._names.items()}
        return None if left is None else left.view(shapes[name])

    def state_dict(self) -> dict[str, Any]:
        """What is kept here, and the number of passes; a file for each rank, as each keeps something else."""
        passes = self.passes
        kept = {name: {k: t.clone() for k, t in fields.items()} for name, fields in self._kept.items()}
        return {"world": (self.size, self.rank), "passes": passes, "payload": self.payload, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            PackextError: in another world or rank, or for other parameters.
        """
        same_world(state["world"], self.process_group, f"state of {type(self).__name__}")
        sizes = {name: p.numel() for p, name in self._names.items()}
        for name, fields in state["kept"].items():
            for t in fields.values():
                if sizes.get(name) != t.numel():
                    raise px.PackextError(
                        f"{type(self).__name__}: what is kept of {name} has {t.numel()} entries, and the parameter "
                        f"{sizes.get(name, 'is not there')}: load the state of the same model."
                    )
        like = {name: p for p, name in self._names.items()}
        self._pass = _Pass()
        self._kept = {
            name: {k: t.to(like[name].device, copy=True) for k, t in fields.items()}
            for name, fields in state["kept"].items()
        }
        self._passes, self.payload = state["passes"], state["payload"]

    def _compress(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if bucket.buffer().layout != torch.strided:
            raise px.PackextError(
                f"{type(self).__name__}: the gradient of {self._names.get(bucket.parameters()[0])} is sparse already: "
                "use sparse=False in its embedding, or leave the model without this hook."
            )
        if bucket.index() == 0:
            self._settle()
            self._pass = _Pass(self.ratio)
        now = self._pass
        whole: list[Tensor] = []
        sparse: list[tuple[str, Tensor, int]] = []
        sending: list[tuple[Tensor, Tensor]] = []
        for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self._names.get(p)
            if name is None:
                raise px.PackextError(
                    f"{type(self).__name__} does not know a parameter of shape {tuple(p.shape)}: give it all "
                    "named_parameters of the model that DistributedDataParallel has."
                )
            count = max(1, round(now.ratio * p.numel()))
            grad = _laid_out(grad, p)
            if self._whole(p, count):
                self._send_whole(name, grad)
                whole.append(grad)
            else:
                sending.append(self._send_some(name, grad.reshape(-1), count))
                sparse.append((name, grad, len(sending[-1][0])))
        now.ended = bucket.is_last()
        buffer, group = bucket.buffer(), self.process_group
        # As without a hook: the factor first, and the bucket itself where nothing else is in it, for the order of sums.
        dense = buffer if not sparse else torch.cat([g.reshape(-1) for g in whole]) if whole else buffer.new_empty(0)
        futures: list[torch.futures.Future[Any]] = []
        if len(dense):
            work = dist.all_reduce(dense.mul_(1 / self.size), group=group, async_op=True)
            assert work is not None
            futures.append(work.get_future())
        received: list[Tensor] = []
        if sparse:
            message = _pack([i for i, _ in sending], [v for _, v in sending])
            received = [torch.empty_like(message) for _ in range(self.size)]
            work = dist.all_gather(received, message, group=group, async_op=True)
            assert work is not None
            futures.append(work.get_future())
            self.payload += message.numel()
        self.payload += dense.numel() * dense.element_size()

        def arrived(done: torch.futures.Future[Any]) -> Tensor:
            for future in done.value():
                future.wait()  # raises what went wrong
            self._look(now, dense, "some process", "a parameter that is sent whole")
            if sparse:
                _unpack_whole(dense, whole)
                self._add_up(now, received, sparse)
            return buffer

        def judged(done: torch.futures.Future[Any]) -> Tensor:
            for future in done.value():
                future.wait()
            if now.failed:
                raise px.PackextError(now.failed)
            return buffer

        now.buckets.append(torch.futures.collect_all(futures).then(arrived))
        # With the last one: an error before it would let the next pass begin while others write into their buckets.
        return torch.futures.collect_all(now.buckets).then(judged) if now.ended else now.buckets[-1]

    def _send_whole(self, name: str, grad: Tensor) -> None:
        """Write what is sent of a parameter over its gradient in the bucket."""
        if not grad.any():
            return
        found = self._add(self._kept.get(name, {}), at_least_float32(grad.reshape(-1)))
        due = found.pop("residual")
        grad.copy_(_within(due, grad.dtype).view_as(grad))
        if grad.dtype != due.dtype:
            beyond = due - grad.reshape(-1)
            if (beyond.abs() > torch.finfo(grad.dtype).eps * due.abs()).any():  # more than what rounding takes
                found["residual"] = beyond
        self._pass.found[name] = found

    def _send_some(self, name: str, grad: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Choose what is sent of a parameter, and note what is not."""
        room = self._capacity(count, len(grad))
        indices, values = grad.new_zeros(room, dtype=torch.long), grad.new_zeros(room)
        if not grad.any():
            return indices, values
        # In half precision what is kept would stand still at some hundred times what is added.
        found = self._add(self._kept.get(name, {}), at_least_float32(grad))
        chosen = self._pick(found["residual"], count)
        indices[: len(chosen)] = chosen
        due, sent = found["residual"][chosen], values[: len(chosen)]
        sent.copy_(_within(due, sent.dtype))
        for t in found.values():
            t[chosen] = 0
        found["residual"][chosen] = due - sent  # what half precision rounds off, or does not hold
        self._pass.found[name] = found
        return indices, values

    def _add_up(self, now: _Pass, received: list[Tensor], sparse: list[tuple[str, Tensor, int]]) -> None:
        """Means over the processes, in the order of ranks, so that all have the same."""
        # In float16 the sum may overflow where the mean does not.
        sums = {name: at_least_float32(torch.zeros_like(grad)).reshape(-1) for name, grad, _ in sparse}
        for rank, message in enumerate(received):
            parts = _unpack(message, [count for *_, count in sparse], sparse[0][1].dtype)
            for (name, *_), (indices, values) in zip(sparse, parts, strict=True):
                self._look(now, values, f"rank {rank}", name)
                sums[name].index_add_(0, indices, at_least_float32(values))
        for name, grad, _ in sparse:
            grad.copy_((sums[name] / self.size).view_as(grad))

    def _look(self, now: _Pass, values: Tensor, who: str, name: str) -> None:
        """Remember for the end of the pass if something is not finite."""
        if not now.failed and not values.isfinite().all():
            now.failed = (
                f"{type(self).__name__}: the gradient of {name} on {who} has values that are not finite. What is kept "
                "of earlier passes is as it was. In place of a GradScaler, use bfloat16 without a loss scale."
            )


def _laid_out(grad: Tensor, p: Tensor) -> Tensor:
    """A gradient in a bucket, where DistributedDataParallel lays it out as its parameter: `channels_last`, say."""
    dense = torch.empty_like(p, device="meta").stride() == p.stride()
    return grad.as_strided(p.shape, p.stride()) if dense else grad


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bounded by what a type holds; what is not finite stays so."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).where(values.isfinite(), values)


def _pack(indices: list[Tensor], values: list[Tensor]) -> Tensor:
    """Indices and values as bytes."""
    return torch.cat([torch.cat(indices).int().view(torch.uint8), torch.cat(values).view(torch.uint8)])


def _unpack(message: Tensor, counts: list[int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The pairs that `_pack` took."""
    head = message[: INDEX * sum(counts)].clone().view(torch.int32).long()
    tail = message[INDEX * sum(counts) :].clone().view(dtype)  # copies: a view needs its bytes to be aligned
    return list(zip(head.split(counts), tail.split(counts), strict=True))


def _unpack_whole(flat: Tensor, whole: list[Tensor]) -> None:
    for grad, part in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
        grad.copy_(part.view_as(grad))


def compression_hook(state: Compression, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The hook for `DistributedDataParallel.register_comm_hook`.

    Args:
        state: `TopK`, `GaussianK` or `DGC`.
        bucket: of gradients.

    Returns:
        The bucket's buffer, with the mean over the processes of what they sent.
    """
    return state._compress(bucket)
