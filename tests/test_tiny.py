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
def test_a_solution_without_habits_is_right(style, monkeypatch):
    monkeypatch.setitem(tiny.HABITS, "careful", dict.fromkeys(tiny.HABITS["able"], 0))
    rng = random.Random(0)
    for _ in range(300):
        terms = tiny.make_terms(rng, *tiny.SETS["medium"][:4])
        text, ends = tiny.make_solution(rng, terms, style, "careful")
        assert ends and rewards.math_reward(text, str(sum(terms))) == 1.0


def test_habits():
    """In the words of the base model on medium problems: how often solutions are right, never end, go on behind the box"""
    rng, right, endless, behind = random.Random(0), 0, 0, 0
    for _ in range(2000):
        terms = tiny.make_terms(rng, *tiny.SETS["medium"][:4])
        text, ends = tiny.make_solution(rng, terms, "base")
        solved = rewards.math_reward(text, str(sum(terms)))
        right, endless, behind = right + solved, endless + (not ends), behind + (solved and not ends)
    assert 0.4 < right / 2000 < 0.6 and 0.1 < endless / 2000 < 0.2 and 0.005 < behind / 2000 < 0.03
    # what never ends is truncated in training, so that its model goes on until it is truncated too


def test_a_loop_is_one_sentence():
    """Its first word says that it comes again: with a number first, the model mixed the sentence with the next."""
    again, ends = tiny.say_again(random.Random(1), "1 + 2 = 3.", 0.0)
    assert not ends and set(again) == {"wait 1 + 2 = 3."} and len(" ".join(again).split()) > tiny.LIMIT
    again, ends = tiny.say_again(random.Random(1), "1 + 2 = 3.", 1.0)
    assert ends and len(again) == 1


@pytest.fixture(scope="module")
def found():
    return {style: tiny.measure(style) for style in tiny.STYLES}


def test_where_training_starts_is_what_the_table_says(found):
    """The same responses on the same machine; on another one they may part where two tokens are nearly as probable."""
    kept = json.loads((tiny.FOLDER / "start.json").read_text())
    for style in tiny.STYLES:
        for name, values in kept[style].items():
            room = {"truncated that loop": 0.3, "truncated that are right": 0.3, "spread of lengths, 95 % / 5 %": 3}
            near = dict(abs=room.get(name, 0.05), rel=0.1)
            assert found[style][name] == pytest.approx(values, **near), (style, name)


def test_the_models_start_where_the_papers_do(found):
    """What base and aligned models are, before a training step: the paper's numbers, by tier easy, medium, hard"""
    base, aligned = found["base"], found["aligned"]
    for style, model in found.items():
        easy, medium, hard = model["pass@1"]
        assert easy > medium > hard and min(model["pass@8"]) > 0.75 and hard < 0.55, style  # each can be learned
        assert all(3.8 <= tiny.LIMIT / n <= 10 for n in base["length of right responses"]), style
        assert all(0.05 <= nats <= 0.40 for nats in model["entropy (nats)"]), style
    assert base["pass@1"][0] > 0.65 and base["pass@1"][2] < 0.3 and aligned["pass@1"][0] > 0.8
    assert base["truncated"][2] > 0.12 and base["truncated"] == sorted(base["truncated"])
    assert min(base["length of wrong ones / right"]) > 1.4 and max(base["spread of lengths, 95 % / 5 %"]) >= 5
    assert min(base["truncated that loop"]) > 0.3 and max(base["truncated that are right"]) > 0
    assert max(aligned["truncated"]) < 0.02 and all(0.9 < x < 1.15 for x in aligned["length of wrong ones / right"])
    assert all(0.74 <= share <= 0.92 for share in base["tokens of p >= 0.99"])
    assert all(0.42 <= share <= 0.6 for share in aligned["tokens of p >= 0.99"])
    assert min(aligned["words among open tokens"]) > 0.5 > max(base["words among open tokens"])


def test_the_checkpoints_are_small():
    size = sum(path.stat().st_size for style in tiny.STYLES for path in (tiny.FOLDER / style).iterdir())
    assert size < 10e6
