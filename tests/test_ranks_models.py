"""Models of Hugging Face with the losses that they compute themselves, on several ranks, are as in one process."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import packext as px
from packext import testing
from tests.test_union import together

transformers = pytest.importorskip("transformers")
from tests.test_transformers import LLAMA, T5, build  # noqa: E402 - these need transformers

T, V = 3, 5
MODELS = {
    "GPT-2": build("GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_embd=8, n_layer=2, n_head=2, n_positions=T,
                   attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2),
    "Mixtral": build("MixtralForCausalLM", "MixtralConfig", **{**LLAMA, "vocab_size": V, "num_hidden_layers": 1},
                     num_local_experts=3, experts_implementation="eager"),
    "T5": build("T5ForConditionalGeneration", "T5Config", vocab_size=V, decoder_start_token_id=0, pad_token_id=0, **T5),
}  # fmt: skip

#: Ranks have other numbers of samples, with other numbers of binary digits.
CUTS = (0, 4, 6)


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().double().train()


def sentences(rank: int | None = None) -> dict[str, Tensor]:
    """Those of a rank, or of all."""
    ids = torch.randint(1, V, (CUTS[-1], T), generator=torch.Generator().manual_seed(0))
    ids = ids if rank is None else ids[CUTS[rank] : CUTS[rank + 1]]
    return {"input_ids": ids, "labels": ids}


def blocks(model: nn.Module) -> list[nn.Module]:
    kind = transformers.modeling_layers.GradientCheckpointingLayer
    return [m for m in model.modules() if isinstance(m, kind)]


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def asked() -> list[Any]:
    return [px.BatchGrad(), px.BatchL2Grad(), px.Variance(), px.KFLR()]


def backward(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> px.Results:
    model.zero_grad()
    with px.backpack(*asked(), scale="sample", attach=False, **options) as results:
        model(**batch).loss.backward()
    return results


def as_one(label: str, model: nn.Module, rank: int, wanted: px.Results) -> None:
    """With the probe and without it, and with `.grad` as without a context."""
    for _ in range(2):
        found = backward(model, sentences(rank), group=dist.group.WORLD)
        by_name = {name.removeprefix("module."): found[name] for name in found}
        assert by_name.keys() == {*wanted}, label
        for name, q in [(name, q) for name in wanted for q in asked()]:
            got, want = (pytree.tree_leaves(getattr(r[name], q.savefield)) for r in (by_name, wanted))
            errors = [testing.relative_error(a, b) for a, b in zip(got, want, strict=True)]
            assert max(errors) < 1e-5, f"{label} {name}.{q.savefield}: {errors}"  # losses are computed in float32
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(**sentences(rank)).loss.backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-12, msg=lambda m: f"{label} .grad: {m}")


def _sharded(rank: int, world: int) -> None:
    """Under FSDP2 each of packext's passes gathers parameters: all ranks make as many, whatever a rank's batch is."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)
    plain = {name: backward(px.extend(fresh(name).float().double()), sentences()) for name in ("GPT-2", "Mixtral")}
    for name, options, reentrant in (
        ("GPT-2", {"reshard_after_forward": False}, True),
        ("GPT-2", {"reshard_after_forward": True, "mp_policy": policy}, False),
        ("Mixtral", {}, None),
    ):
        model = fresh(name).float()
        model = model if "mp_policy" in options else model.double()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        as_one(f"{name} {options}", px.extend(sharded(model, **options)), rank, plain[name])


def _accumulated(rank: int, world: int) -> None:
    """What FSDP2 is to reduce behind the last pass of a step is not reduced behind packext's own before that."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float32)
    options: dict[str, Any]
    for options in ({}, {"mp_policy": policy}):  # with a sum that lies apart from `.grad`
        found: list[list[Tensor]] = []
        model: Any = px.extend(sharded(fresh("GPT-2"), **options))
        for context in (False, True, True):
            model.zero_grad()
            for last in (False, True):
                model.set_requires_gradient_sync(last)
                with px.backpack(px.KFAC(), attach=False) if context else nullcontext():
                    model(**sentences(rank)).loss.backward()
            found.append([p.grad.full_tensor() for p in model.parameters()])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-7)


def _replicated(rank: int, world: int) -> None:
    """DistributedDataParallel puts a node of its own between a loss inside and who calls backward()."""
    plain = backward(px.extend(fresh("GPT-2")), sentences())
    options: dict[str, Any]
    for options in ({"find_unused_parameters": True}, {"static_graph": True}):
        for extend_first in (True, False):
            model = fresh("GPT-2")
            model = DistributedDataParallel(px.extend(model) if extend_first else model, **options)
            if "static_graph" in options and not extend_first:
                with pytest.raises(px.UnsupportedUseError, match="static_graph=False"):
                    backward(px.extend(model), sentences(rank))
                continue
            as_one(f"{options}", model if extend_first else px.extend(model), rank, plain)


def _passed_on(rank: int, world: int) -> None:
    """The biases that T5 makes in its first block and gives to the others, which are sharded by themselves."""
    model = px.extend(sharded(fresh("T5")))
    with pytest.raises(px.UnsupportedUseError, match=r"relative_attention_bias\.weight.*FSDP2 shards.*freeze them"):
        backward(model, sentences(rank), group=dist.group.WORLD)
    assert all(p.grad is None for p in model.parameters())
    found, one = [], fresh("T5")
    fully_shard(one)  # as one
    for model, group in ((fresh("T5"), None), (one, dist.group.WORLD)):
        with px.backpack(px.BatchL2Grad(), scale="sample", attach=False, group=group) as results:
            px.extend(model)(**sentences(rank if group else None)).loss.backward()
        found.append(results.batch_l2)
    assert testing.relative_error(found[1], found[0]) < 1e-5


def _each(rank: int, world: int) -> None:
    with warnings.catch_warnings():  # advice of torch and transformers
        warnings.simplefilter("ignore")
        # In one pair of processes, as these take a second to start.
        for work in (_sharded, _accumulated, _replicated, _passed_on):
            work(rank, world)


def test_ranks() -> None:
    together(_each)
