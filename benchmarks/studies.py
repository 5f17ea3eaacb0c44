"""What a study costs beside its runs, and how it scales: `python benchmarks/studies.py [--write]`.

Two tables.  Real runs, short ones, by one worker and by two: runs a minute, and the share of the wall time that was
neither a run's nor the start of the workers.  And sleeping ones, as many as a large grid has, by more workers than this
machine has cores: what a run costs to hand out, to bring back and to write down.

--write stores both in data/benchmarks/studies.csv.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml

from kdlib import cluster
from kdlib.cluster import Job
from kdlib.study import Study

TABLE = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "studies.csv"
RUN = {"task": "mini-sst2", "method": "fine_tune", "student": "tiny-2x32", "epochs": 4, "device": "cpu"}


def asleep(job: Job) -> dict[str, float]:
    """A run that takes its time and does nothing."""
    time.sleep(job.unit.parameters["seconds"])
    return {"seconds": job.unit.parameters["seconds"]}


def measured(kind: str, arm: dict, runs: int, workers: int) -> dict[str, object]:
    """A row of the table: a study of one arm and so many seeds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yml"
        sheet = {"common": {"output_dir": folder}, "arms": {"arm": arm}, "seeds": f"0-{runs - 1}"}
        path.write_text(yaml.safe_dump(sheet))
        study, started = Study(path), time.perf_counter()
        with cluster.local(workers) as client:
            client.wait_for_workers(workers)
            ready = time.perf_counter()
            assert not cluster.carry_out(study, client)
            ended = time.perf_counter()
        alone = [json.loads(study.record(unit).read_text())["seconds"] for unit in study.units]
    wall = ended - ready
    return {
        "kind": kind,
        "runs": runs,
        "workers": workers,
        "seconds a run": round(sum(alone) / runs, 2),
        "start of the workers": round(ready - started, 1),
        "wall": round(wall, 1),
        "runs a minute": round(60 * runs / wall, 1),
        "ms beside, a run and worker": round(1000 * (wall - sum(alone) / workers) * workers / runs, 1),
    }


def main() -> None:
    """Measure and print; with --write, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    sleep = {"measure": "benchmarks.studies:asleep", "seconds": 0.2}
    rows = [measured("training", RUN, 8, workers) for workers in (1, 2)]
    rows += [measured("asleep", sleep, runs, 8) for runs in (100, 1000)]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if arguments.write:
        table.to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
