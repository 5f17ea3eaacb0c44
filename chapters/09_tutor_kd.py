# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does a student learn more from text that is easy for its teacher and hard for itself?
#
# Tutor-KD distils a language model on plain text. Usually words are hidden and the teacher's guesses are imitated. Here a tutor puts other words in their place,
# and it is paid twice: once where the teacher finds the result easy, and once where the student finds it hard. What does each of the two payments ask
# for? What does the student imitate, outside and inside? And is it worth anything to the student afterwards?
#
# | | |
# |---|---|
# | Prerequisites | the tutor's draw, its rewards and REINFORCE from {doc}`08_policy_gradient`; temperature and KL from {doc}`01_distillation` |
# | Time | about 60 minutes to read, 40 for the exercises; the cells run in about a minute |
# | Papers | Tutor-KD eqs. (7), (8), (12)-(14), Figures 1, 2, 3, Tables 1, 2, 3, 4, 5, 6 |
#
# Afterwards you will be able to
#
# - say which words a reward asks for, by listing what every word of the vocabulary would earn,
# - compare hidden states and attention of two networks so that padding does not count,
# - put one step of Tutor-KD together from small parts,
# - tell which claims of the paper a few small runs can decide, and which they cannot.
#
# Live here: the words, the derivations, two short runs of Tutor-KD, and what the released code does differently. The many-seed comparisons are *read* from run
# records in `data/runs/09_tutor_kd`. Teacher, text and students are small, so the numbers are those of a model of the method, not of BERT.

# %% tags=["setup", "hide-input"]
# Installs kdlib where it is missing, on Colab for example; otherwise does nothing.
try:
    import kdlib

    kdlib.__version__  # a folder that happens to be called kdlib has none
except (ImportError, AttributeError):
    import os
    import subprocess
    import sys
    from pathlib import Path

    around = [str(folder) for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "kdlib/__init__.py").exists()]
    place = around[0] if around else os.environ.get("KDLIB_SOURCE", "")
    if not place:
        raise ImportError("kdlib is missing: set KDLIB_SOURCE to the book's folder or git address, run again") from None
    if not Path(place).is_dir():
        address, place = place, "kdlib-book"
        Path(place).is_dir() or subprocess.run(["git", "clone", "-q", "--depth=1", address, place], check=True)
    # Not a copy but the folder itself: the chapters read the data that lie beside the library.
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--editable", place], check=True)
    sys.modules.pop("kdlib", None)
    sys.path.insert(0, str(Path(place).resolve()))

# %%
import copy
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch.nn import functional as F

from kdlib import book, corpus, glue, models, plots, pretraining, runs, trainer
from kdlib.classroom import expect, untouched
from kdlib.compare import paired, verdict
from kdlib.learner import accelerator_for
from kdlib.methods import on_text
from kdlib.methods import tutor as tutoring

plots.use_style()
torch.set_num_threads(1)
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## Notation
#
# | symbol | meaning | shape |
# |---|---|---|
# | $X$, $\mathbf m$, $X^M$, $X'$ | a sentence, its masked positions, the masked sentence, the sentence as the {term}`tutor` filled it in | `(batch, tokens)` |
# | $o$, $r$ | the original word at a masked position, and the one drawn for it | |
# | $p_T$, $p_G$ | probabilities of the teacher and of the tutor | `(positions, vocabulary)` |
# | $a^T$, $a^S$ | modified probability of the drawn word, and the student's prediction of it | `(positions,)` |
# | $H^S$, $H^T$, $W$ | hidden states of a layer of student and teacher; a linear map between their widths | `(batch, tokens, hidden)` |
# | $A^S_i$, $A^T_i$ | attention of head $i$: what each token reads from each other token | `(batch, tokens, tokens)` |
#
# ## Who asks whom
#
# The counterpart of the paper's Figure 1, as a table. In each step
#
# | | distillation | Tutor-KD |
# |---|---|---|
# | the teacher reads | $X^M$ | $X^M$, and then $X'$ |
# | the tutor reads | | the teacher's last hidden states on $X^M$; it answers with $p_G$ |
# | the student reads | $X^M$ | $X'$ |
# | the student predicts | the teacher's distribution over all words | how plausible the word is that stands there: $a^T$ |
# | and imitates inside | the teacher on $X^M$ | the teacher on $X'$ |
# | the tutor learns | | from its rewards, and from $\mathrm{KL}(p_T \Vert p_G)$ |
#
# The teacher is the book's masked language model. It has learned the sentences of MiniGLUE's grammars as BERT learned Wikipedia; its vocabulary is so small that every
# word can be tried.

# %%
TOKENIZER = models.load_tokenizer("book-mlm")
TOKENS = TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER)))
SPECIAL, MASK = corpus.special_tokens(TOKENIZER), TOKENIZER.mask_token_id
TEXT, HELD_OUT = (corpus.load("mini-corpus", TOKENIZER, split=split).encoded for split in ("train", "validation"))
teacher = models.load_masked("book-mlm", TOKENIZER).double().requires_grad_(False)


def student_of(seed):
    """An untrained student of half the teacher's depth and width, in float64."""
    network = models.load_masked("tiny-2x64h4", TOKENIZER, seed)
    return on_text.Student(network, teacher.config.hidden_size, seed).double()


def masked_batch(rows, number=0):
    """Held-out sentences with 15 % of their words masked."""
    batch = trainer.training_batch(HELD_OUT, list(rows), torch.device("cpu"))
    return corpus.masking(TOKENIZER, seed=0)(batch, number)


def logits_at(network, words, attended, masked):
    """What a masked language model says at the masked positions, shape (positions, vocabulary)."""
    return network.cls(network.base_model(words, attended).last_hidden_state[masked])


print(f"{len(TOKENS)} word pieces, {len(TEXT):,} sentences to learn from and {len(HELD_OUT):,} held out; for example")
for row in range(3):
    print("  ", TOKENIZER.decode(HELD_OUT.input_ids[HELD_OUT.offsets[row] + 1 : HELD_OUT.offsets[row + 1] - 1]))

# %% [markdown]
# ## What each word would earn
#
# The rewards of chapter 8 again. Both are for one masked position:
#
# $$r_T = p_T(o \mid X') - p_T(r \mid X'), \qquad r_S = \lvert a^T - a^S \rvert, \qquad a^T = \min\Bigl(1, \frac{p_T(r \mid X^M)}{p_T(o \mid X^M)}\Bigr). $$ (eq-tutor-rewards)
#
# **Before you run it:** which words does the first reward pay most? Those that the teacher finds likely, or those that it finds absurd?


# %%
# NBVAL_CHECK_OUTPUT
@torch.no_grad()
def what_words_earn(words, place, student):
    """What each word of the vocabulary would earn at one place of a sentence, shape (tokens,): a frame."""
    choices, original = torch.arange(len(TOKENS)), words[place]
    filled = words.repeat(len(TOKENS), 1)
    filled[:, place] = choices
    at, attended = torch.zeros_like(filled, dtype=torch.bool), torch.ones_like(filled)
    at[:, place] = True
    guess = logits_at(teacher, filled[:1].masked_fill(at[:1], MASK), attended[:1], at[:1])[0].softmax(-1)
    believed = logits_at(teacher, filled, attended, at).softmax(-1)
    said = student.scores(student.network.base_model(filled, attended).last_hidden_state[at]).sigmoid()
    target = (guess / guess[original]).clamp(max=1)
    columns = {"p_T on X^M": guess, "a^T": target, "a^S": said}
    columns |= {"r_T": believed[:, original] - believed[choices, choices], "r_S": (target - said).abs()}
    return pd.DataFrame(columns, index=TOKENS).drop(index=[TOKENS[i] for i in SPECIAL])


def some_words(frame, original, count=3):
    """The original, the most plausible words and those that earn most of each reward."""
    names = [original]
    for column in ("p_T on X^M", "r_T", "r_S"):
        names += list(frame[column].nlargest(count).index)
    return frame.loc[list(dict.fromkeys(names))].sort_values("r_T", ascending=False)


fresh = student_of(0)
EXAMPLE = torch.tensor(TOKENIZER("the doctor was not aided by the dog")["input_ids"])
PLACE = TOKENIZER.convert_ids_to_tokens(EXAMPLE.tolist()).index("doctor")
earned = what_words_earn(EXAMPLE, PLACE, fresh)
print("the [doctor] was not aided by the dog")
some_words(earned, "doctor").round(3)

# %% [markdown]
# The original earns nothing of $r_T$, by definition. A word that the teacher *likes* loses: when it stands in the sentence, the teacher believes it. A
# word that cannot stand there wins: the teacher reads it, does not believe it, and thinks of the original. That is possible because a masked language model has been
# trained on random words, too. Is it so in general? Forty held-out sentences, a random place in each, all words:


# %%
# NBVAL_CHECK_OUTPUT
def ordinary_place(words, generator):
    """A random position of an ordinary word."""
    places = (~torch.isin(words, torch.tensor(SPECIAL))).nonzero()[:, 0]
    return places[torch.randint(len(places), (), generator=generator)].item()


