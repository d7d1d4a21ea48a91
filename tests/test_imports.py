"""Imports go down only; who may know whom is written here once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dse"
# From the bottom up. A package may import what stands on a lower row, and itself.
ROWS = (
    ("errors", "units", "numerics", "files", "batches"),
    ("program_store",),
    ("programs",),
    ("cost.types",),
    ("cost",),
    ("published",),
    ("catalog",),
    ("space",),
    ("search", "calibrate", "audit"),
    ("report",),
    ("cli",),
)
ROW = {name: i for i, row in enumerate(ROWS) for name in row}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def unit_of(module: str) -> str:
    """The row's entry that a module belongs to: `cost.types`, or its top-level name."""
    return module if module in ROW else module.split(".")[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Modules of this package that a file imports, wherever in the file: `` is the package's own face."""
    here = module_of(path)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dse":
                    yield node.lineno, alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *(node.module or "").split(".")]).strip(".")
            elif (node.module or "").split(".")[0] == "dse":
                base = node.module.partition(".")[2]
            else:
                continue
            for alias in node.names:
                below = f"{base}.{alias.name}".strip(".")
                yield node.lineno, below if below in MODULES else base


def edges() -> list[tuple[str, str, str]]:
    found = []
    for path in FILES:
        place = path.relative_to(ROOT.parent)
        found += [(f"{place}:{line}", module_of(path), target) for line, target in imported(path)]
    return found


EDGES = edges()
INSIDE = [edge for edge in EDGES if edge[1]]  # all but the face itself


def test_every_module_has_a_row() -> None:
    unknown = sorted({unit_of(m) for m in MODULES if m} - set(ROW) - {"_version", "__main__"})
    assert not unknown, f"give them a row in {Path(__file__).name}: {unknown}"


def test_imports_go_down_only() -> None:
    wrong = [
        f"{place}: {unit_of(source)} imports {target}"
        for place, source, target in INSIDE
        if target
        and unit_of(source) in ROW
        and unit_of(target) != unit_of(source)
        and not {unit_of(source), unit_of(target)} <= set(ROWS[0])
        and ROW[unit_of(target)] >= ROW[unit_of(source)]
    ]
    assert not wrong, "\n".join(wrong)


def test_search_and_calibrate_do_not_know_each_other() -> None:
    pair = {"search", "calibrate"}
    assert not [e for e in INSIDE if unit_of(e[1]) != unit_of(e[2]) and {unit_of(e[1]), unit_of(e[2])} == pair]


def test_report_never_calls_the_model() -> None:
    assert not [e for e in INSIDE if unit_of(e[1]) == "report" and e[2].startswith("cost.evaluate")]


def test_nobody_inside_imports_the_face() -> None:
    assert not [place for place, source, target in INSIDE if target == ""]


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    monkeypatch.setattr(f"{__name__}.MODULES", {"cost", "cost.types", "cost.step"})
    (tmp_path / "cost").mkdir()
    file = tmp_path / "cost" / "step.py"
    file.write_text(
        "import dse\nimport dse.cost.types as t\nfrom dse import cost\nfrom dse.cost import types\n"
        "from . import types\nfrom .types import Plan\nfrom ..errors import DseError\nimport numpy\n"
        "def f():\n    from dse.cost.types import Load\n"
    )
    seen = [target for _, target in imported(file)]
    assert seen == ["", "cost.types", "cost", "cost.types", "cost.types", "cost.types", "errors", "cost.types"]
