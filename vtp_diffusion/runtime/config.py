"""Typed configuration: a dataclass, filled from a YAML file and then from the command line.

Defaults live in the dataclass and nowhere else. A key that the dataclass does not have, a value of another type than
its annotation, a number that is not finite and a required key that was given nowhere are errors; the resolved
configuration is saved with the run.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from .programs import as_typed
from .yaml_files import describe_yaml, find_yaml, read_yaml

Config = TypeVar("Config")
LARGEST_INTEGER = 2**62  # so that a seed plus an image number still fits torch's int64
BOUNDS = ("at_least", "above", "at_most", "below")  # keys of a field's metadata, see `setting`


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    default_factory: Any = dataclasses.MISSING,
    may_change: bool = False,
    before: Any = dataclasses.MISSING,
    ordered: bool = False,
    **bounds: float,
) -> Any:
    """A field of a configuration: its help text and the numbers it takes.

    Args:
        default, default_factory: as of `dataclasses.field`; without either the setting is required.
        may_change: a resumed run may change it, because it affects no result, or because a run that cannot continue
            needs another value.
        before: the value in effect for runs that began before this setting existed; such a run keeps it when resumed.
        ordered: a pair of numbers must have the smaller one first.
        bounds: at_least, above, at_most, below: limits of the number, or of every number of a list. None and strings
            are not checked.
    """
    if unknown := bounds.keys() - set(BOUNDS):
        raise TypeError(f"unknown bounds {sorted(unknown)}, known: {', '.join(BOUNDS)}")
    metadata = {"help": help, "may_change": may_change, "ordered": ordered} | bounds
    if before is not dataclasses.MISSING:
        metadata["before"] = before
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Base of every configuration: creating one raises ValueError for a number outside the bounds of its `setting`."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_bounds(field, getattr(self, field.name), field.name)


def check_bounds(field: dataclasses.Field, value: Any, name: str) -> None:
    """Raises: ValueError naming the setting, its value and the numbers it takes."""
    bounds = {key: field.metadata[key] for key in BOUNDS if key in field.metadata}
    numbers = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int | float)]
    for number in numbers if bounds else ():
        inside = (
            bounds.get("at_least", -math.inf) <= number <= bounds.get("at_most", math.inf)
            and bounds.get("above", -math.inf) < number < bounds.get("below", math.inf)
            and math.isfinite(number)
        )
        if not inside:
            raise ValueError(f"{name} is {value}, expected {_bounds_text(bounds)}")
    if field.metadata.get("ordered") and numbers != sorted(numbers):
        raise ValueError(f"{name} is {value}, expected the smaller number first")


def _bounds_text(bounds: dict[str, float]) -> str:
    low = bounds.get("at_least", bounds.get("above"))
    high = bounds.get("at_most", bounds.get("below"))
    if low is None:
        return f"a number {'below' if 'below' in bounds else 'of at most'} {high}"
    if high is not None:
        return f"a number in {'[' if 'at_least' in bounds else '('}{low}, {high}{']' if 'at_most' in bounds else ')'}"
    if "above" in bounds:
        return "a positive number" if low == 0 else f"a number above {low}"
    known = {} if isinstance(low, float) else {0: "0 or a positive number", 1: "a positive number"}
    return known.get(low, f"{low:g} or more")


def _kinds(annotation: Any) -> tuple[tuple, bool]:
    """`S | T | None` -> ((S, T), True); an annotation T that is not a union -> ((T,), False)."""
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(kind for kind in kinds if kind is not type(None)), type(None) in kinds


def _section(annotation: Any) -> type | None:
    """The dataclass of a nested section, which may be optional; None for any other annotation."""
    kinds, _ = _kinds(annotation)
    return kinds[0] if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]) else None


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _describe(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin is list:
        return f"list of {_describe(arguments[0])}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_describe(arguments[0])}"
        return "list of " + str(len(arguments)) + ": " + ", ".join(_describe(a) for a in arguments)
    if dataclasses.is_dataclass(annotation):
        return "a section with some of " + ", ".join(f.name for f in dataclasses.fields(annotation))
    return getattr(annotation, "__name__", str(annotation))


def _refusal(value: Any, annotation: Any, name: str, where: str) -> ValueError:
    expected = _describe(annotation)
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        expected += f" of at most {LARGEST_INTEGER} in size"
    if isinstance(value, float) and not math.isfinite(value):
        expected = expected.replace("float", "a finite number")
    shown = repr(value)
    shown = shown if len(shown) <= 400 else f"{shown[:80]}... ({len(shown)} characters)"
    return ValueError(f"{where}: {name} is {shown}, expected {expected}")


def _check(value: Any, annotation: Any, name: str, where: str) -> Any:
    """`value` converted to the annotated type. Raises: ValueError naming key, place, value and expected type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise _refusal(value, annotation, name, where)
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):
            return value
        if isinstance(value, dict):
            return build_config(annotation, value, where, name + ".")
    elif origin in (Union, types.UnionType):
        return _check_union(value, annotation, name, where)
    elif origin is Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return choice
    elif origin is list and isinstance(value, list | tuple):
        return [_check(item, arguments[0], f"{name}[{i}]", where) for i, item in enumerate(value)]
    elif origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            pairs = enumerate(zip(value, arguments, strict=True))
            return tuple(_check(item, kind, f"{name}[{i}]", where) for i, (item, kind) in pairs)
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):  # nan would pass every bound; for "no limit" settings take none, not inf
            return float(value)
    elif annotation in (int, str, bool) and type(value) is annotation:
        return value
    raise _refusal(value, annotation, name, where)


