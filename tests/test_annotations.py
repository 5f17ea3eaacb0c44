"""The annotations of kdlib are executed in these tests, shapes included: `conftest.py` sees to it."""

import importlib
import inspect

import jaxtyping
import pytest
import torch

from kdlib import losses, pilot
from tools import typed


@pytest.mark.parametrize("room", typed.rooms())
def test_every_function_of_a_room_is_checked(room):
    functions = [
        function
        for _, function in inspect.getmembers(importlib.import_module(room), inspect.isfunction)
        if function.__module__ == room and not hasattr(function, "__wrapped__")
    ]
    assert [function.__name__ for function in functions] == []


def test_a_shape_that_does_not_fit_its_annotation_is_an_error():
    three, two = torch.zeros(5, 3), torch.zeros(5, 2)
    with pytest.raises(jaxtyping.TypeCheckError, match="teacher_logits"):
        losses.kl_divergence(three, two)


def test_an_int_is_a_float_and_a_text_is_none():
    logits = torch.zeros(5, 3)
    losses.kl_divergence(logits, logits, temperature=2)
    with pytest.raises(jaxtyping.TypeCheckError, match="temperature"):
        losses.kl_divergence(logits, logits, temperature="2")
    with pytest.raises(jaxtyping.TypeCheckError, match="hidden_states"):
        pilot.gradient(torch.nn.Linear(2, 2), {}, {}, hidden_states="yes")


@pytest.mark.usefixtures("unchecked")
def test_who_asks_for_it_is_left_alone():
    with pytest.raises(ValueError, match="differ in"):
        losses.kl_divergence(torch.zeros(5, 3), torch.zeros(5, 2))
