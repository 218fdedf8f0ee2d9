"""Imports point one way, and the light parts stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("vllm", "triton", "transformers")

# A module may import from its own rank and below.
RANKS = {
    "vllm_buddy_kernels": 0,
    "vllm_buddy": 0,
    "vllm_buddy.errors": 0,
    "vllm_buddy.installed": 0,
    "vllm_buddy.method": 1,
    "vllm_buddy.data_file": 1,
    "vllm_buddy.hub": 1,
    "vllm_buddy.artifact": 2,
    "vllm_buddy.models": 3,
    "vllm_buddy.importance": 4,
    "vllm_buddy.training": 4,
    "vllm_buddy.evaluation": 4,
    "vllm_buddy.baselines": 4,
    "vllm_buddy.serving": 5,
    "vllm_buddy.serving.compat": 5.0,
    "vllm_buddy.serving.start.attached": 5.0,
    "vllm_buddy.serving.start.refusal_note": 5.0,
    "vllm_buddy.serving.admission.option_names": 5.0,
    "vllm_buddy.serving.start.setting_sections": 5.1,
    "vllm_buddy.serving.start.settings": 5.1,
    "vllm_buddy.serving.start.agreement": 5.15,
    "vllm_buddy.serving.admission.options": 5.2,
    "vllm_buddy.serving.admission": 5.3,
    "vllm_buddy.serving.telemetry.families": 5.35,
    "vllm_buddy.serving.schedule": 5.4,
    "vllm_buddy.serving.telemetry": 5.45,
    "vllm_buddy.serving.worker.batch": 5.5,
    "vllm_buddy.serving.kv": 5.6,
    "vllm_buddy.serving.forward": 5.7,
    "vllm_buddy.serving.graphs": 5.8,
    "vllm_buddy.serving.worker": 5.9,
    "vllm_buddy.serving.start": 6.0,
    "vllm_buddy.serving.patches": 6.1,
    "vllm_buddy.serving.plugin": 6.2,
    "vllm_buddy.evaluation.vllm_engine": 7,  # asks a routed engine, as a user does
    "vllm_buddy.ray": 8,
    "vllm_buddy.cli": 8,
    "vllm_buddy.__main__": 9,
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for source_root, package in ((ROOT, "vllm_buddy"), (ROOT / "kernels", "vllm_buddy_kernels")):
        for path in sorted((source_root / package).rglob("*.py")):
            parts = path.relative_to(source_root).with_suffix("").parts
            found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported with the file) for each import; those for type checking alone are left out."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from ((f"{node.module}.{alias.name}", at_once) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once and not inside)

    return walk(ast.parse(path.read_text()), True)


def rank(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in RANKS and (length > 1 or len(parts) == 1 or prefix != "vllm_buddy"):
            return RANKS[prefix]
    # A name of the package itself, such as vllm_buddy.__version__.
    assert len(parts) == 2, f"{module} has no rank in this test"
    assert not (ROOT / "vllm_buddy" / parts[1]).is_dir(), f"{module} has no rank in this test"
    return 0


def test_imports_point_one_way() -> None:
    """A method that imports the server cannot be trained or tested without it."""
    wrong = [
        f"{module} imports {imported}"
        for module, path in modules()
        for imported, _ in imports(path)
        if imported.split(".")[0] in ("vllm_buddy", "vllm_buddy_kernels") and rank(imported) > rank(module)
    ]
    assert wrong == []


def test_only_serving_and_the_command_line_import_vllm() -> None:
    """A change of vLLM must not reach the method, the artifact or training; nor must `--help` load vLLM."""
    wrong = []
    for module, path in modules():
        for imported, at_once in imports(path):
            lazily_in_cli = module.startswith("vllm_buddy.cli") and not at_once
            allowed = module.startswith(("vllm_buddy.serving", "vllm_buddy.evaluation.vllm_engine")) or lazily_in_cli
            if imported.split(".")[0] == "vllm" and not allowed:
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize("module", ["vllm_buddy", "vllm_buddy.method", "vllm_buddy.artifact", "vllm_buddy.cli"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    """vLLM loads the plugin in every process, and `vllm-buddy --help` should not take seconds."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_help_loads_no_torch() -> None:
    """A torch import makes every mistyped command wait."""
    code = (
        "import sys\nfrom vllm_buddy.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
