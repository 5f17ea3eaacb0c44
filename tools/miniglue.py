"""MiniGLUE: four small tasks in the shape of GLUE, drawn from a seeded grammar whose true posterior is known.

A corpus of unlabelled sentences from the same grammars goes with them, see `corpus_sentences`.

Every example is drawn in the same three steps:

1. the grammar of the task writes a text (or a pair of texts) together with its meaning;
2. the meaning alone fixes the posterior p*(y|x); it is rounded to four digits and stored with the example;
3. the label is drawn from that posterior.  In train, one label in twelve is flipped afterwards, and marked.

Only `random.Random` with a fixed seed is used, and every draw is an integer draw, so that the files come out the same,
byte for byte, on every machine.  `python -m tools.miniglue data/miniglue` writes them, to be read by `kdlib.miniglue`;
`data/miniglue/README.md` is the data card.
"""

import json
import math
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

SIZES = {"train": 4000, "validation": 800, "test": 1000}
_FLIPPED_SHARE = 0.08
CORPUS_SIZES = {"train": 8000, "validation": 1000}
_SHARD_ROWS = 2000
"""Rows per file: a train split is written as two files, each well below 600 kB."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """A text (one sentence or two), its posterior (class probabilities, or mean and standard deviation) and its depth.

    `depth` counts the constructions that a reader has to undo, each task its own; see `_DEEPEST`.
    """

    texts: tuple[str, ...]
    posterior: tuple[float, ...]
    depth: int


# ---------------------------------------------------------------------------------------------------------------------
# mini-sst2: the sentiment of a sentence about a film

ADJECTIVES = {
    "good": 1, "funny": 1, "clever": 1, "pleasant": 1, "convincing": 1, "brilliant": 2, "superb": 2, "gripping": 2,
    "bad": -1, "dull": -1, "silly": -1, "unpleasant": -1, "unconvincing": -1, "awful": -2, "dreadful": -2, "boring": -2,
}  # fmt: skip
"""Valence of an adjective; ±1 is mild, ±2 strong."""
NEGATORS = {"not": -1.0, "never": -1.0, "hardly": -0.5}
INTENSIFIERS = {"very": 1.5, "really": 1.5, "slightly": 0.5, "somewhat": 0.5}
ASPECTS = ("plot", "acting", "music", "script", "ending", "dialogue", "story", "cast")
COPULAS = ("is", "was", "seemed")
BELIEVED = ("critics say that", "most people feel that")
DENIED = ("nobody says that", "few people feel that")
_MINOR_WEIGHT = 0.25
"""What the clause that yields (before "but", after "although") contributes to the whole."""
_SENTIMENT_SLOPE = 3.0


@dataclass(frozen=True)
class Phrase:
    """Words, the value they add up to, and how many constructions were used."""

    words: str
    value: float
    depth: int = 0


def adjective(word: str) -> Phrase:
    """An adjective by itself."""
    return Phrase(word, float(ADJECTIVES[word]))


def intensified(word: str, phrase: Phrase) -> Phrase:
    """`phrase` scaled by an intensifier: "very good"."""
    return Phrase(f"{word} {phrase.words}", INTENSIFIERS[word] * phrase.value, phrase.depth)


def negated(word: str, phrase: Phrase) -> Phrase:
    """`phrase`, all of which is in the scope of a negator: "hardly funny", "not clever and fresh"."""
    return Phrase(f"{word} {phrase.words}", NEGATORS[word] * phrase.value, phrase.depth + 1)


def both(first: Phrase, second: Phrase, conjunction: str = "and") -> Phrase:
    """Two phrases side by side; their values are averaged."""
    words = f"{first.words} {conjunction} {second.words}"
    return Phrase(words, (first.value + second.value) / 2, first.depth + second.depth + 1)


def contrast(minor: Phrase, major: Phrase, form: str) -> Phrase:
    """Two clauses of which the second argument dominates; `form` is "but", "although" or "although-last"."""
    words = {
        "but": f"{minor.words} but {major.words}",
        "although": f"although {minor.words} , {major.words}",
        "although-last": f"{major.words} although {minor.words}",
    }[form]
    return Phrase(words, _MINOR_WEIGHT * minor.value + major.value, minor.depth + major.depth + 1)


def _adjective_phrase(rng: random.Random) -> Phrase:
    phrase = adjective(rng.choice(tuple(ADJECTIVES)))
    if rng.randrange(3) == 0:
        phrase = intensified(rng.choice(tuple(INTENSIFIERS)), phrase)
    return phrase


def _clause(rng: random.Random) -> Phrase:
    subject = f"the {rng.choice(ASPECTS)} {rng.choice(COPULAS)}"
    negator = rng.choice(tuple(NEGATORS))
    form = rng.randrange(20)
    if form < 14:
        predicate = _adjective_phrase(rng)
    elif form < 18:
        predicate = negated(negator, _adjective_phrase(rng))
    elif form < 19:
        predicate = both(_adjective_phrase(rng), _adjective_phrase(rng))
    else:  # "and" keeps both adjectives in the scope of the negator
        predicate = negated(negator, both(_adjective_phrase(rng), _adjective_phrase(rng)))
    return Phrase(f"{subject} {predicate.words}", predicate.value, predicate.depth)


def _sentiment(rng: random.Random) -> Draft:
    form = rng.randrange(10)
    if form < 5:
        phrase = _clause(rng)
    elif form < 7:
        opening, sign = rng.choice([(words, 1) for words in BELIEVED * 2] + [(words, -1) for words in DENIED])
        inner = _clause(rng)
        phrase = Phrase(f"{opening} {inner.words}", sign * inner.value, inner.depth + (sign < 0))
    else:
        minor, major = _clause(rng), _clause(rng)
        phrase = contrast(minor, major, rng.choice(("but", "although", "although-last")))
    positive = round(1 / (1 + math.exp(-_SENTIMENT_SLOPE * phrase.value)), 4)
    return Draft((f"{phrase.words} .",), (round(1 - positive, 4), positive), phrase.depth)


# ---------------------------------------------------------------------------------------------------------------------
# mini-mnli: the square of opposition over nouns and verbs with hypernyms

NOUNS = {"animals": ("dogs", "cats"), "people": ("doctors", "farmers")}
ACTIONS = {"move": ("run", "walk"), "speak": ("shout", "sing")}
"""Hypernym -> hyponyms: all dogs are animals, whoever runs moves.  All other words are unrelated."""
MODIFIERS = ("old", "small")
ADVERBS = ("quietly", "outside")
QUANTIFIERS = {"all": (True, True), "some": (False, True), "no": (True, False), "not all": (False, False)}
"""Whether a quantifier speaks of every subject, and whether it affirms the predicate."""
LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Claim:
    """A quantified sentence, perhaps with a modifier of the noun and an adverb of the verb."""

    quantifier: str
    noun: str
    verb: str
    modifier: str = ""
    adverb: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.quantifier, self.modifier, self.noun, self.verb, self.adverb)))


def _below(word: str, other: str, table: Mapping[str, Sequence[str]]) -> bool:
    return word == other or word in table.get(other, ())


def _subject_within(first: Claim, second: Claim) -> bool:
    """Whether all that the first subject names is named by the second: "old dogs", "animals"."""
    return _below(first.noun, second.noun, NOUNS) and second.modifier in ("", first.modifier)


def _predicate_within(first: Claim, second: Claim) -> bool:
    """Whether all that satisfies the first predicate satisfies the second: "run outside", "move"."""
    return _below(first.verb, second.verb, ACTIONS) and second.adverb in ("", first.adverb)


def entails(premise: Claim, hypothesis: Claim, denied: bool = False) -> bool:
    """Whether the hypothesis, or with `denied` its denial, is true wherever the premise is; all subjects exist."""
    every, affirms = QUANTIFIERS[premise.quantifier]
    asked_every, asked_affirms = QUANTIFIERS[hypothesis.quantifier]
    if denied:  # the corner of the square across
        asked_every, asked_affirms = not asked_every, not asked_affirms
    if affirms != asked_affirms:
        return False
    if not (_predicate_within(premise, hypothesis) if affirms else _predicate_within(hypothesis, premise)):
        return False
    if every and _subject_within(hypothesis, premise):
        return True
    return not asked_every and _subject_within(premise, hypothesis)


def infer(premise: Claim, hypothesis: Claim) -> str:
    """The logical relation of two claims, one of `LABELS`."""
    if entails(premise, hypothesis):
        return "entailment"
    return "contradiction" if entails(premise, hypothesis, denied=True) else "neutral"


def _neighbour(word: str, table: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """Another word of the same row: a hypernym, a hyponym or a sister."""
    row = next((hypernym, *words) for hypernym, words in table.items() if word in (hypernym, *words))
    return rng.choice([other for other in row if other != word])


def _claims(rng: random.Random) -> tuple[Claim, Claim]:
    """A premise, and a hypothesis with its own quantifier and at most one change elsewhere."""
    nouns, verbs = rng.choice(tuple(NOUNS)), rng.choice(tuple(ACTIONS))
    premise = Claim(
        quantifier=rng.choice(tuple(QUANTIFIERS)),
        noun=rng.choice((nouns, rng.choice(NOUNS[nouns]))),
        verb=rng.choice((verbs, rng.choice(ACTIONS[verbs]))),
        modifier=rng.choice(("", rng.choice(MODIFIERS))),
        adverb=rng.choice(("", rng.choice(ADVERBS))),
    )
    changes: tuple[dict[str, str], ...] = (
        {"noun": _neighbour(premise.noun, NOUNS, rng)},
        {"verb": _neighbour(premise.verb, ACTIONS, rng)},
        {"modifier": "" if premise.modifier else rng.choice(MODIFIERS)},
        {"adverb": "" if premise.adverb else rng.choice(ADVERBS)},
        {},
    )
    return premise, replace(premise, quantifier=rng.choice(tuple(QUANTIFIERS)), **rng.choice(changes))


def _entailment_posterior(premise: Claim, hypothesis: Claim, depth: int) -> tuple[float, ...]:
    """Annotators err more on deeper pairs; they confuse with neutral, and neutral with what the polarity suggests."""
    label = LABELS.index(infer(premise, hypothesis))
    error = 0.03 + 0.02 * depth
    same = QUANTIFIERS[premise.quantifier][1] == QUANTIFIERS[hypothesis.quantifier][1]
    near = (0 if same else 2) if label == 1 else 1
    posterior = [0.25 * error] * 3
    posterior[near] = 0.75 * error
    posterior[label] = 1 - error
    return tuple(round(p, 4) for p in posterior)


def _entailment(rng: random.Random) -> Draft:
    while True:
        premise, hypothesis = _claims(rng)
        # A pair of quantifiers leaves two labels open at most.  Neutral is kept as often as the other one, so that the
        # words by themselves say little.
        rare = not QUANTIFIERS[premise.quantifier][0] and QUANTIFIERS[hypothesis.quantifier][0]
        if infer(premise, hypothesis) != "neutral" or rng.randrange(100) < (25 if rare else 60):
            break
    negative = [not QUANTIFIERS[claim.quantifier][1] for claim in (premise, hypothesis)]
    depth = sum(negative) + (premise.quantifier != hypothesis.quantifier)
    return Draft((str(premise), str(hypothesis)), _entailment_posterior(premise, hypothesis, depth), depth)


# ---------------------------------------------------------------------------------------------------------------------
# mini-mrpc and mini-stsb: who did what to whom, said in two ways

PEOPLE = (("doctor", "physician"), ("lawyer", "attorney"), ("student", "pupil"), ("writer", "author"))
ANIMALS = (("dog", "hound"), ("rabbit", "bunny"), ("horse", "pony"))
KINDS = {"person": PEOPLE, "animal": ANIMALS}
VERBS = {
    "kind": (("help", "aid"), ("protect", "defend")),
    "hostile": (("attack", "assault"), ("offend", "insult")),
    "neutral": (("follow", "trail"), ("watch", "observe")),
}
TIMES = ("today", "yesterday")
_NUMBERS = {"two": "2", "three": "3", "four": "4"}
NEGATION = ("not", "never")


@dataclass(frozen=True)
class Event:
    """Who did what to whom: the first synonym stands for each concept; `number` 1 is said as "the"."""

    agent: str
    verb: str
    patient: str
    agent_number: int = 1
    patient_number: int = 1
    time: str = ""
    negated: bool = False


@dataclass(frozen=True)
class Wording:
    """How an event is said: which synonyms (0 or 1), passive or active, time first or last, digits or words."""

    agent: int = 0
    verb: int = 0
    patient: int = 0
    passive: bool = False
    time_first: bool = False
    digits: bool = False
    negator: str = "not"


def _synonym(word: str, groups: Iterable[tuple[tuple[str, ...], ...]], index: int) -> str:
    return next((pair[index] for group in groups for pair in group if word == pair[0]), word)


def _noun_phrase(noun: str, number: int, digits: bool) -> str:
    if number == 1:
        return f"the {noun}"
    word = tuple(_NUMBERS)[number - 2]
    return f"{_NUMBERS[word] if digits else word} {noun}s"


def _past(verb: str) -> str:
    return f"{verb}d" if verb.endswith("e") else f"{verb}ed"


def say(event: Event, wording: Wording) -> str:
    """The sentence that says `event` in the way `wording` describes."""
    agent = _noun_phrase(_synonym(event.agent, KINDS.values(), wording.agent), event.agent_number, wording.digits)
    patient_noun = _synonym(event.patient, KINDS.values(), wording.patient)
    patient = _noun_phrase(patient_noun, event.patient_number, wording.digits)
    verb = _synonym(event.verb, VERBS.values(), wording.verb)
    negator = wording.negator if event.negated else ""
    if wording.passive:
        auxiliary = "was" if event.patient_number == 1 else "were"
        words = [patient, auxiliary, negator, _past(verb), "by", agent]
    elif negator == "not":
        words = [agent, "did not", verb, patient]
    else:
        words = [agent, negator, _past(verb), patient]
    words = [event.time, *words] if wording.time_first else [*words, event.time]
    return " ".join(filter(None, words))


def _wording(rng: random.Random) -> Wording:
    return Wording(
        agent=rng.randrange(2),
        verb=rng.randrange(2),
        patient=rng.randrange(2),
        passive=rng.randrange(2) == 0,
        time_first=rng.randrange(2) == 0,
        digits=rng.randrange(2) == 0,
        negator=rng.choice(NEGATION),
    )


def _rewording(first: Wording, second: Wording) -> int:
    """In how many ways two wordings differ: the nouns, the verb, the voice."""
    nouns = (first.agent, first.patient) != (second.agent, second.patient)
    return nouns + (first.verb != second.verb) + (first.passive != second.passive)


def _two(words: Sequence[Any], rng: random.Random) -> tuple[Any, Any]:
    """Two different members of `words`."""
    first = rng.randrange(len(words))
    second = (first + 1 + rng.randrange(len(words) - 1)) % len(words)
    return words[first], words[second]


_PARAPHRASE_PERCENT = 87
ALL_VERBS = tuple(pair[0] for group in VERBS.values() for pair in group)
_LENIENCE = {"swap": 0.04, "negation": 0.06, "verb": 0.08}
"""How likely an annotator is to call a near miss a paraphrase, by what was changed."""


def swapped(event: Event) -> Event:
    """The event with agent and patient exchanged."""
    return replace(
        event,
        agent=event.patient,
        patient=event.agent,
        agent_number=event.patient_number,
        patient_number=event.agent_number,
    )


def _near_miss(event: Event, rng: random.Random) -> tuple[Event, str]:
    """An event that differs from `event` in one thing, and the name of that thing."""
    kind = rng.choice(("swap", "negation", "negation", "verb"))
    if kind == "swap":
        return swapped(event), kind
    if kind == "negation":
        return replace(event, negated=not event.negated), kind
    return replace(event, verb=rng.choice([verb for verb in ALL_VERBS if verb != event.verb])), kind


def _event(people: Sequence[str], rng: random.Random) -> Event:
    agent, patient = _two(people, rng)
    numbers = rng.choice(((1, 1), (rng.randrange(2, 5), 1), (1, rng.randrange(2, 5))))
    return Event(
        agent,
        rng.choice(ALL_VERBS),
        patient,
        *numbers,
        time=rng.choice(("", *TIMES)),
        negated=rng.randrange(3) == 0,
    )


def _paraphrase(rng: random.Random) -> Draft:
    # One person each and synonyms of the verb only: who did it to whom, in either voice, is hard enough.
    event = replace(_event([pair[0] for pair in PEOPLE], rng), agent_number=1, patient_number=1)
    plain: dict[str, Any] = {"agent": 0, "patient": 0, "time_first": False}
    first, second = replace(_wording(rng), **plain), replace(_wording(rng), **plain)
    if rng.randrange(100) < _PARAPHRASE_PERCENT:
        other, paraphrase = event, 0.96
    else:
        other, kind = _near_miss(event, rng)
        paraphrase = _LENIENCE[kind]
    posterior = (round(1 - paraphrase, 4), paraphrase)
    return Draft((say(event, first), say(other, second)), posterior, _rewording(first, second))


def _kind(noun: str) -> str:
    return next(kind for kind, pairs in KINDS.items() if noun == kind or noun in {pair[0] for pair in pairs})


def _class(verb: str) -> str:
    return next(name for name, pairs in VERBS.items() if verb in {pair[0] for pair in pairs})


def _noun_similarity(first: str, second: str) -> float:
    """1 for one concept, 0.6 for a noun and its hypernym, 0.3 for two of one kind, else 0."""
    if first == second:
        return 1.0
    if _kind(first) != _kind(second):
        return 0.0
    return 0.6 if _kind(first) in (first, second) else 0.3


def _verb_similarity(first: str, second: str) -> float:
    """1 for one concept, 0.4 for two verbs of one class, else 0."""
    if first == second:
        return 1.0
    return 0.4 * (_class(first) == _class(second))


_POLARITY_FACTOR = 0.4
"""What is left of the similarity of two events if only one of them is denied."""
ANNOTATOR_DEVIATION = 0.4
"""Standard deviation of the Gaussian noise on a similarity score, in points of the scale from 0 to 5."""


def similarity(first: Event, second: Event) -> float:
    """How alike two events are, in [0, 5], role by role."""
    number = 1 - (abs(first.agent_number - second.agent_number) + abs(first.patient_number - second.patient_number)) / 3
    total = (
        1.6 * _verb_similarity(first.verb, second.verb)
        + 1.4 * _noun_similarity(first.agent, second.agent)
        + 1.4 * _noun_similarity(first.patient, second.patient)
        + 0.6 * max(0.0, number)
    )
    return total if first.negated == second.negated else _POLARITY_FACTOR * total


def _similar_noun(noun: str, rng: random.Random) -> str:
    """The noun itself half of the time, otherwise its hypernym, one of its kind, or any other."""
    choice = rng.randrange(6)
    if choice < 3:
        return noun
    if choice == 3:
        return _kind(noun)
    return rng.choice([pair[0] for pair in (KINDS[_kind(noun)] if choice == 4 else PEOPLE + ANIMALS)])


def _similar_verb(verb: str, rng: random.Random) -> str:
    """The verb itself two times in three, otherwise one of its class, or any other."""
    choice = rng.randrange(6)
    if choice < 4:
        return verb
    return rng.choice([pair[0] for pair in VERBS[_class(verb)]] if choice == 4 else ALL_VERBS)


def _similar(rng: random.Random) -> Draft:
    event = replace(_event([pair[0] for pair in PEOPLE + ANIMALS], rng), time="")
    other = replace(
        event,
        agent=_similar_noun(event.agent, rng),
        verb=_similar_verb(event.verb, rng),
        patient=_similar_noun(event.patient, rng),
    )
    if rng.randrange(4) == 0:
        number = rng.randrange(1, 5)
        other = replace(other, agent_number=number) if event.agent_number > 1 else replace(other, patient_number=number)
    if rng.randrange(3) == 0:
        other = replace(other, negated=not event.negated)
    if rng.randrange(8) == 0:
        other = swapped(other)
    first, second = _wording(rng), _wording(rng)
    posterior = (round(similarity(event, other), 4), ANNOTATOR_DEVIATION)
    return Draft((say(event, first), say(other, second)), posterior, _rewording(first, second))


# ---------------------------------------------------------------------------------------------------------------------
# From drafts to rows

GRAMMARS: dict[str, tuple[Callable[[random.Random], Draft], tuple[str, ...]]] = {
    "mini-sst2": (_sentiment, ("sentence",)),
    "mini-mrpc": (_paraphrase, ("sentence1", "sentence2")),
    "mini-mnli": (_entailment, ("premise", "hypothesis")),
    "mini-stsb": (_similar, ("sentence1", "sentence2")),
}
"""For each task the function that draws an example, and the names of its text columns."""
_DEEPEST = {"mini-sst2": 5, "mini-mrpc": 3, "mini-mnli": 3, "mini-stsb": 3}
"""The depth at which `difficulty` reaches 1."""


def generate(task: str, seed: int = 0) -> dict[str, list[Row]]:
    """The rows of a task by split: no text, and no pair in either order, occurs twice; no text is paired with itself.

    Each row has the text columns, `label` (the given one), `idx`, `posterior` (class probabilities; for mini-stsb mean
    and standard deviation of the score before it is cut to [0, 5]), `clean_label` (drawn from the posterior),
    `difficulty` in [0, 1] (the depth of the construction) and `flipped`, true only in train.

    Raises ValueError for an unknown task.
    """
    if task not in GRAMMARS:
        raise ValueError(f"unknown task {task!r}; MiniGLUE has {', '.join(GRAMMARS)}")
    draw, columns = GRAMMARS[task]
    rng = random.Random(f"{task} {seed}")
    drafts = _distinct(draw, sum(SIZES.values()), rng)
    rows: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        rows[split] = [_row(task, columns, next(drafts), number, split == "train", rng) for number in range(size)]
    return rows


def _distinct(draw: Callable[[random.Random], Draft], count: int, rng: random.Random) -> Iterator[Draft]:
    seen: set[tuple[str, ...]] = set()
    drafts: list[Draft] = []
    while len(drafts) < count:
        draft = draw(rng)
        key = tuple(sorted(draft.texts))
        if key not in seen and len(set(key)) == len(key):
            seen.add(key)
            drafts.append(draft)
    rng.shuffle(drafts)  # short sentences run out early; no split shall get only those that are left
    return iter(drafts)


def corpus_sentences(held_out: Collection[str], seed: int = 0) -> dict[str, list[str]]:
    """Unlabelled sentences of all four grammars by split, for masked-language-model training: none occurs twice.

    The grammars take turns with a draft each, of which every text is a sentence; one that has run out of new sentences
    adds nothing.  None of `held_out` is among them.  `write` gives it all texts of the tasks' validation and test
    splits: a network that had learnt those by heart would be measured on what it has seen, and its scores would say
    too much.
    """
    rng = random.Random(f"corpus {seed}")
    found: dict[str, None] = {}  # a set that keeps its order
    while len(found) < sum(CORPUS_SIZES.values()):
        for draw, _ in GRAMMARS.values():
            found |= dict.fromkeys(text for text in draw(rng).texts if text not in held_out)
    # Short sentences come first, since they run out early: only a shuffle gives both splits one distribution.
    lines = iter(rng.sample(list(found), len(found)))
    return {split: list(islice(lines, size)) for split, size in CORPUS_SIZES.items()}


def _row(task: str, columns: Sequence[str], draft: Draft, number: int, in_train: bool, rng: random.Random) -> Row:
    if task == "mini-stsb":
        mean, deviation = draft.posterior
        noise = NormalDist().inv_cdf((rng.randrange(9999) + 1) / 10_000)
        clean: float = round(min(5.0, max(0.0, mean + deviation * noise)), 3)
    else:
        clean = _drawn(draft.posterior, rng)
    flipped = in_train and rng.randrange(1000) < 1000 * _FLIPPED_SHARE
    label = clean
    if flipped and task == "mini-stsb":
        label = round(5.0 - clean, 3)
    elif flipped:
        label = (clean + 1 + rng.randrange(len(draft.posterior) - 1)) % len(draft.posterior)
    return {
        **dict(zip(columns, draft.texts, strict=True)),
        "label": label,
        "idx": number,
        "posterior": list(draft.posterior),
        "clean_label": clean,
        "difficulty": round(min(1.0, draft.depth / _DEEPEST[task]), 4),
        "flipped": flipped,
    }


def _drawn(posterior: Sequence[float], rng: random.Random) -> int:
    """A class, drawn with the probabilities of `posterior`, which are multiples of 1/10,000."""
    point, below = rng.randrange(10_000), 0
    for label, probability in enumerate(posterior):
        below += round(10_000 * probability)
        if point < below:
            return label
    return len(posterior) - 1


# ---------------------------------------------------------------------------------------------------------------------
# Words and files

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PREFIXES, _SUFFIXES = ("un",), ("ed", "ly", "s")


_BASE_VERBS = frozenset(chain.from_iterable(chain.from_iterable(VERBS.values())))


def vocabulary() -> list[str]:
    """The word pieces of all four tasks, special ones first, then in alphabetical order.

    Plurals, pasts, adverbs and negated adjectives are split, as BERT's own vocabulary splits rare words.
    """
    pieces = chain.from_iterable(_pieces(word) for word in _words())
    return [*SPECIAL, *sorted(set(pieces))]


def _words() -> set[str]:
    """Every word that a grammar can write."""
    tables: list[Iterable[str]] = [
        ADJECTIVES,
        NEGATORS,
        INTENSIFIERS,
        ASPECTS,
        COPULAS,
        BELIEVED,
        DENIED,
        ("the", "and", "but", "although"),
    ]
    tables += [(",", "."), QUANTIFIERS, NOUNS, *NOUNS.values(), ACTIONS, *ACTIONS.values(), MODIFIERS, ADVERBS]
    nouns = [*KINDS, *chain.from_iterable(PEOPLE + ANIMALS)]
    verbs = sorted(_BASE_VERBS)
    tables += [nouns, [f"{noun}s" for noun in nouns], verbs, [_past(verb) for verb in verbs], TIMES, NEGATION]
    tables += [_NUMBERS, _NUMBERS.values(), ("did", "was", "were", "by")]
    return {word for phrase in chain.from_iterable(tables) for word in phrase.split()}


def _pieces(word: str) -> list[str]:
    """A word as WordPiece will cut it: a prefix, or a suffix, split off where a word of some length is left."""
    for prefix in _PREFIXES:
        if word.startswith(prefix) and len(word) > len(prefix) + 5:
            return [prefix, f"##{word.removeprefix(prefix)}"]
    if word not in (*ADJECTIVES, *COPULAS):
        for suffix in _SUFFIXES:
            if word.endswith(suffix) and len(word) > len(suffix) + 2:
                # The piece that is found must be the longest one in the vocabulary: "observe", not "observ".
                suffix = (
                    "d" if word.endswith("ed") and _past(word[:-1]) == word and word[:-1] in _BASE_VERBS else suffix
                )
                return [word.removesuffix(suffix), f"##{suffix}"]
    return [word]


def write(folder: Path | str) -> None:
    """Write all tasks, the corpus and the vocabulary below `folder`.

    The files are `<task>/<split>-….jsonl`, `mini-corpus/<split>.txt` and `vocab.txt`.
    """
    folder = Path(folder)
    held_out: set[str] = set()
    for task, (_, columns) in GRAMMARS.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, rows in generate(task).items():
            if split != "train":
                held_out |= {row[column] for row in rows for column in columns}
            shards = [rows[start : start + _SHARD_ROWS] for start in range(0, len(rows), _SHARD_ROWS)]
            for number, shard in enumerate(shards):
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shard)
                path = folder / task / f"{split}-{number:05d}-of-{len(shards):05d}.jsonl"
                path.write_bytes(text.encode())
    (folder / "mini-corpus").mkdir(exist_ok=True)
    for split, lines in corpus_sentences(held_out).items():
        (folder / "mini-corpus" / f"{split}.txt").write_bytes("".join(f"{line}\n" for line in lines).encode())
    (folder / "vocab.txt").write_bytes("".join(f"{piece}\n" for piece in vocabulary()).encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.miniglue FOLDER")
    write(sys.argv[1])
