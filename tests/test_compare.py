"""Statistics that decide: against scipy, textbook numbers, laws, and simulated studies whose truth is known."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from kdlib import compare
from kdlib.compare import (
    Decision,
    Difference,
    Plan,
    chances,
    decide,
    family,
    holm,
    paired,
    pooled,
    rehearse,
    seeds_to_equate,
    seeds_to_see,
    seeds_to_settle,
    verdict,
)

SLEEP = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
"""Student's (1908) own data: hours of sleep gained by two drugs, ten patients; t = 4.06, p = 0.0028."""

values = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)
pairs = values.flatmap(lambda a: st.tuples(st.just(a), st.lists(st.sampled_from(a), min_size=len(a), max_size=len(a))))
margins = st.floats(0, 50)


def by_seed(numbers):
    return dict(enumerate(map(float, numbers)))


def interval(low, high, level=0.95):
    """A difference with this interval, of 10 seeds."""
    error = (high - low) / 2 / stats.t.ppf((1 + level) / 2, 9)
    return Difference(mean=(low + high) / 2, error=error, freedom=9, seeds=10, level=level)


class TestPaired:
    def test_students_sleep(self):
        found = paired(by_seed(SLEEP[1]), by_seed(SLEEP[0]))
        assert found.mean == pytest.approx(1.58) and found.std == pytest.approx(1.23, abs=5e-3)
        assert (found.low, found.high) == pytest.approx((0.70, 2.46), abs=5e-3)
        assert found.p == pytest.approx(0.0028, abs=5e-5) and found.seeds == 10

    @given(pairs, st.floats(0.5, 0.999))
    def test_it_is_scipys_paired_t_test(self, pair, level):
        a, b = map(np.array, pair)
        assume((a - b).std() > 1e-6)
        found, oracle = paired(by_seed(a), by_seed(b), level), stats.ttest_rel(a, b)
        assert found.p == pytest.approx(oracle.pvalue)
        assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval(level)))

    @given(pairs)
    def test_exchanging_the_arms_changes_the_sign(self, pair):
        a, b = map(by_seed, pair)
        there, back = paired(a, b), paired(b, a)
        assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
        assert back.p == pytest.approx(there.p) and back.error == pytest.approx(there.error)

    def test_seeds_are_matched_by_name_not_by_place(self):
        a, b = by_seed(SLEEP[1]), by_seed(SLEEP[0])
        turned = pd.Series(b)[::-1]
        assert paired(a, turned) == paired(a, b) and paired(pd.Series(a)[::-1], turned) == paired(a, b)

    def test_the_interval_shrinks_to_the_mean_with_more_seeds_and_a_lower_level(self):
        found = [paired({n: n % 2 for n in range(2 * k)}, dict.fromkeys(range(2 * k), 0)) for k in (2, 4, 16, 400)]
        widths = [one.half_width for one in found]
        assert widths == sorted(widths, reverse=True) and widths[-1] < 0.04
        assert [one.mean for one in found] == [0.5] * 4
        levels = [dataclasses.replace(found[0], level=level).half_width for level in (0.999, 0.95, 0.5, 1e-9)]
        assert levels == sorted(levels, reverse=True) and levels[-1] == pytest.approx(0, abs=1e-8)

    def test_no_scatter_is_the_limit_of_small_scatter(self):
        same, shifted = paired({0: 0.5, 1: 0.7}, {0: 0.5, 1: 0.7}), paired({0: 1.5, 1: 0.5}, {0: 1.0, 1: 0.0})
        assert (same.mean, same.low, same.high, same.p, same.std) == (0, 0, 0, 1, 0)
        assert (shifted.mean, shifted.low, shifted.high, shifted.p) == (0.5, 0.5, 0.5, 0)
        assert (same.p_equal(0.1), same.p_equal(0), shifted.p_equal(0.4)) == (0, 1, 1)
        assert (verdict(same, 0.1), verdict(shifted, 0.1), verdict(shifted, 0.6)) == ("equal", "better", "equal")
        assert verdict(shifted, 0.5) == "better"  # the margin itself is no longer equal
        tiny = Difference(mean=0.5, error=1e-12, freedom=1, seeds=2)
        assert tiny.p == pytest.approx(0, abs=1e-9) and tiny.p_equal(0.4) == pytest.approx(1)

    def test_seeds_of_one_arm_alone_are_named(self):
        a, b = {0: 1.0, 1: 2.0, 2: 4.0, 7: 1.0}, {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0}
        with pytest.raises(
            ValueError, match=r"a has no seeds 3, 4 and b has no seed 7: compare runs of the same seeds"
        ):
            paired(a, b)
        with pytest.raises(ValueError, match=r"^b has no seed 7: "):
            paired(a, {0: 0.0, 1: 0.0, 2: 0.0})
        assert paired(a, b, shared=True) == paired({n: a[n] for n in (0, 1, 2)}, {n: b[n] for n in (0, 1, 2)})

    def test_what_cannot_be_compared_is_named(self):
        good = {0: 1.0, 1: 2.0, 2: 3.0}
        with pytest.raises(ValueError, match="b has seed 1 twice"):
            paired(good, pd.Series([1.0, 2.0, 3.0, 4.0], index=[0, 1, 1, 2]))
        for shared in (False, True):
            with pytest.raises(ValueError, match="a is NaN or infinite for seeds 1, 2"):
                paired({0: 1.0, 1: math.nan, 2: math.inf}, good, shared=shared)
        with pytest.raises(ValueError, match="seed 0 in both: an interval needs two seeds"):
            paired({0: 1.0}, {0: 2.0})
        with pytest.raises(ValueError, match="seeds none in both"):
            paired({0: 1.0, 1: 1.0}, {2: 2.0}, shared=True)


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "high", "word"),
        [
            (-0.4, 0.4, "equal"),  # around zero
            (0.1, 0.4, "equal"),  # certainly above zero, certainly less than counts
            (-0.4, -0.1, "equal"),
            (0.1, 0.5, "better"),  # up to the margin, which an interval inside does not reach
            (0.1, 0.9, "better"),
            (0.6, 0.9, "better"),
            (-0.5, -0.1, "worse"),
            (-0.9, -0.1, "worse"),
            (-0.9, -0.6, "worse"),
            (-0.1, 0.9, "open"),
            (-0.9, 0.1, "open"),
            (-0.9, 0.9, "open"),
            (-0.5, 0.5, "open"),
        ],
    )
    def test_every_case(self, low, high, word):
        margin = 0.5 if abs(abs(low) - 0.5) > 0.01 and abs(high - 0.5) > 0.01 else 0.5 - 1e-12
        turned = {"better": "worse", "worse": "better"}
        assert verdict(interval(low, high), margin) == word
        assert verdict(interval(low, high), margin, lower_is_better=True) == turned.get(word, word)
        assert verdict(interval(-high, -low), margin) == turned.get(word, word)

    def test_without_a_margin_nothing_is_equal(self):
        assert verdict(interval(-0.1, 0.1), 0) == "open" and verdict(interval(0.1, 0.2), 0) == "better"
        assert verdict(paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}), 0) == "open"

    @given(pairs, margins, margins)
    def test_a_larger_margin_never_opens_what_was_equal(self, pair, margin, more):
        found = paired(*map(by_seed, pair))
        if verdict(found, margin) == "equal":
            assert verdict(found, margin + more) == "equal"
        elif verdict(found, margin) != "open":
            assert verdict(found, margin + more) in (verdict(found, margin), "equal")

    @given(pairs, margins, st.floats(0.5, 0.99))
    def test_it_is_two_tests_at_one_level(self, pair, margin, level):
        """Equal where two one-sided t-tests of scipy reject at half the level each; else a two-sided one."""
        a, b = map(np.array, pair)
        assume((a - b).std() > 1e-6)
        found = paired(by_seed(a), by_seed(b), level)
        ends = [
            stats.ttest_1samp(a - b, -margin, alternative="greater"),
            stats.ttest_1samp(a - b, margin, alternative="less"),
        ]
        p_equal, p = max(one.pvalue for one in ends), stats.ttest_1samp(a - b, 0).pvalue
        assume(min(abs(p_equal - (1 - level) / 2), abs(p - 1 + level)) > 1e-9)
        assert found.p_equal(margin) == pytest.approx(min(1, 2 * p_equal))
        told = "better" if found.mean > 0 else "worse"
        assert verdict(found, margin) == ("equal" if p_equal < (1 - level) / 2 else told if p < 1 - level else "open")


