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
# # Before you start
#
# A large network, the *teacher*, has learned a task. A small one, the *student*, learns it from the teacher's outputs. That is knowledge
# distillation, and usually the teacher never notices who is listening. This book is about teachers that do notice: they watch what their
# lesson does to the student, and change the lesson. Four papers are derived here, equation by equation:
#
# | paper | what the teacher asks |
# |---|---|
# | LGTM | which of these samples helps the student on data it has not seen? |
# | MetaDistil | how must I change, so that the student is better after its next step? |
# | IKD | what did the student's exam say about my soft targets? |
# | Tutor-KD | which examples should I make up for it? |
#
# Behind the first three stands one quantity, cheap and exact, which chapter 2 introduces. Behind all chapters stands `kdlib`, a tested
# library. An evening is enough for its reading path, which is the losses, the student's trial step and its tangent, the four methods and
# the training loop; the rest is plumbing, and you can use it without having read it.
#
# | | |
# |---|---|
# | Prerequisites | Python, PyTorch at tutorial level, partial derivatives |
# | Time | ten minutes |

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

# %% [markdown]
# ## How to read a chapter
#
# Every chapter asks one question. It derives an equation, turns it into a function of a few lines, and lets something that does not know
# the derivation judge the result: automatic differentiation, an enumeration, another library. Only then comes an experiment.
#
# - **Run it.** Each chapter runs from top to bottom on a laptop's processor, without a network, in about a minute, and needs no other
#   chapter's variables. Change a number, run the cell again. Where a number is a setting of runs that the chapter reads, and your
#   setting has no records, chapter 1 trains two seeds of it on the spot; elsewhere choose among the settings that have records.
# - **Guess first.** Where the text asks what you expect, decide before you run the cell. The surprises are what you will remember.
# - **Numbers come from cells.** No measured number is typed into the text: the cell that measured it prints the sentence. Small
#   experiments run live, for one seed. Bands over many seeds are read from records in `data/runs`, and the chapter says which is which.
# - **Paper, code, exact.** Boxes with this title say what a paper states, what its released code does, and what holds exactly. The
#   three differ more often than one would think.
# - **Small version, library version.** A chapter defines things in small, then imports the library's version and asserts that both agree.
# - **Exercises** state their difficulty and the minutes they take. Each has a stub and a check that tells whether you are right. Who grades
#   them sets the environment variable `KDLIB_STRICT=1`; then a stub that nobody has touched counts as wrong.

# %% [markdown]
# ## Notation
#
# One notation serves all four papers. A chapter that needs further letters has a table of its own; {doc}`../notation` lists those
# that mean something else elsewhere.
#
# | symbol | meaning | shape |
# |---|---|---|
# | $\theta_t$, $\theta_s$ | parameters of teacher and student | |
# | $\eta_t$, $\eta_s$ | their learning rates | scalars |
# | $z^t$, $z^s$ | logits of teacher and student | `(batch, classes)` |
# | $p^t$, $p^s$ | probabilities, $\mathrm{softmax}(z / T)$ at temperature $T$ | `(batch, classes)` |
# | $y$ | labels | `(batch,)` |
# | $\ell_i(z^s_i, z^t_i)$ | distillation objective of one sample | `(batch,)` |
# | $L$ | its mean over the batch, $L = \frac{1}{B} \sum_i \ell_i$ with $B$ samples in the batch | scalar |
# | $\alpha$ | weight of the hard labels; the teacher's outputs weigh $1 - \alpha$ | scalar |
# | $e$ | feedback batch: LGTM's "validation batch", MetaDistil's "quiz", IKD's "exam" | |
# | $\theta_s'$ | pilot student: $\theta_s' = \theta_s - \eta_s \nabla_{\theta_s} L$ | |
# | $g$ | feedback gradient: $g = \nabla_{\theta_s'} L_{\mathrm{CE}}(e; \theta_s')$ | as $\theta_s$ |
# | $\dot z$ | student tangent: the directional derivative of $z^s$ along $g$ | `(batch, classes)` |
# | $I_i$ | distillation influence of sample $i$: $I_i = \langle \nabla_{\theta_s} \ell_i, g \rangle$ | `(batch,)` |
# | $p^*$ | the true posterior $p^*(y \mid x)$, which our embedded data state | `(batch, classes)` |

