"""The import law of the house, read from every file's syntax tree, and from a process without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"openset", "training", "handlers", "serving", "api"}
TORCH_FREE = (
    "labels",
    "image_headers",
    "model_card",
    "buckets",
    "decision",
    "metrics",
    "calibration",
)
FORBIDDEN = {
    "openset": (OURS - {"openset"}) | {"ts", "argparse", "captum"},
    "training": {"handlers", "serving", "api", "ts"},
    "handlers": {"training", "serving", "api", "ts", "captum"},
    "serving": {"training", "api", "handlers", "torch", "torchvision"},
    "api": {"torch", "torchvision", "training", "handlers", "serving"},
}
# Layers inside openset, lowest first; a module imports from lower layers or its own.
LAYERS = [
    {
        "labels",
        "geometry",
        "image_headers",
        "model_card",
        "packing",
        "cores",
        "buckets",
        "pixel_budget",
    },
    {"preprocessing", "heads", "scores", "decision", "compilation"},
    {"networks", "metrics", "calibration", "fitted_scores"},
    {"classifier", "answers"},
    {"artifact"},
]


def imported_modules(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports do not work in the TorchServe worker"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(OURS))
def test_package_imports_nothing_that_the_law_forbids(package: str) -> None:
    assert sources(package), f"no source file in {package}"
    for file in sources(package):
        roots = {name.partition(".")[0] for name in imported_modules(file)}
        assert not roots & FORBIDDEN[package], (
            f"{file.relative_to(ROOT)} imports {sorted(roots & FORBIDDEN[package])}"
        )


@pytest.mark.parametrize("package", ["serving", "api"])
def test_torch_free_rooms_import_only_torch_free_modules_of_openset(package: str) -> None:
    allowed = {"openset"} | {f"openset.{name}" for name in TORCH_FREE}
    for file in sources(package):
        used = {
            ".".join(name.split(".")[:2])
            for name in imported_modules(file)
            if name.split(".")[0] == "openset"
        }
        assert used <= allowed, f"{file.relative_to(ROOT)} imports {sorted(used - allowed)}"


def test_no_arrow_turns_back_inside_openset() -> None:
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for file in sources("openset"):
        if file.stem == "__init__":
            continue
        for name in imported_modules(file):
            parts = name.split(".")
            if parts[0] == "openset" and len(parts) > 1 and parts[1] in rank:
                assert rank[parts[1]] <= rank[file.stem], (
                    f"{file.stem} imports the higher layer {parts[1]}"
                )


def test_every_module_of_openset_has_a_layer() -> None:
    named = set().union(*LAYERS)
    assert {file.stem for file in sources("openset")} - {"__init__"} == named


def test_there_is_no_drawer_module() -> None:
    drawers = {"utils", "common", "helpers", "core", "misc"}
    found = [
        file
        for package in OURS
        for file in sources(package)
        if drawers & set(file.with_suffix("").parts)
    ]
    assert not found


@pytest.mark.parametrize(
    "module", [*(f"openset.{name}" for name in TORCH_FREE), "api.app", "serving.stack"]
)
def test_torch_free_module_imports_with_torch_blocked(module: str) -> None:
    program = f"""
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTorch())
import {module}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
