"""Papers above, GPUs below: what the layout promises."""

import ast
import re

import pytest
from conftest import ROOT, SCRIPTS, SHARED

import common

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


def source(name):
    return (ROOT / f"{name}.py").read_text()


def imports(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def definitions(name):
    """-> the text of every function and every table of a script, by its name"""
    text, found = source(name), {}
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
    assert not called & {"backward", "step", "zero_grad", "clip_grad_norm_"}
    assert not set(imports(name)) & set(SCRIPTS)


def test_rewards_stands_alone():
    assert not set(imports("rewards")) & {"torch", *SHARED, *SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_script(script):
    assert not set(imports(script)) & (set(SCRIPTS) - {script})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    module = __import__(script)
    assert module.DEFAULTS.keys() == flags.FLAGS.keys() - flags.MACHINE.keys() | SHARED_TRICKS | OWN_TRICKS[script]
    for flag in module.DEFAULTS | flags.MACHINE:
        assert re.search(rf"\b(args|a)\.{flag}\b", "".join(map(source, [script, *SHARED]))), f"--{flag} is read nowhere"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_default_names_its_source(script):
    rows = re.search(r"^DEFAULTS = \{.*?^\}", source(script), re.S | re.M)[0].splitlines()
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
