"""Executing the book and building its site, on a book of a few cells."""

import json
import re
import shutil
import sys

import nbformat
import pytest
import yaml

from tools import book, chapters
from tools.execute import Execution, execute


def run(small_book, source, **options):
    """Execute one chapter; its result and the notebook that was written."""
    chapter = small_book.write("01_small", source)
    target = small_book.root / "_build" / "out.ipynb"
    result = execute(chapters.read_source(chapter.source), target, cwd=small_book.root, **options)
    return result, nbformat.read(target, as_version=4)


def outputs(notebook):
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_kernel_is_this_python_in_the_given_folder_with_one_thread(small_book, monkeypatch, tmp_path):
    elsewhere = tmp_path / "kernels" / "python3"  # a kernel of the same name that goes before ours, if we let it
    elsewhere.mkdir(parents=True)
    (elsewhere / "kernel.json").write_text('{"argv": ["false"], "display_name": "Another", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    source = (
        "# %%\nimport os\nimport sys\n\nprint(sys.executable, os.getcwd(), os.environ['OMP_NUM_THREADS'], sep='|')\n"
    )
    result, notebook = run(small_book, source)
    assert result.failure is None
    assert outputs(notebook).strip() == f"{sys.executable}|{small_book.root}|1"


def test_parameters_reach_the_cell(small_book):
    _, notebook = run(small_book, '# %% tags=["parameters"]\nseed = 0\n\n# %%\nprint(seed)\n', parameters={"seed": 3})
    assert outputs(notebook) == "3\n"


def test_time_and_memory_are_those_of_the_kernel_and_its_children(small_book):
    plain, _ = run(small_book, "# %%\n1\n")
    child = "x = bytearray(200 * 2**20); import time; time.sleep(1)"
    source = f"# %%\nimport subprocess\nimport sys\n\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    busy, _ = run(small_book, source)
    assert busy.seconds > 1
    assert 190 < busy.peak_mib - plain.peak_mib < 300
    assert 30 < plain.peak_mib < 300


def test_the_failing_cell_is_named(small_book):
    result, _ = run(
        small_book, "# %% [markdown]\n# Text.\n\n# %%\nx = 1\n\n# %%\ny = x + 1\nraise ValueError(f'y is {y}')\n"
    )
    assert result.failure.cell == 3
    assert result.failure.source == "y = x + 1\nraise ValueError(f'y is {y}')"
    assert "ValueError: y is 2" in result.failure.error
    assert "\x1b" not in result.failure.error


def test_a_killed_kernel_is_a_failure_of_its_cell(small_book):
    result, _ = run(small_book, "# %%\nx = 1\n\n# %%\nimport os\n\nos.kill(os.getpid(), 9)\n")
    assert result.failure.cell == 2
    assert "kernel died" in result.failure.error


def test_an_endless_cell_is_a_failure(small_book):
    result, _ = run(small_book, "# %%\nwhile True:\n    pass\n", timeout=2)
    assert result.failure.cell == 1
    assert "more than 2 s" in result.failure.error


ASKING = {
    "socket.create_connection(('a.invalid', 443), 1)": "a.invalid:443",
    "socket.gethostbyname('b.invalid')": "b.invalid",
    "urllib.request.urlopen('https://c.invalid/a')": "c.invalid:443",
    "socket.socket().connect(('192.0.2.1', 80))": "192.0.2.1:80",
    "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))": "192.0.2.1:53",
    "subprocess.run([sys.executable, '-c', 'import socket; socket.gethostbyname(b\"d.invalid\")'])": "d.invalid",
    "subprocess.run([sys.executable, '-c', PROXY + 'urlopen(\"http://e.invalid/\")'])": "e.invalid:80",
}  # names that no machine ever has


