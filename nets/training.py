"""The training loop: AdamW, an average of the weights, and checkpoints that a kill at any moment leaves whole.

All that is random is a function of (seed, step) alone: which pictures a step sees, their noise, timesteps and dropped
labels. So a run that is gone on with is the run that was not interrupted, and two processes see what one would have seen.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from nets.loading import write_tensors
from nets.sampling import picture_generator, write_whole

STATE, LOG = "state.json", "log.jsonl"
EXPLODED = 10  # times the first loss that was read


@lru_cache(maxsize=2)
def order_of_epoch(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of `count` pictures in an epoch, (count,) int64."""
    return torch.randperm(count, generator=picture_generator(seed, epoch, 0))


def indices_of_step(count: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """The pictures that a step sees, (batch_size,) int64: one order after another, so each is seen once an epoch."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return torch.stack([order_of_epoch(count, seed, position // count)[position % count] for position in positions])


def share(batch: dict[str, torch.Tensor], rank: int, processes: int) -> dict[str, torch.Tensor]:
    """What one of several processes takes of a batch; its size must be a multiple of their number."""
    return {name: tensor.chunk(processes)[rank] for name, tensor in batch.items()}


def learning_rate_at(step: int, peak: float, warmup_steps: int = 0, steps: int | None = None) -> float:
    """Linear warm-up to `peak`; after it constant, as DiT trains, or with `steps` a cosine that ends at 0 there."""
    decay = 1.0 if steps is None else 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
    return peak * min((step + 1) / max(1, warmup_steps), decay)


@torch.no_grad()
def update_average(average: list[torch.Tensor], parameters: list[torch.Tensor], decay: float, step: int):
    """average <- decay * average + (1 - decay) * parameters, all at once, in float32.

    A young average forgets faster: what it began with is no memory.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, [parameter.float() for parameter in parameters], 1 - decay)


