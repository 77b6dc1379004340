"""The audit of text: tokens are searched for by vectors in place of embeddings, and compared with guessing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import attacks, defences
from packext.audit import Budget, Data, Inversion, Sharing, run
from packext.audit.case import Case, Clock
from packext.audit.findings import _read
from packext.audit.section import plain, restored
from packext.audit.text import Lookup, text

LOSS = nn.CrossEntropyLoss()
FEW = Budget(1e6, draws=2, seeds=2, restarts=1, iterations=20, shadows=4)


class Reader(nn.Module):
    """A perceptron on vectors of tokens side by side, smooth; with a mask of what is no padding where there is some."""

    def __init__(self, padding: int | None = None, vocabulary: int = 30, length: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word, self.place = nn.Embedding(vocabulary, 6, padding_idx=padding), nn.Embedding(length, 6)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(6 * length, 24), nn.Sigmoid())
        self.head = nn.Linear(24, 3)
        self.handed: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.handed.append(x)
        vectors = self.word(x) + self.place(torch.arange(x.shape[1]))
        if self.word.padding_idx is not None:
            vectors = vectors * (x != self.word.padding_idx)[..., None]
        return self.head(self.body(vectors))


class Language(nn.Module):
    """The next token from those before."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word, self.mix, self.head = nn.Embedding(12, 8), nn.Linear(32, 32), nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.word.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(self.word(x).flatten(1)).sigmoid().unflatten(1, (4, 8))
        return self.head(hidden).transpose(1, 2)