class TestPlan:
    def test_what_cannot_be_a_plan(self):
        for looks in ((), (1, 5), (5, 5), (10, 5)):
            with pytest.raises(ValueError, match="increasing numbers of seeds, from two on"):
                Plan(0.5, looks)
        for margin, level in ((-0.1, 0.95), (math.nan, 0.95), (0.5, 0.99995), (0.5, 0.0)):
            with pytest.raises(ValueError, match="margin"):
                Plan(margin, (5,), level)

    def test_one_look_needs_no_correction(self):
        plan = Plan(0.5, (7,), 0.9)
        assert plan.nominal == 0.9 and plan.at_most == 7 and plan.corrected(0.03) == 0.03

    def test_many_seeds_and_equal_steps_are_pococks_table(self):
        """Pocock (1977), Table 1: nominal levels for 2 and 5 looks at 5 % with known variance."""
        for looks, nominal in ((2, 0.0294), (5, 0.0158)):
            found = 1 - Plan(0.5, tuple(range(60, 60 * looks + 1, 60)), 0.95).nominal
            assert found == pytest.approx(nominal, abs=1e-3)

    def test_p_values_are_corrected_as_the_intervals_are(self):
        plan = Plan(0.5, (5, 10, 20, 30))
        at = 1 - plan.nominal
        assert plan.corrected(at * (1 - 1e-9)) <= 0.05 < plan.corrected(at * (1 + 1e-9))
        assert plan.corrected(0) < 1e-5 and plan.corrected(1.0) == 1
        for p in (0.001, 0.01, 0.1):
            assert p < plan.corrected(p) < 4 * p

    def test_it_stops_at_the_first_look_that_is_not_open(self):
        generator = np.random.default_rng(3)
        noise = by_seed(generator.normal(0, 0.5, 30))
        zero, plan = dict.fromkeys(range(30), 0.0), Plan(0.5, (5, 10, 20, 30))
        intervals = [
            paired({n: noise[n] for n in range(k)}, dict.fromkeys(range(k), 0.0), plan.nominal) for k in plan.looks
        ]
        words = [verdict(one, 0.5) for one in intervals]
        assert words == ["open", "open", "equal", "equal"]  # what the seed was taken for
        found = decide(plan, noise, zero)
        assert found == Decision(verdict="equal", difference=intervals[2], plan=plan, next_look=None)
        for seeds, look, following in ((5, 0, 10), (9, 0, 10), (10, 1, 20), (19, 1, 20)):
            part = {n: noise[n] for n in range(seeds)}
            now = decide(plan, part, dict.fromkeys(part, 0.0))
            assert (now.verdict, now.next_look, now.difference) == ("open", following, intervals[look])
        short = Plan(0.5, (5, 10))
        assert decide(short, noise, zero).verdict == "open" and decide(short, noise, zero).next_look is None
        late = {**noise, 29: 1000.0}
        assert decide(plan, late, zero) == found  # seeds beyond the look change nothing
        with pytest.raises(ValueError, match="4 seeds are there, the first look is after 5"):
            decide(plan, dict.fromkeys(range(4), 0.0), dict.fromkeys(range(4), 0.0))

    def test_lower_is_better(self):
        plan = Plan(0.1, (5,), lower_is_better=True)
        loss = {n: 1.0 + 0.01 * n for n in range(5)}
        more = {n: 2.0 - 0.01 * n for n in range(5)}
        assert decide(plan, loss, more).verdict == "better" and decide(plan, more, loss).verdict == "worse"


