"""The training loop: AdamW, an average of the weights, and checkpoints that a kill at any moment leaves whole.

All that is random is a function of (seed, step) alone: which pictures a step sees, their noise, timesteps and dropped
labels. So a run that is gone on with is the run that was not interrupted, and two processes see what one would have seen.
"""

import contextlib
import copy
import math
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator

from nets.run_folder import (
    cut_log,
    last_checkpoint,
    load_checkpoint,
    require_resumable,
    require_same_run,
    save_checkpoint,
    write_log,
)
from nets.sampling import picture_generator

EXPLODED = 10  # times the first loss that was read
ASK_EVERY = 10  # steps after which several processes ask each other whether one was told to stop


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
    `log.jsonl`; `settings` are what a run must not change when it is gone on with, see `nets.run_folder.ADJUSTABLE`.
    `report` hears each line of the log, `sample` gets the average every `sample_every` steps, in the first process. Nothing
    waits for the device between logs, but for several processes' question whether one was told to stop.
    Raises ValueError for a folder of another run, for weights that no longer fit, and where loss or gradient is no number
    any more or the loss explodes, with the last good checkpoint; KeyboardInterrupt, after a checkpoint, on SIGINT or
    SIGTERM.
    """
    require_resumable(folder, resume)
    changes = require_same_run(folder, settings, steps)
    require_parts(len(next(iter(make_batch(0).values()))), accelerator.num_processes, accumulate)
    average = copy.deepcopy(model).float().eval().requires_grad_(False).to(accelerator.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate(0), betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    bare = model
    model, optimizer = accelerator.prepare(model, optimizer)
    state = {"step": 0, "first_loss": None, "scaler": None, "changes": []}
    found = last_checkpoint(folder)
    if found is not None:
        state = load_checkpoint(found, bare, average, optimizer)
        if state["scaler"] and accelerator.scaler:  # fp16's factor of the loss
            accelerator.scaler.load_state_dict(state["scaler"])
    if changes:
        state["changes"].append(f"from step {state['step']} on: {', '.join(changes.values())}")
        warnings.warn(state["changes"][-1], stacklevel=2)
    state["settings"] = settings
    require_same_step(state["step"], folder, accelerator)
    if accelerator.is_main_process:
        cut_log(folder, state["step"])

    def take(step):
        batch = share(make_batch(step), accelerator.process_index, accelerator.num_processes)
        pin = accelerator.device.type == "cuda"  # else the way to the GPU would wait for it
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch

    model.train()
    averaged, current = list(average.parameters()), list(bare.parameters())
    tally, since, started = torch.zeros(9, device=accelerator.device), state["step"], time.perf_counter()
    # One thread of its own makes the next batch; with more, OpenMP's pools of the two would wait for each other's cores.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as ahead, stop_signals() as stopped:
        coming = ahead.submit(take, state["step"])
        for step in range(state["step"], steps):
            batch = coming.result()
            if step + 1 < steps:
                coming = ahead.submit(take, step + 1)
            torch.manual_seed(step * accelerator.num_processes + accelerator.process_index)  # of a network with dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            compute_gradients(model, batch, loss_of_batch, accelerator, accumulate, tally)
            tally[8] += accelerator.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad()
            update_average(averaged, current, ema_decay, step)

            done = step + 1
            stopping = asked_to_stop(stopped, done, accelerator)
            save = stopping or done % save_every == 0 or done == steps
            if save or done == 1 or done % log_every == 0:
                counted, seconds = accelerator.reduce(tally).tolist(), time.perf_counter() - started
                record = {"step": done, **summary(counted, done - since, accelerator.num_processes),
                          "learning_rate": learning_rate(step), "seconds_per_step": seconds / (done - since)}
                state["first_loss"] = state["first_loss"] or record["loss"]
                require_health(record, state["first_loss"], accelerator.scaler is not None, folder)
                if accelerator.is_main_process:
                    write_log(folder, record)
                    report(record)
                tally.zero_()
                since, started = done, time.perf_counter()
            if save:
                state.update(step=done, scaler=accelerator.scaler.state_dict() if accelerator.scaler else None)
                if accelerator.is_main_process:
                    save_checkpoint(folder, state, bare, average, optimizer, keep)
                accelerator.wait_for_everyone()
            if stopping and done < steps:
                raise KeyboardInterrupt(f"stopped after step {done}; the same command with --resume goes on")
            if sample_every and done % sample_every == 0 and accelerator.is_main_process:
                pause = time.perf_counter()
                sample(done, average)
                started += time.perf_counter() - pause
    return average


def compute_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor], loss_of_batch: Callable,
                      accelerator: Accelerator, accumulate: int, tally: torch.Tensor):
    """Add up the gradients of a batch, part by part, and in `tally` each quarter's losses and number of pictures."""
    for number in range(accumulate):
        part = {name: tensor.to(accelerator.device, non_blocking=True)
                for name, tensor in share(batch, number, accumulate).items()}
        last = number + 1 == accumulate
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            losses, quarter = loss_of_batch(model, part)
            accelerator.backward(losses.mean() / accumulate)
        tally[:4].index_add_(0, quarter, losses.detach().float())
        tally[4:8].index_add_(0, quarter, torch.ones_like(losses, dtype=torch.float32))


def require_parts(batch_size: int, processes: int, accumulate: int):
    """Raise a ValueError, in one line, unless a batch can be shared out evenly."""
    if batch_size % (processes * accumulate):
        raise ValueError(f"a batch of {batch_size} pictures cannot be split into {processes} processes x {accumulate} "
                         "parts; choose another --batch-size")


def require_same_step(step: int, folder: Path, accelerator: Accelerator):
    """Raise a ValueError, in one line, where processes have found different checkpoints; and wait for all of them."""
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(f"the processes see checkpoints of the steps {steps} in {folder}; it must be on a disk that "
                         "all of them share")


def require_health(record: dict, first_loss: float, may_overflow: bool, folder: Path):
    """Raise a ValueError, in one line, where a training is lost: no number any more, or every quarter's loss far too high.

    One quarter alone may be: with cosine betas the bound of the last timesteps is hundreds for a single picture.
    """
    lowest = min(loss for loss in record["loss_by_quarter"] if loss is not None)
    lost = {"loss": not (math.isfinite(record["loss"]) and lowest <= EXPLODED * first_loss),
            "gradient_norm": not (may_overflow or math.isfinite(record["gradient_norm"]))}
    for name, is_lost in lost.items():
        if is_lost:
            found = last_checkpoint(folder)
            way_on = (f"the last good checkpoint is {found}: go on from it with --resume and a lower --learning-rate"
                      if found else "there is no checkpoint yet: start again with a lower --learning-rate")
            raise ValueError(f"the {name.replace('_', ' ')} became {record[name]:g} by step {record['step']}; {way_on}")


def asked_to_stop(stopped: list[int], done: int, accelerator: Accelerator) -> bool:
    """Whether this process, or with several processes any, was told to stop."""
    if accelerator.num_processes == 1:
        return bool(stopped)
    if done % ASK_EVERY:
        return False
    return accelerator.reduce(torch.tensor([len(stopped)], device=accelerator.device)).item() > 0


def summary(tally: list[float], steps: int, processes: int) -> dict:
    """The numbers since the last log: mean loss, also by quarter of the timesteps (None where unseen), gradient norm."""
    losses, counts = tally[:4], tally[4:8]
    return {"loss": sum(losses) / sum(counts), "gradient_norm": tally[8] / steps / processes,
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
