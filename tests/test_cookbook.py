"""The script of docs/cookbook.md for several ranks, started by torchrun, with DDP and with FSDP2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import FSDP2_ON_CPU, NO_FSDP2

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/cookbook.md").read_text(encoding="utf-8")
WRAPPED = "model = DistributedDataParallel(model)\n"


def blocks():
    section = PAGE.split("## Several ranks\n")[1].split("\n## ")[0]
    script, sharded = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert script.count(WRAPPED) == 1
    return {"DDP": script, "FSDP2": script.replace(WRAPPED, sharded)}


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_the_ranks_report_the_same(engine, tmp_path):
    if engine == "FSDP2" and not FSDP2_ON_CPU:
        pytest.skip(NO_FSDP2)
    (tmp_path / "script.py").write_text(blocks()[engine], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*command, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    cosines = dict(re.findall(r"rank (\d): (-?\d\.\d{6})", found.stdout))  # the lines of ranks can mix
    assert set(cosines) == {"0", "1"}, found.stdout
    assert cosines["0"] == cosines["1"]
