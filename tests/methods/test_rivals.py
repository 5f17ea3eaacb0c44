"""The rivals of the papers' tables: each step against the same step in plain torch, in float64."""

import copy

import pytest
import torch
from torch.nn import functional as F

from kdlib import losses, models
from kdlib import representations as inner
from kdlib.learner import accelerator_for, learner
from kdlib.methods import theseus
from kdlib.methods.annealing import AnnealingKD
from kdlib.methods.base import Cast
from kdlib.methods.kd import DIST, KD, PKD, SKD, FineTune
from kdlib.methods.pesf import PESFKD, adapt
from kdlib.methods.rco import RCO
from kdlib.methods.theseus import Theseus
from kdlib.methods.tinybert_task import TinyBERTOnTask
from kdlib.models import Outputs
from tests import exact, toy

BATCH = exact.batch(6, 0) | {"positions": torch.arange(6)}
READ = ("input_ids", "attention_mask", "token_type_ids")
WORDS = {name: BATCH[name] for name in READ}
RATE = 1e-2


def learned(network, name: str = "student", stages=(1.0,), total: int = 10):
    return learner(name, network, accelerator_for("cpu"), RATE, total, 0.0, warmup_ratio=0.0, stages=stages)


class Twin:
    """A copy of a learner's network and its optimiser, in plain torch, without a schedule."""

    def __init__(self, network):
        self.network = copy.deepcopy(network).eval()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.network.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
        )

    def descend(self, loss: torch.Tensor, rate: float = RATE) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()


def same(who, twin: Twin, tolerance: float = 1e-9) -> None:
    assert exact.error(models.trainable(who.module), models.trainable(twin.network)) < tolerance


def fixed(*cases):
    """Answers of a fixed teacher, by position."""
    return [lambda batch, z=z: Outputs(z[batch["positions"]]) for z in cases]


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(6, exact.CLASSES, generator=torch.Generator().manual_seed(seed)).double()


# SKD, PKD, DIST


def test_spherical_distillation_sees_directions_alone():
    """Written out class by class; the student's length counts for nothing."""
    ours, theirs = logits(0), logits(1)
    expected = []
    for own, aim in zip(ours, theirs, strict=True):
        own, aim = own - own.mean(), aim - aim.mean()
        q, p = torch.log_softmax(own / own.std() * aim.std() / 2, 0), torch.softmax(aim / 2, 0)
        expected.append(4 * sum(p[c] * (p[c].log() - q[c]) for c in range(exact.CLASSES)))
    found = losses.spherical(ours, theirs, 2.0, "none")
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(losses.spherical(7 * ours + 3, theirs, 2.0, "none"), found, rtol=1e-7, atol=1e-7)
    assert losses.spherical(theirs, theirs).item() == pytest.approx(0, abs=1e-12)


def test_spherical_distillation_has_no_gradient_on_two_classes():
    """LGTM's table has it on five tasks of two classes."""
    gradients = []
    for classes in (2, 3):
        own = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, 0.0]]).double()[:, :classes].requires_grad_()
        losses.spherical(own, own.detach().flip(-1), reduction="sum").backward()
        gradients.append(own.grad.abs().max().item())
    assert gradients[0] < 1e-6 < 1e-2 < gradients[1]


@pytest.mark.parametrize(
    ("named", "plain"),
    [
        (PKD(pkd_weight=2.0), KD(pkd_weight=2.0)),
        (DIST(), KD(objective="dist", temperature=1.0)),
        (SKD(), KD(objective="spherical")),
    ],
)
def test_a_method_that_is_an_objective_makes_the_step_of_kd_with_it(named, plain):
    ends = []
    for settings in (named, plain):
        student, teacher = learned(exact.bert(0, 2, 0.0)), exact.bert(1, 3)
        cast = Cast(student, answers=lambda batch, t=teacher, s=settings: models.targets(t, batch, **s.wanted))
        ends.append((settings.step(cast)(BATCH), models.trainable(student.module)))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][name], value) for name, value in ends[1][1].items())


