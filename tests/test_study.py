"""Study files: what they ask for, what is wrong with them, and what their records decide."""

import contextlib
import dataclasses
import json
import re

import pytest
import yaml

from kdlib import cluster, runs
from kdlib.settings import ConfigurationError
from kdlib.study import Study
from tests.test_main import RECORD

COMMON = {"teacher": "tiny-2x64", "student": "tiny-2x32", "epochs": 2, "temperature": 2.0}
ARMS = {"alone": {"method": "fine_tune"}, "fixed": {"method": "kd"}}


@pytest.fixture
def study(tmp_path):
    """Writes a study file and reads it."""

    def written(arms=None, common=None, seeds="0-1", **more):
        path = tmp_path / "a-study.yml"
        sheet = {"common": {"task": "mini-sst2", **COMMON, **(common or {})}, "arms": arms or ARMS, "seeds": seeds}
        path.write_text(yaml.safe_dump({**sheet, **more}, sort_keys=False))
        return Study(path)

    return written


def told(study: Study, name: str) -> list:
    return [unit.parameters.get(name) for unit in study.units if unit.seed == study.seeds[0]]


class TestUnits:
    def test_go_seed_by_seed_in_the_order_of_the_file(self, study):
        found = study(seeds="3-5").units
        assert [(unit.seed, unit.arm) for unit in found] == [(s, arm) for s in (3, 4, 5) for arm in ("alone", "fixed")]

    def test_are_the_runs_that_configure_makes(self, study):
        unit = study().units[1]
        by_hand = runs.configure(task="mini-sst2", method="kd", seed=0, **COMMON)
        assert unit.config == by_hand and unit.name == by_hand.asked_id

    def test_take_from_common_what_the_method_reads(self, study):
        alone = study(common={"pkd_weight": 0.5}).units[0]
        assert alone.config.flat["temperature"] is None and alone.config.teacher is None

    def test_of_an_arm_may_not_have_what_the_method_does_not_read(self, study):
        with pytest.raises(ConfigurationError, match=r"arm 'alone'.*(?s:.*)does not read temperature"):
            _ = study(arms={"alone": {"method": "fine_tune", "temperature": 3.0}}).units

    def test_lists_are_axes(self, study):
        found = study(arms={"all": {"method": ["kd", "prokt"], "alpha": [0.1, 0.2]}}, seeds=7)
        axes = [{"method": m, "alpha": a} for m in ("kd", "prokt") for a in (0.1, 0.2)]
        assert [unit.axes for unit in found.units] == axes
        assert [(unit.config.method, unit.config.settings.alpha) for unit in found.units] == [
            tuple(one.values()) for one in axes
        ]

    def test_of_an_arm_that_is_like_another_have_its_parameters_and_notes_too(self, study):
        arms = {**ARMS, "warm": {"like": "fixed", "temperature": 8.0}, "warmer": {"like": "warm", "alpha": 0.3}}
        arms["fixed"] = {"method": "kd", "seeds": 9}
        found = study(arms=arms)
        (unit,) = [unit for unit in found.units if unit.arm == "warmer"]
        assert (unit.seed, unit.parameters["temperature"], unit.parameters["alpha"]) == (9, 8.0, 0.3)

    def test_rules_hold_where_their_parameters_have_their_values_and_arms_go_first(self, study):
        rules = [
            {"where": {"method": ["kd", "prokt"]}, "learning_rate": 0.1},
            {"where": {"method": "kd", "alpha": 0.2}, "learning_rate": 0.2},
            {"where": {"learning_rate": 0.2}, "batch_size": 7},  # rules see what earlier ones say
        ]
        arms = {"a": {"method": ["fine_tune", "kd"]}, "b": {"method": "kd", "alpha": 0.2}}
        arms["c"] = {"like": "b", "learning_rate": 0.3}
        found = study(arms=arms, rules=rules)
        assert told(found, "learning_rate") == [None, 0.1, 0.2, 0.3]
        assert told(found, "batch_size") == [None, None, 7, None]

    def test_seeds_of_teachers_follow_and_numbers_are_numbers(self, study):
        found = study(common={"teacher_seed": "seed + 50", "learning_rate": "1e-3"}, arms={"fixed": ARMS["fixed"]})
        assert [(u.seed, u.parameters["teacher_seed"]) for u in found.units] == [(0, 50), (1, 51)]
        assert found.units[0].config.learning_rate == 1e-3

    def test_have_the_seeds_of_a_list_in_their_order(self, study):
        arms = {**ARMS, "fixed": {"method": "kd", "seeds": [9, 3]}}
        found = study(arms=arms, seeds=[5, 0])
        told = [(unit.seed, unit.arm) for unit in found.units]
        assert told == [(0, "alone"), (3, "fixed"), (5, "alone"), (9, "fixed")] and found.seeds == [0, 5]

    def test_on_text_are_runs_on_text(self, study):
        found = study(arms={"text": {"method": "soft_labels", "corpus": "mini-corpus", "task": None, "epochs": None}})
        with pytest.raises(ConfigurationError, match="unknown parameter 'task'"):
            _ = found.units
        arms = {"text": {"method": "soft_labels"}}
        found = Study(_written(found.path, {"common": {"steps": 3, "corpus": "mini-corpus"}, "arms": arms, "seeds": 0}))
        assert found.units[0].config.steps == 3

    def test_that_are_more_than_a_run_are_named_after_arm_axes_and_seed(self, study):
        arms = {"a way, twice": {"method": "kd", "alpha": [0.1, 0.2], "measure": "some.module:function"}}
        assert [unit.name for unit in study(arms=arms, seeds=4).units] == [
            "a-way-twice-alpha-0.1-seed4",
            "a-way-twice-alpha-0.2-seed4",
        ]