class TestErrors:
    """Simulated studies: what is said wrongly, and how often."""

    PLAN = Plan(0.5, (5, 10, 20, 30))

    def test_a_plan_keeps_its_level_and_looking_without_one_does_not(self):
        repetitions = 4000
        allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
        for sd in (0.4, 1.0):  # equality can be shown; it hardly can
            table = rehearse(self.PLAN, sd, [0.0, 0.5, -0.5], repetitions).set_index(["rule", "difference"])
            assert (table.loc["plan", "wrong"] < allowed).all()
        assert table.loc[("plan", 0.0), ["better", "worse"]].sum() > 0.035  # not by saying nothing
        assert table.loc[("uncorrected", 0.0), "wrong"] > 0.11
        assert table.loc["plan", "equal"].loc[[0.5, -0.5]].max() < 0.03

    def test_the_rehearsal_follows_the_plan(self):
        """Study by study, what `decide` says of the same numbers."""
        plan = dataclasses.replace(self.PLAN, looks=(3, 6, 12), lower_is_better=True)
        drawn = 0.5 * np.random.default_rng(4).standard_normal((200, 12)) - 0.3
        said = [decide(plan, by_seed(row), by_seed(0 * row)) for row in drawn]
        table = rehearse(plan, 0.5, [-0.3], repetitions=200, seed=4).iloc[0]
        for word in ("better", "worse", "equal", "open"):
            assert table[word] == np.mean([one.verdict == word for one in said])
        assert table["seeds"] == np.mean([one.difference.seeds for one in said])
        assert table["wrong"] == table["worse"] and table["better"] > 0.25

    def test_power_grows_with_the_difference_and_seeds_fall(self):
        table = rehearse(self.PLAN, 1.0, [0.5, 1.0, 1.5], 1000)
        for rule, rows in table.groupby("rule"):
            assert rows["better"].is_monotonic_increasing and rows["seeds"].is_monotonic_decreasing, rule
        assert table["better"].iloc[2] > 0.99

    def test_a_family_keeps_its_level(self):
        """Twelve claims, half of them without a difference, half at the margin, all with common noise."""
        generator, plan, wrong = np.random.default_rng(5), Plan(0.5, (5, 10)), np.zeros(2)
        true = np.repeat([0.0, 0.5], 6)
        for _ in range(150):
            noise = generator.normal(0, 0.35, (10, 12)) + generator.normal(0, 0.1, (10, 1))
            decisions = {str(n): decide(plan, by_seed(x), by_seed(0 * x)) for n, x in enumerate((noise + true).T)}
            words = family(decisions)["verdict"].to_numpy()
            wrong += [np.isin(words[:6], ["better", "worse"]).any(), (words[6:] == "equal").any()]
        assert (wrong / 150 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)).all()


