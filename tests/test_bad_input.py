"""Every mistake ends with status 2 and one line that names the flag or the file, before a model is loaded or a file written."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import BASE, ROOT, SMALL, engine_args, run_main

import dapo
import grpo
import lite_ppo
from data import problems
from infra import flags as shared_flags

GOOD = json.dumps({"problem": "what is 1 + 2?", "answer": "3"})


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs main() with these flags; -> the one line it says"""

    def run(*flags, out="run", script=lite_ppo):
        from transformers import AutoModelForCausalLM

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            run_main(monkeypatch, script, *flags, "--out", out)
        assert stop.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"{script.__name__}.py: "), said
        return said

    return run


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--norm", "group"),
        ("--loss_agg", "mean"),
        ("--overlong", "drop"),
        ("--wrong_reward", "-2"),
        ("--clip_low", "-0.1"),
        ("--clip_low", "1.5"),
        ("--clip_high", "-0.1"),
        ("--clip_high", "nan"),
        ("--engine", "sglang"),
        ("--log_with", "nonsense"),
        ("--log_with", "comet_ml"),  # which nobody has installed here
        ("--log_with", "none,wandb"),
        ("--scale", "desktop"),
        ("--steps", "-1"),
        ("--steps", "many"),
        ("--prompts_per_step", "0"),
        ("--group_size", "-8"),
        ("--minibatches", "0"),
        ("--lr", "0"),
        ("--lr", "inf"),
        ("--lr", "nan"),
        ("--temperature", "0"),
        ("--top_p", "0"),
        ("--top_p", "1.1"),
        ("--top_k", "-1"),
        ("--max_response_len", "0"),
        ("--tokens_per_gpu", "0"),
        ("--sharding", "zero3"),
        ("--sleep", "1"),
        ("--compile", "yes"),
        ("--head_dtype", "fp8"),
        ("--kv_cache_gib", "-1"),
        ("--save_total_limit", "0"),
        ("--vllm_tensor_parallel", "0"),
        ("--vllm_tensor_parallel", "2"),  # of one process
        ("--plan", "8 GPUs"),
        ("--plan", "0x80"),
        ("--seed", "-1"),
        ("--seed", "5000000000"),  # numpy's generators take 32 bits
        ("--temperature", "1e-40"),  # logits over it are infinite
        ("--data", "easy,easy"),  # two problems of each id
        ("--eval_every", "0"),
        ("--save_every", "0"),
        ("--eval_samples", "0"),
        ("--eval_pass_k", "2"),  # of one sample
        ("--eval_temperature", "0"),
        ("--eval_top_p", "0"),
        ("--eval_top_k", "-1"),
        ("--eval_max_response_len", "0"),
        ("--template", "none"),
        ("--old_logp", "engine"),
        ("--enable_thinking", "no"),
        ("--enable_thinking", "off"),  # the template knows no such switch
        ("--group_size", "1"),  # with a group-level normalization
        ("--minibatches", "7"),  # 128 responses
        ("--tokens_per_gpu", "100"),  # the longest sequence has 256
        ("--prompts_per_step", "2001"),  # more than there are problems; divisible by --minibatches
        ("--model", "no/such/folder"),
        ("--data", "no_such_set"),
        ("--eval_data", "eval_easy,no_such_set"),
        ("--max_prompt_len", "5"),
        ("--max_prompt_len", "2000"),  # with 192 more than the model's positions
    ],
)
def test_flag(refused, flag, value):
    more = ["--minibatches", "1"] if value == "2001" else []
    assert flag in refused("--scale", "laptop", *more, flag, value)


@pytest.mark.parametrize(
    "script, flag, value, more",
    [
        (lite_ppo, "--old_logp", "rollout", ["--top_p", "0.9"]),
        (lite_ppo, "--old_logp", "rollout", ["--top_k", "5"]),
        (grpo, "--kl_coef", "-0.1", []),
        (grpo, "--kl_coef", "nan", []),
        (grpo, "--kl_coef", "inf", []),
        (grpo, "--kl_estimator", "k4", []),
        (grpo, "--norm", "group", []),
        (grpo, "--group_size", "1", []),
        (grpo, "--lora_rank", "-1", []),
        (grpo, "--lora_rank", "0.5", []),
        (grpo, "--overlong", "filter", []),  # of another paper
        (grpo, "--dynamic_sampling", "on", []),
        (dapo, "--overlong_buffer", "0", []),
        (dapo, "--overlong_buffer", "-8", []),
        (dapo, "--overlong_buffer", "193", []),  # the limit is 192
        (dapo, "--overlong_buffer", "32", ["--max_response_len", "31"]),
        (dapo, "--max_resample", "0", []),
        (dapo, "--max_resample", "-1", []),
        (dapo, "--dynamic_sampling", "maybe", []),
        (dapo, "--overlong", "soft", []),
        (dapo, "--group_size", "1", ["--norm", "none"]),  # always all right or all wrong
        (dapo, "--kl_coef", "0.1", []),
        (lite_ppo, "--kl_coef", "0.1", []),
        (lite_ppo, "--overlong", "penalty", []),
        (lite_ppo, "--max_resample", "3", []),
        (lite_ppo, "--wrong", "-1", []),  # no abbreviations: they would change their meaning with the next flag
    ],
)
def test_flag_of_a_script(refused, script, flag, value, more):
    assert flag in refused("--scale", "laptop", *more, flag, value, script=script)


def test_what_is_off_is_not_checked():
    args = dapo.parse_args(["--scale", "laptop", "--overlong", "keep", "--overlong_buffer", "999"])
    assert args.overlong_buffer == 999
    args = dapo.parse_args(["--scale", "laptop", "--dynamic_sampling", "off", "--norm", "none", "--group_size", "1"])
    assert args.group_size == 1


