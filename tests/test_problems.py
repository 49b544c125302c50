"""What is read from a data file. The order of the problems and the seeds of the samples are functions of what they are for."""

import json
import subprocess
import sys

import pytest
from by_hand import load_module
from conftest import BASE, ROOT, engine_args
from transformers import AutoTokenizer

from data import problems as data
from data.problems import Problems
from infra import engines


def ids(problems):
    return [p["id"] for p in problems]


def make(count=10, seed=1):
    return Problems([{"id": i} for i in range(count)], seed)


def test_an_epoch_takes_every_problem_once():
    problems = make()
    first, second = ([i for _ in range(2) for i in ids(problems.take(5))] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_what_is_left_of_an_epoch_is_not_used():
    problems = make()
    for _ in range(20):
        assert len(set(ids(problems.take(4)))) == 4  # never the same problem twice in a rollout
    problems = make()
    assert ids(problems.take(10)) != ids(problems.take(10))


def test_the_cursor_is_all_there_is():
    one, two = make(), make()
    for _ in range(4):
        one.take(3)
    two.cursor = one.cursor
    assert ids(one.take(3)) == ids(two.take(3))
    assert ids(make(seed=1).take(10)) != ids(make(seed=2).take(10))


def test_seeds():
    rollout = [engines.seed_of(1, 7, f"p{p}", sample) for p in range(128) for sample in range(8)]
    assert len(set(rollout)) == 1024 and all(0 <= seed < 2**31 for seed in rollout)
    assert engines.seed_of(1, 7, "p0", 0) == rollout[0]
    others = [engines.seed_of(*key, 0) for key in [(2, 7, "p0"), (1, 8, "p0"), (1, 7, "p1"), (1, "eval", "p0")]]
    assert len({rollout[0], *others}) == 5


ANSWERS = {
    "72": ["72", 72, " 72 ", "Natalia sold 48/2 = 24 clips in May.\n#### 72", "$72$", r"\boxed{72}", r"\(72\)", "$$72$$",
           r"The sum is $\boxed{72}$."],
    r"\frac{1}{2}": [r"\frac{1}{2}", r"Thus \boxed{\frac{1}{2}}."],
    r"\text{Monday}": [r"\text{Monday}"],
    "10 m": ["10 m"],
    "$x=1$ and $y=2$": ["$x=1$ and $y=2$"],
    "3.5": [3.5, "3.5"],
}  # fmt: skip
NO_ANSWERS = [
    {"value": 3}, ["3"], float("nan"), float("inf"), True, None, "", "  ", "$$", "The answer is 3.", "the answer is 3",
    "We add both numbers and find the sum.", "####", "\\boxed{}", "so \\boxed{ }", "3\ud800",
]  # fmt: skip


@pytest.mark.parametrize("answer, forms", ANSWERS.items())
def test_answers_of_one_reading_are_read(answer, forms):
    assert [data.read_answer(form) for form in forms] == [answer] * len(forms)


@pytest.mark.parametrize("value", NO_ANSWERS)
def test_others_are_not(value):
    with pytest.raises(ValueError):
        data.read_answer(value)


def load(tmp_path, rows, **changes):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = engine_args(max_prompt_len=400, **changes)
    return data.load_problems(path, AutoTokenizer.from_pretrained(args.model), args)


def test_all_lines_are_read_before_one_is_refused(tmp_path, capsys):
    rows = [
        {"problem": "what is 1 + 2?", "answer": answer} for answer in ("3", None, ["3"], "3", {}, "The answer is 3.")
    ]
    with pytest.raises(SystemExit):
        load(tmp_path, rows)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "4 such of 6 lines" in line
    assert [f"line {i}:" in line for i in range(1, 7)] == [False, True, True, False, True, False]


@pytest.mark.parametrize("problem", [3, {"text": "1 + 2"}, [], ["what is 1 + 2?"], [{"role": "user"}], "\ud800", " ",
                                     [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]])  # fmt: skip
def test_problems_nobody_can_read(problem, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load(tmp_path, [{"problem": problem, "answer": "3"}])
    assert "line 1: " in capsys.readouterr().err


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_messages_are_messages(template, tmp_path):
    text, user = "what is 1 + 2?", {"role": "user", "content": "what is 1 + 2?"}
    both = [{"role": "system", "content": data.SYSTEM}, user]
    rows = load(tmp_path, [{"problem": p, "answer": "3"} for p in (text, [user], both)], template=template)
    assert rows[0]["prompt_ids"] == rows[1]["prompt_ids"] == rows[2]["prompt_ids"]
    assert {row["problem"] for row in rows} == {text}


def test_a_template_without_a_system_role():
    tokenizer = AutoTokenizer.from_pretrained(engine_args().model)
    refuse = "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refuse + "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    assert data.system_role(tokenizer) == "refused"
    assert data.render("1 + 2", tokenizer) == f"<user>{data.SYSTEM}\n\n1 + 2"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2"}]
    assert data.render(messages, tokenizer) == "<user>Be brief.\n\n1 + 2"


def test_messages_that_the_template_refuses(tmp_path, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(engine_args().model)
    refuse = "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refuse + "{{ m['content'] }}{% endfor %}"
    turns = [{"role": role, "content": "1 + 2"} for role in ("user", "tool", "user")]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "answer": "3"}) + "\n" for p in (turns, turns[:1], turns)))
    with pytest.raises(SystemExit):
        data.load_problems(path, tokenizer, engine_args())
    line = capsys.readouterr().err.strip()
    assert "line 1: no tools; line 3: no tools; 2 such of 3 lines" in line


