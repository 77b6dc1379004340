"""Short tables of the results in benchmarks/results, for README and docs/performance.md.

    python -m benchmarks.summary

Every number is that of docs/benchmarks.md, where it is said how they were measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = ("3c3d", "allcnnc", "resnet", "transformer", "lstm")
MORE = ("3c3d-sigmoid", "gpt")
LIBRARIES = {
    "packext": "packext", "backpack": "BackPACK", "opacus": "Opacus", "func": "torch.func", "curvlinops": "curvlinops",
}  # fmt: skip
SHOWN = {
    "batch_l2": "norms",
    "l2_variance": "norms and variance",
    "kfac": "KFAC",
    "kfac_linear": "KFAC of linear layers",
}


def results(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What was measured on the CPU, by network."""
    return [json.loads((ROOT / f"benchmarks/results/{name}-cpu.json").read_text()) for name in names]


def name_of(found: dict[str, Any]) -> str:
    """The network, without its shapes."""
    return found["problem"]["title"].partition(",")[0]


def times(found: dict[str, Any], row: str) -> dict[str, float]:
    """Of each library that has one, the multiple of the plain gradient."""
    cells = found["rows"].get(row, {"cells": {}})["cells"]
    return {k: c["ratio"]["median"] for k, c in cells.items() if c["ratio"] is not None}


def compared() -> str:
    """Some quantities on all networks but one that differs from another by an activation, for all libraries."""
    lines = [f"| | {' | '.join(LIBRARIES.values())} |", "|---|" + "---:|" * len(LIBRARIES)]
    for found in results((*PROBLEMS, "gpt")):
        network = "Transformer, 256 tokens" if found["problem"]["key"] == "gpt" else name_of(found)
        for row, title in SHOWN.items():
            timed = times(found, row)
            if len(timed) > 1:
                best = min(timed.values())
                cells = []
                for key in LIBRARIES:
                    text = f"{timed[key]:.2f}" if key in timed else "–"
                    cells.append(f"**{text}**" if timed.get(key) == best else text)
                lines.append(f"| {network}: {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(found: dict[str, Any], row: str, key: str) -> str:
    """Time and peak memory of a library."""
    c = found["rows"][row]["cells"][key]
    return f"{c['ratio']['median']:.2f}" + ("" if c["memory"] is None else f" ({c['memory']:.2f})")


def gaps() -> str:
    """Every cell of all tables in which another library takes less time, the widest gap first."""
    found, cells, memory = [], 0, []
    for network in results(PROBLEMS + MORE):
        for row in network["rows"]:
            timed = times(network, row)
            ours = timed.pop("packext", None)
            if ours is None or not timed:
                continue
            cells += 1
            best = min(timed, key=lambda k: timed[k])
            if timed[best] < ours:
                theirs = f"{LIBRARIES[best]} {cell(network, row, best)}"
                ratio = ours / timed[best]
                if best == "func":
                    sides = (network["rows"][row]["cells"][k]["memory"] for k in ("func", "packext"))
                    memory.append(next(sides) / next(sides))
                title = network["problem"]["title"]
                found.append((ratio, f"{title} | `{row}` | {cell(network, row, 'packext')} | {theirs}"))
    lines = ["| network | quantities | packext | the fastest | ratio of times |", "|---|---|---:|---:|---:|"]
    lines += [f"| {text} | {ratio:.2f} |" for ratio, text in sorted(found, reverse=True)]
    more = f"torch.func's peak of memory in these is {min(memory):.1f} to {max(memory):.1f} times packext's."
    head = f"In {len(found)} of {cells} cells, time and (memory) over the plain gradient's. {more}"
    return "\n".join([head, "", *lines])


def between(text: str, key: str, table: str) -> str:
    """A page's text with a table between its marks."""
    begin, end = f"<!-- {key}: begin -->", f"<!-- {key}: end -->"
    assert text.count(begin) == text.count(end) == 1, key
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)


def fill(page: Path, texts: dict[str, str], apart: bool = False) -> None:
    """Put texts between the marks of their names, `apart` from them by empty lines."""
    content = page.read_text()
    for key, text in texts.items():
        content = between(content, key, f"\n{text}\n" if apart else text)
    page.write_text(content)


def pages() -> dict[Path, str]:
    """The pages with their tables renewed."""
    readme, performance = ROOT / "README.md", ROOT / "docs" / "performance.md"
    return {
        readme: between(readme.read_text(), "compared", compared()),
        performance: between(performance.read_text(), "gaps", gaps()),
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
