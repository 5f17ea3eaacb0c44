"""Statistics that decide: paired differences by seed, verdicts with a margin of equality, and when to stop looking.

    plan = Plan(margin=0.5, looks=(5, 10, 20, 30))  # before the first run, in points
    decision = decide(plan, lgtm, kd)  # seed -> accuracy
    decision.verdict, decision.difference.mean, decision.next_look

Two runs with the same seed share the first weights and the order of the data, so what is looked at is the difference
seed by seed, and everything follows from its interval.  A verdict is false only if the interval misses the true
difference: whoever keeps the intervals honest, over all looks and all claims, keeps the verdicts honest.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

Verdict = Literal["better", "worse", "equal", "open"]
BySeed: TypeAlias = Mapping[int, float] | pd.Series
"""A value for each seed."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An estimated difference a − b with what is needed for its interval, in the unit of the values.

    Where all differences are equal there is no scatter to judge by, and what is given is the limit of small scatter:
    the interval is the point, p is 0, or 1 where all differences are zero, as those of two arms that compute the same
    are.  A coarse metric can bring equal differences about by chance, so do not look after two or three seeds.
    """

    mean: float
    error: float
    """the standard error of the mean"""
    freedom: float
    """degrees of freedom of Student's t"""
    seeds: int
    """the number of differences"""
    level: float = 0.95
    """of the interval"""

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return float(stats.t.ppf((1 + self.level) / 2, self.freedom)) * self.error

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width

    @property
    def std(self) -> float:
        """The standard deviation of the differences (n − 1)."""
        return self.error * math.sqrt(self.seeds)

    @property
    def p(self) -> float:
        """The two-sided p-value of "no difference": below 1 − level where the interval does not hold zero."""
        return 2 * self._tail(abs(self.mean))

    def p_equal(self, margin: float) -> float:
        """The p-value of "the arms differ by the margin or more": below 1 − level where the interval is within it.

        It is twice the larger one of two one-sided tests, so that both p-values are judged at the same level.

        Source: Schuirmann (1987), the two one-sided tests procedure
        """
        return min(1.0, 2 * self._tail(margin - abs(self.mean)))

    def _tail(self, distance: float) -> float:
        if self.error == 0:
            return 0.5 if distance == 0 else float(distance < 0)
        return float(stats.t.sf(distance / self.error, self.freedom))


def paired(a: BySeed, b: BySeed, level: float = 0.95, shared: bool = False) -> Difference:
    """The mean of a − b over seeds with its Student-t interval, which takes the differences for normal.

    `shared` takes the seeds that both have and leaves out the others.

    Raises ValueError, with the seeds, where one has seeds that the other has not, where a seed occurs twice, where a
    value is not a finite number, and for fewer than two seeds.
    """
    return _difference(_gains(a, b, shared), level)


def _difference(gains: pd.Series, level: float) -> Difference:
    n = len(gains)
    error = float(gains.std()) / math.sqrt(n)
    return Difference(mean=float(gains.mean()), error=error, freedom=n - 1, seeds=n, level=level)


def _gains(a: BySeed, b: BySeed, shared: bool) -> pd.Series:
    """The differences in the order of the seeds."""
    first, second = _checked(a, "a"), _checked(b, "b")
    missing = [
        f"{name} has no {_listed(other.index.difference(one.index))}"
        for name, one, other in (("a", first, second), ("b", second, first))
        if not other.index.isin(one.index).all()
    ]
    if missing and not shared:
        raise ValueError(f"{' and '.join(missing)}: compare runs of the same seeds, or ask for those that are shared")
    gains = (first - second).dropna().sort_index()
    if len(gains) < 2:
        raise ValueError(f"{_listed(gains.index)} in both: an interval needs two seeds at least")
    return gains


def _checked(values: BySeed, name: str) -> pd.Series:
    series = pd.Series(values, dtype=float)
    if not series.index.is_unique:
        raise ValueError(f"{name} has {_listed(series.index[series.index.duplicated()].unique())} twice")
    if not np.isfinite(series).all():
        wrong = _listed(series.index[~np.isfinite(series)])
        raise ValueError(f"{name} is NaN or infinite for {wrong}: leave out what did not finish, and say so")
    return series


def _listed(seeds: pd.Index) -> str:
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds)) or 'none'}"


