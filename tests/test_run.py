"""Whole runs of the real script: what it writes, how it stops, how it goes on."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
import workers
from conftest import (
    BASE,
    ROOT,
    SHARED,
    SMALL,
    load_policy,
    make_batch,
    make_parser,
    read_metrics,
    run_main,
    without_times,
)

import common
import dapo
import grpo
import lite_ppo
import rewards
from infra import engines, flags, runs
from infra import policy as policy_module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run that nobody disturbed: four steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, lite_ppo, *SMALL, "--steps", 4, "--out", folder)
    return folder


def test_a_run_folder_has_everything(finished):
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all("eval/easy/accuracy" in rows[i] for i in (0, 4)) and "eval/easy/accuracy" not in rows[1]
    for name in (
        "reward/mean",
        "rollout/logp_gap",
        "train/loss",
        "train/entropy",
        "adv/std",
        "time/generate",
        "time/step",
    ):
        assert name in rows[0]
    assert rows[0]["rollout/logp_gap"] < 1e-5  # the engine and the trainer are one model
    args = json.loads((finished / "args.json").read_text())
    assert args["steps"] == 4 and args["norm"] == "group_mean_batch_std" and args["script"] == "lite_ppo"
    assert "torch" in json.loads((finished / "versions.json").read_text())
    assert (finished / "source" / "lite_ppo.py").read_text() == (ROOT / "lite_ppo.py").read_text()
    source = {str(p.relative_to(finished / "source")) for p in (finished / "source").rglob("*.py")}
    assert source == {"lite_ppo.py", "rewards.py", "data/problems.py", "data/evaluation.py", *SHARED}
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert set(json.loads((finished / "samples.jsonl").read_text().splitlines()[0])) >= {
        "step",
        "problem",
        "response",
        "correct",
    }
    asked, trained = (
        {json.loads(row)["problem"] for row in (ROOT / "data" / "tiny" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("eval_easy", "easy")
    )
    shown = {json.loads(line)["problem"] for line in (finished / "samples.jsonl").read_text().splitlines()}
    assert shown <= asked - trained
    assert json.loads((finished / "result.json").read_text())["easy"] == [rows[i]["eval/easy/accuracy"] for i in (0, 4)]
    assert all(row["train/grad_norm"] > 0 and row["reward/std"] > 0 for row in rows[:4])  # it did learn from something


def test_the_model_card(finished):
    """Beside the last checkpoint's weights, with numbers of the evaluations; the head is YAML as the hub reads it"""
    from huggingface_hub import ModelCard

    [folder] = (finished / "checkpoints").iterdir()
    card, rows = ModelCard.load(folder / "README.md"), read_metrics(finished)
    assert card.data.pipeline_tag == "text-generation" and card.data.tags == ["reinforcement-learning", "lite_ppo"]
    assert "base_model" not in card.data.to_dict()  # which was a folder
    before, after = (f"{rows[i]['eval/easy/accuracy']:.3f} ± {rows[i]['eval/easy/accuracy_se']:.3f}" for i in (0, -1))
    assert f"| easy | {before} | {after} |" in card.text and "| norm | group_mean_batch_std |" in card.text
    assert (folder / "curves.png").read_bytes() == (finished / "curves.png").read_bytes()