# RCO


def test_the_route_is_shown_anchor_by_anchor_each_for_as_many_steps():
    student = learned(exact.bert(0, 2, 0.0), total=7)
    twin, targets = Twin(student.module), [logits(seed) for seed in range(3)]
    settings = RCO(alpha=0.3, temperature=2.0, anchors=3)
    step = settings.step(Cast(student, route=fixed(*targets), total=7))
    for number, anchor in enumerate([0, 0, 0, 1, 1, 2, 2]):
        step(BATCH)
        own = twin.network(**WORDS).logits
        soft = 4 * F.kl_div((own / 2).log_softmax(-1), (targets[anchor] / 2).softmax(-1), reduction="batchmean")
        twin.descend(0.3 * F.cross_entropy(own, BATCH["labels"]) + 0.7 * soft, RATE * (1 - number / 7))
        same(student, twin)


def test_its_teacher_keeps_one_network_less_than_there_are_anchors():
    from kdlib.configuration import configure, teachers_config

    config = configure(method="rco", anchors=3)
    own = teachers_config(config)
    assert own.settings == FineTune(anchors=2) and own.student == config.teacher
    assert own.run_id != teachers_config(configure(method="kd")).run_id
    with pytest.raises(ValueError, match="teacher_epochs is 0, but rco needs a fine-tuning of the teacher"):
        configure(method="rco", teacher="book-teacher", student="tiny-2x32")


# PESF-KD


def test_an_adapted_teacher_begins_as_it_was_and_only_the_adapter_and_the_student_move():
    student, network = learned(exact.bert(0, 2, 0.0)), exact.bert(1, 3, 0.0)
    before = models.targets(network, BATCH).logits
    settings = PESFKD(alpha=0.3, temperature=2.0, adapter_size=5)
    settings.prepare(student.module, network, seed=4)
    network.double().train()
    assert torch.equal(models.targets(network, BATCH).logits, before)
    teacher = learned(network, "teacher")
    ours, theirs = Twin(student.module), Twin(network)
    step, fixed_weights = settings.step(Cast(student, teacher)), weights_of(network, learning=False)
    for number in range(3):  # the adapter's first layers move from the second step on
        step(BATCH)
        own, aim = (twin.network(**WORDS).logits for twin in (ours, theirs))

        def joint(z, other):
            squares = 4 * ((z / 2).softmax(-1) - (other.detach() / 2).softmax(-1)).square().mean()
            return 0.3 * F.cross_entropy(z, BATCH["labels"]) + 0.7 * squares

        first, second = joint(own, aim), joint(aim, own)
        ours.descend(first, RATE * (1 - number / 10))
        theirs.descend(second, RATE * (1 - number / 10))
        same(student, ours)
        same(teacher, theirs)
    assert len(models.trainable(network)) == 6
    assert all(torch.equal(value, fixed_weights[n]) for n, value in weights_of(network, learning=False).items())


def test_what_is_fixed_of_an_adapted_teacher_answers_without_dropout():
    network = exact.bert(1, 3, 0.5)
    before = models.targets(network, BATCH).logits
    adapt(network, 5)
    assert network.train().training and torch.equal(models.logits(network, BATCH), before)


def weights_of(network, learning: bool) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad == learning}


# Annealing-KD


def test_annealing_shows_growing_logits_and_then_the_labels():
    """T = 3, 3, 2, 2, 1, 1 of 3, so thirds of the logits, two thirds, all; then four steps of fine-tuning."""
    settings = AnnealingKD(max_temperature=3, first_stage=0.6)
    student = learned(exact.bert(0, 2, 0.0), stages=settings.stages)
    twin, target = Twin(student.module), logits(1)
    step = settings.step(Cast(student, answers=fixed(target)[0], total=10))
    sizes = [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1]
    for number in range(10):
        step(BATCH)
        own = twin.network(**WORDS).logits
        if number < 6:
            loss, rate = (own - sizes[number] * target).square().mean(), RATE * (1 - number / 6)
        else:
            loss, rate = F.cross_entropy(own, BATCH["labels"]), RATE * (1 - (number - 6) / 4)
        twin.descend(loss, rate)
        same(student, twin, 1e-8)


