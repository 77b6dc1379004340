"""Networks that people train, whole: residual networks, a diffusion U-Net, graph convolutions, LoRA by PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext import testing
from tests.cases import running
from tests.helpers import assert_exact, rows_of

pytestmark = pytest.mark.usefixtures("double")

N = 3


class Residual(nn.Module):
    """torchvision's BasicBlock (two 3 x 3) or Bottleneck (1 x 1, 3 x 3, 1 x 1), with its projection of the skip."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = width * (4 if bottleneck else 1)
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        sizes = sizes if bottleneck else [(inputs, width, 3, stride), (width, out, 3, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != out:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            x = self.relu(x) if k < len(self.convs) - 1 else x
        x += skip
        return self.relu(x)


class ResNet(nn.Module):
    def __init__(self, bottleneck: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 7, 2, 3, bias=False), nn.BatchNorm2d(2)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        out = 4 if bottleneck else 1
        self.layers = nn.Sequential(
            Residual(2, 2, 1, bottleneck), Residual(2 * out, 2, 1, bottleneck), Residual(2 * out, 3, 2, bottleneck)
        )
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3 * out, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


def resnet(bottleneck: bool) -> tuple[nn.Module, Any, Tensor, nn.Module]:
    model = ResNet(bottleneck)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            running(module)
    return model.eval(), torch.randn(N, 2, 12, 12), torch.randint(3, (N,)), nn.CrossEntropyLoss()


class Timed(nn.Module):
    """A residual block of a diffusion model: GroupNorm, SiLU, and a shift and scale by the time's embedding."""

    def __init__(self, inputs: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, out, 3, padding=1)
        self.time = nn.Linear(time, 2 * out)
        self.norm2, self.conv2 = nn.GroupNorm(2, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(inputs, out, 1) if inputs != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, 1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return h + self.skip(x)


class Attended(nn.Module):
    """Attention over the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(2, width), nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, 2)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.mT.reshape(x.shape))


class UNet(nn.Module):
    """Down, attention, up, and what was on the way down beside what is on the way up."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 6))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down, self.shrink = Timed(width, width, 6), nn.Conv2d(width, width, 3, 2, 1)
        self.middle, self.attend = Timed(width, width, 6), Attended(width)
        self.grow, self.up = nn.ConvTranspose2d(width, width, 4, 2, 1), Timed(2 * width, width, 6)
        self.last = nn.Sequential(nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 0.1])
        t = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        skip = self.down(self.first(x), t)
        h = self.attend(self.middle(self.shrink(skip), t))
        h = self.grow(h) + F.interpolate(h, scale_factor=2.0, mode="nearest")
        return self.last(self.up(torch.cat([h, skip], 1), t))


def unet() -> tuple[nn.Module, Any, Tensor, nn.Module]:
    return UNet(), (torch.randn(N, 1, 2, 4), torch.rand(N) * 10), torch.randn(N, 1, 2, 4), nn.MSELoss()


EDGES = torch.tensor([[0, 1, 1, 2, 3, 3, 4], [1, 0, 2, 3, 2, 4, 0]])


class GraphConvolution(nn.Module):
    """h_v + the sum of W h_u, over the edges from u to v, divided by their number (Kipf & Welling 2017)."""

    def __init__(self, inputs: int, out: int) -> None:
        super().__init__()
        self.own, self.near = nn.Linear(inputs, out), nn.Linear(inputs, out, bias=False)

    def forward(self, h: Tensor, edges: Tensor, axis: int) -> Tensor:
        near = self.near(h)
        count = torch.zeros(h.shape[axis]).index_add(0, edges[1], torch.ones(edges.shape[1])).clamp(min=1)
        passed = torch.zeros_like(near).index_add(axis, edges[1], near.index_select(axis, edges[0]))
        return self.own(h) + passed / count[:, None]


class Graphs(nn.Module):
    """Node features of each graph `[N, V, F]` on edges that all share, or of one graph `[V, F]`."""

    def __init__(self, axis: int, out: int = 3) -> None:
        super().__init__()
        self.axis = axis
        self.one, self.two, self.head = GraphConvolution(2, 4), GraphConvolution(4, 4), nn.Linear(4, out)

    def forward(self, h: Tensor) -> Tensor:
        h = self.two(self.one(h, EDGES, self.axis).relu(), EDGES, self.axis)
        return self.head(h.mean(1) if self.axis else h)


def graphs() -> tuple[nn.Module, Any, Tensor, nn.Module]:
    return Graphs(1), torch.randn(N, 5, 2), torch.randint(3, (N,)), nn.CrossEntropyLoss()


MODELS = {
    "ResNet of basic blocks": lambda: resnet(False),
    "ResNet of bottlenecks": lambda: resnet(True),
    "U-Net": unet,
    "graph convolutions": graphs,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_quantity(name: str) -> None:
    model, x, y, loss_fn = MODELS[name]()
    rows = testing.individual_gradients(model, loss_fn, x, y, weights=[1 / N] * N)
    px.extend(model), px.extend(loss_fn)
    assert_exact(model, lambda: loss_fn(testing.call(model, x), y), rows, N)


@pytest.mark.parametrize("name", MODELS)
def test_diagonal_of_the_ggn(name: str) -> None:
    model, x, y, loss_fn = MODELS[name]()
    rows = testing.curvature_rows(model, loss_fn, x, y, weights=[1 / N] * N)
    px.extend(model), px.extend(loss_fn)
    with px.backpack(px.DiagGGNExact()):
        loss_fn(testing.call(model, x), y).backward()
    for n, p in model.named_parameters():
        want = rows[n].square().sum((0, 1))
        assert testing.relative_error(p.diag_ggn_exact, want) < 1e-9, n


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_residual_network_in_training_mode_is_refused(bottleneck: bool) -> None:
    model, x, y, loss_fn = resnet(bottleneck)
    px.extend(model.train())
    with pytest.raises(px.CoupledSamplesError, match=r"bn1 \[BatchNorm2d\]"), px.backpack(px.BatchGrad()):
        px.extend(loss_fn)(model(x), y).backward()
    assert all(p.grad is None and not hasattr(p, "grad_batch") for p in model.parameters())


def test_nodes_of_one_graph_are_no_samples() -> None:
    model, x, y = px.extend(Graphs(0)), torch.randn(5, 2), torch.randint(3, (5,))
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None and not hasattr(p, "grad_batch") for p in model.parameters())


class Concatenated(Graphs):
    """Nodes of all graphs one after the other `[sum of V, F]`, as PyTorch Geometric has them; one output a graph."""

    def __init__(self) -> None:
        super().__init__(0)

    def forward(self, h: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        h = self.two(self.one(h, edges, 0).relu(), edges, 0)
        pooled = torch.zeros(int(graph.max()) + 1, h.shape[1]).index_add(0, graph, h)
        return self.head(pooled)


@pytest.mark.parametrize("sizes, right", [((5, 5), True), ((3, 5), False), ((5, 3, 4), False), ((5, 5, 5), False)])
def test_graphs_one_after_the_other_are_right_or_refused(sizes: tuple[int, ...], right: bool) -> None:
    """Where nothing tells which nodes are a graph's, there is no axis of samples."""
    model, n = Concatenated(), len(sizes)
    nodes, graph, y = (
        torch.randn(sum(sizes), 2),
        torch.arange(n).repeat_interleave(torch.tensor(sizes)),
        torch.arange(n),
    )
    ring = torch.cat([torch.stack([torch.arange(v), (torch.arange(v) + 1) % v]) for v in sizes], 1)
    edges = ring + torch.tensor([sum(sizes[:k]) for k in range(n)]).repeat_interleave(torch.tensor(sizes))
    rows = rows_of(model, lambda: F.cross_entropy(model(nodes, edges, graph), y, reduction="none") / n)
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    if right:
        assert_exact(model, lambda: loss_fn(model(nodes, edges, graph), y), rows, n)
        return
    with pytest.raises(px.PackextError, match="samples"), px.backpack(px.BatchGrad()):
        loss_fn(model(nodes, edges, graph), y).backward()
    assert all(p.grad is None and not hasattr(p, "grad_batch") for p in model.parameters())


# -- LoRA ------------------------------------------------------------------------------------------------------


def adapted() -> tuple[nn.Module, dict[str, Tensor]]:
    """Llama with adapters on its attention, of which B is not zero any more; the rest is frozen."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    ids = torch.randint(1, 9, (N, 5))
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # transformers', of what PEFT asks
def test_lora_by_peft() -> None:
    model, batch = adapted()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8 and all("lora" in name for name in trained)
    rows = testing.individual_gradients(
        model, lambda output, _: output.loss, batch, batch["labels"], weights=[1 / N] * N
    )
    px.extend(model)
    quantities = testing.all_quantities()
    with px.backpack(*quantities, px.DiagGGNExact(), scale="loss"):
        model(**batch).loss.backward()
    report = testing.compare(model, quantities, rows, float(N), 1e-5)  # rotary embeddings are float32
    assert report.ok, str(report)
    found = {name: p.diag_ggn_exact for name, p in model.named_parameters() if p.requires_grad}
    columns = testing.curvature_rows(
        Logits(model), lambda logits, y: F.cross_entropy(logits[:, :-1].mT, y[:, 1:]), batch["input_ids"],
        batch["labels"], weights=[1 / N] * N,
    )  # fmt: skip
    for name in trained:
        want = columns[f"model.{name}"].square().sum((0, 1))
        assert testing.relative_error(found[name], want) < 1e-5, name


class Logits(nn.Module):
    """What a model of transformers returns beside its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits
