"""The loop: order of the data, evaluation, best weights, resuming, interruptions, errors."""

import dataclasses
import itertools
import os
import signal
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdlib import checkpoints, trainer
from kdlib.batches import Encoded
from kdlib.checkpoints import CheckpointError
from kdlib.learner import NonFiniteLossError, accelerator_for
from kdlib.methods import kd
from kdlib.models import Outputs, predict
from kdlib.trainer import Schedule, TrainingInterruptedError
from tests import toy

SCHEDULE = Schedule(epochs=3, batch_size=8, evaluate_every=4, checkpoint_every=2, seed=3)  # 48 samples: 18 steps


def run(folder: Path | None = None, schedule: Schedule = SCHEDULE, step_wrapper=lambda step: step, **options):
    torch.manual_seed(99)  # whatever the process did before must not matter
    data = toy.encoded()
    who = toy.student(total_steps=schedule.total_steps(len(data)))
    step, evaluate = step_wrapper(kd.fine_tuning(who)), toy.evaluate(who, toy.encoded(40, 7))
    return who, trainer.train(toy.training(who, data, schedule, step=step, evaluate=evaluate), folder, **options)


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True))


def test_two_runs_are_equal_bit_for_bit():
    (one, first), (other, second) = run(), run()
    assert same_weights(one, other)
    pd.testing.assert_frame_equal(first.history, second.history, check_exact=True)


def test_the_history_has_a_row_per_evaluation():
    _, result = run()
    assert result.history["step"].tolist() == [4, 8, 12, 16, 18]
    assert result.history["epoch"].tolist() == pytest.approx([4 / 6, 8 / 6, 2, 16 / 6, 3])
    assert list(result.history) == ["step", "epoch", "learning_rate", "train_loss", "validation/accuracy"]
    assert result.history["learning_rate"].iloc[-1] == 0
    assert result.seconds > 0


def test_train_loss_is_the_mean_since_the_last_evaluation():
    seen = []

    def recording(step):
        def wrapped(batch):
            values = step(batch)
            seen.append(values["loss"])
            return values

        return wrapped

    _, result = run(step_wrapper=recording)
    assert result.history["train_loss"].tolist() == pytest.approx(
        [sum(seen[a:b]) / (b - a) for a, b in itertools.pairwise([0, 4, 8, 12, 16, 18])]
    )


@pytest.mark.parametrize("in_folder", [False, True])
def test_it_ends_with_the_best_weights(tmp_path, in_folder):
    who, result = run(tmp_path if in_folder else None)
    best = result.history.loc[result.history["validation/accuracy"].idxmax()]
    assert result.best_step == best["step"]
    assert result.best_metrics == {"validation/accuracy": best["validation/accuracy"]}
    assert toy.evaluate(who, toy.encoded(40, 7))() == result.best_metrics
    assert not who.module.training


def test_the_best_weights_are_those_of_the_highest_metric_not_the_last(tmp_path):
    for folder in (None, tmp_path):
        data, who, seen = toy.encoded(), toy.student(), []

        def worse_each_time(who=who, seen=seen):
            seen.append(checkpoints.module_tensors(who.module))
            return {"validation/accuracy": -float(len(seen))}

        result = trainer.train(toy.training(who, data, SCHEDULE, evaluate=worse_each_time), folder)
        assert result.best_step == 4 and len(seen) == 5
        assert all(torch.equal(tensor, seen[0][name]) for name, tensor in who.module.state_dict().items())


def test_steps_are_made_in_training_mode():
    modes = []
    data, who = toy.encoded(), toy.student()
    inner = kd.fine_tuning(who)

    def step(batch):
        modes.append(who.module.training)
        return inner(batch)

    trainer.train(toy.training(who, data, SCHEDULE, step=step))
    assert modes == [True] * 18


