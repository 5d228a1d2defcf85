"""Tasks: whoever does them, the same rows; and what does not end well is said."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from asking import Ask, tell

from lamella.data import Document, LocalWriter, Sampling
from lamella.data.steps import DocumentGeneration, process_documents
from lamella.workers import Workers

DOCUMENTS = [Document(f"d{n}", f"Document {n} says {n * n}. " * (n % 3 + 1)) for n in range(10)]
SAMPLED, HERE = Sampling(0.7, 0.9), Workers()
FAKES = {  # Slurm on one machine: a job array runs at once, task after task
    "sbatch": """#!/bin/sh
for last; do :; done
cp "$last" "$SLURM_HERE/job.sh"
array=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$SLURM_HERE/job.sh")
for number in $(seq 0 ${array:-0}); do
    export SLURM_NODELIST=here
    SLURM_ARRAY_TASK_ID=$number SLURM_JOB_ID=1 bash "$SLURM_HERE/job.sh" >> "$SLURM_HERE/log" 2>&1
done
echo "Submitted batch job 1"
""",
    "srun": '#!/bin/sh\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/sh\necho here\n",
    "squeue": "#!/bin/sh\nexit 0\n",
}


def rows(folder: Path, model: Path, workers: Workers = HERE, fails: str = "") -> list[dict[str, Any]]:
    return process_documents(
        DOCUMENTS, Ask(fails), DocumentGeneration(LocalWriter(str(model), batch=2), SAMPLED, folder), tell, 3, workers
    )


@pytest.mark.slow
def test_one_process_and_several_end_with_the_same_rows(instructed: Path, tmp_path: Path) -> None:
    one, several = (rows(tmp_path / str(count), instructed, Workers(count)) for count in (1, 3))
    assert one == several and [row["id"] for row in one] == [each.id for each in DOCUMENTS]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_ray_ends_with_the_same_rows(instructed: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        assert rows(tmp_path / "ray", instructed, Workers(cluster="ray", memory=1)) == rows(
            tmp_path / "here", instructed
        )
    finally:
        ray.shutdown()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_slurm_ends_with_the_same_rows(instructed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's own programs are stood in for: what they are handed runs as it is, on this machine."""
    for name, text in FAKES.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    monkeypatch.setenv("SLURM_HERE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path]))
    found = rows(tmp_path / "slurm", instructed, Workers(cluster="slurm", partition="short"))
    assert found == rows(tmp_path / "here", instructed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_fails_is_told_and_the_others_are_not_run_again(
    instructed: Path, tmp_path: Path, workers: int
) -> None:
    with pytest.raises(ValueError, match="d7 fails"):
        rows(tmp_path / "work", instructed, Workers(workers), fails="d7")
    done = {path.name.removesuffix(".json.gz") for path in (tmp_path / "work" / "rows").iterdir()}
    assert "00002" not in done and (workers > 1 or done == {"00000", "00001"})
    before = {name: (tmp_path / "work" / "rows" / f"{name}.json.gz").stat().st_mtime_ns for name in done}
    assert rows(tmp_path / "work", instructed, Workers(workers)) == rows(tmp_path / "whole", instructed)
    after = {name: (tmp_path / "work" / "rows" / f"{name}.json.gz").stat().st_mtime_ns for name in done}
    assert after == before


@pytest.mark.slow
def test_a_finished_task_keeps_its_rows_and_the_time_that_they_took(instructed: Path, tmp_path: Path) -> None:
    generation = DocumentGeneration(LocalWriter(str(instructed), batch=2), SAMPLED, tmp_path)
    found = process_documents(DOCUMENTS, Ask(), generation, tell, 3, HERE)
    assert not list((tmp_path / "documents").iterdir()) and len(list((tmp_path / "rows").iterdir())) == 4
    journals = [[json.loads(line) for line in file.open()] for file in tmp_path.glob("written-*.jsonl")]
    assert len(journals) == 4 and all(answers == [] for lines in journals for _, answers in lines)
    assert generation.seconds == sum(seconds for lines in journals for seconds, _ in lines) > 0
    assert process_documents(DOCUMENTS, Ask("d1"), generation, tell, 3, HERE) == found  # no task runs again
