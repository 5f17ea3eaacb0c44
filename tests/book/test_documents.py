"""README, citation, licences, the form for reports, the hooks: what they say is true and up to date."""

import json
import re
import shlex
import shutil
from email.message import Message
from importlib import metadata

import pytest
import yaml
from packaging.utils import canonicalize_name

import kdlib
from kdlib import configuration, glue
from tools import licences, readme

# The README's tables


def test_the_readme_is_up_to_date(root):
    text = (root / "README.md").read_text()
    assert readme.rendered(text, root) == text, "run `make pages`"


ALONE = {"method": "fine_tune"} | dict.fromkeys(
    ("teacher", "teacher_epochs", "teacher_learning_rate", "alpha", "temperature", "objective")
)
"""A student that learns from the labels alone."""


@pytest.fixture
def small(tmp_path, root):
    """A repository with the real book, a README of markers, and two records of a made-up teacher and student."""
    shutil.copytree(root / "chapters", tmp_path / "chapters")
    shutil.copy(root / "book.yml", tmp_path)
    (tmp_path / "README.md").write_text(
        "# Book\n<!-- chapters -->\n<!-- end of chapters -->\ntext\n"
        "<!-- results -->\nold\n<!-- end of results -->\n<!-- glue -->\n<!-- end of glue -->\nend\n"
    )
    path = next((root / "data" / "runs" / "01_distillation").glob("mini-mnli-kd-*.json"))
    template = json.loads(path.read_text())

    def record(seed, score, chapter="99_small", **changes):
        fields = json.loads(json.dumps(template))
        fields["config"] |= {"seed": seed, "alpha": 0.5, "temperature": 2.0, **changes}
        fields["metrics"] |= {"test/accuracy": score, "validation/accuracy": score}
        folder = tmp_path / "data" / "runs" / chapter
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{len(list(folder.iterdir()))}.json").write_text(json.dumps(fields))

    return tmp_path, record


