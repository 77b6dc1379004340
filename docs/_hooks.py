"""Makes the site complete: a page for each public module, the README as its start, and a build that fails without them.

mkdocs calls the functions that begin with `on_`. What is public is read off the source (`_public.py`), so that a new
name has its place without an edit here, and the build needs nothing but the files.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from _public import ROOT, definition, modules, public_modules, public_names  # noqa: E402

#: Files of the repository that are pages as well.
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


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
    config.nav += [{"More": sorted(loose)}] if loose else []
    config.nav += [{"API": [{path[4:-3]: path} for path in pages]}]
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
