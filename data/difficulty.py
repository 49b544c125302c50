"""How often a model solves each problem of a data set: 8 responses a problem, counted, and a picture of the counts.

That is figure 2 of arXiv 2508.08221. It shows what there is to learn from, and filters: a problem that is solved never or always
teaches nothing under a group mean.

    accelerate launch data/difficulty.py                        the three tiers, with the model training starts from
    python data/difficulty.py --data hard --keep 1 7            and hard_1_7.jsonl: the problems solved 1 to 7 times

Beside each NAME.jsonl it leaves NAME.difficulty.jsonl, a row {"id", "samples", "correct", "truncated", "no_answer",
"grader_errors"} a problem, and beside the first difficulty.png. With --keep a set that is counted already is not sampled again.
"""

import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: idle threads soon leave their cores
sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import rewards  # noqa: E402
from data.problems import data_files, load_problems, load_tokenizer  # noqa: E402
from infra import flags, plan, policy  # noqa: E402
from infra.processes import compute_dtype, device, distributed_map, fail, rank  # noqa: E402
from infra.runs import jsonl, read_jsonl, write_whole  # noqa: E402
from infra.selftest import check_bos  # noqa: E402

DEFAULTS = {  # flag: (laptop, node). What the runs start from: the same as in lite_ppo.py
    "model": ("data/tiny/base", "Qwen/Qwen3-4B-Base"),
    "template": ("chat", "chat"),
    "enable_thinking": ("on", "on"),
    "data": ("easy,medium,hard", "easy,medium,hard"),
    "columns": ("", ""),
    "temperature": (1.0, 0.99),
    "top_p": (1.0, 0.99),
    "top_k": (0, 100),
    "max_prompt_len": (64, 2048),
    "max_response_len": (192, 8192),
    "seed": (1, 42),
}
SAMPLES = 8  # responses a problem, section 3.1
PART = 256  # problems between two steps of the bar


def parse_args(argv=None):
    p = flags.Parser(__file__, __doc__, DEFAULTS)
    flags.add_shared_flags(p)
    p.add_argument(
        "--samples", type=flags.COUNT, default=SAMPLES, metavar="N", help=f"Responses a problem. [{SAMPLES}]"
    )
    text = "Write NAME_LO_HI.jsonl, the problems solved LO to HI times."
    p.add_argument("--keep", type=int, nargs=2, metavar=("LO", "HI"), help=text)
    args = flags.settings(p.table, {"keep": None} | vars(p.parse_args(argv)))
    args.eval_max_response_len = args.max_response_len  # the engine makes room for the longer one
    if args.keep and not 0 <= args.keep[0] <= args.keep[1] <= args.samples:
        fail(f"--keep {args.keep[0]} {args.keep[1]}: give LO <= HI, both of 0 to --samples {args.samples}")
    for wrong, message in flags.model_mistakes(args):
        if wrong:
            fail(message)
    args.files = data_files(args, "data", args.data)
    return args


def start_engine(args, tokenizer, problems):
    """-> an engine with the weights of --model, where nobody trains"""
    shape = plan.read_shape(args)
    common.join_processes(args, shape, alone=True)
    model = policy.Policy(policy.load_lm(args, compute_dtype()).to(device()))
    check_bos(args, model, tokenizer, [problem["prompt_ids"] for problem in problems])
    model.cpu()  # the GPU is the engine's
    engine = common.make_engine(args, tokenizer, shape, alone=True)
    engine.wake()
    engine.load(model)
    return engine


def counts_file(path):
    return path.with_suffix(".difficulty.jsonl")


def count_right(engine, pool, problems, samples):
    """-> how the responses to each problem went, a row each; the same on every process"""
    batch = engine.generate(problems, samples, "difficulty")
    grades = distributed_map(pool.grade, [(r.text, r.problem["answer"]) for r in batch])
    rows = []
    for i, problem in enumerate(problems):
        mine = slice(i * samples, (i + 1) * samples)
        row = {"id": problem["id"], "samples": samples, "correct": sum(g.correct for g in grades[mine])}
        row["truncated"] = sum(r.truncated for r in batch[mine])
        row["no_answer"] = sum(rewards.extract_answer(r.text) is None for r in batch[mine])
        rows.append(row | {"grader_errors": sum(bool(g.error) for g in grades[mine])})
    return rows


def main(argv=None):
    args, tokenizer, engine, pool = parse_args(argv), None, None, rewards.GradePool()
    for path in args.files:
        if args.keep and counts_file(path).exists():
            continue
        tokenizer = tokenizer or load_tokenizer(args)
        problems = load_problems(path, tokenizer, args)
        engine = engine or start_engine(args, tokenizer, problems)
        rows, parts = [], range(0, len(problems), PART)
        for i in tqdm(parts, desc=path.stem, unit=f" x {PART} problems", disable=rank() > 0):
            rows += count_right(engine, pool, problems[i : i + PART], args.samples)
        if rank() == 0:
            write_whole(counts_file(path), jsonl(rows))
    if rank() == 0:
        write_results(args.files, args.keep)
    if engine:
        engine.close()


def write_results(paths, keep):
    """Prints a line for each set, draws the picture, and writes the filtered sets"""
    for path in paths:
        rows = [row for _, row in read_jsonl(counts_file(path))]
        correct, n = [row["correct"] for row in rows], rows[0]["samples"]
        shares = ", ".join(f"{k}: {correct.count(k) / len(rows):.1%}" for k in range(n + 1))
        right = f"{sum(correct) / n / len(rows):.3f} right of {len(rows):,} x {n}"
        print(f"{path.stem}: {right}. Problems by right responses: {shares}")
        if keep:
            out, problems = path.with_name(f"{path.stem}_{keep[0]}_{keep[1]}.jsonl"), read_jsonl(path)
            if len(problems) != len(rows):
                fail(f"{counts_file(path)}: {len(rows)} rows, {len(problems)} problems; remove it to count again")
            kept = [row for (_, row), k in zip(problems, correct) if keep[0] <= k <= keep[1]]
            write_whole(out, jsonl(kept))
            print(f"{out}: {len(kept):,} of {len(rows):,}")
    picture = paths[0].with_name("difficulty.png")
    draw = [sys.executable, Path(__file__).parent.parent / "plots" / "difficulty.py", *map(counts_file, paths)]
    subprocess.run([*draw, "--out", picture], check=True, stdout=subprocess.DEVNULL)
    print(f"the picture is {picture}")


if __name__ == "__main__":
    main()
