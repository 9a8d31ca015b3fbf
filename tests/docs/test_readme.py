"""The README: the quick start runs as written, and the first screens stay short."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_quick_start_runs_as_written(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "patched model.multi_modal_projector" in found.stdout
    assert "ok   model.multi_modal_projector" in found.stdout


def test_first_screens_stay_short():
    assert len(TEXT.splitlines()) <= 140


def test_relative_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 8
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
