"""nets/run_folder.py: a checkpoint is whole or not there, and a run goes on as the run it was."""

import json

import pytest
from test_training import equal, log, train

from nets.run_folder import checkpoints, cut_log, last_checkpoint, read_log, write_log


def test_only_the_last_checkpoints_stay_and_unfinished_ones_do_not_count(tmp_path):
    (tmp_path / "checkpoint-00000099.part").mkdir(parents=True)
    train(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000015", "checkpoint-00000020"]
    assert last_checkpoint(tmp_path).name == "checkpoint-00000020"


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    train(tmp_path, 5)

    def stops(path, *_):
        if path.name == "state.json":
            raise OSError("stopped")
    monkeypatch.setattr("nets.run_folder.write_whole", stops)
    with pytest.raises(OSError, match="stopped"):
        train(tmp_path, 10, resume=True)
    monkeypatch.undo()
    assert last_checkpoint(tmp_path).name == "checkpoint-00000005"
    assert equal(train(tmp_path, 10, resume=True), train(tmp_path / "whole", 10))


def test_a_folder_with_a_checkpoint_needs_resume_and_the_same_settings(tmp_path):
    train(tmp_path, 5)
    with pytest.raises(ValueError, match=r"checkpoint-00000005 is there: go on from it with --resume"):
        train(tmp_path, 10)
    with pytest.raises(ValueError, match="is of another run: seed 0 there and 1 now; choose another --output"):
        train(tmp_path, 10, resume=True, settings={"seed": 1})


def test_what_may_change_is_changed_aloud(tmp_path):
    settings = {"seed": 0, "learning_rate": 1e-2}
    train(tmp_path, 5, settings=settings)
    with pytest.warns(UserWarning, match="from step 5 on: learning_rate 0.01 there and 0.001 now"):
        train(tmp_path, 10, resume=True, settings={**settings, "learning_rate": 1e-3}, learning_rate=lambda step: 1e-3)
    assert [record["learning_rate"] for record in log(tmp_path)] == pytest.approx([1e-2 / 3, 1e-2, 1e-3])
    state = json.loads((last_checkpoint(tmp_path) / "state.json").read_text())
    assert state["settings"]["learning_rate"] == 1e-3 and len(state["changes"]) == 1


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(tmp_path, 5)
    path = last_checkpoint(tmp_path) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"checkpoint-00000005 is damaged \(.*\); .* from its beginning"):
        train(tmp_path, 10, resume=True)


def test_a_log_that_was_cut_off_is_read_and_gone_on_with(tmp_path):
    for step in (1, 2, 3):
        write_log(tmp_path, {"step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]
    cut_log(tmp_path, 2)
    write_log(tmp_path, {"step": 3})
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]
    assert read_log(tmp_path / "nowhere") == []
