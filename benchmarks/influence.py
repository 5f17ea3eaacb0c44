"""What do the influences of one batch cost?  Every way to compute them against one training step of the student.

    python benchmarks/influence.py [--quick] [--device cuda] [--hidden 128 384] [--batches 8 32 128] [--tokens 16 64]

The first table holds, for each way, seconds and the peak of memory above what was in use before, both also as a
multiple of one training step (forward, backward, a plain gradient update) on the same batch.  Ratios within one run are
what counts: all ways take turns on the same machine, and the fastest turn is taken, the one that other processes
disturbed least.  A way that would need more than `--limit` gigabytes is left out, one that takes longer than `--limit`
seconds has fewer turns.

--write stores the first table in data/benchmarks/influence.csv, which chapter 3 shows.

The second table holds the relative error of the tangent against float64, in float32 and in bfloat16 autocast.
"""

import argparse
import time
import weakref
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertForSequenceClassification

from kdlib import influence, losses, models, pilot
from kdlib.tangent import RADIUS, feedback_gradient, influence_along, student_tangent

CLASSES, WORDS, LAYERS = 3, 30522, 3  # BERT's vocabulary: a gradient has as many rows, whatever the sentence
OBJECTIVE = partial(losses.kl_divergence, temperature=2.0, reduction="none")
STEP = "training step"
TABLE = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "influence.csv"


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside the `with` block held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Run the operation and note the memory that is new in its results."""
        held = {tensor.untyped_storage()._cdata for tensor in tree_leaves((arguments, options)) if _dense(tensor)}
        results = function(*arguments, **(options or {}))
        for tensor in filter(_dense, tree_leaves(results)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen and storage._cdata not in held:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return results

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The peak of memory during a call, above what was in use before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with Peak() as peak:
        function()
    return peak.most


def seconds(function: Callable[[], object], device: str) -> float:
    """The time of one call."""
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def network(hidden: int, device: str) -> BertForSequenceClassification:
    """A student of three layers with random weights, in training mode as training finds it."""
    torch.manual_seed(0)
    config = models.tiny_config(f"tiny-{LAYERS}x{hidden}", WORDS, CLASSES)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    student = BertForSequenceClassification._from_config(config, attn_implementation=models.FAST_ATTENTION)
    return student.to(device).train()


def random_batch(samples: int, tokens: int, device: str, seed: int, words: int = WORDS) -> dict[str, Tensor]:
    """Sequences of half to all of `tokens` random words, padded, with labels and a teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(tokens // 2, tokens + 1, (samples, 1), generator=generator)
    lengths[0] = tokens
    batch = {
        "input_ids": torch.randint(5, words, (samples, tokens), generator=generator),
        "attention_mask": (torch.arange(tokens) < lengths).long(),
        "labels": torch.randint(0, CLASSES, (samples,), generator=generator),
        "teacher_logits": torch.randn(samples, CLASSES, generator=generator),
    }
    return {name: value.to(device) for name, value in batch.items()}


def loss(outputs: models.Outputs, batch: dict[str, Tensor]) -> Tensor:
    """The objective as a loss of outputs and batch."""
    return OBJECTIVE(outputs.logits, batch["teacher_logits"])


def ways(student: torch.nn.Module, batch: dict, direction: dict) -> dict[str, Callable[[], Tensor | None]]:
    """Each way to the influences of the batch along `direction`, and the training step they are compared with."""
    parameters = models.trainable(student)

    def training_step() -> None:
        # With the fast attention, as in training, and a learning rate of zero, so that every turn sees the same.
        loss(models.apply(student, {}, batch), batch).mean().backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.sub_(parameter.grad, alpha=0.0)
        student.zero_grad()

    def from_gradients(method: str) -> Tensor:
        samples = len(batch["labels"])
        if method == "loop":  # one gradient at a time: their inner products are all that is kept
            rows = ({name: value[i : i + 1] for name, value in batch.items()} for i in range(samples))
            gradients = (pilot.gradient(student, parameters, row, loss) for row in rows)
            return torch.stack([sum((row[n] * direction[n]).sum() for n in direction) for row in gradients])
        gradients = influence.per_sample_gradients(student, parameters, batch, loss, "vmap")
        return sum(gradients[name].flatten(1) @ direction[name].flatten() for name in direction)

    found = {STEP: training_step, **{f"per sample, {m}": partial(from_gradients, m) for m in ("loop", "vmap")}}
    for method in ("double-backward", "finite-difference", "jvp"):
        found[method] = partial(influence_along, student, parameters, batch, loss, direction, method)
    return found


def costs(hidden: int, samples: int, tokens: int, device: str, turns: int, limit: float) -> list[dict]:
    """The rows of the first table for one width and one batch size."""
    student = network(hidden, device)
    batch, feedback = (random_batch(samples, tokens, device, seed) for seed in (0, 1))
    direction = feedback_gradient(student, models.trainable(student), feedback)
    functions = ways(student, batch, direction)
    size = sum(value.nbytes for value in direction.values())
    if 2 * samples * size > limit * 1e9:
        del functions["per sample, vmap"]
    reference, rows = functions["jvp"](), {}
    for name, function in functions.items():
        result = function()  # warms up
        if name != STEP:
            error = ((result - reference).norm() / reference.norm()).item()
            assert error < 0.02, f"{name} disagrees with jvp by {error:.1%}"
        rows[name] = {
            "tokens": tokens,
            "hidden": hidden,
            "batch": samples,
            "way": name,
            "bytes": peak_bytes(function, device),
        }
    times = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            if sum(times[name]) < limit:
                times[name].append(seconds(function, device))
    for name, row in rows.items():
        row["seconds"] = min(times[name])
    return list(rows.values())


def tidy(rows: list[dict]) -> pd.DataFrame:
    """Costs with their ratios to the training step and to the loop, one row for each width, batch and way."""
    table, case = pd.DataFrame(rows), ["tokens", "hidden", "batch"]
    for column in ("seconds", "bytes"):
        steps = table[table.way == STEP].set_index(case)[column]
        table[f"{column} / step"] = table[column] / steps.loc[list(table[case].itertuples(index=False))].to_numpy()
    loops = table[table.way == "per sample, loop"].set_index(case).seconds
    table["faster than loop"] = loops.loc[list(table[case].itertuples(index=False))].to_numpy() / table.seconds
    table["MB"] = table.pop("bytes") / 1e6
    columns = [*case, "way", "seconds", "seconds / step", "faster than loop", "MB", "bytes / step"]
    return table[columns].round({"seconds": 4, "seconds / step": 2, "faster than loop": 1, "MB": 1, "bytes / step": 2})


def errors(hidden: int, tokens: int, device: str, samples: int = 16) -> pd.DataFrame:
    """Relative error of the logits' tangent against jvp in float64, by precision, method and radius."""
    student, batch = network(hidden, device), random_batch(samples, tokens, device, 0)
    parameters = models.trainable(student)
    direction = feedback_gradient(student, parameters, random_batch(samples, tokens, device, 1))
    student.double()
    wide = {name: value.double() for name, value in direction.items()}
    expected = student_tangent(student, models.trainable(student), batch, wide)[1].logits
    student.float()
    settings = [("jvp", None), ("double-backward", None)]
    settings += [("finite-difference", radius) for radius in (1e-1, 1e-2, 1e-3, 1e-4)]
    rows = []
    for method, radius in settings:
        row = {"method": method, "radius": radius}
        for precision in ("float32", "bfloat16"):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                tangent = student_tangent(
                    student, models.trainable(student), batch, direction, method, radius or RADIUS
                )[1].logits
            row[precision] = f"{((tangent.double() - expected).norm() / expected.norm()).item():.1e}"
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case, in seconds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--hidden", type=int, nargs="*", default=(128, 384))
    parser.add_argument("--batches", type=int, nargs="*", default=(8, 16, 32, 64, 128))
    parser.add_argument("--tokens", type=int, nargs="*", default=(16, 64), help="the longest sequences")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--limit", type=float, default=4.0, help="gigabytes for vmap; seconds for the turns of one way")
    parser.add_argument("--write", action="store_true", help="store the first table for chapter 3")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.hidden, arguments.batches, arguments.turns = (16,), (64,), (8, 32), 1
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    title = f"{LAYERS} layers, float32, {where}, torch {torch.__version__}"
    print(title)
    rows = []
    for tokens, hidden, samples in product(arguments.tokens, arguments.hidden, arguments.batches):
        rows += costs(hidden, samples, tokens, arguments.device, arguments.turns, arguments.limit)
    table = tidy(rows)
    print(table.to_string(index=False))
    if arguments.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(f"# {title}\n{table.to_csv(index=False)}")
    for hidden in arguments.hidden:
        print(f"\nrelative error of the tangent, hidden {hidden}")
        print(errors(hidden, max(arguments.tokens), arguments.device).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
