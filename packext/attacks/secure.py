"""Labels through secure aggregation: a sum of gradients over clients gives away each client's label counts.

The server is malicious: it sends each client the model with the parameters of one normalisation layer changed, scale 0
and a shift of the client's own. Whatever the batch, the last fully connected layer then receives features e_k and puts
out probabilities p_k that the server knows. A client's gradient of that layer is `d_k e_kᵀ` and `d_k`, with
`d_k = B_k p_k - c_k` for its label counts c_k, and the sum over clients is a linear system for the d_k,
`[G_W, G_b] = D [E, 1]` (Wang et al., INFOCOM 2024). It has one solution for up to D + 1 clients.

Everything runs in this process on the user's own model and data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks._shared import Head, Shared, Threat, plain_cross_entropy, share
from packext.attacks.labels import rounded

#: Layers that normalise, whose scale and shift may be None.
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)

Gradient = Mapping[str, Tensor]


def secure_sum(messages: Sequence[Gradient], bits: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """The sum of what clients send, as the server of a secure aggregation sees it.

    Each client rounds to whole multiples of `2**-bits` and adds masks that it shares with every other client, in
    integers modulo 2^64. A message alone is uniformly random; in the sum the masks cancel (Bonawitz et al. 2017,
    without drop-outs).

    Args:
        messages: of each client, tensors by name.
        bits: binary places that are kept.
        seed: of the masks.

    Returns:
        The sum by name, float64.
    """
    total: dict[str, Tensor] = {}
    for message in masked(messages, bits, seed):
        for name, value in message.items():
            total[name] = total[name] + value if name in total else value
    return {name: value.double() * 2.0**-bits for name, value in total.items()}


def masked(messages: Sequence[Gradient], bits: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    """What each client puts on the wire: int64 by name, uniformly random to who does not know its masks.

    Args:
        messages: of each client, tensors by name.
        bits: binary places that are kept.
        seed: of the masks.

    Returns:
        A message for each client.

    Raises:
        PackextError: if messages do not have the same names and shapes, or hold what is not finite or too large.
    """
    shapes = [{name: value.shape for name, value in m.items()} for m in messages]
    if not messages or any(s != shapes[0] for s in shapes):
        raise px.PackextError("Clients must send tensors of the same names and shapes for a secure sum.")
    limit = 2.0 ** (62 - bits) / len(messages)
    sent: list[dict[str, Tensor]] = []
    for k, message in enumerate(messages):
        for name, value in message.items():
            if not value.isfinite().all() or value.abs().max() >= limit:
                raise px.PackextError(
                    f"Client {k} sends what a sum of {len(messages)} with {bits} binary places cannot hold, {name!r}: "
                    f"not finite, or {limit:.3g} and more. Clip it, or keep fewer places."
                )
        sent.append({name: (value.double() * 2.0**bits).round().long().cpu() for name, value in message.items()})
    for i in range(len(sent)):
        for j in range(i):
            generator = torch.Generator().manual_seed(hash((seed, i, j)) & (2**63 - 1))  # the key that both have
            for name, shape in shapes[0].items():
                low, high = -(2**63), 2**63 - 1
                mask = torch.randint(low, high, shape, generator=generator)
                sent[i][name] = sent[i][name] + mask
                sent[j][name] = sent[j][name] - mask
    return sent


def undefended(shared: Shared) -> Shared:
    """What a client without a defence sends: its gradient as it is."""
    return shared


@dataclass
class Cohort:
    """Clients with a batch each, and a secure sum between them and the server.

    Attributes:
        model: that the server hands out.
        loss_fn: `nn.CrossEntropyLoss`, of every client.
        batches: inputs and labels of each client.
        local: how a client computes what it shares, called as `share` is.
        send: what a client makes of that before it leaves, such as a defence; nothing by default.
        sum: of the messages.
        weighted: whether messages are weighted with the clients' shares of all samples, as FedAvg does for means.
    """

    model: nn.Module
    loss_fn: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    local: Callable[..., Shared] = share
    send: Callable[[Shared], Shared] = undefended
    sum: Callable[[Sequence[Gradient]], dict[str, Tensor]] = secure_sum
    weighted: bool = False

    @property
    def sizes(self) -> list[int]:
        """Samples of each client."""
        return [len(y) for _, y in self.batches]

    def round(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One round: all that the server learns of it.

        Args:
            states: what each client gets in place of some of the model's parameters and buffers, by name.

        Returns:
            The sum of what the clients send, by parameter name.
        """
        messages = []
        for (x, y), state in zip(self.batches, states, strict=True):
            shared = self.local(self.model, self.loss_fn, x, y, state)
            weight = len(y) / sum(self.sizes) if self.weighted else 1.0
            messages.append({name: g * weight for name, g in self.send(shared).gradient.items()})
        return self.sum(messages)