def test_max_steps_and_default_intervals():
    schedule = Schedule(epochs=3, batch_size=8, max_steps=8)
    assert schedule.total_steps(48) == 8 and Schedule(epochs=2, batch_size=5).total_steps(11) == 6
    _, result = run(schedule=schedule)
    assert result.history["step"].tolist() == [6, 8]  # the end of the first epoch, and the end


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_shows_every_sample_once_and_resuming_changes_no_batch(samples, batch_size, epochs, seed):
    data, schedule = toy.encoded(samples), Schedule(epochs=epochs, batch_size=batch_size, seed=seed)
    total = schedule.total_steps(samples)
    whole = list(trainer.training_batches(data, schedule, 0, total))
    assert len(whole) == total
    per_epoch = total // epochs
    for epoch in range(epochs):
        shown = sorted(i for batch in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for i in batch)
        assert shown == list(range(samples))
    for start in {1, total // 2, total - 1, total}:
        assert list(trainer.training_batches(data, schedule, start, total)) == whole[start:]


def test_seeds_and_epochs_give_different_orders():
    data = toy.encoded()
    orders = [
        list(trainer.training_batches(data, Schedule(epochs=2, batch_size=8, seed=seed), 0, 12)) for seed in (0, 1)
    ]
    assert orders[0] != orders[1] and orders[0][:6] != orders[0][6:]


@pytest.mark.parametrize("stop", range(1, 18))
def test_a_run_that_dies_at_any_step_resumes_to_the_same_end(tmp_path, stop):
    """The process is not killed here (test_resume does that); the loop is left by an exception at step `stop`."""

    def dying(step):
        count = itertools.count(1)

        def wrapped(batch):
            if next(count) == stop:
                raise RuntimeError("died")
            return step(batch)

        return wrapped

    reference, expected = run()
    with pytest.raises(RuntimeError, match="died"):
        run(tmp_path, step_wrapper=dying)
    resumed, result = run(tmp_path)
    assert same_weights(reference, resumed)
    pd.testing.assert_frame_equal(result.history, expected.history, check_exact=True)
    assert result.best_step == expected.best_step


def test_a_finished_run_is_not_trained_again(tmp_path):
    reference, expected = run(tmp_path, Schedule(epochs=3, batch_size=8, seed=3))

    def forbidden(step):
        return lambda batch: pytest.fail("trained again")

    again, result = run(tmp_path, Schedule(epochs=3, batch_size=8, seed=3), step_wrapper=forbidden)
    assert same_weights(reference, again) and result.best_step == expected.best_step


def test_resume_false_starts_afresh(tmp_path):
    run(tmp_path)
    count = itertools.count()

    def counting(step):
        def wrapped(batch):
            next(count)
            return step(batch)

        return wrapped

    run(tmp_path, step_wrapper=counting, resume=False)
    assert next(count) == 18


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path):
    run(tmp_path, identity={"alpha": 0.5})
    with pytest.raises(CheckpointError, match=r"another run \(alpha: 0.5 there, 0.9 now\).*resume=False"):
        run(tmp_path, identity={"alpha": 0.9})


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(tmp_path):
    def interrupted(step):
        count = itertools.count(1)

        def wrapped(batch):
            if next(count) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return step(batch)

        return wrapped

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterruptedError, match=r"after step 5 of 18; run the same command again"):
        run(tmp_path, step_wrapper=interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    _, saved = checkpoints.read_tensors(tmp_path / trainer.CHECKPOINT)
    assert saved["training"]["step"] == 5
    reference, expected = run()
    resumed, result = run(tmp_path)
    assert same_weights(reference, resumed)
    pd.testing.assert_frame_equal(result.history, expected.history, check_exact=True)


def test_ctrl_c_without_a_folder_says_that_nothing_was_saved():
    def interrupted(step):
        def wrapped(batch):
            os.kill(os.getpid(), signal.SIGINT)
            return step(batch)

        return wrapped

    with pytest.raises(TrainingInterruptedError, match="nothing was saved"):
        run(step_wrapper=interrupted)


def test_a_non_finite_loss_names_step_rows_and_the_last_good_checkpoint(tmp_path):
    def poisoned(step):
        count = itertools.count(1)

        def wrapped(batch):
            if next(count) == 7:
                raise NonFiniteLossError("student", float("nan"), 1.0, batch["rows"].tolist())
            return step(batch)

        return wrapped

    with pytest.raises(NonFiniteLossError, match=r"step 7: .*rows \[\d+, .*last good checkpoint is .*checkpoint") as e:
        run(tmp_path, step_wrapper=poisoned)
    assert len(e.value.rows) == 8
    assert checkpoints.read_tensors(tmp_path / trainer.CHECKPOINT)[1]["training"]["step"] == 6
    with pytest.raises(NonFiniteLossError, match="no checkpoint yet"):
        run(step_wrapper=poisoned)


def test_a_diverging_run_is_caught():
    """No stub: a learning rate that really diverges."""
    data = toy.encoded()
    who = toy.student(learning_rate=1e30, warmup_ratio=0.0)
    with pytest.raises(NonFiniteLossError, match=r"step \d+: the loss of the student is"):
        trainer.train(toy.training(who, data, SCHEDULE))


def test_a_folder_that_cannot_be_written_stops_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "run", Path("/proc/kdlib/run")):
        with pytest.raises(CheckpointError, match=f"cannot write to {folder}.*choose another output_dir"):
            run(folder, step_wrapper=lambda step: lambda batch: pytest.fail("worked"))


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    def refused(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refused)  # the tests may run as root, whom permission bits do not stop
    with pytest.raises(CheckpointError, match=r"cannot write to .*Permission denied"):
        run(tmp_path)


