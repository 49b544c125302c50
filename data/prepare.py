"""The training tiers and the evaluation sets of arXiv 2508.08221, section 3.1, as data/<name>.jsonl.

    easy        5,000 of SimpleRL-Zoo's easy set (GSM8K and level 1 of MATH, their training parts), uniformly
    medium      the 5,000 easiest of DeepMath-103K
    hard        5,000 of DeepMath-103K, with probability proportional to its difficulty
    dapo        DAPO-Math-17k, for dapo.py
    eval        math500, olympiadbench, minerva_math, amc23, aime24, aime25

    python data/prepare.py all                  from the Hugging Face hub
    python data/prepare.py all --from FOLDER    without a network: from FOLDER/<source>*.jsonl or .parquet, see SOURCES

A row is {"id", "problem", "answer", "source", "level"}. Its id is a hash of the problem, and rows are drawn by their ids, so that
the same problems give the same files, wherever they came from and in whatever order.
"""

import functools
import hashlib
import math
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import rewards  # noqa: E402
from data.problems import ANSWER, PROBLEM, column  # noqa: E402
from infra.flags import COUNT, Parser  # noqa: E402
from infra.processes import fail  # noqa: E402
from infra.runs import jsonl, read_jsonl, write_whole  # noqa: E402

SEED = 42  # the paper's, appendix A.1
SIZE = 5000  # problems in a tier, section 3.1
BINARY = {"true", "false", "yes", "no"}
# of the problems to draw from. The paper takes out "an excessive proportion" and gives no number. They are 17 % of DeepMath: a
# model that always says Yes would be right in 13 %, with wrong reasoning or none. At 2 % that is worth less than a tenth of it
BINARY_SHARE = 0.02

SOURCES = {  # name: (on the hub, further arguments of load_dataset, rows there)
    "math500": ("HuggingFaceH4/MATH-500", {"split": "test"}, 500),
    "olympiadbench": ("math-ai/olympiadbench", {"split": "test"}, 675),
    "minerva_math": ("math-ai/minervamath", {"split": "test"}, 272),
    "amc23": ("math-ai/amc23", {"split": "test"}, 40),
    "aime24": ("HuggingFaceH4/aime_2024", {"split": "train"}, 30),
    "aime25": ("math-ai/aime25", {"split": "test"}, 30),
    "simplerl_easy": (
        "hkust-nlp/SimpleRL-Zoo-Data",
        {"data_dir": "simplelr_qwen_gsm8k_level1", "split": "train"},
        8388,
    ),
    "deepmath": (  # three columns of its parquet files; the solutions are most of their 2.1 GB
        "zwhe99/DeepMath-103K",
        {"split": "train", "columns": ["question", "final_answer", "difficulty"]},
        103022,
    ),
    "dapo": ("open-r1/DAPO-Math-17k-Processed", {"name": "all", "split": "train"}, 17398),  # each problem once
}
EVAL = ["math500", "olympiadbench", "minerva_math", "amc23", "aime24", "aime25"]
# where --from has no simplerl_easy, the parts it is made of, with the level of their rows
STAND_IN = {"simplerl_easy": {"gsm8k_train": None, "math_train": 1}}
LEVEL = ("level", "difficulty")

TIERS = {  # name: (source, what its problems are sorted by before the first are taken). u: uniform in (0, 1], one a problem
    "easy": ("simplerl_easy", lambda level, u: u),
    "medium": ("deepmath", lambda level, u: (level, u)),
    # a draw by weight without replacement: Efraimidis, Spirakis
    "hard": ("deepmath", lambda level, u: -math.log(u) / level),
    "dapo": ("dapo", lambda level, u: u),
}
EXPECTED = {  # name: (problems, sha256 of the file made from the copies in public repositories; None: none was at hand)
    "math500": (500, "5db003599cac5d62aaa84ccaca6019b5e7e423c34e2793b8631a9351ab254425"),
    "olympiadbench": (675, "d3657d50b278233ee59df298467540c0307f665680db1d432f1f54405043c635"),
    "minerva_math": (272, "00e273a02b506cae189e84c868705d4addf98922eeb794c493a3f91273f220bd"),
    "amc23": (40, "d1e08266db44e6cd34913be1545a69a1259dcc9ef96288d178a7fccff81d4d4e"),
    "aime24": (30, "af852e0bcb453873398abeca7512b3f5184224690a546b22cc166265410c148e"),
    "aime25": (30, "8d5683220771826213477336f70d08e0a8572bf13210d4381be12e54f807c0ed"),
    "easy": (SIZE, "610e51ea0c2d3999766a84706eebded90aa445d91108e8ba9428ce8a682e80f4"),  # of gsm8k_train and math_train
    "medium": (SIZE, None),
    "hard": (SIZE, None),
    "dapo": (17398, None),  # less those that are left out
}

# -------------------------------------------------------------------------------------------------------------- source