def verdict(difference: Difference, margin: float, lower_is_better: bool = False) -> Verdict:
    """What the interval says of a against b: "better", "worse", "equal" within the margin, or "open".

    | the interval                                   | verdict |
    |------------------------------------------------|---------|
    | inside (−margin, margin), with or without zero | equal   |
    | above zero, and up to the margin or beyond     | better  |
    | below zero, and down to −margin or beyond      | worse   |
    | anything else                                  | open    |

    A difference that is certainly there and certainly smaller than what counts is "equal": that is the useful thing to
    know, and the interval beside it says the rest.  "better" says that the true difference is above zero, not that it
    is above the margin.  `lower_is_better`, as for losses, exchanges better and worse.  With margin 0 nothing is equal.

    An interval of level 1 − α inside the margin is the test of equivalence by two one-sided tests at α/2 each.

    Source: Schuirmann (1987), the two one-sided tests procedure
    """
    gain = -difference.mean if lower_is_better else difference.mean
    word: Verdict = get_args(Verdict)[int(_verdicts(gain, difference.half_width, margin))]
    return word


def _verdicts(mean: Any, half_width: Any, margin: float) -> Any:
    """The verdicts on many intervals, as places in `Verdict`."""
    low, high = mean - half_width, mean + half_width
    return np.select([(low > -margin) & (high < margin), low > 0, high < 0], [2, 0, 1], 3)


@dataclass(frozen=True)
class Plan:
    """How one claim is decided, stated before the first run: looks after so many seeds, and what counts as equal.

    It ends at the first look with a verdict, or open at the last.  Who looks several times errs more often, so that all
    looks use intervals of one higher level, `nominal`, at which *all* of them hold the true difference with probability
    `level`.  Whatever is said at any look is then right with that probability, and the rule when to stop cannot spoil
    it.

    Raises ValueError if the looks do not increase from two seeds on, for a negative margin or an impossible level.

    Source: Pocock (1977), a constant level for repeated looks, here for Student's t and any looks
    """

    margin: float
    """differences below it count as none; in the unit of the metric"""
    looks: tuple[int, ...]
    """the numbers of seeds after which one looks; the last one is the largest number of seeds"""
    level: float = 0.95
    """probability that all intervals of this plan hold the true difference"""
    lower_is_better: bool = False
    """of the metric"""

    def __post_init__(self) -> None:
        if not self.looks or self.looks[0] < 2 or any(b <= a for a, b in itertools.pairwise(self.looks)):
            raise ValueError(f"looks are {self.looks}; expected increasing numbers of seeds, from two on")
        if not 0 <= self.margin < math.inf or not 0 < self.level <= 0.9999:
            raise ValueError(f"margin {self.margin}, level {self.level}; expected 0 or more, and above 0 up to 0.9999")

    @property
    def at_most(self) -> int:
        """The largest number of seeds."""
        return self.looks[-1]

    @property
    def nominal(self) -> float:
        """The level of the interval at each look."""
        if len(self.looks) == 1:
            return self.level
        smallest = _smallest_p(self.looks)
        return 1 - float(smallest[math.floor((1 - self.level) * (len(smallest) + 1)) - 1])

    def corrected(self, p: float) -> float:
        """A p-value seen at any look, corrected for all of them: the chance of one so small at some look."""
        if len(self.looks) == 1:
            return p
        smallest = _smallest_p(self.looks)
        return float(np.searchsorted(smallest, p, side="right") + 1) / (len(smallest) + 1)


