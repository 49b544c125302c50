"""The museum of silent bugs: every patch in bugs/ changes one line, as somebody once did, and a test turns red.

The head of a patch says what went wrong and names the test. A patch that no longer applies, or a test that stays green,
fails here.
"""

import concurrent.futures
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, copy_project

PATCHES = sorted((ROOT / "tests" / "bugs").glob("*.patch"))


def head(path, field):
    return re.search(rf"^{field}: (.+)$", path.read_text(), re.M)[1]


def try_bug(path, folder):
    """-> exit status and output of the named test in a copy of the project that has this bug"""
    copy_project(folder, path)
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # two at a time; waiting threads would take the other's core
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", head(path, "Test")]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(try_bug, path, tmp_path_factory.mktemp(path.stem)) for path in PATCHES}


def test_the_museum_is_open():
    assert len(PATCHES) >= 20


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_bug_turns_its_test_red(path, tried):
    changed = re.findall(r"^([+-])(?![+-]{2} )", path.read_text(), re.M)
    assert changed.count("+") <= 1 and changed.count("-") <= 1, "more than one line"
    status, said = tried[path].result()
    assert status == 1, said  # 1: a test failed; 2 to 5: pytest found no such test, or could not start