@pytest.mark.parametrize("name", ["--data", "--eval_data"])
def test_a_run_goes_on_with_the_same_problems_alone(name, tmp_path):
    """Either of the files is another one when the run is resumed."""
    args, rows = (
        engine_args(steps=0, data="one", eval_data="other"),
        [{"problem": "1 + 2", "answer": "3"}, {"problem": "2 + 2", "answer": "4"}],
    )
    tokenizer, digests = AutoTokenizer.from_pretrained(args.model), []
    for changed in (rows, [*rows[:1], rows[1] | {"answer": "5"}]):
        for flag in ("--data", "--eval_data"):
            found = changed if flag == name else rows
            (tmp_path / f"{flag}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        files = [[tmp_path / f"{flag}.jsonl"] for flag in ("--data", "--eval_data")]
        digests.append(data.load_data(args, *files, tokenizer)[0].digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    "value, text", [(1e-05, "0.00001"), (1e22, "10000000000000000000000"), (2.5, "2.5"), (5.0, "5.0")]
)
def test_numbers_are_written_out(value, text):
    assert data.read_answer(value) == text


# ------------------------------------------------------------------------------------------------------------ elsewhere


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """data/hub.py with a hub that has openai/gsm8k alone, and a folder of its own"""
    import datasets

    def load_dataset(repo, *config, split):
        if (repo, config, split) != ("openai/gsm8k", ("main",), "train"):
            raise ConnectionError(f"Couldn't reach {repo} on the Hub\nand more")
        return [{"question": f"{i} + 1?", "note": "-", "answer": f"so\n#### {i + 1}", "final": i + 2} for i in range(3)]

    hub = load_module(ROOT / "data" / "hub.py")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for module in (hub, data):
        monkeypatch.setattr(module, "ROOT", tmp_path, raising=False)
    (tmp_path / "data").mkdir()
    return hub


def test_a_data_set_of_the_hub(hub, tmp_path):
    """Its columns are found by their names, or named; the file is made once, and read as any other."""
    tokenizer, args = AutoTokenizer.from_pretrained(BASE), engine_args(template="plain")
    for columns, answers in (("", ["1", "2", "3"]), ("answer=final", ["2", "3", "4"])):
        hub.main(["openai/gsm8k:main:train", *(["--columns", columns] if columns else [])])
        path = data.from_elsewhere("data", "openai/gsm8k:main:train", columns)  # does not ask the hub again
        rows = data.load_problems(path, tokenizer, args)
        assert [row["answer"] for row in rows] == answers and rows[0]["problem"] == "0 + 1?"
        assert rows[2]["id"] == "openai/gsm8k:main:train-2"
    assert len(list((tmp_path / "data" / "hub").iterdir())) == 2


@pytest.mark.parametrize(
    "flags, said",
    [
        (["me/mine"], "me/mine: Couldn't reach me/mine on the Hub (ConnectionError)"),
        (
            ["openai/gsm8k:main:train", "--columns", "answer=solution"],
            "none of the columns solution for the answer; it has q",
        ),
        (["openai/gsm8k:main:train", "--columns", "solution"], "--columns solution: give problem=COLUMN"),
        (["openai/gsm8k:main:train", "--columns", "problem=question,answer"], "answer: give problem=COLUMN"),
        (["openai/gsm8k:main:train", "--columns", "answer="], "--columns answer=: give problem=COLUMN"),
        (["openai/gsm8k:main:train", "--columns", "level=note"], "--columns level=note: give problem=COLUMN"),
        (["reasoning_gym:chain_sum"], "pip install reasoning-gym"),
    ],
)
def test_what_the_hub_has_not(hub, flags, said, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit):
        hub.main(flags)
    assert said in capsys.readouterr().err


def test_a_name_of_the_hub_is_given_to_the_program(tmp_path, monkeypatch, capsys):
    """Without the flag that keeps a laptop's run off the network; what the program says is said with the flag."""
    asked = []

    def run(command, env, **_):
        asked.append((*map(str, command[2:]), env.get("HF_HUB_OFFLINE")))
        return subprocess.CompletedProcess(command, 2, stderr="a warning\nhub.py: me/mine:x: Couldn't reach it\n")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(subprocess, "run", run)
    args = engine_args(scale="laptop", columns="answer=b")
    with pytest.raises(SystemExit):
        data.data_files(args, "eval_data", "eval_easy,me/mine:x")
    assert asked == [("me/mine:x", "--columns", "answer=b", None)]
    assert "--eval_data me/mine:x: Couldn't reach it" in capsys.readouterr().err
    for name in ("me/mine.jsonl", "mine", "a/b/c", "me/mine:a:b:c"):
        with pytest.raises(SystemExit):
            data.data_files(args, "data", name)
    assert len(asked) == 1


def test_an_evaluation_on_training_problems_is_told(capsys):
    args = engine_args(scale="laptop", data="easy", eval_data="easy", steps=1, prompts_per_step=4, max_prompt_len=64)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for eval_data, said in (("eval_easy", ""), ("easy", "problems are in --data easy too")):
        args.eval_data = eval_data
        data.load_data(args, *(data.data_files(args, "data", name) for name in ("easy", eval_data)), tokenizer)
        assert said in capsys.readouterr().out if said else not capsys.readouterr().out
