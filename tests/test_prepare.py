"""The data sets, from small files in the columns of the hub."""

import json
import os
import subprocess
import sys

import pytest
from by_hand import load_module
from conftest import ROOT

prepare = load_module(ROOT / "data" / "prepare.py")


def forget():
    """What was read and chosen in this process before"""
    prepare.problems_of.cache_clear()
    prepare.usable.cache_clear()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Every source with made-up problems: the evaluation sets whole, the others with a hundred or two."""
    forget()
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in prepare.EVAL:
        rows = [{"problem": f"What is {i} of {name}?", "answer": str(i)} for i in range(prepare.EXPECTED[name][0])]
        write(folder / f"{name}.jsonl", rows)
    level = [1.0, 2.0, 3.0, 4.0, 8.0]
    rows = [
        {"question": f"Deep {i}", "final_answer": rf"\frac{{{i}}}{{7}}", "difficulty": level[i % 5]} for i in range(200)
    ]
    write(folder / "deepmath-000.jsonl", rows)
    write(folder / "gsm8k_train.jsonl", [{"problem": f"Shop {i}", "answer": str(i)} for i in range(80)])
    write(folder / "math_train.jsonl", [{"problem": f"M {i}", "answer": str(i), "level": i % 3} for i in range(60)])
    rows = [{"prompt": f"Contest {i}", "solution": str(i), "reward_model": {"ground_truth": str(i)}} for i in range(50)]
    write(folder / "dapo.jsonl", rows)
    return folder


def run(folder, *flags):
    """-> the rows of each file that was made"""
    out = folder.parent / "out"
    prepare.main([*flags, "--from", str(folder), "--out", str(out)])
    assert not list(out.glob("*.tmp"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in out.glob("*.jsonl")}


def refused(folder, capsys, *flags):
    """-> the one line it says; nothing may be written"""
    forget()
    with pytest.raises(SystemExit) as stop:
        run(folder, *flags)
    assert stop.value.code == 2 and not (folder.parent / "out").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if line and "gold/s]" not in line]
    assert len(said) == 1
    return said[0]


def test_all(folder, capsys):
    made = run(folder, "all", "--size", "100")
    assert {name: len(rows) for name, rows in made.items()} == {
        **{name: prepare.EXPECTED[name][0] for name in prepare.EVAL},
        **{"easy": 100, "medium": 100, "hard": 100, "dapo": 50},
    }
    for rows in made.values():
        assert all(list(row) == ["id", "problem", "answer", "source", "level"] for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
    table = capsys.readouterr().out
    assert "math500             500     500" in table and "easy                100     100" in table


def test_tiers(folder):
    made = run(folder, "medium", "hard", "easy", "--size", "80")
    # medium: the 80 easiest of 40 with each of 1, 2, 3, 4, 8
    assert sorted(row["level"] for row in made["medium"]) == [1.0] * 40 + [2.0] * 40
    levels = [row["level"] for row in made["hard"]]
    assert levels.count(8.0) > levels.count(4.0) > levels.count(1.0)
    # easy: of 80 and the 20 with level 1
    assert len(made["easy"]) == 80 and {row["level"] for row in made["easy"] if row["source"] == "simplerl_easy"} == {
        None,
        1,
    }


def test_hard_is_drawn_in_proportion_to_the_difficulty():
    """One of two problems with difficulties 2 and 8 comes first with chances 0.2 and 0.8."""
    _, order = prepare.TIERS["hard"]
    first = [order(8, prepare.uniform(i, "a")) < order(2, prepare.uniform(i, "b")) for i in range(4000)]
    assert abs(sum(first) / 4000 - 0.8) < 0.02  # three standard errors


def test_the_same_problems_give_the_same_files(folder):
    first = run(folder, "all", "--size", "50")
    for path in folder.glob("*.jsonl"):
        path.write_text("".join(line + "\n" for line in reversed(path.read_text().splitlines())))
    forget()
    assert run(folder, "all", "--size", "50") == first


def test_parquet(folder):
    import pyarrow.parquet

    rows = [json.loads(line) for line in (folder / "deepmath-000.jsonl").read_text().splitlines()]
    first = run(folder, "hard", "--size", "50")
    (folder / "deepmath-000.jsonl").unlink()
    for i in range(2):  # in two parts, as on the hub
        part = pyarrow.Table.from_pylist(rows[i * 100 : i * 100 + 100])
        pyarrow.parquet.write_table(part, folder / f"deepmath-{i}-of-2.parquet")
    forget()
    assert run(folder, "hard", "--size", "50") == first


def test_what_is_left_out(folder, capsys):
    test = json.loads((folder / "math500.jsonl").read_text().splitlines()[0])["problem"]
    with open(folder / "deepmath-000.jsonl", "a") as f:
        for problem, answer, level in [
            (f"${test.upper()}$", "1", 1.0),  # stands in an evaluation set, written in another way
            (r"Deep  \(0\)", r"\frac{0}{7}", 1.0),  # repeated
            ("Without a difficulty", "1", -1.0),
            ("Only a string", r"G/K \cong H", 1.0),
            *[(f"Is it so, {i}?", ["Yes", r"\text{No}", "True", "false"][i % 4], 1.0) for i in range(40)],
        ]:
            f.write(json.dumps({"question": problem, "final_answer": answer, "difficulty": level}) + "\n")
    rows = run(folder, "medium", "--size", "1000")["medium"]
    asked = {row["problem"] for row in rows}
    assert len(rows) == 204 and not asked & {f"${test.upper()}$", "Without a difficulty", "Only a string"}
    assert sum(p.startswith("Is it so") for p in asked) == 4  # 2 % of the whole
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("medium"))
    for part in (
        "1 repeated",
        "1 in an evaluation set",
        "1 without a difficulty",
        "36 True/False",
        "1 with a gold that is only",
    ):
        assert part in line
    assert "all there are" in line


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("$x+1$", "x+1"),
        ("69$,$84", "69,84"),
        (r"\$5", r"\$5"),
        ("155.", "155"),
        (r"\text{(E)},", r"\text{(E)}"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("1e-05", r"1 \times 10^{-5}"),
        ("3e^x", "3e^x"),  # Euler's number
        ("2e", "2e"),
        ("np.arcsin(10/13)", r"\arcsin(10/13)"),
        ("-1./3", "-1/3"),
        ("0.5", "0.5"),
    ],
)
def test_clean(answer, gold):
    assert prepare.clean(answer) == gold


def test_clean_golds_are_right():
    """What a person would write for a MinervaMath gold"""
    for answer, box in [
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("1e-05", "0.00001"),
        ("np.arcsin(10/13)", r"\arcsin(10/13)"),
    ]:
        assert prepare.rewards.math_reward(rf"\boxed{{{box}}}", prepare.clean(answer)) == 1.0


@pytest.mark.parametrize(
    "name, line, said",
    [
        ("amc23", '{"problem": "p", "answ', "amc23.jsonl, line 41: not JSON; was its download cut short?"),
        ("amc23", '{"problem": "p"}', "line 41: none of the columns gt_answer, final_answer"),
        ("amc23", '{"answer": "p"}', "line 41: none of the columns problem, question"),
        ("amc23", '{"problem": "p", "answer": " "}', "line 41: the answer is empty"),
        ("amc23", '{"problem": "p", "answer": "$"}', "line 41: the answer is empty"),
        ("amc23", "[]", "line 41: no object"),
        ("amc23", '{"problem": "p", "answer": "1"}', "amc23: 41 problems, where every published figure is for 40"),
        ("amc23", '{"problem": "What is 3 of amc23?", "answer": "1"}', "amc23: a problem stands there twice"),
        (
            "deepmath-000",
            '{"question": "p", "final_answer": "1", "id": 7}\n' * 2,
            "line 202: a second row with the id 7",
        ),
        (
            "deepmath-000",
            '{"question": "p", "final_answer": "1", "difficulty": "much"}',
            "line 201: the level much is no number",
        ),
    ],
)
def test_bad_sources(folder, capsys, name, line, said):
    with open(folder / f"{name}.jsonl", "a") as f:
        f.write(line)
    assert said in refused(folder, capsys, "all", "--size", "50")


def test_missing_files(folder, capsys):
    assert "no such folder" in refused(folder / "nowhere", capsys, "all")
    (folder / "dapo.jsonl").unlink()
    assert "dapo: " in refused(folder, capsys, "dapo")
    assert "dapo" not in run(folder, "all", "--size", "50") and "has no file of it" in capsys.readouterr().out
    (folder / "aime24.jsonl").unlink()
    forget()
    with pytest.raises(SystemExit):  # what nothing may be trained on must be known
        run(folder, "hard", "--size", "50")
    assert "has no aime24*" in capsys.readouterr().err
    for path in folder.glob("*"):
        path.unlink()
    (folder.parent / "out").rename(folder.parent / "before")
    assert "has none of math500" in refused(folder, capsys, "all")


def test_only_the_columns_needed_are_read(tmp_path):
    """As from the hub, from a folder of the same layout"""
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    rows = [{"question": "q", "final_answer": "1", "difficulty": 2.0, "r1_solution_1": "long"}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet")
    found = prepare.download(str(tmp_path), prepare.SOURCES["deepmath"][1], 3)
    assert found == [{"question": "q", "final_answer": "1", "difficulty": 2.0}] * 3


def test_a_parquet_file_that_is_cut_short(folder, capsys):
    import pyarrow.parquet

    path = folder / "dapo-0.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p", "solution": "1"}] * 1000), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "was its download cut short?" in refused(folder, capsys, "dapo")


def test_without_a_network(tmp_path):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "data" / "prepare.py", "eval", "--out", tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert "--from FOLDER" in done.stderr.splitlines()[-1] and len(done.stderr.splitlines()) == 1
