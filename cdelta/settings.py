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
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from cdelta.errors import CdeltaError

T = TypeVar("T")


# ---------------------------------------------------------------------- changing


def changed(settings: T, changes: Mapping[str, Any]) -> T:
    """A copy of `settings` with `changes` in it, nested as the sections are.

    Raises `CdeltaError` on an unknown name (it names the known ones), a wrong type, and what the
    class itself refuses.
    """
    return _changed(settings, changes, "")


def _changed(settings: T, changes: Mapping[str, Any], where: str) -> T:
    types = field_types(type(settings))
    values = {}
    for name, value in changes.items():
        full = f"{where}{name}"
        if name not in types:
            raise CdeltaError(
                f"unknown setting '{full}': known here are {', '.join(types) or 'none'}."
            )
        if is_dataclass(types[name]):
            if not isinstance(value, Mapping):
                raise CdeltaError(
                    f"'{full}' is a section: set one of its fields, {full}.FIELD, "
                    f"with FIELD one of {', '.join(field_types(types[name]))}."
                )
            values[name] = _changed(getattr(settings, name), value, f"{full}.")
        else:
            values[name] = converted(full, types[name], value)
    return replace(settings, **values)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> its type, annotations resolved."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def converted(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type `kind`: lists become tuples, an int may stand for a float. Raises
    `CdeltaError` naming `name`.
    """
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(converted(name, get_args(kind)[0], item) for item in value)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    raise CdeltaError(f"setting '{name}' is {value!r}: it must be {described(kind)}.")


def described(kind: Any) -> str:
    """A field's type in words."""
    if get_origin(kind) is tuple:
        return f"a list, each {described(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words[kind]


def flat(settings: object, where: str = "") -> dict[str, Any]:
    """``section.field`` -> value."""
    found: dict[str, Any] = {}
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{where}{field.name}"
        found |= flat(value, f"{name}.") if is_dataclass(value) else {name: value}
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``section.field`` -> value, as the mapping of mappings that `changed` takes."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise CdeltaError(f"'{path}' is inside '{section}', which is no section.")
        if isinstance(place.get(name), dict):
            raise CdeltaError(f"'{path}' is a section: set one of its fields.")
        place[name] = value
    return tree


# ---------------------------------------------------------------------- reading


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """``["edit.lr=1e-3", "answers.grid=[0, 1]"]`` as a nested mapping for `changed`; values are
    TOML, bare words are texts.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not all(part.isidentifier() for part in name.strip().split(".")):
            raise CdeltaError(f"cannot read the setting {text!r}: write section.field=value.")
        values[name.strip()] = parse_value(value.strip())
    return nested(values)


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
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CdeltaError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CdeltaError(f"{path} is not valid TOML: {error}.") from error
    try:
        return changed(cls(), values)
    except CdeltaError as error:
        raise CdeltaError(f"{path}: {error}") from error


# ---------------------------------------------------------------------- help and flags


@cache
def field_help(cls: type) -> dict[str, str]:
    """``section.field`` -> the field's documentation on one line ("" where it has none), sections
    included.
    """
    documented = _own_help(cls)
    found = {}
    for name, kind in field_types(cls).items():
        found[name] = documented.get(name, "")
        if is_dataclass(kind):
            found |= {f"{name}.{inner}": text for inner, text in field_help(kind).items()}
    return found


def _own_help(cls: type) -> dict[str, str]:
    """Field name -> the string literal that stands under it in the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag ``--field`` for every field of every section, in one argument group per section, and
    ``--set section.field=value``.

    A name that two sections share becomes ``--section-field``. `given` reads what was given.
    """
    help_texts, defaults = field_help(cls), flat(cls())
    names = [path.rsplit(".", 1)[-1] for path in defaults]
    for section, kind in field_types(cls).items():
        group = parser.add_argument_group(section, inspect.getdoc(kind).split("\n")[0])
        for name, kind_of_field in field_types(kind).items():
            path = f"{section}.{name}"
            flag = name if names.count(name) == 1 else f"{section}-{name}"
            text = f"{help_texts[path]} (default: {_shown(defaults[path])})"
            group.add_argument(
                f"--{flag.replace('_', '-')}",
                dest=path,
                metavar=_metavar(kind_of_field),
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
    flags = {
        path: _flag_value(kind, value)
        for path, kind in _paths(type(settings))
        if (value := getattr(arguments, path, None)) is not None
    }
    return changed(changed(settings, nested(flags)), parse_overrides(arguments.overrides))


def _paths(cls: type, where: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in field_types(cls).items():
        if is_dataclass(kind):
            yield from _paths(kind, f"{where}{name}.")
        else:
            yield f"{where}{name}", kind


def _flag_value(kind: Any, text: str) -> Any:
    """What a flag's text means: texts as they stand, lists with or without brackets, the rest as
    TOML.
    """
    if kind is str or get_origin(kind) is Literal:
        return text
    if get_origin(kind) is tuple and not text.strip().startswith("["):
        inner = get_args(kind)[0]
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return parts if inner is str else [parse_value(part) for part in parts]
    return parse_value(text)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])},..."
    return {bool: "{true,false}", int: "N", float: "X", str: "TEXT"}[kind]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"
