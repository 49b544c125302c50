"""How often a model solves each problem of a data set: 8 responses a problem, counted, and a picture of the counts.

That is figure 2 of arXiv 2508.08221. It shows what there is to learn from, and filters: a problem that is solved never or always
teaches nothing under a group mean.

    accelerate launch data/difficulty.py                        the three tiers, with the model that training starts from
    python data/difficulty.py --data hard --keep 1 7            and hard_1_7.jsonl: the problems solved 1 to 7 times

Beside each NAME.jsonl it leaves NAME.difficulty.jsonl, a row {"id", "samples", "correct", "truncated", "no_answer",
"grader_errors"} a problem, and beside the first difficulty.png. With --keep a set that is counted already is not sampled again.
"""

import json
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import rewards  # noqa: E402
import training  # noqa: E402
from plots.difficulty import draw  # noqa: E402

DEFAULTS = {  # flag: (laptop, node). What the runs start from: the same as in lite_ppo.py
    "model": ("data/tiny/base", "Qwen/Qwen3-4B-Base"),
    "template": ("chat", "chat"),
    "enable_thinking": ("on", "on"),
    "data": ("easy,medium,hard", "easy,medium,hard"),
    "temperature": (1.0, 0.99),
    "top_p": (1.0, 0.99),
    "top_k": (0, 100),
    "max_prompt_len": (64, 2048),
    "max_response_len": (128, 8192),
    "seed": (1, 42),
}
SAMPLES = 8  # responses a problem, section 3.1
PART = 256  # problems between two steps of the bar


def parse_args(argv=None):
    p = common.plain_parser(__doc__, DEFAULTS)
    p.add_argument(
        "--samples", type=common.COUNT, default=SAMPLES, metavar="N", help=f"responses a problem [{SAMPLES}]"
    )
    p.add_argument(
        "--keep", type=int, nargs=2, metavar=("LO", "HI"), help="write NAME_LO_HI.jsonl, solved LO to HI times"
    )
    args = common.settings(DEFAULTS, {"keep": None} | vars(p.parse_args(argv)))
    args.eval_max_response_len = args.max_response_len  # the engine makes room for the longer one
    if args.keep and not 0 <= args.keep[0] <= args.keep[1] <= args.samples:
        common.fail(f"--keep {args.keep[0]} {args.keep[1]}: give LO <= HI, both of 0 to --samples {args.samples}")
    common.fail_at_first([*common.model_mistakes(args), *common.data_mistakes(args, "data")])
    return args


def counts_file(path):
    return path.with_suffix(".difficulty.jsonl")


def count(engine, pool, problems, samples):
    """-> how the responses to each problem went, a row each; the same on every process"""
    batch = engine.generate(problems, samples, "difficulty")
    grades = common.spread(pool.grade, [(r.text, r.problem["answer"]) for r in batch])
    rows = []
    for i, problem in enumerate(problems):
        mine = slice(i * samples, (i + 1) * samples)
        row = {"id": problem["id"], "samples": samples, "correct": sum(g.correct for g in grades[mine])}
        row["truncated"] = sum(r.truncated for r in batch[mine])
        row["no_answer"] = sum(rewards.extract_answer(r.text) is None for r in batch[mine])
        rows.append(row | {"grader_errors": sum(bool(g.error) for g in grades[mine])})
    return rows


def main(argv=None):
    args, engine, pool = parse_args(argv), None, rewards.GradePool()
    paths = [common.data_file(args, name) for name in args.data.split(",")]
    for path in paths:
        if args.keep and counts_file(path).exists():
            continue
        engine = engine or common.start_engine(args)
        problems = common.load_problems(
            path, engine.tokenizer, args.max_prompt_len, args.template, args.enable_thinking
        )
        rows, parts = [], range(0, len(problems), PART)
        for i in tqdm(parts, desc=path.stem, unit=f" x {PART} problems", disable=training.rank() > 0):
            rows += count(engine, pool, problems[i : i + PART], args.samples)
        if training.rank() == 0:
            common.write_aside(counts_file(path), "".join(json.dumps(row) + "\n" for row in rows))
    if training.rank() == 0:
        report(paths, args.keep)
    if engine:
        engine.close()


def report(paths, keep):
    """Prints a line for each set, draws the picture, and writes the filtered sets"""
    for path in paths:
        rows = [json.loads(line) for line in counts_file(path).read_text().splitlines()]
        correct, n = [row["correct"] for row in rows], rows[0]["samples"]
        shares = ", ".join(f"{k}: {correct.count(k) / len(rows):.1%}" for k in range(n + 1))
        print(
            f"{path.stem}: {sum(correct) / n / len(rows):.3f} right of {len(rows):,} x {n}. Problems by right responses: {shares}"
        )
        if keep:
            out = path.with_name(f"{path.stem}_{keep[0]}_{keep[1]}.jsonl")
            lines = common.read_lines(path)
            if len(lines) != len(rows):
                common.fail(f"{counts_file(path)}: {len(rows)} rows, {len(lines)} problems; remove it to count again")
            lines = [line.decode() for line, k in zip(lines, correct) if keep[0] <= k <= keep[1]]
            common.write_aside(out, "".join(f"{line}\n" for line in lines))
            print(f"{out}: {len(lines):,} of {len(rows):,}")
    picture = paths[0].with_name("difficulty.png")
    draw([counts_file(path) for path in paths], picture)
    print(f"the picture is {picture}")


if __name__ == "__main__":
    main()
