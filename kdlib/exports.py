"""What a student goes on as: an ONNX file and a smaller one of 8-bit weights, each tried before it is left behind.

    path = exports.to_onnx(record.folder / "student")
    logits = exports.onnx_logits(path)(batch)

The files lie in the network's own folder, named as the hub's libraries look for them, and need neither torch nor kdlib.
Making and reading them takes the packages of the extra [export].
"""

import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from kdlib import files, models, stored

ONNX, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"
"""Where the exported files lie below a network's folder."""
CLOSE = 1e-4
"""How far the logits of an ONNX file may be from those of torch, over the size of the largest."""


def needed(package: str) -> ModuleType:
    """The package.  Raises ModuleNotFoundError, which says what to install, where it or what it needs is missing."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"an export needs the package {error.name or package}: pip install 'kdlib[export]', in the book's folder "
            "pip install '.[export]'"
        ) from error


def to_onnx(folder: Path | str) -> Path:
    """Write the classifier in `folder` as ONNX, for batches of any size and length, and return the file's path.

    Inputs are those of the tokenizer, int64 `(batch, tokens)`, the output is `logits` `(batch, classes)`.  The file is
    read again by onnxruntime and must give torch's logits on batches of other shapes than the one it was made from.

    Raises ModuleNotFoundError without the extra, OSError for a folder that holds no network, ValueError for logits that
    differ.
    """
    needed("onnxscript")
    needed("onnxruntime")
    folder = Path(folder)
    network = load(folder)
    taken = inspect.signature(network.forward).parameters
    batch = {name: values for name, values in _example(network, 3, 7).items() if name in taken}
    free = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")} for name in batch}
    path = folder / ONNX
    path.parent.mkdir(exist_ok=True)
    with _silent(), files.written(path) as temporary:
        program = torch.onnx.export(
            network, (), None, kwargs=batch, dynamo=True, dynamic_shapes=free, output_names=["logits"], verbose=False
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # each line of the traceback, with this machine's paths
        program.save(temporary, external_data=False)
        logits = onnx_logits(temporary)
        for shape in ((1, 3), (5, 11)):
            other = _example(network, *shape)
            expected = models.logits(network, other).numpy()
            error = np.abs(logits(other) - expected).max()
            if not error <= CLOSE * np.abs(expected).max():
                raise ValueError(
                    f"the ONNX file of {folder} gives logits that are {error:.1e} from torch's: not written"
                )
    return path


def to_int8(folder: Path | str) -> Path:
    """Write the classifier in `folder` as ONNX with 8-bit weights, and return the file's path.

    Matrices are rounded once, what is multiplied with them at every call by its own range (dynamic quantisation, by
    onnxruntime: torch has given up its own).  What that costs and saves, `kdlib.report` measures.

    Raises what `to_onnx` raises, which makes the file that this one is made from.
    """
    quantization = needed("onnxruntime.quantization")
    folder = Path(folder)
    whole, path = folder / ONNX, folder / INT8
    if not whole.exists():
        to_onnx(folder)
    with _silent(), tempfile.TemporaryDirectory() as scratch, files.written(path) as temporary:
        prepared = str(Path(scratch) / "prepared.onnx")
        quantization.quant_pre_process(str(whole), prepared, skip_symbolic_shape=True)  # it knows no free lengths
        quantization.quantize_dynamic(prepared, str(temporary), weight_type=quantization.QuantType.QInt8)
        onnx_logits(temporary)(_example(load(folder), 2, 5))
    return path


def onnx_logits(path: Path | str) -> Callable[[Mapping[str, Tensor]], Float[np.ndarray, "batch classes"]]:
    """The function that an ONNX file computes, on the CPU: logits of a batch as `batches.collate` makes it.

    It uses as many threads as torch does.  Raises ModuleNotFoundError without the extra.
    """
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def logits(batch: Mapping[str, Tensor]) -> Float[np.ndarray, "batch classes"]:
        return session.run(["logits"], {name: batch[name].numpy() for name in names})[0]

    return logits


def load(folder: Path) -> PreTrainedModel:
    """The classifier that a run left in `folder`, in evaluation mode.  Raises OSError for none, or a damaged one."""
    stored.check_network(str(folder), folder)
    with models.quiet():
        network = AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation=models.FAST_ATTENTION, local_files_only=True
        )
    return network.eval()


def _example(network: PreTrainedModel, samples: int, tokens: int) -> dict[str, Tensor]:
    """A batch of arbitrary words, the last sample padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, network.config.vocab_size, (samples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@contextmanager
def _silent() -> Iterator[None]:
    """Exporters tell their own developers much, on every channel; what goes wrong comes as an error."""
    before: Any = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
