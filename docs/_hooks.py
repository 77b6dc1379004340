"""Makes the site complete: a page for each public module, the README as its start, and a build that fails without them.

mkdocs calls the functions that begin with `on_`. What is public is read off the source, so that a new name has its
place without an edit here, and the build needs nothing but the files:

- a module is public if no part of its path has an underscore, and it is the package, one of its own modules or
  packages (but for `FLOORS`, whose names are exported above), a module that a public one exports, or one that nothing
  in the package imports, which is there for users (`attacks.flower`);
- a name is public if it has no underscore and is defined there, or imported `as` itself or into `__all__`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "packext"

#: Packages of the engine, and the command line's: no user imports them.
FLOORS = {"packext.rules", "packext.quantities", "packext.demo"}

#: Files of the repository that are pages as well.
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


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


def api_pages(placed: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Pages of the public modules.

    Args:
        placed: names that another page describes (`::: packext.NAME`), and which page.

    Returns:
        The pages by their path; and of every public name the page on which its anchor must stand.

    Raises:
        PluginError: if something public has no docstring.
    """
    pages, anchors, bare = {}, {}, []
    homes: dict[tuple[str, str], str] = {definition(*p.rpartition(".")[::2]): p for p in placed}
    for module in public_modules():
        page = f"api/{module}.md"
        text = [f"# {module}", "", modules()[module].doc, ""]
        for name in public_names(module):
            path, origin = f"{module}.{name}", definition(module, name)
            node, comment = modules()[origin[0]].defined[origin[1]]
            home = homes.setdefault(origin, path)
            if home != path or path in placed:
                text += [f"- `{name}`: see [{home}][{home}]", ""]
                anchors[home] = placed.get(home, anchors.get(home, ""))
                continue
            anchors[path] = page
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                if not ast.get_docstring(node):
                    bare.append(path)
                text += [f"::: {path}", *_options(node, origin), ""]
            else:
                text += _constant(path, node, comment)
        pages[page] = "\n".join(text)
    if bare:
        raise PluginError(f"public, and without a docstring: {', '.join(bare)}")
    return pages, anchors


def _options(node: ast.stmt, origin: tuple[str, str]) -> list[str]:
    """Methods of quantities fulfil a contract, and are not for users."""
    own = origin[0].startswith("packext.quantities") and isinstance(node, ast.ClassDef) and node.bases
    return ["    options: {members: false}"] if own else []


def _constant(path: str, node: ast.stmt, comment: str) -> list[str]:
    value = ast.unparse(node.value) if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value else ""
    shown = f" = {value}" if len(value) < 80 else ""
    name = path.rpartition(".")[2]
    return [f"## `{name}` {{#{path}}}", "", comment, "", f"    {name}{shown}", ""]


# -- what mkdocs calls -------------------------------------------------------------------------------
_anchors: dict[str, str] = {}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made, and to the navigation what it does not name."""
    for target, source in COPIED.items():
        text = (ROOT / source).read_text()
        text = text.replace("](docs/", "](").replace("(LICENSE)", "(license.md)")
        for other, file in COPIED.items():
            text = text.replace(f"]({file})", f"]({other})")
        files.append(File.generated(config, target, content=text))
    files.append(File.generated(config, "license.md", content=f"# License\n\n{(ROOT / 'LICENSE').read_text()}"))
    placed = {
        name: file.src_uri
        for file in files.documentation_pages()
        for name in re.findall(r"^::: (\S+)", file.content_string, re.MULTILINE)
    }
    pages, anchors = api_pages(placed)
    _anchors.clear()
    _anchors.update(anchors)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    named = {page for section in config.nav for part in section.values() for page in part}
    loose = [f.src_uri for f in files.documentation_pages() if f.src_uri not in named and f.src_uri not in pages]
    config.nav += [{"More": sorted(loose)}, {"API": [{path[4:-3]: path} for path in pages]}]
    return files


def on_post_build(config: Any) -> None:
    """Fail where a public name has no place, or a page asks for something from elsewhere.

    Raises:
        PluginError: naming all of them.
    """
    site = Path(config.site_dir)
    texts = {page: (site / page).with_suffix(".html").read_text() for page in set(_anchors.values())}
    lost = [name for name, page in _anchors.items() if f'id="{name}"' not in texts[page]]
    if lost:
        raise PluginError(f"public names without a place on their page: {', '.join(lost)}")
    foreign = re.compile(
        r"""<(?:script|img|iframe)[^>]*\ssrc="?(?:https?:)?//|<link[^>]*rel="?stylesheet[^>]*https?://"""
    )
    asking = [str(p.relative_to(site)) for p in site.rglob("*.html") if foreign.search(p.read_text())]
    if asking:
        raise PluginError(f"pages that ask for something from elsewhere: {', '.join(asking)}")
