"""The ledger of the four papers' equations, algorithms, figures and tables: true, complete, and on its page."""

import functools
import json
import re
import shutil
from dataclasses import replace

import pytest

from tools import ledger


@pytest.fixture(scope="module")
def entries(root) -> list[ledger.Entry]:
    return ledger.read(root)


@pytest.fixture(scope="module", autouse=True)
def looked_up_once():
    """What a ledger can point to in one folder does not change while one test runs, and takes a second to find."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("anchors", "docstrings", "tests", "announced"):
            patch.setattr(ledger, name, functools.cache(getattr(ledger, name)))
        yield


def changed(entries, name, fields) -> list[ledger.Entry]:
    """The ledger with one entry changed."""
    assert name in {entry.id for entry in entries}
    return [replace(entry, **fields) if entry.id == name else entry for entry in entries]


def test_all_of_the_ledger_is_true(entries, root):
    assert ledger.problems(entries, root) == []


def test_the_counts_of_the_papers(entries):
    """Counted in the texts: 52 equations, 2 algorithms, 19 figures, 20 tables."""
    kinds = [entry.kind for entry in entries]
    assert [kinds.count(kind) for kind in ledger.KINDS.values()] == [52, 2, 19, 20]
    of = [[entry.kind for entry in entries if entry.paper == key] for key in ledger.PAPERS]
    assert [[kinds.count(kind) for kind in ledger.KINDS.values()] for kinds in of] == [
        [19, 1, 6, 7],
        [3, 1, 5, 3],
        [16, 0, 5, 4],
        [14, 0, 3, 6],
    ]


def test_every_printed_table_of_numbers_is_transcribed(entries):
    tables = [entry for entry in entries if entry.kind == "table"]
    assert [entry.id for entry in tables if not entry.transcribed] == ["tutor-tab6"]


RIVALS = {"KD", "MetaDistil", "LGTM", "IKD", "Tutor-KD"}  # that kdlib has
RIVALS |= {"DistilBERT", "TinyBERT", "MiniLM", "MiniLMv2"}  # as ways to pretrain a student


def unnamed_rivals(entries, root) -> list[str]:
    """The methods with a row in a paper's table of scores that are neither in RIVALS nor in the remark on the table.

    Where a study computes the table, its arms say what exists, see `ledger.study_problems`.
    """
    found = []
    for entry in entries:
        if entry.kind == "table" and entry.transcribed and entry.status != "left out" and not entry.study:
            rows = ledger.printed(root, entry) - RIVALS - {"teacher", "student alone"}
            rows = {name for name in rows if name.split(" with")[0] not in RIVALS - {"TinyBERT"}}
            words = re.sub(r"[-,]", " ", entry.why)
            found += [f"{entry.id}: {name}" for name in sorted(rows) if name.replace("-", " ") not in words]
    return found


def test_a_rival_in_a_papers_table_exists_here_or_is_named_as_missing(entries, root):
    assert unnamed_rivals(entries, root) == []
    silent = changed(entries, "ikd-tab1", {"why": "chapter 12 has TAKD and others", "study": ""})
    assert unnamed_rivals(silent, root) == ["ikd-tab1: Annealing-KD"]


def test_the_page_is_up_to_date(entries, root):
    assert (root / ledger.PAGE).read_text() == ledger.page(entries, root), "run `make pages`"


# What a citation says


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("LGTM eq. (8)", "lgtm-8"),
        ("LGTM eqs. (1)-(2), MetaDistil eq. (1), IKD eqs. (1)–(3).", "lgtm-1 lgtm-2 metadistil-1 ikd-1 ikd-2 ikd-3"),
        ("LGTM eqs. (8), (12)-(13) and Figures 3, 4; Pruthi", "lgtm-8 lgtm-12 lgtm-13 lgtm-fig3 lgtm-fig4"),
        ("LGTM eq. (6) and Algorithm 1, line 4; MetaDistil Algorithm 1", "lgtm-6 lgtm-alg1 metadistil-alg1"),
        ("the hard term of LGTM eq. (1) and MetaDistil eq. (1)", "lgtm-1 metadistil-1"),
        ("LGTM Table 3 with T = 2 and 2 layers", "lgtm-tab3 lgtm-tab2"),  # a number alone counts: better too many
        ("LGTM eq. (10) with T = 2", "lgtm-10"),
        ("Tutor-KD eqs. (3)-(4), Table 1", "tutor-3 tutor-4 tutor-tab1"),
        ("IKD section 3.2", ""),
        ("LGTM eq. (8); Koh and Liang (2017), eq. (2)", "lgtm-8"),
        ("LGTM, after Koh and Liang (2017), eq. (2)", ""),
        ("eq. (2)", ""),
    ],
)
def test_citations(text, ids):
    assert ledger.cited(text) == ids.split()


def test_sources_are_found_on_several_lines_and_end_where_the_derivation_is_named():
    doc = "A loss.\n\nSource: LGTM eq. (1),\nIKD eq. (2).  Derived in: LGTM eq. (9).\n\nSource: LGTM Table 1.\n\nEnd."
    assert ledger.cited(ledger.sources(doc)) == ["lgtm-1", "ikd-2", "lgtm-tab1"]


# Planted mistakes in the ledger


@pytest.mark.parametrize(
    ("name", "fields", "complaint"),
    [
        ("lgtm-8", {"id": "lgtm-20"}, "lgtm-20: no paper has this"),
        ("lgtm-8", {"id": "LGTM-8"}, "LGTM-8: no paper has this"),
        ("lgtm-8", {"id": "lgtm-20"}, "lgtm-8: is missing"),
        ("lgtm-9", {"id": "lgtm-8"}, "lgtm-8: stands there 2 times"),
        ("lgtm-1", {"status": "done"}, "lgtm-1: status is 'done'"),
        (
            "lgtm-1",
            {"anchor": "chapters/01_distillation#eq-dist-none"},
            "there is no chapters/01_distillation#eq-dist-n",
        ),
        ("lgtm-1", {"anchor": "chapters/77_none#eq-dist-hard"}, "lgtm-1: there is no chapters/77_none#eq-dist-hard"),
        ("lgtm-1", {"anchor": ""}, "lgtm-1: derived, but no anchor says where"),
        ("lgtm-1", {"status": "measured"}, "lgtm-1: measured is for figures and tables"),
        ("lgtm-tab1", {"status": "derived"}, "lgtm-tab1: derived is for equations and algorithms"),
        ("lgtm-1", {"tests": ()}, "lgtm-1: no test holds it to the code"),
        ("lgtm-8", {"tests": ()}, "lgtm-8: no test holds it to the code"),
        ("lgtm-1", {"tests": ("tests/test_losses.py::test_none",)}, "there is no test tests/test_losses.py::test_none"),
        ("lgtm-1", {"functions": ("kdlib.losses.none",)}, "lgtm-1: there is no kdlib.losses.none"),
        ("lgtm-1", {"functions": ()}, "kdlib.losses.kl_divergence cites lgtm-1, but the ledger does not name it"),
        ("lgtm-4", {"functions": ("kdlib.losses.logit_mse",)}, "lgtm-4: names kdlib.losses.logit_mse, whose docstring"),
        ("lgtm-4", {"status": "not yet", "why": "", "anchor": ""}, "lgtm-4: not yet, but no remark says on what"),
        ("lgtm-tab7", {"why": ""}, "lgtm-tab7: measured, but no remark says on what"),
        ("lgtm-tab5", {"why": ""}, "lgtm-tab5: shown, but no remark says on what, where"),
        ("lgtm-1", {"status": "shown"}, "lgtm-1: shown is for figures and tables"),
        ("lgtm-tab7", {"anchor": ""}, "lgtm-tab7: measured, but no anchor says where"),
        ("lgtm-1", {"status": "not yet"}, "lgtm-1: not yet, but it has an anchor"),
        ("lgtm-1", {"status": "left out"}, "lgtm-1: left out, but it has functions or tests"),
        ("lgtm-4", {"meaning": "a $x$ formula of 1 | 2"}, "lgtm-4: what would be markup"),
        ("lgtm-4", {"meaning": "short"}, "lgtm-4: the meaning has 5 characters"),
        ("lgtm-tab1", {"transcribed": ""}, "lgtm-tab1: its numbers are in data/published/lgtm.csv"),
        ("tutor-tab6", {"transcribed": "data/published/tutor_kd.csv"}, "tutor-tab6: its numbers are not in data/pub"),
        ("lgtm-tab7", {"why": "a sweep"}, "lgtm-tab7: measured, but the remark does not say on which data"),
        ("lgtm-tab1", {"study": ""}, "experiments/tables/lgtm_table1.yml is named by no entry"),
        ("lgtm-tab1", {"study": "experiments/tables/no.yml"}, "lgtm-tab1: there is no experiments/tables/no.yml"),
        ("lgtm-tab1", {"study": "experiments/tables/lgtm_table4.yml"}, "lgtm-tab1: no arm for DML"),
        ("metadistil-tab1", {"no_arm": {}}, "metadistil-tab1: no arm for MiniLM"),
        ("lgtm-tab1", {"no_arm": {"KD": "why not"}}, "lgtm-tab1: KD has no arm, it says, but it has"),
        ("lgtm-tab1", {"no_arm": {"XKD": "why not"}}, "lgtm-tab1: no row is called XKD"),
        ("ikd-tab4", {"no_arm": {"IKD": "why not"}}, "ikd-tab4: rows without an arm, but no study has the others"),
        (
            "lgtm-4",  # the head of chapter 1 announces eqs. (1) and (2) of LGTM
            {"status": "derived", "anchor": "chapters/01_distillation#eq-dist-step"},
            "lgtm-4: stands in chapters/01_distillation, whose head does not announce it",
        ),
    ],
)
def test_a_planted_mistake_is_found(entries, root, name, fields, complaint):
    found = ledger.problems(changed(entries, name, fields), root)
    assert any(complaint in said for said in found), found


def test_the_order_is_that_of_the_papers(entries):
    ids = [entry.id for entry in entries]
    assert list(ledger.id_problems(ids)) == []
    assert list(ledger.id_problems(ids[::-1])) == ["the entries are not in the order of the papers"]


# Planted mistakes in what the ledger points to


CHAPTER = """\
# %% [markdown]
# # A chapter
# | Papers | IKD eqs. (1)-(2) and Figure 1 |
#
# ## Some words, and a number: 2
#
# $$a = b. $$ (eq-a)

