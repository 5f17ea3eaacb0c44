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
# # Full pretraining runs
#
# **Question.** How do you distil a BERT on plain text, before there is a task, and what is the student worth?
#
# **You need** chapters 1 and 8. **Time:** about a minute as it stands, on the embedded text; hours to weeks with parameters of your own.
#
# Like chapter 12 this is a form to fill in. As it stands, a tutor distils a tiny BERT on the book's own sentences. The student is then
# fine-tuned on a task, beside a twin that was not distilled. From the command line, papermill runs the same notebook on real text with
# real networks. Every name in the next code cell is a parameter:
#
# ```bash
# # a text file of your own, one text a line, and a masked language model in a folder; no network needed
# papermill chapters/11_pretraining.ipynb _build/own.ipynb \
#     -p corpus my_text.txt -p teacher my_bert -p student tutor-5.7m -p method tutor -p steps 20000
#
# # the paper's setting, from the hub, on a GPU; eight hours a day
# papermill chapters/11_pretraining.ipynb _build/paper.ipynb -f configs/tutor_kd_pretraining.yml -p max_seconds 28800
# ```
#
# Start the same command again after an interruption, and the run goes on where it was. A parameter that does not exist stops the
# notebook before any work is done.

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
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from kdlib import book, engine, models, plots, pretraining, runs
from kdlib.classroom import expect

plots.use_style()
names_before = set(globals()) | {"names_before"}

# %% [markdown]
# ## The form
#
# `None` means: choose what suits method and networks. `python -m kdlib describe tutor` explains each parameter of a method in a sentence.

# %% tags=["parameters"]
# What to read
corpus = "mini-corpus"  # embedded; a .txt file, a local folder, or a hub id, several joined by +
column = "text"  # where there are columns
train_split = "train"
validation_split = None  # None: the mini-corpus has one; elsewhere the last blocks are held out
packed = False  # join lines to blocks of max_length
max_length = 128  # word pieces of a block
max_lines = None  # read so many lines only
mask_rate = 0.15

# Who learns from whom
method = "tutor"  # "mlm" (no teacher), "soft_labels", "distilbert", "tinybert", "minilm", "minilm_v2", "untutored"
teacher = None  # a masked language model: "book-mlm", a hub id, a folder
student = None  # "tiny-2x64h4", "tutor-66m", "tutor-14m", "tutor-9m", "tutor-5.7m", a hub id, a folder, or
student_layers = None  # the first layers of the teacher's checkpoint
untrained_teacher = None  # True: a teacher whose head for words was never trained may teach
trained = None  # mlm: "all" or only the "head", for an encoder that comes without one
downstream = "mini-sst2"  # a MiniGLUE task to try the student on; None: none

# How
steps = 300
batch_size = 32
learning_rate = None  # after the warm-up
warmup_ratio = 0.1
weight_decay = 0.01
max_grad_norm = 1.0
temperature = None
seed = 0
evaluate_every = None  # steps; None: ten times
checkpoint_every = None
max_seconds = None  # stop after so long with a checkpoint; the same command goes on
precision = "fp32"  # "bf16" on a GPU
device = "auto"
output_dir = "_runs"
cache_dir = None  # of the tokenised text
resume = True  # go on with an interrupted run, reuse a finished one
log_with = None  # who follows the history while it grows, on this machine: "tensorboard", "trackio", "wandb"

# Tutor-KD: chapters 8 and 9
relation_heads = None  # minilm_v2
attention = None  # tutor, untutored, tinybert: imitate attention, too
logit_weight = None  # tutor, untutored: of eq. (8)
inner_weight = None  # likewise
reward_weight = None  # tutor, from here on: of the teacher's reward, eq. (2)
strategy = None  # "tutor", "reverse", "no reward", "hard for both", "easy for both"
kl_weight = None  # keeps the tutor near its teacher
samples = None  # words drawn for each position
baseline = None  # "none", "running mean" or "leave one out"
imitated = None  # "modified" probabilities, or the whole "distribution"
everywhere = None  # words that were left alone are scored, too
order = None  # steps "together" or "in turns"
tutor_start = None  # "teacher", a copy of its head, or "random"

# %% [markdown]
# papermill writes your values into a cell of their own behind this one. We collect all names that were set in either, so a
# misspelt one is found here.

# %%
# NBVAL_CHECK_OUTPUT
given = {name: value for name, value in globals().items() if name not in names_before and not name.startswith("_")}
downstream = given.pop("downstream")
config = pretraining.configure(**given)
chosen = {name: value for name, value in config.identity.items() if given.get(name) is None}
print("chosen for you:", ", ".join(f"{name} = {value}" for name, value in chosen.items()) or "nothing")

# %% [markdown]
# ## The text
#
# The text is tokenised once and kept; masks are drawn anew for every batch, from the seed and the number of the step. So a run that is
# resumed masks what it would have masked.

