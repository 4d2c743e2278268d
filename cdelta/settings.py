"""Frozen, nested settings: changed by name, read from TOML, offered as flags. Unknown names and
wrong types are `CdeltaError`s.

A settings class is a frozen dataclass whose fields are plain values (bool, int, float, str,
`Literal` strings), tuples of them, or further settings classes. The string literal under a field is
its documentation, and the help text of its flag.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from cdelta.errors import CdeltaError
from cdelta.files import read_toml

T = TypeVar("T")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


# ---------------------------------------------------------------------- changing


def changed(settings: T, changes: Mapping[str, Any], where: str = "") -> T:
    """A copy of `settings` with `changes` in it, nested as the sections are.

    Raises `CdeltaError` on an unknown name (it names the known ones), a wrong type, and what the
    class itself refuses.
    """
    cls: type = type(settings)
    types, values = field_types(cls), dict(vars(settings))
    for name, value in changes.items():
        full = f"{where}{name}"
        if name not in types:
            raise CdeltaError(f"unknown setting '{full}': known here are {', '.join(types)}.")
        if not is_dataclass(types[name]):
            values[name] = converted(full, types[name], value)
        elif isinstance(value, Mapping):
            values[name] = changed(getattr(settings, name), value, f"{full}.")
        else:
            known = ", ".join(field_types(types[name]))
            raise CdeltaError(
                f"'{full}' is a section: set one of its fields, {full}.FIELD, "
                f"with FIELD one of {known}."
            )
    return cls(**values)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> its type, annotations resolved."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def converted(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type `kind`: an int may stand for a float, and for a list its values with
    commas between them. Raises `CdeltaError` naming `name`.
    """
    if get_origin(kind) is tuple:
        (inner,) = get_args(kind)[:1]
        return tuple(converted(name, inner, item) for item in _items(value, inner))
    if kind is float and type(value) is int:
        return float(value)
    if value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind:
        return value
    raise CdeltaError(f"setting '{name}' is {value!r}: it must be {described(kind)}.")


def _items(value: Any, inner: type) -> Iterable[Any]:
    if not isinstance(value, str):
        return value if isinstance(value, (list, tuple)) else [value]
    parts = [part.strip() for part in value.split(",") if part.strip()]
    return parts if inner is str else map(parse_value, parts)


def described(kind: Any) -> str:
    """A field's type in words."""
    if get_origin(kind) is tuple:
        return f"a list, each {described(get_args(kind)[0])}"
    choices = ", ".join(map(str, get_args(kind)))
    return f"one of {choices}" if choices else WORDS[kind]


# ---------------------------------------------------------------------- reading


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """``["edit.lr=1e-3", "answers.grid=[0, 1]"]`` as a nested mapping for `changed`; values are
    TOML, bare words are texts.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        *sections, name = path.strip().split(".")
        if not equals or not all(part.isidentifier() for part in (*sections, name)):
            raise CdeltaError(f"cannot read the setting {text!r}: write section.field=value.")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise CdeltaError(f"'{path}' is inside '{section}', which is no section.")
        place[name] = parse_value(value.strip())
    return tree


def parse_value(text: str) -> Any:
    """A TOML value; what is none (a bare word) is a text."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return found["value"] if set(found) == {"value"} else text


def load_toml(path: str | Path, cls: type[T]) -> T:
    """The defaults of `cls` with the values of a TOML file in them."""
    try:
        return changed(cls(), read_toml(Path(path)))
    except OSError as error:
        raise CdeltaError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CdeltaError(f"{path} is not valid TOML: {error}.") from error
    except CdeltaError as error:
        raise CdeltaError(f"{path}: {error}") from error


# ---------------------------------------------------------------------- command lines


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose flags are never abbreviated."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.register("type", "int", int)
        self.register("type", "float", float)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def add_arguments(parser: Any, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Arguments of a parser or group: name or flag -> what `add_argument` takes."""
    for name, options in table.items():
        parser.add_argument(name, **options)


@cache
def field_help(cls: type) -> dict[str, str]:
    """Field name -> the string literal that stands under it in the class's source, on one line."""
    found = {}
    for neighbours in pairwise(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))):
        match neighbours:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = " ".join(text.split())
    return found


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag ``--field`` for every field of every section, in one argument group per section, and
    ``--set section.field=value``.

    A name that two sections share becomes ``--section-field``. `given` reads what was given.
    """
    sections = field_types(cls)
    names = Counter(name for kind in sections.values() for name in field_types(kind))
    for section, kind in sections.items():
        group = parser.add_argument_group(section, kind.__doc__.split("\n")[0])
        for name, type_of_field in field_types(kind).items():
            flag = name if names[name] == 1 else f"{section}-{name}"
            default = json.dumps(getattr(kind, name), ensure_ascii=False)
            text = f"{field_help(kind)[name]} ({described(type_of_field)}; default: {default})"
            group.add_argument(
                f"--{flag.replace('_', '-')}",
                dest=f"{section}.{name}",
                metavar="VALUE",
                help=text.replace("%", "%%"),
            )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="any of the settings below by its full name; may be given several times",
    )


def given(arguments: argparse.Namespace, settings: T) -> T:
    """`settings` with what the flags of `add_flags` and ``--set`` say."""
    told = [(path, value) for path, value in vars(arguments).items() if "." in path]
    flags = [f"{path}={value}" for path, value in told if value is not None]
    return changed(settings, parse_overrides([*flags, *arguments.overrides]))
