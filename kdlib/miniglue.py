"""MiniGLUE: four small tasks in the shape of GLUE, with a vocabulary and a corpus of unlabelled sentences.

They were drawn from a seeded grammar whose true posterior is known; the grammar is `tools/miniglue.py` in the book's
repository, `data/miniglue/README.md` is the data card.  Here the files are found and named, `glue` and `corpus` read
them.
"""

from pathlib import Path

from transformers import BertTokenizer

TASK_NAMES = ("mini-sst2", "mini-mrpc", "mini-mnli", "mini-stsb")
ORACLE = ("idx", "posterior", "clean_label", "difficulty", "flipped")
"""The columns beside text and label: what is known of each example because it was made, see the data card."""


def folder() -> Path:
    """The folder that holds the tasks: the repository's data/miniglue, or the copy that an installed kdlib carries."""
    repository = Path(__file__).resolve().parents[1] / "data" / "miniglue"
    return repository if repository.is_dir() else Path(__file__).with_name("embedded")


def tokenizer() -> BertTokenizer:
    """BERT's WordPiece tokenizer with MiniGLUE's vocabulary."""
    return BertTokenizer(vocab=str(folder() / "vocab.txt"), model_max_length=128)