# BERT-of-Theseus


def composed(network, layers):
    """A classifier of these layers, called one by one."""
    mask = models.additive_mask(BATCH["attention_mask"], torch.float64)
    states = network.bert.embeddings(BATCH["input_ids"], BATCH["token_type_ids"])
    for layer in layers:
        found = layer(states, mask)
        states = found[0] if isinstance(found, tuple) else found
    return network.classifier(network.bert.pooler(states))


def test_theseus_makes_the_step_of_a_network_with_the_layers_that_were_drawn():
    network = exact.bert(1, 4, 0.0)
    module, settings = exact.bert(0, 2, 0.0), Theseus(replacing_rate=0.5, replaced_after=0.8)
    settings.prepare(module, network)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in module.state_dict().items())
    student = learned(module)
    twin, teacher = Twin(module), copy.deepcopy(network).eval()
    step = settings.step(Cast(student, network=network, total=10, seed=3))
    blocks, seen = twin.network.bert.encoder.layer, []
    for number in range(10):
        value = step(BATCH)
        rate = 0.5 + 0.5 * number / 8 if number < 8 else 1.0
        chance = torch.Generator().manual_seed(1_000_003 * 3 + 250_000 + number)
        drawn = [draw < rate for draw in torch.rand(2, generator=chance).tolist()]
        assert value["replaced"] == sum(drawn) / 2
        layers = []
        for block in range(2):
            layers += [blocks[block]] if drawn[block] else teacher.bert.encoder.layer[2 * block : 2 * block + 2]
        loss = F.cross_entropy(composed(twin.network, layers), BATCH["labels"])
        twin.descend(loss + 0 * sum(p.sum() for p in blocks.parameters()), RATE * (1 - number / 10))
        same(student, twin)
        seen.append(tuple(drawn))
    assert (True, False) in seen or (False, True) in seen
    assert seen[-2:] == [(True, True)] * 2
    settings.release(module)
    assert set(models.trainable(module)) == {name for name, _ in module.named_parameters()}


def test_the_layers_alone_learn_and_a_step_without_any_of_them_moves_nothing():
    network, module = exact.bert(1, 4, 0.0), exact.bert(0, 2, 0.0)
    settings = Theseus(replacing_rate=0.0, replaced_after=1.0, replacement="constant")
    settings.prepare(module, network)
    assert {name.split(".")[1] for name in models.trainable(module)} == {"encoder"}
    before = weights_of(module, learning=True)
    step = settings.step(Cast(learned(module), network=network, total=10))
    assert step(BATCH)["replaced"] == 0
    assert all(torch.equal(value, before[name]) for name, value in weights_of(module, learning=True).items())
    assert settings.probability(9, 10) == 0.0 and settings.probability(10, 10) == 1.0


@pytest.mark.parametrize(("layers", "hidden"), [(3, 32), (2, 64)])
def test_theseus_says_which_student_it_needs(layers, hidden):
    student, teacher = toy.network(layers=layers).config, copy.deepcopy(toy.network(layers=4).config)
    teacher.hidden_size = 32
    student.hidden_size = hidden
    with pytest.raises(ValueError, match=rf"4 layers of 32 units .* the student has {layers} of {hidden}"):
        Theseus().check_shapes(student, teacher)


def test_the_mixed_network_is_taken_apart_again_after_an_error():
    module = exact.bert(0, 2)
    own = module.bert.encoder.layer
    with pytest.raises(RuntimeError), theseus._made_of(module, [own[0]]):
        raise RuntimeError
    assert module.bert.encoder.layer is own


