"""Models of Hugging Face transformers as they come, with small configurations and random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import testing

pytestmark = pytest.mark.usefixtures("double")

transformers = pytest.importorskip("transformers")
N, T, V = 3, 5, 9


LLAMA = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": V}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def words() -> dict[str, Tensor]:
    """Sentences of different lengths: padded, and what is padded has no label."""
    ids = torch.randint(1, V, (N, T))
    mask = torch.arange(T) < torch.tensor([5, 2, 4])[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def full() -> dict[str, Tensor]:
    ids = torch.randint(1, V, (N, T))
    return {"input_ids": ids, "labels": ids}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(N, 3, 8, 8), "labels": torch.randint(5, (N,))}


def build(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return make


#: Some compute parts in float32 whatever the parameters' precision: it is theirs that bounds the agreement then.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], float]] = {
    "GPT-2": (
        build("GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=T,
              attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2),
        words, 1e-5,
    ),
    "Llama": (build("LlamaForCausalLM", "LlamaConfig", **LLAMA), words, 1e-5),
    "Mixtral": (
        build("MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=4, experts_implementation="eager"),
        words, 1e-5,
    ),
    "BERT": (
        build("BertForMaskedLM", "BertConfig", vocab_size=V, max_position_embeddings=T, pad_token_id=0, **BERT),
        words, 1e-9,
    ),
    "T5": (
        build("T5ForConditionalGeneration", "T5Config", vocab_size=V, decoder_start_token_id=0, pad_token_id=0, **T5),
        words, 1e-5,
    ),
    "ViT": (build("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, num_labels=5, **BERT), pictures,
            1e-9),
    "Mamba": (build("MambaForCausalLM", "MambaConfig", **SMALL), full, 1e-5),
    "Mamba 2": (build("Mamba2ForCausalLM", "Mamba2Config", num_heads=4, head_dim=8, n_groups=1, chunk_size=4, **SMALL),
                full, 1e-5),
}  # fmt: skip


def causal(model: nn.Module) -> bool:
    """Whether labels are the words that follow, so that the loss shifts them."""
    return "Causal" in type(model).__name__ or "LMHead" in type(model).__name__


def shares(batch: dict[str, Tensor], shifted: bool) -> list[float]:
    """Of each sample in the mean over labels."""
    labels = batch["labels"].reshape(N, -1)
    real = (labels[:, 1:] if shifted else labels) != -100
    return (real.sum(1) / real.sum()).tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_all_quantities_of_the_models_own_loss(name: str) -> None:
    make, data, tolerance = MODELS[name]
    model, batch = make().double().train(), data()
    rows = testing.individual_gradients(
        model,
        lambda output, _: output.loss,
        batch,
        batch["labels"],
        weights=shares(batch, causal(model)),
    )
    px.extend(model)
    quantities = testing.all_quantities()
    with px.backpack(*quantities, scale="loss"):
        model(**batch).loss.backward()
    report = testing.compare(model, quantities, rows, float(N), tolerance)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_curvature_of_the_models_own_loss(name: str) -> None:
    make, data, _ = MODELS[name]
    model, batch = px.extend(make().double().train()), data()
    with px.backpack(px.DiagGGNExact()):
        model(**batch).loss.backward()
    found = {n: p.diag_ggn_exact for n, p in model.named_parameters() if hasattr(p, "diag_ggn_exact")}
    labels = batch["labels"]
    with px.backpack(px.DiagGGNExact()):
        logits = model(**batch).logits
        pairs = (logits[:, :-1], labels[:, 1:]) if causal(model) else (logits, labels)
        flat = pairs if labels.dim() == 1 else (pairs[0].flatten(0, 1), pairs[1].flatten())
        px.extend(nn.CrossEntropyLoss())(*flat).backward()
    want = {n: p.diag_ggn_exact for n, p in model.named_parameters() if hasattr(p, "diag_ggn_exact")}
    assert found.keys() == want.keys() and found
    for n in found:
        assert testing.relative_error(found[n], want[n]) < 1e-5, n


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mixtral", "BERT", "T5", "ViT"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """Of either kind, it trains in and outside of contexts as without packext, and gives what it gives without it."""
    make, data, _ = MODELS[name]
    model, batch = make().double().train(), data()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())

    def grads(model: nn.Module) -> dict[str, Tensor]:
        model(**batch).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    want = grads(model)
    px.extend(model), px.extend(plain)
    torch.testing.assert_close(grads(model), want, rtol=0, atol=0)
    for quantity in (px.BatchGrad(), px.DiagGGNExact(), px.KFAC(fisher="exact")):
        found = []
        for each in (model, plain):
            with px.backpack(quantity) as results:
                torch.testing.assert_close(grads(each), want, rtol=1e-12, atol=1e-14)
            found.append({name: getattr(r, quantity.savefield) for name, r in results.items()})
        assert found[0].keys() == want.keys()
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.gradient_checkpointing_enable. is deprecated")
def test_what_reentrant_checkpointing_keeps_from_the_loss() -> None:
    """The loss that balances experts reads what was made in there, and torch gives that no gradient."""
    options = {"num_local_experts": 4, "experts_implementation": "eager", "output_router_logits": True}
    model = build("MixtralForCausalLM", "MixtralConfig", **LLAMA, **options, router_aux_loss_coef=0.5)().double()
    batch, found = words(), []
    for reentrant in (False, True):
        options = {"use_reentrant": reentrant}
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
        for extended in (False, True):
            (px.extend if extended else px.unextend)(model)
            model.zero_grad()
            with px.backpack(*[px.BatchL2Grad()] * extended):
                model(**batch).loss.backward()
            found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[1::2], found[::2], rtol=1e-12, atol=1e-14)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[0], found[2])


UNTIED = {"vocab_size": V, "tie_word_embeddings": False}

#: Models that K-FAC trains, and parameters that the fallback is to have.
TRAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], tuple[str, ...]]] = {
    "GPT-2": (
        build("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=1, n_head=2, n_positions=T + 2, attn_pdrop=0.0,
              embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2, **UNTIED),
        words, (),
    ),
    "GPT-2, tied": (*MODELS["GPT-2"][:2], ()),
    "GPT-2, tied, with the fallback": (*MODELS["GPT-2"][:2], ("transformer.wte.weight",)),
    "Mixtral": (*MODELS["Mixtral"][:2], ()),
    "ViT": (*MODELS["ViT"][:2], ()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TRAINED)
def test_a_kronecker_factored_optimizer_trains_it(name: str) -> None:
    make, data, apart = TRAINED[name]
    model, batch = px.extend(make().double().train()), data()
    named = dict(model.named_parameters())
    rest = {"params": [named.pop(key) for key in apart], "fallback": True, "lr": 1e-2}
    groups = [{"params": list(named.values())}, rest] if apart else list(named.values())
    optimizer = px.optim.KFAC(groups, damping=0.1 if name == "Mixtral" else 1e-2)  # of which few tokens reach an expert
    before, losses = {k: p.detach().clone() for k, p in model.named_parameters()}, []
    for _ in range(12):
        optimizer.zero_grad()
        with px.optim.emit(optimizer):
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert optimizer.skipped == 0 and losses[-1] < 0.5 * losses[0], losses
    for key, p in model.named_parameters():
        assert p.grad is None or not p.grad.any() or not torch.equal(p, before[key]), key
        assert (key in apart) != ("factors" in optimizer.state[p]), key


@pytest.mark.parametrize("name", ["GPT-2", "ViT"])
def test_factors_of_a_position_table(name: str) -> None:
    """B is that of the gradients at what is added to the tokens, where each sample has its own."""
    make, data, _ = TRAINED[name]
    model, batch = make().double().train(), data()
    table = "transformer.wpe.weight" if name == "GPT-2" else "vit.embeddings.position_embeddings"
    seen: list[Tensor] = []
    hook = model.get_submodule("transformer.drop" if name == "GPT-2" else "vit.embeddings").register_forward_hook(
        lambda module, args, y: seen.append(y)
    )
    loss = model(**batch).loss
    (b,) = torch.autograd.grad(loss, seen)
    hook.remove()
    px.extend(model)
    with px.backpack(px.KFAC(fisher="empirical"), parameters=[model.get_parameter(table)]) as results:
        model(**batch).loss.backward()
    counts, outputs = results[table].kfac
    size = b.shape[1]
    # The gradient of the loss as it is written; the empirical Fisher is of the samples' own, N times as large, over N.
    torch.testing.assert_close(outputs, N * torch.einsum("nti,ntj->ij", b, b))
    assert torch.equal(counts, torch.tensor([1 / size] * size + [0.0] * (len(counts) - size)))