# %% mystnb={"figure": {"name": "fig-b", "caption": "B"}}
"""
LIBRARY = '''\
"""A room.

Source: IKD eq. (2).
"""


def soft(x):
    """One.

    Source: IKD eqs. (1)-(2).  Derived in: chapters/01_a.
    """


def _hidden(x):
    """Source: IKD eq. (9)."""


class Thing:
    """Two."""

    def run(self):
        """Three.  Source: IKD section 2."""
'''
SMALL = [
    ledger.Entry(
        "ikd-1", "a softmax", "derived", "chapters/01_a#eq-a", ("kdlib.a.soft",), ("tests/test_a.py::test_a",)
    ),
    ledger.Entry(
        "ikd-2", "a divergence", "not yet", "", ("kdlib.a", "kdlib.a.soft"), ("tests/test_a.py::test_a",), "no"
    ),
    ledger.Entry("ikd-fig1", "a drawing", "measured", "chapters/01_a#fig-b"),
]


@pytest.fixture
def small(tmp_path):
    """A repository of one chapter, one room and one test, in which the ledger SMALL is true."""
    for folder, name, text in (
        ("chapters", "01_a.py", CHAPTER),
        ("kdlib", "a.py", LIBRARY),
        ("tests", "test_a.py", "def test_a():\n    pass\n\n\ndef helper():\n    pass\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    return tmp_path


def pointers(root):
    return [*ledger.place_problems(SMALL, root), *ledger.source_problems(SMALL, root)]


def test_what_can_be_pointed_to(small):
    assert ledger.anchors(small) == {
        "chapters/01_a#eq-a": "{eq}`eq-a`",
        "chapters/01_a#fig-b": "{numref}`fig-b`",
        "chapters/01_a#some-words-and-a-number-2": (
            "[Some words, and a number: 2](chapters/01_a.ipynb#some-words-and-a-number-2)"
        ),
    }
    assert ledger.tests(small) == {"tests/test_a.py::test_a"}
    assert {name: link for name, (link, _) in ledger.docstrings(small).items()} == {
        "kdlib.a": "{py:mod}`a <kdlib.a>`",
        "kdlib.a.soft": "{py:func}`a.soft <kdlib.a.soft>`",
        "kdlib.a.Thing": "{py:class}`a.Thing <kdlib.a.Thing>`",
        "kdlib.a.Thing.run": "{py:class}`a.Thing <kdlib.a.Thing>`",
    }
    assert pointers(small) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("chapters/01_a.py", "(eq-a)", "(eq-c)", "ikd-1: there is no chapters/01_a#eq-a"),
        ("chapters/01_a.py", "fig-b", "fig-c", "ikd-fig1: there is no chapters/01_a#fig-b"),
        (
            "chapters/01_a.py",
            "eqs. (1)-(2)",
            "eq. (2)",
            "ikd-1: stands in chapters/01_a, whose head does not announce it",
        ),
        ("chapters/01_a.py", "(1)-(2)", "(1)-(17)", "chapters/01_a announces ikd-17, which no paper has"),
        ("kdlib/a.py", "def soft", "def loud", "ikd-1: there is no kdlib.a.soft"),
        (
            "kdlib/a.py",
            "eqs. (1)-(2)",
            "eqs. (1)-(3)",
            "kdlib.a.soft cites ikd-3, but the ledger does not name it there",
        ),
        ("kdlib/a.py", "eqs. (1)-(2)", "eq. (2)", "ikd-1: names kdlib.a.soft, whose docstring does not cite it"),
        ("kdlib/a.py", "eq. (2).\n", "eq. (20).\n", "kdlib.a cites ikd-20, but the ledger does not name it there"),
        ("kdlib/a.py", "Two.", "Two.  Source: IKD eq. (4).", "kdlib.a.Thing cites ikd-4, but the ledger does not"),
        (
            "kdlib/a.py",
            "IKD section 2",
            "IKD equation 2",
            "kdlib.a.Thing.run names a paper under Source, but nothing in",
        ),
        ("kdlib/a.py", "01_a.\n", "02_b.\n", "ikd-1: none of its functions says that it is derived in chapters/01_a"),
        ("tests/test_a.py", "test_a", "test_b", "ikd-1: there is no test tests/test_a.py::test_a"),
    ],
)
def test_a_mistake_elsewhere_is_found(small, file, old, new, complaint):
    text = (small / file).read_text()
    assert old in text
    (small / file).write_text(text.replace(old, new))
    found = pointers(small)
    assert any(complaint in said for said in found), found


def test_unknown_and_missing_fields_are_named(small):
    (small / "data").mkdir()
    (small / ledger.LEDGER).write_text("- {id: ikd-1, meaning: a softmax, state: derived}\n")
    with pytest.raises(ValueError, match=r"ikd-1: unknown \['state'\], missing \['status'\]"):
        ledger.read(small)


# The page


def test_a_row_of_the_page(small):
    places, known = ledger.anchors(small), ledger.docstrings(small)
    assert ledger.row(SMALL[0], places, known) == [
        "ikd-1",
        "a softmax",
        "chapter 1, {eq}`eq-a`",
        "{py:func}`a.soft <kdlib.a.soft>`",
        "`tests/test_a.py`: a",
        "derived",
    ]
    assert ledger.row(SMALL[1], places, known)[-1] == "not yet; no"
    assert ledger.in_words("tests/test_a.py::TestTheStep::test_it_goes_down") == "the step: it goes down"
    assert "| figures | 0 | 1 | 0 | 0 | 0 | 1 |" in ledger.count_table(SMALL)


STUDY = """\
arms:
  teacher: {method: fine_tune, student: a}
  KD: {method: kd, objective: dist, pkd_weight: 2.0}
  IKD: {like: KD, method: ikd, objective: kl}
  other: {method: fine_tune, student: a}
