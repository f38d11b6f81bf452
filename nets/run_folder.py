"""The folder of a training run: checkpoints that a kill at any moment leaves whole, and the log."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nets.loading import write_tensors
from nets.sampling import write_whole

STATE, LOG = "state.json", "log.jsonl"
# Settings that may change when a run is gone on with; it is then no longer bit for bit the run that was not interrupted.
ADJUSTABLE = ("learning_rate", "warmup_steps", "decay", "cosine_steps", "clip", "accumulate", "mixed_precision")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if path.suffix != ".part")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)


def require_resumable(folder: Path, resume: bool):
    """Raise a ValueError, in one line, where a run is there already and was not asked to go on."""
    found = last_checkpoint(folder)
    if found is not None and not resume:
        raise ValueError(f"{found} is there: go on from it with --resume, or choose another --output")


def require_same_run(folder: Path, settings: dict, steps: int) -> dict[str, str]:
    """What is not as it was when the run in `folder` was left, of that which may change: name -> before and now.

    Raises ValueError, in one line, for what may not, and where the run is past `steps` already.
    """
    path = last_checkpoint(folder)
    if path is None:
        return {}
    state = json.loads((path / STATE).read_text())
    before = state["settings"]
    changes = {key: f"{key} {before.get(key)!r} there and {settings.get(key)!r} now"
               for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)}
    other = [change for key, change in changes.items() if key not in ADJUSTABLE]
    if other:
        raise ValueError(f"{path} is of another run: {', '.join(other)}; choose another --output")
    if state["step"] > steps:
        raise ValueError(f"{path} is past --steps {steps}")
    return changes


def save_checkpoint(folder: Path, state: dict, model, average, optimizer, keep: int):
    """Write `checkpoint-STEP`, which appears whole or not at all, and remove all but the last `keep`."""
    path = folder / f"checkpoint-{state['step']:08d}"
    unfinished = path.with_name(f"{path.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, network in (("model", model), ("average", average)):
        write_tensors(unfinished / f"{name}.safetensors",
                      {key: tensor.detach().contiguous() for key, tensor in network.named_parameters()})
    write_tensors(unfinished / "optimizer.safetensors",
                  {f"{number}.{key}": tensor.contiguous() for number, entry in optimizer.state_dict()["state"].items()
                   for key, tensor in entry.items()})
    write_whole(unfinished / STATE, json.dumps(state, indent=2).encode() + b"\n")
    os.replace(unfinished, path)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(path: Path, model, average, optimizer) -> dict:
    """Put a checkpoint into model, average and optimiser; returns its state.

    Raises ValueError, in one line, for a damaged one.
    """
    try:
        state = json.loads((path / STATE).read_text())
        tensors = {name: load_file(path / f"{name}.safetensors") for name in ("model", "average", "optimizer")}
    except (OSError, ValueError, SafetensorError) as error:
        older = checkpoints(path.parent)[:-1]
        raise ValueError(f"{path} is damaged ({error}); remove it, and the run goes on from "
                         f"{older[-1].name if older else 'its beginning, since there is no other'}") from error
    with torch.no_grad():
        for name, network in (("model", model), ("average", average)):
            for key, parameter in network.named_parameters():
                parameter.copy_(tensors[name][key])
    entries = {}
    for key, tensor in tensors["optimizer"].items():
        number, _, name = key.partition(".")
        entries.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def write_log(folder: Path, record: dict):
    """Add a line to the log."""
    with (folder / LOG).open("a") as log:
        log.write(json.dumps(record) + "\n")


def read_log(folder: Path) -> list[dict]:
    """The lines of the log; what a kill has cut off at its end does not count."""
    lines = (folder / LOG).read_text().splitlines() if (folder / LOG).is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def cut_log(folder: Path, step: int):
    """Leave only the lines of the log up to `step`, from where the run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [record for record in read_log(folder) if record["step"] <= step]
    write_whole(folder / LOG, "".join(f"{json.dumps(record)}\n" for record in kept).encode())
