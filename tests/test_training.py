"""nets/training.py on a small regression: what is random belongs to the step alone, and a cut run loses nothing."""

import json
import os
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from nets.run_folder import last_checkpoint
from nets.sampling import picture_generator
from nets.training import fit, indices_of_step, learning_rate_at, share, update_average

COUNT, BATCH = 30, 8
INPUTS = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(0))


def test_each_picture_comes_once_an_epoch_whatever_the_batch():
    for batch_size in (7, 10, 64):
        seen = torch.cat([indices_of_step(COUNT, batch_size, 1, step) for step in range(30 * COUNT // batch_size + 1)])
        for epoch in range(30):
            assert sorted(seen[epoch * COUNT:(epoch + 1) * COUNT].tolist()) == list(range(COUNT))
        assert seen[:COUNT].tolist() != seen[COUNT:2 * COUNT].tolist()


def test_the_order_belongs_to_seed_and_epoch():
    assert torch.equal(indices_of_step(COUNT, 8, 1, 5), indices_of_step(COUNT, 8, 1, 5))
    assert not torch.equal(indices_of_step(COUNT, 8, 1, 5), indices_of_step(COUNT, 8, 2, 5))


def test_shares_are_the_whole():
    batch = {"a": torch.arange(8), "b": torch.randn(8, 2)}
    parts = [share(batch, rank, 4) for rank in range(4)]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in batch)


def test_the_learning_rate_warms_up_and_stays_or_falls_as_a_cosine():
    assert [learning_rate_at(step, 4.0, 4) for step in (0, 1, 3, 4, 10_000)] == [1, 2, 4, 4, 4]
    assert learning_rate_at(0, 4.0) == 4
    assert [learning_rate_at(step, 4.0, 1, 100) for step in (0, 50, 100)] == pytest.approx([4, 2, 0])


def test_the_average_is_the_recursion_in_float32():
    average, exact = [torch.zeros(4)], torch.zeros(4, dtype=torch.float64)
    for step in range(200):
        parameters = torch.randn(4, generator=torch.Generator().manual_seed(step)).bfloat16()
        update_average(average, [parameters], 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        exact = decay * exact + (1 - decay) * parameters.double()
    torch.testing.assert_close(average[0].double(), exact, atol=1e-6, rtol=1e-5)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))


def make_batch(step):
    noise = 0.1 * torch.randn(BATCH, 1, generator=picture_generator(0, step, 1))
    inputs = INPUTS[indices_of_step(COUNT, BATCH, 0, step)]
    return {"inputs": inputs, "target": inputs.sum(1, keepdim=True) + noise}


def loss_of_batch(model, batch):
    losses = (model(batch["inputs"]) - batch["target"]).square().flatten(1).mean(1)
    return losses, torch.arange(len(losses)) % 4


def train(folder, steps=20, batches=make_batch, loss=loss_of_batch, model=None, settings=None, scaler=None, **options):
    options = {"save_every": 5, "log_every": 5, "learning_rate": lambda step: learning_rate_at(step, 1e-2, 3), **options}
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    return fit(model or network(), batches, loss, accelerator, folder, settings or {"seed": 0}, steps=steps, **options)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def dies_at(step):
    def batches(number):
        if number == step:
            raise RuntimeError("power cut")
        return make_batch(number)
    return batches


def test_the_loss_falls_and_is_logged(tmp_path):
    records, told = [], []
    train(tmp_path, 200, report=records.append, sample_every=100, sample=lambda step, average: told.append(step))
    assert [record["step"] for record in log(tmp_path)] == [1, *range(5, 201, 5)] and told == [100, 200]
    assert [record["loss"] for record in records] == [record["loss"] for record in log(tmp_path)]
    assert records[-1]["loss"] < 0.2 * records[0]["loss"]
    assert records[1]["learning_rate"] == 1e-2 and all(record["gradient_norm"] > 0 for record in records)
    assert sum(records[1]["loss_by_quarter"]) / 4 == pytest.approx(records[1]["loss"], rel=1e-5)


def test_the_weights_are_those_of_a_plain_loop(tmp_path):
    average = train(tmp_path, 20, ema_decay=0.5, weight_decay=0.1, beta2=0.95, clip=0.3)
    model = network()
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, 1e-2, 3)
        loss_of_batch(model, make_batch(step))[0].mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new.detach() for old, new in zip(expected, model.parameters())]
    for found, wanted in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_batch_in_parts_is_the_batch(tmp_path):
    whole, parts = train(tmp_path / "whole"), train(tmp_path / "parts", accumulate=4)
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "parts")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5)


