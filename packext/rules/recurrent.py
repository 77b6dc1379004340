"""RNN, LSTM and GRU: torch's fused call runs forward and backward; the pairs come from unrolling it.

The fused call hides the gradients at its gates. When a quantity is wanted, the recurrence is run again
in single steps, with a zero added to the gates before their nonlinearities; the gradient of that zero is g.

Of a PackedSequence, the sequences are put side by side for that, in the order of their lengths, and those that are
over keep their states.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packext._errors import CoupledSamplesError
from packext._factored import Dense, Factored, Outer, Terms, accumulation_dtype
from packext._layout import Layout, Scattered
from packext._use import Gradients, Layouts, Rule, Use
from packext.rules import _lstm
from packext.rules._common import handles

if TYPE_CHECKING:
    from packext._lineage import Tracer

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass
class Strand:
    """One direction of one layer, unrolled: its inputs, hidden states and the zeros at its gates."""

    prefix: str
    inputs: Tensor
    hidden: Tensor
    at_input: Tensor
    at_hidden: Tensor


def _step(
    kind: str, from_input: Tensor, from_hidden: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell from the two halves of its gates: new hidden state (before projection) and cell state."""
    if kind == "lstm":
        i, f, g, o = (from_input + from_hidden).chunk(4, -1)
        assert c is not None
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "gru":
        ri, zi, ni = from_input.chunk(3, -1)
        rh, zh, nh = from_hidden.chunk(3, -1)
        r, z = (ri + rh).sigmoid(), (zi + zh).sigmoid()
        n = (ni + r * nh).tanh()
        return n + z * (h - n), None
    gates = from_input + from_hidden
    return (gates.tanh() if kind == "rnn_tanh" else gates.relu()), None