@dataclass(frozen=True)
class Plan:
    """What the server sends to clients, and what it knows of each for that reason.

    Attributes:
        states: parameters by name that each client gets in place of the model's.
        features: of the last fully connected layer's input, by client `[K, D]`.
        probabilities: of the model's output, by client `[K, C]`.
        spread: how far features still depend on the input, relative to their norm; 0 where the layer fixes them.
        factors: by which a client's clipping shrinks the gradient of a sample of each class `[K, C]`; ones without.
        head: name of the last fully connected layer.
    """

    states: list[dict[str, Tensor]]
    features: Tensor
    probabilities: Tensor
    spread: float
    factors: Tensor
    head: str


class Counted(NamedTuple):
    """Label counts of clients.

    Attributes:
        counts: `[K, C]`, int64; each row sums to the client's size.
        error: the largest distance of a client's counts from whole numbers before they were rounded `[K]`: the
            attacker's own doubt. Towards 0.5, counts are guesses.
    """

    counts: Tensor
    error: Tensor


@dataclass(frozen=True)
class SecureAggregationLabels:
    """Label counts of every client from the sum of their gradients, by a malicious server.

    Each client k gets a model in which one normalisation has scale 0 and a shift of its own, so that the server knows
    the features e_k and probabilities p_k of all its B_k samples. There is one solution for up to D + 1 clients, D
    being the features of the last layer, if the normalisation has as many channels (see `limit`).

    - Formula: `[G_W, G_b] = sum over k of d_k [e_kᵀ, 1]` is solved for the d_k by least squares, and `c_k = B_k p_k -
      d_k` for sums over samples; with clipping, class j's part of d_k is shrunk by a factor that is measured
    - Cost: a forward pass for each client, one singular value decomposition `[K, D + 1]`; with clipping `BatchL2Grad`
      of an example of each class for each client
    - Source: Wang et al., INFOCOM 2024
    - Refused: more clients than the layer can tell apart; a model without a normalisation with scale and shift; other
      losses than plain cross-entropy

    Args:
        norm: name of the normalisation layer whose parameters are set; by default the last one that has them.
        head: name of the last fully connected layer; by default the last `nn.Linear`.
        magnitude: of the shifts. Where a skip connection goes past the layer, what it adds matters less the larger they
            are.
        clip: the norm to which clients clip each sample's gradient, if they do. How much that takes off depends on the
            label alone, as features do, and the attacker measures it on the example.

    Example:
        >>> attack = SecureAggregationLabels()
        >>> plan = attack.plan(model, x[:2], clients=8)
        >>> counts = attack.counts(plan, cohort.round(plan.states), cohort.sizes, loss_fn)
    """

    norm: str | None = None
    head: str | None = None
    magnitude: float = 100.0
    clip: float | None = None

    threat = Threat(
        "the sum of all clients' gradients",
        "the model, how many samples each client has",
        "malicious: sends each client a model of its own",
        "one local step; nothing random and no way around between the normalisation and the last layer",
    )
    """Who attacks, and what must hold."""

    def plan(self, model: nn.Module, example: Tensor, clients: int) -> Plan:
        """What to send to each client.

        Client k owns channel k: its shift is the magnitude there and minus that elsewhere, which a ReLU makes zero.
        One more client can own none.

        Args:
            model: the classifier, in the mode in which clients run it.
            example: inputs of the right shape `[N, ...]`, N >= 2. Their values matter as far as the layer does not fix
                the features (`spread`), and for how much clipping takes off.
            clients: how many.

        Returns:
            The plan.

        Raises:
            PackextError: if there is no such layer, it cannot tell so many clients apart, or the model's output is not
                finite.
        """
        head = Head.of(model, self.head)
        name = self._norm(model)
        layer = model.get_submodule(name)
        weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
        flat = weight.numel()
        states = []
        for k in range(clients):
            shift = torch.full((flat,), -self.magnitude, dtype=weight.dtype, device=weight.device)
            if k < flat:
                shift[k] = self.magnitude
            states.append({f"{name}.weight": torch.zeros_like(weight), f"{name}.bias": shift.view_as(weight)})
        rows, logits = zip(*[_seen(model, head, example, state) for state in states], strict=True)
        features = torch.stack([r.mean(0) for r in rows])
        spread = max(float((r - r.mean(0)).norm(dim=1).max() / r.norm(dim=1).max().clamp_min(1e-300)) for r in rows)
        known = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        rank = int(torch.linalg.matrix_rank(known if head.bias is not None else features))
        if rank < clients:
            raise px.PackextError(
                f"{clients} clients cannot be told apart: {name!r} ({type(layer).__name__}, {flat} channels) gives the "
                f"input of {head.name!r} in {rank} independent ways"
                + (f", and at most {features.shape[1] + 1} are possible" if head.bias is not None else "")
                + ". Take fewer clients, or another layer."
            )
        probabilities = torch.stack([z.softmax(1).mean(0) for z in logits])
        if not probabilities.isfinite().all():
            raise px.PackextError(
                f"{type(model).__name__} with a shift of {self.magnitude:g} in {name!r} gives probabilities that are "
                "not finite: take a smaller magnitude, or a model whose parameters are finite."
            )
        factors = torch.ones_like(probabilities)
        if self.clip is not None:
            factors = torch.stack([_clipped(model, example, state, len(head.weight), self.clip) for state in states])
        return Plan(states, features, probabilities, spread, factors.cpu(), head.name)

    def limit(self, model: nn.Module) -> int:
        """How many clients can be told apart at most: each owns a channel, and one none.

        Where what lies between the normalisation and the last layer merges channels, `plan` refuses fewer as well.

        Args:
            model: the classifier.

        Returns:
            `min(channels, D) + 1`, or without a bias in the last layer `min(channels + 1, D)`. A model without such
            layers is refused as by `plan`.
        """
        head, scale = Head.of(model, self.head), model.get_submodule(self._norm(model)).weight
        channels, d = scale.numel(), head.weight.shape[1]  # type: ignore[union-attr, operator]
        return min(channels, d) + 1 if head.bias is not None else min(channels + 1, d)

    def _norm(self, model: nn.Module) -> str:
        if self.norm is not None:
            found = [self.norm]
        else:
            found = [
                name
                for name, m in model.named_modules()
                if isinstance(m, NORMS) and m.weight is not None and getattr(m, "bias", None) is not None
            ]
        layer = dict(model.named_modules()).get(found[-1]) if found else None
        weight, bias = (getattr(layer, part, None) for part in ("weight", "bias"))
        if weight is None or bias is None or weight.shape != bias.shape:
            what = f"{found[-1]!r} ({type(layer).__name__})" if found else type(model).__name__
            raise px.PackextError(f"{what} has no normalisation with scale and shift that could fix what follows it.")
        return found[-1]

    def counts(
        self, plan: Plan, total: Gradient, sizes: Sequence[int] | None, loss_fn: nn.Module, weighted: bool = False
    ) -> Counted:
        """Label counts of every client.

        Args:
            plan: by which the clients' models were made.
            total: the sum of their gradients.
            sizes: samples of each client; None if they are not known, for a loss with reduction "sum", no clipping, no
                weights, and clients that lack a class that the model deems possible (a matter of a small magnitude).
            loss_fn: of the clients.
            weighted: whether each gradient was weighted with the client's share of all samples.

        Returns:
            Counts, and how far they were from whole numbers.

        Raises:
            PackextError: if the loss is not cross-entropy, sizes are not known where they must be, or the layer's
                gradient is not in the sum, or not finite.
        """
        plain_cross_entropy(loss_fn)
        found, p = self.separated(plan, total), plan.probabilities.double().cpu()
        if sizes is None:
            if loss_fn.reduction != "sum" or self.clip is not None or weighted:
                raise px.PackextError(
                    'Labels can be counted without the clients\' sizes for reduction="sum" alone, without clipping and '
                    "weights: pass sizes=."
                )
            sizes = [round(float((d / q)[q > 0.01 / len(q)].max())) for d, q in zip(found, p, strict=True)]
        n = torch.tensor([float(size) for size in sizes], dtype=torch.float64)
        factor = torch.ones_like(n) if loss_fn.reduction == "sum" else n
        if weighted:
            factor = factor * n.sum() / n
        found = factor[:, None] * found
        # d_j = p_j S - f_j c_j with S = sum f_j c_j, which follows from sum c_j = B.
        f = plan.factors.double()
        whole = (n + (found / f).sum(1)) / (p / f).sum(1)
        counts = (p * whole[:, None] - found) / f
        rows = torch.stack([rounded(row, size) for row, size in zip(counts, sizes, strict=True)])
        return Counted(rows, (counts - counts.round()).abs().amax(1))

    def separated(self, plan: Plan, total: Gradient) -> Tensor:
        """Each client's own gradient of the last layer's bias `[K, C]`, float64, from the sum.

        Args:
            plan: by which the clients' models were made.
            total: the sum of their gradients.

        Returns:
            The solution of the linear system, in least squares.

        Raises:
            PackextError: if the layer's gradient is not in the sum, or not finite.
        """
        shape = [plan.probabilities.shape[1], plan.features.shape[1]]
        weight, bias = (total.get(f"{plan.head}.{part}") for part in ("weight", "bias"))
        if weight is None or list(weight.shape) != shape:
            raise px.PackextError(
                f"The gradient of {plan.head!r}, the last layer's weight {shape}, is not in the sum, of "
                f"{', '.join(total)}."
            )
        if not all(g.isfinite().all() for g in (weight, bias) if g is not None):
            raise px.PackextError(f"The gradient of {plan.head!r} in the sum has entries that are not finite.")
        left, right = plan.features.double().cpu(), weight.double().cpu()
        if bias is not None and int(torch.linalg.matrix_rank(left)) < len(left):
            # One more client can be told apart with the bias. Its entries are the smallest, and the first to be pruned.
            left = torch.cat([left, torch.full_like(left[:, :1], self.magnitude)], 1)
            right = torch.cat([right, bias.double().cpu()[:, None] * self.magnitude], 1)
        return torch.linalg.lstsq(left.T, right.T, driver="gelsd").solution


