"""Draws docs/explain.png: what packext sees of a small model, by `px.explain`. Run `python docs/explain.py`."""

from pathlib import Path

import torch
from torch import Tensor, nn

import packext as px


class SmallNet(nn.Module):
    """A convolution, a normalisation with a way around a second convolution, and a linear layer."""

    def __init__(self) -> None:
        """Make the parts."""
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores `[N, 10]` of images `[N, 3, H, W]`."""
        features = torch.relu(self.first(images))
        features = features + torch.relu(self.second(self.norm(features)))
        return self.head(features.mean((2, 3)))


def main() -> None:
    """Draw it."""
    torch.manual_seed(0)
    figure = px.explain(SmallNet(), torch.randn(32, 3, 8, 8)).figure()
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
