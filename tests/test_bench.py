"""bench/compare.py at a small geometry: that it works and finds the same pictures, never how fast."""

import json
import subprocess
import sys

from conftest import ROOT


def test_the_yardstick_compares_ours_with_upstream(tmp_path):
    results = tmp_path / "compare.json"
    command = [sys.executable, "-m", "bench.compare", "--quick", "--rounds", "1", "--results", results]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modes = json.loads(results.read_text())["modes"]
    assert set(modes) == {"upstream", "default"}
    for figures in modes.values():
        assert figures["peak_bytes"]["median"] > 1e8 and 0 < figures["share_of_matmul_ceiling"] < 2
        assert figures["largest_difference"] < 1e-4 and figures["ratio_to_upstream"]["median"] > 0
    assert modes["upstream"]["ratio_to_upstream"]["median"] == 1