def _seen(model: nn.Module, head: Head, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The last layer's input and the model's output on an example, without touching the model."""
    got: list[Tensor] = []
    handle = model.get_submodule(head.name).register_forward_pre_hook(
        lambda module, args, kwargs: got.append(*args, *kwargs.values()), with_kwargs=True
    )
    try:
        values = {k: v.detach().clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
        with torch.no_grad(), px.disable():
            logits = torch.func.functional_call(model, {**values, **state}, (x,))
    finally:
        handle.remove()
    if not got or logits.shape[1:] != (len(head.weight),) or got[-1].dim() != 2:
        raise px.PackextError(
            f"{head.name!r} is not the last layer of {type(model).__name__}: it must make logits [N, C] from [N, D]."
        )
    return got[-1].double(), logits.double()


def _clipped(model: nn.Module, x: Tensor, state: Mapping[str, Tensor], classes: int, clip: float) -> Tensor:
    """By what clipping shrinks the gradient of a sample of each class, as the example's inputs have it."""
    model = px.extend(copy.deepcopy(model))
    model.load_state_dict(dict(state), strict=False)
    loss_fn = px.extend(nn.CrossEntropyLoss(reduction="sum"))
    with px.backpack(px.BatchL2Grad(), scale="sample", attach=False) as results:
        labels = torch.arange(classes, device=x.device).repeat_interleave(len(x))
        loss_fn(model(x.repeat(classes, *[1] * (x.dim() - 1))), labels).backward()
    shrunk = (clip / results.batch_l2.sqrt().clamp_min(1e-30)).clamp_max(1.0)
    return shrunk.view(classes, len(x)).mean(1)
