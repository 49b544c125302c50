"""Problems from elsewhere, as a .jsonl file: a data set of the Hugging Face hub, or tasks that reasoning-gym makes.

    python data/hub.py openai/gsm8k:main:train
    python data/hub.py me/mine --columns problem=question,answer=solution
    python data/hub.py reasoning_gym:chain_sum:500:7          500 tasks of seed 7; without numbers 1,000 of seed 1

Task i of seed s is task i - 1 of seed s + 1: for --eval_data take a seed that is further away than there are tasks.

--data and --eval_data of the scripts take the same names, and call this once. The file is kept in data/hub/; remove it to have it
made anew. `pip install reasoning-gym` for the tasks, which are graded by their own scorers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.problems import ANSWER, PROBLEM, column, hub_file  # noqa: E402
from infra.flags import Parser  # noqa: E402
from infra.processes import fail  # noqa: E402
from infra.runs import jsonl, write_whole  # noqa: E402

SIZE, SEED = 1000, 1


def of_hub(name, columns):
    """owner/name, owner/name:split or owner/name:config:split -> rows"""
    import datasets
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    repo, *config, split = name.split(":") if ":" in name else (name, "train")
    try:
        found = datasets.load_dataset(repo, *config, split=split)
    except Exception as error:  # of half a dozen libraries below
        fail(f"{name}: {str(error).splitlines()[0]} ({type(error).__name__})")
    rows = []
    for i, row in enumerate(found):
        values = {}
        for what, usual in (("problem", PROBLEM), ("answer", ANSWER)):
            names = (columns[what],) if what in columns else usual
            values[what] = column(row, names)
            if values[what] is None:
                has = f"row {i} has none of the columns {', '.join(names)} for the {what}; it has {', '.join(row)}"
                fail(f"{name}: {has}; name it with --columns {what}=COLUMN")
        rows.append({"id": f"{name}-{i}"} | values)
    return rows


def of_gym(name):
    """reasoning_gym:task, with :size and :seed -> rows"""
    try:
        import reasoning_gym
    except ImportError as error:
        fail(f"{name}: {error}; pip install reasoning-gym")
    _, task, *numbers = name.split(":")
    try:
        size, seed = [*map(int, numbers), *(SIZE, SEED)[len(numbers) :]]
        found = list(reasoning_gym.create_dataset(task, size=size, seed=seed))
    except (ValueError, AssertionError) as error:
        fail(f"{name}: {error}")
    return [
        {"id": f"{name}-{i}", "problem": row["question"], "answer": str(row["answer"]), "task": task, "entry": row}
        for i, row in enumerate(found)
    ]


def main(argv=None):
    p = Parser(__file__, __doc__, {})
    p.add_argument("name", help="Which, see above.")
    p.add_argument("--columns", default="", help="Columns of the data set, where they have other names than usual.")
    args = p.parse_args(argv)
    columns = dict(pair.partition("=")[::2] for pair in args.columns.split(",") if pair)
    if columns.keys() - {"problem", "answer"} or not all(columns.values()):
        fail(f"--columns {args.columns}: give problem=COLUMN, answer=COLUMN or both, a comma between")
    rows = of_gym(args.name) if args.name.startswith("reasoning_gym:") else of_hub(args.name, columns)
    path = hub_file(args.name, args.columns)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, jsonl(rows))
    print(f"{path}: {len(rows):,} problems")


if __name__ == "__main__":
    main()