# %% [markdown]
# ## Data
#
# The chapters use **MiniGLUE**, four small tasks that come with the book. They are shaped like tasks of GLUE, the benchmark of the
# papers, but they are made by a program, so that two things are known which nobody knows of real data: the true posterior of every
# example, and which training labels were flipped. Claims about teachers can be held against the truth.
#
# The last chapter runs on MiniGLUE, on GLUE itself and on your own data. Feedback for the teacher comes from the training set: from a
# part that is carved out of it, or, in IKD's way, from the very batch that the student has just learned. The validation set is for
# choosing and reporting. One setting, `feedback_from`, lets it teach as LGTM's code does, and chapter 7 measures what that does to a
# score; otherwise it never teaches.

# %% [markdown]
# ## Is everything in place?
#
# The cells below look at your set-up. If one fails, `python -m kdlib.doctor` looks closer and says what to do first.

# %%
import platform
from importlib.metadata import version

import torch

print(f"{'python':<14} {platform.python_version()}")
for package in ("torch", "transformers", "datasets", "accelerate", "kdlib"):
    print(f"{package:<14} {version(package)}")
print(f"{'threads':<14} {torch.get_num_threads()}")
print(f"{'accelerator':<14} {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none, none needed'}")

# %% [markdown]
# Is the embedded data there, and does it look as it should? `load` checks every row. We look at the first example that is not quite
# clear-cut: its posterior says how a reader who knows the true rule would bet.

# %%
# NBVAL_CHECK_OUTPUT
from kdlib import glue

data = glue.load("miniglue", "mini-sst2")
example = next(row for row in data.train if max(row["posterior"]) < 0.9)
print(f"{len(data.train):,} training examples, among them:")
print(f"  {example['sentence']!r}")
for name, probability in zip(data.task.label_names, example["posterior"], strict=True):
    print(f"  {name}: {probability:.2f}")

# %% [markdown]
# The last thing that the book asks of your set-up is a derivative in *forward* mode, the tool behind chapter 2: how do the logits move when
# the parameters move in a given direction? For a linear layer we know the answer.

# %%
# NBVAL_CHECK_OUTPUT
layer = torch.nn.Linear(3, 2, dtype=torch.float64)
x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
direction = {"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.zeros(2, dtype=torch.float64)}


def logits(parameters):
    return torch.func.functional_call(layer, parameters, (x,))


_, tangent = torch.func.jvp(logits, (dict(layer.named_parameters()),), (direction,))
torch.testing.assert_close(tangent, x.sum(-1, keepdim=True).expand(4, 2))
print("ready")

# %% [markdown]
# ## The chapters
#
# | | chapter |
# |---|---|
# | 1 | [What is distilled, and why?](01_distillation.ipynb) |
# | 2 | [Which example helped?](02_influence.ipynb) |
# | 3 | [What does a derivative along one direction cost, and how exact is it?](03_finite_differences.ipynb) |
# | 4 | [What changes when the teacher learns while it teaches?](04_online_distillation.ipynb) |
# | 5 | [Can a teacher learn from its student, and why try the lesson on a copy?](05_pilot_updates.ipynb) |
# | 6 | [What can a student tell its teacher?](06_student_feedback.ipynb) |
# | 7 | [Does it help to weigh a teacher's lessons by their influence?](07_good_teachers.ipynb) |
# | 8 | [How does a network learn from words that it has drawn?](08_policy_gradient.ipynb) |
# | 9 | [Does a student learn more from text that is easy for its teacher and hard for itself?](09_tutor_kd.ipynb) |
# | 11 | [Full pretraining runs](11_pretraining.ipynb) |
# | 12 | [Full GLUE runs](12_glue.ipynb) |
#
# The library reads in this order; each file opens with what it is for:
#
# | | in `kdlib/` | what it teaches |
# |---:|---|---|
# | 1 | `losses.py`, `representations.py`, `policy.py` | what is imitated, one value per sample; hidden states and attention; rewards (chapters 1, 8, 9) |
# | 2 | `settings.py` | how a method says what it can be told, and refuses the rest |
# | 3 | `learner.py` | a network with its optimiser: one step, and of two networks at once |
# | 4 | `pilot.py`, `tangent.py` | the student's trial step, and the derivative behind three papers (chapters 2, 3) |
# | 5 | `methods/base.py`, `kd.py`, `online.py` | the parts that methods share; fixed teachers, and teachers that learn (chapters 1, 4) |
# | 6 | `methods/metadistil.py`, `ikd.py`, `lgtm.py` | the three papers that listen to the student (chapters 5, 6, 7) |
# | 7 | `methods/tutor_words.py`, `tutor.py` | the tutor (chapters 8, 9) |
# | 8 | `trainer.py` | the loop: order, evaluation, checkpoints |
#
# There is no chapter 10 yet: the number is kept for the methods that these four papers compare themselves with. Read chapter 1 next. If you have come to run experiments, chapter 12 (GLUE) and chapter 11 (text without labels) stand on their own.