# TinyBERT


def scores(network, states, layer):
    """Q Kᵀ / √size of one layer from the states below it."""
    part = network.bert.encoder.layer[layer - 1].attention.self
    q, k = (getattr(part, what)(states[layer - 1]).unflatten(-1, (2, 16)).transpose(1, 2) for what in ("query", "key"))
    return q @ k.transpose(-1, -2) / 4


def test_tinybert_imitates_what_is_inside_and_then_the_predictions():
    settings = TinyBERTOnTask(first_stage=0.4, temperature=2.0)
    module, network = exact.bert(0, 2, 0.0), exact.bert(1, 4, 0.0)
    settings.prepare(module, network, seed=3)
    student = learned(module.double(), stages=settings.stages, total=5)
    twin, teacher = Twin(module), copy.deepcopy(network).eval()
    step = settings.step(Cast(student, network=network, total=5))
    real = BATCH["attention_mask"].double()
    tokens = real.sum(-1)
    for number in range(5):
        step(BATCH)
        own = twin.network(**WORDS, output_hidden_states=True)
        with torch.no_grad():
            aim = teacher(**WORDS, output_hidden_states=True)
        if number < 2:
            loss = 0.0
            for mine, their in ((0, 0), (1, 2), (2, 4)):
                apart = twin.network.projection(own.hidden_states[mine]) - aim.hidden_states[their]
                loss = loss + ((apart.square().mean(-1) * real).sum(-1) / tokens).mean()
                if mine:
                    apart = scores(twin.network, own.hidden_states, mine) - scores(teacher, aim.hidden_states, their)
                    both = real[:, None, :, None] * real[:, None, None, :]
                    loss = loss + ((apart.square() * both).sum((1, 2, 3)) / tokens**2).mean() / 2  # heads
            rate = RATE * (1 - number / 2)
        else:
            p = (aim.logits / 2).softmax(-1)
            loss = -4 * (p * (own.logits / 2).log_softmax(-1)).sum(-1).mean()
            rate = RATE * (1 - (number - 2) / 3)
        twin.descend(loss, rate)
        same(student, twin)
    settings.release(module)
    assert module.state_dict().keys() == exact.bert(0, 2).state_dict().keys()


def test_tinybert_reads_no_label_and_compares_attention_where_it_can():
    wide, narrow = toy.network(layers=2).config, copy.deepcopy(toy.network(layers=2).config)
    narrow.num_attention_heads = 4
    TinyBERTOnTask().check_shapes(narrow, wide)
    with pytest.raises(ValueError, match="the student has 4 heads, the teacher 2"):
        TinyBERTOnTask(attention=True).check_shapes(narrow, wide)
    with pytest.raises(ValueError, match="the student has 2 layers, the teacher 1"):
        TinyBERTOnTask().check_shapes(wide, toy.network(layers=1).config)
    values = []
    for labels in (BATCH["labels"], (BATCH["labels"] + 1) % 3):
        module, settings = exact.bert(0, 2, 0.0), TinyBERTOnTask(first_stage=0.5, attention=False)
        settings.prepare(module, exact.bert(1, 3), 0)
        student = learned(module.double(), stages=settings.stages, total=4)
        step = settings.step(Cast(student, network=exact.bert(1, 3), total=4))
        values.append([step(BATCH | {"labels": labels})["loss"] for _ in range(4)])
    assert values[0] == values[1]
    states = [models.targets(n, BATCH, hidden_states=True).hidden_states for n in (exact.bert(0, 2), exact.bert(1, 3))]
    module = exact.bert(0, 2)
    TinyBERTOnTask().prepare(module, exact.bert(1, 3), 0)
    hidden = inner.hidden_mse(*states, BATCH["attention_mask"], module.double().projection).mean()
    assert values[0][0] == pytest.approx(hidden.item(), rel=1e-9)
