"""Reading YAML 1.2 files of settings."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

LONGEST_INTEGER = 100  # characters: Python itself reads no more than 4300 digits


class _Yaml(yaml.SafeLoader):
    """YAML 1.2 scalars: `no` and `12:30` are words, `1e-3` and `010` (ten) are numbers; no key may be repeated."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"the key {key!r} is given twice, the second time before{node.end_mark}")
        return super().construct_mapping(node, deep)


def _yaml_integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"{text[:20]}... of {len(text)} characters is too long for an integer{node.start_mark}")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)


# PyYAML reads YAML 1.1, which silently takes yes/no/on/off for truth values, 1e-3 for text, 010 for eight and 12:30
# for 750.
_OTHERS = (":bool", ":float", ":int", ":timestamp")
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_OTHERS)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Yaml.add_constructor("tag:yaml.org,2002:int", _yaml_integer)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises: FileNotFoundError: there is no such file. ValueError: the file is not valid YAML, or holds something else
        than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the configuration file {path} does not exist")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as YAML: its values are nested too deeply") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, it holds a {type(values).__name__}")
    return values


def find_yaml(word: str, shipped: Sequence[Path]) -> str:
    """The file that is meant by a path, or by the name of one of the shipped files, with or without its suffix.

    Raises: FileNotFoundError if it is neither.
    """
    named = {name: str(path) for path in shipped for name in (path.name, path.stem)}
    if not shipped or Path(word).is_file():
        return word
    if word not in named:
        known = ", ".join(path.stem for path in shipped)
        raise FileNotFoundError(f"the configuration {word} does not exist: expected a file or one of {known}")
    return named[word]


def describe_yaml(shipped: Sequence[Path]) -> str:
    """One line per file: its name and the first sentence of the comment at its top."""
    lines = []
    for path in shipped:
        rows = itertools.takewhile(lambda row: row.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        comment = " ".join(row.lstrip("# ") for row in rows)
        lines.append(f"  {path.stem:28} {re.split('[.;?] |[.]$|, (?:so|for|as) ', comment)[0]}")
    return "\n".join(lines)