def _written(path, sheet):
    path.write_text(yaml.safe_dump(sheet))
    return path


class TestMistakes:
    def test_in_all_arms_are_one_message(self, study):
        arms = {"a": {"method": "kdd"}, "b": {"like": "c"}, "d": {"like": "d"}, "e": {"method": "kd", "alpah": 0.5}}
        with pytest.raises(ConfigurationError) as error:
            _ = study(arms=arms).units
        for part in ("arm 'a'", "did you mean 'kd'", "like 'c', which is no arm", "d → d", "did you mean 'alpha'"):
            assert part in str(error.value)
        assert "a-study.yml" in str(error.value)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seeds": "4-2"}, "seeds are '4-2'"),
            ({"seeds": "many"}, "seeds are 'many'"),
            ({"seeds": []}, r"seeds are \[\]; expected a range such as 0-9, one number, or a list"),
            ({"seeds": [1, -1]}, r"seeds are \[1, -1\]; expected"),
            ({"seeds": [4, 1, 4]}, r"seeds are \[4, 1, 4\], with 4 twice"),
            ({"seeds": ["0-4"]}, r"a-study\.yml is wrong:\n  - seeds are \['0-4'\]; expected a range"),
            ({"seeds": [True]}, r"seeds are \[True\]; expected a range"),
            ({"sedes": 1}, "unknown field 'sedes'; did you mean 'seeds'"),
            ({"looks": [0]}, "looks"),
            ({"rules": [{"learning_rate": 1}]}, "where"),
            ({"choose": {"arms": {}, "seeds": 1, "by": [], "rule": "luck"}}, "rule is 'luck'"),
            ({"claims": [{"arm": "fixd", "against": "alone", "metric": "m", "margin": 1.0}]}, "did you mean 'fixed'"),
            ({"claims": [{"arm": "fixed", "against": "alone", "metric": "m"}]}, "margin is missing"),
            ({"claims": [{"arm": "fixed", "against": "alone", "metric": "m", "margin": -1.0}]}, "margin"),
        ],
    )
    def test_in_the_file_are_named(self, study, changes, said):
        with pytest.raises(ConfigurationError, match=said):
            study(**changes)

    def test_an_arm_is_not_missing_or_empty(self, study, tmp_path):
        with pytest.raises(ConfigurationError, match="should hold a study"):
            Study(_written(tmp_path / "x.yml", [1]))
        with pytest.raises(ConfigurationError, match="cannot read"):
            Study(tmp_path / "none.yml")
        with pytest.raises(ConfigurationError, match="arms/empty is None"):
            _ = study(arms={"empty": None}).units

    @pytest.mark.parametrize(("written", "number"), [("010", 8), ("1:30", 90), ("[1, 012]", 10)])
    def test_a_number_is_not_in_octal(self, study, written, number):
        path = study(seeds=7).path
        path.write_text(path.read_text().replace("seeds: 7", f"seeds: {written}"))
        with pytest.raises(ConfigurationError, match=rf"is the number {number} to YAML(?s:.*)line \d+"):
            Study(path)

    def test_a_claim_compares_one_cell_with_one(self, study):
        arms = {"alone": {"method": "fine_tune", "epochs": [1, 2]}, "fixed": {"method": "kd"}}
        claim = {"arm": "fixed", "against": "alone", "metric": "test/accuracy", "margin": 1.0}
        with pytest.raises(ConfigurationError, match="one cell with several"):
            _ = study(arms=arms, claims=[claim]).pairs
        with pytest.raises(ConfigurationError, match="compares nothing"):
            _ = study(arms=arms, claims=[{**claim, "where": {"epochs": 3}}]).pairs
        with pytest.raises(ConfigurationError, match=r"epoch is what.*did you mean 'epochs'"):
            _ = study(arms=arms, claims=[{**claim, "where": {"epoch": 2}}]).pairs
        assert len(study(arms=arms, claims=[{**claim, "where": {"epochs": 2}}]).pairs) == 1

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"metric": "test/acuracy"}, "'test/acuracy', which runs of arm 'fixed' do not have"),
            ({"arm": "alone"}, "compares a run with itself"),
            ({"arm": "later"}, "has 0 seeds"),
            ({"arm": "once"}, "has 1 seeds"),
        ],
    )
    def test_a_claim_can_be_decided(self, study, changes, said):
        arms = {**ARMS, "later": {"method": "kd", "seeds": "7-9"}, "once": {"method": "kd", "seeds": 1}}
        claim = {"arm": "fixed", "against": "alone", "metric": "test/accuracy", "margin": 1.0, **changes}
        with pytest.raises(ConfigurationError, match=said):
            _ = study(arms=arms, claims=[claim]).pairs

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"arms": {"a": {"method": "kd", "alpha": [0.1, "1e-1"]}}}, "the cell {'alpha': 0.1} twice"),
            ({"arms": {"a": {"method": "kd", "alpha": []}}}, "alpha is an empty list"),
            ({"arms": {"a": {"method": "kd", "seed": 3}}}, "seed is 3"),
            ({"common": {"seed": 3}}, "common says seed: 3"),
            ({"arms": {"a": {"method": {"kd": 1}}}}, "method is {'kd': 1}"),
            ({"arms": {"a": {"like": ["b"]}}}, "is like ['b']"),
            ({"arms": {"a": {"method": "kd", "then": {"task": "mini-mnli"}}}}, "expected a list of runs"),
            ({"arms": {"a": {"method": "kd", "then": None}}}, "expected a list of runs"),
            ({"arms": {"a": {"method": "kd", "measure": "function"}}}, "expected module:function"),
            ({"arms": {"x" * 300: {"method": "kd", "measure": "m:f"}}}, "more than 200 bytes"),
            ({"looks": 5}, "looks is 5 (int); expected list"),
            ({"claims": {"arm": "fixed"}}, "(dict); expected list"),
        ],
    )
    def test_are_sentences(self, study, changes, said):
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            _ = study(**changes).units

    def test_two_arms_do_not_share_a_record(self, study):
        then = [{"task": "mini-mnli"}]
        arms = {"a b": {"method": "kd", "then": then}, "a-b": {"method": "prokt", "then": then}}
        with pytest.raises(ConfigurationError, match=r"arm 'a-b' and arm 'a b' would share a-b-seed0\.json"):
            _ = study(arms=arms).units

    def test_an_arm_is_not_there_twice(self, study):
        path = study().path
        path.write_text(path.read_text() + "seeds: 0-9\n")
        with pytest.raises(ConfigurationError, match=r"'seeds' is there twice(?s:.*)line \d+"):
            Study(path)

    def test_there_are_arms(self, study, tmp_path):
        with pytest.raises(ConfigurationError, match="arms are none"):
            Study(_written(tmp_path / "x.yml", {"common": {}, "arms": {}, "seeds": 0}))


