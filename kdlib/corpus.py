"""Text for masked-language-model distillation: plain lines, tokenised once, and the masks drawn on them.

`load` reads the embedded mini-corpus, text files, local folders or data sets of the Hugging Face hub, and `Masking`
hides words of each batch.  Both depend on their arguments alone, so that a run that is resumed sees what it would have
seen.

Source: Tutor-KD section 4.1 (Wikipedia and BookCorpus, 128 tokens); the masks are BERT's (Devlin et al., 2019, section
3.1 and appendix C.2).
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib import miniglue, sources, stored, tables
from kdlib.batches import UNKNOWN_NOTABLE, Encoded, unknown_id, unknown_share, unknown_words
from kdlib.files import written
from kdlib.progress import bar

MINI = "mini-corpus"
"""The embedded corpus: sentences of MiniGLUE's grammars, with the splits train and validation."""
COUNTS = ("lines", "empty", "undecodable", "cut", "unknown", "blocks", "tokens")
SHORTEST = 8
"""The last block of a packed corpus is dropped if it has fewer tokens than this, special ones included."""
_LINES_AT_ONCE = 1000


@dataclass(frozen=True)
class Corpus:
    """Tokenised blocks of text, `[CLS] … [SEP]` each, and what happened on the way.

    In `encoded` the labels and token types are all 0 (the token types share one element: do not write to them), and
    `rows` number the blocks.  `counts` holds the lines that were read; of these the ones that were empty, undecodable
    (not UTF-8) and cut (longer than a block); the pieces that became [UNK]; and the blocks and tokens there are.
    """

    encoded: Encoded
    counts: dict[str, int]


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    max_length: int = 128,
    packed: bool = False,
    max_lines: int | None = None,
    column: str = "text",
    cache: Path | str | None = None,
) -> Corpus:
    """Read the lines of `source` and tokenise them into blocks of at most `max_length` tokens.

    `source` is "mini-corpus", a .txt file (one text a line, in UTF-8; its only split is train), a local folder with
    `<split>.txt` or with a data set in one of the hub's layouts, or the id of a data set on the hub; folder and id may
    be followed by ":configuration".  Several sources joined by "+" are read one after the other, and so are several
    splits.  Only a hub id uses the network.  Of a data set the texts in `column` are read; a text of several lines
    counts as several.

    Each line is a block, cut if it is too long.  With `packed` the lines are instead joined, a [SEP] between them, and
    laid out in blocks of exactly `max_length` tokens; the last one may be shorter, see `SHORTEST`.  At most `max_lines`
    lines are read, empty ones included.

    The result is kept in the folder `cache`, and read from there the next time, as long as the arguments, the
    tokenizer's words and the content of the local files stay the same.  That a hub data set has changed is not
    noticed: delete the file.

    Of pieces that the tokenizer does not know a notable share is printed, and stands in `encoded.unknown`.

    Raises ValueError for a source without a usable line, or that is a whole home or file system, a missing split or
    column, a tokenizer that is not like BERT's or that knows less than half of the pieces; OSError for data that cannot
    be had, as `glue.load` does.
    """
    cls, sep, pad = (getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad"))
    if None in (cls, sep, pad):
        raise ValueError(
            f"{type(tokenizer).__name__} lacks one of the tokens CLS, SEP and padding: use a BERT-like tokenizer"
        )
    shortest = SHORTEST if packed else 3
    if max_length < shortest:
        raise ValueError(f"max_length is {max_length}; expected at least {shortest}, CLS and SEP included")
    if max_lines is not None and max_lines < 1:
        raise ValueError(f"max_lines is {max_lines}; expected at least 1, or None for all lines")

    parts = _parts(str(source), split, column)
    kept = None
    if cache is not None:
        options = (split, column, max_length, packed, max_lines)
        kept = _cache_file(Path(cache).expanduser(), str(source), parts, options, tokenizer)
        if (found := _from_cache(kept, source, tokenizer)) is not None:
            return found

    counts = dict.fromkeys(("pieces", *COUNTS), 0)
    strange: list[str] = []
    texts = _pieces(parts, tokenizer, max_lines, counts, strange)
    ids, lengths = array("i"), array("q")  # they grow in place: four bytes a token, and little more at any time
    for block in _packed(texts, cls, sep, max_length) if packed else _cut(texts, cls, sep, max_length, counts):
        ids.extend(block)
        lengths.append(len(block))
    pieces = counts.pop("pieces")
    counts |= {"blocks": len(lengths), "tokens": len(ids)}
    if not lengths:
        raise ValueError(
            f"the text of {source} fills no block of {SHORTEST} tokens: give a larger corpus, or packed=False"
        )
    notable = counts["unknown"] >= UNKNOWN_NOTABLE * pieces
    words = unknown_words(strange, tokenizer) if notable else []
    share = unknown_share(counts["unknown"], pieces, str(source), tokenizer, lambda: words)
    tokens = torch.frombuffer(ids, dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.frombuffer(lengths, dtype=torch.int64).cumsum(0)])
    if kept is not None:
        _to_cache(kept, tokens, offsets, counts, (pieces, words))
    return _corpus(tokens, offsets, counts, pad, share)