# %%
# NBVAL_CHECK_OUTPUT
tokenizer = models.load_tokenizer(config.teacher or config.student)
text, held_out = pretraining.load_corpus(config, tokenizer)
for name in ("lines", "empty", "undecodable", "cut"):
    print(f"{name}: {text.counts[name]:,}", end="   ")
print(
    f"\nblocks to learn from: {len(text.encoded):,}   held out: {len(held_out):,}   word pieces: {text.counts['tokens']:,}"
)
start, end = text.encoded.offsets[:2].tolist()
print("the first block:", tokenizer.decode(text.encoded.input_ids[start:end])[:200])

# %% mystnb={"image": {"alt": "Histogram of the number of word pieces of a block."}, "figure": {"name": "fig-pretraining-lengths", "caption": "How long the blocks are. A batch is padded to its longest block, so blocks of like length are put together."}}
figure, axes = plt.subplots(figsize=(4.2, 2.0))
lengths, blocks = text.encoded.lengths.unique(return_counts=True)
axes.bar(lengths, blocks, width=1.0)
axes.set(xlabel="word pieces of a block", ylabel="blocks")
plt.show()

# %% [markdown]
# Long blocks cost more than short ones, attention most of all. Lines that were cut lose their ends; raise `max_length` if there are many.
#
# ## The student learns


# %%
def summary(record):
    """One line on a finished run."""
    scores = ", ".join(f"{name} {value:.3f}" for name, value in record.metrics.items())
    return f"{record.parameters / 1e6:.2f} M parameters, {record.seconds:.0f} s of training, step {record.best_step}: {scores}"


record = pretraining.run(config)
print(summary(record))

# %% [markdown]
# The parameters are the encoder's. There is no best step: nothing is selected, and the last weights are kept.

# %% mystnb={"image": {"alt": "The student's loss against the step, in training and on the held-out text."}, "figure": {"name": "fig-pretraining-loss", "caption": "What the method minimises, in training and on the held-out blocks, which always have the same masks."}}
history = record.history_frame
figure, axes = plt.subplots()
axes.plot(history["step"], history["train_loss"], marker="o", label="in training, since the last point")
axes.plot(history["step"], history["validation/loss"], marker="s", label="held out")
axes.set(xlabel="step", ylabel=f"loss of the student, {config.method}")
axes.legend()
plt.show()

# %% [markdown]
# Losses of different methods are different things, and cannot be compared. With a tutor not even two points of one curve are quite
# the same thing: the tutor moves, and with it the words that the student is asked about, so the loss may rise while the student learns.
#
# A tutor is paid for two things: r_T, how much more probable the original word is to the teacher than the drawn one, on the filled
# sentence, and r_S, how wrong the student is about the drawn one.

# %% mystnb={"image": {"alt": "Rewards of the tutor and share of copied words against the step, on the held-out text; an empty picture for other methods."}, "figure": {"name": "fig-pretraining-rewards", "caption": "On the held-out blocks: the two rewards, and how often the tutor draws the original word. Empty for a method without a tutor."}}
SHOWN = {"teacher_reward": "r_T, teacher", "student_reward": "r_S, student", "copied": "original word drawn"}
figure, axes = plt.subplots()
for name, label in SHOWN.items():
    if f"validation/{name}" in history:
        axes.plot(history["step"], history[f"validation/{name}"], marker="o", label=label)
axes.set(xlabel="step", ylabel="mean over masked positions")
if axes.lines:
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
# Where r_S falls, the student has learned to judge what the tutor draws. Where the tutor draws the original word r_T is zero; where the
# teacher likes the drawn word better, it is negative. The numbers at every evaluation; the two `nll` are the teacher's loss on the original words
# of the filled sentences and the student's on what it imitates:

# %%
table = history[["step", *(name for name in history if name.startswith("validation/"))]]
table.rename(columns=lambda name: name.removeprefix("validation/")).round(3)

# %% [markdown]
# ## What it is worth
#
# A student is judged by what it learns next. We fine-tune it on a task, and beside it a twin: the same network with the same first
# weights, which has not been distilled.


# %%
def untaught(config, folder):
    """The network that the student began as, in a folder of its own."""
    if config.student_layers is None:
        network = models.load_masked(config.student, tokenizer, config.seed)
    else:
        whole = models.load_masked(config.teacher, tokenizer, config.seed)
        network = models.first_layers(whole, config.student_layers, config.seed)
    engine.save_pretrained(network.base_model, tokenizer, folder)
    return str(folder)


