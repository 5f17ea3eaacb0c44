"""What does bfloat16 save, and what does it spoil?  A step of each method in autocast against fp32, on one processor.

    python benchmarks/precision.py [--methods kd lgtm] [--layers 6 3] [--hidden 384] [--batch 16] [--tokens 64]

Seconds are those of whole steps that move the weights, with dropout.  Errors are those of one step without dropout,
made from the same weights and the same moments of AdamW as in fp32, and relative to fp32's: of the gradients that the
optimisers are given, and of the change of the weights.  AdamW gives weights with small gradients steps as long as
those with large ones, so that small gradients, and their larger errors, count in the change.

The methods with a pilot step have two rows in bf16: their pilot step and derivative in fp32 all the same, or in
autocast, too (`tangent_precision`).

What is printed first says whether the processor has tiles that multiply bfloat16 (AMX).  Without them bf16 saves
nothing, as a rule.  Ratios within one run are what counts: the ways take turns, and the fastest turn of each is taken.
--write stores the table in data/benchmarks/precision.csv.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.influence import seconds
from benchmarks.rivals import batches, learners_of, step_of
from kdlib.learner import Batch, Learner, accelerator_for
from kdlib.methods import METHODS
from kdlib.methods.base import Piloting, Step
from kdlib.methods.theseus import Theseus

FULL, LOW = "fp32", "bf16"
WARM_UP = 5
"""Steps before the one whose error is taken: AdamW's first divides each gradient by itself."""
TABLE = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "precision.csv"

Pair = tuple[Learner, Learner]
Data = tuple[Batch, Batch]
State = list[tuple[dict, dict, dict]]
"""Weights, moments and schedule of each of a pair."""


def pairs(
    method: str, layers: tuple[int, int], hidden: int, made: Mapping[str, Accelerator], tangent: str | None = None
) -> dict[str, tuple[Pair, Callable[[Data], object]]]:
    """Student and teacher for each precision, with the same weights, and their step of a batch and a feedback batch."""
    told: dict[str, Any] = {} if tangent is None else {"tangent_precision": tangent}
    if METHODS[method] is Theseus:
        told["replacing_rate"] = 0.7  # so that some block is the student's at the step that is looked at
    found = {}
    for precision, accelerator in made.items():
        settings, *pair = learners_of(method, layers, hidden, accelerator, **told)
        step = step_of(settings, *pair)
        found[precision] = tuple(pair), partial(_given, step, settings.feedback is not None)
    for precision, ((student, _), _) in found.items():
        with student.accelerator.autocast():
            assert torch.is_autocast_enabled("cpu") == (precision == LOW)
    return found


def accelerators() -> dict[str, Accelerator]:
    """One for each precision.  accelerate keeps that in the process, but an object made for fp32 never asks for it."""
    return {precision: accelerator_for("cpu", precision) for precision in (FULL, LOW)}


def _given(step: Step, feedback: bool, data: Data) -> object:
    return step(*data) if feedback else step(data[0])


def state_of(pair: Pair) -> State:
    """A copy of everything that a step moves."""
    return [deepcopy((who.module.state_dict(), who.optimizer.state_dict(), who.schedule.state_dict())) for who in pair]


def put_back(pair: Pair, state: State) -> None:
    """Give a pair a state that `state_of` has returned."""
    for who, (weights, moments, schedule) in zip(pair, deepcopy(state), strict=True):
        who.module.load_state_dict(weights)
        who.optimizer.load_state_dict(moments)
        who.schedule.load_state_dict(schedule)


def weights_of(who: Learner) -> Tensor:
    """All weights as one vector in float64."""
    return torch.cat([parameter.detach().flatten().double() for parameter in who.module.parameters()])


def moves(step: Callable[[Data], object], pair: Pair, data: Data) -> dict[str, Tensor]:
    """The gradients and the changes of weights of one step, by "<who> gradient" and "<who> update"."""
    found, hooks = {}, []

    def note(who: Learner, *_: object) -> None:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in who.module.parameters()]
        found[f"{who.name} gradient"] = torch.cat([gradient.flatten().double() for gradient in gradients])

    before = [weights_of(who) for who in pair]
    for who in pair:
        optimizer = getattr(who.optimizer, "optimizer", who.optimizer)  # accelerate wraps it
        hooks.append(optimizer.register_step_pre_hook(partial(note, who)))
    with without_dropout(pair):
        step(data)
    for hook in hooks:
        hook.remove()
    for who, old in zip(pair, before, strict=True):
        if f"{who.name} gradient" in found:
            found[f"{who.name} update"] = weights_of(who) - old
    return found


