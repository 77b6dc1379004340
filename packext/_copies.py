"""Copies of a model, which are to run in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from packext._errors import PackextError


class Apart(TorchFunctionMode):
    """While the copy of a model runs: a call that gets a parameter of the model itself is an error.

    A function is not copied, so that one which a module keeps and which knows the module itself (a lambda with
    `self` in it, say) would bring the model's own parameters into the copy's forward pass.
    """

    def __init__(self, model: nn.Module, who: str) -> None:
        """Keep to the copy of `model`; `who` made it, for the message."""
        super().__init__()
        self.own = {id(p): (name, p) for name, p in model.named_parameters()}
        self.model, self.who = model, who

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`.

        Returns:
            What it returns.

        Raises:
            PackextError: if it gets a parameter of the model.
        """
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self.own:  # the compiler of torch 2.9 knows no id of a number
                name, p = self.own[id(leaf)]
                raise PackextError(
                    f"{self.who}: forward of a copy of {type(self.model).__name__} uses {name} {list(p.shape)} of the "
                    "model that it was copied from. A function that a module keeps, and that has the module itself in "
                    "it (a lambda with self, a closure, a global), is not copied along: make it a method of the module."
                )
        return func(*args, **(kwargs or {}))
