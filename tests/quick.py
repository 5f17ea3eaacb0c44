"""What makes a small run quick, for processes that tests start; a fork server that imports this has done half of it."""

import dataclasses

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from kdlib import glue

get_checkpoint_conversion_mapping("bert")  # transformers compiles a thousand patterns for its first network


def few_to_test(rows: int = 50) -> None:
    """Leave so many rows in the test split, which no setting makes smaller and takes longer than all the training."""
    load = glue.load

    def shortened(*arguments, **options) -> glue.TaskData:
        data = load(*arguments, **options)
        splits = {
            place: {
                name: split.select(range(min(rows, len(split)))) if name == "test" else split
                for name, split in getattr(data, place).items()
            }
            for place in ("evaluation", "test")
        }
        return dataclasses.replace(data, **splits)

    glue.load = shortened