class TestFamily:
    def test_holms_correction_by_hand(self):
        np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
        np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])
        assert holm([0.02]) == [0.02] and holm([]).size == 0

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.3))
    def test_corrected_values_reject_what_holms_steps_reject(self, p, level):
        """Step by step, as Holm wrote it: go on while the next smallest is below α over the claims that are left."""
        rejected = 0
        for left, value in zip(range(len(p), 0, -1), sorted(p), strict=True):
            if value * left >= level:
                break
            rejected += 1
        assert (holm(p) < level).sum() == rejected
        assert (holm(p) >= p).all() and (holm(p) <= np.minimum(1, len(p) * np.array(p)) + 1e-15).all()

    @staticmethod
    def decision(difference, plan=None):
        plan = plan or Plan(0.5, (difference.seeds,))
        word = verdict(difference, plan.margin, plan.lower_is_better)
        return Decision(verdict=word, difference=difference, plan=plan, next_look=None)

    @given(pairs, st.booleans())
    def test_a_family_of_one_is_the_claim(self, pair, lower):
        found = paired(*map(by_seed, pair))
        plan = Plan(0.5, (found.seeds,), lower_is_better=lower)
        row = family({"claim": self.decision(found, plan)}).loc["claim"]
        assert row["verdict"] == row["alone"]
        assert row["holm"] == row["p"] == found.p and row["holm_equal"] == row["p_equal"] == found.p_equal(0.5)

    def test_what_a_claim_says_alone_a_family_may_leave_open(self):
        claims = {
            "clear": interval(0.8, 1.0),
            "weak": interval(0.01, 0.9),
            "weak, downwards": interval(-0.9, -0.01),
            "same": interval(-0.1, 0.1),
            "nearly the same": interval(-0.49, 0.49),
            "open": interval(-1, 2),
        }
        table = family({name: self.decision(one) for name, one in claims.items()})
        assert table["alone"].tolist() == ["better", "better", "worse", "equal", "equal", "open"]
        assert table["verdict"].tolist() == ["better", "open", "open", "equal", "open", "open"]
        np.testing.assert_allclose(table["holm"], holm(table["p"]))
        losses = {name: self.decision(one, Plan(0.5, (10,), lower_is_better=True)) for name, one in claims.items()}
        assert family(losses)["verdict"].tolist() == ["worse", "open", "open", "equal", "open", "open"]

    def test_looks_are_corrected_before_claims_are(self):
        plan = Plan(0.5, (5, 10, 20))
        found = interval(0.01, 0.9, plan.nominal)
        table = family({"a": self.decision(found, plan), "b": self.decision(found, plan)})
        assert table["holm"].tolist() == pytest.approx([2 * plan.corrected(found.p)] * 2)
        assert table["alone"].tolist() == ["better"] * 2 and table["verdict"].tolist() == ["open"] * 2


