"""Writes tests/public_api.txt, the names and signatures that users rely on: `python -m tests.public_api`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from _public import definition, modules, public_modules, public_names  # noqa: E402


def lines() -> Iterator[str]:
    """One for each public name, method and field; those that are another public name say so."""
    seen: dict[tuple[str, str], str] = {}
    for module in public_modules():
        for name in sorted(public_names(module)):
            path, origin = f"{module}.{name}", definition(module, name)
            known = seen.setdefault(origin, path)
            if known != path:
                yield f"{path} is {known}"
                continue
            node, _ = modules()[origin[0]].defined[origin[1]]
            if isinstance(node, ast.FunctionDef):
                yield f"{path}{signature(node)}"
            elif isinstance(node, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, node.bases))
                yield f"class {path}({bases})"
                quantity = origin[0].startswith("packext.quantities") and node.bases  # its methods are no user's
                yield from (f"{path}{m}" for m in members(node) if not quantity or m.startswith(".__init__"))
            else:
                yield path


def written(node: ast.AST) -> str:
    """Source of a part, the same in all versions of Python."""
    return ast.unparse(node).replace("lambda :", "lambda:")


def signature(node: ast.FunctionDef) -> str:
    """What it takes and returns."""
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"({written(node.args)}){returns}"


def members(node: ast.ClassDef) -> Iterator[str]:
    """Public methods, properties and fields of a class, and how it is made."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and (part.name == "__init__" or not part.name.startswith("_")):
            is_property = any("property" in ast.unparse(d) for d in part.decorator_list)
            returns = "" if part.returns is None else f": {ast.unparse(part.returns)}"
            yield f".{part.name}{returns if is_property else signature(part)}"
        elif isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
            value = "" if part.value is None else f" = {ast.unparse(part.value)}"
            yield f".{ast.unparse(part.target)}: {ast.unparse(part.annotation)}{value}"


def text() -> str:
    """The whole file."""
    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
