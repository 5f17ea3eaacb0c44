"""The model card of a student, and its way to the hub.

cards.write(record, licence="apache-2.0")
cards.push_to_hub(record, "somebody/student")  # the only function of kdlib that sends anything
"""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kdlib import files, models, report, runs
from kdlib.engine import STUDENT
from kdlib.methods import METHODS
from kdlib.records import RunRecord

CARD = "README.md"


def write(record: RunRecord, licence: str | None = None) -> Path:
    """Write the card of a finished run on a task beside its student, and return its path.

    It says on what the student was trained, by whom it was taught, how, with which settings, what it scores and under
    which licence it may be used.  What only the author knows is not guessed: without `licence` the card says that the
    licences of the data and of the first weights decide; what the book made itself is Apache-2.0.  Of local folders it
    gives the last part of the name.

    Raises what `report.report` raises.
    """
    networks = {network.name: network for network in report.report(record, measure=False).networks}
    config = {name: _named(value) for name, value in runs.configure(**record.config).identity.items()}
    ours = not record.contents and models.MINILM not in (config["teacher"], config["student"])
    licence = licence or ("apache-2.0" if ours else None)
    scores = {name: value for name, value in record.metrics.items() if not name.startswith("teacher/")}
    data = ModelCardData(
        language="en",
        license=licence or "other",
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["knowledge-distillation", config["method"]],
        model_name=record.run_id,
        eval_results=[_result(config, name, value) for name, value in scores.items()],
    )
    path = record.folder / STUDENT / CARD
    files.write_text(path, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(record, config, networks, licence)}")))
    return path


def _result(config: dict[str, Any], name: str, value: float) -> EvalResult:
    split, metric = name.split("/")
    return EvalResult(
        task_type="text-classification",
        dataset_type=config["source"],
        dataset_name=config["task"],
        dataset_split=split,
        metric_type=metric,
        metric_value=value,
    )


def _named(value: Any) -> Any:
    """A folder's own name instead of its path, also where several are joined by commas."""
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    return ",".join(Path(part).name if Path(part).expanduser().is_dir() else part for part in parts)


def _text(record: RunRecord, config: dict[str, Any], networks: dict[str, report.Network], licence: str | None) -> str:
    method = (METHODS[config["method"]].__doc__ or "").split("\n", 1)[0]
    by = f"Its teacher is `{config['teacher']}`." if "teacher" in networks else "It had no teacher."
    if config.get("assistants") and "teacher" in networks:
        by = f"Its teacher is an assistant, distilled from `{config['teacher']}`: the last of {config['assistants']}."
    metrics = {metric: None for network in networks.values() for metric in network.scores}
    columns = [*metrics, "parameters", "of these in embeddings", "bytes", "seconds of training"]
    rows = {
        network.name: [
            *(f"{network.scores[m]:.4f}" if m in network.scores else "" for m in metrics),
            f"{network.parameters + network.embeddings:,}",
            f"{network.embeddings:,}",
            f"{network.stored_bytes:,}",
            "" if network.seconds is None else f"{network.seconds:.0f}",
        ]
        for network in networks.values()
    }
    table = [["", *columns], ["---", *["---:"] * len(columns)], *([name, *row] for name, row in rows.items())]
    settings = [["setting", "value"], ["---", "---"]]
    settings += [[f"`{name}`", f"`{value}`"] for name, value in config.items() if value is not None]
    rights = f"`{licence}`" if licence else "Not stated here: the licences of the data and of the first weights decide."
    return "\n".join(
        [
            f"# {record.run_id}\n",
            f"A text classifier for `{config['task']}`, trained with kdlib by `{config['method']}`: {method}\n",
            f"## Data\n\nSource `{config['source']}`, task `{config['task']}`; rows by split: "
            + ", ".join(f"{name} {count:,}" for name, count in record.samples.items())
            + ".\n",
            f"## Teacher\n\n{by}\n",
            "## Scores\n\nOn the validation split, which chose the checkpoint; other splits are in the metadata.\n",
            *(f"| {' | '.join(row)} |" for row in table),
            "\n## Settings\n",
            *(f"| {' | '.join(row)} |" for row in settings),
            f"\n## Licence\n\n{rights}\n",
        ]
    )


def push_to_hub(record: RunRecord, repo_id: str, private: bool = True, licence: str | None = None) -> str:
    """Upload the student's folder, exports and card included, to the hub as `repo_id`; return the address.

    A card is written if there is none.  Nothing else in kdlib sends anything, and nothing calls this.

    Raises what `write` and huggingface_hub raise, for somebody who is not logged in for example.
    """
    folder = record.folder / STUDENT
    if not (folder / CARD).exists():
        write(record, licence)
    huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
    done = huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {record.run_id}")
    return str(done.repo_url) if done.repo_url else repo_id
