"""avg@n, pass@k and their standard errors; prompts; `--steps 0`; data/difficulty.py."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
from by_hand import load_module
from conftest import BASE, ROOT, SMALL, engine_args, read_metrics, run_main
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import lite_ppo
from data import evaluation, problems
from infra import engines

# ------------------------------------------------------------------------------------------------------------ numbers


def test_pass_at_k():
    """5 responses, 2 right: of the 10 choices of 3 only one holds no right one, 1 - 1/10"""
    assert evaluation.pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert (
        evaluation.pass_at_k(8, 0, 8) == 0 and evaluation.pass_at_k(8, 1, 8) == 1 and evaluation.pass_at_k(8, 8, 1) == 1
    )
    assert evaluation.pass_at_k(8, 2, 1) == pytest.approx(2 / 8)  # avg@8


@pytest.mark.parametrize("n, right, k", [(6, 2, 3), (7, 1, 4), (5, 3, 2)])
def test_pass_at_k_is_the_mean_over_all_choices(n, right, k):
    choices = list(itertools.combinations(range(n), k))
    assert evaluation.pass_at_k(n, right, k) == pytest.approx(
        sum(min(choice) < right for choice in choices) / len(choices)
    )


def test_summary():
    """Three problems with 2, 1 and 0 of 2 right: accuracies 1, 0.5, 0; mean 0.5; deviation 0.5, over sqrt(3)"""
    graded = [(True, 10), (True, 20), (False, 30), (True, 40), (False, 50), (False, 60)]
    samples = [{"correct": c, "tokens": t, "truncated": t == 60, "error": "timeout" * (t == 50)} for c, t in graded]
    found = evaluation.summary(samples, n=2, k=2)
    assert found["accuracy"] == 0.5 and found["accuracy_se"] == pytest.approx(0.5 / math.sqrt(3))
    assert found["pass@2"] == pytest.approx(2 / 3)  # 1, 1, 0: deviation sqrt(1/3), over sqrt(3)
    assert found["pass@2_se"] == pytest.approx(1 / 3)
    assert found["response_len"] == 35
    assert found["truncated"] == found["grader_errors"] == pytest.approx(1 / 6)


# ------------------------------------------------------------------------------------------------------------ --steps 0


def test_evaluation_only(monkeypatch, tmp_path):
    """No training data is needed, eval.json holds the metrics of the one row, and every response is there with its grade."""
    flags = ["--scale", "laptop", "--steps", 0, "--data", "nowhere", "--eval_data", "eval_easy,eval_plus"]
    flags += ["--eval_samples", 3, "--eval_pass_k", 2, "--eval_max_response_len", 40, "--out", tmp_path / "run"]
    [row] = run_main(monkeypatch, lite_ppo, *flags)
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    for name, score in found["sets"].items():
        assert all(row[f"eval/{name}/{metric}"] == value for metric, value in score.items())
    assert found["settings"]["eval_max_response_len"] == 40 and found["model"] == BASE.removeprefix(f"{ROOT}/")
    lines = (tmp_path / "run" / "eval_samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 3 * 200 and max(s["tokens"] for s in samples) == 40
    assert len({(s["set"], s["id"], s["sample"]) for s in samples}) == len(samples)
    for name in ("easy", "plus"):
        mine = [s["correct"] for s in samples if s["set"] == name]
        assert found["sets"][name]["accuracy"] == pytest.approx(sum(mine) / len(mine))
        some = [any(mine[i + a] for a in pair) for i in range(0, 300, 3) for pair in [(0, 1), (0, 2), (1, 2)]]
        assert found["sets"][name]["pass@2"] == pytest.approx(sum(some) / len(some))
    assert found["sets"]["mean"]["accuracy"] == pytest.approx(
        (found["sets"]["easy"]["accuracy"] + found["sets"]["plus"]["accuracy"]) / 2
    )


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_a_checkpoint_is_evaluated_as_it_was_in_its_run(lora_rank, monkeypatch, tmp_path):
    """Also one of LoRA, whose folder holds an adapter."""
    rate = ["--lr", 1e-2] if lora_rank else []
    rows = run_main(monkeypatch, lite_ppo, *SMALL, *rate, "--lora_rank", lora_rank, "--out", tmp_path / "run")
    model = next((tmp_path / "run" / "checkpoints").iterdir())
    flags = [*SMALL, "--steps", 0, "--model", model, "--out", tmp_path / "again"]
    [again] = run_main(monkeypatch, lite_ppo, *flags)
    assert again["eval/easy/accuracy"] == rows[-1]["eval/easy/accuracy"] != rows[0]["eval/easy/accuracy"]
    one, two = [(tmp_path / name / "eval_samples.jsonl").read_text().splitlines() for name in ("run", "again")]
    assert [json.loads(line)["response"] for line in one] == [json.loads(line)["response"] for line in two]


def test_evaluation_samples_in_its_own_way(monkeypatch, tmp_path):
    """Greedy: all responses to a problem are the same, while the rollouts are not."""
    flags = [*SMALL, "--steps", 1, "--eval_samples", 2, "--eval_top_k", 1, "--out", tmp_path / "run"]
    run_main(monkeypatch, lite_ppo, *flags)
    samples = [json.loads(line) for line in (tmp_path / "run" / "eval_samples.jsonl").read_text().splitlines()]
    texts = {}
    for s in samples:
        texts.setdefault(s["id"], set()).add(s["response"])
    assert len(texts) == 100 and all(len(found) == 1 for found in texts.values())
    assert read_metrics(tmp_path / "run")[0]["reward/std"] > 0


# -------------------------------------------------------------------------------------------------------------- prompts

QWEN3 = (  # what of Qwen3's template there is to a conversation without tools and former thoughts
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
CHAT = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\nWhat is {1} + 1?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PLAIN = (
    "Please reason step by step, and put your final answer within \\boxed{}.\n\nProblem: What is {1} + 1?\n\nSolution:"
)


@pytest.fixture
def qwen3():
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: i for i, word in enumerate(["?", *marks])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="?")), chat_template=QWEN3
    )
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "additional_special_tokens": marks[1:]})
    return tokenizer


def test_the_prompt(qwen3):
    assert problems.render("What is {1} + 1?", qwen3) == CHAT
    assert problems.render("What is {1} + 1?", qwen3, enable_thinking="off") == CHAT + "<think>\n\n</think>\n\n"
    assert problems.render("What is {1} + 1?", qwen3, template="plain") == PLAIN


def test_the_prompt_has_its_marks_as_tokens(qwen3, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    [row] = problems.load_problems(tmp_path / "p.jsonl", qwen3, engine_args(max_prompt_len=100))
    assert [i for i in row["prompt_ids"] if i] == [2, 3, 2, 3, 2]  # start and end of two turns, start of the third


def test_what_ends_a_response(qwen3, tmp_path):
    """The end of the text and the end of a turn, though a base model's files name but the first"""
    assert engines.stop_ids(tmp_path, qwen3) == [1, 3]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert engines.stop_ids(tmp_path, qwen3) == [1, 3, 7]


