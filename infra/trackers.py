"""Experiment trackers, those of Accelerate: a run's metrics as in metrics.jsonl, its settings, its samples as a table."""

import argparse
import hashlib
import json
from pathlib import Path

from infra.processes import ROOT, refused


def names(text):
    """An argparse type: trackers, commas between, that are known and installed; none is none."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known, there = {str(x) for x in LoggerType} - {"all"}, {str(x) for x in get_available_trackers()}
    for name in text.split(",") if text != "none" else ():
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name} is no tracker; give none or some of {','.join(sorted(known))}")
        if name not in there:
            raise argparse.ArgumentTypeError(f"{name} is not installed; pip install it, or leave it out")
    return text


def wanted(args):
    """-> what Accelerate is told of them when a run joins its processes"""
    return {} if args.log_with == "none" else dict(log_with=args.log_with.split(","), project_dir=args.out)


def start_trackers(accelerator, args, first_step):
    """Starts them in the first process, in a project that is named after this folder. One of a resumed run goes on."""
    if args.log_with == "none":
        return
    folder = Path(args.out)
    begun = f"{folder.name} {json.loads((folder / 'versions.json').read_text())['begun']}"
    run = {"name": folder.name, "id": hashlib.sha256(begun.encode()).hexdigest()[:16], "resume": "allow"}
    how = {
        "wandb": run | {"dir": str(folder)},
        "swanlab": {"experiment_name": run["name"], "id": run["id"], "resume": "allow"},
        "trackio": {"name": run["name"], "resume": "allow" if first_step else "never", "embed": False},
        "tensorboard": {"purge_step": first_step},
        "mlflow": {"run_name": run["name"]},
    }
    settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in vars(args).items()}
    with refused(f"--log_with {args.log_with}: cannot start"):
        accelerator.init_trackers(ROOT.name, settings, how)


def log_row(trackers, row):
    """row: of metrics.jsonl; what is no number is left out"""
    values = {name: value for name, value in row.items() if name != "step" and value is not None}
    for tracker in trackers:
        tracker.log(values, step=row["step"])


def log_samples(trackers, rows):
    """rows: of samples.jsonl; for the trackers that have tables"""
    columns = "set", "problem", "response", "answer", "correct", "truncated"
    for tracker in trackers if rows else ():
        table = {"columns": [*columns], "data": [[row[name] for name in columns] for row in rows]}
        if hasattr(tracker, "log_table"):
            tracker.log_table("samples", **table, step=rows[0]["step"])
        elif tracker.name == "trackio":
            import trackio

            tracker.log({"samples": trackio.Table(**table)}, step=rows[0]["step"])