@contextmanager
def without_dropout(pair: Pair) -> Iterator[None]:
    """No dropout inside; the networks stay in training mode, which pilot steps look at."""
    layers = [layer for who in pair for layer in who.module.modules() if isinstance(layer, nn.Dropout)]
    shares = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.p = share


def costs(methods: list[str], layers: tuple[int, int], hidden: int, samples: int, tokens: int, turns: int):
    """The rows of the table."""
    data, made = batches(samples, tokens), accelerators()
    size = {"layers": f"{layers[0]} → {layers[1]}", "hidden": hidden, "batch": samples, "tokens": tokens}
    rows, steps = {}, {}
    for method in methods:
        for tangent in (FULL, "autocast") if issubclass(METHODS[method], Piloting) else (None,):
            both = pairs(method, layers, hidden, made, tangent)
            (exact_pair, exact), (low_pair, low) = both[FULL], both[LOW]
            for _ in range(WARM_UP):
                exact(data)
            put_back(low_pair, state_of(exact_pair))
            expected = moves(exact, exact_pair, data)
            found = moves(low, low_pair, data)
            if (method, FULL, None) not in steps:
                steps[method, FULL, None], rows[method, FULL, None] = exact, {}
            steps[method, LOW, tangent] = low
            rows[method, LOW, tangent] = {
                f"{what} error": ((value - expected[what]).norm() / expected[what].norm()).item()
                for what, value in found.items()
            }
    times: dict[tuple, list[float]] = {case: [] for case in steps}
    for _ in range(turns):
        for case, step in steps.items():
            times[case].append(seconds(partial(step, data), "cpu"))
    return [
        {**size, "method": case[0], "precision": case[1], "tangent": case[2] or "", "seconds": min(times[case]), **row}
        for case, row in rows.items()
    ]


def tidy(rows: list[dict]) -> pd.DataFrame:
    """Costs with their ratio to the same method in fp32."""
    table = pd.DataFrame(rows)
    floor = table[table.precision == FULL].set_index("method")["seconds"]
    table.insert(table.columns.get_loc("seconds") + 1, "seconds / fp32", table.seconds / floor.loc[table.method].values)
    errors = [f"{who} {what} error" for who in ("student", "teacher") for what in ("gradient", "update")]
    return table.round({"seconds": 4, "seconds / fp32": 2} | dict.fromkeys(errors, 4))


def verdict(table: pd.DataFrame) -> str:
    """Which defaults are right on this processor, as a sentence."""
    low = table[table.precision == LOW]
    fast, slow = low["seconds / fp32"].min(), low["seconds / fp32"].max()
    student = low["student gradient error"].max()
    found = (
        f"bf16 takes {fast:.2f} to {slow:.2f} of the time of fp32, with errors of the students' gradients up to "
        f"{student:.1%}: {'bf16 pays' if slow < 0.8 else 'fp32 is the right default'} on this processor"
    )
    kept, lowered = (low[low.tangent == tangent].set_index("method") for tangent in (FULL, "autocast"))
    if len(kept):
        saved = (1 - lowered.seconds / kept.seconds).mean()
        worse = (lowered["teacher gradient error"] / kept["teacher gradient error"]).max()
        right = "autocast" if saved > 0.05 and worse < 1.5 else FULL
        found += (
            f". A tangent in autocast saves {saved:.0%} more and makes the error of the teacher's gradient up to "
            f"{worse:.1f} times as large: {right} is the right default of tangent_precision"
        )
    return found + "."


def main() -> None:
    """Measure and print; with --write, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--layers", type=int, nargs=2, default=(6, 3), help="of the teacher and the student")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    tiles = "with" if torch.cpu._is_amx_tile_supported() else "without"
    print(f"{torch.get_num_threads()} CPU threads {tiles} AMX, torch {torch.__version__}")
    size = arguments.hidden, arguments.batch, arguments.tokens
    table = tidy(costs(arguments.methods, tuple(arguments.layers), *size, arguments.turns))
    print(table.drop(columns=["layers", "hidden", "batch", "tokens"]).to_string(index=False, na_rep=""))
    print(verdict(table))
    if arguments.write:
        table.to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
