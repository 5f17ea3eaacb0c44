"""MiniGLUE: the shipped bytes, the grammars against readers written independently of them, and the data card.

Each reader below goes back from the text to the meaning, so that a change of a grammar that leaves the stored posterior
at odds with the words is caught in the shipped rows themselves.
"""

import functools
import hashlib
import itertools
import json
import math
import random
import re
import runpy
import sys
from collections import Counter

import datasets
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

from benchmarks import miniglue_gap
from kdlib import doctor, glue
from kdlib.miniglue import ORACLE, TASK_NAMES, folder, tokenizer
from tools import miniglue
from tools.miniglue import Claim, Event, Wording

CLASSIFICATION = ("mini-sst2", "mini-mrpc", "mini-mnli")
DATA = folder()
each_task = pytest.mark.parametrize("task", TASK_NAMES)


@functools.cache
def shipped(task):
    """The rows of a task by split, read from the repository's files without kdlib.glue."""
    return {
        split: [
            json.loads(line)
            for path in sorted((DATA / task).glob(f"{split}-*.jsonl"))
            for line in path.read_text("utf-8").splitlines()
        ]
        for split in miniglue.SIZES
    }


def every_row(task):
    return list(itertools.chain.from_iterable(shipped(task).values()))


def texts(task, row):
    return tuple(row[column] for column in glue.TASKS[task].text_columns)


def column(rows, name):
    return np.array([row[name] for row in rows])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def hashes(folder):
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()}


def test_the_grammar_writes_the_files_whose_hashes_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["miniglue", str(tmp_path)])
    runpy.run_path(miniglue.__file__, run_name="__main__")
    assert hashes(tmp_path) == doctor.miniglue_hashes(), "run sha256sum in the new folder for kdlib/miniglue.sha256"
    assert all(len(content) < 600_000 and b"\r" not in content for content in contents(tmp_path).values())


def test_the_shipped_files_are_those_of_the_list(root):
    shipped = hashes(root / "data" / "miniglue")
    del shipped["README.md"]
    assert shipped == doctor.miniglue_hashes()


@pytest.mark.parametrize("arguments", [[], ["one", "two"]])
def test_the_command_line_wants_a_folder(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["miniglue", *arguments])
    with pytest.raises(SystemExit, match=r"usage: python -m tools\.miniglue FOLDER"):
        runpy.run_path(miniglue.__file__, run_name="__main__")


@each_task
def test_datasets_reads_the_folder_as_the_card_says(root, tmp_path, task):
    loaded = datasets.load_dataset(str(root / "data" / "miniglue"), task, cache_dir=str(tmp_path))
    expected = glue.TASKS[task]
    names = expected.label_names
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
    assert {split: len(rows) for split, rows in loaded.items()} == miniglue.SIZES
    for split, rows in loaded.items():
        assert rows.features == {
            **dict.fromkeys(expected.text_columns, datasets.Value("string")),
            "label": label,
            "idx": datasets.Value("int32"),
            "posterior": datasets.List(datasets.Value("float64")),
            "clean_label": label,
            "difficulty": datasets.Value("float64"),
            "flipped": datasets.Value("bool"),
        }
        for name in ("idx", "posterior", *expected.text_columns):
            assert rows[name][:] == [row[name] for row in shipped(task)[split]]
        np.testing.assert_allclose(rows["label"][:], column(shipped(task)[split], "label"), rtol=1e-6)


def test_the_card_states_the_sizes_of_vocabulary_and_texts(root):
    card = (root / "data" / "miniglue" / "README.md").read_text("utf-8")
    assert f"vocabulary of {len(miniglue.vocabulary())} pieces" in card
    longest = max(len(ids) for task in TASK_NAMES for ids in encoded(task))
    assert f"longer than {longest} pieces" in card


# ---------------------------------------------------------------------------------------------------------------------
# All tasks


