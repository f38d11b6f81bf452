"""Train the two halves of a latent DiT on Fashion-MNIST: first the VAE, then the transformer on its latents.

    python train.py vae --data DIR --output runs/vae
    python train.py dit --data DIR --vae runs/vae --output runs/fashion-mnist

DIR holds the four files `{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz` (Debian: package dataset-fashion-mnist).
The second command ends in a pipeline folder: `python predict.py --model runs/fashion-mnist bag`.
Both run on the CPU, write a checkpoint every --save-every steps, and go on from it when they are started again.
"""
import argparse
import json
import math
import shutil
import time
from pathlib import Path


def parse_arguments(argv=None):
    """The command line as a namespace; argparse ends the program with status 2 where a value is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "dit"))
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--vae", type=Path, help="trained VAE folder (for dit)")
    parser.add_argument("--pictures", type=int, default=200_000, help="how many pictures to train on in all")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=500)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=1000, help="steps between two checkpoints")
    parser.add_argument("--log-every", type=int, default=50, help="steps between two looks at the loss")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.batch_size <= arguments.pictures:
        parser.error(f"--batch-size {arguments.batch_size} must be from 1 to --pictures, {arguments.pictures}")
    if arguments.part == "dit" and arguments.vae is None:
        parser.error("dit needs --vae DIR: the folder that `train.py vae` wrote")
    for name in ("train-images-idx3", "train-labels-idx1"):
        if not (arguments.data / f"{name}-ubyte.gz").is_file():
            parser.error(f"no {name}-ubyte.gz in {arguments.data}; "
                         "Fashion-MNIST's four files are in Debian's package dataset-fashion-mnist")
    return arguments


def to_model_range(pictures):
    """uint8 (n, 1, h, w) in 0..255 -> float32 (n, 3, h, w) in [-1, 1]."""
    return pictures.float().div(127.5).sub(1).expand(-1, 3, -1, -1)


def batches(count, batch_size, seed, first_step, last_step):
    """Yield (step, indices): an epoch's order depends on (seed, epoch) alone, so that a resumed run goes on exactly."""
    import torch

    per_epoch, order, epoch = count // batch_size, None, None
    for step in range(first_step, last_step):
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        start = step % per_epoch * batch_size
        yield step, order[start:start + batch_size]


def fit(model, loss_of_batch, count, arguments):
    """Run the optimisation loop that both parts share and return the model's exponential moving average.

    `loss_of_batch(model, indices)` gives the scalar loss. AdamW, linear warm-up, cosine decay to zero, clipping at 1,
    checkpoints under OUTPUT/checkpoint; an interrupted run goes on from the last one.
    """
    import torch
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel

    steps = arguments.pictures // arguments.batch_size
    if count < arguments.batch_size:
        raise SystemExit(f"the data has {count} pictures, fewer than --batch-size {arguments.batch_size}")
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / max(1, arguments.warmup_steps), 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))))

    def move_average(averages, currents, count):  # a young average forgets faster: its zero initialisation is no memory
        decay = min(arguments.ema_decay, (1 + count.item()) / (10 + count.item()))
        torch._foreach_lerp_(averages, currents, 1 - decay)

    average = AveragedModel(model, multi_avg_fn=move_average)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.register_for_checkpointing(average)

    checkpoint, first_step = arguments.output / "checkpoint", 0
    for folder in (checkpoint, checkpoint.with_name("checkpoint.old")):  # the latter alone: killed between two renames
        if (folder / "step.json").is_file():
            accelerator.load_state(str(folder))
            first_step = json.loads((folder / "step.json").read_text())["step"]
            print(f"going on from step {first_step} of {steps}", flush=True)
            break

    model.train()
    total, since, started = torch.zeros(()), 0, time.time()
    for step, indices in batches(count, arguments.batch_size, arguments.seed, first_step, steps):
        loss = loss_of_batch(model, indices)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        total, since = total + loss.detach(), since + 1
        if since == arguments.log_every or step + 1 == steps:
            mean, rate = total.item() / since, since * arguments.batch_size / (time.time() - started)
            if not math.isfinite(mean):
                raise SystemExit(f"the loss became {mean} at step {step}; the last good checkpoint is {checkpoint}")
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {rate:.0f} pictures/s", flush=True)
            total, since, started = torch.zeros(()), 0, time.time()
        if (step + 1) % arguments.save_every == 0 and step + 1 < steps:
            save_checkpoint(accelerator, checkpoint, step + 1)
    return average.module.eval()


