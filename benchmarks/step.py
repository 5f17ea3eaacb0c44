"""What does a step cost whose teacher learns, too?  MetaDistil, LGTM and IKD against online distillation.

    python benchmarks/step.py [--device cuda --precision bf16] [--hidden 384] [--layers 6 3] [--tokens 64 128]

Seconds of a whole step, real updates by AdamW included, and two kinds of memory: what autograd saves for its backward
passes, at the worst moment ("saved"), and all tensors that a step makes, at the worst moment ("peak", on a GPU as the
allocator sees it).  Both also as multiples of the floor, online distillation.  There are two floors: with the teacher
first, as in LGTM eq. (4) and ProKT, which asks both networks once more for predictions, and both at once, as in mutual
learning, which runs each network forward and backward once and no more.

LGTM and IKD come with what their papers do, or their code, and with what would bring them closer to the floor.  "In two
pieces" are the gradients of pilot and feedback, see `pilot_pieces` of `metadistil`.

Beside the seconds stands the limit: what the passes of such a step cost alone.  They are counted by hooks, and priced
by a forward and a backward pass of each network that were timed in the same run, with dropout and without.  A pass that
carries a tangent along is three forward passes, as many products as a forward and a backward pass have: a layer y = Wx
has the tangent Wẋ + Ẇx, since the weights move as well as what comes in.  What a step takes more are its losses,
optimisers and Python.

Ratios within one run are what counts: the ways take turns, and the fastest turn of each is taken.
--write stores the table in data/benchmarks/step.csv.
"""

import argparse
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.influence import CLASSES, peak_bytes, random_batch, seconds
from kdlib import models, pilot
from kdlib.learner import Batch, Learner, accelerator_for, learner
from kdlib.methods.base import Step
from kdlib.methods.ikd import IKD, ikd
from kdlib.methods.kd import KD
from kdlib.methods.lgtm import LGTM, lgtm
from kdlib.methods.metadistil import MetaDistil, metadistil
from kdlib.methods.online import ProKT, online_distillation
from kdlib.models import detached

WORDS = 1000  # few, so that the layers are what is measured
FLOOR, AT_ONCE = "online, teacher first", "online, both at once"
DOUBLE, RELEASED = "MetaDistil, double backward", "LGTM, released structure"
EVERY_OTHER = "LGTM, every second step, central difference"
TABLE = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "step.csv"
IMITATION = KD().loss


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes that autograd kept for backward passes at one time, weights not counted."""

    def __init__(self, modules: list[nn.Module]):
        super().__init__(self._pack, lambda packed: packed[0])
        self.weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
        self.users: dict[int, int] = {}
        self.now = self.most = 0

    def _pack(self, tensor: Tensor) -> list[Tensor]:
        storage = tensor.untyped_storage()
        packed = _Packed([tensor])
        if storage._cdata not in self.weights:
            if not self.users.get(storage._cdata):
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
            self.users[storage._cdata] = self.users.get(storage._cdata, 0) + 1
            weakref.finalize(packed, self._free, storage._cdata, storage.nbytes())
        return packed

    def _free(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if self.users[key] == 0:
            self.now -= size


class _Packed(list):
    """A list that can be referred to weakly."""


class Passes:
    """Counts how the networks run in a step, by (who, with dropout?, kind), the kinds those of `prices`."""

    def __init__(self, *learners: Learner):
        self.counts: Counter[tuple[str, bool, str]] = Counter()
        self.learners, self.hooks = learners, []

    def __enter__(self) -> "Passes":
        for who in self.learners:
            self.hooks.append(who.module.register_forward_hook(partial(self._ran, who.name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _ran(self, name: str, module: nn.Module, _: object, output: SequenceClassifierOutput) -> None:
        case, logits = (name, module.training), output.logits
        if forward_ad.unpack_dual(logits).tangent is not None:
            self.counts[*case, "forward"] += 3
        elif logits.requires_grad:
            self.counts[*case, "forward for a backward"] += 1
            logits.register_hook(lambda _: self.counts.update([(*case, "backward")]))
        else:
            self.counts[*case, "forward"] += 1


def passes_alone(who: Learner, batch: Batch) -> dict[tuple[str, bool, str], Callable[[], object]]:
    """What is timed to price the passes of a network: a forward pass, one that keeps a graph, one with a backward."""

    def run(dropout: bool, kind: str) -> None:
        mode = nullcontext() if dropout else models.evaluating(who.module)
        with mode, who.accelerator.autocast(), torch.set_grad_enabled(kind != "forward"):
            logits = models.logits(who.module, batch)
        if kind == "backward":
            torch.autograd.grad(logits.float().square().mean(), list(who.module.parameters()))

    kinds = ("forward", "forward for a backward", "backward")
    return {(who.name, dropout, kind): partial(run, dropout, kind) for dropout in (False, True) for kind in kinds}


def limit(counts: Mapping[tuple[str, bool, str], int], alone: Mapping[tuple[str, bool, str], float]) -> float:
    """The seconds of these passes."""
    total = 0.0
    for (name, dropout, kind), count in counts.items():
        price = alone[name, dropout, kind]
        if kind == "backward":
            price -= alone[name, dropout, "forward for a backward"]
        total += count * price
    return total


def learners(layers: tuple[int, int], hidden: int, device: str, precision: str) -> tuple[Learner, Learner]:
    """A student and a teacher with random weights and BERT's dropout, with their optimisers."""
    accelerator, made = accelerator_for(device, precision), []
    for name, depth in zip(("student", "teacher"), reversed(layers), strict=True):
        torch.manual_seed(0)
        config = models.tiny_config(f"tiny-{depth}x{hidden}", WORDS, CLASSES)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
        config.max_position_embeddings = 512
        module = BertForSequenceClassification._from_config(config, attn_implementation=models.FAST_ATTENTION).train()
        made.append(learner(name, module, accelerator, 1e-5, 1000, warmup_ratio=0.0))
    return made[0], made[1]