def fit(model: torch.nn.Module, make_batch: Callable[[int], dict[str, torch.Tensor]], loss_of_batch: Callable,
        accelerator: Accelerator, folder: Path, settings: dict, *, steps: int, learning_rate: Callable[[int], float],
        weight_decay: float = 0.0, beta2: float = 0.999, clip: float = 1.0, accumulate: int = 1, ema_decay: float = 0.9999,
        save_every: int = 1000, keep: int = 1, log_every: int = 50, sample_every: int = 0, resume: bool = False,
        report: Callable[[dict], None] = lambda record: None,
        sample: Callable[[int, torch.nn.Module], None] = lambda step, average: None) -> torch.nn.Module:
    """Train `model` and return the average of its weights, in eval mode.

    `make_batch(step)` gives the tensors of a whole batch, of which each process takes its share; `loss_of_batch(model,
    batch)` the loss of each picture (batch,) and its timestep's quarter (batch,) in 0..3. Into `folder` go checkpoints and
    `log.jsonl`; `settings` are what a run must not change when it is gone on with. `report` hears each line of the log,
    `sample` gets the average every `sample_every` steps, in the first process. Nothing waits for the device between logs.
    Raises ValueError for a folder of another run, for weights that no longer fit, and where the loss is no number any more
    or explodes, with the last good checkpoint; KeyboardInterrupt, after a checkpoint, on SIGINT or SIGTERM.
    """
    found = last_checkpoint(folder)
    if found is not None and not resume:
        raise ValueError(f"{found} is there: go on from it with --resume, or choose another --output")
    size = len(next(iter(make_batch(0).values())))
    if size % (accelerator.num_processes * accumulate):
        raise ValueError(f"a batch of {size} pictures cannot be split into "
                         f"{accelerator.num_processes} processes x {accumulate} parts; choose another --batch-size")
    average = copy.deepcopy(model).float().eval().requires_grad_(False).to(accelerator.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate(0), betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    bare = model
    model, optimizer = accelerator.prepare(model, optimizer)
    pairs = list(zip(average.parameters(), bare.parameters(), strict=True))
    averaged, current = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    state = {"step": 0, "first_loss": None, "settings": settings}
    if found is not None:
        state = load_checkpoint(found, bare, average, optimizer, settings)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cut_log(folder, state["step"])

    model.train()
    tally, since, started = torch.zeros(10, device=accelerator.device), state["step"], time.perf_counter()
    # One thread of its own makes the next batch; with more, OpenMP's pools of the two would wait for each other's cores.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as ahead, stop_signals() as stopped:
        coming = ahead.submit(make_batch, state["step"])
        for step in range(state["step"], steps):
            batch = share(coming.result(), accelerator.process_index, accelerator.num_processes)
            if step + 1 < steps:
                coming = ahead.submit(make_batch, step + 1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            for number in range(accumulate):
                part = {name: tensor.to(accelerator.device, non_blocking=True)
                        for name, tensor in share(batch, number, accumulate).items()}
                last = number + 1 == accumulate
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    losses, quarter = loss_of_batch(model, part)
                    accelerator.backward(losses.mean() / accumulate)
                tally[:4].index_add_(0, quarter, losses.detach().float())
                tally[4:8].index_add_(0, quarter, torch.ones_like(losses, dtype=torch.float32))
            tally[8] += accelerator.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad()
            update_average(averaged, current, ema_decay, step)

            done = step + 1
            save = done % save_every == 0 or done == steps or (stopped and accelerator.num_processes == 1)
            if done % log_every == 0 or save:
                tally[9] = len(stopped)
                record = summary(accelerator.reduce(tally).tolist(), done - since, accelerator.num_processes)
                seconds = time.perf_counter() - started
                record = {"step": done, **record, "learning_rate": learning_rate(step), "seconds_per_step":
                          seconds / (done - since)}
                state["first_loss"] = state["first_loss"] or record["loss"]
                if not record["loss"] <= EXPLODED * state["first_loss"]:
                    raise ValueError(f"the loss became {record['loss']:g} by step {done}; the last good checkpoint is "
                                     f"{last_checkpoint(folder) or 'none'}; lower the learning rate")
                stopping = record.pop("stopping")
                if accelerator.is_main_process:
                    with (folder / LOG).open("a") as log:
                        log.write(json.dumps(record) + "\n")
                    report(record)
                if save or stopping:
                    state["step"] = done
                    if accelerator.is_main_process:
                        save_checkpoint(folder, state, bare, average, optimizer, keep)
                    accelerator.wait_for_everyone()
                if stopping and done < steps:
                    raise KeyboardInterrupt(f"stopped after step {done}; the same command with --resume goes on")
                tally.zero_()
                since, started = done, time.perf_counter()
            if sample_every and done % sample_every == 0 and accelerator.is_main_process:
                sample(done, average)
    return average


def summary(tally: list[float], steps: int, processes: int) -> dict:
    """The numbers since the last log: mean loss, also by quarter of the timesteps (None where unseen), gradient norm."""
    losses, counts = tally[:4], tally[4:8]
    return {"loss": sum(losses) / sum(counts), "gradient_norm": tally[8] / steps / processes, "stopping": tally[9] > 0,
            "loss_by_quarter": [loss / count if count else None for loss, count in zip(losses, counts)]}


@contextlib.contextmanager
def stop_signals():
    """A list that gets longer with each SIGINT or SIGTERM, which do nothing else meanwhile; a second SIGINT interrupts."""
    received = []

    def receive(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_checkpoint(folder: Path, state: dict, model, average, optimizer, keep: int):
    """Write `checkpoint-STEP`, which appears whole or not at all, and remove all but the last `keep`."""
    path = folder / f"checkpoint-{state['step']:08d}"
    unfinished = path.with_name(f"{path.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, network in (("model", model), ("average", average)):
        write_tensors(unfinished / f"{name}.safetensors",
                      {key: tensor.detach().contiguous() for key, tensor in network.named_parameters()})
    torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
    write_whole(unfinished / STATE, json.dumps(state, indent=2).encode() + b"\n")
    shutil.rmtree(path, ignore_errors=True)
    os.replace(unfinished, path)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if path.suffix != ".part")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)


def load_checkpoint(path: Path, model, average, optimizer, settings: dict) -> dict:
    """Put a checkpoint into model, average and optimiser; returns its state. Raises ValueError for another run's."""
    state = json.loads((path / STATE).read_text())
    other = sorted(key for key in {*state["settings"], *settings} if state["settings"].get(key) != settings.get(key))
    if other:
        changes = ", ".join(f"{key} {state['settings'].get(key)!r} there and {settings.get(key)!r} now" for key in other)
        raise ValueError(f"{path} is of another run: {changes}; choose another --output")
    with torch.no_grad():
        for name, network in (("model", model), ("average", average)):
            tensors = load_file(path / f"{name}.safetensors")
            for key, parameter in network.named_parameters():
                parameter.copy_(tensors[key])
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    return state


def cut_log(folder: Path, step: int):
    """Leave only the lines of the log up to `step`, from where the run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (folder / LOG).read_text().splitlines() if (folder / LOG).is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_whole(folder / LOG, "".join(f"{line}\n" for line in kept).encode())