def save_checkpoint(accelerator, folder, step):
    """Write everything needed to go on under a new name, then put it in the old one's place."""
    fresh, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
    accelerator.save_state(str(fresh))
    (fresh / "step.json").write_text(json.dumps({"step": step}))
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def train_vae(arguments):
    """The VAE of Rombach et al. 2022 at toy size: reconstruction plus a light KL term, 32x32x3 -> 8x8x4."""
    import torch
    from diffusers import AutoencoderKL

    from nets.picture_sets import read_fashion_mnist

    pictures, _ = read_fashion_mnist(arguments.data, "train")
    torch.manual_seed(arguments.seed)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                        block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
                        sample_size=32)

    def loss_of_batch(network, indices):
        images = to_model_range(pictures[indices])
        reconstruction, posterior = network(images)
        return (reconstruction - images).square().mean() + 1e-6 * posterior.kl().mean()

    class Autoencode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, images):
            posterior = self.vae.encode(images).latent_dist
            return self.vae.decode(posterior.sample()).sample, posterior

    vae = fit(Autoencode(), loss_of_batch, len(pictures), arguments).vae
    mean, logvar = latent_moments(vae, pictures[:10_000])
    latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(arguments.output)
    print(f"latents: std {latents.std():.4f}, scaling factor {vae.config.scaling_factor}; wrote {arguments.output}")


def latent_moments(vae, pictures, batch_size=500):
    """Mean and log-variance of the posterior of every picture, each (n, 4, h, w) float32, unscaled."""
    import torch

    with torch.inference_mode():
        moments = [vae.encode(to_model_range(part)).latent_dist for part in pictures.split(batch_size)]
        return torch.cat([m.mean for m in moments]), torch.cat([m.logvar for m in moments])


def train_dit(arguments):
    """The DiT on cached latents: hybrid loss, learned variance, 10 % label dropout, adaLN-Zero initialisation."""
    import torch
    from diffusers import AutoencoderKL

    from nets import DiTPipeline, Transformer2DModel
    from nets.diffusion import GaussianDiffusion, linear_betas
    from nets.picture_sets import FASHION_MNIST, read_fashion_mnist
    from nets.scheduling import published_scheduler

    pictures, labels = read_fashion_mnist(arguments.data, "train")
    vae = AutoencoderKL.from_pretrained(arguments.vae).eval()
    mean, logvar = latent_moments(vae, pictures)
    mean, std = mean * vae.config.scaling_factor, (0.5 * logvar).exp() * vae.config.scaling_factor
    torch.manual_seed(arguments.seed)
    transformer = Transformer2DModel(
        num_attention_heads=arguments.heads, attention_head_dim=arguments.width // arguments.heads,
        num_layers=arguments.depth, patch_size=arguments.patch_size, sample_size=mean.shape[-1],
        in_channels=mean.shape[1], out_channels=2 * mean.shape[1], num_embeds_ada_norm=len(FASHION_MNIST))
    diffusion = GaussianDiffusion(linear_betas())

    def loss_of_batch(network, indices):
        latents = mean[indices] + std[indices] * torch.randn_like(mean[indices])  # (batch, 4, 8, 8)
        noise = torch.randn_like(latents)
        timestep = torch.randint(diffusion.num_timesteps, (len(latents),))
        output = network(diffusion.add_noise(latents, noise, timestep), timestep, labels[indices]).sample
        return diffusion.loss(output, latents, noise, timestep).mean()

    transformer = fit(transformer, loss_of_batch, len(pictures), arguments)
    pipeline = DiTPipeline(transformer, vae, published_scheduler(), id2label=FASHION_MNIST)
    vae.register_to_config(_name_or_path=arguments.vae.name)  # else the config tells the path on this machine
    for part in (transformer, vae):
        torch.nn.Module.half(part)  # diffusers' own `half` warns of modules to keep in float32, of which there are none
    pipeline.save_pretrained(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    arguments = parse_arguments()
    {"vae": train_vae, "dit": train_dit}[arguments.part](arguments)