def content(source: str | Path, split: str = "train", column: str = "text") -> str | None:
    """What local text holds, "sha256:<16 digits>" of its files' bytes; None for the mini-corpus and for the hub's text.

    Where the files lie and what they are called does not matter.  Raises what `load` raises where they are not there.
    """
    parts = _parts(str(source), split, column)
    files = [path for part in parts for path in part.files]
    if not files or all(path.is_relative_to(miniglue.folder()) for path in files):
        return None
    # Several sources, a hub's among them, are named as they were given, in the order in which they are read.
    told = [[stored.sha256(path) for path in part.files] or part.name for part in parts]
    return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"


def _corpus(tokens: Tensor, offsets: Tensor, counts: dict[str, int], pad: int, unknown: float) -> Corpus:
    blocks = len(offsets) - 1
    types = torch.zeros(1, dtype=torch.int8).expand(len(tokens))
    labels, rows = torch.zeros(blocks, dtype=torch.int64), torch.arange(blocks)
    return Corpus(Encoded(tokens, types, offsets, labels, rows, pad, unknown), counts)


def _pieces(
    parts: list["_Part"],
    tokenizer: PreTrainedTokenizerBase,
    max_lines: int | None,
    counts: dict[str, int],
    strange: list[str],
) -> Iterator[list[int]]:
    """The word pieces of every usable line; `strange` gets the first few lines with unknown ones.

    Raises ValueError for a part that has no usable line.
    """
    unknown = unknown_id(tokenizer)
    for part in parts:
        lines = part.lines()
        if max_lines is not None:
            lines = islice(lines, max_lines - counts["lines"])
        before, usable = dict(counts), 0
        for chunk in bar(_chunks(lines), "tokenising"):
            texts = [line for line in chunk if line is not None and line.strip()]
            found = []
            if texts:  # no attention mask, no cut and no word about the length: blocks are made afterwards
                found = tokenizer(
                    texts,
                    add_special_tokens=False,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )["input_ids"]
                if len(strange) < 5:
                    strange += [text for text, pieces in zip(texts, found, strict=True) if unknown in pieces][:5]
                found = [pieces for pieces in found if pieces]  # a text of control characters has none
            undecodable = sum(line is None for line in chunk)
            counts["lines"] += len(chunk)
            counts["undecodable"] += undecodable
            counts["empty"] += len(chunk) - undecodable - len(found)
            counts["pieces"] += sum(map(len, found))
            counts["unknown"] += sum(pieces.count(unknown) for pieces in found)
            usable += len(found)
            yield from found
        read, empty, undecodable = (counts[name] - before[name] for name in ("lines", "empty", "undecodable"))
        if not usable and read + before["lines"] != max_lines:
            raise ValueError(
                f"{part.name} has no usable line: of {read} lines {empty} are empty and {undecodable} are not UTF-8. "
                "Give a file with one text a line, saved as UTF-8"
            )
        if counts["lines"] == max_lines:
            break
    if counts["lines"] == counts["empty"] + counts["undecodable"]:
        raise ValueError(f"the first {max_lines} lines have no usable line: raise max_lines")


def _chunks(lines: Iterator[str | None]) -> Iterator[list[str | None]]:
    while chunk := list(islice(lines, _LINES_AT_ONCE)):
        yield chunk


def _cut(
    texts: Iterable[list[int]], cls: int, sep: int, max_length: int, counts: dict[str, int]
) -> Iterator[list[int]]:
    """One block for each text."""
    for pieces in texts:
        counts["cut"] += len(pieces) > max_length - 2
        yield [cls, *pieces[: max_length - 2], sep]


