"""The rooms of the library: which may import which, read from the source."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vtp_diffusion"
# A room may import those above it; rooms on one line do not know of each other.
FLOORS = (
    {"runtime"},
    {"data"},
    {"models"},
    {"metrics", "training"},
    {"generation", "pretraining"},
    {"evaluation"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported_names() -> dict[str, list[tuple[str, str]]]:
    """Module -> what it imports of the package, wherever in the file: (module as a dotted name, name in it)."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found = {}
    for name, path in modules.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        package = [] if name == "__init__" else package
        found[name] = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
            found[name] += [(".".join(base), alias.name) for alias in node.names]
    return found


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, as dotted names without the package."""
    found = imported_names()

    def module_of(base: str, name: str) -> str:
        full = f"{base}.{name}" if base else name
        return full if full in found else base or "__init__"

    return {module: {module_of(*pair) for pair in pairs} for module, pairs in found.items()}


def test_every_file_lies_in_a_room_and_no_import_leads_upwards():
    upwards = []
    for module, targets in imports().items():
        if module == "__init__":
            continue
        room = module.partition(".")[0]
        assert room in FLOOR, f"{module} lies in no room"
        for target in targets:
            other = target.partition(".")[0]
            if other != room and FLOOR.get(other, len(FLOORS)) >= FLOOR[room]:
                upwards.append(f"{module} imports {target}")
    assert upwards == []


def test_no_module_imports_itself_through_others():
    graph, done = imports(), set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_names_are_imported_from_the_module_that_defines_them():
    found = imported_names()
    imported = {module: {name for _, name in pairs} for module, pairs in found.items()}
    passed_on = [
        f"{module} imports {name} from {base}"
        for module, pairs in found.items()
        for base, name in pairs
        if module != "__init__" and name in imported.get(base, ())
    ]
    assert passed_on == []
