"""Papers above, GPUs below: what the layout promises."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = ["lite_ppo"]
TRICKS = ["norm", "loss_agg", "clip_low", "clip_high", "overlong", "wrong_reward", "dynamic_sampling", "kl_coef"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_common_knows_no_trick():
    tree = ast.parse((ROOT / "common.py").read_text())
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert not (names | words) & set(TRICKS)


def test_common_trains_nothing_and_calls_no_script():
    tree = ast.parse((ROOT / "common.py").read_text())
    called = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    assert not called & {"backward", "step", "zero_grad", "clip_grad_norm_"}
    assert not set(imports(ROOT / "common.py")) & set(SCRIPTS)


def test_rewards_stands_alone():
    assert not set(imports(ROOT / "rewards.py")) & {"common", "torch", *SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_script(script):
    assert not set(imports(ROOT / f"{script}.py")) & (set(SCRIPTS) - {script})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    text = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    module = __import__(script)
    for flag in module.DEFAULTS:
        assert re.search(rf"\b(args|a)\.{flag}\b", text), f"--{flag} is read nowhere"


def test_the_requirements_agree():
    node, laptop = ((ROOT / f"requirements{x}.txt").read_text().splitlines() for x in ("", "-cpu"))
    pins = [{line for line in lines if "==" in line} for lines in (node, laptop)]
    assert {line.split("==")[0] for line in pins[0] - pins[1]} == {"vllm"} and not pins[1] - pins[0]
