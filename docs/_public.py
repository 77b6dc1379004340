"""What of the package is public, read off its source: for the site's pages of names, and the test that pins them.

- A module is public if no part of its path has an underscore, and it is the package, one of its own modules or
  packages (but for `FLOORS`, whose names are exported above), a module that a public one exports, or one that nothing
  in the package imports, which is there for users (`attacks.flower`).
- A name is public if it has no underscore and is defined there, or imported `as` itself or into `__all__`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "packext"

#: Packages of the engine, and the command line's: no user imports them.
FLOORS = {"packext.rules", "packext.quantities", "packext.demo"}


@dataclass
class Module:
    """What the source of one module says.

    Attributes:
        name: with dots.
        doc: its docstring.
        imported: names that it imports from the package, and where from: (module, name).
        exported: those of them that it exports.
        defined: names that are defined in it: the node, and the comment `#:` before it.
        packages: modules of the package that it imports whole or in part.
    """

    name: str
    doc: str
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    defined: dict[str, tuple[ast.stmt, str]] = field(default_factory=dict)
    packages: set[str] = field(default_factory=set)


@cache
def modules() -> dict[str, Module]:
    """All modules of the package by name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("packext", *file.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = _read(name, file.read_text())
    return found


def _read(name: str, source: str) -> Module:
    tree, lines = ast.parse(source), source.splitlines()
    module = Module(name, ast.get_docstring(tree) or "")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "packext":
            module.packages |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            module.packages |= {a.name for a in node.names}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "packext":
            for a in node.names:
                module.imported[a.asname or a.name] = (str(node.module), a.name)
                module.exported |= {a.name} if a.asname == a.name else set()
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            module.defined[node.name] = (node, "")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and target.id == "__all__" and node.value is not None:
                    module.exported |= set(ast.literal_eval(node.value))
                elif isinstance(target, ast.Name):
                    module.defined[target.id] = (node, _comment(lines, node.lineno - 1))
    return module


def _comment(lines: list[str], line: int) -> str:
    """The comment `#:` that ends before a line, as one paragraph."""
    first = line
    while first and lines[first - 1].startswith("#:"):
        first -= 1
    return " ".join(text.removeprefix("#:").strip() for text in lines[first:line])


def public_modules() -> list[str]:
    """Modules that users import, the package itself first."""
    all_modules = modules()
    used = {name for m in all_modules.values() for name in m.packages if name != m.name}
    found = []
    for name in all_modules:
        parts = name.split(".")
        if any(part.startswith("_") for part in parts) or any(f"{name}.".startswith(f"{f}.") for f in FLOORS):
            continue
        parent = all_modules.get(".".join(parts[:-1]))
        shown = parent is not None and f"{parent.name}.{parts[-1]}" in {
            ".".join(parent.imported[n]) for n in parent.exported if n in parent.imported
        }
        if len(parts) <= 2 or shown or name not in used:
            found.append(name)
    return sorted(found, key=lambda name: (name.count(".") > 1, name))


def public_names(module: str) -> list[str]:
    """Names that a module offers, in the order of its imports and definitions."""
    m = modules()[module]
    names = [n for n in m.imported if n in m.exported] + list(m.defined)
    return [n for n in names if not n.startswith("_") and ".".join(m.imported.get(n, ("", n))) not in modules()]


def definition(module: str, name: str) -> tuple[str, str]:
    """Module and name under which something is defined, by following the imports."""
    m = modules()[module]
    if name in m.defined or name not in m.imported:
        return module, name
    origin, original = m.imported[name]
    return definition(origin, original) if origin in modules() else (origin, original)
