"""The import contract of the package as a function over a folder, so that tests can prove it on planted faults too.

It reads the source only (AST): every import counts, at the top of a file, inside a function and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("ground", "declare", "facts", "plan", "run", "rehearsal", "report", "serve", "advise", "doors")
"""From the bottom up: a file imports only from its own package and from those before it."""
DOORS = ("__init__", "__main__", "api", "stages", "sweep", "commands")
"""Files that import everything and that no other file imports; all other files beside the packages are ground."""
REEXPORTS = ("__init__.py", "plan/__init__.py")
"""Files whose `__getattr__` imports names on first use, which is no import of the file itself."""
HEAVY = ("torch", "transformers", "diffusers", "accelerate")
BELOW_RUN = PACKAGES[: PACKAGES.index("run")]
FILES_BESIDE, FILE_LINES, FUNCTION_LINES = 14, 330, 39


@dataclass(frozen=True)
class Import:
    """One imported module: where it stands and whether it runs when the file is imported."""

    module: str
    line: int
    at_import: bool


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        head, _, rest = self.path.partition("/")
        if rest:
            return head
        return "doors" if head.removesuffix(".py") in DOORS else "ground"


def read(folder: Path) -> dict[str, Source]:
    """The files of a package by module name (`sana_deploy.plan.cost`)."""
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        parts = inside.with_suffix("").parts
        module = ".".join((folder.name, *(parts[:-1] if parts[-1] == "__init__" else parts)))
        text = path.read_text(encoding="utf-8")
        sources[module] = Source(inside.as_posix(), module, text, ast.parse(text))
    return sources


def imports(source: Source, modules: Iterable[str]) -> list[Import]:
    """What a file imports: modules of the package by their full name, others by the name that is written."""
    known = set(modules)
    return [
        Import(module, node.lineno, at_import)
        for node, at_import in _import_nodes(source.tree, source.path in REEXPORTS)
        for module in _targets(node, source, known)
    ]


def _import_nodes(tree: ast.Module, reexports: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, at_import
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                if not reexports:
                    yield from visit(ast.Module(child.body, []), False)
                yield from visit(ast.Module(child.orelse, []), at_import)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                if not (reexports and isinstance(child, ast.FunctionDef) and child.name == "__getattr__"):
                    yield from visit(child, False)
            else:
                yield from visit(child, at_import)

    return visit(tree, True)


def _targets(node: ast.Import | ast.ImportFrom, source: Source, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
        return
    base = node.module or ""
    if node.level:
        package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
        parts = package.split(".")
        base = ".".join((*parts[: len(parts) - node.level + 1], *filter(None, [node.module])))
    for name in node.names:
        inner = f"{base}.{name.name}"
        yield inner if inner in known else base


def arrows_up(sources: dict[str, Source]) -> list[str]:
    """Imports of a package by one that stands below it."""
    found = []
    for source in sources.values():
        rank = PACKAGES.index(source.package)
        for one in imports(source, sources):
            target = sources.get(one.module)
            if target and PACKAGES.index(target.package) > rank:
                rule = f"{source.package} must not import {target.package}, which stands above it."
                found.append(f"{source.path}:{one.line} imports {target.path}: {rule}")
    return found


def circles(sources: dict[str, Source]) -> list[str]:
    """Files that import each other, directly or through others; each circle once."""
    graph = {
        module: {one.module: one.line for one in reversed(imports(source, sources)) if one.module in sources}
        for module, source in sources.items()
    }
    found: dict[frozenset[str], str] = {}
    for start in graph:
        circle = _shortest_circle(graph, start)
        if circle and frozenset(circle) not in found:
            steps = [f"{sources[a].path}:{graph[a][b]}" for a, b in zip(circle, [*circle[1:], start], strict=True)]
            packages = " and ".join(dict.fromkeys(sources[module].package for module in circle))
            found[frozenset(circle)] = (
                f"{' -> '.join([*steps, sources[start].path])}: these files of {packages} import each other."
            )
    return list(found.values())


def _shortest_circle(graph: dict[str, dict[str, int]], start: str) -> list[str]:
    paths, seen = [[start]], set[str]()
    while paths:
        path = paths.pop(0)
        for target in graph[path[-1]]:
            if target == start:
                return path
            if target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return []


def heavy_imports(sources: dict[str, Source]) -> list[str]:
    """Libraries that take seconds to import, at the top of files below `run`."""
    return [
        f"{source.path}:{one.line} imports {one.module} at module level: {source.package} stands below run, "
        "where only the function that needs it may."
        for source in sources.values()
        if source.package in BELOW_RUN
        for one in imports(source, sources)
        if one.at_import and one.module.partition(".")[0] in HEAVY
    ]


def sizes(sources: dict[str, Source]) -> list[str]:
    """Files and functions that are too long, and too many files beside the packages."""
    beside = [source.path for source in sources.values() if "/" not in source.path]
    found = [f"{len(beside)} files stand beside the packages, at most {FILES_BESIDE} may."] * (
        len(beside) > FILES_BESIDE
    )
    for source in sources.values():
        lines = len(source.text.splitlines())
        if lines > FILE_LINES:
            found.append(f"{source.path} has {lines} lines, at most {FILE_LINES} are allowed.")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    name = f"{source.path}:{node.lineno} {node.name}"
                    found.append(f"{name} has {lines} lines, at most {FUNCTION_LINES} are allowed.")
    return found


def component_names(sources: dict[str, Source], names: Iterable[str], roles: Iterable[str]) -> list[str]:
    """Lines that quote a component's name.

    A name that is a role as well counts as one, and is none, in `pipeline.of("vae")`, `pipeline.find("vae")`, in a
    comparison with `.role`, as `role=` or `apart=` of a knob, and in the tables by role of declare/policies.py.
    """
    components, spoken = frozenset(names), frozenset(roles)
    found: list[tuple[str, int, str]] = []
    for source in sources.values():
        if source.path.startswith("declare/pipelines/") or source.path == "facts/tiny.py":
            continue
        as_roles = {id(node) for node in _roles(source)}
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Constant) or node.value not in components:
                continue
            if node.value not in spoken or (id(node) not in as_roles and source.path != "declare/policies.py"):
                found.append((source.path, node.lineno, str(node.value)))
    return [f"{path}:{line} names the component {name!r}." for path, line, name in sorted(set(found))]


def _roles(source: Source) -> Iterator[ast.expr]:
    for node in ast.walk(source.tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="of" | "find"), args=arguments):
                yield from arguments
            case ast.Compare(left=ast.Attribute(attr="role"), comparators=others):
                for other in others:
                    yield from (other, *getattr(other, "elts", ()))
            case ast.keyword(arg="role" | "apart", value=value):
                yield from (value, *getattr(value, "elts", ()))