def test_a_number_is_the_same_however_it_is_written(study):
    """Else a rule for 1.0e-3 would silently not hold for 1e-3, a text to YAML."""
    path = study(arms={"a": {"method": "kd", "learning_rate": 0.001}}).path
    path.write_text(
        path.read_text().replace("0.001", "1e-3") + "rules: [{where: {learning_rate: 0.001}, alpha: 0.3}]\n"
    )
    assert told(Study(path), "alpha") == [0.3]


CLAIM = {"arm": "fixed", "against": "alone", "metric": "test/accuracy", "margin": 0.05}
CHOOSE = {"arms": {"t": {"method": "kd", "learning_rate": [0.1, 0.2]}}, "seeds": "100-101"}
TABLE = "method,task,learning_rate,mean,worst\nkd,mini-sst2,0.1,0.9,0.1\nkd,mini-sst2,0.2,0.8,0.7\n"


class TestMoreMistakes:
    def test_a_rule_that_holds_for_nothing_is_told(self, study):
        for where in ({"metod": "kd"}, {"method": "dk"}, {"method": "kd", "alpha": 0.3}):
            with pytest.raises(ConfigurationError, match="holds for no arm"):
                study(rules=[{"where": where, "learning_rate": 0.1}])

    def test_a_claim_may_not_be_made_twice(self, study):
        mirrored = {**CLAIM, "arm": CLAIM["against"], "against": CLAIM["arm"]}
        for other in (CLAIM, mirrored):
            with pytest.raises(ConfigurationError, match="two claims compare the same cells"):
                _ = study(claims=[CLAIM, other]).pairs

    def test_a_task_comes_once_after_a_run(self, study):
        then = [{"task": "mini-mnli"}, {"task": "mini-mnli", "epochs": 3}]
        with pytest.raises(ConfigurationError, match="mini-mnli twice"):
            _ = study(arms={"a": {"method": "kd", "then": then}}).units

    def test_a_name_that_yaml_takes_for_something_else_needs_quotes(self, study):
        with pytest.raises(ConfigurationError, match="called True, which is no text: put its name in quotes"):
            study(arms={True: {"method": "kd"}})

    def test_a_measurement_that_was_asked_something_else_is_no_record(self, study):
        arms = {"a": {"method": "kd", "measure": "some.module:function", "alpha": 0.5}}
        found = study(arms=arms, seeds=0)
        found.records.mkdir()
        (unit,) = found.units
        found.record(unit).write_text(json.dumps({"value": 1, "asked": unit.asked}))
        study(arms=arms, seeds=0).check_records()
        arms["a"]["alpha"] = 0.6
        with pytest.raises(ValueError, match=r"'alpha': 0.5.*the study now says.*'alpha': 0.6"):
            study(arms=arms, seeds=0).check_records()