@each_task
def test_rows_are_complete_and_in_range(task):
    for split, rows in shipped(task).items():
        assert column(rows, "idx").tolist() == list(range(miniglue.SIZES[split]))
        for row in rows:
            assert set(row) == {
                *glue.TASKS[task].text_columns, "label", "idx", "posterior", "clean_label", "difficulty", "flipped",
            }  # fmt: skip
            assert 0 <= row["difficulty"] <= 1
            assert all(text == " ".join(text.split()) != "" for text in texts(task, row))
            if task == "mini-stsb":
                assert 0 <= row["posterior"][0] <= 5 and row["posterior"][1] == miniglue.ANNOTATOR_DEVIATION
                assert 0 <= row["label"] <= 5 and 0 <= row["clean_label"] <= 5
            else:
                assert len(row["posterior"]) == glue.TASKS[task].num_labels
                assert all(0 <= p <= 1 for p in row["posterior"])
                assert math.isclose(sum(row["posterior"]), 1, abs_tol=1e-12)
                assert {row["label"], row["clean_label"]} <= set(range(len(row["posterior"])))


@each_task
def test_labels_are_flipped_in_train_only_and_marked(task):
    for split, rows in shipped(task).items():
        for row in rows:
            if not row["flipped"]:
                assert row["label"] == row["clean_label"]
            elif task == "mini-stsb":
                assert row["label"] == pytest.approx(5 - row["clean_label"], abs=1e-9)
            else:
                assert row["label"] != row["clean_label"]
        share = column(rows, "flipped").mean()
        deviation = math.sqrt(0.08 * 0.92 / len(rows))
        assert share == 0 if split != "train" else abs(share - 0.08) < 4 * deviation


def test_flips_go_to_every_other_class():
    flips = Counter((row["clean_label"], row["label"]) for row in shipped("mini-mnli")["train"] if row["flipped"])
    assert len(flips) == 6 and min(flips.values()) > sum(flips.values()) / 12


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_clean_labels_follow_the_posterior(task):
    rows = every_row(task)
    posterior, drawn = column(rows, "posterior"), np.eye(glue.TASKS[task].num_labels)[column(rows, "clean_label")]
    for label in range(posterior.shape[1]):
        for stated in np.unique(posterior[:, label]):
            group = posterior[:, label] == stated
            error = abs(drawn[group, label].mean() - stated)
            assert error <= 4 * math.sqrt(stated * (1 - stated) / group.sum()) + 1 / group.sum(), (label, stated)


def test_clean_scores_follow_the_gaussian():
    rows = every_row("mini-stsb")
    mean, deviation = column(rows, "posterior").T
    score = column(rows, "clean_label")
    # The probability below the score, drawn afresh where the cut at 0 or 5 hides it, is uniform.
    lower = np.where(score == 0, 0, stats.norm.cdf(score, mean, deviation))
    upper = np.where(score == 5, 1, stats.norm.cdf(score, mean, deviation))
    uniform = np.random.default_rng(0).uniform(lower, upper)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert {0.0, 5.0} < set(score.tolist())


@each_task
def test_no_text_or_pair_occurs_twice_or_with_itself(task):
    keys = [tuple(sorted(texts(task, row))) for row in every_row(task)]
    assert len(set(keys)) == len(keys) == sum(miniglue.SIZES.values())
    assert all(len(set(key)) == len(key) for key in keys)


@each_task
def test_the_splits_have_one_distribution(task):
    def measures(rows):
        lengths = [len(" ".join(texts(task, row)).split()) for row in rows]
        return np.stack([lengths, column(rows, "difficulty"), column(rows, "posterior")[:, 0]])

    train = measures(shipped(task)["train"])
    for split in ("validation", "test"):
        other = measures(shipped(task)[split])
        error = np.sqrt(train.var(axis=1) / train.shape[1] + other.var(axis=1) / other.shape[1])
        assert (np.abs(train.mean(axis=1) - other.mean(axis=1)) < 4 * error).all()


