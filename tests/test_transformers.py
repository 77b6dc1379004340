"""Models of Hugging Face transformers as they come, with small configurations and random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import testing
from tests.helpers import double_precision

transformers = pytest.importorskip("transformers")
N, T, V = 3, 5, 9


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with double_precision():
        yield


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
    for n, p in model.named_parameters():
        if n in found:
            assert testing.relative_error(found[n], p.diag_ggn_exact) < 1e-5, n
    assert found