class TestChosen:
    def test_is_the_best_by_the_rule(self, study, tmp_path):
        (tmp_path / "a-study").mkdir()
        (tmp_path / "a-study" / "choices.csv").write_text(TABLE)
        arms = {"fixed": {"method": "kd", "learning_rate": "chosen"}}
        for rule, best in (("best mean", 0.1), ("best worst seed", 0.2)):
            choose = {**CHOOSE, "by": ["method", "task", "learning_rate"], "rule": rule}
            assert told(study(arms=arms, choose=choose), "learning_rate") == [best]
            choose["higher_is_better"] = False
            assert told(study(arms=arms, choose=choose), "learning_rate") == [{0.1: 0.2, 0.2: 0.1}[best]]
        with pytest.raises(ConfigurationError, match=r"no trial with .*prokt"):
            _ = study(arms={"p": {"method": "prokt", "learning_rate": "chosen"}}, choose=choose).units

    def test_needs_trials_and_their_table(self, study):
        arms = {"fixed": {"method": "kd", "learning_rate": "chosen"}}
        with pytest.raises(ConfigurationError, match="name it in choose: by"):
            _ = study(arms=arms).units
        choose = {**CHOOSE, "by": ["learning_rate"]}
        with pytest.raises(ConfigurationError, match="run the study with --choose"):
            _ = study(arms=arms, choose=choose).units
        assert [unit.seed for unit in study(arms=arms, choose=choose).trials] == [100, 100, 101, 101]
        choose["arms"] = arms
        with pytest.raises(ConfigurationError, match="a trial gives the values"):
            _ = study(arms=arms, choose=choose).trials

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"by": ["learning_rat"]}, "'learning_rat', which is no parameter.*did you mean 'learning_rate'"),
            ({"by": ["task"]}, "by task does not tell trials apart that differ in learning_rate: add it"),
            ({"by": ["learning_rate"], "metric": "validation/acc"}, "metric is 'validation/acc'"),
        ],
    )
    def test_trials_can_be_told_apart(self, study, changes, said):
        with pytest.raises(ConfigurationError, match=said):
            _ = study(choose={**CHOOSE, **changes}).trials

    def test_runs_on_text_have_no_metric_of_their_own(self, tmp_path):
        tried = {"method": "mlm", "student": "tiny-1x32", "learning_rate": [1e-3, 2e-3]}
        choose = {"arms": {"a": tried}, "seeds": 100, "by": ["learning_rate"]}
        sheet = {"common": {"corpus": "mini-corpus", "device": "cpu"}, "arms": {"a": tried}, "seeds": 0}
        path = tmp_path / "on-text.yml"
        path.write_text(yaml.safe_dump({**sheet, "choose": choose}))
        with pytest.raises(ConfigurationError, match="metric is missing: arm 'a' is no run on a task"):
            _ = Study(path).trials
        path.write_text(yaml.safe_dump({**sheet, "choose": {**choose, "metric": "validation/loss"}}))
        assert len(Study(path).trials) == 2

    def test_trials_have_seeds_of_their_own(self, study):
        with pytest.raises(ConfigurationError, match="choose has seed 1"):
            study(choose={**CHOOSE, "by": ["learning_rate"], "seeds": "1-3"})

    def test_is_one_trial_not_the_mean_of_several(self, study, tmp_path):
        (tmp_path / "a-study").mkdir()
        (tmp_path / "a-study" / "choices.csv").write_text("alpha,learning_rate,mean,worst\n0.1,1,1,1\n0.2,1,1,1\n")
        choose = {**CHOOSE, "by": ["alpha", "learning_rate"]}
        arm = {"method": "kd", "learning_rate": "chosen"}
        with pytest.raises(ConfigurationError, match="several trials for one value, which differ in alpha"):
            _ = study(arms={"a": arm}, choose=choose).units
        assert told(study(arms={"a": {**arm, "alpha": 0.1}}, choose=choose), "learning_rate") == [1.0]