def test_what_is_logged_of_the_tokens(finished):
    """The bins hold all tokens; clipped.jsonl has as many clipped tokens as the metrics say; a shown response is one of its step."""
    rows = read_metrics(finished)
    clipped = [json.loads(line) for line in (finished / "clipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in clipped] == [0, 1, 2, 3]
    for row, of in zip(rows, clipped):
        bins = [row[f"rollout/prob_{p}"] for p in (0, 30, 60, 85, 95, 99)]
        assert sum(bins) == pytest.approx(1) and 0 < row["rollout/entropy"] < 1
        trained = row["perf/train_tokens_per_s"] * row["time/update"]
        for bound in ("low", "high"):
            counts = of[bound]
            assert sum(n for *_, n in counts) == pytest.approx(row[f"train/clip_{bound}"] * trained, abs=1e-3)
            assert [n for *_, n in counts] == sorted((n for *_, n in counts), reverse=True)
    assert any(of[bound] for of in clipped for bound in ("low", "high"))  # at this learning rate
    shown = [json.loads(line) for line in (finished / "tokens.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {0}  # --eval_every 40
    for row in shown:
        assert len(row["tokens"]) == len(row["ratio"]) == len(row["entropy"]) and row["tokens"][-1] == "<|end|>"
        assert all((row["ratio"][i] < 0.8) & (row["adv"] < 0) for i in row["low"])
        assert all((row["ratio"][i] > 1.2) & (row["adv"] > 0) for i in row["high"])


def test_what_is_logged_of_the_truncated(tmp_path):
    """Four responses are truncated: a right one that loops, a wrong one that loops, two wrong ones that do not"""
    log = runs.Log(Namespace(out=tmp_path, steps=1, log_tokens="off", group_size=5), 0, {}, None, None)
    loop, plain = torch.tensor([7, 8] * 40), torch.arange(80)
    what = [(loop, True, True), (loop, True, False), (plain, True, False), (plain, True, False), (plain, False, True)]
    batch = [engines.Response({}, ids, torch.zeros(80), truncated, "") for ids, truncated, _ in what]
    grades = [rewards.Grade(correct) for *_, correct in what]
    log.lap("generate")
    log.rollout(batch, grades)
    log.advantages(torch.zeros(1, 5), torch.zeros(5))
    log.lap("update")
    log.write(0)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    expected = {"truncated": 4 / 5, "truncated_right": 1 / 5, "repeat_ratio": 2 / 4}
    expected |= {"repeat_ratio_right": 1, "repeat_ratio_wrong": 1 / 3}
    assert {name: row[f"rollout/{name}"] for name in expected} == pytest.approx(expected)


def test_the_log_of_tokens_can_be_left_out_and_costs_little(monkeypatch, tmp_path):
    """--log_tokens off leaves the rest the same; on, it takes less than 3 % of the steps' time, at the laptop's own size"""
    spent = []

    def timed(call):
        def wrapper(*args):
            begun = time.perf_counter()
            call(*args)
            spent.append(time.perf_counter() - begun)

        return wrapper

    for name in ("trained_tokens", "write_clipped", "write_shown"):
        monkeypatch.setattr(runs.Log, name, timed(getattr(runs.Log, name)))
    flags = ["--scale", "laptop", "--steps", 3, "--eval_data", "eval_easy", "--eval_every", 2]
    on = run_main(monkeypatch, lite_ppo, *flags, "--out", tmp_path / "on")
    steps = sum(row["time/step"] - row.get("time/eval", 0) for row in on)
    assert len(spent) > 3 * 3 and sum(spent) < 0.03 * steps
    spent.clear()
    off = run_main(monkeypatch, lite_ppo, *flags, "--log_tokens", "off", "--out", tmp_path / "off")
    assert sum(spent) < 1e-3 and not (tmp_path / "off" / "clipped.jsonl").read_text()
    same = [name for name in on[0] if not name.startswith(("time/", "perf/", "rollout/prob", "rollout/entropy"))]
    assert [[row.get(name) for name in same] for row in on] == [[row.get(name) for name in same] for row in off]
    assert not any(name.startswith("rollout/prob") for name in off[0])


def test_the_checkpoint_is_a_model(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [folder] = (finished / "checkpoints").iterdir()  # the last one only
    assert folder.name == "step_000004"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 96
    assert AutoTokenizer.from_pretrained(folder).decode([5]) != ""


@pytest.mark.parametrize("script, warmup", [(lite_ppo, 50), (dapo, 20), (grpo, 1)])
def test_the_node_column_runs_too(script, warmup, tmp_path, monkeypatch):
    """The paper's sampling and mini-batches, on the small model and small numbers: the same script at the other scale."""
    data = ROOT / "data" / "tiny"
    flags = ["--scale", "node", "--model", BASE, "--data", data / "easy.jsonl", "--eval_data", data / "eval_easy.jsonl"]
    small = ["--steps", 2, "--prompts_per_step", 8, "--group_size", 8, "--max_prompt_len", 64, "--eval_samples", 1]
    small += ["--max_response_len", 40, "--eval_max_response_len", 40]
    small += ["--overlong_buffer", 8] if script is dapo else []
    rows = run_main(monkeypatch, script, *flags, *small, "--tokens_per_gpu", 512, "--out", tmp_path / "run")
    assert [row["train/lr"] for row in rows[:2]] == pytest.approx([1e-6 / warmup, 1e-6 * min(1, 2 / warmup)])
    if script is lite_ppo:
        assert 0 < rows[0]["rollout/logp_gap"] < 0.02  # top-p 0.99: the engine renormalizes


# ----------------------------------------------------------------------------------------------------- stop and go on

KILLS = {  # where a run is killed: at which call of what, and how many checkpoints there are then
    "before_first_checkpoint": ("common.Log.clear", 2, 0),
    "before_checkpoint": ("common.save", 2, 1),
    "within_checkpoint": ("transformers.PreTrainedModel.save_pretrained", 2, 1),
    "before_rename": ("pathlib.Path.rename", 5, 1),  # the run's folder; twice a checkpoint, of which one is torch's
    "before_old_one_goes": ("shutil.rmtree", 4, 2),
    "within_update": ("common.check_finite", 6, 1),
}
KILLER = """
import os, signal, sys, importlib
import transformers, pathlib, shutil, common
script = importlib.import_module(sys.argv.pop(1))
owner, name = sys.argv.pop(1).rsplit(".", 1)
after = int(sys.argv.pop(1))
owner = eval(owner)
original, calls = getattr(owner, name), []
def kill(*args, **kwargs):
    calls.append(1)
    if len(calls) == after:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, kill)
script.main()
"""


def run_and_kill(script, what, call, *flags):
    command = [sys.executable, "-c", KILLER, script, what, *map(str, [call, *flags])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("what, call, checkpoints", KILLS.values(), ids=KILLS)
def test_killed_and_resumed_is_the_same_run(finished, what, call, checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run_and_kill("lite_ppo", what, call, *SMALL, "--steps", 4, "--out", folder)
    assert len(list((folder / "checkpoints").glob("step_??????"))) == checkpoints
    run_main(monkeypatch, lite_ppo, "--resume", folder)
    got, want = ([without_times(row) for row in read_metrics(f)] for f in (folder, finished))
    assert got == want  # to the last bit
    assert (folder / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    "script, more",
    [
        (grpo, ["--kl_coef", 1]),  # the reference is the first policy, not the one it was resumed with
        (grpo, ["--kl_coef", 1, "--lora_rank", 4]),
        # as many problems a step as it takes
        (dapo, ["--data", "hard", "--max_response_len", 56, "--overlong_buffer", 8]),
    ],
    ids=["grpo", "grpo_lora", "dapo"],
)
def test_the_others_are_the_same_after_a_kill(script, more, tmp_path, monkeypatch):
    flags = [*SMALL, "--steps", 3, *more, "--out"]
    want = run_main(monkeypatch, script, *flags, tmp_path / "whole")
    run_and_kill(script.__name__, "common.check_finite", 5, *flags, tmp_path / "run")
    got = run_main(monkeypatch, script, "--resume", tmp_path / "run")
    assert [without_times(row) for row in got] == [without_times(row) for row in want]
    assert (
        want[1]["train/kl"] > 0
        if script is grpo
        else want[0]["rollout/sampled_responses"] > want[0]["rollout/kept_groups"] * 4
    )


def test_what_accelerate_config_wrote_changes_nothing(finished, tmp_path, monkeypatch):
    found = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16"}
    found |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}
    found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    got = run_main(monkeypatch, lite_ppo, *SMALL, "--steps", 4, "--out", tmp_path / "run")
    assert [without_times(row) for row in got] == [without_times(row) for row in read_metrics(finished)]


def begun(tmp_path, finished):
    """A copy of the finished run that nobody finished"""
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "result.json").unlink()
    return folder


def refused_resume(monkeypatch, capsys, folder):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, lite_ppo, "--resume", folder, "--steps", 6)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lite_ppo.py: ")]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("part", ["__0_0.distcp", ".metadata", "cursor.json"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:50])])
def test_a_damaged_checkpoint(part, damage, finished, tmp_path, monkeypatch, capsys):
    folder = begun(tmp_path, finished)
    last = runs.last_checkpoint(folder)[1]
    damage(last / "state" / part)
    line = refused_resume(monkeypatch, capsys, folder)
    assert str(last) in line and "remove it to go on from the checkpoint before" in line


def test_other_problems_than_when_the_run_began(tmp_path, monkeypatch, capsys):
    rows = (ROOT / "data" / "tiny" / "easy.jsonl").read_text().splitlines()
    (tmp_path / "own.jsonl").write_text("\n".join(rows[:50]))
    folder, own = tmp_path / "run", ["--data", tmp_path / "own.jsonl"]
    run_main(monkeypatch, lite_ppo, *SMALL, "--steps", 1, *own, "--out", folder)
    (tmp_path / "own.jsonl").write_text("\n".join(rows[1:51]))
    assert "other problems than when the run began" in refused_resume(monkeypatch, capsys, folder)


def test_two_runs_into_one_folder(tmp_path, monkeypatch, capsys):
    args = lite_ppo.parse_args([*SMALL, "--out", str(tmp_path / "run")])
    runs.open_run(args)
    with pytest.raises(SystemExit) as stopped:
        runs.open_run(args)
    assert stopped.value.code == 2 and "another run has made it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_goes_on_already(finished, tmp_path, monkeypatch, capsys):
    folder = begun(tmp_path, finished)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as the other process does
    assert "another process goes on with this run" in refused_resume(monkeypatch, capsys, folder)
    os.close(held)
    for steps in (5, 6):  # in one process, as in a notebook
        assert run_main(monkeypatch, lite_ppo, "--resume", folder, "--steps", steps)


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, lite_ppo, *SMALL, "--out", tmp_path / "file" / "run")
    assert stopped.value.code == 2 and f"--out {tmp_path / 'file' / 'run'}: cannot be made" in capsys.readouterr().err


def test_a_terminal_that_knows_few_characters(tmp_path):
    """What is said has a plus-minus sign, and responses of real models have everything."""
    command = [sys.executable, "lite_ppo.py", *SMALL, "--steps", "0", "--out", str(tmp_path / "run")]
    few = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=few)
    assert done.returncode == 0 and b" ? 0." in done.stdout, done.stderr
    assert b"no run has it" not in done.stderr  # of an evaluation alone nobody expects the curves of training


def test_an_adapters_base_is_found_from_any_folder(tmp_path, monkeypatch):
    shutil.copytree(BASE, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    run_main(monkeypatch, lite_ppo, *SMALL, "--steps", 1, "--lora_rank", 4, "--model", "base", "--out", "run")
    checkpoint = runs.last_checkpoint(tmp_path / "here" / "run")[1]
    monkeypatch.chdir(tmp_path)
    assert policy_module.base_of(checkpoint) == str(tmp_path / "here" / "base")


def test_why_all_rewards_are_equal_is_said_once(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, lite_ppo, *SMALL, "--max_response_len", 2, "--out", tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if "of this rollout earn" in line]
    assert len(told) == 1 and "16 have no box, 16 are truncated, 0 could not be graded" in told[0]


def test_a_line_cut_short_is_forgotten(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    checkpoint = folder / "checkpoints" / "step_000004"
    checkpoint.rename(checkpoint.with_suffix(".tmp"))  # killed before the rename, with nothing to go on from
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) // 2])
    run_main(monkeypatch, lite_ppo, "--resume", folder)
    assert [without_times(r) for r in read_metrics(folder)] == [without_times(r) for r in read_metrics(finished)]


def test_more_steps(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    rows = run_main(monkeypatch, lite_ppo, "--resume", folder, "--steps", 5)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert json.loads((folder / "args.json").read_text())["steps"] == 5 and (folder / "result.json").exists()


# ------------------------------------------------------------------------------------------------------ two processes


def torchrun(processes, *command):
    done = start_torchrun(processes, *command)
    assert done.returncode == 0, done.stderr


def start_torchrun(processes, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=env, timeout=300
    )


FEW = [
    "--overlong",
    "filter",
    "--max_response_len",
    "12",
    "--norm",
    "none",
    "--wrong_reward",
    "-1",
    "--minibatches",
    "8",
]


SPLITS = {
    "lite_ppo-all": ["--max_response_len", "64"],
    "lite_ppo-few_survive": FEW,
    "grpo-kl": ["--max_response_len", "64", "--kl_coef", "1"],
    "grpo-lora": ["--max_response_len", "64", "--kl_coef", "1", "--lora_rank", "4"],
    "dapo-short": "--data hard --max_response_len 48 --overlong_buffer 8 --max_resample 1 --minibatches 8".split(),
}


@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_give_the_same_rollout_and_step(name, tmp_path):
    """From the real command line. Where few responses are trained on, a process may have none, or no mini-batch any."""
    flags = [*SMALL, "--steps", "1", "--prompts_per_step", "8", "--tokens_per_gpu", "256", *SPLITS[name]]
    rows = []
    for processes in (1, 2):
        torchrun(processes, f"{name.split('-')[0]}.py", *flags, "--out", tmp_path / str(processes))
        rows.append(read_metrics(tmp_path / str(processes)))
    one, two = rows
    assert one[0]["adv/zero"] < 1 and one[0]["train/grad_norm"] > 0
    assert 0 < one[0].get("rollout/kept_groups", 1) < 8
    for name, value in without_times(one[0]).items():
        assert two[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def in_two_processes(folder, cases):
    """-> what workers.py makes of each"""
    torchrun(2, "tests/workers.py", folder / "got.pt", *" / ".join(" ".join(map(str, case)) for case in cases).split())
    return torch.load(folder / "got.pt")


def test_a_metric_may_be_noted_on_one_process_alone(tmp_path):
    """It is merged by its name: by position all that follows would be shifted. And the file is JSON, whatever a metric is."""
    [row] = in_two_processes(tmp_path, [("noted", tmp_path)])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    got = {name.removeprefix("train/"): value for name, value in row.items() if name.startswith("train/")}
    want = {"own": 5, "own_max": 7, "shared": 5 / 3, "shared_max": 1, "no_number": None, "first": 3}
    assert got == pytest.approx(want)


def test_token_values_are_summed_by_response(tmp_path):
    """On one process and on two, of which each has some of the packs."""
    want = torch.tensor([float(len(r.ids)) for r in make_batch(12)])
    want[3] = 0
    assert torch.equal(workers.summed(200), want)
    for got in in_two_processes(tmp_path, [("summed", 200), ("summed", 10_000)]):
        assert torch.equal(got, want)


def test_any_split_gives_the_same_gradient(tmp_path):
    """One process or two, few packs or many; with a single response, the second process has an empty pack."""
    cases = [("gradient", s, *case) for s in ("fsdp", "ddp") for case in ((10_000, 12), (80, 12), (10_000, 1))]
    for (_, sharding, budget, survivors), (got_loss, got) in zip(cases, in_two_processes(tmp_path, cases)):
        loss, whole = workers.gradient(sharding, 10_000, survivors)
        off = ((got - whole).norm() / whole.norm()).item()
        print(f"{sharding}, packs of {budget}, {survivors} responses: the gradient is off by {off:.1e} of its length")
        assert whole.abs().max() > 0 and got_loss == pytest.approx(loss, rel=1e-6)
        assert off < 1e-6


def test_the_engine_is_sent_the_weights(tmp_path):
    """From two processes that share them: to the last bit, or as their rounding; an adapter is added before it."""
    cases = [
        ("streamed", "fsdp", "float32", 0),
        ("streamed", "fsdp", "bfloat16", 0),
        ("streamed", "ddp", "bfloat16", 0),
    ]
    cases += [("streamed", "fsdp", "float32", 4)]
    for (_, _, dtype, lora_rank), got in zip(cases, in_two_processes(tmp_path, cases)):
        policy = load_policy(lora_rank=lora_rank)
        want = dict((policy.lm.merge_and_unload() if lora_rank else policy.lm).named_parameters())
        assert got.keys() == want.keys()
        for name, p in want.items():
            assert got[name].dtype == getattr(torch, dtype)
            torch.testing.assert_close(got[name], p.detach().to(got[name].dtype), rtol=0, atol=1e-6 if lora_rank else 0)
        plain = dict(load_policy().lm.named_parameters())
        assert any(not torch.equal(got[name], plain[name].to(got[name].dtype)) for name in got) == (lora_rank > 0)


def test_a_run_goes_on_with_another_number_of_processes(finished, tmp_path):
    """Two processes with shared-out weights, then one, then two that have all; as if one had done it."""
    folder = tmp_path / "run"
    torchrun(2, "lite_ppo.py", *SMALL, "--sharding", "fsdp", "--save_total_limit", 2, "--steps", 2, "--out", folder)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    torchrun(1, "lite_ppo.py", "--resume", folder, "--steps", 3)
    torchrun(2, "lite_ppo.py", "--resume", folder, "--steps", 4, "--sharding", "ddp")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000003", "step_000004"]
    for got, want in zip(read_metrics(folder)[:4], read_metrics(finished)[:4]):
        for name in ("reward/mean", "train/loss", "train/grad_norm", "train/entropy", "rollout/response_len"):
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name


LEARN = ["--scale", "laptop", "--data", "medium", "--eval_data", "eval_medium", "--steps", "10", "--lr", "3e-4"]
ENGINES = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_steps_raise_the_reward(engine, processes, tmp_path):
    learn("lite_ppo", processes, "--engine", engine, "--out", tmp_path / "run")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("script", ["grpo", "dapo"])
def test_ten_steps_of_the_others(script, engine, tmp_path):
    learn(script, 1, "--engine", engine, "--out", tmp_path / "run")


def test_a_file_of_accelerate_config_changes_nothing(tmp_path):
    """Two processes under a file that says FSDP, bf16 and four accumulated passes; one that no file says anything to."""
    wants = {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": True}
    wants = {
        "distributed_type": "FSDP",
        "mixed_precision": "bf16",
        "use_cpu": True,
        "num_processes": 2,
        "fsdp_config": wants,
    }
    (tmp_path / "config.json").write_text(json.dumps(wants))
    flags = [*SMALL, "--steps", "1", "--prompts_per_step", "8", "--max_response_len", "64"]
    torchrun(1, "lite_ppo.py", *flags, "--out", tmp_path / "1")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "config.json"]
    command = [*launcher, "--gradient_accumulation_steps", 4, "lite_ppo.py", *flags, "--out", tmp_path / "2"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (without_times(read_metrics(tmp_path / name)[0]) for name in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_ten_steps_with_lora(engine, tmp_path):
    learn("grpo", 1, "--engine", engine, "--lora_rank", 8, "--lr", 1e-3, "--out", tmp_path / "run")


def learn(script, processes, *flags):
    torchrun(processes, f"{script}.py", *LEARN, *flags)
    rows = read_metrics(flags[-1])
    accuracy = [rows[i]["eval/medium/accuracy"] for i in (0, -1)]
    first, last = (sum(row["rollout/accuracy"] for row in part) / 3 for part in (rows[:3], rows[-4:-1]))
    said = f"{first:.3f} to {last:.3f}, evaluation {accuracy[0]:.3f} to {accuracy[1]:.3f}"
    print(f"{script}, {processes} processes, {' '.join(map(str, flags[:-2]))}: {said}")
    assert last > first + 0.1 and accuracy[1] > accuracy[0] + 0.1
    gaps = [row["rollout/logp_gap"] for row in rows[:-1] if row["adv/zero"] < 1]
    assert len(gaps) > 5 and max(gaps) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_without_samples_takes_part(engine, tmp_path):
    """One problem, one response, two processes: the second has nothing to sample, to grade or to count."""
    one = tmp_path / "one.jsonl"
    one.write_text((ROOT / "data" / "tiny" / "eval_easy.jsonl").read_text().splitlines()[0])
    torchrun(
        2,
        "lite_ppo.py",
        "--scale",
        "laptop",
        "--engine",
        engine,
        "--steps",
        0,
        "--eval_data",
        one,
        "--out",
        tmp_path / "run",
    )
    [row] = read_metrics(tmp_path / "run")
    assert row["eval/one/accuracy"] in (0, 1) and row["eval/one/response_len"] > 0


def test_the_gpus_bench_runs(tmp_path):
    """On the laptop's model with the transformers engine; what it measures there means nothing."""
    command = [sys.executable, "tests/bench_gpu.py", "--size", "tiny", "--engine", "hf", "--only", "engine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["engine"]["k3"] < 1e-6 and found["engine"]["tokens_per_s"] > 0


@pytest.mark.vllm
def test_two_processes_share_one_vllm(tmp_path):
    """Tensor parallel 2, fed from shared-out weights, samples and trains like one process with all of them."""
    flags = [*SMALL, "--engine", "vllm", "--out"]
    torchrun(1, "lite_ppo.py", *flags, tmp_path / "1")
    torchrun(2, "lite_ppo.py", "--vllm_tensor_parallel", 2, "--sharding", "fsdp", *flags, tmp_path / "2")
    for one, two in zip(*(read_metrics(tmp_path / n) for n in "12")):
        for name, value in without_times(one).items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.vllm
def test_vllm_loads_a_checkpoint(finished):
    """As `vllm serve` would, from the folder alone; greedily, token for token what transformers makes of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [folder] = (finished / "checkpoints").iterdir()
    ids = AutoTokenizer.from_pretrained(folder).encode("<|user|>what is 17 - 5 + 3?<|assistant|>")
    lm = AutoModelForCausalLM.from_pretrained(folder)
    want = lm.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)[0, len(ids) :].tolist()
    what = f"""
from vllm import LLM, SamplingParams
llm = LLM({str(folder)!r}, dtype="float32", enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.3)
out = llm.generate([dict(prompt_token_ids={ids})], SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
print("tokens", list(out[0].outputs[0].token_ids))
"""
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # an engine of ours sets them
    env = {name: value for name, value in os.environ.items() if name not in launcher}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", what], cwd=ROOT, capture_output=True, text=True, env=env)
    assert f"tokens {want}" in done.stdout, done.stderr[-2000:]


@pytest.mark.vllm
def test_vllm_without_a_launcher_and_to_the_end(tmp_path):
    """`python lite_ppo.py --engine vllm` starts, samples, and leaves without an error on the way out."""
    command = [sys.executable, "lite_ppo.py", *SMALL, "--engine", "vllm", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "run" / "result.json").exists()


# --------------------------------------------------------------------------------------------------------- safeguards


def test_a_stale_engine_stops_the_run(tmp_path, monkeypatch, capsys):
    load = engines.HfEngine.load
    monkeypatch.setattr(
        engines.HfEngine,
        "load",
        lambda self, model: None if hasattr(self, "loaded") else (load(self, model), setattr(self, "loaded", 1)),
    )
    with pytest.raises(SystemExit, match="samples from another model"):
        run_main(monkeypatch, lite_ppo, *SMALL, "--steps", 5, "--out", tmp_path / "run")
    assert capsys.readouterr().err.endswith("\n")  # of the bar, so that the message begins a line
    assert len(read_metrics(tmp_path / "run")) >= 1  # the first rollout was fresh


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    def broken(*args):
        loss, *rest = policy_loss(*args)
        loss = loss.clone()
        loss[17] = float("nan")
        return loss, *rest

    policy_loss = lite_ppo.policy_loss
    monkeypatch.setattr(lite_ppo, "policy_loss", broken)
    with pytest.raises(SystemExit, match="step 0: the loss is nan"):
        run_main(monkeypatch, lite_ppo, *SMALL, "--out", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert found["step"] == 0 and found["loss"] == "nan" and found["response"] and found["token"] < len(found["ids"])


def test_out_of_memory_says_what_to_lower(tmp_path):
    what = "import lite_ppo, torch; lite_ppo.policy_loss = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError('CUDA')); lite_ppo.main()"
    command = [sys.executable, "-c", what, *SMALL, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "OutOfMemoryError" in done.stderr
    assert "GiB a GPU" in done.stderr and "total" in done.stderr
    assert "process 0: the GPU is out of memory; while training lower --tokens_per_gpu 4096" in done.stderr


def test_a_full_disk_leaves_the_checkpoint_before(finished, tmp_path, monkeypatch):
    """From the second checkpoint on no file may grow beyond 100 kB."""
    what = """
import resource, lite_ppo, common
save, calls = common.save, []
def full(*args):
    calls.append(1)
    if len(calls) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return save(*args)
common.save = full
lite_ppo.main()
"""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", what, *SMALL, "--steps", "4", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "GB are free there. A checkpoint is whole or not there" in done.stderr, done.stderr
    assert [p.name for p in (folder / "checkpoints").glob("step_??????")] == ["step_000001"]
    rows = run_main(monkeypatch, lite_ppo, "--resume", folder)
    assert [without_times(row) for row in rows] == [without_times(row) for row in read_metrics(finished)]


def test_a_killed_process_ends_the_run_and_is_named(tmp_path):
    what = """
import os, signal, sys, lite_ppo, common
check, calls = common.check_finite, []
def kill(*args):
    calls.append(1)
    if len(calls) == 3 and common.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    check(*args)
common.check_finite = kill
lite_ppo.main()
"""
    script, since = tmp_path / "killed.py", time.monotonic()
    script.write_text(what)
    done = start_torchrun(2, script, *SMALL, "--sharding", "fsdp", "--out", tmp_path / "run")
    print(f"over after {time.monotonic() - since:.0f} s")
    assert done.returncode == 1 and time.monotonic() - since < 60
    assert re.search(r"rank +: 1 ", done.stderr) and "Signal 9 (SIGKILL)" in done.stderr, done.stderr


# ----------------------------------------------------------------------------------------------------- what is not computed


def test_the_engines_probabilities_do_as_well(tmp_path, monkeypatch):
    """Where sampling is from all tokens and the precision is the same; one pack of each rollout is computed again, to be compared with the engine."""
    rows = {}
    for how in ("rollout", "recompute"):
        flags = [*SMALL, "--tokens_per_gpu", 200, "--old_logp", how, "--out", tmp_path / how]
        rows[how] = run_main(monkeypatch, lite_ppo, *flags)[:2]
    for one, two in zip(rows["rollout"], rows["recompute"]):
        assert one["rollout/logp_gap"] < 1e-5
        for name in ("train/loss", "train/grad_norm", "train/entropy", "train/ratio_max", "reward/mean"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name


def test_a_stale_engine_stops_a_run_that_trusts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(engines.HfEngine, "load", lambda *_: None)
    flags = [*SMALL, "--lr", 1e-2, "--old_logp", "rollout", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match="samples from another model"):
        run_main(monkeypatch, lite_ppo, *flags)


def test_without_an_advantage_nothing_is_computed_but_the_step(tmp_path, monkeypatch):
    """All right in the second rollout: no token goes through the model, and Adam goes on with what it remembers."""
    passed, stepped, weights, forward = [], [], [], policy_module.Policy.forward
    counted = lambda model, pack, t, **how: (passed.append(len(pack.labels)), forward(model, pack, t, **how))[1]
    monkeypatch.setattr(policy_module.Policy, "forward", counted)

    def step(self, *a, **k):
        adam(self, *a, **k)
        stepped.append(len(passed))
        weights.append(self.param_groups[0]["params"][0].detach().clone())

    def rollout(*args):
        grades.clear() if stepped else passed.clear()  # of the self-test
        return generate(*args)

    adam, generate, grades, grade = torch.optim.AdamW.step, engines.Engine.generate, [1], rewards.GradePool.grade
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(engines.Engine, "generate", rollout)
    right = rewards.Grade(True)
    monkeypatch.setattr(
        rewards.GradePool, "grade", lambda s, pairs: grade(s, pairs) if grades else [right] * len(pairs)
    )
    rows = run_main(monkeypatch, lite_ppo, *SMALL, "--out", tmp_path / "run")
    assert len(stepped) == 4 and sum(passed[: stepped[1]]) > 0 and sum(passed[stepped[1] :]) == 0
    assert rows[1]["adv/zero"] == 1 and rows[1]["train/grad_norm"] == 0 and rows[1]["train/loss"] == 0
    assert not torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])


# ------------------------------------------------------------------------------------------------------- overlong filter


@pytest.mark.parametrize("survivors", [0, 1])
def test_filter_leaves_none_or_one(survivors, tmp_path, monkeypatch):
    """With none, nothing moves; with one, the mini-batches without it do not move anything."""
    generate, stepped = engines.Engine.generate, []

    def truncate(self, problems, n, *how):
        batch = generate(self, problems, n, *how)
        for i, response in enumerate(batch):
            response.truncated = i >= survivors
        return batch

    monkeypatch.setattr(engines.Engine, "generate", truncate)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (stepped.append(1), step(self, *a, **k))[1])
    flags = [*SMALL, "--steps", 1, "--overlong", "filter", "--norm", "none", "--wrong_reward", -1]
    rows = run_main(monkeypatch, lite_ppo, *flags, "--out", tmp_path / "run")
    assert len(stepped) == survivors
    assert ("train/loss" in rows[0]) == bool(survivors)
    assert rows[0]["rollout/truncated"] == 1 - survivors / 16


# ------------------------------------------------------------------------------------------------------ dynamic sampling


@pytest.mark.parametrize(
    "mixed, norm", [(0, "group_mean_group_std"), (0, "batch_mean"), (1, "group_mean"), (5, "none")]
)
def test_dynamic_sampling_goes_on_with_what_it_has(mixed, norm, tmp_path, monkeypatch, capsys):
    """Three rounds of four groups find so many that are neither all right nor all wrong; the batch should have four."""
    graded, stepped = [], []

    def grade(self, pairs):
        graded.extend(pairs)
        places = [divmod(i, 4) for i in range(len(graded) - len(pairs), len(graded))]
        return [rewards.Grade(member == 0 and 1 <= group <= mixed) for group, member in places]

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (stepped.append(1), step(self, *a, **k))[1])
    monkeypatch.setattr(common, "evaluate", lambda engine, pool, log, step: graded.clear())
    monkeypatch.setattr(common, "finish", lambda *_: None)
    monkeypatch.setattr(rewards.GradePool, "grade", grade)
    flags = [*SMALL, "--steps", 1, "--max_resample", 2, "--overlong", "keep", "--norm", norm, "--out", tmp_path / "run"]
    row = run_main(monkeypatch, dapo, *flags)[0]
    assert row["rollout/sampled_responses"] == (48 if mixed < 4 else 32)
    assert row["reward/mean"] == pytest.approx(
        (2 * mixed - row["rollout/sampled_responses"]) / row["rollout/sampled_responses"], abs=1e-6
    )
    assert row["rollout/kept_groups"] == min(mixed, 4)
    assert (f"{mixed} of 4 groups after --max_resample 2" in capsys.readouterr().out) == (mixed < 4)
    assert len(stepped) == min(mixed, 1) * 2 and ("train/loss" in row) == bool(mixed)


# ---------------------------------------------------------------------------------------------------------- the reference


def test_compiled_layers_learn_the_same(tmp_path, monkeypatch):
    """What is compiled is each layer alone, with packs of any length; here without inductor, whose C++ takes a minute."""
    compile, seen = torch.nn.Module.compile, []
    eager = lambda self, **how: (seen.append(type(self).__name__), compile(self, backend="eager", **how))  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    flags = [*SMALL, "--tokens_per_gpu", 256, "--steps", 1, "--out"]
    rows = [run_main(monkeypatch, lite_ppo, "--compile", how, *flags, tmp_path / how)[0] for how in ("off", "on")]
    assert seen == ["Qwen3DecoderLayer"] * 2
    for name in ("train/loss", "train/grad_norm", "train/entropy", "rollout/logp_gap"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4, abs=1e-5), name


def test_the_reference_is_the_first_policy(tmp_path, monkeypatch):
    flags = [*SMALL, "--steps", 2, "--minibatches", 1, "--kl_coef", 1, "--out", tmp_path / "run"]
    rows = run_main(monkeypatch, grpo, *flags)
    assert rows[0]["train/kl"] == 0 and rows[1]["train/kl"] > 1e-5


@pytest.mark.parametrize(
    "more, copies", [({"kl_coef": 0}, 1), ({"kl_coef": 1}, 2), ({"kl_coef": 1, "lora_rank": 4}, 1)]
)
def test_copies_of_the_model(more, copies, tmp_path, monkeypatch):
    """The trainer's, and one more only for a KL without LoRA (the hf engine has its own)."""
    load, loaded = policy_module.load_lm, []
    monkeypatch.setattr(policy_module, "load_lm", lambda *a: loaded.append(1) or load(*a))
    flags = [x for k, v in more.items() for x in (f"--{k}", v)]
    rows = run_main(monkeypatch, grpo, *SMALL, *flags, "--steps", 1, "--out", tmp_path / "run")
    assert len(loaded) == copies and ("train/kl" in rows[0]) == (more["kl_coef"] > 0)


def test_lora(tmp_path, monkeypatch):
    """The engine gets weights and adapter summed; only the adapter is trained; the checkpoint is one of peft's."""
    import peft
    from transformers import AutoModelForCausalLM

    rows = run_main(
        monkeypatch,
        grpo,
        *SMALL,
        "--steps",
        3,
        "--lora_rank",
        4,
        "--lr",
        3e-3,
        "--minibatches",
        1,
        "--out",
        tmp_path / "run",
    )
    assert max(row["rollout/logp_gap"] for row in rows[:3]) < 1e-5
    assert rows[0]["train/kl"] == 0 and rows[2]["train/kl"] > 1e-5  # against the model with its adapter off
    base = AutoModelForCausalLM.from_pretrained(BASE)
    before = {name: p.clone() for name, p in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoints" / "step_000003").merge_and_unload()
    changed = {name.split(".")[-2] for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# -------------------------------------------------------------------------------------------------------- no dead flags

OTHERS = {  # flags without choices: two values
    "clip_low": ["0.2", "0.01"], "clip_high": ["0.2", "0.01"], "kl_coef": ["0", "5"],
    "overlong_buffer": ["8", "32"], "max_resample": ["1", "4"],
}  # fmt: skip
NEEDS = {  # what else must be set for a flag to matter: a norm with a std undoes any reward scale
    "wrong_reward": {"norm": "none"}, "kl_estimator": {"kl_coef": 5}, "overlong_buffer": {"max_response_len": 48},
}  # fmt: skip


@pytest.mark.parametrize("script", [lite_ppo, grpo, dapo])
def test_every_choice_of_every_trick_changes_the_update(script, tmp_path, monkeypatch):
    """All of lite_ppo.py's, and what the others have besides (test_structure.py sees to it that the rest is the same code)."""
    from safetensors.torch import load_file

    tricks = {a.dest: [str(c) for c in a.choices or OTHERS[a.dest]] for a in own_flags(script)}
    if script is not lite_ppo:
        known = {a.dest: [str(c) for c in a.choices or OTHERS[a.dest]] for a in own_flags(lite_ppo)}
        tricks = {name: choices for name, choices in tricks.items() if known.get(name) != choices}
    base = [*SMALL, "--steps", 1, "--data", "medium", "--max_response_len", 32, "--minibatches", 4, "--lr", 3e-3]
    base += ["--overlong_buffer", 16] if script is dapo else []
    weights = {}
    for flag, choices in tricks.items():
        for choice in choices:
            settings = NEEDS.get(flag, {}) | {flag: choice}
            folder = tmp_path / f"{flag}={choice}"
            more = [x for k, v in settings.items() for x in (f"--{k}", v)]
            run_main(monkeypatch, script, *base, *more, "--out", folder)
            state = load_file(folder / "checkpoints" / "step_000001" / "model.safetensors")
            weights[flag, choice] = torch.cat([p.flatten() for p in state.values()])
    for flag, choices in tricks.items():
        for i, a in enumerate(choices):
            for b in choices[:i]:
                assert (weights[flag, a] - weights[flag, b]).abs().max() > 1e-6, f"--{flag} {a} and {b} do the same"


def own_flags(script):
    shared = {"help", "scale", "engine", "out", "resume", "plan", *flags.FLAGS}
    return [a for a in make_parser(script)._actions if a.dest not in shared]


# ------------------------------------------------------------------------------------------------------ copy and modify


def test_copy_and_modify(tmp_path):
    """`cp lite_ppo.py mine.py`, another line of advantages, run: the run is called after the copy."""
    for name in ("common.py", "rewards.py", "infra", "data", "plots"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / "lite_ppo.py").read_text()
    line = "lambda r: (r - group_mean(r)) / batch_std(r)"
    assert line in text
    (tmp_path / "mine.py").write_text(text.replace(line, "lambda r: (r - r.median()) / batch_std(r)"))
    done = subprocess.run(
        [sys.executable, "mine.py", *SMALL, "--steps", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine__") and folder.name.endswith("__s1")