@functools.lru_cache(maxsize=64)
def _smallest_p(looks: tuple[int, ...], repetitions: int = 200_000) -> np.ndarray:
    """The smallest p-value over the looks in each of so many studies without any difference, sorted.

    It depends neither on the scatter nor, if p is taken for the true difference, on that.
    """
    generator, found = np.random.default_rng(0), []
    for _ in range(repetitions // 10_000):
        mean, error = _at_looks(generator.standard_normal((10_000, looks[-1])), looks)
        found.append(2 * stats.t.sf(abs(mean) / error, np.array(looks) - 1).min(axis=1))
    return np.sort(np.concatenate(found))


def _at_looks(values: np.ndarray, looks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error after each look, (studies, looks), of values (studies, seeds)."""
    n = np.array(looks)
    mean = values.cumsum(axis=1)[:, n - 1] / n
    variance = ((values**2).cumsum(axis=1)[:, n - 1] - n * mean**2) / (n - 1)
    return mean, np.sqrt(variance / n)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a plan says of the seeds that are there."""

    verdict: Verdict
    difference: Difference
    """at the last look, with the interval that the verdict is read from"""
    plan: Plan
    next_look: int | None
    """the number of seeds to have next; None where the plan has come to its end"""


def decide(plan: Plan, a: BySeed, b: BySeed, shared: bool = False) -> Decision:
    """Follow the plan through the seeds in their order: look, and stop at the first look that is not open.

    Seeds beyond that look change nothing any more, and seeds between two looks wait for the next one.

    Raises ValueError for fewer seeds than the first look wants, and what `paired` raises.
    """
    gains = _gains(a, b, shared)
    looks = [look for look in plan.looks if look <= len(gains)]
    if not looks:
        raise ValueError(f"{len(gains)} seeds are there, the first look is after {plan.looks[0]}")
    for look in looks:
        difference = _difference(gains.iloc[:look], plan.nominal)
        word = verdict(difference, plan.margin, plan.lower_is_better)
        if word != "open":
            return Decision(verdict=word, difference=difference, plan=plan, next_look=None)
    following = [look for look in plan.looks if look > looks[-1]]
    return Decision(verdict="open", difference=difference, plan=plan, next_look=next(iter(following), None))


def rehearse(
    plan: Plan, sd: float, differences: Sequence[float], repetitions: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """What would come of a plan, in simulated studies with normal differences of standard deviation `sd`.

    A row for each true difference a − b, under the plan and under the same looks without a correction: the shares of
    the verdicts, the share that is wrong ("better" or "worse" the wrong way or without a difference, "equal" for the
    margin or more) and the mean number of seeds.
    """
    values = np.random.default_rng(seed).standard_normal((repetitions, plan.at_most))
    mean, error = _at_looks(sd * values, plan.looks)
    rows = []
    for rule, level in (("plan", plan.nominal), ("uncorrected", plan.level)):
        half_width = stats.t.ppf((1 + level) / 2, np.array(plan.looks) - 1) * error
        for true in differences:
            sign = -1 if plan.lower_is_better else 1
            words = _verdicts(sign * (mean + true), half_width, plan.margin)
            ended = words != 3
            ended[:, -1] = True
            last = ended.argmax(axis=1)
            said = np.bincount(words[np.arange(repetitions), last], minlength=4) / repetitions
            false = np.array([sign * true <= 0, sign * true >= 0, abs(true) >= plan.margin, False])
            shares = dict(zip(get_args(Verdict), said, strict=True))
            seeds = np.array(plan.looks)[last].mean()
            rows.append({"rule": rule, "difference": true, **shares, "wrong": said[false].sum(), "seeds": seeds})
    return pd.DataFrame(rows)


def holm(p: ArrayLike) -> np.ndarray:
    """Corrected p-values of a family: the claims whose value is below α hold together with probability 1 − α.

    Source: Holm (1979)
    """
    values = np.asarray(p, dtype=float)
    order = values.argsort(kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    return corrected


def family(decisions: Mapping[str, Decision], level: float = 0.95) -> pd.DataFrame:
    """The verdicts on several claims together, a row for each: the difference, p-values raw and corrected, verdicts.

    "equal" takes what `verdict` takes, with Holm's correction among all claims of equality; else "better" and "worse"
    likewise among all claims of a difference; p-values are corrected for the looks of their plan first.  So with
    probability `level` no two arms without a difference are told apart, and with probability `level` no two that differ
    by their margin are called equal, whatever the claims have in common.  (That no difference gets the wrong sign is
    proven for independent claims only.)  The two kinds are corrected apart, because Holm's steps would not be honest
    for the smaller one of a claim's two values.  The interval is the one of the claim alone; a family of m whose plans
    say level 1 − 0.05 / m goes on until its claims are decided together.

    Columns: mean, low, high, seeds, p, p_equal, holm, holm_equal (both corrected), alone (the claim's own verdict),
    verdict.

    Source: Holm (1979); Shaffer (1980) for the sign
    """
    differences = [one.difference for one in decisions.values()]
    plans = [one.plan for one in decisions.values()]
    table = pd.DataFrame(
        [[d.mean, d.low, d.high, d.seeds, d.p, d.p_equal(p.margin)] for d, p in zip(differences, plans, strict=True)],
        index=[*decisions],
        columns=["mean", "low", "high", "seeds", "p", "p_equal"],
    )
    for raw, name in (("p", "holm"), ("p_equal", "holm_equal")):
        table[name] = holm([plan.corrected(p) for plan, p in zip(plans, table[raw], strict=True)])
    table["alone"] = [one.verdict for one in decisions.values()]
    up = (table["mean"] > 0) != [plan.lower_is_better for plan in plans]
    told = [table["holm_equal"] < 1 - level, (table["holm"] < 1 - level) & up, table["holm"] < 1 - level]
    table["verdict"] = np.select(told, ["equal", "better", "worse"], "open")
    return table


def chances(
    seeds: int, sd: float, difference: float = 0.0, margin: float = 0.0, level: float = 0.95
) -> dict[Verdict, float]:
    """The probability of each verdict after one look at so many seeds, given the true difference and scatter.

    With the scatter that the seeds will show given, the mean is normal; the probability is averaged over that
    scatter's distribution.  Without a margin, better and worse together are the power of the t-test.
    """
    error = sd / math.sqrt(seeds)
    shown = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, seeds - 1) / (seeds - 1))
    half_width = stats.t.ppf((1 + level) / 2, seeds - 1) * shown * error
    beyond = np.maximum(half_width, margin - half_width)  # a mean beyond it is no longer equal
    within = stats.norm.cdf([margin - half_width - difference, half_width - margin - difference], scale=error)
    equal = float((within[0] - within[1]).clip(min=0).mean())
    better = float(stats.norm.sf(beyond - difference, scale=error).mean())
    worse = float(stats.norm.cdf(-beyond - difference, scale=error).mean())
    return {"better": better, "worse": worse, "equal": equal, "open": max(0.0, 1 - better - worse - equal)}


def seeds_to_see(sd: float, effect: float, power: float = 0.8, level: float = 0.95) -> int:
    """How many seeds it takes to see a true difference with probability `power`; sd is of the paired differences.

    Raises ValueError for an effect of zero, which is never seen.
    """
    if effect == 0:
        raise ValueError("effect is 0: no number of seeds shows a difference that is not there")
    return _enough(sd, power, lambda n: chances(n, sd, abs(effect), level=level)["better"])


def seeds_to_equate(sd: float, margin: float, difference: float = 0.0, power: float = 0.8, level: float = 0.95) -> int:
    """How many seeds it takes to call two arms equal that are, or differ by less than the margin.

    Raises ValueError unless the true difference is smaller than the margin.
    """
    if abs(difference) >= margin:
        raise ValueError(f"the difference {difference} is not smaller than the margin {margin}: they are not equal")
    return _enough(sd, power, lambda n: chances(n, sd, difference, margin, level)["equal"])


def seeds_to_settle(difference: Difference, margin: float, power: float = 0.8) -> int:
    """How many seeds, all in all, an open verdict needs at the scatter seen: enough to see a difference of the margin,
    and enough to call equal what does not differ at all.

    It does not use the mean that was seen, which is what is in doubt.  A true difference between zero and the margin
    takes longer, in the middle up to about four times.

    Raises ValueError for margin 0.
    """
    see = seeds_to_see(difference.std, margin, power, difference.level)
    return max(see, seeds_to_equate(difference.std, margin, 0.0, power, difference.level))


def _enough(sd: float, power: float, chance: Callable[[int], float]) -> int:
    """The smallest number of seeds, from 2 on, with so large a chance, which grows with them."""
    if sd == 0:
        return 2
    low, high = 1, 2
    while chance(high) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True)
class Pooled(Difference):
    """A difference over several settings, each of which counts the same, and how much they disagree."""

    settings: int
    between: float
    """the estimated standard deviation of the settings' true differences"""
    heterogeneity: float
    """Cochran's Q: squared distances from the precision-weighted mean, in units of their squared errors"""
    p_same: float
    """of "the true difference is the same in all settings" (from Q; rough for few seeds)"""

    @property
    def share_between(self) -> float:
        """I²: which share of the scatter between the settings' means is not their seeds' noise."""
        return max(0.0, 1 - (self.settings - 1) / self.heterogeneity) if self.heterogeneity > 0 else 0.0


def pooled(differences: Sequence[Difference], others: bool = False, level: float = 0.95) -> Pooled:
    """The mean difference over settings (tasks) whose runs are independent.

    As fixed effects, it is about these settings: the error is that of their seeds, with Welch and Satterthwaite's
    degrees of freedom.  With `others`, as random effects, it is about settings like these: the error is taken from how
    the settings' means scatter, which has settings − 1 degrees of freedom.  All settings count the same, as in GLUE's
    average: weights by precision would come from the scatter of a few seeds and be noise themselves.

    Raises ValueError for fewer than two settings.

    Source: Welch (1947); Hedges and Olkin (1985) for `between`; Higgins and Thompson (2002) for I²
    """
    k = len(differences)
    if k < 2:
        raise ValueError(f"{k} settings: two at least can be pooled")
    means = np.array([one.mean for one in differences])
    squares = np.array([one.error**2 for one in differences])
    freedoms = np.array([one.freedom for one in differences])
    inner = float(squares.sum())
    error = float(means.std(ddof=1)) / math.sqrt(k) if others else math.sqrt(inner) / k
    freedom = k - 1 if others else inner**2 / float((squares**2 / freedoms).sum()) if inner else float(freedoms.sum())
    between = math.sqrt(max(0.0, float(means.var(ddof=1)) - inner / k))
    squares = squares.clip(min=1e-12 * (squares.max() or 1.0))  # a setting without scatter weighs much, not infinitely
    q = float(((means - np.average(means, weights=1 / squares)) ** 2 / squares).sum())
    return Pooled(
        mean=float(means.mean()),
        error=error,
        freedom=freedom,
        seeds=sum(one.seeds for one in differences),
        level=level,
        settings=k,
        between=between,
        heterogeneity=q,
        p_same=float(stats.chi2.sf(q, k - 1)),
    )
