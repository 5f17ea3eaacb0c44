"""A run is what it computes from: rows, weights and words, not the paths under which they lie."""

import dataclasses
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from kdlib import (
    checkpoints,
    configuration,
    engine,
    folders,
    glue,
    learner,
    models,
    pretraining,
    records,
    runs,
    trainer,
)
from tests import toy

WORDS = ["the film was good", "the film was bad", "a good story", "a bad story"]
WRITERS = {
    "csv": lambda table, path: table.to_csv(path, index=False),
    "tsv": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
    "parquet": lambda table, path: table.to_parquet(path),
}


def write(folder: Path, kind: str = "csv", train=(1, 0, 1, 0) * 8, test: str | None = None) -> Path:
    """A data set of one's own."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, labels in (("train", list(train)), ("validation", [1, 0, 1, 0] * 2)):
        texts = [WORDS[number % 4] for number in range(len(labels))]
        WRITERS[kind](pd.DataFrame({"text": texts, "label": labels}), folder / f"{split}.{kind}")
    if test is not None:
        WRITERS[kind](pd.DataFrame({"text": [test], "label": [1]}), folder / f"test.{kind}")
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two saved networks that read the same words."""
    folder, tokenizer = tmp_path_factory.mktemp("networks"), models.load_tokenizer("tiny-1x32")
    for name, seed in (("one", 0), ("other", 1)):
        network = models.load("tiny-2x32", glue.task_for("mini-sst2"), tokenizer, seed)
        engine.save_pretrained(network.base_model, tokenizer, folder / name)
    return folder


def configured(data: Path | str, network: Path | str, **changes) -> runs.RunConfig:
    """A student of a teacher that is fine-tuned first, on data of one's own."""
    settings = {"source": str(data), "task": "mine", "text_columns": "text", "teacher": str(network)}
    settings |= {"student_layers": 1, "teacher_epochs": 1, "epochs": 1, "batch_size": 8, "max_length": 16}
    return runs.configure(**{**settings, "device": "cpu", **changes})


def ids(config: runs.RunConfig) -> tuple[str, str]:
    """The names of a run and of its teacher's."""
    return config.run_id, configuration.teachers_config(config).run_id


class TestData:
    @pytest.mark.parametrize("kind", WRITERS)
    def test_the_same_rows_are_the_same_run_wherever_and_however_they_lie(self, tmp_path, networks, kind, monkeypatch):
        first = ids(configured(write(tmp_path / "here"), networks / "one"))
        assert ids(configured(write(tmp_path / "there" / "deep", kind), networks / "one")) == first
        monkeypatch.chdir(tmp_path / "there")
        assert ids(configured("deep", networks / "one")) == first

    def test_a_label_that_is_corrected_gives_another_run_and_another_teacher(self, tmp_path, networks):
        before = ids(configured(write(tmp_path), networks / "one"))
        after = ids(configured(write(tmp_path, train=(1, 0, 1, 0) * 7 + (0, 1, 0, 1)), networks / "one"))
        assert before[0] != after[0] and before[1] != after[1]
        assert ids(configured(write(tmp_path), networks / "one")) == before  # and back

    def test_only_what_a_run_reads_counts(self, tmp_path, networks):
        """The teacher's fine-tuning predicts no test split; a card for people is nothing that anybody computes from."""
        before = ids(configured(write(tmp_path), networks / "one"))
        (tmp_path / "NOTES.md").write_text("labelled by two people\n")
        assert ids(configured(tmp_path, networks / "one")) == before
        student, _ = ids(configured(write(tmp_path, test="a good film"), networks / "one"))
        assert student != before[0]

    def test_embedded_data_count_by_their_name(self):
        config = runs.configure()
        assert config.run_id == config.asked_id and config.contents == {}