def some_places(count=40):
    """Held-out sentences, each with a random place in it."""
    generator = torch.Generator().manual_seed(0)
    for row in range(count):
        words = HELD_OUT.input_ids[HELD_OUT.offsets[row] : HELD_OUT.offsets[row + 1]].long()
        yield words, ordinary_place(words, generator)


def survey(student, count=40):
    """`what_words_earn` at each of some places, with the sentence's number and the kind of the word."""
    frames = []
    for number, (words, place) in enumerate(some_places(count)):
        frame = what_words_earn(words, place, student)
        kind = np.where(frame["p_T on X^M"] < 0.01, "a word with p_T < 1 %", "another plausible word")
        kind = np.where(frame.index == TOKENS[words[place]], "the original", kind)
        frames.append(frame.assign(sentence=number, kind=kind))
    return pd.concat(frames)


surveyed = survey(fresh)
by_sentence = surveyed.groupby("sentence")
order = by_sentence.apply(lambda f: stats.spearmanr(f["p_T on X^M"], f["r_T"]).statistic, include_groups=False)
best = surveyed.loc[(surveyed["r_T"] == by_sentence["r_T"].transform("max")).to_numpy()]
own_guess = (surveyed["p_T on X^M"] * surveyed["r_T"]).groupby(surveyed["sentence"]).sum()
print(f"rank correlation of r_T with the teacher's guess on X^M: median {order.median():+.2f} over {len(order)} places")
print(
    f"the word with the highest r_T has, in the teacher's eyes, a probability of {best['p_T on X^M'].median():.1g} (median)"
)
print(f"mean r_T: {own_guess.mean():+.2f} for a tutor that draws what the teacher guesses, 0 for one that copies,")
print(
    f"{by_sentence['r_T'].mean().mean():+.2f} for one that draws any word, {by_sentence['r_T'].max().mean():+.2f} for the best word"
)
rivals = surveyed[surveyed["kind"] == "another plausible word"]
print(
    f"of the other words with p_T of 1 % or more {(rivals['r_T'] < 0).mean():.0%} earn less than the original, on average {rivals['r_T'].mean():+.2f}"
)


# %% mystnb={"image": {"alt": "Two scatter plots of all words against the teacher's probability on the masked sentence, on a logarithmic axis. Left, the teacher's reward: a cloud from zero to one on the left that falls below zero where words are plausible, and a line of means that falls. Right, the student's reward of an untrained student."}, "figure": {"name": "fig-tutor-words", "caption": "What every word would earn at forty places of held-out sentences, over the teacher's probability of the word on the masked sentence; black: means by powers of ten. Left, the teacher's reward; right, that of an untrained student. Crosses are the original words."}}
def draw_rewards(frame, axes, column):
    """Words as dots, originals as crosses, means by powers of ten as a line."""
    some = frame.sample(1500, random_state=0)
    axes.scatter(some["p_T on X^M"], some[column], s=3, alpha=0.3, linewidths=0, color="C0")
    own = frame[frame["kind"] == "the original"]
    axes.scatter(own["p_T on X^M"], own[column], s=14, marker="x", linewidths=0.8, color="C1", label="original word")
    powers = frame.groupby(np.floor(np.log10(frame["p_T on X^M"])).rename("power"))
    axes.plot(powers["p_T on X^M"].median(), powers[column].mean(), color="black", label="mean")
    axes.set(xscale="log", xlabel=r"teacher's $p_T(r \mid X^M)$")


figure, panels = plt.subplots(1, 2, figsize=(6.4, 2.6))
for axes, column, label in zip(
    panels, ("r_T", "r_S"), ("teacher's reward $r_T$", "student's reward $r_S$"), strict=True
):
    draw_rewards(surveyed, axes, column)
    axes.set(ylabel=label)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
plt.show()

# %% [markdown]
# So "easy for the teacher" means: *either the original, or nonsense*. What lies in between, the plausible other words, costs the tutor with few exceptions. The two successes in the paper's case
# study are one of each kind, *defeat* in its own place and *[holy] longhorns* (Table 6). It is worth being plain about it, because the word "easy" suggests ordinary sentences. What holds the tutor back from nonsense is not this reward but
# the KL term, and exercise 3 of chapter 8 shows that it is a weak wall.
#
# And "hard for the student"? The answers of an untrained student have nothing to do with the words. So $r_S$ asks for whatever it gets wrong by chance, and the student is about to
# change. We come back to it when it has learned something.
#
# ## What the student learns of a word
#
# The target $a^T$ is a ratio. Why not the probability $p_T(r \mid X^M)$ itself? Three reasons can be read off it.
#
# - The original word has $a^T = 1$, however much the teacher doubts it. A label and an opinion become one number.
# - The normaliser of the softmax cancels: $a^T = \exp \min(0,\, z_r - z_o)$, a difference of two logits.
# - The cap says that no word is better than the true one. What the teacher likes more than the truth is called right, not righter.


# %%
# NBVAL_CHECK_OUTPUT
def modified_probability(masked_logits, originals, drawn):
    """a^T of (eq-tutor-rewards), shape (samples, positions), from logits (positions, vocabulary) on X^M."""
    gap = masked_logits.gather(-1, drawn.T).T - masked_logits.gather(-1, originals.unsqueeze(-1)).T
    return gap.clamp(max=0).exp()


batch = masked_batch(range(64))
words, masked, attended = batch["input_ids"], batch["masked"], batch["attention_mask"]
guess_logits = logits_at(teacher, words.masked_fill(masked, MASK), attended, masked)
guess, originals = guess_logits.softmax(-1), words[masked]
every = torch.arange(len(TOKENS)).unsqueeze(-1).expand(-1, len(originals))
targets = modified_probability(guess_logits, originals, every)  # for every word at every position
ratio = guess.T / guess.gather(-1, originals.unsqueeze(-1)).T
torch.testing.assert_close(targets, ratio.clamp(max=1))


def entropy(chances):
    """Of a yes or no, in nats."""
    return -(torch.xlogy(chances, chances) + torch.xlogy(1 - chances, 1 - chances))


def on_guessed_words(batch):
    """For words that the teacher guesses: its p of the originals, and by expectation H(a^T), a^T, and a^T = 1 wrongly."""
    words, masked = batch["input_ids"], batch["masked"]
    logits = logits_at(teacher, words.masked_fill(masked, MASK), batch["attention_mask"], masked)
    guess, own = logits.softmax(-1).T, F.one_hot(words[masked], len(TOKENS)).bool().T
    every = torch.arange(len(TOKENS)).unsqueeze(-1).expand_as(guess)
    target = modified_probability(logits, words[masked], every)
    means = [(guess * part).sum(0).mean() for part in (entropy(target), target, (target == 1) & ~own)]
    return guess[own], *means


p_original, floor, constant, preferred = on_guessed_words(masked_batch(range(500)))
low, middle, high = p_original.quantile(torch.tensor([0.1, 0.5, 0.9]).double())
print(f"the teacher's probability of the original: {low:.3f}, {middle:.3f}, {high:.3f} (10 %, 50 %, 90 %); its a^T: 1")
print(
    f"a tutor that draws as the teacher guesses: {preferred:.0%} of its words are not the original and yet have a^T = 1"
)
print(
    f"L_logit is at least {floor:.3f} nats on its words; always answering {constant:.2f} gives {entropy(constant):.3f}"
)

# %% [markdown]
# The last line matters for everything below. A cross entropy does not fall to zero when its targets are not zeros and ones. Between the student that has learned nothing but one
# number and the perfect one lies a narrow strip, and that strip is all that $L_{\text{logit}}$ can teach here. A whole distribution says something about every word; this target
# speaks of one.
#
# **Exercise 1** (easy, 5 minutes). With the temperature of eq. (11), $\mathrm{CE}(a^T/\tau, a^S/\tau)$, what is the smallest value of the mean loss over all predictions of the student? The
# check finds it by search.


# %% tags=["exercise"]
def lowest_loss(targets, temperature):
    """The smallest mean loss for targets a^T, shape (positions,), at a temperature of one or more; a scalar."""
    return NotImplemented  # one line


# %% tags=["check"]
def check_lowest_loss(lowest_loss):
    targets = torch.tensor([0.03, 0.4, 0.9], dtype=torch.float64)
    if untouched(lowest_loss(targets, 2.0)):
        return
    grid = torch.linspace(1e-4, 1 - 1e-4, 20_001, dtype=torch.float64).unsqueeze(-1)
    for temperature in (1.0, 2.0):
        a, tried = targets / temperature, grid / temperature
        found = (-a * tried.log() - (1 - a) * (1 - tried).log()).amin(0).mean()
        torch.testing.assert_close(lowest_loss(targets, temperature), found, rtol=1e-4, atol=0)
    print("right")


check_lowest_loss(lowest_loss)

