"""The form of a study file: what stands in it, what is wrong with it, and how its arms become cells.

Nothing here knows of records; `kdlib.study` asks what was computed.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from kdlib import pretraining, runs
from kdlib.settings import ConfigurationError, Name, Positive, Size, checked, names, nearest, settings

CHOSEN = "chosen"
"""The value of a parameter that the table of choices decides."""
NOTES = ("like", "seeds", "then", "measure", "note")
"""What an arm says besides parameters."""


@settings
class Claim:
    """Two cells of a study that are compared, seed by seed."""

    arm: Name
    against: Name
    where: dict[str, Any] | None = None
    """which cells of the arms, by the values of their axes; without it, all that both have"""
    metric: Name
    """as in a record: "test/accuracy", "validation/loss", …"""
    margin: Positive
    """differences below it count as none"""
    lower_is_better: bool = False


@settings
class Choosing:
    """Settings that are tried before anything else, with seeds of their own."""

    arms: dict[str, dict[str, Any]]
    """what is tried, in the form of the study's arms"""
    seeds: str | int | list[Any]
    by: list[str]
    """the parameters that tell the trials apart: the columns of the table"""
    metric: Name | None = None
    """as in a record; None: of each task the one that chooses its checkpoints, such as "validation/accuracy\""""
    rule: Literal["best mean", "best worst seed"] = "best worst seed"
    higher_is_better: bool = True


