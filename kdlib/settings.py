"""Settings: frozen dataclasses whose annotations say what is valid, checked all at once.

    @settings
    class KD:
        temperature: Positive = 2.0
        "softens teacher and student"

A settings class stands beside the function that reads it, and a default stands there only.  Outside, where papermill, a
command line, YAML or a record gives them, settings are flat; `checked` makes an object of those that a class has, and a
sentence of everything that is wrong.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(kind: type[T]) -> type[T]:
    """The decorator of a settings class: frozen, by keyword only, values of exactly the types that it names."""
    for name, hint in kind.__annotations__.items():
        default = vars(kind).get(name)
        if isinstance(default, dataclasses.Field) and default.metadata.get("by rule"):
            kind.__annotations__[name] = hint | None
    checked_kind: Any = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True))(kind)
    made: type[T] = checked_kind
    return made


def by_rule() -> Any:
    """The default of a field that others decide: None, which says nothing, until the object is complete; see `fill`."""
    return dataclasses.field(default=None, metadata={"by rule": True})


def fill(one: Any, **values: Any) -> None:
    """In `__post_init__`: give a frozen object the values of those of its fields that are None still."""
    for name, value in values.items():
        if getattr(one, name) is None:
            object.__setattr__(one, name, value)


Share = Annotated[float, Field(ge=0, le=1)]
InnerShare = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1e3)]
"""A learning rate."""
Positive = Annotated[float, Field(gt=0, le=1e9)]
Temperature = Annotated[float, Field(ge=1e-3, le=1e9)]
"""Logits are divided by it; float32 has no room for much less."""
Weight = Annotated[float, Field(ge=0, le=1e6)]
Steps = Annotated[int, Field(gt=0, le=10**9)]
Rows = Annotated[int, Field(gt=0, le=10**12)]
Size = Annotated[int, Field(gt=0, le=10**6)]
Number = Annotated[int, Field(ge=0, le=10**9)]
Layers = Annotated[int, Field(gt=0, le=1000)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
# Numbers above 0 or from 0 on, and the largest that means anything.


def among(names: Collection[str]) -> AfterValidator:
    """The annotation of a name that must be one of these: `Annotated[str, among(OBJECTIVES)]`."""

    def check(value: str) -> str:
        if value not in names:
            raise PydanticCustomError("among", "one of {names}", {"names": ", ".join(names)})
        return value

    check.__doc__ = " or ".join(names)  # for `describe`
    return AfterValidator(check)


def _printable(value: str) -> str:
    if not value.strip() or "\0" in value or value.encode(errors="ignore").decode() != value:
        raise PydanticCustomError("printable", "a name or a path, or leave it out")
    return value


Name = Annotated[str, AfterValidator(_printable)]
"""A name or a path that a file system knows."""


class ConfigurationError(ValueError):
    """A run configuration is wrong; the message lists every problem found."""


def refuse(problems: Iterable[str]) -> None:
    """Raise ConfigurationError with one message that lists all problems, if there are any."""
    if problems := [*problems]:
        raise ConfigurationError("the run configuration is wrong:\n" + "\n".join(f"  - {p}" for p in problems))


def checked(kind: type[T], given: Mapping[str, Any]) -> tuple[T | None, list[str]]:
    """`kind` with those of the given values that are valid, and what is wrong with the others, a sentence each.

    The object is None where its values do not go together, or where one that it cannot do without is wrong.
    """
    try:
        return kind(**given), []
    except ValidationError as error:
        found = error.errors()
    wrong: dict[str, str] = {}
    for one in found:
        name = str(one["loc"][0]) if one["loc"] else ""
        wrong.setdefault(name, _sentence(kind, name, given.get(name), one))
    if not wrong.keys() <= given.keys():
        return None, [*wrong.values()]
    rest, more = checked(kind, {name: value for name, value in given.items() if name not in wrong})
    told = {_missing(name) for name in wrong}
    return rest, [*wrong.values(), *(problem for problem in more if problem not in told)]


def _missing(name: str) -> str:
    return f"{name} is missing"


def _sentence(kind: type, name: str, value: Any, error: Any) -> str:
    """One problem in our words: the value, what was expected, the nearest valid name."""
    if not name:
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return _missing(name)
    if len(error["loc"]) > 1 and isinstance(value, (dict, list)):  # of one of its parts
        return f"{'/'.join(map(str, error['loc']))} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"
    options = _options(typing.get_type_hints(kind, include_extras=True)[name])
    bounds = {key: value for _, found in options for key, value in found.items()}
    choices = [
        c for option, _ in options if typing.get_origin(option) is typing.Literal for c in typing.get_args(option)
    ]
    why = error["type"]
    if why == "printable":
        return f"{name} is {value!r}; expected {error['msg']}"
    if why == "among" or (choices and len(options) == 1):
        choices = choices or error["ctx"]["names"].split(", ")
        return f"{name} is {value!r}; expected one of {', '.join(choices)}{nearest(str(value), choices)}"
    if choices:
        return f"{name} is {value!r}; expected a number ≥ 0 or one of {', '.join(choices)}"
    if why.endswith("_type"):
        kinds = [getattr(option, "__name__", str(option)) for option, _ in options] + ["None"] * _optional(kind, name)
        return f"{name} is {value!r} ({type(value).__name__}); expected {' or '.join(dict.fromkeys(kinds))}"
    highest = bounds.get("le", math.inf)
    if highest == 1 or value != value or value == math.inf or value <= highest:
        return f"{name} is {value}; expected {_bounded(bounds)}"
    return f"{name} is {value}; expected {highest:,} at most"


def _options(hint: Any) -> list[tuple[Any, dict[str, float]]]:
    """The types that a hint allows, but for None, each with its bounds."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) if part is not type(None) for option in _options(part)]
    if typing.get_origin(hint) is not Annotated:
        return [(hint, {})]
    inner, *extra = typing.get_args(hint)
    limits = [limit for field in extra for limit in getattr(field, "metadata", [])]
    bounds = {key: getattr(limit, key) for limit in limits for key in ("gt", "ge", "lt", "le") if hasattr(limit, key)}
    return [(kind, found | bounds) for kind, found in _options(inner)]


