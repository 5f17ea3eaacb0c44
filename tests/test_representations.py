"""Objectives inside an encoder against the same written out in loops, and against transformers' own attention."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdlib import models, representations
from tests import exact, toy

LENGTHS = (6, 3, 1)
TOKENS = max(LENGTHS)
MASK = torch.tensor([[1] * length + [0] * (TOKENS - length) for length in LENGTHS])


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def states(width: int = 4, seed: int = 0) -> torch.Tensor:
    return numbers(len(LENGTHS), TOKENS, width, seed=seed)


def projected(heads: int = 2, size: int = 3, seed: int = 0) -> torch.Tensor:
    """Queries, keys or values of one layer."""
    return numbers(len(LENGTHS), heads, TOKENS, size, seed=seed)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def score_rows(queries, keys, sample: int, head: int) -> list[list[float]]:
    """The scores of one head between the tokens that are there, query by query."""
    there = range(LENGTHS[sample])
    q, k = queries[sample, head].tolist(), keys[sample, head].tolist()
    return [
        [sum(a * b for a, b in zip(q[i], k[j], strict=True)) / math.sqrt(queries.shape[-1]) for j in there]
        for i in there
    ]


def rows(queries, keys, sample: int, head: int) -> list[list[float]]:
    return [softmax(row) for row in score_rows(queries, keys, sample, head)]


def divergence_written_out(student, teacher, heads: int) -> list[float]:
    """KL(teacher ‖ student) of (queries, keys), averaged over heads and the queries that are there."""
    values = []
    for sample, length in enumerate(LENGTHS):
        total = 0.0
        for head in range(heads):
            for p, q in zip(rows(*teacher, sample, head), rows(*student, sample, head), strict=True):
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        values.append(total / (heads * length))
    return values


def close(actual: torch.Tensor, expected) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


class TestLayerMap:
    @pytest.mark.parametrize(
        ("student", "teacher", "expected"),
        [(4, 12, [0, 3, 6, 9, 12]), (2, 4, [0, 2, 4]), (4, 6, [0, 1, 3, 4, 6]), (1, 1, [0, 1]), (2, 3, [0, 1, 3])],
    )
    def test_it_is_tinyberts(self, student, teacher, expected):
        assert representations.layer_map(student, teacher) == tuple(enumerate(expected))

    @given(st.integers(1, 24), st.integers(0, 24))
    def test_it_rises_from_embeddings_to_the_last_layer(self, student, more):
        pairs = representations.layer_map(student, student + more)
        assert pairs[0] == (0, 0) and pairs[-1] == (student, student + more) and len(pairs) == student + 1
        assert all(before[1] < after[1] for before, after in itertools.pairwise(pairs))

    @pytest.mark.parametrize("pair", [(0, 3), (4, 3)])
    def test_other_depths_are_refused(self, pair):
        with pytest.raises(ValueError, match=f"the student has {pair[0]} layers, the teacher 3"):
            representations.layer_map(*pair)


class TestHiddenStates:
    @pytest.mark.parametrize("pairs", [None, ((1, 0), (2, 3))])
    def test_squared_errors_written_out(self, pairs):
        ours, theirs = [states(seed=i) for i in range(3)], [states(seed=10 + i) for i in range(5)]
        expected = [0.0] * 3
        for mine, their in pairs or ((0, 0), (1, 2), (2, 4)):
            for sample, length in enumerate(LENGTHS):
                for token in range(length):
                    for a, b in zip(ours[mine][sample, token], theirs[their][sample, token], strict=True):
                        expected[sample] += (a - b).item() ** 2 / (4 * length)
        close(representations.hidden_mse(ours, theirs, MASK, pairs=pairs), expected)

    def test_the_projection_maps_the_students_states_and_gets_a_gradient(self):
        linear = nn.Linear(4, 7, bias=False).double()
        ours, theirs = [states().requires_grad_(), states(seed=1)], [states(7, 2), states(7, 3)]
        value = representations.hidden_mse(ours, theirs, MASK, linear)
        mapped = [part @ linear.weight.T for part in ours]
        close(value, representations.hidden_mse(mapped, theirs, MASK).tolist())
        value.sum().backward()
        assert linear.weight.grad.any() and ours[0].grad.any()

    def test_cosines_written_out(self):
        ours, theirs = states(seed=0), states(seed=1)
        expected = []
        for sample, length in enumerate(LENGTHS):
            total = 0.0
            for token in range(length):
                a, b = ours[sample, token].tolist(), theirs[sample, token].tolist()
                inner = sum(x * y for x, y in zip(a, b, strict=True))
                total += 1 - inner / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
            expected.append(total / length)
        close(representations.hidden_cosine(ours, theirs, MASK), expected)
        close(representations.hidden_cosine(ours, 3 * ours, MASK), [0.0] * 3)
        close(representations.hidden_cosine(ours, -ours, MASK), [2.0] * 3)

    @pytest.mark.usefixtures("unchecked")
    def test_widths_that_differ_are_named(self):
        with pytest.raises(ValueError, match=r"have 4 units, the teacher's 6: give a projection"):
            representations.hidden_mse([states()] * 2, [states(6)] * 2, MASK)
        with pytest.raises(ValueError, match="have 5 units, the teacher's 6"):
            representations.hidden_mse([states()] * 2, [states(6)] * 2, MASK, nn.Linear(4, 5).double())
        with pytest.raises(ValueError, match="have 4 units, the teacher's 6"):
            representations.hidden_cosine(states(), states(6), MASK)
        with pytest.raises(ValueError, match="pairs is empty"):
            representations.hidden_mse([states()] * 2, [states()] * 2, MASK, pairs=())


class TestAttention:
    def test_scores_and_distributions_written_out(self):
        queries, keys = projected(seed=0), projected(seed=1)
        scores = representations.attention_scores(queries, keys, MASK)
        distributions = representations.attention(queries, keys, MASK)
        for sample, length in enumerate(LENGTHS):
            for head in range(2):
                there = slice(0, length), slice(0, length)
                close(scores[sample, head][there], score_rows(queries, keys, sample, head))
                close(distributions[sample, head][there], rows(queries, keys, sample, head))
            assert (scores[sample, :, :, length:] == torch.finfo(torch.float64).min).all()
            assert not distributions[sample, :, length:].any() and not distributions[sample, :, :, length:].any()

    @pytest.mark.parametrize("layer", [1, 2])
    def test_it_is_transformers_own(self, layer):
        model, batch = exact.bert().eval(), exact.batch()
        mask = batch["attention_mask"]
        encoding = models.encode_tokens(model, batch["input_ids"], mask, (layer,))
        with models.exact_attention(model):
            expected = model.bert(batch["input_ids"], mask, output_attentions=True).attentions[layer - 1]
        actual = representations.attention(encoding.queries[0], encoding.keys[0], mask)
        assert (mask == 0).any()
        torch.testing.assert_close(actual, expected * mask[:, None, :, None], rtol=0, atol=1e-9)

    @pytest.mark.parametrize("of", ["distributions", "scores"])
    def test_squared_errors_written_out(self, of):
        student = ([projected(seed=0), projected(seed=1)], [projected(seed=2), projected(seed=3)])
        teacher = ([projected(2, 5, 4), projected(2, 5, 5)], [projected(2, 5, 6), projected(2, 5, 7)])
        measure = rows if of == "distributions" else score_rows
        expected = [0.0] * 3
        for layer in range(2):
            for sample, length in enumerate(LENGTHS):
                for head in range(2):
                    ours = measure(student[0][layer], student[1][layer], sample, head)
                    theirs = measure(teacher[0][layer], teacher[1][layer], sample, head)
                    for one, other in zip(ours, theirs, strict=True):
                        expected[sample] += sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / length**2
        close(representations.attention_mse(student, teacher, MASK, of), expected)
        if of == "distributions":
            close(representations.attention_mse(student, teacher, MASK), expected)

    def test_minilms_divergence_written_out(self):
        student, teacher = (projected(seed=0), projected(seed=1)), (projected(2, 5, 2), projected(2, 5, 3))
        expected = divergence_written_out(student, teacher, 2)
        close(representations.attention_kl(*student, *teacher, MASK), expected)
        other = divergence_written_out(teacher, student, 2)
        assert max(abs(a - b) for a, b in zip(expected, other, strict=True)) > 0.01  # the direction shows
        close(representations.attention_kl(*student, *student, MASK), [0.0] * 3)

    @pytest.mark.usefixtures("unchecked")
    def test_heads_and_layers_that_differ_are_named(self):
        two, three = projected(2), projected(3)
        with pytest.raises(ValueError, match=r"the student has 2 heads, the teacher 3: .* relation_kl"):
            representations.attention_mse(([two], [two]), ([three], [three]), MASK)
        with pytest.raises(ValueError, match="the student has 3 heads, the teacher 2"):
            representations.attention_kl(three, three, two, two, MASK)
        with pytest.raises(ValueError, match="of 1 and 1 layers, the teacher of 2 and 2"):
            representations.attention_mse(([two], [two]), ([two, two], [two, two]), MASK)
        with pytest.raises(ValueError, match="at least one"):
            representations.attention_mse(((), ()), ((), ()), MASK)
        with pytest.raises(ValueError, match="of is 'logits'; expected 'distributions' or 'scores'"):
            representations.attention_mse(([two], [two]), ([two], [two]), MASK, "logits")
        with pytest.raises(ValueError, match=r"shape \(2, 6, 3\); expected \(batch, heads, tokens, size\)"):
            representations.attention_mse((two, two), (two, two), MASK)  # tensors in the place of layers


def regrouped(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Another number of heads, unit by unit: unit u of a token is unit u % size of head u // size."""
    batch, old, tokens, size = values.shape
    width = old * size
    new = torch.empty(batch, heads, tokens, width // heads, dtype=values.dtype)
    for unit in range(width):
        new[:, unit // (width // heads), :, unit % (width // heads)] = values[:, unit // size, :, unit % size]
    return new


class TestRelations:
    def test_they_are_the_values_attention_to_themselves(self):
        student, teacher = projected(2, 3, 0), projected(2, 5, 1)
        expected = divergence_written_out((student, student), (teacher, teacher), 2)
        close(representations.relation_kl(student, teacher, MASK), expected)

    @pytest.mark.parametrize("heads", [1, 2, 4])
    def test_heads_are_merged_and_split_anew(self, heads):
        """Networks of 2 heads of 4 units and of 3 heads of 4 meet in any number of heads that divides 8 and 12."""
        student, teacher = projected(2, 4, 0), projected(3, 4, 1)
        ours, theirs = regrouped(student, heads), regrouped(teacher, heads)
        torch.testing.assert_close(representations.split_anew(teacher, heads), theirs, rtol=0, atol=0)
        expected = divergence_written_out((ours, ours), (theirs, theirs), heads)
        close(representations.relation_kl(student, teacher, MASK, heads), expected)

    def test_the_released_reshape_is_right_for_the_same_number_of_heads_only(self):
        """It goes from (batch, heads, tokens, size) through (batch, everything), which mixes tokens."""
        values = projected(2, 6, 0)
        for heads, right in ((2, True), (4, False), (1, False)):
            released = values.reshape(len(values), -1).reshape(len(values), heads, TOKENS, -1)
            ours = representations.split_anew(values, heads)
            assert released.shape == ours.shape and torch.equal(released, ours) == right

    def test_the_networks_own_heads_need_no_splitting(self):
        student, teacher = projected(2, 3, 0), projected(2, 5, 1)
        close(
            representations.relation_kl(student, teacher, MASK, 2),
            representations.relation_kl(student, teacher, MASK).tolist(),
        )

    def test_errors_say_what_to_do(self):
        with pytest.raises(ValueError, match="has 2 heads, the teacher 3: give relation_heads"):
            representations.relation_kl(projected(2, 3), projected(3, 3), MASK)
        for heads in (4, 0):
            with pytest.raises(ValueError, match=f"relation_heads is {heads}, which does not divide a width of 6"):
                representations.relation_kl(projected(2, 3), projected(2, 4), MASK, heads)


STATES, HEADS = ("hidden_mse", "hidden_cosine"), ("attention_mse", "scores", "attention_kl", "relation_kl", "relations")


def measured(name: str, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each objective as a function of one tensor of the student and one of the teacher."""
    calls = {
        "hidden_mse": lambda s, t: representations.hidden_mse([s, s], [t, t], mask),
        "hidden_cosine": lambda s, t: representations.hidden_cosine(s, t, mask),
        "attention_mse": lambda s, t: representations.attention_mse(([s], [2 * s]), ([t], [2 * t]), mask),
        "scores": lambda s, t: representations.attention_mse(([s], [2 * s]), ([t], [2 * t]), mask, "scores"),
        "attention_kl": lambda s, t: representations.attention_kl(s, 2 * s, t, 2 * t, mask),
        "relation_kl": lambda s, t: representations.relation_kl(s, t, mask),
        "relations": lambda s, t: representations.relation_kl(s, t, mask, 4),
    }
    return calls[name](student, teacher)


def inputs(name: str, seed: int) -> torch.Tensor:
    return states(4, seed) if name in STATES else projected(2, 4, seed)


@pytest.mark.parametrize("name", [*STATES, *HEADS])
class TestEvery:
    @settings(max_examples=25)
    @given(seed=st.integers(0, 99), more=st.integers(1, 4), size=st.sampled_from([1.0, 1e3, math.inf, math.nan]))
    def test_padding_never_counts(self, name, seed, more, size):
        """Neither the columns that are added nor what stands in those that were there."""
        student, teacher = inputs(name, seed), inputs(name, seed + 100)
        expected = measured(name, student, teacher, MASK)
        padded = []
        for values in (student, teacher):
            longer = size * numbers(*values.shape[:-2], TOKENS + more, values.shape[-1], seed=seed + 200)
            there = MASK.bool().view(len(LENGTHS), *[1] * (values.dim() - 3), TOKENS, 1)
            longer[..., :TOKENS, :] = torch.where(there, values, longer[..., :TOKENS, :])
            padded.append(longer)
        mask = nn.functional.pad(MASK, (0, more))
        assert expected.shape == (3,)
        torch.testing.assert_close(measured(name, *padded, mask), expected, rtol=1e-12, atol=1e-12)
        for dtype in (torch.bool, torch.float32):
            torch.testing.assert_close(measured(name, *padded, mask.to(dtype)), expected, rtol=1e-12, atol=1e-12)

    def test_a_sample_alone_has_the_value_that_it_has_in_a_batch(self, name):
        student, teacher = inputs(name, 0), inputs(name, 1)
        together = measured(name, student, teacher, MASK)
        for sample, length in enumerate(LENGTHS):
            one, other = student[sample : sample + 1, ..., :length, :], teacher[sample : sample + 1, ..., :length, :]
            alone = measured(name, one, other, MASK[sample : sample + 1, :length])
            torch.testing.assert_close(alone[0], together[sample], rtol=1e-12, atol=1e-12)

    def test_it_is_zero_at_the_teacher_and_positive_elsewhere(self, name):
        student, teacher = inputs(name, 0), inputs(name, 1)
        close(measured(name, teacher, teacher, MASK), [0.0] * 3)
        several = measured(name, student, teacher, MASK)[:2]  # a single token attends to itself, whatever it is
        assert (several > 1e-3).all()

    def test_the_teacher_is_a_constant_and_the_students_gradient_is_right(self, name):
        student, teacher = inputs(name, 0).requires_grad_(), inputs(name, 1).requires_grad_()
        value = measured(name, student, teacher, MASK).sum()
        ours, theirs = torch.autograd.grad(value, (student, teacher), allow_unused=True)
        assert theirs is None and ours.isfinite().all()
        padding = ours.movedim(-2, 1)[MASK == 0]
        assert not padding.any()
        torch.autograd.gradcheck(lambda s: measured(name, s, teacher.detach(), MASK), student)

    def test_a_sample_without_tokens_has_zero_and_no_gradient(self, name):
        student, teacher, mask = inputs(name, 0).requires_grad_(), inputs(name, 1), MASK.clone()
        mask[1] = 0
        value = measured(name, student, teacher, mask)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert value[1] == 0 and not gradient[1].any() and gradient.isfinite().all()
        torch.testing.assert_close(value[[0, 2]], measured(name, student, teacher, MASK)[[0, 2]])

    def test_it_is_in_float32_at_least_and_does_not_heed_autocast(self, name):
        student, teacher = inputs(name, 0).bfloat16(), inputs(name, 1).bfloat16()
        expected = measured(name, student.double(), teacher.double(), MASK)
        with torch.autocast("cpu", torch.bfloat16):
            actual = measured(name, student, teacher, MASK)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_student_cut_from_its_teacher_has_its_representations():
    """The whole way, from networks: the first layers of a student are the teacher's own."""
    teacher, batch = exact.bert(1, 3).eval(), exact.batch(4)
    words, mask = batch["input_ids"], batch["attention_mask"]
    student = models.first_layers(teacher, 2)
    ours, theirs = (models.encode_tokens(model, words, mask, (1, 2)) for model in (student, teacher))
    same = ((0, 0), (1, 1), (2, 2))
    assert representations.hidden_mse(ours.hidden_states, theirs.hidden_states, mask, pairs=same).max() < 1e-20
    assert representations.attention_mse(ours[1:3], theirs[1:3], mask).max() < 1e-20
    assert representations.relation_kl(ours.values[1], theirs.values[1], mask).abs().max() < 1e-12
    other = models.encode_tokens(toy.network(3, 3, layers=2).double(), words, mask, (1, 2))
    assert representations.attention_mse(other[1:3], theirs[1:3], mask).min() > 1e-6
    assert representations.hidden_mse(other.hidden_states, theirs.hidden_states, mask).min() > 1e-3


def network_states(depth: int, seed: int, width: int = 4, samples: int = 3) -> tuple[torch.Tensor, ...]:
    """Hidden states as transformers returns them: the embeddings and `depth` layers."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(samples, 5, width, generator=generator, dtype=torch.float64) for _ in range(depth + 1))


class TestPatient:
    @pytest.mark.parametrize(
        ("student", "teacher", "skip", "last"),
        [
            (6, 12, [2, 4, 6, 8, 10], [7, 8, 9, 10, 11]),
            (4, 12, [3, 6, 9], [9, 10, 11]),
            (3, 6, [2, 4], [4, 5]),
            (2, 2, [1], [1]),
            (4, 6, [1, 3, 4], [3, 4, 5]),
        ],
    )
    def test_layers_are_those_of_the_paper(self, student, teacher, skip, last):
        for layers, expected in (("skip", skip), ("last", last)):
            pairs = representations.patient_layers(student, teacher, layers)
            assert pairs == tuple(zip(range(1, student), expected, strict=True))

    @pytest.mark.parametrize("layers", ["skip", "last"])
    def test_is_the_sum_over_layers_units_and_nothing_else(self, layers):
        ours, theirs = network_states(3, 0), network_states(6, 1)
        expected = [0.0] * 3
        for mine, their in zip((1, 2), {"skip": (2, 4), "last": (4, 5)}[layers], strict=True):
            for sample in range(3):
                a, b = ours[mine][sample, 0].tolist(), theirs[their][sample, 0].tolist()
                lengths = [math.sqrt(sum(x * x for x in state)) for state in (a, b)]
                expected[sample] += sum((x / lengths[0] - y / lengths[1]) ** 2 for x, y in zip(a, b, strict=True))
        assert representations.patient(ours, theirs, layers, reduction="none").tolist() == pytest.approx(
            expected, rel=1e-12
        )
        assert representations.patient(ours, theirs, layers).item() == pytest.approx(sum(expected) / 3)
        # "mean" divides by (layers − 1) · hidden.
        averaged = representations.patient(ours, theirs, layers, "mean", "none").tolist()
        assert [2 * 4 * value for value in averaged] == pytest.approx(expected)

    @given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 99))
    def test_the_length_of_a_state_does_not_matter(self, ours_scale, theirs_scale, seed):
        ours, theirs = network_states(3, seed), network_states(6, seed + 100)
        scaled = [state * ours_scale for state in ours], [state * theirs_scale for state in theirs]
        torch.testing.assert_close(representations.patient(*scaled), representations.patient(ours, theirs))
        assert 0 <= representations.patient(ours, theirs, reduction="none").max() <= 4 * 2  # two layers, unit vectors

    def test_equal_states_have_no_distance_and_other_tokens_do_not_count(self):
        ours, theirs = network_states(3, 0), list(network_states(6, 1))
        for mine, their in ((1, 2), (2, 4)):
            theirs[their] = theirs[their].clone()
            theirs[their][:, 0] = 3 * ours[mine][:, 0]
        assert representations.patient(ours, theirs, reduction="sum").item() == pytest.approx(0, abs=1e-30)

    @pytest.mark.usefixtures("unchecked")
    def test_errors_say_what_to_do(self):
        with pytest.raises(ValueError, match="layers is 'all'; expected 'skip' or 'last'"):
            representations.patient_layers(2, 4, "all")
        for pair in ((1, 4), (5, 4)):
            with pytest.raises(ValueError, match="choose another pair, or leave pkd_weight at 0"):
                representations.patient_layers(*pair)
        with pytest.raises(ValueError, match="normalisation is 'max'"):
            representations.patient(network_states(2, 0), network_states(2, 1), normalisation="max")
        with pytest.raises(ValueError, match="the student has 4 units and the teacher 6"):
            representations.patient(network_states(2, 0), network_states(2, 1, width=6))
        with pytest.raises(ValueError, match="0 samples"):
            representations.patient(network_states(2, 0, samples=0), network_states(2, 1, samples=0))