def read_source(name, folder):
    """-> the rows of a source as they are, each with where it stands, or None where the folder has no such file"""
    if folder is None:
        hub, where, total = SOURCES[name]
        return [(f"{hub}, row {i}", row) for i, row in enumerate(download(hub, where, total), start=1)]
    paths = sorted(p for p in folder.glob(f"{name}*") if p.suffix in (".jsonl", ".parquet"))
    if not paths and name in STAND_IN:
        parts = {part: (level, read_source(part, folder)) for part, level in STAND_IN[name].items()}
        if all(found for _, found in parts.values()):
            return [pair for level, found in parts.values() for pair in found if column(pair[1], LEVEL) == level]
    return [pair for path in paths for pair in read_file(path)] if paths else None


def download(hub, where, total):
    import datasets
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # it retries for half a minute, and would say so each time
    try:
        return list(tqdm(datasets.load_dataset(hub, streaming=True, **where), desc=hub, total=total, unit="row"))
    except Exception as error:  # of half a dozen libraries below
        why = str(error).splitlines()[0]
        fail(f"{hub}: {why} ({type(error).__name__}). Without a network give --from FOLDER, see the top of this file")


def read_file(path):
    if path.suffix == ".parquet":
        import pyarrow

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            fail(f"{path}: {str(error).splitlines()[0]}; was its download cut short?")
        return [(f"{path}, row {i}", row) for i, row in enumerate(rows, start=1)]
    damaged = lambda i: fail(f"{path}, line {i}: not JSON; was its download cut short?")
    return [(f"{path}, line {i}", row) for i, row in read_jsonl(path, damaged)]


def clean(answer):
    """A gold as the grader reads it: no dollars or punctuation around it, 4.5e33 as LaTeX, numpy's names and -1./3 as well."""
    answer = re.sub(r"(?<!\\)\$", "", answer).strip()
    answer = re.sub(r"[.,;]+$", "", answer) if not answer.endswith(r"\,") else answer
    answer = re.sub(r"(?<![\w.])([+-]?\d+\.?\d*)[eE]([+-]?\d+)(?![\w.])", scientific, answer)
    answer = re.sub(r"\bnp\.(?=[a-z])", r"\\", answer)
    return re.sub(r"(\d)\.(?=/)", r"\1", answer).strip()


def scientific(m):
    return rf"{m[1]} \times 10^{{{int(m[2])}}}"


@functools.cache
def problems_of(name, folder):
    """-> the rows of a source in the one schema; None where the folder has none"""
    found = read_source(name, folder)
    if found is None:
        return None
    rows, ids = [], set()
    for place, row in found:
        if not isinstance(row, dict):
            fail(f"{place}: no object with columns")
        problem, answer, level = (column(row, names) for names in (PROBLEM, ANSWER, LEVEL))
        answer = ", ".join(map(str, answer)) if isinstance(answer, list) else answer
        for what, value, names in (("problem", problem, PROBLEM), ("answer", answer, ANSWER)):
            if value is None:
                fail(f"{place}: none of the columns {', '.join(names)} for the {what}; it has {', '.join(row)}")
        problem, answer = str(problem).strip(), clean(str(answer))
        for what, value in (("problem", problem), ("answer", answer)):
            if not value:
                fail(f"{place}: the {what} is empty")
        given = row.get("id", row.get("unique_id"))
        if given is not None and given in ids:
            fail(f"{place}: a second row with the id {given}")
        ids.add(given)
        try:
            level = float(level) if isinstance(level, str) else level
        except ValueError:
            fail(f"{place}: the level {level} is no number")
        row = {"id": f"{name}-{digest(same_text(problem))[:12]}", "problem": problem, "answer": answer}
        rows.append(row | {"source": name, "level": level})
    return rows


def same_text(problem):
    """Equal for two problems that differ in spaces, capitals, or how their formulas are set"""
    text = re.sub(r"\\[dt]frac", r"\\frac", problem.casefold())
    return re.sub(r"\s|[$.]|\\[()\[\],;!]|\\left|\\right|\\displaystyle", "", text)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- choice


def uniform(*what):
    """A number in (0, 1] that depends on nothing but this"""
    return 1 - random.Random(" ".join(map(str, (SEED, *what)))).random()


def checkable(golds, name):
    r"""-> those the grader can compare as more than strings: \mathbb{Z}_8 or G/K \cong H would only be right letter by letter."""
    forms = {gold: rewards.normalise(gold) for gold in golds}
    good = {gold for gold, form in forms.items() if rewards.value(form) is not None}
    hard = {form for gold, form in forms.items() if gold not in good and not rewards.too_hard(form)}
    left = [(form, form) for form in hard]
    pool, equal = rewards.GradePool(os.cpu_count()), {}
    with tqdm(desc=f"golds of {name}", total=len(left), unit="gold") as bar:
        for i in range(0, len(left), 256):
            equal |= pool.compare_all(left[i : i + 256])
            bar.update(len(left[i : i + 256]))
    pool.close()
    return good | {gold for gold, form in forms.items() if (form, form) in equal and equal[form, form].correct}