def _optional(kind: type, name: str) -> bool:
    return any(field.name == name and field.default is None for field in dataclasses.fields(kind))


def _bounded(bounds: Mapping[str, float]) -> str:
    if bounds.get("lt") == 1:
        return "a number above 0 and below 1"
    if bounds["le"] == 1:
        return "a number between 0 and 1"
    if "gt" in bounds:
        return "a positive number"
    return f"at least {bounds['ge']}" if bounds["ge"] else "0 or more"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A question that names the most similar valid names, or nothing."""
    close = difflib.get_close_matches(name, [*valid], n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def names(kind: type) -> tuple[str, ...]:
    """The fields of a settings class, in their order."""
    return tuple(field.name for field in dataclasses.fields(kind))


# A configuration has fields that all runs have and `settings`, an object of the method's own class: two levels inside,
# one outside.


def read_by(shared: type, methods: Mapping[str, type]) -> dict[str, tuple[str, ...]]:
    """The methods that read a field, for those fields that not all of them read."""
    found: dict[str, list[str]] = {name: [] for kind in methods.values() for name in names(kind)}
    for method, kind in methods.items():
        for name in names(kind):
            found[name].append(method)
    for name in names(shared):
        ignoring = [method for method, kind in methods.items() if name in getattr(kind, "ignores", ())]
        if ignoring:
            found[name] = [method for method in methods if method not in ignoring]
    return {name: tuple(readers) for name, readers in found.items()}


def unknown(given: Iterable[str], shared: type, methods: Mapping[str, type]) -> list[str]:
    """A sentence on each name that is no field, with the nearest that are."""
    valid = {*names(shared), *read_by(shared, methods)} - {"settings"}
    return [f"unknown parameter {name!r}{nearest(name, valid)}" for name in given if name not in valid]


def unread(given: Mapping[str, Any], method: str, readers: Mapping[str, tuple[str, ...]]) -> list[str]:
    """A sentence on the fields that were given and that the method does not read, if there are any."""
    found = [name for name in given if method not in readers.get(name, (method,))]
    if not found:
        return []
    told = "; ".join(f"{name} = {given[name]!r} (for {', '.join(readers[name])})" for name in found)
    return [f"method {method!r} does not read {told}: leave {'it' if len(found) == 1 else 'them'} out"]


def said(given: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Those of the given values that are of fields of `kind`; None says nothing where None is the default."""
    silent = {field.name for field in dataclasses.fields(kind) if field.default is None}
    return {n: v for n, v in given.items() if n in names(kind) and not (v is None and n in silent)}


def describe(kind: type) -> list[tuple[str, str, Any, str]]:
    """The fields of a settings class, its own first: name, type in words, default, what the source says of it."""
    hints, told = typing.get_type_hints(kind, include_extras=True), _field_docs(kind)
    rows = []
    for field in sorted(dataclasses.fields(kind), key=lambda field: _nearness(kind, field.name)):
        options, extra = _options(hints[field.name]), getattr(hints[field.name], "__metadata__", ())
        choices = [str(choice) for option, _ in options for choice in typing.get_args(option)]
        names = [one.func.__doc__ for one in extra if isinstance(one, AfterValidator) and one.func.__doc__]
        kinds = [getattr(option, "__name__", "") for option, _ in options if not typing.get_args(option)]
        rows.append((field.name, " or ".join(names or [*kinds, *choices]), field.default, told.get(field.name, "")))
    return rows


def _nearness(kind: type, name: str) -> int:
    """How far above `kind` among its parts a field is defined."""
    return next(i for i, part in enumerate(kind.__mro__) if name in vars(part).get("__annotations__", {}))


@functools.cache
def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field, of this class and of those that it is made of."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        defined = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(defined, ast.ClassDef)
        for field, text in itertools.pairwise(defined.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(text.value))
    return found