# %% [markdown]
# ## Inside the encoder
#
# The student also imitates what the teacher does on the way. Two layers $m$ and $n$ of student and teacher belong together, here the first with the second and the second with the
# fourth. Their hidden states differ in width, so a matrix $W$ is learned along with the student:
#
# $$L_{\text{hidden}} = \sum_{(m, n)} \mathrm{MSE}\bigl(H^S_m W,\, H^T_n\bigr). $$ (eq-tutor-hidden)
#
# Attention has no width. A head is a matrix of tokens by tokens, whatever the size of its queries and keys, so the heads can be compared as they are, if there are
# equally many:
#
# $$L_{\text{att}} = \sum_{(m, n)} \sum_{i=1}^{h} \mathrm{MSE}\bigl(A^S_{m,i},\, A^T_{n,i}\bigr), \qquad A = \mathrm{softmax}\bigl(Q K^\top / \sqrt d\,\bigr), \qquad L_{\text{inter}} = L_{\text{hidden}} + L_{\text{att}}. $$ (eq-tutor-inter)
#
# What is an MSE over a padded batch a mean of? Over tokens that are there: a padded position is neither a query nor a key, and it is not counted in what we divide by. Otherwise a
# sentence would weigh less because its neighbour in the batch is long.

# %%
PAIRS = ((1, 2), (2, 4))  # student's layer, teacher's layer; 0 would be the embeddings


def hidden_mse(ours, theirs, attended, projection, pairs=PAIRS):
    """Equation (eq-tutor-hidden), one value for each sentence; lists of hidden states, the embeddings first."""
    errors = sum((projection(ours[m]) - theirs[n].detach()).square().mean(-1) for m, n in pairs)
    return (errors * attended).sum(-1) / attended.sum(-1)


def queries_and_keys(network, states, layer):
    """Of a layer, from the states that it reads; shape (batch, heads, tokens, size) each."""
    part = network.base_model.encoder.layer[layer - 1].attention.self
    heads = part.num_attention_heads
    return [f(states[layer - 1]).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (part.query, part.key)]


def attention(queries, keys, attended):
    """A of (eq-tutor-inter), shape (batch, heads, tokens, tokens); zero in the rows and columns of padding."""
    scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    chances = scores.masked_fill(attended[:, None, None, :] == 0, -torch.inf).softmax(-1)
    return chances * attended[:, None, :, None]


def attention_mse(ours, theirs, attended):
    """Second part of (eq-tutor-inter), one value for each sentence, from lists of queries and keys of the layers."""
    squares = [
        (attention(*mine, attended) - attention(*their, attended).detach()).square().sum((1, 2, 3))
        for mine, their in zip(ours, theirs, strict=True)
    ]
    return sum(squares) / attended.sum(-1) ** 2


# %% [markdown]
# Is this the attention that the network really computes? transformers can be asked for its own. And does padding count? The same sentences with three columns of
# rubbish appended must give the same losses.


# %%
def inside(network, words, attended):
    """All hidden states, and the queries and keys of the paired layers."""
    states = network.base_model(words, attended, output_hidden_states=True).hidden_states
    column = 0 if network is not teacher else 1
    return states, [queries_and_keys(network, states, pair[column]) for pair in PAIRS]


def inner_losses(student, words, attended):
    """Equations (eq-tutor-hidden) and (eq-tutor-inter) of a student on sentences, shape (batch,) each."""
    (ours, our_heads), (theirs, their_heads) = (inside(n, words, attended) for n in (student.network, teacher))
    return hidden_mse(ours, theirs, attended, student.projection), attention_mse(our_heads, their_heads, attended)


for network in (teacher, fresh.network):
    with models.exact_attention(network):
        its_own = network.base_model(words, attended, output_attentions=True).attentions
    states = network.base_model(words, attended, output_hidden_states=True).hidden_states
    for layer, expected in enumerate(its_own, start=1):
        found = attention(*queries_and_keys(network, states, layer), attended)
        torch.testing.assert_close(found, expected * attended[:, None, :, None], rtol=1e-9, atol=1e-12)

longer = [F.pad(words, (0, 3), value=20), F.pad(attended, (0, 3))]
for found, expected in zip(inner_losses(fresh, *longer), inner_losses(fresh, words, attended), strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
print("the attention is transformers' own, and padding does not count")

# %% [markdown]
# **Exercise 2** (medium, 10 minutes). $W$ is a least-squares problem in disguise. Given the states of one layer as matrices, rows are tokens, which $W$ makes {eq}`eq-tutor-hidden` smallest? The check
# asks for a gradient of zero.


# %% tags=["exercise"]
def best_projection(ours, theirs):
    """The W of smallest squared error between ours @ W and theirs, from shapes (tokens, hidden), (tokens, teacher's hidden)."""
    return NotImplemented  # torch.linalg has it


# %% tags=["check"]
def check_best_projection(best_projection):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(50, width, generator=generator).double() for width in (4, 7))
    answer = best_projection(ours, theirs)
    if untouched(answer):
        return
    leaf = answer.clone().requires_grad_()
    (slope,) = torch.autograd.grad((ours @ leaf - theirs).square().mean(), leaf)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-7)
    print("right")


check_best_projection(best_projection)

# %% [markdown]
# ## One step
#
# The paper's eqs. (8) and (7), with the reward of chapter 8 written out. Student, tutor:
#
# $$L_S = \lambda_1 L_{\text{logit}} + \lambda_2 L_{\text{inter}}, \qquad \lambda_1 = 25,\ \lambda_2 = \tfrac 1 2; $$ (eq-tutor-student)
#
# $$L = L_S(\theta) + \beta\, \mathrm{KL}\bigl(p_T \Vert p_G\bigr)(\phi) - \underbrace{\bigl[\lambda r_T + (1 - \lambda) r_S\bigr]}_{\text{constant}} \log p_G(r)(\phi). $$ (eq-tutor-total)
#
# Eq. (7) has the first two terms, to be minimised; the third is eq. (6), to be maximised "in turn". But student and tutor share no parameter, and the rewards are constants. So
# the sum can be differentiated at once, and the released code does so.


# %%
def small_turn(student, tutor, batch, drawn=None):
    """Equations (eq-tutor-student) and (eq-tutor-total) for a batch: the student's loss and the tutor's."""
    words, masked, attended = batch["input_ids"], batch["masked"], batch["attention_mask"]
    states = teacher.base_model(words.masked_fill(masked, MASK), attended).last_hidden_state[masked]
    guess, mine = teacher.cls(states), tutor.head(states)
    if drawn is None:
        drawn = torch.multinomial(mine.softmax(-1), 1)[:, 0]
    filled, originals, places = words.masked_scatter(masked, drawn), words[masked], range(len(drawn))

    target = modified_probability(guess, originals, drawn.unsqueeze(0))[0]
    score = student.scores(student.network.base_model(filled, attended).last_hidden_state[masked])
    imitation = F.binary_cross_entropy_with_logits(score, target)
    inter = sum(inner_losses(student, filled, attended)).mean()

    believed = logits_at(teacher, filled, attended, masked).softmax(-1)
    r_t = believed[places, originals] - believed[places, drawn]
    r_s = (target - score.sigmoid()).abs().detach()
    log_p = mine.log_softmax(-1)
    kl = (guess.softmax(-1) * (guess.log_softmax(-1) - log_p)).sum(-1)
    return 25 * imitation + inter / 2, (kl - (r_t / 2 + r_s / 2) * log_p[places, drawn]).mean()


# %% [markdown]
# The library's `take_turn` draws the words; ours gets the same ones. Both losses and all gradients have to agree, and no gradient of one may reach the other.

# %% tags=["agrees"]
from kdlib import representations
from kdlib.methods import tutor_words
from kdlib.methods.tutor_words import modified_probability as library_probability

student, maker = student_of(1), tutoring.Tutor(teacher, start="random").double()
torch.manual_seed(0)
turn = tutoring.take_turn(student, maker, teacher, batch, SPECIAL, MASK, tutoring.TutorKD())
ours = small_turn(student, maker, batch, turn.drawn[0])
for mine, theirs, module in zip(ours, (turn.student, turn.tutor(1.0)), (student, maker), strict=True):
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(loss, list(module.parameters()), allow_unused=True) for loss in (mine, theirs)]
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
ours = small_turn(student, maker, batch)
nothing = torch.autograd.grad(ours[0], list(maker.parameters()), allow_unused=True)
assert all(slope is None for slope in nothing)