def test_classes_are_balanced_as_the_card_says():
    shares = {
        task: np.bincount(column(every_row(task), "clean_label")) / sum(miniglue.SIZES.values())
        for task in CLASSIFICATION
    }
    np.testing.assert_allclose(shares["mini-sst2"], 1 / 2, atol=0.04)
    np.testing.assert_allclose(shares["mini-mrpc"], (0.32, 0.68), atol=0.02)
    np.testing.assert_allclose(shares["mini-mnli"], (0.28, 0.43, 0.29), atol=0.02)


@functools.cache
def encoded(task):
    columns = zip(*(texts(task, row) for row in every_row(task)), strict=True)
    return tokenizer()(*map(list, columns))["input_ids"]


def test_the_vocabulary_covers_all_tasks_and_nothing_else():
    words, vocabulary = tokenizer().vocab, miniglue.vocabulary()
    assert len(set(vocabulary)) == len(vocabulary) == len(words)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [words[piece] for piece in vocabulary] == list(range(len(vocabulary)))
    used = set()
    for task in TASK_NAMES:
        assert max(map(len, encoded(task))) <= 32
        used |= set(itertools.chain.from_iterable(encoded(task)))
    assert {vocabulary[piece] for piece in used} == set(vocabulary) - {"[PAD]", "[UNK]", "[MASK]"}


@functools.cache
def corpus_lines():
    return {
        split: (DATA / "mini-corpus" / f"{split}.txt").read_text("utf-8").splitlines()
        for split in ("train", "validation")
    }


def test_the_corpus_has_no_sentence_twice_and_none_that_is_held_out():
    lines = corpus_lines()
    assert {split: len(found) for split, found in lines.items()} == miniglue.CORPUS_SIZES
    every = set(itertools.chain.from_iterable(lines.values()))
    assert len(every) == sum(miniglue.CORPUS_SIZES.values())
    for task in TASK_NAMES:
        for split in ("validation", "test"):
            held_out = {text for row in shipped(task)[split] for text in texts(task, row)}
            assert not every & held_out, (task, split)


def test_the_corpus_is_made_of_the_sentences_of_all_four_grammars():
    found = Counter()
    for split, lines in corpus_lines().items():
        ids = tokenizer()(lines)["input_ids"]
        assert not any(miniglue.SPECIAL.index("[UNK]") in sentence for sentence in ids)
        if split == "train":  # every word can be learnt
            assert len(set(itertools.chain.from_iterable(ids))) == len(miniglue.vocabulary()) - 3
        for line in lines:
            if line.endswith(" ."):
                assert math.isfinite(sentence_value(line))
                kind = "mini-sst2"
            elif line.split()[0] in ("all", "some", "no", "not"):
                assert parsed(line)
                kind = "mini-mnli"
            else:
                assert understood(line)
                kind = "events"
            found[split, kind] += 1
    for kind in ("mini-sst2", "mini-mnli", "events"):  # shuffled before they were cut apart
        total = found["train", kind] + found["validation", kind]
        deviation = math.sqrt(total * (1 / 9) * (8 / 9))
        assert total > 100 and abs(found["validation", kind] - total / 9) < 4 * deviation


def test_the_card_states_the_sizes_of_the_corpus_and_of_the_small_grammars(root):
    card = " ".join((root / "data" / "miniglue" / "README.md").read_text("utf-8").split())
    assert "hold {train:,} and {validation:,} sentences".format(**miniglue.CORPUS_SIZES) in card
    nouns, verbs = ([*table, *itertools.chain(*table.values())] for table in (miniglue.NOUNS, miniglue.ACTIONS))
    entailment = len({str(claim) for claim in claims(nouns, verbs)})
    people = itertools.permutations([pair[0] for pair in miniglue.PEOPLE], 2)
    paraphrases = {
        miniglue.say(
            Event(agent, verb, patient, 1, 1, time, negated), Wording(0, synonym, 0, passive, False, False, no)
        )
        for agent, patient in people
        for verb, time, negated in itertools.product(miniglue.ALL_VERBS, ("", *miniglue.TIMES), (False, True))
        for synonym, passive, no in itertools.product((0, 1), (False, True), miniglue.NEGATION)
    }
    assert f"`mini-mnli` has only {entailment:,} different sentences and `mini-mrpc` {len(paraphrases):,}" in card