def test_asking_another_machine_is_a_failure_whatever_is_caught(small_book, monkeypatch):
    """Each way in a cell of its own, because one kernel takes as long as all of them."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which would hide whom it is asked for
    source = "# %%\nimport contextlib, socket, subprocess, sys, urllib.request\n\n"
    source += "PROXY = 'from urllib.request import urlopen; '\n"
    for number, ask in enumerate(ASKING):
        source += f"\n# %%\nwith contextlib.suppress(Exception):\n    {ask}\nprint('went on', {number})\n"
    result, notebook = run(small_book, source)
    assert outputs(notebook) == "".join(f"went on {number}\n" for number in range(len(ASKING)))
    start, _, rest = str(result.failure).partition(": ")
    assert start == "asked the network, which no chapter may"
    assert rest.split("; ") == [
        address if "subprocess" in ask else f"{address} in the line {ask!r}" for ask, address in ASKING.items()
    ]


def test_this_machine_may_be_asked(small_book):
    source = (
        "# %%\nimport socket\n\nwith socket.create_server(('127.0.0.1', 0)) as server:\n"
        "    for host in ('127.0.0.1', 'localhost'):\n"
        "        socket.create_connection((host, server.getsockname()[1])).close()\n"
    )
    result, _ = run(small_book, source)
    assert result.failure is None


def test_too_much_memory_is_a_failure(small_book):
    source = "# %%\nimport time\n\nx = bytearray(300 * 2**20)\ntime.sleep(0.5)\n"
    result, _ = run(small_book, source, max_mib=300)
    assert re.fullmatch(r"took \d{3} MiB, 300 are allowed: use smaller batches or networks", str(result.failure))
    result, _ = run(small_book, source)
    assert result.failure is None


def test_two_chapters_run_side_by_side_and_each_is_measured_alone(small_book):
    """Each waits for a file that the other writes; together they take 400 MiB."""
    for number, other in ((1, 2), (2, 1)):
        source = (
            "# %%\nimport time\nfrom pathlib import Path\n\n"
            f"x = bytearray({100 * number} * 2**20)\nPath('../started_{number}').touch()\n"
            f"while not Path('../started_{other}').exists():\n    time.sleep(0.05)\ntime.sleep(0.5)\n"
        )
        small_book.write(f"0{number}_waits", source)
    assert book.main(["--store"], small_book.root) == 0
    first, second = json.loads((small_book.root / "_build" / "book.json").read_text())["chapters"]
    assert 80 < second["peak_mib"] - first["peak_mib"] < 120


def test_the_book_stops_at_the_first_failing_cell(small_book, capsys, monkeypatch):
    # The first two run side by side: one goes on until the other has failed, and has time to see a third begin.
    waits = "import time\nfrom pathlib import Path\n\nwhile not Path('../failing').exists():\n    time.sleep(0.05)\n"
    small_book.write("01_first", f"# %%\n{waits}time.sleep(1.5)\n")
    fails = "open('../failing', 'w').close()\nbound = 3\nassert bound > 5, 'the bound is broken'\n"
    small_book.write("02_second", f"# %%\n{fails}")
    small_book.write("03_third", "# %%\nopen('reached', 'w').close()\n")
    assert book.main([], small_book.root) == 1
    screen = capsys.readouterr().out
    assert "chapters/02_second.ipynb stopped at cell 1:" in screen
    assert "    assert bound > 5, 'the bound is broken'" in screen
    assert "AssertionError: the bound is broken" in screen
    assert re.search(r"^01_first +\d+\.\d +\d+  ok$", screen, re.MULTILINE)
    assert re.search(r"^02_second +\d+\.\d +\d+  failed$", screen, re.MULTILINE)
    assert re.search(r"^03_third +not run$", screen, re.MULTILINE)
    assert list(small_book.root.rglob("reached")) == []
    assert not (small_book.root / "_build" / "html").exists()
    monkeypatch.setattr(book, "WORKERS", 1)
    assert book.main(["--store"], small_book.root) == 1, "a chapter that failed is not up to date, nor stored"
    assert list((small_book.root / "chapters").glob("*.ipynb")) == []


def test_only_what_has_changed_is_executed_again(small_book, monkeypatch):
    executed = []

    def count(chapter, root):  # in place of a kernel
        executed.append(chapter.name)
        path = book.executed_path(root, chapter.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(chapters.read_source(chapter.source), path)
        return Execution(1.0, 1.0)

    monkeypatch.setattr(book, "execute_chapter", count)
    small_book.write("01_counted", "# %%\n1\n")

    def runs(*arguments):
        assert book.main(["--store", *arguments], small_book.root) == 0
        return len(executed)

    assert runs() == 1
    assert runs() == 1, "nothing has changed"
    assert runs("--force") == 2
    (small_book.root / "kdlib" / "losses.py").write_text("def half(x):\n    return x * 0.5\n")
    assert runs() == 3, "the library has changed"
    (small_book.root / "data" / "numbers.txt").write_text("1 2 4\n")
    assert runs() == 4, "the data have changed"
    small_book.write("01_counted", "# %%\n1\n\n# %%\n1 + 1\n")
    assert runs() == 5, "the chapter has changed"
    (small_book.root / "docs" / "index.md").write_text("# Another first page\n")
    assert runs() == 5, "the site's other pages do not matter to a chapter"


def test_what_an_earlier_run_left_is_gone(small_book):
    small_book.write("01_first", "# %%\nfrom pathlib import Path\n\nPath('left').mkdir()\n")
    assert [book.main(["--store", "--force"], small_book.root) for _ in range(2)] == [0, 0]


def test_the_record(small_book):
    small_book.write("01_first", "# %%\n1\n")
    book.main(["--store"], small_book.root)
    (record,) = json.loads((small_book.root / "_build" / "book.json").read_text())["chapters"]
    assert (record["name"], record["result"]) == ("01_first", "ok")
    assert record["seconds"] > 0
    assert record["peak_mib"] > 30


# The site: the real docs/ around a book of one chapter.

PAGE = """\
# %% [markdown]
# # A chapter
#
# $$ a^2 = b $$ (eq-square)
#
# By equation {eq}`eq-square`, $b$ is positive.