class TestPower:
    def test_without_a_margin_it_is_the_noncentral_t_distribution(self):
        for seeds, effect in ((2, 1.5), (5, 1.0), (34, 0.5), (200, 0.1)):
            edge, centre = stats.t.ppf(0.975, seeds - 1), effect * math.sqrt(seeds)
            power = stats.nct.sf(edge, seeds - 1, centre) + stats.nct.cdf(-edge, seeds - 1, centre)
            found = chances(seeds, 2.0, 2 * effect)
            assert found["better"] + found["worse"] == pytest.approx(power, abs=2e-5) and found["equal"] == 0

    def test_with_one_it_is_what_comes_out(self):
        for true in (0.0, 0.2, 0.45, -0.7):
            drawn = rehearse(Plan(0.5, (8,)), 0.5, [true], 20_000).iloc[0]
            for word, chance in chances(8, 0.5, true, 0.5).items():
                assert drawn[word] == pytest.approx(chance, abs=4 * math.sqrt(0.25 / 20_000)), word

    def test_textbook_numbers_of_pairs(self):
        """Cohen's small, medium and large effects at 80 %: 199, 34 and 15 pairs."""
        assert [seeds_to_see(1.0, effect) for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]
        assert seeds_to_see(2.0, -1.0) == 34 and seeds_to_see(1.0, 0.8, power=0.9, level=0.99) == 27

    def test_so_many_seeds_are_enough_and_one_less_is_not(self):
        for n, chance in (
            (seeds_to_see(1.0, 0.5), lambda n: chances(n, 1.0, 0.5)["better"]),
            (seeds_to_equate(1.0, 0.5), lambda n: chances(n, 1.0, 0.0, 0.5)["equal"]),
            (seeds_to_equate(1.0, 0.5, 0.2), lambda n: chances(n, 1.0, 0.2, 0.5)["equal"]),
        ):
            assert chance(n - 1) < 0.8 <= chance(n)
        # Many seeds: ((z₀.₉₇₅ + z₀.₉) sd / margin)², the normal approximation for two one-sided tests.
        assert seeds_to_equate(1.0, 0.05) == pytest.approx(((1.95996 + 1.28155) / 0.05) ** 2, rel=2e-3)

    def test_an_open_verdict_says_how_many_would_settle_it(self):
        found = interval(-1, 2)
        assert verdict(found, 0.5) == "open"
        wanted = seeds_to_settle(found, 0.5)
        assert wanted == max(seeds_to_see(found.std, 0.5), seeds_to_equate(found.std, 0.5)) > found.seeds
        assert seeds_to_settle(dataclasses.replace(found, mean=40.0), 0.5) == wanted  # the mean is what is in doubt
        assert seeds_to_settle(dataclasses.replace(found, level=0.99), 0.5) > wanted
        assert seeds_to_settle(paired({0: 1.0, 1: 1.0}, {0: 0.0, 1: 0.0}), 0.5) == 2

    def test_what_no_number_of_seeds_shows(self):
        with pytest.raises(ValueError, match="effect is 0"):
            seeds_to_see(1.0, 0.0)
        with pytest.raises(ValueError, match="not smaller than the margin"):
            seeds_to_equate(1.0, 0.5, -0.5)


