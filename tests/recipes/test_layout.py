"""The harness stands on the package and not the other way round, and its modules on each other in one direction."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from recipe_scripts import RECIPES

HARNESS = RECIPES / "harness"
PACKAGE = RECIPES.parent / "hf_sara"


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            found |= {parent} if node.module else {f"{parent}{alias.name}" for alias in node.names}
    return found


def test_the_package_imports_nothing_of_the_recipes():
    for path in PACKAGE.rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"harness", "recipes"}, path


def test_the_imports_of_the_harness_have_no_circle():
    graph = {
        path.stem: {name[1:] for name in imports(path) if name.startswith(".")} for path in HARNESS.glob("[!_]*.py")
    }
    # This raises an error that names the circle.
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(graph)


@pytest.mark.slow
def test_help_imports_no_library_of_the_data_or_the_scores():
    slow = ("datasets", "evaluate", "sacrebleu", "matplotlib", "pyarrow", "hf_sara.trainer", "harness.run")
    names = ("run_e2e", "run_math", "run_commonsense", "run_paper", "run_sft", "run_classification", "run_many")
    # One process for all of them, since each would import transformers anew.
    code = (
        f"import runpy, sys\nsys.path.insert(0, {str(RECIPES)!r})\n"
        f"for name in {names}:\n"
        "    sys.argv = [name, '--help']\n"
        "    try:\n"
        f"        runpy.run_path({str(RECIPES)!r} + f'/{{name}}.py', run_name='__main__')\n"
        "    except SystemExit as stopped:\n"
        "        assert not stopped.code\n"
        f"sys.exit(','.join(name for name in {slow} if name in sys.modules) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # On some CPUs, bitsandbytes says when it is imported that it misses a package of its own.
    said = [line for line in run.stderr.splitlines() if "kernels" not in line]
    assert (run.returncode, said) == (0, [])
    assert run.stdout.count("--output_dir") >= len(names)
