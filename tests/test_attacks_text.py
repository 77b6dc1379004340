"""A sentence from the gradient of a BERT encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from packext import attacks

LAYER = "bert.bert.encoder.layer.0.attention.self"


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=200,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=40,
            initializer_range=0.1,
            attn_implementation="eager",
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(input_ids=tokens).logits

    def inputs(self, length: int) -> Tensor:
        tokens = torch.arange(200)[:, None].expand(-1, length)
        return self.bert.bert.embeddings(input_ids=tokens).detach().transpose(0, 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-7), (torch.float64, 1e-10)])
def test_a_sentence_by_the_span_test(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = Encoder().to(dtype).eval()
    tokens = torch.randint(200, (1, 20))
    tokens[0, 7] = tokens[0, 3]  # the same token twice
    shared = attacks.share(model, nn.CrossEntropyLoss(), tokens, torch.tensor([1]))
    outside = attacks.spanned(shared, f"{LAYER}.query.weight", model.inputs(20), tolerance)
    assert outside.argmin(1).tolist() == tokens[0].tolist()
    # True tokens are in the span, and no other comes near.
    true = outside.gather(1, tokens.T)
    others = outside.scatter(1, tokens.T, 1.0)
    assert true.max() < (1e-2 if dtype == torch.float32 else 1e-8) and others.min() > 0.1
    assert attacks.rank(shared, f"{LAYER}.query.weight", tolerance) == 20
    # Attention does not see a shift of all keys.
    assert attacks.rank(shared, f"{LAYER}.key.weight", tolerance) == 19


def test_what_hides_a_sentence() -> None:
    """As many tokens as there are dimensions, of which LayerNorm takes one: all is in the span. And dropout."""
    torch.manual_seed(0)
    model = Encoder().double().eval()
    tokens = torch.randint(200, (1, 31))
    shared = attacks.share(model, nn.CrossEntropyLoss(), tokens, torch.tensor([0]))
    assert attacks.spanned(shared, f"{LAYER}.query.weight", model.inputs(31), 1e-12).max() < 1e-6
    shared = attacks.share(model.train(), nn.CrossEntropyLoss(), tokens[:, :12], torch.tensor([0]))
    outside = attacks.spanned(shared, f"{LAYER}.query.weight", model.eval().inputs(12), 1e-10)
    assert (outside.gather(1, tokens[:, :12].T) > 1e-2).double().mean() > 0.8