def _packed(texts: Iterable[list[int]], cls: int, sep: int, max_length: int) -> Iterator[list[int]]:
    """The texts, a separator between each two, as blocks of `max_length` tokens."""
    room, rest = max_length - 2, []
    for number, pieces in enumerate(texts):
        rest += [sep, *pieces] if number else pieces
        full = len(rest) // room * room
        for start in range(0, full, room):
            yield [cls, *rest[start : start + room], sep]
        del rest[:full]
    if len(rest) + 2 >= SHORTEST:
        yield [cls, *rest, sep]


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class _Part:
    """One source: its name, its local files, and a function that reads its lines, None for one that is not UTF-8."""

    name: str
    files: tuple[Path, ...]
    lines: Callable[[], Iterator[str | None]]


def _parts(source: str, split: str, column: str) -> list[_Part]:
    """The single sources and splits, in order; a file or folder may have a "+" in its name."""
    names = [source] if sources.local_path(source).exists() else source.split("+")
    if not all(names):
        raise ValueError(f"source is {source!r}; expected one source, or several with one '+' between each two")
    return [_part(name, one, column) for name in names for one in split.split("+")]


def _part(name: str, split: str, column: str) -> _Part:
    folder, _, config = name.rpartition(":")
    path = sources.local_path(name)
    if name == MINI:
        return _text(miniglue.folder() / MINI, split)
    if path.is_dir():
        return _text(path, split) if (path / f"{split}.txt").is_file() else _folder(path, None, split, column)
    if folder and (home := sources.local_path(folder)).is_dir():
        if (home / config).is_dir() and not (home / "README.md").is_file():  # nothing says what is where
            return _part(str(home / config), split, column)
        return _folder(home, config, split, column)
    if path.is_file():
        if not path.name.endswith(".txt"):
            raise ValueError(f"{name} is not a .txt file: give the folder that holds it, as <split>{path.suffix}")
        if split != "train":
            raise ValueError(f"{name} has no split {split!r}: a text file has the split train only")
        return _Part(name, (path,), partial(_lines, path))
    if path.suffix == ".txt" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.-]*)?", name):
        raise FileNotFoundError(f"there is no file or folder {name!r} (looked in {Path.cwd()}): give the path of one")
    return _Part(name, (), partial(_hub_texts, name, split, column))


def _text(folder: Path, split: str) -> _Part:
    """A folder of text files."""
    path = folder / f"{split}.txt"
    if not path.is_file():
        present = ", ".join(sorted(file.stem for file in folder.glob("*.txt")))
        raise ValueError(f"{folder} has no split {split!r}, it has {present}: give one of these as split")
    return _Part(str(path), (path,), partial(_lines, path))


def _lines(path: Path) -> Iterator[str | None]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not number and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                tables.decoded(line, path)  # which says that this is UTF-16, where every line would be garbled
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError:
                yield None


def _folder(folder: Path, config: str | None, split: str, column: str) -> _Part:
    """A folder in a layout of the hub; nothing is read yet, and it will be read piece by piece, not as a whole."""
    sources.card_of(folder)  # refuses one that sends us to the network
    try:
        builder = sources.layout_of(folder, config)
    except (ValueError, FileNotFoundError) as error:
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(
            f"cannot find a corpus in folder {folder}, configuration {config!r}: {tables.one_line(error)}. The "
            f"folder should hold {split}.txt, or files such as {split}.parquet"
        ) from error
    files = builder.config.data_files or {}
    if split not in files:
        raise ValueError(
            f"{folder} has no split {split!r}, it has {', '.join(map(str, files))}: give one of these as split"
        )
    paths = tuple(Path(file) for file in files[split])
    sources.check_files(folder, split, list(paths))
    name = f"split {split!r} of {folder}"
    if all(path.suffix == ".txt" for path in paths):
        return _Part(name, paths, lambda: chain.from_iterable(map(_lines, paths)))
    if all(tables.format_of(path) in ("csv", "tsv") for path in paths) and sources.reads_as_we_do(builder.config):
        return _Part(name, paths, lambda: chain.from_iterable(_separated_texts(path, column, name) for path in paths))
    if hasattr(builder.config, "keep_default_na"):  # CSV with a separator of its own: a line that reads "null" is text
        builder.config.keep_default_na = False
        builder.config.converters = {column: str}
    return _Part(name, paths, partial(_folder_texts, builder, split, column, name))


