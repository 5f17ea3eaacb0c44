"""Model cards: that they can be read by the hub's own library, say what the record says, and give no paths away."""

import dataclasses

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from kdlib import cards, engine, models, records, runs


@pytest.fixture(scope="module")
def record(finished_run):
    return finished_run


def test_a_card_says_what_the_record_says(record):
    before = models.content(str(record.folder / engine.STUDENT))
    path = cards.write(record)
    assert path == record.folder / "student" / "README.md"
    assert models.content(str(record.folder / engine.STUDENT)) == before
    card = ModelCard.load(path)
    assert (card.data.license, card.data.library_name, card.data.model_name) == (
        "apache-2.0",
        "transformers",
        record.run_id,
    )
    found = {f"{each.dataset_split}/{each.metric_type}": each.metric_value for each in card.data.eval_results}
    assert found == record.metrics
    teacher = records.read_record(record.folder.parent / record.teacher)
    for said in (
        "`mini-mnli`",
        "by `kd`: A fixed teacher.",
        "Its teacher is `tiny-2x64`.",
        "train 200",
        "| `temperature` | `2.0` |",
        f"| teacher | {teacher.metrics['validation/accuracy']:.4f} | {teacher.parameters:,} |",
        f"| student | {record.metrics['validation/accuracy']:.4f} | {record.parameters:,} |",
        "## Licence\n\n`apache-2.0`",
    ):
        assert said in card.text, said


def test_a_licence_is_not_guessed_and_paths_stay_here(record, tmp_path):
    """A student whose weights came from a folder: their licence is the author's to tell."""
    where = tmp_path / "private" / "weights"
    network, tokenizer = (
        models.load("tiny-1x32", runs.configure().glue_task, models.load_tokenizer("tiny-1x32")),
        models.load_tokenizer("tiny-1x32"),
    )
    where.parent.mkdir()
    engine.save_pretrained(network, tokenizer, where)
    config = {"task": "mini-mnli", "method": "fine_tune", "student": str(where), "max_train": 64, "max_steps": 2}
    made = runs.run(runs.configure(**config, epochs=1, device="cpu", output_dir=str(tmp_path / "runs")))
    card = ModelCard.load(cards.write(made))
    assert card.data.license == "other" and "Not stated here" in card.text and "It had no teacher." in card.text
    assert "| `student` | `weights` |" in card.text and str(tmp_path) not in card.content
    assert ModelCard.load(cards.write(made, licence="mit")).data.license == "mit"


def test_the_hub_is_asked_by_one_function_only(record, monkeypatch):
    asked = []

    class Done:
        repo_url = "https://somewhere/somebody/student"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **k: asked.append(k) or Done)
    (record.folder / engine.STUDENT / cards.CARD).unlink(missing_ok=True)
    assert cards.push_to_hub(record, "somebody/student") == Done.repo_url
    assert asked[0] == (("somebody/student",), {"private": True, "exist_ok": True})
    assert asked[1]["folder_path"] == record.folder / engine.STUDENT and asked[1]["repo_id"] == "somebody/student"
    assert (record.folder / engine.STUDENT / cards.CARD).exists()


def test_a_run_on_plain_text_has_no_card(record):
    with pytest.raises(ValueError, match="is a run on plain text"):
        cards.write(dataclasses.replace(record, config={"corpus": "mini-corpus"}))