class TestPooled:
    @given(pairs, pairs)
    def test_two_settings_are_welchs_test(self, first, second):
        """The mean of d₁ and d₂ is half the difference of d₁ and −d₂."""
        x, y = (np.subtract(*pair) for pair in (first, second))
        assume(min(x.std(), y.std()) > 1e-6)
        found = pooled([paired(by_seed(d), by_seed(0 * d)) for d in (x, y)])
        oracle = stats.ttest_ind(x, -y, equal_var=False)
        assert found.p == pytest.approx(oracle.pvalue) and found.seeds == len(x) + len(y)
        ends = oracle.confidence_interval(0.95)
        assert (2 * found.low, 2 * found.high) == pytest.approx((ends.low, ends.high))

    def test_other_settings_are_a_t_test_of_the_means(self):
        found = pooled([interval(m - 0.3, m + 0.3) for m in (0.1, 0.9, 0.4)], others=True, level=0.9)
        oracle = stats.ttest_1samp([0.1, 0.9, 0.4], 0)
        assert found.p == pytest.approx(oracle.pvalue)
        assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval(0.9)))

    def test_heterogeneity_of_a_textbook_example(self):
        """The 13 trials of BCG vaccine (Colditz 1994; Viechtbauer 2010): Q 152.23, I² 92.12 %, HE τ² 0.3286."""
        ill = np.array([4, 6, 3, 62, 33, 180, 8, 505, 29, 17, 186, 5, 27])
        well = np.array([119, 300, 228, 13536, 5036, 1361, 2537, 87886, 7470, 1699, 50448, 2493, 16886])
        ill_without = np.array([11, 29, 11, 248, 47, 372, 10, 499, 45, 65, 141, 3, 29])
        well_without = np.array([128, 274, 209, 12619, 5761, 1079, 619, 87892, 7232, 1600, 27197, 2338, 17825])
        ratios = np.log(ill / (ill + well)) - np.log(ill_without / (ill_without + well_without))
        squares = 1 / ill - 1 / (ill + well) + 1 / ill_without - 1 / (ill_without + well_without)
        trials = [
            Difference(mean=float(m), error=math.sqrt(v), freedom=99, seeds=100)
            for m, v in zip(ratios, squares, strict=True)
        ]
        found = pooled(trials)
        assert found.heterogeneity == pytest.approx(152.233, abs=5e-4)
        assert found.share_between == pytest.approx(0.9212, abs=5e-5)
        assert found.between**2 == pytest.approx(0.3286, abs=5e-5)
        assert found.p_same == pytest.approx(stats.chi2.sf(152.233, 12), rel=1e-3)

    def test_intervals_of_few_seeds_hold_the_truth(self):
        """Five seeds, four settings with unequal noise; weights by precision would hold it in 81 of 100."""
        generator, hits = np.random.default_rng(0), 0
        for _ in range(500):
            drawn = generator.normal(0, [[0.5], [1.0], [1.0], [2.0]], (4, 5))
            found = pooled([paired(by_seed(d), by_seed(0 * d)) for d in drawn])
            hits += found.low < 0 < found.high
        assert 460 < hits < 490

    def test_settings_that_agree_and_settings_without_scatter(self):
        same = pooled([interval(0.1, 0.3)] * 3)
        assert (same.between, same.heterogeneity, same.share_between, same.p_same) == pytest.approx((0, 0, 0, 1))
        still = Difference(mean=0.2, error=0.0, freedom=4, seeds=5)
        assert pooled([still, still]).p == 0 and pooled([still, still]).p_same == 1
        other = pooled([still, dataclasses.replace(still, mean=0.3)])
        assert other.p_same == 0 and other.share_between == pytest.approx(1)
        mixed = pooled([still, interval(0.1, 0.3)])
        assert mixed.half_width == pytest.approx(0.05) and mixed.freedom == 9
        with pytest.raises(ValueError, match="1 settings: two at least"):
            pooled([still])

    def test_a_verdict_on_all_tasks(self):
        assert verdict(pooled([interval(-0.1, 0.9), interval(-0.1, 0.9), interval(0.1, 1.1)]), 0.5) == "better"


def test_the_draws_of_one_list_of_looks_are_made_once():
    Plan(0.5, (5, 10)).nominal  # noqa: B018
    before = compare._smallest_p.cache_info().hits
    assert Plan(0.7, (5, 10), 0.9).nominal < Plan(0.5, (5, 10)).nominal
    assert compare._smallest_p.cache_info().hits == before + 2