def _separated_texts(path: Path, column: str, name: str) -> Iterator[str]:
    """The lines of a column of a CSV or tab-separated file, read row by row as `tables` does it."""
    tab = tables.format_of(path) == "tsv"
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n" if tab else "")
        try:
            lines = (line.removesuffix("\n").removesuffix("\r") for line in file) if tab else file
            rows = (tables.tab_separated if tab else tables.comma_separated)(lines, path)
            header = next(rows, [])
            if column not in header:
                raise ValueError(
                    f"{name} has no column {column!r}, it has {', '.join(header)}: give one of these as column"
                )
            place = header.index(column)
            for row in rows:
                yield from row[place].removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            tables.text_of(path)  # which says in which line
            raise
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise tables.cannot_read(path, error) from error


def _folder_texts(builder: datasets.DatasetBuilder, split: str, column: str, name: str) -> Iterator[str]:
    files = ", ".join(Path(file).name for file in builder.config.data_files[split][:3])

    def explain(error: Exception) -> Exception:
        remedy = "The file is damaged, or not what its name says: write it anew, or copy it again"
        return tables.cannot_read(f"{name} ({files})", error, remedy)

    yield from _texts(lambda: builder.as_streaming_dataset(split=split), column, name, explain)


def _hub_texts(name: str, split: str, column: str) -> Iterator[str]:
    def explain(error: Exception) -> Exception:
        part, instead = f"split {split!r} of {name!r} from the hub", f"a local folder, a .txt file or '{MINI}'"
        return sources.not_from_hub(error, f"corpus {name!r}", part, instead)

    identifier, _, config = name.partition(":")
    open_stream = partial(datasets.load_dataset, identifier, config or None, split=split, streaming=True)
    yield from _texts(open_stream, column, name, explain)


def _texts(
    open_stream: Callable[[], Any], column: str, name: str, explain: Callable[[Exception], Exception]
) -> Iterator[str]:
    """The lines of a column; what `datasets` complains of is put in the words of `explain`."""
    stream = None
    while True:
        try:
            stream = stream or open_stream().iter(batch_size=_LINES_AT_ONCE)
            batch: dict[str, list[Any]] | None = next(stream, None)
        except Exception as error:  # there are dozens of ways to fail, on the hub and in damaged files
            raise explain(error) from error
        if batch is None:
            return
        if column not in batch:
            raise ValueError(f"{name} has no column {column!r}, it has {', '.join(batch)}: give one of these as column")
        for text in batch[column]:
            if not isinstance(text, str | None):
                raise ValueError(f"column {column!r} of {name} holds {type(text).__name__} {text!r}; expected text")
            yield from (text or "").removesuffix("\n").split("\n")


# ---------------------------------------------------------------------------------------------------------------------
# Cache