class TestNetworks:
    def test_weights_count_and_paths_do_not(self, tmp_path, networks):
        data = write(tmp_path / "data")
        one, other = (ids(configured(data, networks / name)) for name in ("one", "other"))
        assert one[0] != other[0] and one[1] != other[1]
        shutil.copytree(networks / "other", tmp_path / "moved")
        assert ids(configured(data, tmp_path / "moved")) == other

    def test_a_network_that_is_replaced_under_its_path_gives_another_run(self, tmp_path, networks):
        data = write(tmp_path / "data")
        shutil.copytree(networks / "one", tmp_path / "network")
        before = ids(configured(data, tmp_path / "network"))
        shutil.copy(networks / "other" / "model.safetensors", tmp_path / "network")
        assert ids(configured(data, tmp_path / "network"))[0] != before[0]

    def test_a_pretraining_run_counts_by_its_text_and_its_teacher(self, tmp_path, networks):
        text = tmp_path / "a.txt"

        def named(network="one", corpus=text):
            settings = {"corpus": str(corpus), "teacher": str(networks / network), "student": "tiny-1x32"}
            return pretraining.configure(**settings, untrained_teacher=True).run_id

        text.write_text("the film was good\n")
        first = named()
        assert named("other") != first
        (tmp_path / "deep").mkdir()
        copy = Path(shutil.copy(text, tmp_path / "deep" / "a.txt"))
        assert named(corpus=copy) == first
        text.write_text("the film was bad!\n")  # as long as before
        os.utime(text, ns=(copy.stat().st_atime_ns, copy.stat().st_mtime_ns))
        assert named() != first


@pytest.fixture(scope="module")
def done(tmp_path_factory, networks):
    """A finished run on data that are changed afterwards, and its configuration."""
    home = tmp_path_factory.mktemp("runs")
    config = configured(write(home / "data"), networks / "one", alpha=0.0, output_dir=str(home / "runs"))
    return config, runs.run(config)


class TestRuns:
    def test_the_record_says_what_it_was_made_from(self, done):
        config, record = done
        assert record.contents == config.contents and set(record.contents) == {"source", "teacher"}
        assert all(value.startswith("sha256:") for value in record.contents.values())

    @pytest.mark.usefixtures("unchecked")  # a stand-in for the record
    def test_a_damaged_record_leaves_no_stale_neighbours_behind(self, done, monkeypatch):
        config, record = done
        monkeypatch.setattr(engine, "_compute", lambda config, _: sorted(path.name for path in config.folder.iterdir()))
        teacher = configuration.teachers_config(config).folder
        for folder in (record.folder, teacher):
            for stale in ("logits-old.safetensors", "mine.tsv"):
                (folder / stale).touch()
            kept = folder.with_name(f"copy-{folder.name}")
            shutil.copytree(folder, kept)
            (folder / records.RECORD).unlink()
        assert runs.run(config) == [folders.LOCK]
        assert runs.run(configuration.teachers_config(config)) == [folders.LOCK]
        for folder in (record.folder, teacher):
            shutil.rmtree(folder)
            folder.with_name(f"copy-{folder.name}").rename(folder)
            for stale in ("logits-old.safetensors", "mine.tsv"):
                (folder / stale).unlink()

    def test_a_teacher_whose_network_is_gone_is_computed_again(self, done, monkeypatch):
        config, _ = done
        told: list[str] = []
        monkeypatch.setattr(runs, "notice", told.append)
        before, _ = runs.teacher_of(config)
        weights = models.fingerprint(models.load(before, runs.load_data(config).task, models.load_tokenizer(before)))
        shutil.rmtree(before)
        again, record = runs.teacher_of(config)
        assert again == before and "is gone: it is computed again" in told[0] and record.run_id in told[0]
        network = models.load(again, runs.load_data(config).task, models.load_tokenizer(again))
        assert models.fingerprint(network) == weights

    def test_the_logits_of_another_teacher_are_not_read(self, done):
        config, _ = done
        data, folder = runs.load_data(config), configuration.teachers_config(config).folder
        tokenizer = models.load_tokenizer(str(folder / engine.STUDENT))
        encoded = glue.encode(data.train, data.task, tokenizer, 16)
        accelerator = learner.accelerator_for("cpu")
        batch = {"positions": torch.arange(4)}
        first = models.load(str(folder / engine.STUDENT), data.task, tokenizer)
        second = models.load("tiny-2x32", data.task, tokenizer, 5)
        for network in (first, second, first):
            looked_up = trainer.teacher_logits(network, encoded, accelerator, cache=folder)(batch)
            torch.testing.assert_close(looked_up, torch.from_numpy(models.predict(network, encoded))[:4])
        assert len(list(folder.glob("logits-*"))) == 2

    @pytest.mark.parametrize("damage", ["cut", "short"])
    def test_a_damaged_file_of_logits_is_written_anew(self, done, damage, monkeypatch):
        config, _ = done
        told: list[str] = []
        monkeypatch.setattr(trainer, "notice", told.append)
        data, folder = runs.load_data(config), configuration.teachers_config(config).folder
        tokenizer = models.load_tokenizer(str(folder / engine.STUDENT))
        encoded, accelerator = glue.encode(data.train, data.task, tokenizer, 16), learner.accelerator_for("cpu")
        network = models.load(str(folder / engine.STUDENT), data.task, tokenizer)
        whole = trainer.teacher_logits(network, encoded, accelerator, cache=folder)({"positions": torch.arange(4)})
        weights = models.fingerprint(network)
        (path,) = folder.glob(f"logits-{weights}-*")
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:100])
        else:
            checkpoints.write_tensors(path, {"logits": torch.zeros(3, 2)})
        again = trainer.teacher_logits(network, encoded, accelerator, cache=folder)({"positions": torch.arange(4)})
        torch.testing.assert_close(again, whole)
        assert len(told) == 1 and str(path) in told[0] and "computed again" in told[0]