def test_templates_that_cannot_be(qwen3, monkeypatch, capsys):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: qwen3)
    args = SimpleNamespace(model="m", template="chat", enable_thinking="off")
    assert problems.load_tokenizer(args) is qwen3
    qwen3.chat_template = "{{ messages[0].content }}"
    with pytest.raises(SystemExit):
        problems.load_tokenizer(args)
    assert "--enable_thinking off: the chat template of m has no such switch" in capsys.readouterr().err
    qwen3.chat_template = None
    with pytest.raises(SystemExit):
        problems.load_tokenizer(SimpleNamespace(model="m", template="chat", enable_thinking="on"))
    assert "give --template plain" in capsys.readouterr().err
    assert problems.load_tokenizer(SimpleNamespace(model="m", template="plain", enable_thinking="on")) is qwen3


# ----------------------------------------------------------------------------------------------------------- difficulty


@pytest.fixture
def two_sets(tmp_path):
    for name in ("eval_easy", "eval_hard"):
        lines = (ROOT / "data" / "tiny" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:30]))
    return tmp_path


def test_difficulty(two_sets, monkeypatch, capsys):
    difficulty = load_module(ROOT / "data" / "difficulty.py")
    data = ",".join(str(two_sets / f"eval_{name}.jsonl") for name in ("easy", "hard"))
    difficulty.main(["--scale", "laptop", "--data", data])
    counts = {}
    for name in ("easy", "hard"):
        rows = [json.loads(line) for line in (two_sets / f"eval_{name}.difficulty.jsonl").read_text().splitlines()]
        assert len(rows) == 30 and all(row["samples"] == 8 and 0 <= row["correct"] <= 8 for row in rows)
        assert all(row["correct"] + row["no_answer"] <= 8 for row in rows)
        counts[name] = [row["correct"] for row in rows]
    assert sum(counts["easy"]) > sum(counts["hard"]) > 0
    assert (two_sets / "difficulty.png").stat().st_size > 5000

    monkeypatch.setattr(difficulty, "start_engine", lambda args: pytest.fail("sampled again"))
    difficulty.main(["--scale", "laptop", "--data", data, "--keep", "1", "6"])
    kept = (two_sets / "eval_easy_1_6.jsonl").read_text().splitlines()
    lines = (two_sets / "eval_easy.jsonl").read_text().splitlines()
    assert kept == [line for line, k in zip(lines, counts["easy"]) if 1 <= k <= 6] and 0 < len(kept) < 30
    assert f"{len(kept)} of 30" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--keep", "5", "3"], "--keep 5 3: give LO <= HI"),
        (["--keep", "1", "9"], "--keep 1 9"),
        (["--data", "nowhere"], "--data nowhere: there is no"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--samples", "0"], "--samples: 0 is out of range"),
        (["--steps", "3"], "unrecognized arguments"),
    ],
)
def test_difficulty_refuses(flags, said, capsys):
    difficulty = load_module(ROOT / "data" / "difficulty.py")
    with pytest.raises(SystemExit) as stop:
        difficulty.parse_args(["--scale", "laptop", *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err