def double_backward(student: Learner, teacher: Learner) -> Step:
    """MetaDistil with the derivative taken the direct way: through a graph of the pilot step."""

    def step(batch: Batch, feedback: Batch) -> dict[str, float]:
        module, rate = student.module, student.optimizer.param_groups[0]["lr"]

        def quiz(_: Batch) -> Tensor:
            with models.evaluating(teacher.module):
                answers = models.outputs(teacher.module, batch)
            taught = lambda outputs, batch: IMITATION(outputs, answers, batch["labels"])  # noqa: E731
            moved = pilot.sgd_step(module, models.trainable(module), batch, taught, rate, create_graph=True)
            with models.evaluating(module), models.exact_attention(module):
                return pilot.task_loss(models.apply(module, moved, feedback), feedback)

        def lesson(piece: Batch) -> Tensor:
            answers = models.targets(teacher.module, piece)
            return IMITATION(models.outputs(module, piece), answers, piece["labels"])

        return {"feedback_loss": teacher.minimise(quiz, batch), "loss": student.minimise(lesson, batch)}

    return step


def released_structure(student: Learner, teacher: Learner, rate: float = 3e-5) -> Step:
    """LGTM in the passes of the code released with it: four forward and three backward passes of the teacher, five and
    three of the student, a copy of the student and of its optimiser's state, weights moved in place.
    """

    def shifted_gradient(batch: Batch, direction: dict[str, Tensor], distance: float) -> list[Tensor]:
        """The gradient of the teacher's loss beside a student that was moved along `direction`."""
        for name, parameter in student.module.named_parameters():
            parameter.data.add_(direction[name], alpha=distance)
        with models.evaluating(student.module), models.evaluating(teacher.module):
            ours = models.targets(student.module, batch)
            loss = IMITATION(models.outputs(teacher.module, batch), ours, batch["labels"]).mean()
        return list(torch.autograd.grad(loss, list(teacher.module.parameters())))

    def step(batch: Batch, feedback: Batch) -> dict[str, float]:
        autocast, named = student.accelerator.autocast, dict(student.module.named_parameters())
        with autocast():
            ours, theirs = (models.outputs(who.module, batch) for who in (student, teacher))
            lesson = IMITATION(ours, detached(theirs), batch["labels"]).mean()
            slopes = dict(zip(named, torch.autograd.grad(lesson, list(named.values())), strict=True))
            IMITATION(theirs, detached(ours), batch["labels"]).mean().backward()
            unrolled = copy.deepcopy(student.module)
            state = copy.deepcopy(pilot.adamw_state(student.optimizer, named))
            unrolled.load_state_dict(pilot.adamw(named, slopes, state), strict=False)
            quiz = pilot.task_loss(models.outputs(unrolled, feedback), feedback).mean()
            values = torch.autograd.grad(quiz, list(unrolled.parameters()))
            direction = dict(zip(named, values, strict=True))
            radius = 0.01 / torch.stack([value.norm() for value in values]).norm().item()
            ahead = shifted_gradient(batch, direction, radius)
            behind = shifted_gradient(batch, direction, -2 * radius)
            for name, parameter in named.items():
                parameter.data.add_(direction[name], alpha=radius)
        for parameter, one, other in zip(teacher.module.parameters(), ahead, behind, strict=True):
            parameter.grad.sub_(one - other, alpha=rate / (2 * radius))
        teacher.optimizer.step()
        teacher.optimizer.zero_grad()
        taught = lambda piece: IMITATION(  # noqa: E731
            models.outputs(student.module, piece), models.targets(teacher.module, piece), piece["labels"]
        )
        return {"loss": student.minimise(taught, batch), "feedback_loss": quiz.item()}

    return step