(states, heads), (their_states, their_heads) = (inside(n, words, attended) for n in (student.network, teacher))
split = [[[layer[part] for layer in side] for part in (0, 1)] for side in (heads, their_heads)]
choices = torch.arange(len(TOKENS)).unsqueeze(-1)
at = (torch.arange(len(EXAMPLE)) == PLACE).unsqueeze(0)
shown, real = EXAMPLE.unsqueeze(0), torch.ones(len(TOKENS), len(EXAMPLE), dtype=torch.long)
pairs = [
    (representations.attention(*heads[0], attended), attention(*heads[0], attended)),
    (representations.attention_mse(*split, attended), attention_mse(heads, their_heads, attended)),
    (
        representations.hidden_mse(states, their_states, attended, student.projection, PAIRS),
        hidden_mse(states, their_states, attended, student.projection),
    ),
    (
        library_probability(guess_logits, originals, every),
        modified_probability(guess_logits, originals, every),
    ),
]
lesson = tutor_words.make_lesson(
    shown,
    at,
    choices,
    logits_at(teacher, shown.masked_fill(at, MASK), real[:1], at),
    lambda rows, where: logits_at(teacher, rows, real, where),
    lambda rows, where: fresh.scores(fresh.network.base_model(rows, real).last_hidden_state[where]),
)
kept = [i for i in range(len(TOKENS)) if i not in SPECIAL]
for name, found in {"r_T": lesson.teacher_reward, "r_S": lesson.student_reward, "a^T": lesson.targets}.items():
    pairs.append((found[kept, 0].detach(), torch.tensor(earned[name].to_numpy())))
for theirs, own in pairs:
    torch.testing.assert_close(theirs, own, rtol=1e-9, atol=1e-12)
print("kdlib's turn has the same losses and gradients, and pays every word the same")

# %% [markdown]
# Printed literally, the two take turns: the tutor steps uphill, draws anew, and then both step downhill. The gradients are the same two, taken one step of the tutor apart. The price is another round of
# passes (`order="in turns"` in the library):


# %%
# NBVAL_CHECK_OUTPUT
def passes(order, steps=2):
    """Forward passes of both encoders in a step."""
    config = pretraining.configure(method="tutor", steps=steps, device="cpu", order=order)
    masking, calls = corpus.masking(TOKENIZER, seed=0), {"teacher": 0, "student": 0}
    who = pretraining.networks(config, TOKENIZER, masking, accelerator_for("cpu"))

    def count(name):
        calls[name] += 1

    for name, network in {"teacher": who.cast.teacher, "student": who.cast.student.module.network}.items():
        network.base_model.register_forward_hook(lambda *_, name=name: count(name))
    for _ in range(steps):
        who.step(batch)
    return {name: calls[name] / steps for name in calls}


pd.DataFrame({order: passes(order) for order in ("together", "in turns")}).T

# %% [markdown]
# ### Weights and lengths
#
# The weights 25 and ½ say little as long as we do not know how long the gradients are. In the student's encoder, for an untrained student:


