"""--log_with: what trackers got is what metrics.jsonl has, also of a run that broke off and went on; read by their own readers.

`pip install tensorboard==2.21.0 trackio==0.43.0`, then `python -m pytest -m trackers`."""

import json

import pytest
from conftest import ROOT, SMALL, read_metrics, run_main

import lite_ppo
from infra import runs

pytestmark = pytest.mark.trackers


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


def test_tensorboard(run):
    """One value a step, those that were taken back are gone; the settings beside them"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / ROOT.name), size_guidance={"scalars": 0}).Reload()
    rows = read_metrics(run)
    for name in set().union(*map(values, rows)):
        want = {row["step"]: row[name] for row in rows if row.get(name) is not None}
        found = [(event.step, event.value) for event in reader.Scalars(name)]
        assert [step for step, _ in found] == [*want] and dict(found) == pytest.approx(want, rel=1e-6)
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