def _check_union(value: Any, annotation: Any, name: str, where: str) -> Any:
    kinds, optional = _kinds(annotation)
    if optional and value is None:
        return None
    if section := _section(annotation):
        return _check(value, section, name, where)  # keeps the message about the key inside the section
    for kind in kinds:
        try:
            return _check(value, kind, name, where)
        except ValueError:
            continue
    raise _refusal(value, annotation, name, where)


def _suggest(name: str, known: list[str]) -> str:
    """A hint at the known name that was meant: lr -> learning_rate, learnin_rate -> learning_rate, decay ->
    adam_weight_decay."""
    asked = name.lstrip("-").rpartition(".")[2]
    leaves = {full: full.lstrip("-").rpartition(".")[2] for full in known}
    same_initials = [full for full, leaf in leaves.items() if "".join(part[:1] for part in leaf.split("_")) == asked]
    close = same_initials or difflib.get_close_matches(name, known, n=1)
    close = close or [full for full, leaf in leaves.items() if len(asked) > 2 and asked in leaf]
    return f"; did you mean {close[0]}?" if close else ""


def _check_keys(config_class: type, values: dict[str, Any], where: str, prefix: str) -> dict[str, Any]:
    """Field name -> annotation of a dataclass. Raises: ValueError if a key of `values` is not one of its fields."""
    annotations = typing.get_type_hints(config_class)
    known = [f.name for f in dataclasses.fields(config_class) if f.init]
    for key in values:
        if key not in known:
            hint = _suggest(str(key), known)
            raise ValueError(f"{where}: unknown key {prefix}{key}{hint} (known keys: {', '.join(known)})")
    return annotations


def _check_partial(config_class: type, values: dict[str, Any], where: str, prefix: str = "") -> None:
    """Check keys and types of a YAML file's values. Required keys may be missing: the command line can add them."""
    annotations = _check_keys(config_class, values, where, prefix)
    for key, value in values.items():
        section = _section(annotations[key])
        if section and isinstance(value, dict):
            _check_partial(section, value, where, f"{prefix}{key}.")
        else:
            _check(value, annotations[key], prefix + key, where)


