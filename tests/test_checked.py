"""What checks types and shapes while the tests run says of each call what jaxtyping says by itself."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeException
from jaxtyping import Float, Int
from torch import Tensor

import packext as px
from tests import checked

A, B, C = torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(4)
Rows = dict[str, Float[Tensor, "N D"]]


def plain(x: int, *more: float, flag: bool = False, **others: str) -> float:
    return 0.5 if x else "zero"  # type: ignore[return-value]


def product(x: Float[Tensor, "N D"], y: Float[Tensor, "D K"] | None = None) -> Float[Tensor, "N N"]:
    return x @ (x.T if y is None else y)


def in_a_container(rows: Rows, names: list[str]) -> dict[str, list[Int[Tensor, " N"]]]:
    return {name: [torch.zeros(len(rows[name]), dtype=torch.int64)] for name in names}


def from_its_arguments(n: int, x: Tensor) -> Float[Tensor, "{n+1} 3"]:
    return x


def unknown(x: NotThere, y: int) -> AlsoNot:  # type: ignore[name-defined]  # noqa: F821
    return x


def generator(x: Float[Tensor, "N D"]) -> Iterator[int]:
    yield len(x)


def without(x, y=1):  # type: ignore[no-untyped-def]
    return x


def inner(constant: float) -> Callable[..., Any]:
    def scaled(x: Float[Tensor, "N D"], y: Float[Tensor, " N"], by: int = 1) -> Float[Tensor, "N D"]:
        return (x + y[:, None])[: by + constant] if constant < 2 else constant

    return scaled


def pair() -> type:
    @dataclass
    class Pair:
        first: Float[Tensor, "N D"]
        second: int = 0

    return Pair


KINDS = [plain, product, in_a_container, from_its_arguments, unknown, generator]


@pytest.mark.parametrize("fn", KINDS)
def test_verdicts_of_jaxtyping(fn: Any) -> None:
    ours = checked.jaxtyped(fn, typechecker=beartype)
    assert ours.__name__ == fn.__name__ and ours.__annotations__ == fn.__annotations__
    assert {"", "refused"} <= compare(ours, checked.ORIGINAL(fn, typechecker=beartype))


def test_dataclasses() -> None:
    theirs = checked.ORIGINAL(pair(), typechecker=beartype)
    assert {"", "refused"} <= compare(checked.jaxtyped(pair(), typechecker=beartype), theirs)


def test_dataclasses_of_equal_names() -> None:
    for kind in (int, str):
        made = checked.jaxtyped(make_dataclass("Same", [("field", kind)]), typechecker=beartype)
        assert [verdict(made, value) for value in (kind(), None)] == ["", "refused"]


def test_without_annotations() -> None:
    assert checked.jaxtyped(without, typechecker=beartype) is without


def compare(ours: Any, theirs: Any) -> set[str]:
    """Of all calls with these values that fit the signature: both refuse, or neither."""
    values = [1, "x", A, B, {"a": A}, {"a": C}, ["a"]]
    verdicts = set()
    for first in values:
        for rest in [(), *((second,) for second in values), (C[:2],), (C[:2], "x")]:
            try:
                inspect.signature(theirs).bind(first, *rest)
            except TypeError:
                continue
            found = [verdict(call, first, *rest) for call in (theirs, ours)]
            assert found[0] == found[1], (first, rest, found)
            verdicts.add(found[0])
    return verdicts


def verdict(call: Any, *given: Any) -> str:
    try:
        call(*given)
    except (BeartypeException, jaxtyping.TypeCheckError):
        return "refused"
    except Exception as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("constant", [0, 1, 2])
def test_inner_functions(constant: float) -> None:
    """Each definition has variables of its own, whatever was compiled for the first."""
    ours = [checked.jaxtyped(inner(k), typechecker=beartype) for k in (constant, 1, constant)][-1]
    verdicts = compare(ours, checked.ORIGINAL(inner(constant), typechecker=beartype))
    assert "refused" in verdicts and ("" in verdicts) == (constant == 1)


def test_what_an_inner_function_holds_goes_with_it() -> None:
    def holding(held: Tensor) -> Any:
        def first(x: int) -> Tensor:  # of its code, this is the first definition
            return held + x

        return checked.jaxtyped(first, typechecker=beartype)

    held = torch.zeros(1)
    gone = weakref.ref(held)
    ours = holding(held)
    assert ours(1) == 1
    del ours, held
    gc.collect()
    assert gone() is None


def test_the_package_is_checked() -> None:
    with pytest.raises(BeartypeException, match="parameter dim="):
        px.ProjectedGrad(("one", "two"))  # type: ignore[arg-type]
