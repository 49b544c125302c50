"""The laptop world is what it says it is."""

import json
import random
import sys

import pytest
from conftest import ROOT

import rewards

sys.path.insert(0, str(ROOT / "data"))
import tiny  # noqa: E402


def rows(name):
    return [json.loads(line) for line in (tiny.FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_sets():
    problems = {name: [row["problem"] for row in rows(name)] for name in tiny.SETS}
    assert {name: len(p) for name, p in problems.items()} == {name: size for name, (*_, size) in tiny.SETS.items()}
    everything = [p for ps in problems.values() for p in ps]
    assert len(everything) == len(set(everything))  # nothing is held out and trained on
    assert len(problems["eval_medium"]) >= 200
    assert sum(name.startswith("eval_") for name in tiny.SETS) == 6


@pytest.mark.parametrize("name", tiny.SETS)
def test_answers(name):
    for row in rows(name):
        expression = row["problem"].removeprefix("what is ").removesuffix("?")
        assert str(eval(expression)) == row["answer"] and 0 <= int(row["answer"]) <= tiny.LARGEST_TOTAL


def test_the_committed_problems_are_those_the_script_makes(tmp_path, monkeypatch):
    folder = tiny.FOLDER
    monkeypatch.setattr(tiny, "FOLDER", tmp_path)
    tiny.make_problems()
    for name in tiny.SETS:
        assert (tmp_path / f"{name}.jsonl").read_text() == (folder / f"{name}.jsonl").read_text()


@pytest.mark.parametrize("style", tiny.STYLES)
def test_tokenizer(style):
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(tiny.FOLDER / style), random.Random(0)
    assert tokenizer.get_vocab() == tiny.make_tokenizer().get_vocab()
    for _ in range(300):
        terms = tiny.make_terms(rng, *tiny.SETS["hard"][:4])
        text = tiny.make_solution(rng, terms, style)[0]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is 1 + 2?"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|user|>what is 1 + 2?<|assistant|>"


@pytest.mark.parametrize("style", tiny.STYLES)
def test_careful_solutions_are_right(style):
    rng = random.Random(0)
    for _ in range(300):
        terms = tiny.make_terms(rng, *tiny.SETS["medium"][:4])
        text, ends = tiny.make_solution(rng, terms, style, careful=True)
        assert ends and rewards.math_reward(text, str(sum(terms))) == 1.0


def test_careless_solutions_are_careless():
    rng, right, endless = random.Random(0), 0, 0
    for _ in range(1000):
        terms = tiny.make_terms(rng, *tiny.SETS["medium"][:4])
        text, ends = tiny.make_solution(rng, terms, "base")
        right, endless = right + rewards.math_reward(text, str(sum(terms))), endless + (not ends)
    assert 0.3 < right / 1000 < 0.6 and 0.05 < endless / 1000 < 0.12
    # a solution that never stops is truncated in training, so that its model goes on until it is truncated too


def test_the_checkpoints_are_small():
    size = sum(path.stat().st_size for style in tiny.STYLES for path in (tiny.FOLDER / style).iterdir())
    assert size < 10e6