def ways(student: Learner, teacher: Learner) -> dict[str, Step]:
    """A step of each kind for the same two networks."""

    def meta(**changes) -> Step:
        return metadistil(student, teacher, MetaDistil(tangent_precision="autocast", **changes))

    def good(**changes) -> Step:
        return lgtm(student, teacher, LGTM(tangent_precision="autocast", **changes))

    def told(**changes) -> Step:
        return ikd(student, teacher, IKD(tangent_precision="autocast", **changes))

    central, forward = {"tangent": "finite-difference"}, {"tangent": "forward-difference"}
    return {
        FLOOR: online_distillation(student, teacher, ProKT()),
        AT_ONCE: online_distillation(student, teacher, ProKT(first="simultaneous")),
        DOUBLE: double_backward(student, teacher),
        "MetaDistil, jvp": meta(),
        "MetaDistil, jvp, in two pieces": meta(pilot_pieces=2),
        "MetaDistil, central difference": meta(**central),
        "MetaDistil, central difference, in two pieces": meta(**central, pilot_pieces=2),
        "MetaDistil, forward difference": meta(**forward),
        RELEASED: released_structure(student, teacher),
        "LGTM, jvp": good(),
        "LGTM, central difference": good(**central),
        "LGTM, central difference, in two pieces": good(**central, pilot_pieces=2),
        "LGTM, forward difference": good(**forward),
        "LGTM, last layer, forward difference": good(**forward, feedback_layers=1),
        EVERY_OTHER: good(**central, feedback_every=2),
        "IKD, exact, central difference": told(feedback_at="after", **central),
        "IKD, shortcut, central difference": told(**central),
    }


def costs(layers: tuple[int, int], hidden: int, samples: int, tokens: int, device: str, precision: str, turns: int):
    """The rows of the table for one size."""
    student, teacher = learners(layers, hidden, device, precision)
    device = str(student.accelerator.device)
    batch, feedback = (
        {**random_batch(samples, tokens, device, seed, WORDS), "rows": torch.arange(samples)} for seed in (0, 1)
    )
    for data in (batch, feedback):
        data["token_type_ids"] = torch.zeros_like(data["input_ids"])
        del data["teacher_logits"]
    calls: dict[str, Callable[[], object]] = {}
    for name, step in ways(student, teacher).items():
        alone = name in (FLOOR, AT_ONCE) or name.startswith("IKD")  # the course is the exam
        call = partial(step, batch) if alone else partial(step, batch, feedback)
        calls[name] = partial(_twice, call) if name == EVERY_OTHER else call
    rows, counts = {}, {}
    single = {**passes_alone(student, batch), **passes_alone(teacher, batch)}
    for call in (*calls.values(), *single.values()):
        call()  # warms up, and makes the optimisers' moments
    for name, call in calls.items():
        with Passes(student, teacher) as passes:
            call()
        counts[name] = passes.counts
        saved = Saved([student.module, teacher.module])
        with saved:
            call()
        size = {"layers": f"{layers[0]} → {layers[1]}", "hidden": hidden, "batch": samples, "tokens": tokens}
        where = {"device": device, "precision": precision, "way": name}
        rows[name] = {**size, **where, "saved": saved.most, "peak": peak_bytes(call, device)}
    timed = {**calls, **single}
    times = {name: [] for name in timed}
    for _ in range(turns):
        for name, call in timed.items():
            times[name].append(seconds(call, device))
    alone = {name: min(times[name]) for name in single}
    for name, row in rows.items():
        steps = 2 if name == EVERY_OTHER else 1
        row["seconds"], row["limit"] = min(times[name]) / steps, limit(counts[name], alone) / steps
    return list(rows.values())


def _twice(call: Callable[[], object]) -> None:
    call()
    call()


def tidy(rows: list[dict]) -> pd.DataFrame:
    """Costs with their ratios to both floors, to double backward and to the released structure."""
    table = pd.DataFrame(rows)
    case = ["layers", "hidden", "batch", "tokens", "device", "precision"]
    keys = list(table[case].itertuples(index=False, name=None))
    against = {"first": FLOOR, "at once": AT_ONCE, "double": DOUBLE, "released": RELEASED}
    for column, (short, reference) in product(("seconds", "saved"), against.items()):
        name = f"{column} / {short}"
        of = table[table.way == reference].set_index(case)[column]
        table[name] = table[column] / of.loc[keys].to_numpy()
    table["seconds / limit"] = table["seconds"] / table["limit"]
    table["saved MiB"], table["peak MiB"] = table.pop("saved") / 2**20, table.pop("peak") / 2**20
    ratios = [column for column in table if " / " in column]
    table = table[[*case, "way", "seconds", "limit", "saved MiB", "peak MiB", *ratios]]
    return table.round({"seconds": 4, "limit": 4, "saved MiB": 1, "peak MiB": 1} | dict.fromkeys(ratios, 2))


def main() -> None:
    """Measure and print; with --write, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--layers", type=int, nargs=2, default=(6, 3), help="of the teacher and the student")
    parser.add_argument("--hidden", type=int, nargs="+", default=[384])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for hidden, tokens in product(arguments.hidden, arguments.tokens):
        place = arguments.device, arguments.precision, arguments.turns
        rows += costs(tuple(arguments.layers), hidden, arguments.batch, tokens, *place)
    table = tidy(rows)
    print(table.drop(columns=["device", "precision"]).to_string(index=False))
    if arguments.write:
        table.drop(columns="device").to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
