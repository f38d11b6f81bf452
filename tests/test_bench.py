"""bench/compare.py at a small geometry: that it works and finds the same pictures, never how fast."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_pipeline

from bench.compare import MODES, load, seconds_of_call


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


def test_a_call_of_25_steps_is_reckoned_from_the_parts_of_one_of_three_and_a_presets_is_taken_whole():
    part = {"steps": [0.5, 1.5], "condition": 0.3, "decode": 2.0, "rest": 0.5, "total": 9.0}
    assert seconds_of_call(part, 25, {}) == pytest.approx(25 * (1.0 + 0.1) + 2.0 + 0.5)
    assert seconds_of_call(part, 25, {"num_inference_steps": 8}) == 9.0


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_what_its_name_says(mode, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    pipeline = load(mode, tmp_path, "cpu", "float32")
    assert type(pipeline).__module__.startswith("diffusers." if mode.startswith("upstream") else "nets.")
    compiled = {block._compiled_call_impl is not None for block in pipeline.transformer.transformer_blocks}
    assert compiled == {pipeline.vae.decoder._compiled_call_impl is not None} == {"default" != mode != "upstream"}
    assert getattr(pipeline.transformer, "quantized", False) == ("int8" in mode)
    assert (type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler") == ("fast" in mode)