class Recurrent(Rule):
    """Layers and directions of one recurrent call."""

    name = "recurrent"
    own_axis = ("h", "c")

    def tells_rows(self, use: Use) -> bool:
        return use.consts["sizes"] is not None

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Any:
        c = use.consts
        weights = [tensors[name] for name in c["weights"]]
        hidden = (tensors["h"], tensors["c"]) if c["kind"] == "lstm" else tensors["h"]
        if c["cell"]:
            return use.func(tensors["input"], hidden, *weights)
        flags = (c["bias"], c["layers"], 0.0, c["train"], c["bidirectional"])
        if c["sizes"] is not None:
            return use.func(tensors["input"], c["sizes"], hidden, weights, *flags)
        return use.func(tensors["input"], hidden, weights, *flags, c["batch_first"])

    def _unroll(self, use: Use, t: dict[str, Tensor]) -> tuple[list[Tensor], list[Strand]]:
        c = use.consts
        kind, directions = c["kind"], 2 if c["bidirectional"] else 1
        x, going = t["input"], None
        if c["cell"]:
            x = x[None]
        elif c["sizes"] is not None:
            going = _lstm.going(c["sizes"], x.device)
            x = _lstm.padded(x, going)
        elif c["batch_first"]:
            x = x.transpose(0, 1)
        strands: list[Strand] = []
        last_h: list[Tensor] = []
        last_c: list[Tensor] = []
        for layer in range(c["layers"]):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                prefix = f"{k}."
                w_ih, w_hh = t[prefix + "ih"], t[prefix + "hh"]
                b_ih, b_hh, w_hr = (t.get(prefix + s) for s in ("bih", "bhh", "hr"))
                h = t["h"] if c["cell"] else t["h"][k]
                state = None if kind != "lstm" else (t["c"] if c["cell"] else t["c"][k])
                sequence = x.flip(0) if direction else x
                on = going.flip(0) if direction and going is not None else going
                inputs = F.linear(sequence, w_ih, b_ih)
                at_input = torch.zeros_like(inputs).requires_grad_()
                # Where input and hidden halves are added, one zero serves both.
                at_hidden = torch.zeros_like(inputs).requires_grad_() if kind == "gru" else at_input
                inputs = inputs + at_input
                states, outs = [], []
                for step in range(len(sequence)):
                    states.append(h)
                    from_hidden = F.linear(h, w_hh, b_hh)
                    if kind == "gru":
                        from_hidden = from_hidden + at_hidden[step]
                    h_before, c_before = h, state
                    h, state = _step(kind, inputs[step], from_hidden, h, state)
                    if w_hr is not None:
                        h = F.linear(h, w_hr)
                    if on is not None:
                        h = torch.where(on[step, :, None], h, h_before)
                        if state is not None and c_before is not None:
                            state = torch.where(on[step, :, None], state, c_before)
                    outs.append(h)
                strands.append(Strand(prefix, sequence, torch.stack(states), at_input, at_hidden))
                last_h.append(h)
                if state is not None:
                    last_c.append(state)
                out = torch.stack(outs)
                outputs.append(out.flip(0) if direction else out)
            x = torch.cat(outputs, -1)
        if c["cell"]:
            return [last_h[0], *last_c], strands
        y = x.transpose(0, 1) if c["batch_first"] else x if going is None else x[going]
        ends = [torch.stack(last_h)] + ([torch.stack(last_c)] if last_c else [])
        return [y, *ends], strands

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        c = use.consts
        if any(name in ("h", "c") or name.endswith("hr") for name in use.sources):
            return None  # a learned initial state, or projection
        layout = _of_steps(use, t["input"], gs, layouts)
        if layout is None:
            return None
        keep = torch.is_grad_enabled()
        dtype = functools.reduce(torch.promote_types, (v.dtype for v in t.values()))  # under autocast there are several
        t, gs = {k: v.to(dtype) for k, v in t.items()}, [None if g is None else g.to(dtype) for g in gs]
        halves: list[tuple[str, Tensor, Tensor]] = []
        projected = any(name.endswith("hr") for name in c["weights"])
        if c["kind"] == "lstm" and not keep and not projected:
            for k, (run, g) in enumerate(_lstm.pairs(c, {name: v.detach() for name, v in t.items()}, gs)):
                halves += [(f"{k}.ih", run.inputs, g), (f"{k}.hh", run.hidden, g)]
        else:
            halves = self._by_autograd(use, t, gs, keep)
        forms: dict[str, Factored] = {}
        going = count = own = None
        if c["sizes"] is not None:  # steps of sequences that are over do not count
            going, count = _lstm.going(c["sizes"], t["input"].device), int(c["sizes"].sum()) / layout.n
        for name, a, g in halves:
            gs_ = layout.split(g, 2)
            terms = Terms(gs_.mT[:, None])
            if name in use.sources:
                if going is not None:
                    on = going.flip(0) if c["bidirectional"] and int(name.partition(".")[0]) % 2 else going
                    a, own = a * on[..., None], functools.partial(layout.marked, on)
                a = layout.split(a, 2)[:, None]
                forms[name] = Outer(a, terms.g, t[name].shape, terms=terms, positions=count, own=own)
            bias = name.replace(".", ".b")
            if bias in use.sources:
                forms[bias] = Dense(gs_.sum(1, dtype=accumulation_dtype(g.dtype)), terms)
        return forms

    def _by_autograd(
        self, use: Use, t: dict[str, Tensor], gs: Sequence[Tensor | None], keep: bool
    ) -> list[tuple[str, Tensor, Tensor]]:
        """Name of a weight, what multiplied it `[T, N, I]`, and the gradient at its product `[T, N, O]`."""
        with torch.enable_grad():
            inputs = t if keep else {k: v.detach() for k, v in t.items()}
            outputs, strands = self._unroll(use, inputs)
            ends = [(y, g) for y, g in zip(outputs, gs, strict=True) if g is not None]
            zeros = [z for s in strands for z in (s.at_input, s.at_hidden)]
            grads = torch.autograd.grad(
                [y for y, _ in ends],
                zeros,
                [g for _, g in ends],
                create_graph=keep,
                allow_unused=True,
            )
        halves = []
        for k, s in enumerate(strands):
            for half, a, g in (("ih", s.inputs, grads[2 * k]), ("hh", s.hidden, grads[2 * k + 1])):
                g = torch.zeros_like(s.at_input) if g is None else g
                halves.append((s.prefix + half, a if keep else a.detach(), g))
        return halves


RECURRENT = Recurrent()


