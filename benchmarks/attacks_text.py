"""Sentences from the gradient of a BERT encoder, measured: ``python -m benchmarks.attacks_text`` (transformers)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.attacks import cells, put, save, spread
from packext import attacks
from packext.attacks import DeepLeakage, Shared, share

RESULTS = Path(__file__).parent / "results" / "attacks-text.json"
TEXT = """
The ferry to the island leaves at noon, and whoever misses it waits until the evening. We came early, bought bread and
two apples at the kiosk, and sat down on the wall. A man with a green cap sold maps that nobody needed. When the boat
came around the pier, the children ran ahead, the dog ran after them, and my father counted the bags again. On the
water it was cold. I read the letter once more: the house was to be sold in spring, the boat had gone to a neighbour,
and the key was still under the third stone. Nobody spoke until we saw the lighthouse.
"""
WORDS = re.findall(r"\w+|[.,:]", TEXT.lower())
#: Tokens that the model knows; most of them do not occur in the text.
VOCABULARY = 1000
TOKENS = torch.tensor([sorted(set(WORDS)).index(word) for word in WORDS])
QUERY = "bert.bert.encoder.layer.0.attention.self.query.weight"


class Encoder(nn.Module):
    """Two layers of BERT and a class, untrained; weights are scaled to the width as in BERT base."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=64,
            initializer_range=0.02 * (768 / width) ** 0.5,
            attn_implementation="eager",
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(input_ids=tokens).logits

    def candidates(self, length: int) -> Tensor:
        """What each token makes the first layer's input at each position `[T, V, D]`."""
        tokens = torch.arange(VOCABULARY)[:, None].expand(-1, length)
        with torch.no_grad():
            return self.bert.bert.embeddings(input_ids=tokens).transpose(0, 1)


def sentences(n: int, length: int, seed: int) -> Tensor:
    """Pieces of the text `[N, T]`."""
    starts = torch.randint(len(TOKENS) - length, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([TOKENS[start : start + length] for start in starts])


def drawn(seed: int, dtype: torch.dtype, n: int, length: int) -> tuple[Encoder, Tensor, Shared]:
    torch.manual_seed(seed)
    model, tokens = Encoder().to(dtype).eval(), sentences(n, length, seed)
    return model, tokens, share(model, nn.CrossEntropyLoss(), tokens, torch.randint(2, (n,)))


def by_span(seed: int, dtype: torch.dtype, length: int) -> float:
    """Share of one sentence's tokens that are nearest to the span of the first layer's inputs, at their position."""
    model, tokens, shared = drawn(seed, dtype, 1, length)
    outside = attacks.spanned(shared, QUERY, model.candidates(length), 1e-10 if dtype == torch.float64 else 1e-7)
    return float((outside.argmin(1) == tokens[0]).double().mean())


def in_a_batch(seed: int, n: int, length: int) -> tuple[float, float]:
    """Share of the tokens of several sentences that are in the span at their position, and tokens left per position."""
    model, tokens, shared = drawn(seed, torch.float64, n, length)
    inside = attacks.spanned(shared, QUERY, model.candidates(length), 1e-10) < 1e-6
    return float(inside[torch.arange(length), tokens].double().mean()), float(inside.sum(1).double().mean())


def by_search(seed: int, length: int) -> float:
    """Share of the tokens whose embeddings are nearest to what Deep Leakage finds without the embedding's gradient."""
    model, _, shared = drawn(seed, torch.float64, 1, length)
    tokens = sentences(1, length, seed)
    seen = {k: g for k, g in shared.gradient.items() if "encoder.layer" in k or "position" in k}
    table = model.bert.bert.embeddings.word_embeddings.weight.detach()
    unit = float(table.std())
    found = DeepLeakage(40)(
        model,
        Shared(seen, 1, shared.loss_fn),
        (length, table.shape[1]),
        labels=attacks.IDLG()(model, shared).argmax()[None],
        forward=lambda m, e: m.bert(inputs_embeds=unit * e).logits,
    )
    return float((attacks.nearest_tokens(found.inputs, table) == tokens).double().mean())


def main() -> None:
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"text": {}}
    console = Console()
    for length in (8, 16):
        n, seeds = 48 // length, range(5)
        found, left = zip(*[in_a_batch(seed, n, length) for seed in seeds], strict=True)
        row: dict[str, list[float]] = {
            "one sentence, float64": [by_span(seed, torch.float64, length) for seed in seeds],
            "one sentence, float32": [by_span(seed, torch.float32, length) for seed in seeds],
            "batch, in the span": list(found),
            "batch, left per position": list(left),
            "one sentence, search": [by_search(seed, length) for seed in seeds],
        }
        name = f"{length}, batch of {n}"
        results["text"][name] = {"cells": {key: spread(values) for key, values in row.items()}}
        console.print(cells({name: results["text"][name]}, "")[-1], highlight=False)
        save(RESULTS, results)
    put("text", cells(results["text"], "tokens"))


if __name__ == "__main__":
    main()
