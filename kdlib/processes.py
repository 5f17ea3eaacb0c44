"""A run on several processes: each computes some rows of a batch, and everybody knows the whole.

What is cut is the passes of the networks, not the mathematics.  A process runs its own rows of a batch and gathers the
answers to the others', so that losses, influences and what compares samples with each other see the whole batch
everywhere.  The answers to the own rows come with their graph, all others as constants: a backward pass gives the part
of the gradient that goes through the own rows, and the sum over the processes is the whole gradient.

`join` makes this process one of those that torchrun or accelerate started.  In a single process everything here is the
identity, and nothing is sent.
"""

import itertools
import math
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others; much longer than a process that works on anything needs to say so."""
HEARTBEAT = 20.0
"""Seconds after which the first process tells those who wait that it is still at work."""
LAUNCHED = "WORLD_SIZE"
MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_words: dist.ProcessGroup | None = None
"""The group for flags and objects, which are on the CPU whatever the device; None: this process is alone."""


class ProcessLostError(RuntimeError):
    """Another process of this run has ended, or does not answer."""


def join(device: str = "auto") -> None:
    """Take part in the run of all processes that were started with this one, if there are others.

    They talk by gloo on CPUs and by NCCL on GPUs, one each.

    Raises RuntimeError if MPI started this process as one of several, and ValueError for more processes than GPUs.
    """
    global _words
    others = int(os.environ.get(LAUNCHED) or 1)
    for name in MPI if others == 1 else ():
        if (found := os.environ.get(name, "1")) not in ("", "1"):
            raise RuntimeError(
                f"this process is one of {found} ({name} is set), but MPI is not spoken here: start them by "
                "torchrun --nproc_per_node or accelerate launch --num_processes"
            )
    if others == 1 or _words is not None:
        return
    cpu = device == "cpu" or not torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or others)
    if not cpu and torch.cuda.device_count() < here:
        raise ValueError(
            f"{here} processes were started on a machine with {torch.cuda.device_count()} GPUs: start one for each "
            "GPU, or give device 'cpu'"
        )
    with _talking():
        PartialState(cpu=cpu, timeout=PATIENCE)
        _words = dist.new_group(backend="gloo", timeout=PATIENCE)


def leave() -> None:
    """Be a single process again."""
    global _words
    if _words is not None:
        _words = None
        dist.destroy_process_group()
        PartialState._reset_state()


def world_size() -> int:
    """How many processes compute this run."""
    return 1 if _words is None else dist.get_world_size()


def rank() -> int:
    """The number of this one, from 0."""
    return 0 if _words is None else dist.get_rank()


def is_first() -> bool:
    """Whether this is the process that writes and reports, also before it has joined the others."""
    return rank() == 0 if _words is not None else int(os.environ.get("RANK") or 0) == 0


@contextmanager
def _talking() -> Iterator[None]:
    """Put what gloo and NCCL say when somebody is gone into one sentence."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        reason = re.sub(r"^\[[^]]*\] ?", "", first).split(". ")[0]  # without the place in gloo's source, and its advice
        raise ProcessLostError(
            f"another process of this run is gone ({reason}): start the same command again, it goes on from the "
            "checkpoint"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Part:
    """The rows of a batch that this process computes.

    With fewer rows than processes some are idle: they compute the first row, so that there are answers of the right
    form and a graph, and leave it out of what is gathered.
    """

    samples: int

    @property
    def sizes(self) -> list[int]:
        """How many rows each process has."""
        return [self.samples // world_size() + (number < self.samples % world_size()) for number in range(world_size())]

    @property
    def idle(self) -> bool:
        """Whether this process has no row of its own."""
        return self.sizes[rank()] == 0

    @property
    def rows(self) -> slice:
        """Those that are computed here."""
        before = sum(self.sizes[: rank()])
        return slice(0, 1) if self.idle else slice(before, before + self.sizes[rank()])

    def own(self, tree: T) -> T:
        """The rows of this process, of all tensors of a tree."""
        if world_size() == 1:
            return tree
        return tree_map(lambda value: value[self.rows] if isinstance(value, Tensor) else value, tree)

    def gathered(self, tree: T, counts: Sequence[int] | None = None) -> T:
        """The values of all rows, in order, given those of `own` rows: these with their graph, others as constants.

        `counts` says how many entries each process has, if not one a row.
        """
        if world_size() == 1:
            return tree
        counts = counts or self.sizes
        leaves, structure = tree_flatten(tree)
        own = [leaf[: counts[rank()]] for leaf in leaves]
        parts = [*zip(*_exchanged(own, counts), strict=True)]
        whole = [
            torch.cat([mine if number == rank() else other for number, other in enumerate(others)])
            for mine, others in zip(own, parts, strict=True)
        ]
        return tree_unflatten(whole, structure)

    def averaged(self, mean: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The mean of all entries, given the mean of those of this process, a scalar; see `gathered`."""
        if world_size() == 1:
            return mean
        counts = counts or self.sizes
        if counts[rank()] == 0:
            mean = 0 * mean.nan_to_num()  # still with a graph
        means = Part(world_size()).gathered(mean.view(1))
        return (means * means.new_tensor(counts)).sum() / sum(counts)

    def counts(self, chosen: Tensor) -> list[int]:
        """How many entries of a mask `(rows, …)` are chosen in the rows of each process."""
        return [int(rows.sum()) for rows in chosen.split(self.sizes)]

    def chosen(self, mask: Tensor) -> slice:
        """Which of the chosen entries of a mask, counted through the whole batch, are in the rows of this process."""
        before = int(mask[: self.rows.start].sum())
        return slice(before, before + int(mask[self.rows].sum()))


def part(tree: Any) -> Part:
    """What of a batch, or of any tree of tensors with a row for each sample, this process computes."""
    return Part(len(next(value for value in tree_leaves(tree) if isinstance(value, Tensor))))


def by_rows(function: Callable[..., T], *trees: Any) -> T:
    """`function(*trees)`, whose answer has an entry for each row of the trees; each process computes its own rows."""
    if world_size() == 1:
        return function(*trees)
    own = part(trees)
    return own.gathered(function(*own.own(trees)))


def _exchanged(own: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """For each process its tensors, which have `counts` rows; as bytes, so that the type does not matter."""
    widths = [leaf.element_size() * math.prod(leaf.shape[1:]) for leaf in own]
    sent = torch.cat([leaf.detach().contiguous().view(-1).view(torch.uint8) for leaf in own])
    padded = sent.new_zeros(max(counts) * sum(widths))
    padded[: len(sent)] = sent
    received = [torch.empty_like(padded) for _ in counts]
    with _talking():
        dist.all_gather(received, padded, group=_speaking(padded))
    found = []
    for count, everything in zip(counts, received, strict=True):
        ends = [0, *itertools.accumulate(count * width for width in widths)]
        pieces = [everything[start:end].clone() for start, end in itertools.pairwise(ends)]
        found.append(
            [piece.view(leaf.dtype).view(count, *leaf.shape[1:]) for piece, leaf in zip(pieces, own, strict=True)]
        )
    return found


def _speaking(tensor: Tensor) -> dist.ProcessGroup | None:
    """The group that sends tensors of this device; None is the default one."""
    return _words if tensor.device.type == "cpu" else None


def summed(tree: T) -> T:
    """The sums of the tensors of a tree over all processes: whole gradients, given the parts through the own rows."""
    if world_size() == 1:
        return tree
    leaves, structure = tree_flatten(tree)
    found: dict[int, Tensor] = {}
    for dtype in {leaf.dtype for leaf in leaves}:
        places = [number for number, leaf in enumerate(leaves) if leaf.dtype == dtype]
        flat = torch.cat([leaves[number].detach().reshape(-1) for number in places])
        with _talking():
            dist.all_reduce(flat, group=_speaking(flat))
        pieces = flat.split([leaves[number].numel() for number in places])
        found |= {number: piece.view_as(leaves[number]) for number, piece in zip(places, pieces, strict=True)}
    return tree_unflatten([found[number] for number in range(len(leaves))], structure)


def from_first(value: Tensor) -> Tensor:
    """The first process's tensor, everywhere: what is drawn must be one draw."""
    if world_size() == 1:
        return value
    value = value.contiguous()
    with _talking():
        dist.broadcast(value, 0, group=_speaking(value))
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Words


def anybody(flag: bool) -> bool:
    """Whether the flag is up in any process."""
    if world_size() == 1:
        return flag
    word = torch.tensor(int(flag))
    with _talking():
        dist.all_reduce(word, dist.ReduceOp.MAX, group=_words)
    return bool(word)


def told(value: T) -> list[T]:
    """What each process says, by its number."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _talking():
        dist.all_gather_object(found, value, group=_words)
    return found


def check_equal(values: dict[str, Any]) -> None:
    """Raise RuntimeError, naming what differs, unless all processes have the same values."""
    everybody = told(values)
    differing = [name for name in values if any(other.get(name) != values[name] for other in everybody)]
    if differing:
        raise RuntimeError(
            f"the processes of this run differ in {', '.join(differing)}: they must read the same files, with the same "
            "versions of everything, on the same kind of machine"
        )


def once(work: Callable[[], T]) -> T:
    """What `work` returns, done by the first process while the others wait, however long it takes.

    What it raises is raised everywhere.  `work` must not talk to the other processes.
    """
    if world_size() == 1:
        return work()
    outcome: tuple[Any, BaseException | None] | None = None
    if rank() > 0:
        while outcome is None:
            outcome = _say(None)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]
    with _heard():
        try:
            outcome = work(), None
        except BaseException as error:  # Ctrl-C too: the others must not wait
            raised, outcome = error, (None, _portable(error))
    _say(outcome)
    if outcome[1] is not None:
        raise raised
    return outcome[0]


def first_alone(work: Callable[[], T]) -> T:
    """`work` by the first process, then by all others: what the first one puts into a cache the others find there."""
    if world_size() == 1:
        return work()
    kept: list[T] = []
    once(lambda: kept.append(work()))
    return kept[0] if kept else work()


def _say(value: Any) -> Any:
    """The first process's object, everywhere."""
    words = [value]
    with _talking():
        dist.broadcast_object_list(words, 0, group=_words)
    return words[0]


@contextmanager
def _heard() -> Iterator[None]:
    """Tell those who wait that this process is still at work, again and again."""
    over = threading.Event()
    lost: list[BaseException] = []

    def speak() -> None:
        while not over.wait(HEARTBEAT):
            try:
                _say(None)
            except ProcessLostError as error:
                lost.append(error)
                return

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()
    if lost:
        raise lost[0]


def _portable(error: BaseException) -> BaseException:
    """The error if it can be sent, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever an error's constructor may want
        return RuntimeError(f"{type(error).__name__}: {error}")