def binary(answer):
    return re.sub(r"\\text|[{}]", "", answer).strip().casefold() in BINARY


@functools.cache
def usable(source, folder):
    """-> the problems of a source that may be trained on; how many were left out, by reason. None, {} without a file"""
    rows = problems_of(source, folder)
    if rows is None:
        return None, {}
    held_out = set()
    for name in EVAL:
        tests = problems_of(name, folder)
        if tests is None:
            fail(f"{folder}: has no {name}*.jsonl or .parquet, which nothing may be trained on; add it")
        held_out |= {same_text(row["problem"]) for row in tests}
    unique = {row["id"]: row for row in rows}
    good = checkable({row["answer"] for row in unique.values()}, source)
    left, guesses, out = [], [], Counter({"repeated": len(rows) - len(unique)})
    for row in unique.values():
        if same_text(row["problem"]) in held_out:
            out["in an evaluation set"] += 1
        elif source == "deepmath" and (row["level"] or 0) <= 0:
            out["without a difficulty"] += 1
        elif binary(row["answer"]):
            guesses.append(row)
        elif row["answer"] not in good:
            out["with a gold that is only a string"] += 1
        else:
            left.append(row)
    few = sorted(guesses, key=lambda row: uniform(row["id"]))[: int(len(left) * BINARY_SHARE / (1 - BINARY_SHARE))]
    out["True/False"] = len(guesses) - len(few)
    return left + few, out


# ---------------------------------------------------------------------------------------------------------------- main


def choose(name, folder, size):
    """-> the problems of a set, what they were chosen from; None, None without a file"""
    if name in EVAL:
        rows = problems_of(name, folder)
        if rows and len({row["id"] for row in rows}) < len(rows):
            fail(f"{name}: a problem stands there twice")
        if rows and len(rows) != EXPECTED[name][0]:
            fail(f"{name}: {len(rows)} problems, where every published figure is for {EXPECTED[name][0]}")
        return rows, ""
    source, order = TIERS[name]
    rows, out = usable(source, folder)
    if rows is None:
        return None, None
    if not rows or (len(rows) < size and not folder and name != "dapo"):
        fail(f"{name}: {len(rows):,} of {size:,} problems are left: {dict(out)}")
    chosen = sorted(rows, key=lambda row: order(row["level"], uniform(name, row["id"])))
    note = f"of {len(rows) + sum(out.values()):,}" + "".join(f", less {n:,} {why}" for why, n in out.items() if n)
    return (chosen, note) if name == "dapo" else (chosen[:size], note + ": all there are" * (len(rows) < size))


def main(argv=None):
    p = Parser(__file__, __doc__, {})
    names = [*TIERS, "eval", "all"]
    p.add_argument("sets", nargs="+", choices=names, metavar="SET", help=f"Which sets: {', '.join(names)}.")
    text = "A folder of local files to read instead of the hub's."
    p.add_argument("--from", dest="folder", type=Path, default=None, help=text)
    text = f"Problems in easy, medium and hard. [{SIZE}]"
    p.add_argument("--size", type=COUNT, default=SIZE, metavar="N", help=text)
    text = "The folder the files go to. [data/]"
    p.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER", help=text)
    args = p.parse_args(argv)
    if args.folder and not args.folder.is_dir():
        fail(f"--from {args.folder}: no such folder")
    groups = {"eval": EVAL, "all": [*EVAL, *TIERS]}
    names = dict.fromkeys(name for group in args.sets for name in groups.get(group, [group]))
    made = {}
    for name in names:
        made[name] = choose(name, args.folder, args.size)
        if made[name][0] is None and "all" not in args.sets:
            fail(f"{name}: {args.folder} has no {TIERS.get(name, [name])[0]}*.jsonl or .parquet")
    if not any(rows for rows, _ in made.values()):
        fail(f"--from {args.folder}: has none of {', '.join(SOURCES)} as *.jsonl or .parquet")
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{'set':14s}{'expected':>9s}{'found':>8s}  sha256")
    for name, (rows, note) in made.items():
        expected, known = EXPECTED[name]
        if name in ("easy", "medium", "hard") and args.size != expected:
            expected, known = args.size, None
        if rows is None:
            print(f"{name:14s}{expected:9,d}    none  {args.folder} has no file of it")
            continue
        text = jsonl(sorted(rows, key=lambda row: row["id"]))
        write_whole(args.out / f"{name}.jsonl", text)
        found = digest(text)
        verdict = "as recorded" if known == found else f"but {known[:12]} is recorded" if known else "(not recorded)"
        print(f"{name:14s}{expected:9,d}{len(rows):8,d}  {found[:12]} {verdict} {note}")


if __name__ == "__main__":
    main()