def test_a_run_that_was_cut_and_gone_on_with_is_bit_equal(tmp_path):
    whole = train(tmp_path / "whole", settings={"seed": 0})
    for step in (7, 13):
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path / "cut", batches=dies_at(step), resume=True)
    cut = train(tmp_path / "cut", resume=True)
    assert equal(whole, cut)
    losses = [[record["loss"] for record in log(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and [record["step"] for record in log(tmp_path / "cut")] == [1, 5, 10, 15, 20]


def test_the_loss_scale_of_fp16_is_gone_on_with(tmp_path):
    def scaler():  # float16 itself needs a GPU; the scale doubles every third step
        return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

    whole = train(tmp_path / "whole", scaler=scaler())
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", batches=dies_at(13), scaler=scaler())
    cut = train(tmp_path / "cut", resume=True, scaler=scaler())
    states = [json.loads((tmp_path / run / "checkpoint-00000020/state.json").read_text()) for run in ("whole", "cut")]
    assert states[0]["scaler"]["scale"] == 4.0 * 2**6 and states[0] == states[1]
    assert equal(whole, cut)


def test_a_run_in_fp16_can_be_gone_on_with_in_another_precision(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, batches=dies_at(13), scaler=torch.amp.GradScaler("cpu"))
    train(tmp_path, resume=True)
    assert json.loads((last_checkpoint(tmp_path) / "state.json").read_text())["scaler"] is None


def test_the_time_of_a_sheet_is_not_that_of_the_steps(tmp_path):
    train(tmp_path, 10, sample_every=6, sample=lambda step, average: time.sleep(1))
    assert log(tmp_path)[-1]["seconds_per_step"] < 0.1


def test_a_network_that_draws_draws_the_same_when_it_is_gone_on_with(tmp_path):
    def dropping():
        return nn.Sequential(network(), nn.Dropout(0.5))
    whole = train(tmp_path / "whole", model=dropping())
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", batches=dies_at(13), model=dropping())
    torch.manual_seed(99)
    assert equal(whole, train(tmp_path / "cut", resume=True, model=dropping()))


def test_a_loss_that_is_no_number_or_explodes_stops_with_the_last_good_checkpoint(tmp_path):
    for name, bad in (("nan", float("nan")), ("explodes", 1e4)):
        def loss(model, batch, bad=bad, steps=[0]):  # noqa: B006
            steps[0] += 1
            losses, quarter = loss_of_batch(model, batch)
            return losses * (bad if steps[0] > 7 else 1), quarter
        with pytest.raises(ValueError, match=r"the loss became .* by step 10; .* is .*checkpoint-00000005: go on"):
            train(tmp_path / name, loss=loss)
        assert last_checkpoint(tmp_path / name).name == "checkpoint-00000005"


def test_a_gradient_that_is_no_number_is_noticed_before_the_weights_are_kept(tmp_path):
    def loss(model, batch, steps=[0]):  # noqa: B006
        steps[0] += 1
        losses, quarter = loss_of_batch(model, batch)
        if steps[0] == 10:
            losses.register_hook(lambda gradient: gradient * float("nan"))
        return losses, quarter
    with pytest.raises(ValueError, match=r"the gradient norm became nan by step 10; .* is .*checkpoint-00000005: go on"):
        train(tmp_path, loss=loss)
    assert last_checkpoint(tmp_path).name == "checkpoint-00000005"
    assert all(tensor.isfinite().all() for tensor in load_file(last_checkpoint(tmp_path) / "model.safetensors").values())


def test_one_picture_of_a_huge_bound_is_no_explosion(tmp_path):
    def loss(model, batch):
        losses, quarter = loss_of_batch(model, batch)
        return losses + 1e4 * torch.tensor([0, 0, 0, 1, 0, 0, 0, 0]), quarter
    train(tmp_path, steps=5, log_every=2, loss=lambda *arguments: loss_of_batch(*arguments))
    train(tmp_path, steps=10, log_every=2, loss=loss, resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number, tmp_path):
    def batches(step):
        if step == 8:
            os.kill(os.getpid(), number)
        return make_batch(step)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step [89]; the same command with --resume goes on"):
        train(tmp_path / "cut", batches=batches)
    assert last_checkpoint(tmp_path / "cut").name[-1] in "89" and signal.getsignal(number) is before
    assert equal(train(tmp_path / "cut", resume=True), train(tmp_path / "whole"))


def test_frozen_parameters_stay(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    average = train(tmp_path, model=model)
    assert torch.equal(average[0].weight, frozen) and not torch.equal(average[2].weight, network()[2].weight)
