"""Figure 10: which tokens are clipped?

Question: which tokens are clipped most often by an upper bound of 0.20 and of 0.28, aligned model, and where in a response do they stand?
Paper: under 0.20 connectives at the start of sentences (therefore, if, but); under 0.28 far fewer, and function words (is, the) (takeaway 5).
(The clip figures take 128 updates of 8 responses on a rollout of 1,024, where the bounds clip most with training still stable: LOG.md.
Counts are over all steps and seeds; the response shown is that with most clipped tokens of all that were logged.)

Here: under 0.28 fewer tokens are clipped (of 1,000): seen, +1.798 [+1.531, +2.065] of 10 seeds;
under 0.20 more of them are connectives (share): seen, +0.109 [+0.079, +0.138] of 10 seeds.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.2 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.28 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
"""

import math
import sys
from collections import Counter

from claims import Claim
from figure import main
from launch import flags_of
from panels import STYLES, entitle, grid
from table import Table, collect_rows, commit, read_rows

SIZES = ("4B", "8B")
CONNECTIVES = "after and but if next now so then therefore thus wait".split()
FUNCTION = "is it of that the this we with , . :".split()
CLAIMS = [
    Claim(
        "under 0.28 fewer tokens are clipped (of 1,000)", "clip_high", "0.2", "0.28", {}, "clipped", "end", takeaway=5
    ),
    Claim(
        "under 0.20 more of them are connectives (share)",
        "clip_high",
        "0.2",
        "0.28",
        {},
        "connectives",
        "end",
        takeaway=5,
    ),
]
TOP = 20
FELL, ROSE = "#0072B2", "#D55E00"  # the ratio of a token is below, above 1
KINDS = {"connective": ("#D55E00", "//"), "function word": ("#56B4E9", ".."), "other": ("#999999", "")}
WIDTH, LINES = 64, 6  # characters in a line, lines that are shown


def collect(found):
    """-> rows of three kinds: of a run the clipped tokens and the share of connectives in those of the upper bound; of a bound and a
    token how often it was clipped; of the response with most tokens clipped above of a command a token, with its ratio. found: [(command, seed, folder)]
    """
    columns = "command", "seed", "commit", "step", "clipped", "connectives", "kind", "token", "count", "ratio"
    rows, blank, shares, logged = [], dict.fromkeys(columns), {}, {}
    for r in collect_rows(found, ["train/clip_high"]):
        shares.setdefault((r["command"], r["seed"]), []).append(r.get("train/clip_high"))
    for command, seed, run in found:
        row, share = (
            blank | {"command": command, "seed": seed, "commit": commit(run)},
            [s for s in shares[command, seed] if s is not None],
        )
        steps = read_rows(run / "clipped.jsonl")
        if not share or not steps:
            rows.append(row)
            continue
        counts = {"low": Counter(), "high": Counter()}
        for step in steps:
            for bound, count in counts.items():
                for token, _, n in step[bound]:
                    count[token.strip().lower()] += n
        clipped = counts["high"].total()
        connectives = sum(counts["high"][word] for word in CONNECTIVES) / clipped if clipped else None
        of_1000 = 1000 * sum(share) / len(share)
        rows.append(row | {"step": 0, "kind": "run", "clipped": of_1000, "connectives": connectives})
        rows += [row | {"kind": b, "token": t, "count": n} for b, count in counts.items() for t, n in count.items()]
        logged.setdefault(command, []).extend((r, row) for r in read_rows(run / "tokens.jsonl"))
    for responses in filter(None, logged.values()):
        best, row = max(responses, key=lambda pair: (len(pair[0]["high"]), len(pair[0]["low"])))
        where = {i: bound for bound in ("low", "high") for i in best[bound]}
        shown = enumerate(zip(best["tokens"], best["ratio"]))
        rows += [row | {"kind": f"shown {where.get(i, '')}", "token": t, "ratio": x} for i, (t, x) in shown]
    return rows


def draw(rows):
    table = Table(rows)
    named = [c for c in table.commands if flags_of(c)["size"] == flags_of(table.commands[0])["size"]]
    figure, axes = grid(2, len(named), height=2.5)
    for ax in axes[0, 1:]:
        ax.sharey(axes[0, 0])
    for column, command in zip(axes.T, named):
        mine = [r for r in rows if r["command"] == command]
        top(column[0], mine)
        shown = [
            [r for r in mine if (r["kind"] or "").startswith("shown") and r["seed"] == seed] for seed in seeds_of(mine)
        ]
        show(column[1], max(shown, key=lambda rows: sum(r["kind"] == "shown high" for r in rows), default=[]))
        column[0].set_title(STYLES[flags_of(command)["clip_high"]][0], fontsize=9)
    entitle(figure, table, "Which tokens are clipped, aligned model", CLAIMS)
    return figure


def seeds_of(rows):
    return sorted({r["seed"] for r in rows})


def top(ax, rows):
    """The tokens that the upper bound clipped most often"""
    counts, seeds = Counter(), {r["seed"] for r in rows if r["kind"] == "run"}
    for r in rows:
        if r["kind"] == "high":
            counts[r["token"]] += r["count"] / len(seeds)
    names, values = zip(*counts.most_common(TOP)) if counts else ((), ())
    kinds = ["connective" if n in CONNECTIVES else "function word" if n in FUNCTION else "other" for n in names]
    for kind, (colour, hatch) in KINDS.items():
        if of := [k for k, found in enumerate(kinds) if found == kind]:
            ax.bar(of, [values[k] for k in of], color=colour, hatch=hatch, edgecolor="white", label=kind)
    ax.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    ax.set_ylabel("clipped above (times a run)", fontsize=9)


def show(ax, rows):
    """A response, token by token, shaded by its ratio; what is clipped is framed, with its ratio above"""
    ax.axis("off")
    ax.set_title("shade: ratio below 1 blue, above 1 orange; frame: clipped", fontsize=8, loc="left")
    column = line = 0
    for k, r in enumerate(rows):
        text, bound = r["token"].replace("\n", " "), r["kind"].removeprefix("shown").strip()
        if column + len(text) > WIDTH:
            text, column, line = text.lstrip(), 0, line + 1
        if line == LINES:
            ax.text(0, 0.95 - 0.16 * line, f"... {len(rows) - k} more tokens", fontsize=7.5, va="top")
            break
        at = {"x": column / WIDTH, "y": 0.95 - 0.16 * line, "family": "monospace", "va": "top", "parse_math": False}
        shade = min(0.7, abs(math.log(max(r["ratio"], 1e-3))))
        box = {
            "fc": (ROSE if r["ratio"] > 1 else FELL, shade),
            "ec": "black" if bound else "none",
            "lw": 0.8,
            "pad": 0.5,
        }
        ax.text(s=text, fontsize=7.5, bbox=box, **at)
        if bound:
            ax.text(s=f"{r['ratio']:.1f}", fontsize=5.5, **at | {"y": at["y"] + 0.06})
        column += len(text)


if __name__ == "__main__":
    main(sys.modules[__name__])
