"""What makes a small run quick; a fork server that imports this has done half of it for its children."""

import dataclasses
from collections.abc import Callable

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from kdlib import glue

get_checkpoint_conversion_mapping("bert")  # transformers compiles a thousand patterns for its first network

FEW = 50
QUICK = {
    "task": "mini-mnli",
    "teacher": "tiny-2x64",
    "student": "tiny-2x32",
    "max_train": 200,
    "epochs": 1,
    "teacher_epochs": 1,
    "device": "cpu",
}
"""A run with a teacher of its own, finished in seconds."""


def few_to_test(load: Callable[..., glue.TaskData]) -> Callable[..., glue.TaskData]:
    """`glue.load` with FEW rows in the test split, which no setting makes smaller and takes as long as all the rest."""

    def shortened(*arguments, **options) -> glue.TaskData:
        data = load(*arguments, **options)
        splits = {}
        for place in ("evaluation", "test"):
            splits[place] = dict(getattr(data, place))
            if "test" in splits[place]:
                split = splits[place]["test"]
                splits[place]["test"] = split.select(range(min(FEW, len(split))))
        return dataclasses.replace(data, **splits)

    return shortened
