"""Batches against what the tokenizer pads, and what is said of words that it does not know."""

from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from kdlib import glue
from kdlib.batches import collate, length_grouped_batches, sequential_batches, to_device, unknown_id, unknown_words

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
PAIRS = glue.generic_task("pairs", ("first", "second"), ("no", "yes"))


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})


def test_a_batch_is_what_the_tokenizer_pads(tokenizer):
    rows = {
        "first": ["a " * (i % 4 + 1) for i in range(7)],
        "second": ["b c " * (i % 3 + 1) for i in range(7)],
        "label": [i % 2 for i in range(7)],
        "row": list(range(10, 17)),
    }
    encoded = glue.encode(Dataset.from_dict(rows), PAIRS, tokenizer, 12)
    assert encoded.input_ids.dtype == torch.int32 and len(encoded) == 7
    indices = [5, 0, 3, 6]
    batch = collate(encoded, indices)
    expected = tokenizer(
        [rows["first"][i] for i in indices], [rows["second"][i] for i in indices],
        padding="longest", truncation=True, max_length=12, return_tensors="pt",
    )  # fmt: skip
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        torch.testing.assert_close(batch[name], expected[name])
        assert batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 0, 1, 0] and batch["rows"].tolist() == [15, 10, 13, 16]
    assert encoded.lengths[indices].tolist() == expected["attention_mask"].sum(1).tolist()
    alone = collate(encoded, [0])
    assert alone["input_ids"].shape == (1, 6) and alone["attention_mask"].all()
    assert to_device(batch, "cpu").keys() == batch.keys()


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 128), min_size=1, max_size=300),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.integers(1, 60),
)
def test_every_sample_is_in_exactly_one_batch(lengths, size, seed, group):
    batches = length_grouped_batches(torch.tensor(lengths), size, torch.Generator().manual_seed(seed), group)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)
    again = length_grouped_batches(torch.tensor(lengths), size, torch.Generator().manual_seed(seed), group)
    assert batches == again
    in_order = sequential_batches(torch.tensor(lengths), size)
    assert sorted(chain.from_iterable(in_order)) == list(range(len(lengths)))
    seen = [lengths[i] for batch in in_order for i in batch]
    assert seen == sorted(lengths)


def test_grouping_saves_padding_and_keeps_chance():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (2000,), generator=generator)

    def fill(batches):
        return float(lengths.sum()) / sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    random_batches = [batch.tolist() for batch in torch.randperm(2000, generator=generator).split(32)]
    epochs = [length_grouped_batches(lengths, 32, generator) for _ in range(2)]
    assert fill(random_batches) < 0.6 < 0.9 < fill(epochs[0])
    assert epochs[0] != epochs[1]
    # Neither long nor short batches come first: the order of lengths is random over the epoch.
    means = [float(lengths[batch].float().mean()) for batch in epochs[0]]
    steps = np.sign(np.diff(means))
    assert 15 < (steps > 0).sum() < 47


def test_up_to_five_unknown_words_are_named(tokenizer):
    assert unknown_words(["a zebra, b", "zebra gnu", "a", "x y z"], tokenizer) == ["zebra", ",", "gnu", "x", "y"]


def test_a_tokenizer_without_a_token_for_unknown_words_knows_all(tokenizer):
    plain = BertTokenizerFast(vocab={**tokenizer.get_vocab()})
    plain.unk_token = plain.sep_token
    assert unknown_id(plain) == -1
    assert unknown_id(tokenizer) == tokenizer.unk_token_id
    plain.unk_token = None
    assert unknown_id(plain) == -1