class TestCheckpoints:
    """The training loop itself: what it goes on from, and what it refuses."""

    @staticmethod
    def interrupted(folder, data, monkeypatch, every=None):
        """Two of four epochs, then an end from outside."""
        who, evaluations = toy.student(), []
        evaluate = toy.evaluate(who, data)

        def twice():
            evaluations.append(1)
            if len(evaluations) == 3:
                raise KeyboardInterrupt
            return evaluate()

        schedule = trainer.Schedule(epochs=4, batch_size=16, checkpoint_every=every)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(toy.training(who, data, schedule, evaluate=twice), folder)

    @staticmethod
    def resumed(folder, data, every=None, **changes):
        """The same run again."""
        who = toy.student()
        schedule = trainer.Schedule(epochs=4, batch_size=16, checkpoint_every=every)
        return trainer.train(toy.training(who, data, schedule), folder, **changes)

    @pytest.mark.parametrize("changed", ["labels", "input_ids"])
    def test_other_data_are_refused_with_the_reason(self, tmp_path, monkeypatch, changed):
        data = toy.encoded()
        self.interrupted(tmp_path, data, monkeypatch)
        values = getattr(data, changed).clone()
        values[0] = 1 - values[0] if changed == "labels" else values[0] + 1
        other = dataclasses.replace(data, **{changed: values})
        with pytest.raises(
            checkpoints.CheckpointError, match=r"belongs to another run \(data: '\w+' there, '\w+' now\)"
        ):
            self.resumed(tmp_path, other)
        self.resumed(tmp_path, data)

    def test_how_often_it_is_saved_may_change(self, tmp_path, monkeypatch):
        data = toy.encoded()
        self.interrupted(tmp_path / "a", data, monkeypatch, every=None)
        plain = self.resumed(tmp_path / "b", data)
        assert self.resumed(tmp_path / "a", data, every=1).history.equals(plain.history)

    @pytest.mark.parametrize("damage", ["missing", "cut", "one byte", "another network"])
    def test_weights_that_the_end_will_need_are_missed_at_the_start(self, tmp_path, monkeypatch, damage):
        data = toy.encoded()
        self.interrupted(tmp_path, data, monkeypatch)
        best = tmp_path / trainer.BEST
        raw = best.read_bytes()
        if damage == "missing":
            best.unlink()
        elif damage == "cut":
            best.write_bytes(raw[:-10])
        elif damage == "one byte":
            best.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
        else:
            checkpoints.write_tensors(best, {"weight": torch.zeros(3)})
        steps: list[int] = []
        monkeypatch.setattr(trainer, "training_batch", lambda *a: steps.append(1))
        with pytest.raises(checkpoints.CheckpointError, match=r"best\.safetensors .*resume=False"):
            self.resumed(tmp_path, data)
        assert not steps
        monkeypatch.undo()
        assert self.resumed(tmp_path, data, resume=False).best_step > 0

    @pytest.mark.parametrize("where", [-3, 200])
    def test_a_checkpoint_with_one_other_byte_is_damaged(self, tmp_path, monkeypatch, where):
        data = toy.encoded()
        self.interrupted(tmp_path, data, monkeypatch)
        path = tmp_path / trainer.CHECKPOINT
        raw = bytearray(path.read_bytes())
        raw[where] ^= 1
        path.write_bytes(raw)
        with pytest.raises(checkpoints.CheckpointError, match=r"checkpoint\.safetensors is damaged .*resume=False"):
            self.resumed(tmp_path, data)
