"""A saved pipeline that loads where this package is not installed: its folder carries the code as one `pipeline.py`.

`pipeline.py` is put together from the package's own files whenever a pipeline is exported, so no second copy of a
model is kept by hand. diffusers copies remote code file by file and looks relative imports up with a regular
expression, so only a single file is dependable. The folder has a dual layout: with the package imported it loads like
any other, without it through `from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)`.
"""

import ast
import json
import re
import shutil
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from .pipeline_lightning_dit import LightningDiTPipeline, write_self_contained

ROOT_MODULES = ("autoencoder_vtp", "transformer_lightning_dit", "pipeline_lightning_dit")
EXPORTED_CLASSES = ("AutoencoderVTP", "LightningDiTTransformer2DModel", "LightningDiTPipeline")

HEADER = '''"""LightningDiTPipeline with its models in one file, generated from the library by vtp_diffusion/export.py.

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
"""
'''

# The last lines of pipeline.py. A class left in the loop's variable would count as a second pipeline class, hence del.
# diffusers copies every local pipeline.py to one place, where the next load replaces it: the text is kept for saving.
TAIL = """

# Components in model_index.json are looked up as attributes of diffusers.
for _class in ({classes}):
    setattr(diffusers, _class.__name__, _class)
del _class
LightningDiTPipeline.exported_source = pathlib.Path(__file__).read_text(encoding="utf-8")
"""


def export_pipeline(pipeline: LightningDiTPipeline | str | Path, output: str | Path) -> Path:
    """Write a self-contained pipeline folder.

    Args:
        pipeline: a pipeline, or the folder of a saved one, whose files are copied as they are (same precision).
        output: a folder that does not exist yet or is empty.
    Returns: `output`.
    Raises: ValueError if the input is no LightningDiT pipeline, a weight file is damaged, or `output` holds files;
        nothing is written then.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"the output of an export must be a new or empty folder, {output} is not")
    if not isinstance(pipeline, DiffusionPipeline):
        _check_pipeline_folder(Path(pipeline))
    elif type(pipeline).__name__ != LightningDiTPipeline.__name__:
        raise ValueError(f"expected a LightningDiTPipeline, got {type(pipeline).__name__}")
    source = self_contained_source()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / "pipeline"
        if isinstance(pipeline, DiffusionPipeline):
            pipeline.save_pretrained(folder)
        else:
            shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        write_self_contained(folder, source)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return output


def _check_pipeline_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"expected the folder of a saved pipeline, {folder} has no model_index.json")
    class_name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if class_name != LightningDiTPipeline.__name__:
        raise ValueError(f"expected a saved LightningDiTPipeline, {index} says {class_name!r}")
    for file in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header and compares it with the file's length
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def self_contained_source(package: Path | None = None) -> str:
    """The text of `pipeline.py`: the root modules and what they import from the package, in the order of dependence.

    Args: `package`: folder of the package's files, by default this one.
    Returns: the text. Raises: ValueError if two files give one name different meanings, or import each other in a way
        that one file can't hold.
    """
    package = package or Path(__file__).parent
    modules: dict[str, _Module] = {}
    for name in ROOT_MODULES:
        _collect(name, package, modules, importing=())
    imports = {"diffusers": "import diffusers", "pathlib": "import pathlib"}  # bound name -> statement
    definitions: dict[str, tuple[str, str]] = {}  # name -> (statement as a tree, file)
    parts = []
    for module in modules.values():
        for name, statement in module.imports.items():
            if imports.setdefault(name, statement) != statement:
                raise ValueError(f"{module.path.name} has '{statement}', another exported file '{imports[name]}'")
        parts.append(module.body(definitions))
    if both := sorted(imports.keys() & definitions.keys()):
        raise ValueError(f"imported in one exported file and defined in another: {', '.join(both)}")
    statements = sorted(set(imports.values()), key=lambda line: (not line.startswith("from __future__"), line))
    source = "\n".join([HEADER, *statements, *parts])
    source += TAIL.format(classes=", ".join(EXPORTED_CLASSES))
    compile(source, "pipeline.py", "exec")
    if relative := re.findall(r"^\s*(?:from|import)\s+\..*$", source, flags=re.MULTILINE):
        raise ValueError(f"diffusers would look for the file of this line of a text or code: {relative[0].strip()}")
    return source


def _collect(name: str, package: Path, modules: dict[str, "_Module"], importing: tuple[str, ...]) -> None:
    """Add a module to `modules` after what it needs when it is executed (depth first)."""
    if name in modules:
        return
    if name in importing:
        raise ValueError(f"files that import each other can't become one file: {' -> '.join([*importing, name])}")
    module = _Module(package / f"{name}.py")
    for needed in module.needs_first:
        _collect(needed, package, modules, (*importing, name))
    modules[name] = module
    for needed in module.needs_later:
        _collect(needed, package, modules, importing=())


class _Module:
    """One file of the package, taken apart into imports and everything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text, filename=str(path))
        self.imports: dict[str, str] = {}  # bound name -> statement
        self.needs_first: list[str] = []  # modules imported at the top
        self.needs_later: list[str] = []  # modules imported inside functions
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                (self.needs_first if node in self.tree.body else self.needs_later).append(self._module_of(node))
            elif isinstance(node, ast.Import | ast.ImportFrom) and node in self.tree.body:
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = _import_statement(node, alias)

    def _module_of(self, node: ast.ImportFrom) -> str:
        if node.level != 1 or not node.module or "." in node.module or any(a.asname for a in node.names):
            raise ValueError(
                f"{self.path.name} line {node.lineno}: exported files may only say 'from .module import name, ...' "
                f"of each other, got '{ast.unparse(node)}'"
            )
        return node.module

    def body(self, definitions: dict[str, tuple[str, str]]) -> str:
        """The file's text without its imports, and without statements that an earlier file had word for word."""
        lines = self.text.splitlines()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.level:  # what it names now stands in the same file
                lines[node.lineno - 1] = " " * node.col_offset + "pass"
                for number in range(node.lineno, node.end_lineno):
                    lines[number] = ""
        kept, end = [f"\n\n# ---- from {self.path.parent.name}/{self.path.name}"], 0
        docstring = ast.get_docstring(self.tree)
        if docstring is not None:
            kept += [f"# {line}".rstrip() for line in docstring.splitlines()]
        for node in self.tree.body:
            segment, end = lines[end : node.end_lineno], node.end_lineno
            if isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if docstring is not None and node is self.tree.body[0]:
                continue
            if not self._already_there(node, definitions):
                kept += segment
        return "\n".join(kept)

    def _already_there(self, node: ast.stmt, definitions: dict[str, tuple[str, str]]) -> bool:
        tree = ast.dump(node)
        known = False
        for name in _defined_names(node):
            other, file = definitions.setdefault(name, (tree, self.path.name))
            if file != self.path.name:
                if other != tree:
                    raise ValueError(f"{file} and {self.path.name} define {name} differently: give one another name")
                known = True
        return known


def _import_statement(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    if isinstance(node, ast.ImportFrom):
        return ast.unparse(ast.ImportFrom(module=node.module, names=[alias], level=0))
    package, _, last = alias.name.rpartition(".")
    if package and alias.asname == last:  # "import torch.nn as nn" is what other files write as "from torch import nn"
        return f"from {package} import {last}"
    return ast.unparse(ast.Import(names=[alias]))


def _defined_names(node: ast.stmt) -> list[str]:
    """The module-level names that a statement binds, those in the branches of an `if` or `try` included."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            names += _defined_names(child)
    return names
