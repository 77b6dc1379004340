"""What a context hands out: results by parameter, by name, and of the whole model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from packext._quantity import Quantity


class ParameterResults:
    """Results for one parameter, as attributes named by the quantities' savefields."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        """Take the parameter's name and its results by savefield."""
        self.__dict__.update(values)
        self._name = name

    def __getattr__(self, field: str) -> Any:
        if field.startswith("_"):  # asked for by copy and pickle before there is anything
            raise AttributeError(field)
        have = ", ".join(k for k in self.__dict__ if not k.startswith("_")) or "nothing"
        raise AttributeError(f"no {field!r} for parameter {self._name}: the context asked for {have}.")

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{k}={list(v.shape)}" if isinstance(v, Tensor) else k for k, v in vars(self).items() if k != "_name"
        )
        return f"ParameterResults({self._name}: {fields})"


class Results:
    """What the last backward pass inside a context gave.

    `results["conv1.weight"].variance` is the result for a parameter, by any of its names or by the parameter itself;
    `results.batch_l2` the one for the whole model, where the quantity has one. Parameters are in the order of
    `model.parameters()`, those without results left out.
    """

    def __init__(self, quantities: tuple[Quantity, ...]) -> None:
        """Start empty."""
        self._quantities = quantities
        self._by_parameter: dict[int, tuple[str, dict[str, Any]]] = {}
        self._names: dict[str, int] = {}
        self._ambiguous: set[str] = set()
        self._keep: list[Tensor] = []  # so that no other tensor takes the id of a parameter
        self._places: dict[int, Tensor] = {}  # all parameters that a pass may reach, for placed quantities

    def _key(self, name: object) -> int | None:
        return id(name) if isinstance(name, Tensor) else self._names.get(name)  # type: ignore[arg-type]

    def _entry(self, name: str | Tensor) -> tuple[str, dict[str, Any]]:
        key = self._key(name)
        if isinstance(name, Tensor):
            name = f"a parameter of shape {list(name.shape)}"
        elif name in self._ambiguous:
            raise KeyError(
                f"{name!r} is a parameter of several models that were extended one by one: extend an nn.ModuleDict "
                "of them, whose names differ, or ask by the parameter itself"
            )
        if key is None or key not in self._by_parameter:
            if not self._by_parameter:
                raise KeyError(f"{name!r}: no backward pass through an extended model has ended in this context yet")
            near = difflib.get_close_matches(str(name), list(dict.fromkeys([*self, *self._names])), 3)
            reached = ", ".join(self)
            if near:
                reached = f"{len(self)} parameters, among them {', '.join(near)}" if len(self) > 1 else near[0]
            raise KeyError(f"{name!r}: the last backward pass reached {reached}")
        return self._by_parameter[key]

    def __getitem__(self, name: str | Tensor) -> ParameterResults:
        return ParameterResults(*self._entry(name))

    def __contains__(self, name: object) -> bool:
        return self._key(name) in self._by_parameter

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._by_parameter.values())

    def __len__(self) -> int:
        return len(self._by_parameter)

    def __repr__(self) -> str:
        asked = ", ".join(q.savefield for q in self._quantities) or "nothing asked for"
        count = len(self)
        what = f"{count} parameter{'s' if count > 1 else ''}" if count else "no pass yet"
        return f"Results of {what}: {asked}"

    def keys(self) -> list[str]:
        """Names of the parameters that have results."""
        return list(self)

    def values(self) -> list[ParameterResults]:
        """Results of these parameters."""
        return [found for _, found in self.items()]

    def items(self) -> Iterator[tuple[str, ParameterResults]]:
        """Names and results; parameters of models that were extended one by one may share a name."""
        return ((name, ParameterResults(name, values)) for name, values in self._by_parameter.values())

    def __getattr__(self, field: str) -> Any:
        if field.startswith("_"):
            raise AttributeError(field)
        for quantity in self._quantities:
            if quantity.savefield == field:
                if not self._by_parameter:
                    raise AttributeError(
                        f"no {field!r} yet: no backward pass through an extended model has ended in this context"
                    )
                found: dict[str, Any] = {}
                for name, values in self._by_parameter.values():
                    if field in values:  # parameters of models that were extended one by one may share a name
                        found[name if name not in found else f"{name} ({len(found)})"] = values[field]
                if not found:
                    raise AttributeError(f"no {field!r}: it was deleted, or no parameter that the pass reached has it")
                return quantity.whole(self._placed(quantity, found) if self._places and quantity.placed else found)
        raise AttributeError(
            f"no {field!r}: the context asked for {', '.join(q.savefield for q in self._quantities) or 'nothing'}"
        )

    def _placed(self, quantity: Quantity, found: dict[str, Any]) -> dict[str, Any]:
        """What was found, in the places of the model's parameters; a result that was deleted leaves none."""
        n = len(next(iter(found.values())))
        have = {
            key: values[quantity.savefield]
            for key, (_, values) in self._by_parameter.items()
            if quantity.savefield in values
        }
        return {
            str(key): have[key] if key in have else quantity.nothing(p, n)
            for key, p in self._places.items()
            if key in have or key not in self._by_parameter
        }