def _of_steps(use: Use, x: Tensor, gs: Gradients, layouts: Layouts) -> Layout | None:
    """Where the samples are in what there is of all steps, `[T, N, features]`.

    Returns:
        Their layout; None where they have no axis there.

    Raises:
        CoupledSamplesError: if sequences of a packed batch are not one sample's each, as far as can be seen.
    """
    c, live = use.consts, [(g, at) for g, at in zip(gs, layouts, strict=True) if g is not None and at is not None]
    if not live:
        return None
    found = live[0][1]
    if c["sizes"] is None:
        size = x.shape[0 if c["cell"] or c["batch_first"] else 1]
        return None if size % found.n or found.inner else Layout(None if found.axis is None else 1, found.n)
    if found.axis is None:
        return Layout(None, 1)
    going = _lstm.going(c["sizes"], x.device)[..., None]
    whose = torch.ones(going.shape[1], found.n, dtype=torch.bool, device=x.device)
    for g, at in live:
        axis = g.dim() - 2
        if at.axis != axis:
            return None
        possible = at.members(g) | (g == 0).transpose(0, axis).flatten(1).all(1)[:, None]  # zeros tell nothing
        if g.dim() == 2:  # of each step that there is; else of the last states
            possible = (~going).expand(-1, -1, found.n).masked_scatter(going, possible).all(0)
        whose &= possible
    several = not use.rooted and int(whose[whose.sum(1) == 1].sum(0).max()) > 1
    if several or not bool(whose.any(1).all()):
        raise CoupledSamplesError(
            f"{use.describe()} runs on packed sequences. One of them serves two samples, or two of them, packed from "
            "inputs of the model itself, serve one: that samples are kept apart cannot be seen then. Pass a padded "
            "batch, and mask the padding in the loss; or, for two of one sample, say px.extend(model, "
            "batch_axis=None), by which sequences are whose output uses them."
        )
    return Scattered(1, found.n, possible=[whose])


def _weights(values: Sequence[Tensor], bias: bool, strands: int) -> dict[str, Tensor]:
    """Torch's flat list of weights, by strand and role."""
    per = len(values) // strands
    roles = ["ih", "hh", *(["bih", "bhh"] if bias else []), *(["hr"] if per in (3, 5) else [])]
    return {f"{k // per}.{roles[k % per]}": w for k, w in enumerate(values)}


def _fused(kind: str) -> Any:
    def handler(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or len(args) != 9:
            return NotImplemented
        packed = not isinstance(args[3], bool)
        if packed:
            x, sizes, hidden, weights, bias, layers, dropout, train, bidirectional = args
            batch_first = False
        else:
            x, hidden, weights, bias, layers, dropout, train, bidirectional, batch_first = args
            sizes = None
        state = list(hidden) if kind == "lstm" else [hidden]
        if x.dim() != (2 if packed else 3) or not tracer.is_data(x):
            return NotImplemented
        directions = 2 if bidirectional else 1
        per = len(weights) // (layers * directions)
        if dropout and train and layers > 1:
            # Layer by layer, so that each dropout mask is part of the graph and not redrawn.
            ends: list[list[Tensor]] = [[] for _ in state]
            for layer in range(layers):
                part = slice(layer * directions, (layer + 1) * directions)
                sub = [s[part] for s in state]
                flat = list(weights[layer * directions * per : (layer + 1) * directions * per])
                one = (tuple(sub) if kind == "lstm" else sub[0], flat, bias, 1, 0.0, train, bidirectional)
                one = (x, sizes, *one) if packed else (x, *one, batch_first)
                out = handler(tracer, func, one, {})
                for end, value in zip(ends, out[1:], strict=True):
                    end.append(value)
                x = out[0]
                if layer + 1 < layers:
                    x = F.dropout(x, dropout, True)
                tracer.mark(x, None)
            return (x, *(torch.cat(end) for end in ends))
        named = _weights(weights, bias, layers * directions)
        consts = {
            "kind": kind, "cell": False, "bias": bias, "layers": layers, "train": train,
            "bidirectional": bidirectional, "batch_first": batch_first, "sizes": sizes, "weights": tuple(named),
        }  # fmt: skip
        # Which sequence is whose goes by their lengths, which are others in the next pass.
        tracer.record.routed = tracer.record.routed or packed
        states = dict(zip(("h", "c"), state, strict=False))
        return tracer.observed(RECURRENT, func, {"input": x, **states, **named}, consts)

    return handler


def _cell(kind: str) -> Any:
    def handler(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or not 4 <= len(args) <= 6 or args[0].dim() != 2 or not tracer.is_data(args[0]):
            return NotImplemented
        x, hidden, *weights = args
        state = list(hidden) if kind == "lstm" else [hidden]
        weights = [w for w in weights if w is not None]
        named = _weights(weights, len(weights) == 4, 1)
        consts = {
            "kind": kind, "cell": True, "layers": 1, "sizes": None,
            "bidirectional": False, "batch_first": False, "weights": tuple(named),
        }  # fmt: skip
        states = dict(zip(("h", "c"), state, strict=False))
        return tracer.observed(RECURRENT, func, {"input": x, **states, **named}, consts)

    return handler


for _kind in _GATES:
    handles(getattr(torch, _kind))(_fused(_kind))
    handles(getattr(torch, f"{_kind}_cell"))(_cell(_kind))