class TestDecisions:
    def keep(self, study, gains):
        """Records in which `fixed` is ahead by so much, seed by seed."""
        study.records.mkdir(exist_ok=True)
        for unit in study.units:
            if unit.seed < len(gains):
                value = 0.5 + 0.1 * unit.seed + (unit.arm == "fixed") * gains[unit.seed]
                told = {"run_id": unit.name, "config": unit.config.flat, "metrics": {"test/accuracy": value}}
                fields = vars(dataclasses.replace(RECORD, **told))
                study.record(unit).write_text(json.dumps({n: v for n, v in fields.items() if n != "folder"}))

    @pytest.mark.parametrize(
        ("gains", "verdict"),
        [
            ([0.2, 0.21, 0.19, 0.2], "better"),
            ([-0.2, -0.21, -0.19, -0.2], "worse"),
            ([0.01, -0.01, 0.0, 0.0], "equal"),
            ([0.3, -0.3, 0.2, -0.1], "open"),
        ],
    )
    def test_are_those_of_the_paired_differences(self, study, gains, verdict):
        found = study(claims=[CLAIM], seeds="0-3")
        self.keep(found, gains)
        (decision,) = found.decisions().values()
        assert decision.verdict == verdict and decision.difference.mean == pytest.approx(sum(gains) / 4)
        assert list(found.verdicts()["alone"]) == [verdict]
        assert found.verdicts().index[0] == "fixed − alone, test/accuracy"

    def test_wait_for_a_look_and_take_only_its_seeds(self, study):
        found = study(claims=[CLAIM], seeds="0-9", looks=[3, 6])
        assert found.looks_of(found.pairs[0]) == (3, 6, 10)
        self.keep(found, [0.2, 0.21])
        assert found.decisions() == {}
        self.keep(found, [0.2, -0.2, 0.1, 0.9, 0.9])
        (decision,) = found.decisions().values()
        assert (decision.verdict, decision.difference.seeds, decision.next_look) == ("open", 3, 6)

    def test_an_arm_with_seeds_of_its_own_is_judged_by_those(self, study):
        arms = {"alone": {"method": "fine_tune", "seeds": "0-4"}, "fixed": {"method": "kd", "seeds": "1-9"}}
        found = study(arms=arms, claims=[CLAIM], seeds=0, looks=[3])
        assert found.seeds_of(found.pairs[0]) == [1, 2, 3, 4] and found.looks_of(found.pairs[0]) == (3, 4)
        assert {unit.seed for unit in cluster.to_do(found) if unit.arm == "fixed"} == {1, 2, 3}

    def test_a_missing_seed_holds_back_the_later_ones(self, study):
        """Else whoever fails would decide which seeds count."""
        found = study(claims=[CLAIM], seeds="0-4", looks=[3])
        self.keep(found, [0.1, 0.2, 0.1, 0.2, 0.1])
        found.record(next(unit for unit in found.units if unit.seed == 1)).unlink()
        assert found.decisions() == {}

    def test_name_a_record_that_is_damaged(self, study):
        found = study(claims=[CLAIM])
        self.keep(found, [0.1, 0.2])
        path = found.record(found.units[0])
        path.write_text(path.read_text()[:20])
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            found.decisions()

    def test_are_not_of_records_that_another_file_has_made(self, study):
        """The name of a run says what it was made from; that of a run and what comes after it does not."""
        arms = {"a": {"method": "kd", "then": [{"task": "mini-mnli"}]}}
        found = study(arms=arms, seeds=0)
        path, config = found.record(found.units[0]), dict(found.units[0].config.flat)
        path.parent.mkdir()
        path.write_text(
            json.dumps({"config": {**config, "device": "elsewhere"}, "metrics": {"mini-mnli/test/f1": 1.0}})
        )
        found.check_records()
        with pytest.raises(ValueError, match="was made with epochs = 2, and the study now says 3"):
            study(arms={"a": {**arms["a"], "epochs": 3}}, seeds=0).check_records()

    @pytest.mark.parametrize(
        ("then", "said"),
        [
            ([{"task": "mini-mnli", "epochs": 3}], None),
            ([{"task": "mini-mnli", "epochs": 3, "checkpoint_every": 7, "weight_decay": 0.01}], None),  # the default
            ([{"task": "mini-mnli", "epochs": 4}], "on mini-mnli with epochs = 3, and the study now says 4"),
            ([{"task": "mini-mnli", "epochs": 3, "max_steps": 9}], "max_steps = None, and the study now says 9"),
            ([{"task": "mini-sst2", "epochs": 3}], "on mini-mnli, and the study now says mini-sst2"),
            ([{"task": "mini-mnli", "epochs": 3}, {"task": "mini-sst2"}], "now says mini-mnli, mini-sst2"),
        ],
    )
    @pytest.mark.parametrize("trying", [False, True])
    def test_are_not_of_records_with_something_else_after_the_run(self, study, tmp_path, then, said, trying):
        def written(then):
            arms = {"a": {"method": "kd", "then": then}}
            choose = {"arms": arms, "by": ["method"], "seeds": 9}
            return study(arms=arms, seeds=0, choose=choose, common={"output_dir": str(tmp_path / "runs")})

        first = written([{"task": "mini-mnli", "epochs": 3}])
        (unit,) = first.trials if trying else first.units
        told = {"config": unit.config.flat, "asked": unit.asked, "metrics": {}}
        first.record(unit, trying).parent.mkdir(parents=True)
        first.record(unit, trying).write_text(json.dumps(told))
        with contextlib.nullcontext() if said is None else pytest.raises(ValueError, match=said):
            written(then).check_records(trying)

    def test_that_do_not_say_what_came_after_the_run_tell_its_tasks_by_their_metrics(self, study):
        def written(*tasks):
            return study(arms={"a": {"method": "kd", "then": [{"task": task} for task in tasks]}}, seeds=0)

        found = written("mini-mnli")
        names = ["validation/accuracy", "teacher/validation/accuracy", "mini-mnli/validation/accuracy"]
        found.records.mkdir()
        told = {"config": found.units[0].config.flat, "metrics": dict.fromkeys(names, 1.0)}
        found.record(found.units[0]).write_text(json.dumps(told))
        found.check_records()
        for tasks in (["mini-sst2"], ["mini-mnli", "mini-sst2"]):
            with pytest.raises(ValueError, match=f"made with then on mini-mnli, .*now says {', '.join(tasks)}: move"):
                written(*tasks).check_records()

    def test_a_table_has_a_row_for_each_record(self, study):
        found = study(arms={"fixed": {"method": "kd", "alpha": [0.1, 0.2]}, "alone": {"method": "fine_tune"}})
        self.keep(found, [0.1])
        table = found.table("test/accuracy")
        assert list(table.columns) == ["arm", "alpha", "seed", "test/accuracy"] and len(table) == 3
        with pytest.raises(ValueError, match="has no test/f1: it has test/accuracy"):
            found.table("test/f1")


