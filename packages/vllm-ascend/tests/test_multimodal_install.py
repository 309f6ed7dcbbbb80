# SPDX-License-Identifier: Apache-2.0
"""The extra `multimodal`: torchvision beside any build of torch, and what is said where a library is missing."""

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

from vllm_ascend import compat, multimodal

RESIZE = """
import torch, torchvision
from torchvision.transforms.v2 import functional
picture = functional.resize(torch.arange(64.0).reshape(1, 8, 8), [4, 4], antialias=True)
assert picture.shape == (1, 4, 4)
try:
    kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    assert kept.tolist() == [0]
except RuntimeError as error:
    assert "Couldn't load custom C++ ops" in str(error), error
print("imported")
"""
NAMED = """
import vllm_ascend
from vllm_ascend import multimodal
multimodal.PARTS = {"images and video": ("a-library-that-is-absent",)}
vllm_ascend.register_general()
vllm_ascend.register_general()
from vllm import ModelRegistry
try:
    ModelRegistry._raise_for_unsupported(["Qwen2VLForConditionalGeneration"])
except ValueError as error:
    print(error)
try:
    ModelRegistry._raise_for_unsupported(["NoSuchModel"])
except ValueError as error:
    print("unknown" if "a-library-that-is-absent" not in str(error) else error)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_torchvision_is_imported():
    """Its Python part works, and its compiled operators are either whole or refused by torchvision itself."""
    assert run(RESIZE).endswith("imported\n")


def test_transformers_is_imported_without_vllm():
    code = "import sys; from transformers import LlamaForCausalLM, Qwen2VLImageProcessor; print(Qwen2VLImageProcessor(), 'vllm' in sys.modules)"
    assert run(code).endswith("False\n")


def test_a_whole_torchvision_is_told_from_a_broken_one(tmp_path):
    import _ctypes

    name = f"_C{EXTENSION_SUFFIXES[-1]}"
    for folder in ("empty", "broken", "whole"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / name).write_bytes(b"no library")
    shutil.copy(_ctypes.__file__, tmp_path / "whole" / name)
    found = {folder: compat._loads([tmp_path / folder]) for folder in ("empty", "broken", "whole")}
    assert found == {"empty": False, "broken": False, "whole": True}


def test_what_is_missing_is_named(monkeypatch):
    assert multimodal.what_is_missing() is None
    monkeypatch.setattr(multimodal, "PARTS", {"audio": ("an-absent-library", "torch"), "images": ("torch",)})
    assert multimodal.missing() == {"audio": ["an-absent-library"]}
    said = multimodal.what_is_missing()
    assert "for audio: an-absent-library" in said
    assert "uv pip install './packages/vllm-ascend[multimodal]'" in said


def test_doctor_names_it():
    code = (
        "from vllm_ascend import cli, multimodal; multimodal.PARTS = {'audio': ('an-absent-library',)}\n"
        "import sys; sys.argv = ['vllm-ascend', 'doctor']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr  # text models are served without it
    assert "for audio: an-absent-library" in " ".join(done.stdout.split())
    report = json.loads(
        run("import json; from vllm_ascend import doctor; print(json.dumps(doctor.examine().as_dict()))")
    )
    assert report["not_installed"] == ""
    assert report["versions"]["torchvision"].startswith("0.28.0")


def test_the_error_about_a_model_names_it():
    known, unknown = run(NAMED).splitlines()[-2:]
    assert "failed to be inspected" in known
    assert known.count("for images and video: a-library-that-is-absent") == 1
    assert "vllm-ascend[multimodal]" in known
    assert unknown == "unknown"