def test_the_command_writes_between_the_markers_only(small, capsys):
    root, record = small
    record(0, 0.5)
    record(1, 0.6)
    assert readme.main(root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("# Book\n<!-- chapters -->\n") and text.endswith("<!-- end of glue -->\nend\n")
    assert "\ntext\n" in text and "old" not in text
    assert "| mini-mnli | tiny-2x32 | the book's tiny-4x128 by kd, α = 0.5, T = 2 | 55.0 ± 7.1 | 2 |" in text
    assert "| 1 | [What is distilled, and why?](chapters/01_distillation.ipynb) | Distillation |" in text
    assert "wrote the tables" in capsys.readouterr().out
    assert readme.main(root) == 0
    assert capsys.readouterr().out == "", "nothing to do"


def test_every_chapter_is_in_the_table(root):
    listed = re.findall(r"\]\((chapters/\w+)\.ipynb\)", readme.chapter_table(root))
    book = yaml.safe_load((root / "book.yml").read_text())
    files = [entry["file"] for part in book["parts"] for entry in part["chapters"]]
    assert listed == [file for file in files if file.startswith("chapters/")]


def test_settings_are_kept_apart_and_sweeps_are_left_out(small):
    root, record = small
    for seed in range(3):
        record(seed, 0.5)
        record(seed, 0.7, **ALONE)
    record(0, 0.9, temperature=8.0)
    record(0, 0.95, student="tiny-4x128", **ALONE)
    rows = readme.result_table(root).splitlines()[2:]
    assert rows == [
        "| mini-mnli | tiny-4x128 | the labels | 95.0 | 1 |",
        "| mini-mnli | tiny-2x32 | the labels | 70.0 ± 0.0 | 3 |",
        "| mini-mnli | tiny-2x32 | the book's tiny-4x128 by kd, α = 0.5, T = 2 | 50.0 ± 0.0 | 3 |",
    ]


def test_two_settings_that_would_look_alike_are_an_error(small):
    root, record = small
    record(0, 0.5)
    record(0, 0.6, epochs=9)
    with pytest.raises(ValueError, match="look alike"):
        readme.result_table(root)
    with pytest.raises(ValueError, match="look alike"):
        readme.main(root)


def test_another_objective_is_named(small):
    root, record = small
    record(0, 0.5, objective="logit_mse")
    assert "T = 2, logit_mse |" in readme.result_table(root)


def test_without_records_it_is_said(small):
    assert "make experiments" in readme.result_table(small[0])
    assert "experiments/12_glue.yml" in readme.glue_table(small[0])


def test_runs_on_real_glue_have_a_table_of_their_own(small):
    root, record = small
    real = {"chapter": "12_glue", "source": "nyu-mll/glue", "task": "sst2", "student": None, "student_layers": 3}
    record(0, 0.7, method="fine_tune", **real)
    record(0, 0.8, method="fine_tune", **{**real, "student": "minilm", "student_layers": None})
    for seed in range(2):
        record(seed, 0.5 + seed / 10, method="metadistil", **real)
        record(seed, 0.6, method="lgtm", influence="meta", **real)
    record(0, 0.65, method="metadistil", **{**real, "task": "mrpc"})
    rows = readme.glue_table(root).splitlines()
    assert rows[0].startswith("| learns by | sst2, ") and "| mrpc, " in rows[0]
    assert rows[2:] == [
        "| the student alone | 70.0 (1 seed) |  |",
        "| the teacher alone | 80.0 (1 seed) |  |",
        "| lgtm, meta | 60.0 ± 0.0 (2 seeds) |  |",
        "| metadistil | 55.0 ± 7.1 (2 seeds) | 65.0 (1 seed) |",
    ]
    assert "make experiments" in readme.result_table(root), "none of them is a run on MiniGLUE"


@pytest.mark.parametrize("lost", ["<!-- chapters -->\n", "<!-- end of results -->\n"])
def test_lost_markers_are_an_error(small, lost):
    root, _ = small
    text = (root / "README.md").read_text()
    with pytest.raises(ValueError, match="needs <!-- "):
        readme.rendered(text.replace(lost, ""), root)


def test_the_readme_is_short_and_its_links_lead_somewhere(root):
    text = (root / "README.md").read_text()
    prose = [line for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) < 800  # tables and commands are looked up, not read
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        else:
            assert (root / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_commands_that_are_named_exist(root, name):
    text = (root / name).read_text()
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for module in re.findall(r"-m ((?:kdlib|tools)\.\w+)", text):
        assert (root / (module.replace(".", "/") + ".py")).exists(), module
    for path in re.findall(r"`((?:chapters|kdlib|data|docs|tools|tests|configs)/[\w/.]*)`", text):
        assert "NN_name" in path or (root / path).exists(), path


def test_the_parameters_in_the_readme_are_parameters(root):
    from kdlib import pretraining, runs  # here, because most tests of this file do not need torch

    text = (root / "README.md").read_text()
    for line in re.findall(r"papermill [^\n]*", text):
        words = shlex.split(line.split("`")[0], comments=True)
        given = {words[i + 1]: yaml.safe_load(words[i + 2]) for i, word in enumerate(words) if word == "-p"}
        config = pretraining.configure() if "11_pretraining" in words[1] else runs.configure()
        assert given.keys() <= config.flat.keys()
    for name, value in re.findall(r"`-p (\w+) ([\w/.-]+)`", text):
        method = {"method": configuration.READ_BY[name][0]} if name in configuration.READ_BY else {}
        runs.configure(**({name: yaml.safe_load(value), **method} if name != "source" else {}))


# Citation

CFF = {
    *("cff-version", "message", "type", "title", "abstract", "authors", "version", "license", "keywords"),
    *("references", "identifiers", "doi", "url", "repository-code", "date-released", "commit", "contact"),
    *("preferred-citation", "license-url", "repository", "repository-artifact"),
}


def citation_problems(citation: dict) -> list[str]:
    """What the Citation File Format 1.2.0 asks for and is not there."""
    missing = {"cff-version", "message", "title", "authors"} - citation.keys()
    problems = [f"{key} is missing" for key in sorted(missing)]
    problems += [f"{key} is no key of the format" for key in sorted(citation.keys() - CFF)]
    if citation.get("cff-version") != "1.2.0":
        problems.append("cff-version is not 1.2.0")
    for work in [citation, *citation.get("references", [])]:
        for person in work.get("authors") or [{}]:
            if not ({"family-names", "given-names"} <= person.keys() or person.keys() == {"name"}):
                problems.append(f"an author of {work.get('title')!r} has no name")
        if not isinstance(work.get("title"), str):
            problems.append("a work has no title")
    for reference in citation.get("references", []):
        if "type" not in reference:
            problems.append(f"the reference {reference.get('title')!r} has no type")
    return problems


def test_the_citation_is_valid_and_of_this_version(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation_problems(citation) == []
    assert citation["version"] == kdlib.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["title"] in (root / "README.md").read_text().splitlines()[0]
    assert len(citation["references"]) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("message"),
        lambda c: c.pop("authors"),
        lambda c: c.update({"cff-version": 1.2}),
        lambda c: c.update(licence="MIT"),
        lambda c: c["references"][0].pop("type"),
        lambda c: c["references"][1]["authors"][0].pop("given-names"),
    ],
)
def test_an_invalid_citation_is_caught(root, damage):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    damage(citation)
    assert citation_problems(citation) != []


# Reports and hooks


def test_the_form_for_reports_asks_for_the_doctors_output(root):
    form = yaml.safe_load((root / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    (doctor,) = [field for field in form["body"] if field.get("id") == "doctor"]
    assert "python -m kdlib.doctor" in doctor["attributes"]["description"]
    assert doctor["validations"] == {"required": True}
    assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_the_hooks_use_the_projects_own_environment_and_no_network(root):
    config = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert hooks.keys() == {"ruff-check", "ruff-format", "types", "chapters"}
    for hook in hooks.values():
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/python -m ")
    assert re.search(hooks["chapters"]["files"], "chapters/00_preface.ipynb")
    assert "tools.chapters" in hooks["chapters"]["entry"]


# Licences


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading, by its first column."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells[2:]}


def test_the_page_on_licences_is_up_to_date(root):
    assert (root / licences.PAGE).read_text() == licences.page(root), "run `make pages`"


def test_every_locked_package_is_on_the_page_with_a_licence(root):
    listed = rows((root / licences.PAGE).read_text(), "Packages")
    lines = (root / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: row[0] for name, row in listed.items()} == pins
    assert [name for name, row in listed.items() if len(row[1]) < 3 or row[1].lower() == "unknown"] == []


def test_every_task_of_glue_is_on_the_page(root):
    listed = rows((root / licences.PAGE).read_text(), "GLUE")
    tasks = {name.replace("-", "").lower() for name in listed}
    assert tasks == {name for name in glue.TASKS if not name.startswith("mini-")}
    assert all(len(terms) > 10 for _, terms in listed.values())


def test_a_package_in_another_version_is_an_error(tmp_path):
    (tmp_path / "requirements.lock").write_text("numpy==1.0.0\n")
    with pytest.raises(ValueError, match=r"numpy is locked at 1\.0\.0, installed is \d"):
        licences.page(tmp_path)
    (tmp_path / "requirements.lock").write_text("no-such-package==1.0.0\n")
    with pytest.raises(ValueError, match="installed is None"):
        licences.page(tmp_path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License-Expression": ["MIT"], "License": ["old"]}, "MIT"),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "Topic :: Text"]}, "MIT License"),
        ({"License": ["BSD-3-Clause\nand a long text"]}, "BSD-3-Clause"),
        ({"Classifier": ["Topic :: Text"]}, None),
    ],
)
def test_where_a_licence_is_read(monkeypatch, fields, expected):
    message = Message()
    for name, values in fields.items():
        for value in values:
            message[name] = value
    monkeypatch.setattr(licences.metadata, "metadata", lambda name: message)
    if expected is None:
        with pytest.raises(ValueError, match="states no licence"):
            licences.licence("a")
    else:
        assert licences.licence("a") == expected


def test_the_command_writes_the_page_once(tmp_path, root, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "requirements.lock").write_text(f"numpy=={metadata.version('numpy')}\n")
    assert licences.main(tmp_path) == 0
    listed = rows((tmp_path / licences.PAGE).read_text(), "Packages")
    assert list(listed) == [canonicalize_name("numpy")]
    assert "wrote docs/licences.md" in capsys.readouterr().out
    assert licences.main(tmp_path) == 0
    assert capsys.readouterr().out == ""
