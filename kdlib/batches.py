"""Tokenised samples and batches of them, whatever they come from: sentences with labels, or plain text.

Samples are kept without padding, and a batch is padded to its longest sample only.  Here too is what is said of words
that the tokenizer does not know.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib.progress import notice


@dataclass(frozen=True)
class Encoded:
    """A tokenised split, without padding: sample i owns the tokens `offsets[i]` to `offsets[i + 1]`.

    `labels` are int64 classes or float32 scores, `rows` the places in the published split.  `unknown` is the share of
    the word pieces that the tokenizer does not know, special tokens not counted.
    """

    input_ids: Int[Tensor, "tokens"]
    token_type_ids: Int[Tensor, "tokens"]
    offsets: Int[Tensor, "samples_and_one"]
    labels: Shaped[Tensor, "samples"]
    rows: Int[Tensor, "samples"]
    pad_token_id: int
    unknown: float = 0.0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int[Tensor, "samples"]:
        """Tokens per sample, special tokens included."""
        return self.offsets.diff()


def collate(encoded: Encoded, indices: Sequence[int] | Int[Tensor, "batch"]) -> dict[str, Tensor]:
    """The samples at `indices`, padded to the longest of them.

    Returns input_ids, attention_mask and token_type_ids `(batch, tokens)`, labels and rows `(batch,)`; int64 except
    for float32 scores.
    """
    chosen = torch.as_tensor(indices)
    lengths = encoded.lengths[chosen][:, None]
    position = torch.arange(int(lengths.max()))
    mask = position < lengths
    # Past a sample's end this points into its neighbours; the mask throws that away.
    where = (encoded.offsets[chosen][:, None] + position).clamp(max=len(encoded.input_ids) - 1)
    return {
        "input_ids": encoded.input_ids[where].long().masked_fill(~mask, encoded.pad_token_id),
        "attention_mask": mask.long(),
        "token_type_ids": encoded.token_type_ids[where].long().masked_fill(~mask, 0),
        "labels": encoded.labels[chosen],
        "rows": encoded.rows[chosen],
    }


def to_device(batch: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The same batch on `device`."""
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def length_grouped_batches(
    lengths: Int[Tensor, "samples"], batch_size: int, generator: torch.Generator, group: int = 50
) -> list[list[int]]:
    """Cut a random order into batches of samples of similar length, so that little is padded; the batches are shuffled.

    Samples are sorted by length within groups of `group` batches (fewer if that would leave less than four groups).
    Every sample is in exactly one batch, and only one batch may be smaller than `batch_size`.
    """
    lengths = torch.as_tensor(lengths)
    order = torch.randperm(len(lengths), generator=generator)
    group_size = batch_size * max(1, min(group, len(lengths) // (4 * batch_size)))
    grouped = [part[lengths[part].argsort(stable=True)] for part in order.split(group_size)]
    # transformers has such a sampler, but it leaves each group's batches in order of length, longest first.
    batches = [batch.tolist() for part in grouped for batch in part.split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def sequential_batches(lengths: Int[Tensor, "samples"], batch_size: int) -> list[list[int]]:
    """All samples once, shortest first, for evaluation; the caller puts the outputs back in order."""
    return [batch.tolist() for batch in torch.as_tensor(lengths).argsort(stable=True).split(batch_size)]


# ---------------------------------------------------------------------------------------------------------------------
# Unknown words


UNKNOWN_REFUSED = 0.5
"""A text of which more than this share of the word pieces is unknown is refused: nothing can be learnt from it."""
UNKNOWN_NOTABLE = 0.05
"""From this share of unknown word pieces on, a line is printed."""


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a word piece that the tokenizer does not know, −1 if it knows all or has no token for it alone."""
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep", "pad", "bos", "eos", "mask")}
    number = getattr(tokenizer, "unk_token_id", None)
    return -1 if number is None or number in others else number


def unknown_share(
    unknown: int, pieces: int, where: str, tokenizer: PreTrainedTokenizerBase, examples: Callable[[], Sequence[str]]
) -> float:
    """The share of the word pieces of `where` that are unknown; a notable one is printed, with some `examples`.

    Raises ValueError if it is more than UNKNOWN_REFUSED.
    """
    share = unknown / max(pieces, 1)
    if share < UNKNOWN_NOTABLE:
        return share
    words = ", ".join(map(repr, examples()))
    said = f"{share:.0%} of the pieces of {where} are {tokenizer.unk_token}"
    if share > UNKNOWN_REFUSED:
        raise ValueError(
            f"{said}: the tokenizer does not know these words ({words}); give the tokenizer that belongs to the model, "
            "or a model for the language of the text"
        )
    notice(f"{said}: the model cannot tell these words apart ({words})")
    return share


def unknown_words(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int = 5) -> list[str]:
    """The first `count` different words, or parts of words, that the tokenizer does not know."""
    found: dict[str, None] = {}
    number = unknown_id(tokenizer)
    for text in texts:
        if tokenizer.is_fast:
            tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            places = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
            words = [text[start:end] for token, (start, end) in places if token == number]
        else:
            words = [word for word in text.split() if number in tokenizer(word, add_special_tokens=False)["input_ids"]]
        found |= dict.fromkeys(word[:20] for word in words)
        if len(found) >= count:
            break
    return list(found)[:count]