"""


def test_what_runs_at_our_size_is_read_from_the_records(tmp_path):
    folder = tmp_path / "data" / "runs"
    for place, config in (
        ("04_a/1", {"task": "mini-mnli", "method": "kd", "objective": "kl", "pkd_weight": 0.0}),
        ("12_b/1", {"task": "sst2", "method": "kd", "objective": "kl"}),
        ("12_b/2", {"task": "mini-stsb", "method": "kd", "objective": "logit_mse"}),
        ("06_c/1", {"task": "sst2", "method": "kd", "objective": "kl", "pkd_weight": 1.0}),
        ("10_d/1", {"task": "sst2", "method": "pkd", "pkd_weight": 1.0, "student": "tiny-2x32"}),
        ("05_e/1", {"task": "sst2", "method": "metadistil", "pilot_update": False}),
        ("05_e/2", {"task": "sst2", "method": "lgtm", "objective": "dist", "pilot_update": None}),
        ("09_f/1", {"corpus": "mini-corpus", "method": "tutor"}),
        ("teachers/1", {"task": "sst2", "method": "fine_tune"}),
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{place}.json").write_text(json.dumps({"config": config}))
    ran = ledger.on_record(tmp_path)
    assert ran == {
        ledger.Way("kd"): [4, 12],
        ledger.Way("kd", patient=True): [6, 10],
        ledger.Way("metadistil", pilot_update=False): [5],
        ledger.Way("lgtm", objective="dist"): [5],
    }
    (tmp_path / "study.yml").write_text(STUDY)
    assert ledger.ways(tmp_path, "study.yml") == {
        "KD": ledger.Way("kd", objective="dist", patient=True),
        "IKD": ledger.Way("ikd", patient=True),
        "other": ledger.Way("fine_tune", student="a"),
    }


def test_the_rows_of_a_table_on_the_page(root, entries):
    rows = {line[0]: line[1:] for line in ledger.table_rows([e for e in entries if e.id == "metadistil-tab1"], root)}
    assert rows["MiniLM"][0] == "none" and rows["MiniLM"][2].startswith("no; ")
    assert rows["PKD"] == ["`pkd`", "1", "chapter 6"]
    assert rows["DistilBERT"] == ["`fine_tune`, from distilbert-base-uncased", "1", "no"]
    assert rows["MetaDistil without pilot update"][0] == "`metadistil`, without the pilot update"
    rows = {
        line[0]: line[1:] for line in ledger.table_rows([e for e in entries if e.paper == "lgtm" and e.study], root)
    }
    assert rows["DIST"][:2] == ["`dist`", "1, 2, 4"] and rows["LGTM with MSE"][0] == "`lgtm`, objective logit_mse"


def test_an_arm_by_a_method_that_there_is_not_is_found(root, entries, tmp_path):
    for folder in ("kdlib/methods", "experiments/tables", "data/published"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert list(ledger.study_problems(entries, tmp_path)) == []
    path = tmp_path / "kdlib" / "methods" / "__init__.py"
    path.write_text(path.read_text().replace('"rco":', '"rc0":'))
    found = list(ledger.study_problems(entries, tmp_path))
    assert found == [f"{id}-tab1: arm RCO has method rco, which kdlib does not have" for id in ("lgtm", "metadistil")]


def test_the_command_writes_the_page_once_and_nothing_from_a_wrong_ledger(tmp_path, root, capsys):
    for folder in ("kdlib", "chapters", "tests", "data/published", "data/runs", "experiments/tables"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.ipynb", "__pycache__"))
    shutil.copy(root / ledger.LEDGER, tmp_path / ledger.LEDGER)
    (tmp_path / "docs").mkdir()
    assert ledger.main(tmp_path) == 0
    assert capsys.readouterr().out == f"wrote {ledger.PAGE}\n"
    assert (tmp_path / ledger.PAGE).read_text() == (root / ledger.PAGE).read_text()
    assert ledger.main(tmp_path) == 0
    assert capsys.readouterr().out == "", "nothing to do"
    text = (tmp_path / ledger.LEDGER).read_text()
    (tmp_path / ledger.LEDGER).write_text(text.replace("eq-dist-hard", "eq-dist-soft-and-hard"))
    assert ledger.main(tmp_path) == 1
    assert "there is no chapters/01_distillation#eq-dist-soft-and-hard" in capsys.readouterr().out
