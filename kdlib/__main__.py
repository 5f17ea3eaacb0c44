"""The command line: `python -m kdlib run`, `study`, `results`, `report`, `export`, `submission`, `describe`, `doctor`.

    python -m kdlib run configs/lgtm.yml task=rte device=cuda
    python -m kdlib study experiments/05_pilot_updates.yml --dry-run
    python -m kdlib report _runs/mini-mnli-kd-seed0-ea234739
    torchrun --nproc_per_node 2 -m kdlib run task=mini-sst2 method=lgtm
    accelerate launch --multi_gpu --num_processes 2 -m kdlib run corpus=mini-corpus method=tutor steps=300

Parameters, defaults and files are those of chapters 11 and 12, see `kdlib.pretraining` and `kdlib.runs`.  The exit
status is 0 for a run that is finished, 1 for one that failed, 2 for parameters that are wrong, and 130 for a run that
somebody asked to end, or whose `max_seconds` were over: the same command goes on from its checkpoint.
"""

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from kdlib.records import RunRecord

FAILED, WRONG, INTERRUPTED = 1, 2, 130
ELSEWHERE = {"downstream": None}
"""What the forms of the chapters ask beside the run, with the value that asks for nothing."""


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kdlib", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="compute a run, or go on with it")
    run.add_argument("given", nargs="*", metavar="[FILE.yml] name=value", help="corpus or steps: a run on plain text")
    _study_options(commands.add_parser("study", help="compute the runs of a study file, and decide its claims"))
    table = commands.add_parser("results", help="a table over the records in a folder")
    table.add_argument("folder", type=Path)
    costs = commands.add_parser("report", help="a run's teacher and student: size, score, latency, memory")
    costs.add_argument("run", type=Path, help="the folder of a finished run on a task")
    costs.add_argument("--recorded", action="store_true", help="what the records tell; nothing is measured")
    export = commands.add_parser("export", help="write a run's student as ONNX, and its model card")
    export.add_argument("run", type=Path, help="the folder of a finished run")
    export.add_argument("--onnx", action="store_true", help="student/onnx/model.onnx")
    export.add_argument("--int8", action="store_true", help="with 8-bit weights, student/onnx/model_quantized.onnx")
    export.add_argument("--card", action="store_true", help="student/README.md")
    export.add_argument("--licence", help="what the card says, for example apache-2.0")
    send = commands.add_parser("submission", help="one zip for gluebenchmark.com; status 1 where it will miss a file")
    send.add_argument("runs", nargs="+", type=Path, help="the folders of finished runs on GLUE's tasks")
    send.add_argument("--zip", type=Path, default=Path("submission.zip"), help="where to (submission.zip)")
    one = commands.add_parser("describe", help="the parameters of a method")
    one.add_argument("method", nargs="?", help="without it, the methods")
    commands.add_parser("doctor", help="versions, device, memory and data; see --help", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "doctor":
        from kdlib import doctor  # alone, since the others need packages that may be missing

        return doctor.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "run":
        return _run(options.given)
    if options.command == "study":
        return _study(options)
    if options.command in AFTERWARDS:
        try:
            return AFTERWARDS[options.command](options)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            return _said(error, FAILED)
    return _shown(options)


def _finished(folder: Path) -> "RunRecord":
    from kdlib.records import RECORD, is_record, read_record

    if not folder.exists():
        raise ValueError(f"there is no folder {folder}: give that of a finished run, which `run` prints")
    if folder.name != RECORD and folder.is_file() and is_record(folder):
        raise ValueError(
            f"{folder} is a record alone, and this needs the networks of its run: give the run's own folder, which "
            "a study leaves in its output_dir unless it says keep_folders: false, or compute the run again"
        )
    if not (folder.is_dir() and (folder / RECORD).exists()) and folder.name != RECORD:
        raise ValueError(f"{folder} holds no {RECORD}: give the folder of a finished run, which `run` prints")
    return read_record(folder)


def _report(options: argparse.Namespace) -> int:
    from kdlib.report import report

    found = report(_finished(options.run), measure=not options.recorded)
    print(found.table.T.to_string(float_format="{:.4g}".format))
    if found.measured_on:
        print(f"latency: median and interquartile range, a sentence, on {found.measured_on}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from kdlib import cards, exports
    from kdlib.engine import STUDENT

    if not (options.onnx or options.int8 or options.card):
        raise ValueError("say what to write: --onnx, --int8, --card")
    record = _finished(options.run)
    if options.onnx:
        print(exports.to_onnx(record.folder / STUDENT))
    if options.int8:
        print(exports.to_int8(record.folder / STUDENT))
    if options.card:
        print(cards.write(record, options.licence))
    return 0


def _submission(options: argparse.Namespace) -> int:
    from kdlib import submission

    done = submission.write([_finished(run) for run in options.runs], options.zip)
    print("\n".join(f"{name:<11} {run_id}" for name, run_id in done.answered.items()))
    print(done.path)
    for name, reason in done.missing.items():
        print(f"missing: {name} ({reason})", file=sys.stderr)
    return FAILED if done.missing else 0


AFTERWARDS = {"report": _report, "export": _export, "submission": _submission}
"""What can be done with finished runs."""


def _shown(options: argparse.Namespace) -> int:
    from kdlib.records import by_task, results

    try:
        if options.command == "describe":
            print(explanation(options.method))
        else:
            if not options.folder.is_dir():
                raise ValueError(f"there is no folder {options.folder}")
            shown = by_task(results(options.folder))
            tables = (f"{task}\n{table.to_string(index=False)}" for task, table in shown.items())
            print("\n\n".join(tables) or f"there are no records in {options.folder}")
    except ValueError as error:
        return _said(error, WRONG if options.command == "describe" else FAILED)
    return 0


def parameters(given: list[str]) -> dict[str, Any]:
    """What YAML files and `name=value` say, later ones before earlier ones.

    A value is None, True, False, a number or else a text, in words that YAML and Python know; "1e-3" is a number.

    Raises ValueError for anything else and for a file that cannot be read.
    """
    found: dict[str, Any] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if equals and name.isidentifier():
            found[name] = _value(value)
        elif word.endswith((".yml", ".yaml")):
            found |= _from_file(Path(word))
        else:
            raise ValueError(f"{word!r} is neither name=value nor a file that ends in .yml")
    return {name: value for name, value in found.items() if not (name in ELSEWHERE and value == ELSEWHERE[name])}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} should hold one parameter a line, name: value")
    return found


def _value(text: str) -> Any:
    known = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def kind_of(given: Mapping[str, Any]) -> ModuleType:
    """The module that computes such a run: `pretraining` for plain text, else `runs`."""
    from kdlib import pretraining, runs

    return pretraining if pretraining.is_text(given) else runs


def _run(given: list[str]) -> int:
    from kdlib import processes
    from kdlib.settings import ConfigurationError
    from kdlib.trainer import TrainingInterruptedError

    try:
        asked = parameters(given)
        kind = kind_of(asked)
        config = kind.configure(**asked)
    except ValueError as error:
        return _said(error, WRONG)
    try:
        record = kind.run(config)
        processes.leave()  # after an error the others may not answer any more
        if processes.is_first():
            print("\n".join(f"{name:<28} {value:.4f}" for name, value in record.metrics.items()))
            print(record.folder)
        return 0
    except TrainingInterruptedError as error:
        return _said(error, INTERRUPTED)
    except ConfigurationError as error:
        return _said(error, WRONG)
    except processes.ProcessLostError as error:
        return _said(error, FAILED, everybody=True)
    except (OSError, ValueError, FloatingPointError) as error:
        return _said(error, FAILED)


def _study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.yml")
    parser.add_argument("--dry-run", action="store_true", help="list what is there, what is to do, and about how long")
    parser.add_argument("--choose", action="store_true", help="try the settings of `choose` and write their table")
    parser.add_argument("--workers", type=int, help="runs side by side on this machine; by default as many as fit")
    parser.add_argument("--dashboard", action="store_true", help="Dask's dashboard on http://localhost:8787")
    parser.add_argument("--scheduler", metavar="tcp://…", help="a Dask scheduler that is running, with its workers")
    parser.add_argument("--queue", choices=("slurm", "pbs", "lsf", "sge", "local"), help="jobs of a batch system")
    parser.add_argument("--jobs", type=int, default=1, help="how many jobs to ask the batch system for")
    parser.add_argument("--resources", nargs="*", default=[], metavar="GPU=1", help="what a run takes of a worker's")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FOLDER", help="local copies of a hub's data")


def _study(options: argparse.Namespace) -> int:
    from kdlib import cluster
    from kdlib.study import Study

    try:
        studies = [Study(path) for path in options.files]
        resources = {name: float(amount) for name, amount in _pairs(options.resources, "GPU=1").items()}
        folders = _pairs(options.data, "NAME=FOLDER")
        if options.dry_run:
            print("\n\n".join(cluster.plan(study, options.choose) for study in studies))
            return 0
        todo = [study for study in studies if not cluster.finished(study, options.choose)]  # reads all of them
    except ValueError as error:
        return _said(error, WRONG)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a batch system sends, like Ctrl-C
    try:
        work = cluster.choose if options.choose else cluster.carry_out
        failed = []
        if todo:
            with cluster.workers(options) as client:
                for study in todo:
                    failed += work(study, client, folders=folders, resources=resources)
    except KeyboardInterrupt:
        return _said(RuntimeError("stopped: the same command goes on with what is missing"), INTERRUPTED)
    except (OSError, ImportError, ValueError) as error:
        return _said(error, FAILED)
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        return _said(RuntimeError("\n".join([f"{len(failed)} failed:", *map(str, failed)])), FAILED)
    for study in studies:
        print(cluster.plan(study, options.choose), cluster.verdicts(study), sep="\n")
    return 0


def _pairs(words: list[str], example: str) -> dict[str, str]:
    """What NAME=VALUE words say.  Raises ValueError for another word."""
    if wrong := [word for word in words if not all(word.partition("="))]:
        raise ValueError(f"{wrong[0]!r} is not of the form {example}")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _said(error: BaseException, status: int, everybody: bool = False) -> int:
    """Print what went wrong, once where all processes found it; return the status."""
    from kdlib import processes

    if processes.is_first() or everybody:
        print(error, file=sys.stderr)
    return status


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").split("\n", 1)[0]


def explanation(method: str | None) -> str:
    """The parameters of a method: type, default and meaning, first its own, then what all runs have.

    Without a method, a line on each of them.  Raises ValueError for a name that is none.
    """
    from kdlib import settings
    from kdlib.configuration import RunConfig
    from kdlib.methods import METHODS, ON_TEXT
    from kdlib.pretraining import PretrainingConfig

    kinds = {**METHODS, **ON_TEXT}
    if method is None:
        return "\n".join(f"{name:<12} {_first_line(kind)}" for name, kind in kinds.items())
    if method not in kinds:
        raise ValueError(f"there is no method {method!r}; expected one of {', '.join(kinds)}")
    kind, shared = kinds[method], RunConfig if method in METHODS else PretrainingConfig
    ignored = {"settings", *getattr(kind, "ignores", ())}
    lines = [f"{method}: {_first_line(kind)}"]
    for title, rows in (("of this method", settings.describe(kind)), ("of all runs", settings.describe(shared))):
        lines += ["", title]
        for name, hint, default, meaning in rows:
            if name not in ignored:
                lines += [
                    f"  {name} ({hint}) = {_default(default)}",
                    *(f"      {line}" for line in meaning.split("\n")),
                ]
    return "\n".join(lines)


def _default(value: Any) -> str:
    from dataclasses import MISSING

    return "required" if value is MISSING else str(value)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever read the table has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
