"""The bug hunt: a copy of the project in which one line is wrong, by number; nothing says which.

    python lab/hunt.py                              the numbers, by difficulty
    python lab/hunt.py 7                            makes hunt/07 and says what to run there
    python lab/hunt.py 7 --line infra/packs.py:64   is it that line?

1: the run stops by itself, or accuracy shows it. 2: another curve shows it. 3: no curve does; only reading, or a test.
The answers are in lab/answers.md.
"""

import argparse
import hashlib
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = "*.py", "infra/*.py", "data/*.py", "plots/*.py"
NEAR = 2  # lines off that are still right


def head(patch, field):
    return re.search(rf"^{field}: (.+)$", patch.read_text(), re.M)[1]


def file_of(patch):
    return re.search(r"^\+\+\+ b/(.+)$", patch.read_text(), re.M)[1]


def difficulty(patch):
    """-> 1 to 3, from what the head of the patch says of curves"""
    curve = head(patch, "Curve")
    return 1 if "stops the run" in curve or curve.startswith("accuracy") else 3 if curve.startswith("none") else 2


def bugs():
    """-> {number: patch}, by difficulty, then in an order that says nothing"""
    order = lambda patch: (difficulty(patch), hashlib.sha256(patch.stem.encode()).hexdigest())
    return dict(enumerate(sorted((ROOT / "tests" / "bugs").glob("*.patch"), key=order), start=1))


def folder_of(number):
    return ROOT / "hunt" / f"{number:02d}"


def make(number):
    """-> the copy with this bug"""
    folder = folder_of(number)
    shutil.rmtree(folder, ignore_errors=True)
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "data" / "tiny").symlink_to(ROOT / "data" / "tiny")
    command = ["git", "apply", f"--directory={folder.relative_to(ROOT)}", bugs()[number]]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def wrong_line(number):
    """-> file and line of the bug in its copy, as it was made; of a line that is gone, where it stood"""
    patch = bugs()[number]
    hunk = patch.read_text().split("\n@@ ")[1].splitlines()[1:]
    before = len(list(itertools.takewhile(lambda line: not line.startswith(("+", "-")), hunk)))
    old = [line[1:] for line in hunk if not line.startswith("+")]
    healthy = (ROOT / file_of(patch)).read_text().splitlines()
    at = next(i for i in range(len(healthy)) if healthy[i : i + len(old)] == old)
    return file_of(patch), at + before + 1


def commands(number):
    """-> the healthy and the broken run, of three minutes at most, and the picture of both"""
    run = head(bugs()[number], "Run") + " --steps 20 --eval_every 10"
    at = f"hunt/{number:02d}"
    broken = re.sub(r"(\w+\.py)", rf"{at}/\1", run, count=1)
    draw = f"python plots/curves.py {at}/healthy {at}/broken --out {at}/curves.png --metrics adv/zero,adv/std,adv/max,train/loss"
    return [f"{run} --out {at}/healthy", f"{broken} --out {at}/broken", draw]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("number", type=int, nargs="?", choices=bugs(), metavar="NUMBER", help="which bug")
    p.add_argument("--line", metavar="FILE:LINE", help="a guess, in the copy's lines")
    args = p.parse_args()
    if args.number is None:
        for level in (1, 2, 3):
            print(f"{level}:", *(number for number, patch in bugs().items() if difficulty(patch) == level))
    elif args.line is None:
        print(
            f"{make(args.number).relative_to(ROOT)} has bug {args.number}. From {ROOT}:",
            *commands(args.number),
            sep="\n    ",
        )
    else:
        file, _, line = args.line.rpartition(":")
        if not line.isdigit():
            p.error(f"--line {args.line}: give FILE:LINE, such as infra/packs.py:64")
        found, at = wrong_line(args.number)
        right = file.endswith(found) and abs(int(line) - at) <= NEAR
        print("that is it" if right else "the file is right" if file.endswith(found) else "no")
        sys.exit(not right)


if __name__ == "__main__":
    main()