@settings
class Sheet:
    """A study file, as it is written."""

    question: str = ""
    """what is asked, for readers"""
    common: dict[str, Any]
    """parameters of all runs"""
    rules: list[dict[str, Any]] | None = None
    """more parameters, each with `where`, the values of others for which they hold; later ones go first"""
    arms: dict[str, dict[str, Any]]
    """what is compared, by names of one's own"""
    seeds: str | int | list[Any]
    """a range such as 0-9, one seed, or a list of them"""
    looks: list[Size] | None = None
    """after how many seeds the claims are looked at; None: once, after all"""
    choose: Choosing | None = None
    claims: list[dict[str, Any]] | None = None
    records: Name | None = None
    """the folder of the records, from the file's own; None: the file's name without its ending"""
    keep_folders: bool = True
    """whether networks and predictions of finished runs stay where they are"""
    choices: Name | None = None
    """the table of what was tried; None: choices.csv among the records"""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
    """YAML in which a key stands once, 1e-3 is the number 1.0e-3, and a whole number is as it reads: in decimals."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if re.fullmatch(r"[+-]?0[0-7_]+|.*:.*", node.value):
            problem = f"{node.value} is the number {super().construct_yaml_int(node)} to YAML, in octal or by sixties: "
            raise yaml.MarkedYAMLError(problem=problem + "write it in decimals", problem_mark=node.start_mark)
        found: int = super().construct_yaml_int(node)
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$"), [*"+-0123456789"]
)


def read(path: Path) -> Sheet:
    """A study file, the form of which is right; what its arms ask for is checked where units are made of them.

    Raises ConfigurationError that names the file and lists its problems.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not isinstance(given, dict):
        raise ConfigurationError(f"{path} should hold a study: common, arms, seeds")
    arms = given.get("arms")
    if isinstance(arms, dict) and (odd := [name for name in arms if not isinstance(name, str)]):
        raise ConfigurationError(f"{path}: an arm is called {odd[0]!r}, which is no text: put its name in quotes")
    sheet: Sheet = _made(Sheet, {**given, **_choosing(path, given)}, f"the study {path}")
    if problems := _problems(sheet):
        raise ConfigurationError(f"the study {path} is wrong:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return sheet


def _problems(sheet: Sheet) -> list[str]:
    """What does not go together in a file."""
    rules = [rule for rule in sheet.rules or () if not isinstance(rule.get("where"), dict)]
    problems = [f"a rule needs `where`: {rule}" for rule in rules]
    problems += [
        f"{place} says seed: {one['seed']!r}, which a study gives: see seeds"
        for place, one in [("common", sheet.common), *(("a rule", rule) for rule in sheet.rules or ())]
        if "seed" in one
    ]
    problems += [f"{place} are none" for place, arms in _places(sheet) if not arms]
    if idle := [
        rule["where"] for rule in sheet.rules or () if isinstance(rule.get("where"), dict) and _idle(rule, sheet)
    ]:
        problems.append(f"a rule where {idle[0]} holds for no arm: it does nothing")
    try:
        ours, tried = seeds_in(sheet.seeds), seeds_in(sheet.choose.seeds) if sheet.choose else []
        if both := {*tried} & {*ours}:
            problems.append(
                f"choose has seed {min(both)}, which is one of the study's: what is chosen by it looks too good"
            )
    except ConfigurationError as error:
        problems.append(str(error))
    looks = sheet.looks or []
    if any(look < 2 for look in looks) or looks != sorted(set(looks)):
        problems.append(f"looks are {looks}; expected increasing numbers of seeds, from two on")
    return problems


def _idle(rule: Mapping[str, Any], sheet: Sheet) -> bool:
    """Whether no arm can have what a rule asks: a parameter that nobody gives, or a value."""
    given: list[Mapping[str, Any]] = [sheet.common, *(sheet.rules or ())]
    given += [arm for _, arms in _places(sheet) for arm in arms.values()]
    for name, wanted in rule["where"].items():
        values = [one[name] for one in given if name in one]
        found = [value for one in values for value in (one if isinstance(one, list) else [one])]
        if not any(_is(value, wanted) for value in found):
            return True
    return False


def _places(sheet: Sheet) -> list[tuple[str, Mapping[str, Any]]]:
    return [("arms", sheet.arms)] + ([("arms of choose", sheet.choose.arms)] if sheet.choose else [])


def _choosing(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given.get("choose"), dict):
        return {}
    return {"choose": _made(Choosing, given["choose"], f"choose of the study {path}")}


def _made(kind: type, given: Mapping[str, Any], what: str) -> Any:
    """An object of a settings class; every problem in one message."""
    valid = names(kind)
    problems = [f"unknown field {name!r}{nearest(str(name), valid)}" for name in given if name not in valid]
    one, wrong = checked(kind, {name: value for name, value in given.items() if name in valid})
    if problems := problems + wrong:
        raise ConfigurationError(f"{what} is wrong:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return one


def seeds_in(given: Any) -> list[int]:
    """The seeds that a range "0-9", one number or a list of numbers names, in their order.

    Raises ConfigurationError for anything else, and for a seed that is there twice.
    """
    if isinstance(given, list):
        seeds = given if all(type(seed) is int and seed >= 0 for seed in given) else []
    else:
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(given))
        seeds = [] if found is None else [*range(int(found[1]), int(found[2] or found[1]) + 1)]
    if not seeds:
        raise ConfigurationError(f"seeds are {given!r}; expected a range such as 0-9, one number, or a list of numbers")
    if twice := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise ConfigurationError(f"seeds are {given!r}, with {twice[0]} twice: a seed counts once")
    return sorted(seeds)


def claims_of(sheet: Sheet) -> list[Claim]:
    """The claims of a file.  Raises ConfigurationError for one in another form or about an arm that there is not."""
    return [_claim(one, sheet) for one in sheet.claims or []]


def _claim(given: Mapping[str, Any], sheet: Sheet) -> Claim:
    claim = _made(Claim, given, f"the claim {dict(given)}")
    for name in (claim.arm, claim.against):
        if name not in sheet.arms:
            raise ConfigurationError(f"a claim is about arm {name!r}, which there is not{nearest(name, sheet.arms)}")
    return claim


def arm_of(name: str, *places: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an arm says besides parameters, `NOTES`, and its own parameters; what it is `like` is looked up in `places`.

    Raises ValueError for what is said in a form that nobody reads.
    """
    arm = _with_its_model(name, *places)
    notes, own = {n: v for n, v in arm.items() if n in NOTES}, {n: v for n, v in arm.items() if n not in NOTES}
    _check_arm(notes, own)
    return notes, own


def _check_arm(notes: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError for what an arm says in a form that nobody reads."""
    then, measure = notes.get("then", []), notes.get("measure")
    if not isinstance(then, list) or not all(isinstance(one, dict) for one in then):
        raise ValueError(f"then is {then!r}; expected a list of runs, such as [{{task: mini-mnli}}]")
    if twice := [task for task, count in Counter(str(one.get("task")) for one in then).items() if count > 1]:
        raise ValueError(f"then has the task {twice[0]} twice: its numbers would stand in one place")
    if measure is not None and not (isinstance(measure, str) and re.fullmatch(r"[\w.]+:\w+", measure)):
        raise ValueError(f"measure is {measure!r}; expected module:function")
    if "seed" in own:
        raise ValueError(f"seed is {own['seed']!r}, which a study gives: see seeds")
    for name, value in own.items():
        if value == []:
            raise ValueError(f"{name} is an empty list: give it a value, or leave it out")
        if isinstance(value, dict) or (name == "method" and not isinstance(value, (str, list))):
            raise ValueError(f"{name} is {value!r}; expected a value, or a list of values")


def _with_its_model(name: str, *places: Mapping[str, Any]) -> dict[str, Any]:
    """An arm with what it takes from the one that it is `like`, and so on; a trial may be like the arm of its name."""
    found: dict[str, Any] = {}
    seen: list[int] = []
    path, following = [name], name
    while following is not None:
        if not isinstance(following, str):
            raise ValueError(f"is like {following!r}; expected the name of an arm")
        named = [arms[following] for arms in places if following in arms]
        own = next((arm for arm in named if id(arm) not in seen), None)
        if own is None and named:
            raise ValueError(f"is like itself: {' → '.join(path)}")
        if own is None:
            raise ValueError(f"is like {following!r}, which is no arm{nearest(following, places[-1])}")
        seen.append(id(own))
        found = {**own, **found}
        following = own.get("like")
        path.append(following)
    return found


def _is(value: Any, wanted: Any) -> bool:
    """Whether a parameter has the value that a rule names, or one of several."""
    return value in wanted if isinstance(wanted, list) else value == wanted


def agree(ours: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the values of axes are those that are wanted, as far as there are such axes."""
    return all(_is(value, wanted[name]) for name, value in ours.items() if name in wanted)


def cells_of(parameters: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The combinations of an arm's lists: the values on its axes, and all of its parameters."""
    axes = {name: value for name, value in parameters.items() if isinstance(value, list)}
    for values in itertools.product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        yield place, {**parameters, **place}


def parameters_of(sheet: Sheet, point: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a cell: common as far as its method reads it, rules, its own; what is `CHOSEN` is so still."""
    found = {**sheet.common, **point}
    ruled: dict[str, Any] = {}
    for rule in sheet.rules or ():
        if all(_is(found.get(name), value) for name, value in rule["where"].items()):
            ruled |= {name: value for name, value in rule.items() if name != "where"}
            found = {**sheet.common, **ruled, **point}
    reading = pretraining.readable if pretraining.is_text(found) else runs.readable
    read = reading(found, found.get("method", ""))
    return {**{name: value for name, value in sheet.common.items() if name in read}, **ruled, **point}


def with_seed(value: Any, seed: int) -> Any:
    """`seed`, `seed + 50` as numbers; 1e-3, which YAML takes for a text, too."""
    if not isinstance(value, str):
        return value
    if related := re.fullmatch(r"\s*seed\s*(?:\+\s*(\d+)\s*)?", value):
        return seed + int(related[1] or 0)
    return float(value) if re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE) else value
