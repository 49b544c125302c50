"""Optional packages: what trackers got is what metrics.jsonl has, also of a run that broke off and went on; reasoning-gym's tasks.

`pip install tensorboard==2.21.0 trackio==0.43.0 reasoning-gym==0.1.25`, then `python -m pytest -m extras`."""

import json
import subprocess
import sys

import pytest
from by_hand import load_module
from conftest import ROOT, SMALL, read_metrics, run_main

import lite_ppo
from data import problems
from infra import runs

pytestmark = pytest.mark.extras
hub = load_module(ROOT / "data" / "hub.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five steps: broken off after the fourth, gone on with from the checkpoint of the third"""
    folder, write = tmp_path_factory.mktemp("tracked"), runs.Log.write

    def breaks_off(log, step):
        write(log, step)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        flags = [*SMALL, "--steps", 5, "--save_every", 3, "--log_with", "tensorboard,trackio", "--out", folder / "run"]
        with pytest.MonkeyPatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(runs.Log, "write", breaks_off)
            run_main(broken, lite_ppo, *flags)
        run_main(patch, lite_ppo, "--resume", folder / "run")
        yield folder / "run"


def values(row):
    return {name: value for name, value in row.items() if name != "step" and value is not None}


def agrees(events, rows):
    """Does tensorboard's own reader find every metric of these rows, one value a step?"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    for name in set().union(*map(values, rows)):
        want = {row["step"]: row[name] for row in rows if row.get(name) is not None}
        found = [(event.step, event.value) for event in reader.Scalars(name)]
        assert [step for step, _ in found] == [*want] and dict(found) == pytest.approx(want, rel=1e-6)


def test_tensorboard(run):
    """One value a step, those that were taken back are gone; the settings beside them"""
    agrees(run / ROOT.name, read_metrics(run))
    settings = [path.read_text() for path in run.glob(f"{ROOT.name}/*/hparams.yml")]
    assert len(settings) == 2 and all(
        "norm: group_mean_batch_std" in text for text in settings
    )  # a start, a resumption


def test_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs(ROOT.name)
    logs, rows = SQLiteStorage.get_logs(ROOT.name, name), read_metrics(run)
    assert name == "run"
    found = {}
    for log in logs:
        found.setdefault(log["step"], {}).update(log)
    for row in rows:
        assert {k: found[row["step"]][k] for k in values(row)} == pytest.approx(values(row))
    samples = [json.loads(line)["response"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["response"] for row in found[0]["samples"]["_value"]] == samples[:8] and len(set(samples)) > 4


def test_two_processes(tmp_path):
    """The first alone writes: one value a step, of both"""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "lite_ppo.py", *SMALL]
    more = ["--log_with", "tensorboard", "--out", tmp_path / "run"]
    subprocess.run([sys.executable, *command, *more], cwd=ROOT, check=True)
    [events] = (tmp_path / "run" / ROOT.name).glob("events.*")
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "rollout/accuracy" in row] == [0, 1]
    agrees(events, rows)


def test_tasks_of_reasoning_gym(tmp_path, monkeypatch):
    """Made once, graded by their own scorer: of countdown any expression that comes to the number is right."""
    import rewards

    monkeypatch.setattr(problems, "hub_file", lambda name, columns: tmp_path / f"{name}.jsonl".replace(":", "-"))
    command = ["reasoning_gym:countdown:3:5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "hub_file", problems.hub_file)
        hub.main(command)
    rows = [row for _, row in runs.read_jsonl(problems.from_elsewhere("data", *command, ""))]
    assert len(rows) == 3 and len({row["id"] for row in rows}) == 3
    answer = rewards.Task(rows[0])
    pairs = [
        (rf"\boxed{{{answer}}}", answer),
        (rf"\boxed{{({answer})}}", answer),
        (r"\boxed{1}", answer),
        ("no box", answer),
    ]
    assert [g.correct for g in rewards.GradePool().grade(pairs)] == [True, True, False, False]
