"""Models of PyTorch Geometric as they are written there, next to a loop over graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from tests.helpers import assert_exact_sum, rows_of
from tests.test_graphs import diagonals

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of functions of torch that it takes
    pytest.importorskip("torch_geometric")
    import torch_geometric.nn as gnn
    from torch_geometric.data import Batch, Data

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LOSS = nn.CrossEntropyLoss(reduction="sum")


def graphs(sizes: list[int]) -> list[Data]:
    found = []
    for n in sizes:
        one_way = torch.randint(n, (2, 3 * n))
        edges = torch.cat([one_way, one_way.flip(0)], 1)
        found.append(
            Data(
                x=torch.randn(n, 5), pos=torch.randn(n, 3), z=torch.randint(1, 9, (n,)), y=torch.randint(3, (1,)),
                edge_index=edges, edge_attr=torch.randn(edges.shape[1], 3), kind=torch.randint(2, (edges.shape[1],)),
            )
        )  # fmt: skip
    return found


def mlp(width: int, out: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.Tanh(), nn.Linear(out, out))


class Net(nn.Module):
    """Two convolutions of a kind, a pool, a head; called with the whole batch, as tutorials do."""

    def __init__(
        self, conv: Callable[[int], nn.Module], edges: str = "", pool: Any = None, norm: Any = None, width: int = 8
    ) -> None:
        super().__init__()
        self.first, self.second, self.edges, self.norm = conv(5), conv(8), edges, norm
        self.pool, self.head = pool or gnn.MeanAggregation(), nn.Linear(width, 3)

    def forward(self, data: Data) -> Tensor:
        more = {name: data[name] for name in self.edges.split()}
        more = {"edge_type" if name == "kind" else name: value for name, value in more.items()}
        x = self.first(data.x, data.edge_index, **more).tanh()
        if self.norm is not None:
            x = self.norm(x, data.batch)
        x = self.second(x, data.edge_index, **more).tanh()
        return self.head(self.pool(x, data.batch))


class Halved(nn.Module):
    """Keeps half of each graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = gnn.GCNConv(5, 8), gnn.TopKPooling(8, 0.5), nn.Linear(8, 3)

    def forward(self, data: Data) -> Tensor:
        x, _, _, graph, _, _ = self.pool(self.conv(data.x, data.edge_index).tanh(), data.edge_index, None, data.batch)
        return self.head(gnn.global_add_pool(x, graph))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: Net(lambda i: gnn.GCNConv(i, 8)),
    "GraphSAGE": lambda: Net(lambda i: gnn.SAGEConv(i, 8, aggr="max")),
    "GIN": lambda: Net(lambda i: gnn.GINConv(mlp(i), train_eps=True)),
    "GAT": lambda: Net(lambda i: gnn.GATv2Conv(i, 4, heads=2, edge_dim=3), "edge_attr"),
    "transformer": lambda: Net(lambda i: gnn.TransformerConv(i, 4, heads=2, edge_dim=3, beta=True), "edge_attr"),
    "a network for each edge": lambda: Net(lambda i: gnn.NNConv(i, 8, mlp(3, 8 * i)), "edge_attr"),
    "spectral": lambda: Net(lambda i: gnn.ChebConv(i, 8, K=3)),
    "gated": lambda: Net(lambda i: gnn.GatedGraphConv(8, 2)),
    "principal": lambda: Net(
        lambda i: gnn.PNAConv(i, 8, ["mean", "min", "std"], ["identity", "amplification"], deg=torch.arange(9))
    ),
    "relations": lambda: Net(lambda i: gnn.RGCNConv(i, 8, 2, num_bases=2), "kind"),
    "norm of graphs": lambda: Net(lambda i: gnn.GCNConv(i, 8), norm=gnn.GraphNorm(8)),
    "attention over nodes": lambda: Net(
        lambda i: gnn.GCNConv(i, 8), pool=gnn.AttentionalAggregation(nn.Linear(8, 1), nn.Linear(8, 8))
    ),
    "set to set": lambda: Net(lambda i: gnn.GCNConv(i, 8), pool=gnn.Set2Set(8, 2), width=16),
    "half of the nodes": Halved,
}


def one_by_one(several: list[Data]) -> list[tuple[Batch]]:
    return [(Batch.from_data_list([one]),) for one in several]


def exact(model: nn.Module, total: Callable[[nn.Module, Any], Tensor], *sizes: list[int]) -> None:
    px.extend(model, batch_axis=None)
    for some in sizes:
        several = graphs(some)
        rows = rows_of(model, lambda several=several: torch.stack([total(model, *one) for one in one_by_one(several)]))
        assert_exact_sum(model, lambda several=several: total(model, Batch.from_data_list(several)), rows)


@pytest.mark.parametrize("name", MODELS)
def test_individual_gradients_of_graphs(name: str) -> None:
    exact(MODELS[name](), lambda model, data: LOSS(model(data), data.y), [4, 7, 3, 5], [6, 2], [5])


class Molecules(nn.Module):
    """SchNet with edges between all atoms of a molecule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = gnn.SchNet(8, 8, 2, 10, interaction_graph=self.edges)

    @staticmethod
    def edges(places: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
        source, target = ((graph[:, None] == graph) & ~torch.eye(len(graph), dtype=torch.bool)).nonzero().T
        return torch.stack([source, target]), (places[source] - places[target]).norm(dim=1)

    def forward(self, data: Data, places: Tensor) -> Tensor:
        return self.net(data.z, places, data.batch)


def energies_and_forces(model: nn.Module, data: Data) -> Tensor:
    places = data.pos.clone().requires_grad_()
    energies = model(data, places)
    (forces,) = torch.autograd.grad(energies.sum(), places, create_graph=True)
    return energies.square().sum() + (forces - 1).square().sum()


def test_energies_and_forces_of_molecules() -> None:
    exact(Molecules(), energies_and_forces, [4, 6, 3], [5, 2])


def test_curvature_of_graphs() -> None:
    """Diagonals of the GGN next to those of one graph at a time."""
    model, several = px.extend(Net(lambda i: gnn.GATConv(i, 4, heads=2)), batch_axis=None), graphs([4, 7, 3])
    batch = Batch.from_data_list(several)
    with px.backpack(px.DiagGGNExact(), px.KFAC()):
        px.extend(nn.CrossEntropyLoss())(model(batch), batch.y).backward()
    for p, wanted in zip(model.parameters(), diagonals(model, one_by_one(several), batch.y), strict=True):
        torch.testing.assert_close(p.diag_ggn_exact, wanted)
        assert p.kfac[0].isfinite().all()


def test_statistics_over_the_nodes_of_all_graphs_are_refused() -> None:
    model, batch = Net(lambda i: gnn.GCNConv(i, 8), norm=gnn.LayerNorm(8)), Batch.from_data_list(graphs([4, 3]))
    model.norm.forward = lambda x, graph: gnn.LayerNorm.forward(model.norm, x)  # type: ignore[method-assign]
    px.extend(model, batch_axis=None)
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        LOSS(model(batch), batch.y).backward()


def test_what_is_said_of_graphs_without_batch_axis_none() -> None:
    model, batch = px.extend(Net(lambda i: gnn.GCNConv(i, 8))), Batch.from_data_list(graphs([4, 3]))
    with pytest.raises(px.CoupledSamplesError, match="batch_axis=None"), px.backpack(px.BatchGrad()):
        LOSS(model(batch), batch.y).backward()