def test_left_over_temporary_files_are_removed(tmp_path):
    (tmp_path / ".checkpoint.safetensors.123.tmp").write_bytes(b"half")
    run(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_no_data_is_an_error():
    who = toy.student()
    with pytest.raises(ValueError, match="nothing to train on: 0 samples"):
        trainer.train(toy.training(who, Encoded(*_empty()), SCHEDULE))


def _empty():
    none = torch.zeros(0, dtype=torch.int64)
    return none.int(), none.to(torch.int8), torch.zeros(1, dtype=torch.int64), none, none, 0


class TestTeacherLogits:
    def test_cached_and_computed_on_the_spot_are_the_same_numbers(self, tmp_path):
        teacher, data, accelerator = toy.network(5).eval(), toy.encoded(), accelerator_for("cpu")
        looked_up = trainer.teacher_logits(teacher, data, accelerator, batch_size=16)
        for indices in ([0, 5, 9], [47], list(range(20, 40))):
            batch = trainer.training_batch(data, indices, torch.device("cpu"))
            with torch.no_grad():
                outputs = teacher(**{k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}).logits
            torch.testing.assert_close(looked_up(batch), outputs, rtol=1e-5, atol=1e-6)

    def test_the_disk_cache_is_used_and_belongs_to_the_data(self, tmp_path, monkeypatch):
        teacher, data, accelerator = toy.network(5).eval(), toy.encoded(), accelerator_for("cpu")
        first = trainer.teacher_logits(teacher, data, accelerator, cache=tmp_path)
        calls = []
        monkeypatch.setattr(trainer, "predict", lambda *a, **k: calls.append(1) or predict(*a, **k))
        second = trainer.teacher_logits(teacher, data, accelerator, cache=tmp_path)
        batch = trainer.training_batch(data, [3, 1, 2], torch.device("cpu"))
        assert torch.equal(first(batch), second(batch)) and not calls
        trainer.teacher_logits(teacher, toy.encoded(seed=1), accelerator, cache=tmp_path)
        assert calls == [1] and len(list(tmp_path.iterdir())) == 2

    def test_distilling_with_the_cache_ends_like_without(self):
        teacher, data = toy.network(5, dropout=0.1), toy.encoded()
        ends = []
        for cached in (True, False):
            who = toy.student()
            if cached:
                source = trainer.teacher_logits(teacher, data, who.accelerator)
            else:
                source = _on_the_spot(teacher)
            step = kd.distillation(who, lambda b, source=source: Outputs(source(b)), kd.KD(alpha=0.3))
            trainer.train(toy.training(who, data, SCHEDULE, step=step))
            ends.append(who)
        for ours, theirs in zip(ends[0].module.parameters(), ends[1].module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def _on_the_spot(teacher):
    teacher.eval()

    @torch.no_grad()
    def outputs(batch):
        return teacher(**{k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}).logits

    return outputs


class TestFeedback:
    @given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30), st.integers(0, 5))
    def test_starting_later_gives_the_tail_of_the_whole(self, samples, batch_size, start, seed):
        data = toy.encoded(samples)
        whole = trainer.feedback_batches(data, batch_size, seed, 0)
        tail = trainer.feedback_batches(data, batch_size, seed, start)
        assert list(itertools.islice(whole, start, start + 12)) == list(itertools.islice(tail, 12))

    @given(st.integers(1, 40), st.integers(1, 9))
    def test_each_pass_covers_every_sample_once_in_an_order_of_its_own(self, samples, batch_size):
        batches, per_pass = trainer.feedback_batches(toy.encoded(samples), batch_size, 0, 0), -(-samples // batch_size)
        passes = [list(itertools.islice(batches, per_pass)) for _ in range(3)]
        for one in passes:
            assert sorted(itertools.chain(*one)) == list(range(samples))
            assert max(map(len, one)) <= batch_size
        if samples >= 20:
            assert passes[0] != passes[1] != passes[2]

    def test_is_not_in_the_order_of_training(self):
        data = toy.encoded(48)
        quizzes = list(itertools.islice(trainer.feedback_batches(data, 8, SCHEDULE.seed, 0), 18))
        assert quizzes != list(trainer.training_batches(data, SCHEDULE, 0, 18))

    def test_there_is_none_without_feedback_data(self):
        assert list(trainer.feedback_batches(None, 8, 0, 0)) == []

    @staticmethod
    def feedback(samples: int = 10) -> Encoded:
        data = toy.encoded(samples, seed=5)
        return dataclasses.replace(data, rows=torch.arange(samples) + 5000)

    @staticmethod
    def train(step, feedback, folder=None, **options):
        who = toy.student()
        return trainer.train(
            toy.training(who, toy.encoded(), SCHEDULE, step=step, feedback=feedback, **options), folder
        )

    @pytest.mark.parametrize(("batch_size", "sizes"), [(None, [8, 2]), (4, [4, 4, 2]), (10, [10])])
    def test_a_step_gets_a_batch_of_each_and_all_it_returns_is_averaged_by_window(self, batch_size, sizes):
        seen = []

        def step(batch, quiz):
            assert set(batch["rows"].tolist()) <= set(range(1000, 1048))
            assert set(quiz["rows"].tolist()) <= set(range(5000, 5010))
            seen.append(len(quiz["rows"]))
            return {"loss": float(len(seen)), "feedback_loss": float(len(seen)) ** 2}

        history = self.train(step, self.feedback(), feedback_batch_size=batch_size).history
        assert sorted(seen[: len(sizes)], reverse=True) == sizes and len(seen) == 18
        for name, power in (("train_loss", 1), ("train_feedback_loss", 2)):
            expected = [
                sum(number**power for number in range(a + 1, b + 1)) / (b - a)
                for a, b in itertools.pairwise([0, 4, 8, 12, 16, 18])
            ]
            assert history[name].tolist() == pytest.approx(expected)

    def test_what_only_some_steps_return_is_averaged_over_those(self):
        def step(batch, quiz):
            step.count += 1
            return {"loss": 1.0} | ({"sometimes": float(step.count)} if step.count % 3 == 1 else {})

        step.count = 0
        history = self.train(step, self.feedback()).history  # windows of four steps, the last one of two
        assert history["train_loss"].tolist() == [1.0] * 5
        assert history["train_sometimes"].tolist() == pytest.approx([2.5, 7, 10, 14.5, float("nan")], nan_ok=True)

    def test_rows_that_are_also_trained_on_are_refused(self):
        overlapping = self.feedback()
        overlapping.rows[3:5] = torch.tensor([1040, 1007])
        with pytest.raises(ValueError, match="2 rows are in the training set and in the feedback set, row 1007"):
            self.train(lambda *_: pytest.fail("trained"), overlapping)

    def test_the_training_set_itself_may_give_the_feedback_in_an_order_of_its_own(self):
        training, seen = toy.encoded(), []
        who = toy.student()

        def step(batch, quiz):
            seen.append((batch["rows"].tolist(), quiz["rows"].tolist()))
            return {"loss": 0.0}

        schedule = Schedule(epochs=1, batch_size=8)
        trainer.train(toy.training(who, training, schedule, step=step, feedback=training))
        shown, asked = ([row for pair in seen for row in pair[k]] for k in (0, 1))
        assert sorted(shown) == sorted(asked) == training.rows.tolist() and shown != asked

    @pytest.mark.usefixtures("unchecked")  # an empty set whose tokens are left
    def test_an_empty_feedback_set_is_refused(self):
        empty = dataclasses.replace(
            self.feedback(), offsets=torch.zeros(1, dtype=torch.int64), rows=torch.zeros(0).long()
        )
        empty = dataclasses.replace(empty, labels=torch.zeros(0, dtype=torch.int64))
        with pytest.raises(ValueError, match="the feedback set is empty: raise feedback_fraction, or max_train"):
            self.train(lambda *_: pytest.fail("trained"), empty)

    def test_an_interrupted_run_goes_on_with_the_next_feedback_batch(self, tmp_path):
        seen = []

        def step(batch, quiz):
            seen.append(quiz["rows"].tolist())
            if len(seen) == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return {"loss": 0.0}

        with pytest.raises(TrainingInterruptedError):
            self.train(step, self.feedback(), folder=tmp_path)
        assert len(seen) == 7
        self.train(step, self.feedback(), folder=tmp_path)
        data = self.feedback()
        order = itertools.islice(trainer.feedback_batches(data, 8, SCHEDULE.seed, 0), 18)
        assert seen == [data.rows[positions].tolist() for positions in order]


def test_evaluation_of_others_comes_under_their_names():
    student, teacher = toy.student(0), toy.student(1)
    teacher.name = "teacher"
    splits = {"validation": toy.encoded(40, 7)}
    both = trainer.evaluation(student, toy.TASK, splits, others=[teacher])()
    alone = [trainer.evaluation(who, toy.TASK, splits)() for who in (student, teacher)]
    assert both == {**alone[0], **{f"teacher/{name}": value for name, value in alone[1].items()}}


class TestLongRuns:
    """What pretraining asks of the loop: no best weights, batches that are prepared step by step, a limit of time."""

    @staticmethod
    def train(folder=None, max_seconds=None, **others):
        who = toy.student()
        training = toy.training(who, toy.encoded(), SCHEDULE, evaluate=dict, select=None, **others)
        return who, trainer.train(training, folder, max_seconds=max_seconds)

    @pytest.mark.parametrize("in_folder", [False, True])
    def test_without_select_it_ends_with_the_last_weights(self, tmp_path, in_folder):
        data, who, seen = toy.encoded(), toy.student(), []

        def worse_each_time():
            seen.append(checkpoints.module_tensors(who.module))
            return {"validation/accuracy": -float(len(seen))}

        folder = tmp_path if in_folder else None
        result = trainer.train(toy.training(who, data, SCHEDULE, evaluate=worse_each_time, select=None), folder)
        assert result.best_step == 18 and result.best_metrics == {"validation/accuracy": -5.0}
        assert all(torch.equal(tensor, seen[-1][name]) for name, tensor in who.module.state_dict().items())
        assert not (tmp_path / trainer.BEST).exists()

    def test_batches_are_prepared_with_the_number_of_their_step_after_a_resume_too(self, tmp_path):
        numbers, seen = [], []

        def prepare(batch, number):
            numbers.append(number)
            return {**batch, "number": torch.tensor(number)}

        def step(batch):
            seen.append((int(batch["number"]), batch["rows"].tolist()))
            if len(seen) == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return {"loss": 0.0}

        with pytest.raises(TrainingInterruptedError):
            self.train(tmp_path, step=step, prepare=prepare)
        assert len(seen) == 7
        self.train(tmp_path, step=step, prepare=prepare)
        assert numbers == list(range(18))
        data = toy.encoded()
        order = trainer.training_batches(data, SCHEDULE, 0, 18)
        assert seen == [(number, data.rows[positions].tolist()) for number, positions in enumerate(order)]

    def test_when_the_time_is_up_it_saves_and_the_next_call_has_its_own_time(self, tmp_path, monkeypatch):
        clock = itertools.count()  # each look at it takes a second
        monkeypatch.setattr(trainer, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
        reference, expected = self.train()
        ended, calls = None, 0
        while ended is None:
            calls += 1
            try:
                resumed, ended = self.train(folder=tmp_path, max_seconds=5)
            except TrainingInterruptedError as interruption:
                assert "run the same command again to go on from" in str(interruption)
                step = checkpoints.read_tensors(tmp_path / trainer.CHECKPOINT)[1]["training"]["step"]
                assert f"after step {step} of 18" in str(interruption)
        assert 2 < calls < 18
        assert same_weights(reference, resumed)
        pd.testing.assert_frame_equal(ended.history, expected.history, check_exact=True)

    def test_a_run_that_is_over_is_not_late(self, tmp_path):
        who, data = toy.student(), toy.encoded()
        schedule = Schedule(epochs=1, batch_size=48)  # one step
        training = toy.training(who, data, schedule, evaluate=dict, select=None)
        result = trainer.train(training, tmp_path, max_seconds=1e-9)
        assert result.best_step == 1

    def test_without_a_folder_the_limit_holds_too(self):
        with pytest.raises(TrainingInterruptedError, match="after step 1 of 18; nothing was saved"):
            self.train(max_seconds=1e-9)