@pytest.fixture
def small(monkeypatch):
    """A tenth of the rows and lines, where their number does not matter."""
    for name in ("SIZES", "CORPUS_SIZES"):
        monkeypatch.setattr(miniglue, name, {split: size // 10 for split, size in getattr(miniglue, name).items()})


def test_the_corpus_leaves_out_what_it_is_told_to(small):
    first = miniglue.corpus_sentences(())
    held_out = set(first["validation"])
    second, other = miniglue.corpus_sentences(held_out), miniglue.corpus_sentences((), seed=1)
    assert held_out.isdisjoint(second["train"]) and held_out.isdisjoint(second["validation"])
    assert first == miniglue.corpus_sentences(()) != other


def test_words_are_cut_at_their_inflection():
    cut = tokenizer().tokenize("unpleasant doctors observed and attacked quietly")
    assert " ".join(cut) == "un ##pleasant doctor ##s observe ##d and attack ##ed quiet ##ly"


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="unknown task 'sst2'; MiniGLUE has mini-sst2, mini-mrpc, mini-mnli, mini-sts"):
        miniglue.generate("sst2")


def test_the_seed_decides():
    other = miniglue.generate("mini-sst2", seed=1)
    assert {split: len(rows) for split, rows in other.items()} == miniglue.SIZES
    first, second = ({row["sentence"] for row in rows["train"]} for rows in (shipped("mini-sst2"), other))
    assert len(first & second) < 0.5 * len(first)
    assert other == miniglue.generate("mini-sst2", seed=1)


BAG_OF_WORDS_CEILING = {
    "mini-sst2": ("accuracy", 0.65),
    "mini-mrpc": ("accuracy", 0.03),  # above the majority class
    "mini-mnli": ("accuracy", 0.73),
    "mini-stsb": ("pearson", 0.4),
}


@each_task
def test_a_bag_of_words_stays_below_what_can_be_known(root, task):
    data = glue.load(root / "data" / "miniglue", task)
    metric, ceiling = BAG_OF_WORDS_CEILING[task]
    if task == "mini-mrpc":
        ceiling += np.mean(np.array(data.test["test"]["label"][:]) == 1)
    assert miniglue_gap.bag_of_words(data)[metric] < ceiling
    assert miniglue_gap.oracle(data)[metric] > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# mini-sst2


def clause_value(clause):
    """The value of "the plot was not very good and dull"."""
    words = clause.split()
    assert words[0] == "the" and words[1] in miniglue.ASPECTS and words[2] in miniglue.COPULAS
    predicate, factor = words[3:], 1
    if predicate[0] in ("not", "never", "hardly"):
        factor = -0.5 if predicate.pop(0) == "hardly" else -1
    values = []
    for phrase in " ".join(predicate).split(" and "):
        *adverb, adjective = phrase.split()
        scale = {"very": 1.5, "really": 1.5, "slightly": 0.5, "somewhat": 0.5}[adverb[0]] if adverb else 1
        values.append(scale * miniglue.ADJECTIVES[adjective])
    return factor * sum(values) / len(values)


def sentence_value(sentence):
    assert sentence.endswith(" .")
    sentence = sentence.removesuffix(" .")
    if found := re.fullmatch("(?:nobody says|few people feel) that (.*)", sentence):
        return -clause_value(found[1])
    if found := re.fullmatch("(?:critics say|most people feel) that (.*)", sentence):
        return clause_value(found[1])
    for contrast in (
        "(?P<minor>.*) but (?P<major>.*)",
        "although (?P<minor>.*) , (?P<major>.*)",
        "(?P<major>.*) although (?P<minor>.*)",
    ):
        if found := re.fullmatch(contrast, sentence):
            return clause_value(found["major"]) + clause_value(found["minor"]) / 4
    return clause_value(sentence)


def test_the_sentiment_is_what_the_sentence_says():
    for row in every_row("mini-sst2"):
        positive = 1 / (1 + math.exp(-3 * sentence_value(row["sentence"])))
        assert row["posterior"][1] == pytest.approx(positive, abs=6e-5), row["sentence"]


def test_every_construction_of_sentiment_occurs():
    sentences = " ".join(row["sentence"] for row in every_row("mini-sst2"))
    for table in (miniglue.NEGATORS, miniglue.INTENSIFIERS, miniglue.BELIEVED, miniglue.DENIED, miniglue.ADJECTIVES):
        assert all(f"{words} " in sentences for words in table)
    assert " but " in sentences and " although " in sentences and "although the" in sentences


adjectives = st.sampled_from(sorted(miniglue.ADJECTIVES)).map(miniglue.adjective)
phrases = st.one_of(
    adjectives, st.builds(miniglue.intensified, st.sampled_from(sorted(miniglue.INTENSIFIERS)), adjectives)
)


@given(phrases, phrases, st.sampled_from(["not", "never"]))
def test_negation_turns_the_sign_of_its_scope_only(phrase, other, negator):
    assert miniglue.negated(negator, phrase).value == -phrase.value
    assert miniglue.negated(negator, miniglue.negated(negator, phrase)).value == phrase.value
    assert miniglue.negated("hardly", phrase).value == -phrase.value / 2
    outside = miniglue.both(miniglue.negated(negator, phrase), other)
    assert outside.value == (other.value - phrase.value) / 2
    inside = miniglue.negated(negator, miniglue.both(phrase, other))
    assert inside.value == -(other.value + phrase.value) / 2
    assert (inside.depth, inside.words) == (2, f"{negator} {phrase.words} and {other.words}")


@given(adjectives)
def test_intensifiers_are_monotone(phrase):
    weak, strong = (abs(miniglue.intensified(word, phrase).value) for word in ("slightly", "very"))
    assert weak < abs(phrase.value) < strong
    assert all(miniglue.intensified(word, phrase).value * phrase.value > 0 for word in miniglue.INTENSIFIERS)


@given(phrases, phrases, st.sampled_from(["but", "although", "although-last"]))
def test_the_major_clause_dominates(minor, major, form):
    def said_of_the_plot(phrase):
        return miniglue.Phrase(f"the plot was {phrase.words}", phrase.value)

    whole = miniglue.contrast(said_of_the_plot(minor), said_of_the_plot(major), form)
    assert whole.value == pytest.approx(sentence_value(f"{whole.words} ."))
    if abs(minor.value) <= abs(major.value):
        assert whole.value * major.value > 0
    assert miniglue.contrast(miniglue.negated("not", minor), major, form).value == major.value - minor.value / 4


# ---------------------------------------------------------------------------------------------------------------------
# mini-mnli: a model checker.  A word is a set of individuals and a sentence a statement about sets.

UP = {"dogs": "animals", "cats": "animals", "doctors": "people", "farmers": "people"}
UP |= {"run": "move", "walk": "move", "shout": "speak", "sing": "speak"}


def individuals(words):
    """Everything that can be: all subsets of `words` that hold each word's hypernym."""
    for flags in itertools.product((False, True), repeat=len(words)):
        true = set(itertools.compress(words, flags))
        if all(UP.get(word, word) in true for word in true):
            yield true


@functools.cache
def joint_kinds(first, second):
    """For two noun phrases (or verb phrases): which combinations of being one and being the other there can be."""
    named = {word for word in (*first, *second) if word}
    words = sorted(named | {UP[word] for word in named & set(UP)})
    return frozenset((set(first) <= {"", *thing}, set(second) <= {"", *thing}) for thing in individuals(words))


def holds(quantifier, subject, predicate):
    satisfied = [p for s, p in zip(subject, predicate, strict=True) if s]
    return {
        "all": all(satisfied),
        "some": any(satisfied),
        "no": not any(satisfied),
        "not all": not all(satisfied),
    }[quantifier]


@functools.cache
def relation(premise_quantifier, hypothesis_quantifier, subject_kinds, predicate_kinds):
    """The label, by going through all worlds of up to three individuals.

    Two are enough to refute, one witness for each sentence; a third does no harm.
    """
    kinds = sorted(itertools.product(subject_kinds, predicate_kinds))
    outcomes = set()
    for size in (1, 2, 3):
        for world in itertools.combinations(kinds, size):
            (s1, s2), (p1, p2) = (tuple(zip(*part, strict=True)) for part in zip(*world, strict=True))
            if any(s1) and any(s2) and holds(premise_quantifier, s1, p1):
                outcomes.add(holds(hypothesis_quantifier, s2, p2))
    assert outcomes  # the premise can be true
    return {(True,): "entailment", (False,): "contradiction"}.get(tuple(outcomes), "neutral")


@functools.cache
def parsed(sentence):
    """Quantifier, words of the noun phrase, words of the verb phrase."""
    found = re.fullmatch(
        "(all|some|not all|no)(?: (old|small))? (animals|dogs|cats|people|doctors|farmers)"
        " (move|run|walk|speak|shout|sing)(?: (quietly|outside))?",
        sentence,
    )
    quantifier, modifier, noun, verb, adverb = found.groups(default="")
    return quantifier, (noun, modifier), (verb, adverb)


def checked(premise, hypothesis):
    """The label of two sentences, from their words alone."""
    (q1, s1, p1), (q2, s2, p2) = parsed(premise), parsed(hypothesis)
    return relation(q1, q2, joint_kinds(s1, s2), joint_kinds(p1, p2))


def claims(nouns, verbs):
    modifiers, adverbs = ("", *miniglue.MODIFIERS), ("", *miniglue.ADVERBS)
    return [Claim(*words) for words in itertools.product(miniglue.QUANTIFIERS, nouns, verbs, modifiers, adverbs)]


def test_the_model_checker_knows_the_square_of_opposition():
    assert checked("all dogs run", "some dogs run") == "entailment"
    assert checked("all dogs run", "not all dogs run") == "contradiction"
    assert checked("all dogs run", "no dogs run") == "contradiction"
    assert checked("all animals run", "some old dogs move") == "entailment"
    assert checked("some dogs run", "some cats run") == "neutral"
    assert checked("no animals move", "no old dogs run outside") == "entailment"
    assert checked("not all dogs move", "not all animals run") == "entailment"


def test_inference_agrees_with_the_model_checker():
    """All 104,976 pairs over one row of nouns and verbs, and 3,000 pairs of any words."""
    row = claims(("animals", "dogs", "cats"), ("move", "run", "walk"))
    pairs = list(itertools.product(row, row))
    everything = claims(
        [*miniglue.NOUNS, *itertools.chain(*miniglue.NOUNS.values())],
        [*miniglue.ACTIONS, *itertools.chain(*miniglue.ACTIONS.values())],
    )
    rng = random.Random(0)
    pairs += [(rng.choice(everything), rng.choice(everything)) for _ in range(3000)]
    found = Counter()
    for premise, hypothesis in pairs:
        label = miniglue.infer(premise, hypothesis)
        assert label == checked(str(premise), str(hypothesis)), f"{premise} / {hypothesis}"
        found[label] += 1
    assert min(found[label] for label in miniglue.LABELS) > 3000
    assert all(miniglue.infer(claim, claim) == "entailment" for claim in everything)


def test_every_entailment_pair_is_labelled_as_logic_says():
    slips = set()
    for row in every_row("mini-mnli"):
        logical = checked(row["premise"], row["hypothesis"])
        assert miniglue.LABELS[np.argmax(row["posterior"])] == logical, row
        quantifiers = [parsed(row[name])[0] for name in ("premise", "hypothesis")]
        negative = [quantifier in ("no", "not all") for quantifier in quantifiers]
        depth = sum(negative) + (quantifiers[0] != quantifiers[1])
        assert row["difficulty"] == pytest.approx(depth / 3, abs=1e-4)
        assert max(row["posterior"]) == pytest.approx(0.97 - 0.02 * depth)
        if logical == "neutral":
            slips.add((negative[0] == negative[1], row["posterior"][0] > row["posterior"][2]))
        else:
            assert row["posterior"][1] == pytest.approx(3 * min(row["posterior"]), abs=2e-4)
    assert slips == {(True, True), (False, False)}


def test_quantifiers_alone_leave_two_labels_open():
    labels = Counter(
        (parsed(row["premise"])[0], parsed(row["hypothesis"])[0], int(np.argmax(row["posterior"])))
        for row in every_row("mini-mnli")
    )
    settled = set()
    for premise, hypothesis in itertools.product(miniglue.QUANTIFIERS, repeat=2):
        counts = [labels[premise, hypothesis, label] for label in range(3)]
        if max(counts) == sum(counts):
            settled.add((premise, hypothesis))
        else:
            assert max(counts) < 0.85 * sum(counts), (premise, hypothesis, counts)
    # Nothing general follows from one case that is known, except that its denial is false.
    assert settled == {("some", "all"), ("some", "not all"), ("not all", "no"), ("not all", "some")}


# ---------------------------------------------------------------------------------------------------------------------
# mini-mrpc and mini-stsb

CONCEPT = {word: pair[0] for pair in (*miniglue.PEOPLE, *miniglue.ANIMALS) for word in pair}
CONCEPT |= {"person": "person", "animal": "animal"}
BASE = {word: pair[0] for group in miniglue.VERBS.values() for pair in group for word in pair}
PAST = {(f"{word}d" if word[-1] == "e" else f"{word}ed"): concept for word, concept in BASE.items()}
COUNT = {"the": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}


def thing(determiner, noun):
    number = COUNT[determiner]
    assert noun.endswith("s") == (number > 1)
    return CONCEPT[noun.removesuffix("s")], number


@functools.cache
def understood(sentence):
    """The event that a sentence tells."""
    words, time = sentence.split(), ""
    for end in (0, -1):
        if words[end] in ("today", "yesterday"):
            time = words.pop(end)
    left, middle, right = words[:2], words[2:-2], words[-2:]
    if middle[0] in ("was", "were"):
        left, right = right, left
        auxiliary, *negator, verb, by = middle
        assert by == "by" and (auxiliary == "was") == (right[0] == "the")
        assert negator in ([], ["not"], ["never"])
        verb = PAST[verb]
    elif middle[0] == "did":
        _, *negator, verb = middle
        assert negator == ["not"]
        verb = BASE[verb]
    else:
        *negator, verb = middle
        assert negator in ([], ["never"])
        verb = PAST[verb]
    (agent, agent_number), (patient, patient_number) = thing(*left), thing(*right)
    return Event(agent, verb, patient, agent_number, patient_number, time, bool(negator))


nouns = st.sampled_from(sorted(set(CONCEPT.values())))
numbers = st.integers(1, 4)
times = st.sampled_from(["", *miniglue.TIMES])
events = st.builds(
    Event, nouns, st.sampled_from(miniglue.ALL_VERBS), nouns, numbers, numbers, times, st.booleans()
)  # fmt: skip
wordings = st.builds(
    Wording, *[st.integers(0, 1)] * 3, *[st.booleans()] * 3, negator=st.sampled_from(miniglue.NEGATION)
)  # fmt: skip


@given(events, wordings)
def test_a_sentence_tells_its_event_however_it_is_worded(event, wording):
    assert understood(miniglue.say(event, wording)) == event


@given(events, events)
def test_similarity_is_a_symmetric_score(first, second):
    score = miniglue.similarity(first, second)
    assert score == pytest.approx(miniglue.similarity(second, first))
    assert score == pytest.approx(restated_similarity(first, second))
    assert 0 <= score <= 5
    assert miniglue.similarity(first, first) == pytest.approx(5)


@given(events)
def test_swapping_twice_changes_nothing(event):
    once = miniglue.swapped(event)
    assert miniglue.swapped(once) == event
    assert (once.agent, once.patient) == (event.patient, event.agent)
    assert (once.agent_number, once.patient_number) == (event.patient_number, event.agent_number)
    assert (once.verb, once.negated, once.time) == (event.verb, event.negated, event.time)


def restated_similarity(first, second):
    """As the data card states it."""
    kinds = {name: {name, *(pair[0] for pair in pairs)} for name, pairs in miniglue.KINDS.items()}
    classes = [{pair[0] for pair in pairs} for pairs in miniglue.VERBS.values()]

    def noun(a, b):
        if a == b:
            return 1
        if not any({a, b} <= members for members in kinds.values()):
            return 0
        return 0.6 if {a, b} & set(kinds) else 0.3

    verb = 1 if first.verb == second.verb else 0.4 * any({first.verb, second.verb} <= c for c in classes)
    numbers = abs(first.agent_number - second.agent_number) + abs(first.patient_number - second.patient_number)
    total = 1.6 * verb + 1.4 * noun(first.agent, second.agent) + 1.4 * noun(first.patient, second.patient)
    total += 0.6 * max(0, 1 - numbers / 3)
    return total * (1 if first.negated == second.negated else 0.4)


def test_every_similarity_is_that_of_the_two_events():
    for row in every_row("mini-stsb"):
        expected = restated_similarity(understood(row["sentence1"]), understood(row["sentence2"]))
        assert row["posterior"][0] == pytest.approx(expected, abs=6e-5), row
    means = column(every_row("mini-stsb"), "posterior")[:, 0]
    assert np.histogram(means, range(6))[0].min() > 0.05 * len(means)  # the whole scale is used


def test_paraphrases_tell_one_event_and_near_misses_differ_in_one_thing():
    found = Counter()
    for row in every_row("mini-mrpc"):
        first, second = understood(row["sentence1"]), understood(row["sentence2"])
        differences = tuple(sorted(name for name in vars(first) if getattr(first, name) != getattr(second, name)))
        likely = {(): 0.96, ("agent", "patient"): 0.04, ("negated",): 0.06, ("verb",): 0.08}[differences]
        assert row["posterior"] == [pytest.approx(1 - likely), likely], row
        if differences == ("agent", "patient"):
            assert second == miniglue.swapped(first)
        found[likely] += 1
    assert min(found.values()) > 0.05 * sum(miniglue.SIZES.values())


def test_the_difficulty_of_a_paraphrase_counts_voice_and_verb():
    for row in every_row("mini-mrpc"):
        first, second = (row[name].split() for name in ("sentence1", "sentence2"))
        expected = ("by" in first) != ("by" in second)
        if understood(row["sentence1"]).verb == understood(row["sentence2"]).verb:
            stems = [next(word[:3] for word in words if word in BASE or word in PAST) for words in (first, second)]
            expected += stems[0] != stems[1]
            assert row["difficulty"] == pytest.approx(expected / 3, abs=1e-4), row


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_oracle_knows_all_that_is_neither_text_nor_label(small, task):
    (row, *_) = miniglue.generate(task)["validation"]
    assert set(ORACLE) == set(row) - {*miniglue.GRAMMARS[task][1], "label"}
