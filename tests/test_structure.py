"""Papers above, GPUs below, and a house that stays small: what the layout promises."""

import ast
import re
import subprocess

import pytest
from conftest import INFRA, ROOT, SCRIPTS, SHARED

import common
from infra import flags

SHARED_TRICKS = {
    "norm",
    "loss_agg",
    "clip_low",
    "clip_high",
    "wrong_reward",
}  # what the study switches over one baseline
OWN_TRICKS = {  # a technique of one paper stands in the script of that paper; lite_ppo.py is the study's laboratory
    "grpo": {"kl_coef", "kl_estimator"},
    "dapo": {"overlong", "overlong_buffer", "dynamic_sampling", "max_resample"},
    "lite_ppo": {"overlong"},
}
TRICKS = SHARED_TRICKS.union(*OWN_TRICKS.values())
DIFFERENT = {"parse_args", "main"}  # the only names that may stand for different code in two scripts
TABLES = {"DEFAULTS"}  # and the only table


FILES = [
    path.relative_to(ROOT).as_posix()
    for f in ("*.py", "infra/*.py", "data/*.py", "plots/*.py")
    for path in ROOT.glob(f)
]


def source(name):
    return (ROOT / name).read_text()


def imports(name):
    """-> the files of ours that a file imports, wherever in it"""
    found, ours = set(), {file.removesuffix(".py").replace("/", "."): file for file in FILES}
    beside = name.rpartition("/")[0]  # a program of a folder imports what stands beside it by its bare name
    for node in ast.walk(ast.parse(source(name))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {ours[n] for n in [*names, *(f"{beside}.{n}" for n in names)] if n in ours}
    return found - {name}


def definitions(script):
    """-> the text of every function and every table of a script, by its name"""
    text, found = source(f"{script}.py"), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(text, node)
    return found


@pytest.mark.parametrize("name", SHARED)
def test_the_shared_files_know_no_trick(name):
    tree = ast.parse(source(name))
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert not (names | words) & TRICKS


@pytest.mark.parametrize("name", SHARED)
def test_the_shared_files_hold_no_loop_and_call_no_script(name):
    tree = ast.parse(source(name))
    called = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    trial = {"backward", "zero_grad"} if name == "infra/selftest.py" else set()  # of a gradient nobody applies
    assert not called & {"backward", "step", "zero_grad", "clip_grad_norm_"} - trial
    assert not imports(name) & {f"{script}.py" for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_common_and_rewards_alone(script):
    assert imports(f"{script}.py") == {"common.py", "rewards.py"}


def test_rewards_stands_alone():
    assert not imports("rewards.py") and "torch" not in source("rewards.py").replace("No torch", "")


def test_the_map_is_the_house():
    """The files of infra/ stand in the map of common.py, and each imports only from those below it, and rewards.py."""
    listed = re.findall(r"^    (\w+)\.py ", common.__doc__, re.M)
    assert sorted(listed) == INFRA
    for i, name in enumerate(listed):
        assert imports(f"infra/{name}.py") <= {"rewards.py", *(f"infra/{below}.py" for below in listed[i + 1 :])}


def test_no_import_runs_in_a_circle():
    left = {name: imports(name) for name in FILES}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "these import each other"


def test_folders_do_not_import_each_other():
    """Programs of plots/ are on top, then the scripts, common.py, data/, infra/; common.py takes nothing from plots/."""
    floors = [["plots/"], [f"{script}.py" for script in SCRIPTS], ["common.py"], ["data/"], ["infra/"], ["rewards.py"]]
    floor = lambda name: next(i for i, names in enumerate(floors) if name.startswith(tuple(names)))
    programs = {"data/difficulty.py", "data/prepare.py", "data/tiny.py"}  # nobody imports them
    for name in FILES:
        assert not imports(name) & programs
        assert name in programs or all(floor(other) >= floor(name) for other in imports(name)), name


def test_a_name_has_one_meaning():
    """Functions of the shared code, data/ and plots/; main and parse_args are every program's, draw is every picture's."""
    found = {}
    for name in set(FILES) - {f"{script}.py" for script in SCRIPTS}:
        figure = name.startswith("plots/fig") and name != "plots/figure.py"  # each has its own, nobody imports them
        for node in ast.parse(source(name)).body if not figure else []:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in {"main", "parse_args", "draw"}:
                found.setdefault(node.name, []).append(name)
    assert not {name: files for name, files in found.items() if len(files) > 1}


LIMITS = {"README.md": 13_500, "plots/README.md": 18_000, "data/README.md": 15_000, "tests/README.md": 15_000}


def test_the_house_stays_small():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {file.partition("/")[0] for file in files} - {".ci", ".gitignore"}
    pages = {"README.md", "LOG.md", "LICENSE", "pyproject.toml", "requirements.txt", "requirements-cpu.txt"}
    card = {
        *(f"{script}.py" for script in SCRIPTS),
        "common.py",
        "rewards.py",
        "infra",
        "data",
        "plots",
        "tests",
        "lab",
    }
    assert not files or top == pages | card  # no files: a copy without git
    lines = {name: len(source(name).splitlines()) for name in SHARED}
    assert lines["common.py"] <= 500 and sum(lines.values()) <= 2050, lines
    for page, limit in LIMITS.items():
        assert len(source(page)) <= limit, page
    first = source("README.md").splitlines()
    assert len(first) <= 215 and max(map(len, first)) <= 120


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    module = __import__(script)
    assert module.DEFAULTS.keys() == flags.FLAGS.keys() - flags.MACHINE.keys() | SHARED_TRICKS | OWN_TRICKS[script]
    for flag in module.DEFAULTS | flags.MACHINE:
        assert re.search(
            rf"\b(args|a)\.{flag}\b",
            "".join(map(source, [f"{script}.py", *SHARED, "data/problems.py", "data/evaluation.py"])),
        ), f"--{flag} is read nowhere"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_default_names_its_source(script):
    rows = re.search(r"^DEFAULTS = \{.*?^\}", source(f"{script}.py"), re.S | re.M)[0].splitlines()
    for row in rows:
        if re.match(r'    "(\w+)": \(.*\),', row):
            assert "  # " in row, row


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_name_is_the_same_code(script):
    mine = definitions(script)
    assert {"advantages", "token_weights", "policy_loss", "parse_args", "main", "NORMS", "LOSS_AGGS"} <= mine.keys()
    for other in SCRIPTS:
        theirs = definitions(other)
        for name in mine.keys() & theirs.keys() - DIFFERENT - TABLES:
            assert mine[name] == theirs[name], f"{name} is not the same in {script}.py and {other}.py"


def test_the_requirements_agree():
    node, laptop = ((ROOT / f"requirements{x}.txt").read_text().splitlines() for x in ("", "-cpu"))
    pins = [{line for line in lines if "==" in line} for lines in (node, laptop)]
    assert {line.split("==")[0] for line in pins[0] - pins[1]} == {"vllm"} and not pins[1] - pins[0]


@pytest.mark.parametrize("name", [*(f"{script}.py" for script in SCRIPTS), "data/difficulty.py"])
def test_idle_threads_leave_their_cores(name):
    """OpenMP reads it when torch is loaded; tests/bench_cores.py measures what it does."""
    text = source(name)
    first = re.search(r"^import (torch|common)", text, re.M).start()
    assert 0 < text.index('os.environ.setdefault("GOMP_SPINCOUNT", "1000")') < first