# %%
# NBVAL_CHECK_OUTPUT
def term_lengths(student, batch):
    """Lengths of the gradients of the student's three terms in its encoder, at their weights."""
    words, masked, attended = batch["input_ids"], batch["masked"], batch["attention_mask"]
    guess = logits_at(teacher, words.masked_fill(masked, MASK), attended, masked)
    drawn = torch.multinomial(guess.softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    filled, target = words.masked_scatter(masked, drawn), modified_probability(guess, words[masked], drawn[None])[0]
    (ours, our_heads), (theirs, their_heads) = (inside(n, filled, attended) for n in (student.network, teacher))
    score = student.scores(ours[-1][masked])
    split = [[[layer[part] for layer in side] for part in (0, 1)] for side in (our_heads, their_heads)]
    terms = {
        "25 · L_logit": 25 * F.binary_cross_entropy_with_logits(score, target),
        "½ · L_hidden": hidden_mse(ours, theirs, attended, student.projection).mean() / 2,
        "½ · L_att": attention_mse(our_heads, their_heads, attended).mean() / 2,
        "½ · L_att on scores": representations.attention_mse(*split, attended, of="scores").mean() / 2,
    }
    weights = list(student.network.base_model.encoder.parameters())
    rows = {}
    for name, term in terms.items():
        slopes = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        length = torch.cat([slope.flatten() for slope in slopes if slope is not None]).norm()
        rows[name] = {"value": term.item(), "length of the gradient": length.item()}
    return pd.DataFrame(rows).T


lengths = term_lengths(fresh, batch)
share = lengths.loc["½ · L_att"].iloc[1] / lengths.iloc[:3, 1].sum()
print(f"attention has {share:.2%} of the summed lengths")
lengths.round(4)

# %% [markdown]
# Attention distributions are numbers that sum to one over a dozen tokens, and their squared differences are averaged over all pairs. The scores before the softmax, which the released code
# compares, are of another size altogether. So at the printed weights the attention term is two different things in paper and code.
#
# ## A short run
#
# Now let it run: a student of two layers on the mini-corpus (*live*), once with the released weight $\beta = 1$ on the tutor's KL, and once with a tenth of it.


# %%
def live(steps, **settings):
    """A short run of Tutor-KD: everyone who took part, and the numbers of each step."""
    config = pretraining.configure(method="tutor", steps=steps, device="cpu", **settings)
    masking = corpus.masking(TOKENIZER, config.mask_rate, config.seed)
    torch.manual_seed(config.seed)
    who = pretraining.networks(config, TOKENIZER, masking, accelerator_for("cpu"))
    schedule, rows = trainer.Schedule(epochs=1, batch_size=config.batch_size, seed=config.seed), []
    for number, indices in enumerate(trainer.training_batches(TEXT, schedule, 0, steps)):
        lesson = trainer.training_batch(TEXT, indices, torch.device("cpu"))
        rows.append(who.step(masking(lesson, number)))
    return who, pd.DataFrame(rows)


STEPS = 100
LIVE = {"β = 1, as released": live(STEPS), "β = 0.1": live(STEPS, kl_weight=0.1)}

# %% mystnb={"image": {"alt": "Two panels over a hundred steps with two lines each. Left, the teacher's reward, below zero throughout for the released weight. Right, the student's reward, which falls quickly and then stays low."}, "figure": {"name": "fig-tutor-live", "caption": "Two live runs of Tutor-KD: mean rewards of the drawn words at each step, smoothed over ten steps."}}
figure, panels = plt.subplots(1, 2, figsize=(6.4, 2.5))
for name, (_, numbers) in LIVE.items():
    for axes, column in zip(panels, ("teacher_reward", "student_reward"), strict=True):
        axes.plot(numbers[column].rolling(10).mean(), label=name)
panels[0].set(xlabel="step", ylabel="teacher's reward $r_T$")
panels[1].set(xlabel="step", ylabel="student's reward $r_S$", ylim=0)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
plt.show()

# %%
for name, (_, numbers) in LIVE.items():
    first, last = numbers.iloc[:20].mean(), numbers.iloc[-20:].mean()
    print(f"{name}: ", end="")
    for column in ("teacher_reward", "student_reward", "copied"):
        print(f"{column} {first[column]:+.2f} → {last[column]:+.2f}", end="; ")
    print(f"L_logit {first['student_nll']:.3f} → {last['student_nll']:.3f}")
    assert last["student_reward"] < first["student_reward"]
print(f"a constant answer on words that the teacher guesses: {entropy(constant):.3f}, a perfect one: {floor:.3f}")

# %% [markdown]
# In so few steps the student's loss comes down to about what a constant answer would give on such words, the upper edge of the strip between knowing nothing and knowing everything. Its error, which is the reward $r_S$, falls at both
# weights: the student learns what is plausible faster than the tutor finds words that it does not expect. The mean of $r_T$ changes by a few hundredths, if at all, and is
# averaged over a few drawn words a step. How did the tutors change? Their probabilities need no drawing:


# %%
@torch.no_grad()
def tutor_chances(who, batch):
    """The tutor's probabilities at the masked positions, shape (positions, vocabulary)."""
    words, masked, attended = batch["input_ids"], batch["masked"], batch["attention_mask"]
    states = who.cast.teacher.base_model(words.masked_fill(masked, MASK), attended).last_hidden_state[masked]
    return who.cast.tutor.module(states).softmax(-1).double()


def described(chances, guess, originals):
    """What a tutor draws, in shares."""
    own = F.one_hot(originals, len(TOKENS)).bool()
    return {
        "the original": f"{chances[own].mean():.1%}",
        "another plausible word": f"{(chances * ((guess >= 0.01) & ~own)).sum(-1).mean():.1%}",
        "a word with p_T < 1 %": f"{(chances * ((guess < 0.01) & ~own)).sum(-1).mean():.1%}",
        "KL(teacher ‖ tutor)": f"{(guess * (guess.clamp(min=1e-30).log() - chances.clamp(min=1e-30).log())).sum(-1).mean():.3f}",
    }


rows = {"at the start, as the teacher": described(guess, guess, originals)}
rows |= {name: described(tutor_chances(who, batch), guess, originals) for name, (who, _) in LIVE.items()}
pd.DataFrame(rows).T

# %% mystnb={"image": {"alt": "Bars: the probabilities of a handful of words at one place of a sentence, for the teacher and for the tutors of the two runs. The tutor at the released weight hardly differs from the teacher; the freer tutor differs more."}, "figure": {"name": "fig-tutor-draws", "caption": "the [doctor] was not aided by the dog: what the tutors of the two live runs would draw in the place of the bracket, beside the teacher's guess, with which they began."}}
one = {"input_ids": shown, "masked": at, "attention_mask": real[:1]}
bars = {"teacher": earned["p_T on X^M"]}
for name, (who, _) in LIVE.items():
    bars[name] = pd.Series(tutor_chances(who, one)[0].numpy(), index=TOKENS)
bars = pd.DataFrame(bars).loc[earned.index]
gained = (bars["β = 0.1"] - bars["teacher"]).nlargest(3).index
chosen = list(dict.fromkeys(["doctor", *earned["p_T on X^M"].nlargest(6).index, *gained]))
figure, axes = plt.subplots(figsize=(6.4, 2.5))
for number, name in enumerate(bars):
    axes.bar(np.arange(len(chosen)) + 0.27 * (number - 1), bars.loc[chosen, name], 0.27, label=name)
axes.set_xticks(range(len(chosen)), chosen, rotation=30)
axes.set(ylabel="probability")
axes.legend(frameon=False)
plt.show()

# %%
rows = {}
for name in list(bars)[1:]:
    gain = bars[name] - bars["teacher"]
    for word in [*gain.nlargest(2).index, gain.idxmin()]:
        rows[name, word] = {"gained": f"{gain[word]:+.3f}", "r_T": f"{earned.loc[word, 'r_T']:+.2f}"}
pd.DataFrame(rows).T

# %% [markdown]
# Did the words gain that are paid well? One example decides nothing, so we go back to the forty places of above, where the reward of every word is known.


# %%
def gains_of(who):
    """What a tutor gives every surveyed word beyond the teacher's guess, in the order of the survey."""
    gains = []
    for words, place in some_places():
        where = (torch.arange(len(words)) == place).unsqueeze(0)
        one = {"input_ids": words.unsqueeze(0), "masked": where, "attention_mask": torch.ones_like(where).long()}
        gains.append(np.delete(tutor_chances(who, one)[0].numpy(), SPECIAL))
    return np.concatenate(gains) - surveyed["p_T on X^M"].to_numpy()


places, rows = surveyed["sentence"].nunique(), {}
for name, (who, _) in LIVE.items():
    frame = surveyed.assign(gain=gains_of(who))
    risen, better = frame[frame["gain"] > 0], (frame["gain"] * frame["r_T"]).sum() / places
    paid = risen.loc[risen["r_T"] > 0, "gain"].sum() / risen["gain"].sum()
    together = frame.groupby("sentence").apply(
        lambda f: stats.spearmanr(f["gain"], f["r_T"]).statistic, include_groups=False
    )
    print(
        f"{name}: {risen['gain'].sum() / places:.1%} of the probability moved; the expected r_T changed by {better:+.3f}"
    )
    print(
        f"  {paid:.0%} of what moved went to words with r_T > 0; rank correlation of gain and r_T {together.median():+.2f}"
    )
    rows[f"gained at {name}"] = {kind: f"{part.sum() / places:+.2%}" for kind, part in frame.groupby("kind")["gain"]}
assert better > 0 and paid < 0.5 and abs(together.median()) < 0.3, "the text below is about the second run"
pd.DataFrame(rows)

# %% [markdown]
# At the released weight, a hundred steps leave the tutor close to its teacher: it draws what the teacher guesses. With a tenth of the weight it goes further, and in expectation its words then earn a little
# more of $r_T$, as they should. But most of the probability that moved went to words that $r_T$ does not pay, and whether a word gained has little to do with what it earns. That is what one draw
# at each place and no baseline lead one to expect: chapter 8 measures how noisy such a gradient is. Towards nonsense the tutor has gone by the small share in the
# table. This is one run of one seed at each weight, too short to show where a tutor would end.
#
# Where would the rewards lead it, if it followed them all the way? Here are their means over all words of some places, for the student before and after the run at $\beta = 1$.

# %%
taught = copy.deepcopy(LIVE["β = 1, as released"][0].cast.student.module).double()
after = survey(taught, count=15)
before = surveyed[surveyed["sentence"] < 15]
table = pd.DataFrame({"r_T": after["r_T"], "r_S before": before["r_S"].to_numpy(), "r_S after": after["r_S"]})
table = table.assign(kind=after["kind"]).groupby("kind").mean()
assert (table[["r_T", "r_S after"]].idxmax() == "a word with p_T < 1 %").all()
said = after["a^S"]
print(f"the student's answers after the run: {said.mean():.2f} ± {said.std():.2f} over all words")
table.round(2)

# %% [markdown]
# To nonsense, both of them. A student that has learned to call everything plausible, because nearly everything that it was shown is, is wrong about nonsense by almost one. So nonsense is also "hard for the student".
# The two rewards are not opposites between which the tutor must find a balance: both pay for words that cannot stand there, and both pay little for a plausible one.
#
# ### A case study
#
# The counterpart of the paper's Table 6, with sentences that nobody chose: the first masked position of each of eight held-out sentences, the tutor of the first run.


# %%
@torch.no_grad()
def cases(who, batch, seed=0):
    """At every masked position: the words around it, the original, the draw, and the teacher's predictions."""
    words, masked, attended = batch["input_ids"], batch["masked"], batch["attention_mask"]
    chances = tutor_chances(who, batch)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    masked_guess = logits_at(teacher, words.masked_fill(masked, MASK), attended, masked).argmax(-1)
    filled_guess = logits_at(teacher, words.masked_scatter(masked, drawn), attended, masked).argmax(-1)
    rows = []
    for number, (row, place) in enumerate(masked.nonzero().tolist()):
        pieces = [TOKENS[i] for i, real in zip(words[row], attended[row], strict=True) if real]
        pieces[place] = f"[{pieces[place]}]"
        names = [TOKENS[t[number]] for t in (words[masked], masked_guess, drawn, filled_guess)]
        rows.append([row, " ".join(pieces[1:-1]), *names])
    return pd.DataFrame(rows, columns=["row", "sentence", "original", "KD: [MASK] →", "tutor drew", "Tutor-KD: →"])


who = LIVE["β = 1, as released"][0]
found = cases(who, masked_batch(range(256)))
found.drop_duplicates("row").head(8).drop(columns=["row", "original"]).set_index("sentence")

# %%
right, drew_it = found["Tutor-KD: →"] == found["original"], found["tutor drew"] == found["original"]
print(f"the teacher predicts the original at {(found['KD: [MASK] →'] == found['original']).mean():.0%} of the masks,")
print(
    f"at {right.mean():.0%} of the filled positions: {right[drew_it].mean():.0%} where the tutor drew it ({drew_it.mean():.0%} of them)"
)
print(f"and {right[~drew_it].mean():.0%} where it drew another word")

# %% [markdown]
# "Easy for the teacher" is here mostly "already there". A teacher reads the original off the sentence when it stands in it; where another plausible word stands, it believes that one. The
# paper's third example, which it marks as a failure, is such a word: *guest* for *linguist*.
#
# ## Many runs
#
# What follows is read from records. In each of the ways below a student is distilled on the mini-corpus, then fine-tuned on a part of `mini-sst2` and, from the same start, on a part of `mini-mnli`. A way
# is run with several seeds; seed by seed, all ways share initial weights, text and masks. So differences are taken within a seed. The learning rate of the fine-tuning is
# one for all. That of the distillation was chosen for each method; the variants of Tutor-KD take its. Both are the best on the validation splits, with three seeds of their own.
#
# A sentence that occurs in a task's validation or test split is kept out of the corpus. `mini-mnli` has few different sentences, so little of its language is
# left there; what its scores could gain from the text would be mostly grammar.

# %%
# NBVAL_CHECK_OUTPUT
ROOT = Path(runs.__file__).resolve().parents[1]
found = [json.loads(path.read_text()) for path in sorted((ROOT / "data/runs/09_tutor_kd").glob("*-seed*.json"))]
RECORDS = {(record["way"], record["seed"]): record for record in found}
WAYS = list(dict.fromkeys(way for way, _ in RECORDS))
SEEDS = [seed for seed in range(100) if all((way, seed) in RECORDS for way in WAYS)]
TASKS = list(found[0]["scores"])
BOTH = "both tasks"
STRATEGIES = ("tutor-kd", "no reward", "reverse", "hard for both", "easy for both")


def score(way, task=BOTH):
    """Test accuracy in per cent, by seed; the mean over the tasks if none is named."""
    values = {seed: RECORDS[way, seed]["scores"] for seed in SEEDS}
    return pd.Series({s: 100 * (np.mean(list(v.values())) if task == BOTH else v[task]) for s, v in values.items()})


def curve(way, column):
    """A column of the distillation's history, shape (seeds, evaluations), and the steps."""
    histories = [pd.DataFrame(RECORDS[way, seed]["history"]) for seed in SEEDS]
    return histories[0]["step"].to_numpy(), np.stack([history[column].to_numpy() for history in histories])


print(
    f"{len(WAYS)} ways, {len(SEEDS)} seeds each; {RECORDS['tutor-kd', SEEDS[0]]['config']['steps']} steps of distillation"
)
tried = 100 * book.choices("09_tutor_kd").pivot_table(index=["tuned", "way"], columns="rate", values="mean")
print("validation accuracy (%), mean of both tasks and three seeds, by the learning rate of the distillation;")
print(f"a student that is not distilled has {tried.loc['fine-tuning', 'no distillation'].max():.1f} %")
tried = tried.loc["distillation"]
at_edge, too_high = tried.idxmax(axis=1) == tried.columns[0], tried.max(axis=1) - tried.loc[:, 1e-3:].max(axis=1)
print(f"best at the smallest rate of all: {', '.join(tried.index[at_edge])}")
print(f"with no rate below 0.001 they would lose, in points: {too_high.round(1).to_dict()}")
tried.round(1)

# %% [markdown]
# The ways that are at their best at the smallest rate change the student least there, and a smaller one might do them still better. The grid matters to the comparison: had it begun at $10^{-3}$, most rivals of Tutor-KD
# would have looked worse than they are, and Tutor-KD itself would not.
#
# ### Is the text easy and hard?
#
# The counterpart of the paper's Figure 3a. On held-out sentences: the teacher's loss in finding the original word again in what the tutor filled in, and how far the student is from $a^T$, which is $r_S$. (The
# student's loss itself would mislead: its floor depends on the words that are drawn.) A claim *holds* where the 95 % interval of the paired differences lies above zero, *fails* where it lies below, and is
# *open* otherwise; each line for itself.

# %% mystnb={"image": {"alt": "Two panels over the steps of the distillation with a line and a band for Tutor-KD and each of four other strategies. Left, the teacher's loss on the filled sentences; right, the student's distance from its target."}, "figure": {"name": "fig-tutor-curves", "caption": "The counterpart of Tutor-KD's Figure 3a, on held-out sentences: mean and one standard deviation over seeds. Left, the teacher's cross entropy for the original words on the filled sentences; right, the student's reward to the tutor."}}
figure, panels = plt.subplots(1, 2, figsize=(5.8, 2.5))
for number, way in enumerate(STRATEGIES):
    for axes, column in zip(panels, ("validation/teacher_nll", "validation/student_reward"), strict=True):
        steps, values = curve(way, column)
        plots.band(axes, steps, values, label=way, color=f"C{number}")
panels[0].set(xlabel="step", ylabel="teacher's loss (nats)")
panels[1].set(xlabel="step", ylabel="student's error $r_S$", ylim=0)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()


# %%
COLUMNS = ["gain", "95 % interval", "seeds in favour", "verdict"]


def row_of(ours, theirs, digits=1, margin=0.0):
    """What values by seed say of the gain of ours over theirs: a row of a table."""
    found, number = paired(ours, theirs), f"+.{digits}f"
    word, favour = verdict(found, margin), f"{(ours > theirs).sum()} of {found.seeds}"
    word = word if margin else {"better": "holds", "worse": "fails"}.get(word, word)
    return [
        f"{found.mean:{number}} ± {found.std:.{digits}f}",
        f"{found.low:{number}} to {found.high:{number}}",
        favour,
        word,
    ]


def at_the_end(way, column):
    """The last evaluation of a run, by seed."""
    return pd.Series(curve(way, f"validation/{column}")[1][:, -1], index=SEEDS)


def text_claims():
    """What the paper says of the tutor's text, as pairs of which the first is to be the larger."""
    ends = {way: {c: at_the_end(way, c) for c in ("teacher_nll", "student_reward")} for way in STRATEGIES}
    ours, plain, turned = ends["tutor-kd"], ends["no reward"], ends["reverse"]
    return {
        "easier for the teacher than without reward": (plain["teacher_nll"], ours["teacher_nll"]),
        "harder for the student than without reward": (ours["student_reward"], plain["student_reward"]),
        "easier for the teacher than reverse": (turned["teacher_nll"], ours["teacher_nll"]),
        "harder for the student than reverse": (ours["student_reward"], turned["student_reward"]),
    }


# %%
# NBVAL_CHECK_OUTPUT
print("gains in nats of the teacher's loss and in r_S, at the end of the distillation")
rows = {claim: row_of(*pair, 3) for claim, pair in text_claims().items()}
of_the_text = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
easier, harder = "easier for the teacher than without reward", "harder for the student than without reward"
expect(of_the_text["verdict"], {easier: "open", harder: "holds"})
of_the_text

# %% [markdown]
# The rewards make the text a little harder for the student. That they make it easier for the teacher, these seeds cannot tell.

# %%
# NBVAL_CHECK_OUTPUT
ends = {way: {c: at_the_end(way, c) for c in ("teacher_reward", "copied", "student_nll")} for way in STRATEGIES}
table = {w: {c: f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for c, v in row.items()} for w, row in ends.items()}
pd.DataFrame(table).T.rename(columns={"teacher_reward": "r_T", "copied": "original drawn", "student_nll": "L_logit"})

# %% [markdown]
# ### Does the student learn more?
#
# First the question before all others: is a student that was distilled on the text better than one that was not? Gains are in points of test accuracy, for every way and each of the two tasks. The words are those of {doc}`01_distillation`: *better*,
# *worse*, *equal* within half a point, a margin that was fixed after the runs, or *open*.

# %% mystnb={"image": {"alt": "A forest plot in two panels, one for each task, with sixteen ways to distil: gain in test accuracy over a student that was not distilled, its interval and its verdict."}, "figure": {"name": "fig-tutor-scores", "caption": "Gain in test accuracy over the student that is fine-tuned from random weights, with 95 % intervals over paired seeds and the verdict of each alone; the margin of equality is grey; the counterpart of Figure 3b and, at our size, of Tables 1 to 5."}}
NOTHING = "no distillation"
ways = [way for way in WAYS if way != NOTHING]
ways.sort(key=lambda way: score(way).mean())
MARGIN = 0.5  # points within which two ways count as equal
over_nothing = {task: {way: paired(score(way, task), score(NOTHING, task)) for way in reversed(ways)} for task in TASKS}
figure, panels = plt.subplots(1, 2, figsize=(6.4, 3.9), sharey=True)
for axes, (task, gains) in zip(panels, over_nothing.items(), strict=True):
    plots.forest(axes, gains, MARGIN)
    axes.set(xlabel=f"gain on {task} (points)")
plt.show()

# %%
CLAIMS = {
    "Table 3, rewards": [("tutor-kd", "without r_T"), ("tutor-kd", "without r_S"), ("tutor-kd", "no reward")],
    "Table 4, modification": [
        ("tutor-kd", "without modification"),
        ("without modification", "without modification and tutor"),
        ("tutor-kd", "without modification and tutor"),
    ],
    "Table 5, λ": [("tutor-kd", "lambda 0.25"), ("tutor-kd", "lambda 0.75")],
    "Figure 3b, strategies": [("tutor-kd", "reverse"), ("tutor-kd", "hard for both"), ("tutor-kd", "easy for both")],
    "Tables 1 and 2, methods": [
        ("tutor-kd", rival) for rival in ("soft labels", "distilbert", "tinybert", "minilm", "minilm v2")
    ],
    "any distillation": [(way, NOTHING) for way in WAYS if way != NOTHING],
}


def judged(group):
    """A row for each claim of a group: gains on each task, and everything that `row_of` says of their mean."""
    rows = {}
    for first, second in CLAIMS[group]:
        each = {task: f"{(score(first, task) - score(second, task)).mean():+.1f}" for task in TASKS}
        whole = dict(zip(COLUMNS, row_of(score(first), score(second), margin=MARGIN), strict=True))
        rows[f"{first} over {second}"] = each | whole
    return pd.DataFrame(rows).T


# %%
# NBVAL_CHECK_OUTPUT
at_all = judged("any distillation")
ends = [gain for gains in over_nothing.values() for gain in gains.values()]
print(f"of {len(ends)} gains in the figure {sum(gain.mean <= 0 for gain in ends)} are at or below zero;", end=" ")
print(
    f"{sum(gain.high < 0 for gain in ends)} whole intervals lie below zero, {sum(gain.low > 0 for gain in ends)} above"
)
best_way = max(ways, key=lambda way: score(way).mean())
counts = at_all["verdict"].value_counts()
print(f"in the mean of both tasks {', '.join(f'{n} ways: {word}' for word, n in counts.items())};", end=" ")
print(f"the best, {best_way}: {at_all.loc[f'{best_way} over {NOTHING}', 'gain']}")
print(f"of {len(at_all)} intervals {0.025 * len(at_all):.1f} would lie below zero by chance, and as many above")
assert not any(gain.low > 0 for gain in ends) and "better" not in set(at_all["verdict"])
expect(at_all["verdict"], {f"tutor-kd over {NOTHING}": "open", f"soft labels over {NOTHING}": "worse"})
at_all

# %% [markdown]
# In this world, distilling a student on text before its task does not help, whatever the method. Of no way can these seeds see that it is better than none, nearly all point estimates are below zero, and
# soft labels, the plainest way of all, do harm. Why, the records do not say. The distillation is short, the fine-tuning may have labels enough of its own, and little of the language of `mini-mnli` is in the text.
#
# That settles what the comparisons below are worth. They are between treatments of which none has been seen to beat no treatment, so they do not rank methods of distillation: at best they say which one
# does less harm. The paper's claims follow one by one all the same, so that one can see how far such numbers go. A verdict of "open" is not a "no": it says that the interval holds zero and more than counts.

# %%
# NBVAL_CHECK_OUTPUT
judged("Table 3, rewards")

# %%
# NBVAL_CHECK_OUTPUT
judged("Table 4, modification")

# %%
# NBVAL_CHECK_OUTPUT
judged("Table 5, λ")

# %% [markdown]
# $\lambda = 0$ and $\lambda = 1$ are the rows "without $r_T$" and "without $r_S$" of the counterpart of Table 3: the same runs, so they are not made twice.

# %%
# NBVAL_CHECK_OUTPUT
judged("Figure 3b, strategies")

# %%
# NBVAL_CHECK_OUTPUT
judged("Tables 1 and 2, methods")

# %%
# NBVAL_CHECK_OUTPUT
rows = {
    way: {task: f"{score(way, task).mean():.1f} ± {score(way, task).std():.1f}" for task in TASKS} for way in ways[::-1]
}
rows[NOTHING] = {task: f"{score(NOTHING, task).mean():.1f} ± {score(NOTHING, task).std():.1f}" for task in TASKS}
pd.DataFrame(rows).T

# %%
# NBVAL_CHECK_OUTPUT
every_claim = [judged(group)["verdict"] for group in CLAIMS if group != "any distillation"]
words_of = pd.concat(every_claim).value_counts()
print("of the paper's claims about scores, these seeds say:", ", ".join(f"{n} {word}" for word, n in words_of.items()))
print(f"of {len(pd.concat(every_claim))} intervals, {0.05 * len(pd.concat(every_claim)):.1f} would miss zero by chance")
smallest = np.median([paired(score(a), score(b)).half_width for pairs in CLAIMS.values() for a, b in pairs])
print(
    f"an interval reaches {smallest:.1f} points to either side (median): smaller gains are not seen with {len(SEEDS)} seeds"
)

# %% [markdown]
# ## Paper, code, exact
#
# | what | the paper says | its released code does | exact |
# |---|---|---|---|
# | $a^S$, eq. (10) | $\sigma(p_S(x'_t \mid X'))$, a sigmoid of a probability | a sigmoid of a head with one output (`model/__main__module.py` 49, 85; `distillation.py` 212) | the head; {doc}`08_policy_gradient` measures the difference |
# | attention mask in distillation | says nothing | inverted: padding is read, words are not (`distillation.py` 170-172, 176); correct in fine-tuning (`train_glue.py` 143, 289) | 1 for words |
# | attention, eq. (13) | distributions | scores before the softmax, mask added (`model/bert_layers.py` 140, 161) | as printed |
# | hidden states | a layer | mean over all positions, padding too (`model/__main__module.py` 76-80; `distillation.py` 214) | over tokens |
# | positions of $L_{\text{logit}}$ | the masked ones | all positions, with the target 1 where nothing was masked (`sampling.py` 11, 24; `distillation.py` 222) | the masked ones, or `everywhere=True` |
# | the tutor's gradient | REINFORCE, no baseline | the same (`distillation.py` 219-220) | any baseline that has not seen the draw: `baseline="running mean"` |
# | Spearman's correlation on STS-B | of the validation split | mean over batches of each batch's (`train_glue.py` 148, 157) | of the split |
# | Table 3, "w/o $R_T$", and Table 5, $\lambda = 0$ | printed with different numbers | | one run |
#
# Files and lines are those of JunhoKim94/TutorKD at commit 401d17e.
#
# Four of them can be measured here. First the mask. We take the released convention with the constant of its time, $-10^4$ added to what is not to be read. A row without padding then has the constant
# on every key, and nothing changes; a row with padding reads nothing but padding.


# %%
# NBVAL_CHECK_OUTPUT
@torch.no_grad()
def guessed_right(batch, inverted):
    """Whether the teacher finds each masked word, and whether its row is padded; shape (positions,) each."""
    words, masked, attended = batch["input_ids"], batch["masked"], batch["attention_mask"]
    unread = attended if inverted else 1 - attended
    added = -1e4 * unread[:, None, None, :].double()
    found = logits_at(teacher, words.masked_fill(masked, MASK), added, masked).argmax(-1)
    return found == words[masked], (attended == 0).any(-1)[masked.nonzero()[:, 0]]


for inverted in (False, True):
    parts = [guessed_right(masked_batch(range(64 * i, 64 * i + 64), i), inverted) for i in range(6)]
    hit, padded = (torch.cat(part).double() for part in zip(*parts, strict=True))
    rows = {name: hit[padded == flag].mean() for name, flag in (("padded", 1), ("unpadded", 0))}
    print(f"{'inverted' if inverted else 'right':>8} mask: ", end="")
    print(", ".join(f"{value:.0%} of the masked words found in {name} rows" for name, value in rows.items()))
print(f"{padded.mean():.0%} of the positions are in padded rows, in batches of 64 in random order")

# %% [markdown]
# In padded rows the teacher cannot see the sentence. There a line of text is padded unless it is the longest of its batch, or has more than 128 tokens and is cut (`dataloader.py` 79-90), and the released baselines
# use the same mask (`baseline.py` 139-141). What the published numbers would be without it nobody knows.
#
# Second, the labels at all positions. They make most of the loss a matter of knowing that what was not touched is right:

# %%
# NBVAL_CHECK_OUTPUT
ordinary = attended.bool() & ~torch.isin(words, torch.tensor(SPECIAL))
share = masked.sum() / attended.numel()
for name, part in {
    "masked words only": 1.0,
    "all words": masked.sum() / ordinary.sum(),
    "all positions": share,
}.items():
    mean, least = 1 - part * (1 - constant), part * floor
    print(
        f"{name}: always the same answer {entropy(torch.as_tensor(mean)):.3f} nats, perfect {least:.3f}; a position counts {part:.0%}"
    )

# %% [markdown]
# Averaged over all positions, a masked word's share in the gradient shrinks to the last number. Since $\lambda_1 = 25$ stands in front, this is also a change of the weights.
#
# Third, Spearman's correlation. The mean over batches is another number than the correlation of the split, and it depends on the batch size. The scores of `mini-stsb` as labels, and predictions that are
# the scores plus noise:


# %%
# NBVAL_CHECK_OUTPUT
def by_batches(predictions, labels, size, seed):
    """The released metric: the mean of the batches' rank correlations, in a random order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return np.mean([stats.spearmanr(predictions[b], labels[b]).statistic for b in batches if len(b) == size])


labels = np.array(glue.load("miniglue", "mini-stsb").test["test"]["label"])[:960]
predictions = labels + np.random.default_rng(0).normal(0, labels.std(), len(labels))
whole = stats.spearmanr(predictions, labels).statistic
print(f"the whole split: {whole:.4f}")
for size in (4, 8, 32, 120):
    values = np.array([by_batches(predictions, labels, size, seed) for seed in range(5)])
    print(f"batches of {size}: {values.mean():.4f} ± {values.std(ddof=1):.4f} over five orders")

# %% [markdown]
# **Exercise 3** (hard, 20 minutes). How far off is it? Let the pairs be drawn from a normal distribution with correlation $\rho$. Spearman's correlation of $n$ pairs without ties is a sum over triples of points,
# $\frac{3}{n^3 - n} \sum_{i,j,k} \operatorname{sign}(x_i - x_j)\, \operatorname{sign}(y_i - y_k)$. Find its expectation. You need that two normal variables with correlation $c$ have signs whose product
# is on average $\frac 2 \pi \arcsin c$. The check simulates.


# %% tags=["exercise"]
def expected_spearman(rho, size):
    """The mean rank correlation of batches of `size` pairs with correlation rho."""
    return NotImplemented  # two kinds of triples


# %% tags=["check"]
def check_expected_spearman(expected_spearman):
    if untouched(expected_spearman(0.8, 4)):
        return
    generator = torch.Generator().manual_seed(0)
    for rho, size in ((0.9, 2), (0.8, 4), (0.6, 12)):
        x, noise = torch.randn(2, 400_000, size, generator=generator).double()
        y = rho * x + (1 - rho**2) ** 0.5 * noise
        ranks = [values.argsort(-1).argsort(-1).double() - (size - 1) / 2 for values in (x, y)]
        found = (ranks[0] * ranks[1]).sum(-1).mean() * 12 / (size**3 - size)
        torch.testing.assert_close(torch.as_tensor(expected_spearman(rho, size)).double(), found, rtol=0.004, atol=0)
    print("right")


check_expected_spearman(expected_spearman)

# %% [markdown]
# Fourth, the printed tables. "w/o $R_T$" leaves the student's reward alone, and so does $\lambda = 0$; "w/o $R_S$" is $\lambda = 1$.

# %%
# NBVAL_CHECK_OUTPUT
published = pd.read_csv(ROOT / "data/published/tutor_kd.csv", dtype={"value": str})
part = published[published["table"].isin(["tutor-tab3", "tutor-tab4", "tutor-tab5"])]
names = part["method"] + part["setting"].fillna("").radd(" ").where(part["setting"].notna(), "")
printed = part.assign(row=part["table"].str[-4:] + ": " + names, value=part["value"].astype(float))
printed = printed.pivot_table(values="value", index="row", columns="task", sort=False)
twins = {
    "tab3: Tutor-KD without teacher reward": "tab5: Tutor-KD lambda=0.0",
    "tab3: Tutor-KD without student reward": "tab5: Tutor-KD lambda=1.0",
}
for first, second in twins.items():
    apart = (printed.loc[first] - printed.loc[second]).round(1)
    print(f"{first} against {second}: {', '.join(f'{task} {value:+.1f}' for task, value in apart.items())}")
printed

# %% [markdown]
# The two printings of one setting agree to a tenth of a point. If they are one distillation, fine-tuned again, that is how far averages of four fine-tunings move; what a second *distillation* would change, nobody has
# looked at. How far can a difference of two such averages go by the choice of sentences? Both are of the same $n$ sentences. Where a share $d$ of them is answered rightly by one network and wrongly by the other, a single
# pair of networks has a difference with a standard error of $\sqrt{d / n}$ at most. Over $F$ fine-tunings of each it lies between that, if it is always the same sentences, and $\sqrt{d / (n F)}$, if it is others each time.
# The paper does not print $d$; two values that seem possible:

# %%
# NBVAL_CHECK_OUTPUT
SENTENCES, FINE_TUNINGS = {"rte": 277, "qnli": 5463, "mnli": 9815}, 4
drops = printed.loc["tab3: Tutor-KD"] - printed.loc["tab3: Tutor-KD without rewards"]
rows = {}
for task, n in SENTENCES.items():
    rows[task] = {"sentences": n, "gain of both rewards": f"{drops[task]:.1f}"}
    for d in (0.1, 0.2):
        errors = [100 * (d / n / count) ** 0.5 for count in (FINE_TUNINGS, 1)]
        rows[task][f"standard error, d = {d}"] = f"{errors[0]:.1f} to {errors[1]:.1f}"
assert drops.idxmax() == min(SENTENCES, key=SENTENCES.get)
pd.DataFrame(rows).T

# %% [markdown]
# The largest gain of the rewards is on the task with the fewest sentences, and the sentences are only one source of chance: another distillation would be another.
#
# ## What held here
#
# The claims of the paper, those on distillation as such, one of ours (the last), and what the records say. The verdicts are computed from the tables above.


# %%
# NBVAL_CHECK_OUTPUT
def summed_up(group, claims=None):
    """What the verdicts of a group say, in words."""
    words = list(judged(group)["verdict"].iloc[claims] if claims else judged(group)["verdict"])
    return words[0] if len(set(words)) == 1 else ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))


student_nll = at_the_end("tutor-kd", "student_nll")
constant_answer = 0 * student_nll + entropy(constant).item()
rows = [
    ("the tutor's text is easier for the teacher (Figure 3a)", of_the_text.loc[easier, "verdict"]),
    ("and harder for the student (Figure 3a)", of_the_text.loc[harder, "verdict"]),
    ("r_T helps the student (Table 3)", summed_up("Table 3, rewards", [0])),
    ("r_S helps the student (Table 3)", summed_up("Table 3, rewards", [1])),
    ("both rewards help (Table 3)", summed_up("Table 3, rewards", [2])),
    ("the modification helps (Table 4)", summed_up("Table 4, modification", [0])),
    ("the tutor helps without it (Table 4)", summed_up("Table 4, modification", [1])),
    ("λ = 0.5 is best (Table 5)", summed_up("Table 5, λ")),
    ("better than the other strategies (Figure 3b)", summed_up("Figure 3b, strategies")),
    ("better than other methods (Tables 1, 2)", summed_up("Tables 1 and 2, methods")),
    ("distillation helps at all: Tutor-KD", at_all.loc[f"tutor-kd over {NOTHING}", "verdict"]),
    ("distillation helps at all: soft labels", at_all.loc[f"soft labels over {NOTHING}", "verdict"]),
    ("distillation helps at all: each of the ways", summed_up("any distillation")),
    (
        "on held-out text the student's L_logit is below that of a constant answer",
        row_of(constant_answer, student_nll, 3)[3],
    ),
]
pd.DataFrame(rows, columns=["claim", "here"]).set_index("claim")

# %%
moved = abs(paired(*text_claims()[easier]).mean)
level = at_the_end("no reward", "teacher_nll").mean()
print(f"the rewards move the teacher's loss by {moved:.3f} nats of {level:.2f}, that is by {moved / level:.1%}")
strip = entropy(constant) - floor
print(f"and L_logit has {strip:.3f} nats between knowing nothing but a mean and knowing everything")
print(
    f"highest mean score here: {best_way}, {score(best_way).mean():.1f}; Tutor-KD {score('tutor-kd').mean():.1f}; {NOTHING} {score(NOTHING).mean():.1f}"
)

# %% [markdown]
# What can be said of scores: nothing here is a better start than a student that has read no text, so the verdicts above them, decided or not, rank nothing.
#
# What can be said without records: the reward for an easy teacher pays for nonsense, spares copies and fines nearly every plausible alternative; the reward for a hard student pays for nonsense, too, once the student
# has learned that most words are right; what keeps the tutor from it is the KL term, which in the live run at the released weight keeps it close to its teacher; the attention term of eq. (13) has next to no gradient at the printed weight; REINFORCE with
# one draw and no baseline is noisy, as chapter 8 measures. None of that says that Tutor-KD does not work with
# BERT and a million steps. It says that the story told for it, easy and hard, is not what its rewards measure.
#
# What cannot be said: our text comes from grammars with few words, our teacher is four layers deep, and a distillation takes a few hundred steps. Where the table says "open" it may be too few seeds, and where it says
# "worse" or "fails" it may be our size. {doc}`11_pretraining` has the commands for full runs.
#
# ## Summary
#
# | shown | here | in the paper |
# |---|---|---|
# | who asks whom | "Who asks whom" | Figure 1 |
# | what every word would earn | {numref}`fig-tutor-words` | Figure 2 |
# | hidden states and attention, without padding | {eq}`eq-tutor-hidden`, {eq}`eq-tutor-inter` | eqs. (12)-(14) |
# | a step from small parts, with the library's gradients | {eq}`eq-tutor-student`, {eq}`eq-tutor-total` | eqs. (7), (8) |
# | losses of teacher and student under the sampling strategies | {numref}`fig-tutor-curves` | Figure 3a |
# | scores after fine-tuning | {numref}`fig-tutor-scores`, "Does the student learn more?" | Tables 1-5, Figure 3b |
# | eight sentences that nobody chose | "A case study" | Table 6 |
#
# Live in this notebook: everything up to the case study, and what the released code does differently. Read from records: the comparisons of scores and the curves of the many runs.

# %% [markdown]
# ## Solutions
#
# <details><summary>Exercise 1</summary>
#
# A cross entropy is smallest where the two agree, $a^S = a^T$, and there it is the entropy of $a^T / \tau$. With $\tau > 1$ even sure targets have one.
#
# ```python
# def lowest_loss(targets, temperature):
#     a = targets / temperature
#     return -(torch.xlogy(a, a) + torch.xlogy(1 - a, 1 - a)).mean()
# ```
#
# </details>
#
# <details><summary>Exercise 2</summary>
#
# The mean over tokens and units is a sum of squares over a constant, so $W$ solves the normal equations $H^{S\top} H^S W = H^{S\top} H^T$. What is left cannot be learned by $W$, only by the student.
#
# ```python
# def best_projection(ours, theirs):
#     return torch.linalg.lstsq(ours, theirs).solution
# ```
#
# </details>
#
# <details><summary>Exercise 3</summary>
#
# Triples with $j = k \ne i$: there are $n(n-1)$, and both differences share their points, so their correlation is $\rho$. Triples with three different points: $n(n-1)(n-2)$, and only $i$ is shared, so the
# correlation is $\rho/2$. Others are zero. Together $\frac{6}{\pi (n+1)} \bigl[\arcsin \rho + (n - 2) \arcsin \frac \rho 2\bigr]$. For $n = 2$ it is $\frac 2 \pi \arcsin \rho$, for large $n$ it is
# $\frac 6 \pi \arcsin \frac \rho 2$, the split's.
#
# ```python
# def expected_spearman(rho, size):
#     from math import asin, pi
#
#     return 6 / (pi * (size + 1)) * (asin(rho) + (size - 2) * asin(rho / 2))
# ```
#
# </details>