def build_config(config_class: type[Config], values: dict[str, Any], where: str, prefix: str = "") -> Config:
    """An instance of a dataclass from a mapping, nested mappings becoming nested dataclasses.

    Args:
        config_class: the dataclass.
        values: key -> value, as YAML gives them (lists for tuples, integers for floats are accepted).
        where: where the values came from, such as a file name; for error messages.
        prefix: the section that the keys belong to, with its dot: "data.".
    Raises: ValueError: an unknown key (with the nearest known one), a value of another type, a number that is not
        finite, a missing required key.
    """
    annotations = _check_keys(config_class, values, where, prefix)
    fields = [f for f in dataclasses.fields(config_class) if f.init]
    required = [f.name for f in fields if f.default is dataclasses.MISSING is f.default_factory]
    # a required section that is absent counts as empty, so that the error names the key missing inside it
    sections = {name: {} for name in required if dataclasses.is_dataclass(annotations[name])}
    values = sections | values
    missing = [prefix + name for name in required if name not in values]
    if missing:
        raise ValueError(f"{where}: no value for {', '.join(missing)}: set it in the YAML file or as --{missing[0]}")
    checked = {k: _check(v, annotations[k], prefix + k, where) for k, v in values.items()}
    for field in fields:  # checked here and not only in `Settings`, because here the message has the dotted name
        if field.name in checked:
            check_bounds(field, checked[field.name], prefix + field.name)
    return config_class(**checked)