tuned = {}
if downstream is not None:
    small = models.is_small(config.student or config.teacher)
    settings = {"task": downstream, "method": "fine_tune", "epochs": 4, "max_train": 2000, "seed": config.seed}
    settings |= {"learning_rate": 2e-3 if small else 5e-5, "predict_test": False}
    settings |= {"device": config.device, "output_dir": config.output_dir}
    students = {
        "distilled": str(record.folder / "student"),
        "not distilled": untaught(config, record.folder / "untaught"),
    }
    tuned = {name: runs.run(runs.configure(**settings, student=student)) for name, student in students.items()}
    metric = next(iter(next(iter(tuned.values())).metrics)).replace("validation/", "test/")
    scores = {name: run.metrics[metric] for name, run in tuned.items()}
    for name, score in scores.items():
        print(f"{downstream}, {metric}: {score:.3f} {name}")
    gain = scores["distilled"] - scores["not distilled"]
    print(f"Distilling first makes a difference of {gain:+.3f}, with one seed.")
else:
    print("no task was asked for")

# %% [markdown]
# One seed is one draw. Chapter 9 shows the same comparison over several seeds, and against the other methods.
#
# ## What is left behind
#
# The run's folder holds the record, the tutor's weights and the student, which needs no kdlib any more. It is a masked language model where
# the method has trained its head, and a bare encoder elsewhere.

# %%
for path in sorted(record.folder.glob("[!.]*")):
    print(path.name + ("/" if path.is_dir() else ""))
print("\nthe record holds:", ", ".join(name for name in vars(record) if name != "folder"))
print("of the text:", ", ".join(f"{name} {count:,}" for name, count in record.samples.items()))

# %% [markdown]
# `pretraining.configure(**record.config)` gives the configuration back, and `pretraining.run` of that does nothing, because it is done.
#
# **To go on after an interruption**, start the same command again. A run that is killed loses what it did since its last checkpoint; Ctrl-C
# and `max_seconds` save first. Weights, both optimisers, the random state, the tutor's running mean and the place in the text are
# in the checkpoint, and the run ends as it would have, bit for bit on the same machine.
#
# **To go on with a task**, give the student's folder to chapter 12:
#
# ```bash
# papermill chapters/12_glue.ipynb _build/sst2.ipynb -p source nyu-mll/glue -p task sst2 \
#     -p method fine_tune -p student _runs/RUN/student
# ```
#
# ## The paper's way to GLUE
#
# Tutor-KD section 4.2: batches of 32, 5 epochs, 10 for CoLA, MRPC and RTE; four learning rates, the best one is chosen on the development
# set; the mean of four runs is reported. Metrics are computed over the whole split, not averaged over batches. The rate is chosen on
# the split that is reported, so the numbers are a little optimistic, the paper's as well as ours. What the paper does not say is whether the
# best epoch is kept; here `evaluate_every` decides, and the last weights count if it is as long as the training.

# %%
# NBVAL_CHECK_OUTPUT
RATES, SEEDS, LONG = (2e-5, 3e-5, 4e-5, 5e-5), range(4), ("cola", "mrpc", "rte")
TASKS = ("mnli", "qnli", "qqp", "sst2", "cola", "stsb", "mrpc", "rte")


def glue_runs(student, task, source="nyu-mll/glue", **settings):
    """The fine-tuning runs of the paper's protocol for one task: every rate with every seed."""
    epochs = 10 if task in LONG else 5
    settings = {"source": source, "method": "fine_tune", "epochs": epochs, "batch_size": 32, **settings}
    return [
        runs.configure(task=task, student=student, learning_rate=rate, seed=seed, **settings)
        for rate in RATES
        for seed in SEEDS
    ]


def best_rate(records, metric):
    """The mean score over seeds of each learning rate, and the rate whose mean is the highest."""
    scores = pd.DataFrame([{"rate": r.config["learning_rate"], "score": r.metrics[metric]} for r in records])
    means = scores.groupby("rate")["score"].mean()
    return means, means.idxmax()


planned = {task: glue_runs(str(record.folder / "student"), task) for task in TASKS}
total = sum(len(each) for each in planned.values())
epochs = sum(config.epochs for each in planned.values() for config in each)
print(f"{len(TASKS)} tasks, {len(RATES)} rates, {len(SEEDS)} seeds: {total} runs of {epochs} epochs in all")
# records = [runs.run(each) for each in planned["rte"]]; best_rate(records, "validation/accuracy")

# %% [markdown]
# ## What we measured
#
# Whatever the form says, this section shows the same runs, *read* from `data/runs/11_pretraining`. MiniLM comes as a network for whole sentences, without
# a head for masked words, so it was first trained as a masked language model, all of it; then it teaches the paper's smallest student on sentences from Wikipedia, for a short time. Each student is then fine-tuned on a small part of
# SST-2, and so is one that was not distilled. The command below makes the records again, and can be stopped and resumed:
#
# ```bash
# python -m kdlib study experiments/11_pretraining.yml --data wikisplit=../corpus/wikisplit nyu-mll/glue=../glue
# ```