def test_unknown_flag(refused):
    assert "--normm" in refused("--normm", "none")


def test_processes(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes" in refused("--scale", "laptop", "--vllm_tensor_parallel", "2")


def test_a_folder_without_a_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("--scale", "laptop", "--model", tmp_path / "empty")


@pytest.mark.parametrize(
    "text, named",
    [
        (GOOD + "\n{broken\n", "line 2"),
        (GOOD + "\n\n" + GOOD + "\n", "line 2"),
        ('{"problem": "what is 1 + 2?"}\n', '"answer"'),
        ('{"answer": "3"}\n', '"problem"'),
        ('{"problem": "", "answer": "3"}\n', '"problem"'),
        ('{"problem": "what is 1 + 2?", "answer": " "}\n', '"answer"'),
        ('{"problem": "what is 1 + 2?", "answer": null}\n', '"answer"'),
        ('{"problem": null, "answer": 0}\n', '"problem"'),
        ("[1, 2]\n", "line 1"),
        ('{"id": 1, "problem": "a", "answer": 3}\n{"id": "1", "problem": "b", "answer": 3}\n', "line 2"),
        ("", "line 1"),
        (b"\xff\xfe\n", "line 1"),
    ],
)
@pytest.mark.parametrize("flag", ["--data", "--eval_data"])
def test_data_file(refused, tmp_path, text, named, flag):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused("--scale", "laptop", "--prompts_per_step", "1", flag, path)
    assert str(path) in said and named in said


def test_a_line_separator_within_a_problem_is_no_new_line(tmp_path):
    from transformers import AutoTokenizer

    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"problem": "what is\u2028 1 + 2?", "answer": 3}, ensure_ascii=False) + "\n")
    [row] = problems.load_problems(path, AutoTokenizer.from_pretrained(BASE), engine_args())
    assert row["answer"] == "3" and row["id"] == "mine-1"


def test_a_prompt_longer_than_its_limit(refused, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(GOOD + "\n" + json.dumps({"problem": "what is 1" + " + 1" * 40 + "?", "answer": "41"}) + "\n")
    said = refused("--scale", "laptop", "--prompts_per_step", "1", "--data", path)
    assert "line 2" in said and "--max_prompt_len" in said


def test_vllm_is_not_installed(refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    assert "--engine vllm" in refused("--scale", "laptop", "--engine", "vllm")


@pytest.fixture
def stored(tmp_path):
    """A folder that looks like a run."""
    folder = tmp_path / "old"
    folder.mkdir()
    defaults = {name: columns[0] for name, columns in lite_ppo.DEFAULTS.items()}
    args = defaults | {"scale": "laptop", "engine": "hf", "script": "lite_ppo", "steps": 4}
    (folder / "args.json").write_text(json.dumps(args))
    return folder


def test_resume_what_is_no_run(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refused("--resume", tmp_path / "empty")
    assert "holds no run" in refused("--resume", tmp_path / "nowhere")


def test_resume_with_another_trick(refused, stored):
    assert "--norm none" in refused("--resume", stored, "--norm", "none", out=stored)


def test_resume_elsewhere(refused, stored):
    assert "--out" in refused("--resume", stored)


def test_resume_by_another_script(refused, stored):
    args = json.loads((stored / "args.json").read_text())
    (stored / "args.json").write_text(json.dumps(args | {"script": "grpo"}))
    assert "grpo.py" in refused("--resume", stored, out=stored)


def test_resume_a_finished_run(refused, stored):
    (stored / "result.json").write_text("{}")
    (stored / "checkpoints" / "step_000004").mkdir(parents=True)
    assert "--steps" in refused("--resume", stored, out=stored)
    (stored / "result.json").unlink()
    assert "--steps" in refused("--resume", stored, "--steps", 3, out=stored)  # it is further than that


def test_a_finished_run_is_not_overwritten(refused, stored):
    (stored / "result.json").write_text("{}")
    assert "finished" in refused("--scale", "laptop", out=stored)
    (stored / "result.json").unlink()
    assert "--resume" in refused("--scale", "laptop", out=stored)


def test_from_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "lite_ppo.py"), *SMALL, "--norm", "group"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--norm" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [grpo, dapo, lite_ppo])
@pytest.mark.parametrize("norm", ["batch_mean", "batch_mean_batch_std", "group_mean_group_std", "group_mean_batch_std"])
def test_one_response_has_no_deviation(refused, script, norm):
    flags = ["--norm", norm, "--prompts_per_step", "1", "--group_size", "1", "--minibatches", "1"]
    assert "--group_size 1" in refused(*SMALL, *flags, script=script)


def test_a_driver_that_is_too_old(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(shared_flags, "GPU", ROOT)  # a device file that is there
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "driver" in refused("--steps", "1")


def make_sets(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(GOOD + "\n")
    return ",".join(str(tmp_path / name) for name in names)


@pytest.mark.parametrize(
    "names, says",
    [
        (["a/own.jsonl", "b/own.jsonl"], "two sets are called own"),
        (["own.jsonl", "own.jsonl"], "two sets are called own"),
        (["eval_own.jsonl", "own.jsonl"], "two sets are called own"),
        (["eval_mean.jsonl"], "a set may not be called mean"),
    ],
)
def test_sets_of_one_name(names, says, refused, tmp_path_factory):
    sets = make_sets(tmp_path_factory.mktemp("sets"), names)
    assert says in refused(*SMALL, "--eval_data", sets)