def texts(n: int = 40, vocabulary: int = 30, length: int = 5, lowest: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(lowest, vocabulary, (n, length), generator=generator), torch.arange(n) % 3


def audited(model: nn.Module, data: Any = None, **sharing: Any) -> Inversion:
    given = Case(model, LOSS, texts() if data is None else data, Sharing(**{"batch_size": 2} | sharing), FEW)
    return text(given, Clock(1e6))


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the longest section."""
    monkeypatch.setattr("packext.audit._run.sweep", lambda *args: px.audit.Sweep())


@pytest.mark.usefixtures("no_sweep")
def test_texts_are_recovered_and_shown(tmp_path: Path) -> None:
    data = Data(texts(), decode=lambda ids: f"<w{ids[0]}>")
    audit = run(Reader(), LOSS, data, Sharing(batch_size=2), budget=FEW, out=tmp_path)
    assert not audit.inversion.absent and not audit.inversion.searches
    alone, _, both, other = audit.inversion.texts
    assert (alone.search, other.search) == ("Deep Leakage from Gradients", "Inverting Gradients")
    assert [alone.samples, both.samples, alone.seeds, alone.counted, both.counted] == [1, 2, 2, 10, 20]
    for r in (alone, both):
        assert r.tokens.value == r.exact.value == 1.0 and r.found == r.true and r.guess < 0.5
    assert alone.matched == 2 and alone.labels == 1.0 and other.labels is None
    x, (first, second) = (
        data.members[0],
        (torch.randperm(40, generator=torch.Generator().manual_seed(k)) for k in (100, 101)),
    )
    assert alone.true == x[torch.stack([first[0], second[0]])].tolist()
    assert alone.named == sum(len(set(line)) for line in alone.true) / 2
    finding = next(f for f in audit.findings if f.section == "inversion")
    assert finding.severity == "high" and finding.title == "Texts can be reconstructed from what is shared."
    assert "2 texts: 100 % (16 to 100) of the tokens in their place" in finding.evidence
    page = (tmp_path / "audit.html").read_text()
    row = "".join(f"<td>&lt;w{token}&gt;</td>" for token in alone.true[0])
    assert f"<tr><th>client</th>{row}</tr><tr><th>found</th>{row}</tr>" in page and "http" not in page
    written = json.loads((tmp_path / "audit.json").read_text())["sections"]["inversion"]
    assert written["texts"][0]["found"] == alone.true and written == plain(audit.inversion)
    assert set(written["texts"][0]) == set(
        "search embedding samples seeds restarts iterations tokens exact guess named counted labels matched objective "
        "true found".split()
    )
    assert plain(restored(Inversion, written)) == written
    assert "where texts are padded" in audit.inversion.threats["Inverting Gradients"].knows
    with pytest.raises(px.PackextError, match="something else: decode differ"):
        run(Reader(), LOSS, texts(), Sharing(batch_size=2), budget=FEW, out=tmp_path)


def test_tokens_are_marked_that_are_wrong() -> None:
    from packext.audit.report import _lines

    assert _lines([1, 2], [1, 3], {"2": "a<b"}) == (
        "<tr><th>client</th><td>1</td><td>a&lt;b</td></tr><tr><th>found</th><td>1</td><td><mark>3</mark></td></tr>"
    )


@pytest.mark.parametrize("kind", ["named", "frozen", "noise"])
def test_the_nearest_token_is_of_those_that_are_known_to_occur(kind: str) -> None:
    model = Reader()
    model.word.weight.requires_grad_(kind != "frozen")
    noise = defences.GaussianNoise(1e-9, seed=0) if kind == "noise" else None
    found = audited(model, batch_size=1, defence=noise).texts[0]
    assert found.named == (sum(len(set(line)) for line in found.true) / 2 if kind == "named" else 30)
    assert found.tokens.value == 1.0  # of the whole vocabulary too


def test_padding_is_known_and_does_not_count() -> None:
    x, y = texts(lowest=1)
    x[::2, 3:] = 0
    model = Reader(padding=0)
    found = audited(model, (x, y))
    for r in found.texts:
        lines = [(t, f) for true, line in zip(r.true, r.found, strict=True) for t, f in zip(true, line, strict=True)]
        assert all(f == 0 for t, f in lines if t == 0) and r.counted == sum(t != 0 for t, _ in lines)
    alone, _, both, _ = found.texts
    assert alone.tokens.value == both.tokens.value == 1.0 and any(0 in line for line in both.true)
    lookup = Lookup.of(Case(model, LOSS, (x, y), Sharing(), FEW))
    model.handed.clear()
    lookup.forward(x[:4])(model.double(), lookup.table[x[:4]])
    often = int(torch.bincount(x.flatten())[1:].argmax()) + 1
    assert lookup.filler == often and torch.equal(model.handed[0], torch.where(x[:4] == 0, 0, often))
    with pytest.raises(px.PackextError, match="padding are searched for among all alone"):
        lookup.forward(x[:4])(model, lookup.table[x[:2]])
    model.word.weight.requires_grad_(False)
    assert audited(model, (x, y), batch_size=1).texts[0].named == 29  # of the whole vocabulary it is none either
    empty = audited(model, (torch.zeros_like(x), y))
    assert "nothing but padding" in empty.absent["Inverting Gradients, 1 sample"] and not empty.texts


def test_who_reads_the_tokens() -> None:
    class Odd(Reader):
        kind = ""

        def forward(self, x: Tensor) -> Tensor:
            if self.kind == "none":
                return self.head(self.body(torch.nn.functional.embedding(x, self.word.weight)))
            if self.kind == "twice":
                return super().forward(x) + super().forward(x)
            if self.kind == "parity":
                return super().forward(x) * (1 + x[:, :1] % 2)
            return super().forward(x.flatten().view(x.shape))

    def refused(kind: str) -> str:
        model = Odd()
        model.kind = kind
        return audited(model).absent["reconstruction"]

    for kind in ("none", "twice"):
        assert "Odd calls as a module, once, with the inputs and nothing else. Such are: none." in refused(kind)
    assert "Odd reads the tokens elsewhere than by 'word' as well" in refused("parity")
    flat = nn.Sequential(nn.Flatten(0), nn.Embedding(30, 6), nn.Unflatten(0, (-1, 5)), nn.Flatten(), nn.Linear(30, 3))
    assert audited(flat).texts[0].tokens.value == 1.0
    parametrized = Reader()
    nn.utils.parametrizations.weight_norm(parametrized.word)
    assert "is no parameter, but made of others" in audited(parametrized).absent["reconstruction"]
    same = Reader()
    nn.init.ones_(same.word.weight)
    assert "no token can be told from another" in audited(same).absent["reconstruction"]


@pytest.mark.usefixtures("no_sweep")
def test_of_an_average_of_tokens_no_order_is_found() -> None:
    class Mean(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.word(x).mean(1, keepdim=True).expand(-1, 4, -1).flatten(1))

    audit = run(Mean(), LOSS, texts(), Sharing(batch_size=1), budget=FEW)
    assert audit.inversion.texts[0].matched == 2 and audit.inversion.texts[0].exact.value == 0.0
    title = next(f.title for f in audit.findings if f.section == "inversion")
    assert title == "Searches have matched the gradient, and place tokens no better than guessing does."


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_told_no_tokens_as_labels(tied: bool) -> None:
    x = texts(vocabulary=12)[0]
    data = x[:, :-1].contiguous(), x[:, 1:].contiguous()
    found = audited(Language(tied), data, batch_size=1)
    (alone,) = found.texts
    assert alone.tokens.value == 1.0 and alone.labels == 1.0
    assert alone.named == 12 if tied else alone.named < 12
    assert "may be the text itself" in found.absent["Inverting Gradients"]
    data[1][0, 0] = -100
    assert "some of which it ignores" in audited(Language(tied), data).absent["reconstruction"]
    steps: dict[str, Any] = {"what": "update", "local_steps": 2, "lr": 0.1}
    assert "unrolls local steps" in audited(Language(tied), (x[:, :-1], x[:, 1:]), **steps).absent["reconstruction"]


def test_an_update_of_local_steps_on_texts() -> None:
    found = audited(Reader(), what="update", batch_size=1, samples=2, local_steps=2, lr=0.1)
    (update,) = [r for r in found.texts if r.samples == 2]
    assert update.search == "Inverting Gradients" and update.tokens.value > 2 * update.guess
    assert "does not unroll local steps" in found.absent["Deep Leakage from Gradients"]


def test_a_gradient_of_zero_is_guessed() -> None:
    model = Reader()
    for p in (*model.head.parameters(), *model.body.parameters()):
        nn.init.zeros_(p.requires_grad_(False))
    found = audited(model, batch_size=1)
    assert all(r.objective is None and r.tokens.value == r.guess and not r.matched for r in found.texts)


def test_vectors_that_know_nothing_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the texts that fits best, as what was found is put."""

    def blind(case: Case, attack: Any, message: Any, y: Tensor, guessed: Tensor, forward: Any) -> Any:
        found = torch.randn(guessed.shape, dtype=guessed.dtype)
        return attacks.Reconstruction(found, torch.zeros_like(y), (1.0,), False, 1)

    monkeypatch.setattr("packext.audit.text.searched", blind)
    torch.manual_seed(0)
    many = replace(FEW, seeds=40)
    given = Case(Reader(vocabulary=12), LOSS, texts(200, vocabulary=12), Sharing(batch_size=8), many)
    for r in text(given, Clock(1e6)).texts:
        assert r.seeds == 40 and not _read(r, 1), (r.tokens, r.guess)
        assert 1.5 / 12 < r.tokens.value < r.guess  # which of 12 tokens alone would be right less often


def test_words_that_cannot_be_said() -> None:
    def fails(ids: list[int]) -> str:
        raise KeyError(ids[0])

    assert "decode= failed: KeyError" in audited(Reader(), Data(texts(), decode=fails)).absent["words of tokens"]
    number: Any = len
    assert "got int" in audited(Reader(), Data(texts(), decode=number)).absent["words of tokens"]
    with pytest.raises(px.PackextError, match=r"decode says what tokens are.*inputs of torch.float32"):
        Data.of(Data((torch.rand(4, 3), torch.arange(4)), decode=str))


def test_a_bert_classifier_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            config = transformers.BertConfig(
                vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=16, initializer_range=0.1,
            )  # fmt: skip
            self.bert = transformers.BertForSequenceClassification(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.bert(input_ids=ids, attention_mask=(ids != 0).long()).logits

    x, _ = texts(vocabulary=60, length=6, lowest=1)
    x[::2, -2:] = 0
    given = Case(Classifier().eval(), LOSS, (x, torch.arange(40) % 2), Sharing(batch_size=1), FEW)
    found = text(given, Clock(1e6))
    assert found.texts[0].embedding == "bert.bert.embeddings.word_embeddings"
    assert found.texts[0].tokens.value >= 0.9 and found.texts[0].guess < 0.5