def settings_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """("section.key", the section, the field) of every setting of a configuration, sections themselves left out."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not field.metadata.get("may_change"):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, config, field


def config_to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dictionaries, lists and scalars: what YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(config)


def flatten_config(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {"section.field": value}."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def setting_differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line "  section.key: X there, Y now" for every setting that differs, sorted; none if all are equal.

    Args:
        there: what a folder or file was made with, as read from its JSON or YAML.
        now: what it would be used for. Tuples are equal to lists: files know only lists.
    """
    old, new = flatten_config(config_to_dict(there)), flatten_config(config_to_dict(now))
    pairs = {key: (old.get(key, "(absent)"), new.get(key, "(absent)")) for key in sorted(old.keys() | new.keys())}
    return [f"  {key}: {before} there, {after} now" for key, (before, after) in pairs.items() if before != after]


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config` reads it back equal."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, width=119, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def load_config(config_class: type[Config], path: str | Path) -> Config:
    """The configuration in a YAML file, checked as `build_config` says."""
    return build_config(config_class, read_yaml(path), str(path))


def _leaves(config_class: type, prefix: str = "") -> list[tuple[str, Any, dataclasses.Field]]:
    """(dotted name, annotation, field) of everything that can be set, sections opened."""
    annotations, leaves = typing.get_type_hints(config_class), []
    for field in dataclasses.fields(config_class):
        if not field.init:
            continue
        if section := _section(annotations[field.name]):
            leaves += _leaves(section, f"{prefix}{field.name}.")
        else:
            leaves.append((prefix + field.name, annotations[field.name], field))
    return leaves


def _parse_text(text: str, annotation: Any) -> Any:
    """A command-line word converted to the annotated type, or unchanged if that fails: `_check` then refuses it."""
    kinds, optional = _kinds(annotation)
    if optional and text in ("none", "null", "None"):
        return None
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            for choice in typing.get_args(kind):
                if text == str(choice):
                    return choice
        elif kind is bool and text in ("true", "True", "false", "False"):
            return text in ("true", "True")
        elif kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _sequence_of(annotation: Any) -> Any | None:
    """The item annotation when a field takes several words on the command line, else None."""
    items = (typing.get_args(kind)[0] for kind in _kinds(annotation)[0] if typing.get_origin(kind) in (list, tuple))
    return next(items, None)


def _help(leaves: list, description: str | None, shipped: Sequence[Path]) -> str:
    """What --help prints."""
    if shipped:
        first, _, rest = (description or "").partition("\n\n")
        description = f"{first}\n\nconfigurations (--config NAME):\n{describe_yaml(shipped)}\n\n{rest}"
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",  # argparse's own lists every option: a screen of names
        description=as_typed(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    named = ", or a configuration's name" * bool(shipped)
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of options{named}; the command line wins")
    for name, annotation, field in leaves:
        kind = _describe(annotation)
        if bounds := {key: field.metadata[key] for key in BOUNDS if key in field.metadata}:
            kind += f", {_bounds_text(bounds)}"
        if field.default is not dataclasses.MISSING:
            kind += f"; default: {field.default}"
        elif field.default_factory is not dataclasses.MISSING:
            kind += f"; default: {field.default_factory()}"
        else:
            kind += "; required"
        text = f"{field.metadata.get('help', '')} [{kind}]".strip().replace("%", "%%")
        metavar = "true|false" if _kinds(annotation)[0] == (bool,) else "VALUE"
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
    return parser.format_help()


def _read_words(words: list[str], names: list[str], lists: Collection[str]) -> dict[str, list[str]]:
    """Option -> the words after it. Names may be written with - for _, and --name=value for --name value; a negative
    number is a value. Raises: ValueError for an unknown option, with the nearest known one, or a list given twice."""
    given: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name[2:].replace("-", "_")
            if name not in names:
                hint = _suggest(f"--{name}", [f"--{known}" for known in names])
                raise ValueError(f"command line: unknown option --{name}{hint} (--help lists the options)")
            if name in given and name in lists:  # of a single value the last one counts, as everywhere
                raise ValueError(f"command line: --{name} is given twice, expected once with all its values")
            current = given[name] = [value] if equals else []
        elif current is None:
            raise ValueError(f"command line: {word!r} follows no option (--help lists the options)")
        else:
            current.append(word)
    return given


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[key] = value


def parse_config(
    config_class: type[Config],
    argv: list[str] | None = None,
    description: str | None = None,
    shipped: Sequence[Path] = (),
) -> Config:
    """The configuration of a program: dataclass defaults, then `--config FILE.yaml`, then the command line.

    Every field is an option, `--field value`, and those of a nested dataclass are `--section.field value`; lists take
    several words, booleans take true, false or nothing (true), optional fields take none.

    Args:
        config_class: the dataclass, whose fields are `setting`s.
        argv: the words of the command line, without the program's name; None: those of this process.
        description: what `--help` says first.
        shipped: the configurations of this program, which `--config` takes by name too.
    Raises: ValueError: an unknown key or option, a value of another type, a missing required value. FileNotFoundError:
        the YAML file does not exist.
    """
    leaves = _leaves(config_class)
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        print(_help(leaves, description, shipped))
        raise SystemExit(0)
    lists = {name for name, annotation, _ in leaves if _sequence_of(annotation)} | {"config"}
    given = _read_words(words, [name for name, _, _ in leaves] + ["config"], lists)
    files = given.pop("config", [None])
    if len(files) != 1:
        raise ValueError(f"command line: --config is {' '.join(files) or 'given without a file'}, expected one file")
    where = "command line" if files[0] is None else find_yaml(files[0], shipped)
    values = {} if files[0] is None else read_yaml(where)
    if files[0] is not None and not values:
        raise ValueError(f"{where} is empty, expected settings: without --config a program takes its defaults")
    _check_partial(config_class, values, where)
    for name, annotation, _ in leaves:
        if name not in given:
            continue
        texts, item = given[name], _sequence_of(annotation)
        if item is None:
            if not texts and _kinds(annotation)[0] == (bool,):
                texts = ["true"]
            if len(texts) != 1:
                found = " ".join(texts) or "given without a value"
                raise ValueError(f"command line: --{name} is {found}, expected {_describe(annotation)}")
            value = _parse_text(texts[0], annotation)
        elif len(texts) == 1 and texts[0] in ("none", "null", "None") and _kinds(annotation)[1]:
            value = None
        else:
            value = [_parse_text(word, item) for word in texts]
        _check(value, annotation, "--" + name, "command line")
        _set(values, name, value)
    return build_config(config_class, values, where)