# %%
import sys

import matplotlib.pyplot as plt

print("an output")
print("progress", file=sys.stderr)
plt.figure(figsize=(1, 1))
plt.plot([1, 2]);
"""


@pytest.fixture
def site_book(small_book, root, monkeypatch):
    monkeypatch.setattr(book, "WORKERS", 1)  # starting processes would take longer than the chapters
    shutil.copytree(root / "docs", small_book.root / "docs", dirs_exist_ok=True)
    (small_book.root / "docs" / "papers.md").write_text("# The ledger\n")  # the real one names the real chapters
    parts = yaml.safe_load((root / "book.yml").read_text())["parts"]
    small_book.pages.extend(part for part in parts if not part["chapters"][0]["file"].startswith("chapters/"))
    small_book.write("12_glue", "# %% [markdown]\n# # Named on the first page\n\n# %%\n1\n")
    small_book.write("00_preface", PAGE)
    return small_book


def test_the_site_is_built_from_executed_chapters(site_book, capsys):
    assert book.main([], site_book.root) == 0
    html = site_book.root / "_build" / "html"
    assert f"The site: {html / 'index.html'}" in capsys.readouterr().out
    page = (html / "chapters" / "00_preface.html").read_text()
    assert "an output" in page
    assert "progress" not in re.sub(r"<pre>.*?print.*?</pre>|<[^>]*>", "", page, flags=re.DOTALL).split("an output")[1]
    assert re.search(r'<img[^>]* src="\.\./_images/[0-9a-f]+\.png"', page)
    assert "A chapter" in (html / "index.html").read_text()
    costs = re.findall(r"A chapter.*?<p>(\d+)</p>.*?<p>(\d+)</p>", (html / "index.html").read_text(), re.DOTALL)[-1]
    record = json.loads((site_book.root / "_build" / "book.json").read_text())["chapters"][0]
    assert costs == (f"{record['seconds']:.0f}", f"{record['peak_mib']:.0f}")
    stamp = (html / "index.html").stat().st_mtime_ns
    assert book.main([], site_book.root) == 0
    assert (html / "index.html").stat().st_mtime_ns == stamp, "nothing has changed, so nothing is built"


def test_a_broken_reference_stops_the_site(site_book, capfd):
    site_book.write("00_preface", "# %% [markdown]\n# # A chapter\n#\n# By {eq}`eq-other`, all is well.\n\n# %%\n1\n")
    assert book.main([], site_book.root) == 1
    printed = capfd.readouterr()
    assert "eq-other" in printed.err
    assert "The site was not built" in printed.out
    assert not (site_book.root / "_build" / "site.sha256").exists(), "a failed build is not up to date"
