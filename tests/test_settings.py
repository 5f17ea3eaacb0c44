"""Settings: what is wrong is told all at once, in our words, with bounds and the nearest names."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import ValidationError

from kdlib import settings as module
from kdlib.settings import (
    ConfigurationError,
    Name,
    Number,
    Positive,
    Share,
    Size,
    Temperature,
    Weight,
    among,
    by_rule,
    checked,
    describe,
    fill,
    settings,
)


@settings
class Cake:
    flour: Positive = 2.0
    """in cups"""
    sugar: Share = by_rule()
    """of the flour;
    None: half, with honey none"""
    honey: Weight | Literal["some", "much"] = 0.0
    eggs: Size = 3
    pans: Number | None = None
    shape: Literal["round", "square"] = "round"
    topping: Annotated[str, among({"cherry": 1, "cream": 2})] = "cream"
    heat: Temperature = 180.0
    label: Name = "cake"
    vegan: bool = False

    def __post_init__(self) -> None:
        fill(self, sugar=0.0 if self.honey else 0.5)
        if self.vegan and self.eggs > 3:
            raise ValueError("a vegan cake has no eggs")


@settings
class Layered(Cake):
    eggs: Size = 5
    layers: Size = 2
    """on top of each other"""


@settings
class Oven:
    heat: Temperature
    door: bool = False


def test_settings_are_frozen_and_by_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Cake().flour = 1.0
    with pytest.raises(ValidationError):
        Cake(2.0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"flour": 0.0}, "flour is 0.0; expected a positive number"),
        ({"flour": math.nan}, "flour is nan; expected a positive number"),
        ({"flour": math.inf}, "flour is inf; expected a positive number"),
        ({"flour": 1e10}, "flour is 10000000000.0; expected 1,000,000,000.0 at most"),
        ({"flour": "much"}, "flour is 'much' (str); expected float"),
        ({"flour": None}, "flour is None (NoneType); expected float"),
        ({"sugar": 1.5}, "sugar is 1.5; expected a number between 0 and 1"),
        ({"sugar": "a"}, "sugar is 'a' (str); expected float or None"),
        ({"honey": -1.0}, "honey is -1.0; expected a number ≥ 0 or one of some, much"),
        ({"honey": "lots"}, "honey is 'lots'; expected a number ≥ 0 or one of some, much"),
        ({"eggs": 2.5}, "eggs is 2.5 (float); expected int"),
        ({"eggs": True}, "eggs is True (bool); expected int"),
        ({"eggs": 0}, "eggs is 0; expected a positive number"),
        ({"pans": -1}, "pans is -1; expected 0 or more"),
        ({"pans": "two"}, "pans is 'two' (str); expected int or None"),
        ({"shape": "sqare"}, "shape is 'sqare'; expected one of round, square; did you mean 'square'?"),
        ({"topping": "cherri"}, "topping is 'cherri'; expected one of cherry, cream; did you mean 'cherry'?"),
        ({"heat": 1e-4}, "heat is 0.0001; expected at least 0.001"),
        ({"label": " "}, "label is ' '; expected a name or a path, or leave it out"),
        ({"label": "a\0"}, "label is 'a\\x00'; expected a name or a path, or leave it out"),
        ({"vegan": 1}, "vegan is 1 (int); expected bool"),
        ({"vegan": True, "eggs": 4}, "a vegan cake has no eggs"),
    ],
    ids=str,
)
def test_a_problem_is_told_in_a_sentence(given, sentence):
    assert checked(Cake, given)[1] == [sentence]
    with pytest.raises(ValidationError):
        Cake(**given)


def test_all_problems_are_told_at_once_and_the_rest_is_made():
    given = {"flour": -1.0, "shape": "flat", "eggs": 4, "vegan": True, "sugar": 0.25}
    made, problems = checked(Cake, given)
    assert made is None and len(problems) == 3 and problems[-1] == "a vegan cake has no eggs"
    made, problems = checked(Cake, {**given, "eggs": 3})
    assert made == Cake(vegan=True, sugar=0.25) and len(problems) == 2
    assert checked(Cake, {}) == (Cake(), [])


def test_without_a_value_that_it_needs_there_is_no_object():
    told = ["heat is 0.0; expected at least 0.001", "door is 1 (int); expected bool"]
    assert checked(Oven, {"heat": 0.0, "door": 1}) == (None, told)
    assert checked(Oven, {"door": True}) == (None, ["heat is missing"])


def test_numbers_that_are_whole_may_stand_for_others():
    assert Cake(flour=3).flour == 3.0 and Cake(honey=1, sugar=1).honey == 1


def test_a_field_by_rule_is_filled_unless_it_was_given():
    assert (Cake().sugar, Cake(honey="some").sugar, Cake(sugar=0.0).sugar) == (0.5, 0.0, 0.0)
    assert {field.name: field.default for field in dataclasses.fields(Cake)}["sugar"] is None


def test_refuse_lists_all_and_is_silent_without_problems():
    module.refuse([])
    with pytest.raises(ConfigurationError, match="is wrong:\n  - one\n  - two"):
        module.refuse(iter(["one", "two"]))


@pytest.mark.parametrize(
    ("name", "expected"), [("flor", "; did you mean 'flour'?"), ("xyz", ""), ("hea", "; did you mean 'heat'?")]
)
def test_nearest(name, expected):
    assert module.nearest(name, ["flour", "heat"]) == expected


@settings
class Shared:
    settings: Cake
    place: str | None = None
    guests: int = 3


@settings
class Plain:
    heat: Temperature = 100.0
    ignores: ClassVar[tuple[str, ...]] = ("place",)


METHODS = {"cake": Cake, "layered": Layered, "plain": Plain}


def test_who_reads_what_and_what_nobody_knows():
    readers = module.read_by(Shared, METHODS)
    assert readers["heat"] == ("cake", "layered", "plain") and readers["layers"] == ("layered",)
    assert readers["place"] == ("cake", "layered") and "guests" not in readers
    assert module.unknown({"guests": 1, "layers": 2}, Shared, METHODS) == []
    assert module.unknown({"gests": 1}, Shared, METHODS) == ["unknown parameter 'gests'; did you mean 'guests'?"]
    assert module.unknown(["settings"], Shared, METHODS) == ["unknown parameter 'settings'"]
    told = module.unread({"heat": 1.0, "guests": 2, "layers": 2}, "plain", readers)
    assert told == ["method 'plain' does not read layers = 2 (for layered): leave it out"]
    told = module.unread({"eggs": 1, "place": "here"}, "plain", readers)
    expected = "eggs = 1 (for cake, layered); place = 'here' (for cake, layered): leave them out"
    assert told == [f"method 'plain' does not read {expected}"]
    assert module.unread({"guests": 2}, "plain", readers) == []


def test_none_says_nothing_where_it_is_the_default():
    given = {"sugar": None, "pans": None, "flour": None, "eggs": 2, "layers": 4}
    assert module.said(given, Cake) == {"flour": None, "eggs": 2}


def test_a_class_describes_its_fields_and_those_that_it_is_made_of():
    rows = {name: rest for name, *rest in describe(Layered)}
    assert list(rows) == ["eggs", "layers", *(name for name in module.names(Cake) if name != "eggs")]  # its own first
    assert rows["flour"] == ["float", 2.0, "in cups"]
    assert rows["sugar"] == ["float", None, "of the flour;\nNone: half, with honey none"]
    assert rows["honey"] == ["float or some or much", 0.0, ""]
    assert rows["pans"] == ["int", None, ""] and rows["eggs"] == ["int", 5, ""]
    assert rows["shape"] == ["round or square", "round", ""] and rows["topping"] == ["cherry or cream", "cream", ""]
    assert rows["layers"] == ["int", 2, "on top of each other"]
