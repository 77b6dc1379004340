"""Write the page of the gallery from docstrings and what scripts print: `python docs/gallery/page.py [NAME ...]`.

Runs the named scripts at full size first (all with `--all`), and writes their figures and `results.json`.
"""

from __future__ import annotations

import argparse
import ast
import json
import runpy
from pathlib import Path

from frame import written

HERE = Path(__file__).parent
PAGE, RESULTS = HERE.parent / "gallery.md", HERE / "results.json"
HEAD = """# Gallery

One script for each thing to do with packext: `python docs/gallery/NAME.py` draws the figure and prints what stands
below it, in seconds on one core (with `pip install 'packext[demo,privacy]'`). The data are scikit-learn's handwritten
digits and Python's own help texts. The tests run all of them, smaller, and hold what they claim. Times are of the
processor, medians of ratios of runs by turns.

This page is made of the scripts by `docs/gallery/page.py`.
"""

#: The order of the page: BackPACK's tutorials first, then what else individual gradients and curvature are good for.
NAMES = (
    "all_in_one", "batched_jacobians", "cg_newton", "custom_module", "diag_ggn_optimizer", "differential_privacy",
    "extension_hook", "resnet", "gradient_of_variance", "retain_graph", "rnn", "save_memory_convolutions",
    "subsampling", "trace_estimation", "influence", "pruning", "elastic_weights", "laplace", "noise_scale", "ntk",
    "importance_sampling", "mislabelled",
)  # fmt: skip


def section(name: str, results: dict[str, list[str]]) -> str:
    """A script's part of the page: the title of its docstring, the figure, the text, a link, and what it prints."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    title, _, rest = text.partition(": ")
    printed = "\n".join(f"    {line}" for line in results[name])
    figure = f"![{title}](gallery/{name}.png)"
    return f"## {title}\n\n{figure}\n\n{rest[0].upper()}{rest[1:]}\n\n[`{name}.py`](gallery/{name}.py)\n\n{printed}\n"


def page() -> str:
    """The whole page."""
    results = json.loads(RESULTS.read_text())
    return "\n".join([HEAD, *(section(name, results) for name in NAMES)])


def main() -> None:
    """Run scripts, keep what they print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="scripts to run first")
    parser.add_argument("--all", action="store_true", help="run all")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in NAMES if arguments.all else arguments.names:
        figure, numbers = runpy.run_path(str(HERE / f"{name}.py"))["show"](small=False)
        figure.savefig(HERE / f"{name}.png", dpi=100)
        results[name] = [f"{what}: {written(number)}" for what, number in numbers.items()]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