def _cache_file(
    folder: Path, source: str, parts: list[_Part], options: tuple[Any, ...], tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Where the corpus is kept; the folder is made now, so that one that cannot be is known before the work."""
    files = [stored.sha256(path) for path in chain.from_iterable(part.files for part in parts)]
    # The normalizer too: cased and uncased tokenizers may share their words.
    normalizer = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None))
    words = (sorted(tokenizer.get_vocab().items()), special_tokens(tokenizer), normalizer)
    digest = hashlib.sha256(json.dumps([source, files, options, words]).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the cache {folder} ({error.strerror or error}): choose another folder") from error
    return folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', source)[-40:]}-{options[0]}-{digest}.safetensors"


def _to_cache(
    path: Path, tokens: Tensor, offsets: Tensor, counts: dict[str, int], unknown: tuple[int, list[str]]
) -> None:
    metadata = {"format": "pt", "counts": json.dumps(counts), "unknown": json.dumps(unknown)}
    try:
        with written(path) as temporary:
            save_file({"input_ids": tokens, "offsets": offsets}, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path}: {error}. Free some space, choose another cache, or none (cache=None)"
        ) from error


def _from_cache(path: Path, source: str | Path, tokenizer: PreTrainedTokenizerBase) -> Corpus | None:
    """What `_to_cache` wrote; None if there is nothing, or if it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tokens, offsets = file.get_tensor("input_ids"), file.get_tensor("offsets")
            counts = json.loads(file.metadata()["counts"])
            pieces, words = json.loads(file.metadata()["unknown"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    whole = tokens.dtype == torch.int32 and offsets[0] == 0 and bool((offsets.diff() > 0).all())
    whole = whole and [counts.get(name) for name in ("blocks", "tokens")] == [len(offsets) - 1, len(tokens)]
    if not whole or offsets[-1] != len(tokens):
        return None
    share = unknown_share(counts["unknown"], pieces, str(source), tokenizer, lambda: words)
    return _corpus(tokens, offsets, counts, tokenizer.pad_token_id, share)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that are never masked: those of CLS, SEP, PAD, UNK and MASK, as far as the tokenizer has them, sorted."""
    ids = (getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "unk", "mask"))
    return tuple(sorted({number for number in ids if number is not None}))


def choose(
    words: Int[Tensor, "batch tokens"],
    special: Sequence[int],
    rate: float = 0.15,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """Choose the positions to mask: of each sentence's n ordinary words max(1, round(rate · n)), all equally likely.

    An ordinary word is one that is not `special`; a sentence without any has no position chosen.  `generator` is the
    CPU's, wherever the words are, so that a GPU masks as a CPU does.

    Raises ValueError unless 0 < rate < 1.
    """
    if not 0 < rate < 1:
        raise ValueError(f"the masking rate is {rate}; expected a share between 0 and 1, such as 0.15")
    ordinary = ~torch.isin(words, torch.tensor(special, dtype=words.dtype, device=words.device))
    wanted = (rate * ordinary.sum(dim=-1, keepdim=True).double()).round().clamp(min=1)
    # The words with the lowest scores are a draw without replacement; special ones come last.
    scores = torch.rand(words.shape, generator=generator).to(words.device).masked_fill(~ordinary, 2.0)
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return (rank < wanted) & ordinary


def corrupt(
    words: Int[Tensor, "batch tokens"],
    masked: Bool[Tensor, "batch tokens"],
    mask: int,
    vocabulary: int,
    special: Sequence[int],
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch tokens"]:
    """BERT's 80/10/10: of the masked words 80 % become `mask`, 10 % any ordinary word, 10 % stay.

    `vocabulary` is the number of words, the `special` ones among them; `generator` is the CPU's.

    Raises ValueError if `mask` is not a word or all words are special.
    """
    reserved = sorted({number for number in special if 0 <= number < vocabulary})
    if not 0 <= mask < vocabulary or len(reserved) == vocabulary:
        raise ValueError(
            f"mask {mask} and {len(reserved)} special tokens in a vocabulary of {vocabulary}: expected the mask among "
            "the words, and ordinary words beside the special ones; give the size of the tokenizer's vocabulary"
        )
    fate = torch.rand(words.shape, generator=generator)
    other = torch.randint(vocabulary - len(reserved), words.shape, generator=generator)
    for number in reserved:  # step over the special words, lowest first
        other += other >= number
    fate, other = fate.to(words.device), other.to(words)
    corrupted = torch.where(fate < 0.8, mask, torch.where(fate < 0.9, other, words))
    return torch.where(masked, corrupted, words)


@dataclass(frozen=True)
class Masking:
    """Masks for every batch of a run: `special` ids are never masked, `mask` is the mask's id.

    The draws depend on `seed` and the step only, so that a run that is resumed masks as one that was never stopped.
    """

    special: tuple[int, ...]
    mask: int
    vocabulary: int
    rate: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError unless 0 < rate < 1."""
        if not 0 < self.rate < 1:
            raise ValueError(f"the masking rate is {self.rate}; expected a share between 0 and 1, such as 0.15")

    def __call__(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The batch of this step with `masked` (which positions, see `choose`) and `corrupted` (see `corrupt`)."""
        # Two generators: how many numbers one draw takes must not move the other.
        choice, fate = (_generator(self.seed, step, stream) for stream in (0, 1))
        words = batch["input_ids"]
        masked = choose(words, self.special, self.rate, choice)
        corrupted = corrupt(words, masked, self.mask, self.vocabulary, self.special, fate)
        return {**batch, "masked": masked, "corrupted": corrupted}


def masking(tokenizer: PreTrainedTokenizerBase, rate: float = 0.15, seed: int = 0) -> Masking:
    """The `Masking` for a tokenizer.

    Raises ValueError if the tokenizer has no mask token, or unless 0 < rate < 1.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no mask token: use the tokenizer of a masked language model such as BERT"
        )
    return Masking(special_tokens(tokenizer), tokenizer.mask_token_id, len(tokenizer), rate, seed)


def _generator(seed: int, step: int, stream: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