def test_the_examples_of_the_documentation_are_studies(root, tmp_path):
    text = (root / "docs" / "studies.md").read_text()
    example = tmp_path / "example.yml"
    example.write_text(text.split("```yaml\n")[1].split("```")[0])
    found = Study(example)
    assert len(found.trials) == 2 * 3 * 10
    found.choices.parent.mkdir()
    found.choices.write_text(
        "task,method,teaching_rate,mean,worst\nmini-sst2,metadistil,1e-5,1,1\nmini-mnli,metadistil,3e-5,1,1\n"
    )
    found = Study(example)
    assert {unit.parameters.get("teaching_rate") for unit in found.units} == {None, 1e-5, 3e-5}
    assert found.looks_of(found.pairs[0]) == (5, 10, 20, 30)
    assert [str(pair) for pair in found.pairs] == [
        "meta − fixed, test/accuracy, mini-sst2",
        "meta − fixed, test/accuracy, mini-mnli",
    ]


def test_the_example_of_a_cluster_makes_the_job_script_it_promises(root):
    import dask
    from dask_jobqueue import SLURMCluster

    settings = yaml.safe_load((root / "docs" / "studies.md").read_text().split("```yaml\n")[2].split("```")[0])
    settings["jobqueue"]["slurm"]["interface"] = "lo"  # there is no other network here
    before = dask.config.config
    try:
        with dask.config.set(dask.config.merge(before, settings)), SLURMCluster() as cluster:
            script = cluster.job_script()
    finally:
        dask.config.refresh()
    for line in ("#SBATCH -p gpu", "#SBATCH --cpus-per-task=4", "#SBATCH --gres=gpu:1", "#SBATCH -t 08:00:00"):
        assert line in script
    assert "--nthreads 1" in script and "--resources GPU=1" in script