# %%
# NBVAL_CHECK_OUTPUT
def recorded():
    """The records of this chapter, none where there are none yet."""
    try:
        return book.read_records("11_pretraining")
    except FileNotFoundError:
        return []


found = recorded()
rows = [
    {
        "record": r.run_id,
        "method": r.config["method"],
        "student": r.config["student"],
        "text": r.config["corpus"],
        "blocks": r.samples["train"],
        "steps": r.config["steps"],
        "passes": r.config["steps"] * r.config["batch_size"] / r.samples["train"],
        "minutes": r.seconds / 60,
        "held-out loss": r.metrics["validation/loss"],
    }
    for r in found
    if "corpus" in r.config  # the others were fine-tuned only
]
print(f"{len(found)} records, {len(rows)} of them of pretraining")
pd.DataFrame(rows).round(2)

# %% [markdown]
# A loss can be compared with that of another seed of the same method, not with another method's. What the students reach on the task can be
# compared: mean over seeds, in per cent.

# %%
# NBVAL_CHECK_OUTPUT
rows = [
    {
        "task": name.split("/")[0],
        "student learned from": r.config["method"] if "corpus" in r.config else "nothing before the task",
        "metric": name.split("/")[1],
        "score": 100 * value,
    }
    for r in found
    for name, value in r.metrics.items()
    if name.split("/")[0] in TASKS
]
table = pd.DataFrame(rows, columns=["task", "student learned from", "metric", "score"])
table = table.groupby(["task", "metric", "student learned from"])["score"]
table.agg(mean="mean", std="std", seeds="count").round(1).reset_index()

# %%
# NBVAL_CHECK_OUTPUT
for environment in sorted(
    {(r.environment["processor"], r.environment["device"], r.environment["threads"]) for r in found}
):
    print("on: {}, device {}, threads {}".format(*environment))
print("precision:", ", ".join(sorted({r.config["precision"] for r in found})) or "nothing on record yet")

# %% [markdown]
# Is one start better than another? The study file states the claims: paired differences by seed with their 95 % intervals, and one verdict for all claims
# together (Holm's correction, {doc}`05_pilot_updates`), "equal" within half a point, a margin that was fixed after the runs.

# %%
# NBVAL_CHECK_OUTPUT
claims = book.study("11_pretraining").verdicts()
interval = (100 * claims[["low", "high"]]).map("{:+.1f}".format).agg(" to ".join, axis=1)
expect(claims["verdict"], "open")
said = {"points": (100 * claims["mean"]).map("{:+.1f}".format), "95 % interval": interval}
pd.DataFrame({**said, "seeds": claims["seeds"], "verdict": claims["verdict"]})

# %% [markdown]
# All three are open: three seeds cannot tell a student that was distilled from one that was not. The scores are those of the validation split, which
# selected nothing here: there is one evaluation, at the end. The paper's students see Wikipedia and BookCorpus for a million
# steps and fine-tune on whole tasks, so its numbers, below, are not comparable.

# %%
# NBVAL_CHECK_OUTPUT
printed = book.published()
printed = printed[(printed["table"] == "tutor-tab2") & printed["task"].isin(["sst2", "mrpc", "rte"])]
printed.pivot_table(index=["student", "method"], columns=["task", "metric"], values="value", aggfunc="first").fillna("")

# %% [markdown]
# ### What a step costs
#
# Tutor-KD asks its teacher twice and trains a head of the teacher's size. Read from `data/benchmarks/tutor.csv`; `python benchmarks/tutor.py
# --write` measures it again.

# %%
# NBVAL_CHECK_OUTPUT
costs = pd.read_csv(Path(runs.__file__).resolve().parents[1] / "data" / "benchmarks" / "tutor.csv")
costs

# %%
# NBVAL_CHECK_OUTPUT
dearest = costs.loc[costs["way"] == "Tutor-KD", "seconds / soft labels"]
print(f"A step of Tutor-KD takes {dearest.min():.2f} to {dearest.max():.2f} times as long as one of soft labels.")

# %% [markdown]
# ## Summary
#
# One form, one call of `pretraining.run`, one folder. Its student goes on to chapter 12 like any other network.
#
# **Exercises**
#
# 1. (easy, 5 minutes) Run the notebook with `-p method untutored`. Which columns of the table are gone, and why can its loss not be
#    compared with the tutor's?
# 2. (medium, 15 minutes) Five seeds of `tutor`, `soft_labels` and no distillation, each fine-tuned on `mini-sst2`. Is the gap larger than
#    the spread? Use `runs.results` on the folder.
# 3. (medium, 20 minutes) Give `-p max_seconds 10`, three times in a row, and once no limit with another `output_dir`. Compare the two records. What may
#    differ, and what must not?
# 4. (hard, 30 minutes) A text file of your own and a pretrained BERT. What do the counts say was skipped, and was it worth
#    keeping?
