"""Training side by side: `nets.training.fit` against a plain loop over facebookresearch/DiT's architecture.

    python -m bench.train_compare --output bench/results/train_compare.json
    python -m bench.train_compare --device cuda --mixed-precision bf16 --geometry S/2 B/2 XL/2 --batch-size 64 \\
        --gradient-checkpointing both --steps 60 --output bench/results/train_compare_cuda.json

Both train the same network from the same weights on the same cached latents with the same loss, in turn: A B A B. The plain
loop is written for this file after the original's train.py: stacked query, key and value, an embedder of its own, the
average of the weights updated one by one, the loss read at every step. It is given what ours has: fused SDPA, fused AdamW,
mixed precision, gradient checkpointing, and torch.compile. Ours draws its noise beside the step, clips the gradient,
updates the average at once, and on a CPU leaves fused attention where tokens are few (`nets.objectives.attention_kernel`);
`plain, same attention` is the plain loop with that, too. On a GPU it has not been run yet.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint

from nets import Transformer2DModel
from nets.checkpoint import NUMERICS, to_original
from nets.diffusion import GaussianDiffusion, linear_betas
from nets.embeddings import Timesteps
from nets.latents import Latents
from nets.objectives import attention_kernel, denoise
from nets.training import fit

# Width, depth, heads, side of the latents (its half squared are the tokens), batch on a CPU.
GEOMETRIES = {"small": (256, 5, 8, 8, 128), "S/2": (384, 12, 6, 32, 4), "B/2": (768, 12, 12, 32, 4),
              "XL/2": (1152, 28, 16, 32, 2)}
LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999


class PlainBlock(nn.Module):
    """A block as the original has it: conditioned by itself, one matrix for query, key and value."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attend(modulate(self.norm1(x), shift_msa, scale_msa))
        hidden = F.gelu(self.mlp["fc1"](modulate(self.norm2(x), shift_mlp, scale_mlp)), approximate="tanh")
        return x + gate_mlp.unsqueeze(1) * self.mlp["fc2"](hidden)

    def attend(self, x):
        batch, tokens, dim = x.shape
        query, key, value = self.attn["qkv"](x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.attn["proj"](x.transpose(1, 2).reshape(batch, tokens, dim))


class PlainDiT(nn.Module):
    """The original's network, with its state-dict keys."""

    def __init__(self, dim, depth, heads, side, channels=4, patch=2, classes=10):
        super().__init__()
        self.gradient_checkpointing = False
        self.channels, self.patch = 2 * channels, patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.features = Timesteps(downscale_freq_shift=0)
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2, dim), requires_grad=False)
        self.blocks = nn.ModuleList([PlainBlock(dim, heads) for _ in range(depth)])
        self.final_layer = nn.ModuleDict({
            "norm_final": nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)),
            "linear": nn.Linear(dim, patch * patch * self.channels)})

    def forward(self, x, t, y):
        batch, _, height, width = x.shape
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](self.features(t)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if self.gradient_checkpointing else block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        x = self.final_layer["linear"](modulate(self.final_layer["norm_final"](x), shift, scale))
        x = x.reshape(batch, height // self.patch, width // self.patch, self.patch, self.patch, self.channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(batch, self.channels, height, width)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def plain_loop(model, make_batch, diffusion, precision, steps):
    """Train as the original does; returns the seconds a step in the second half of the steps."""
    device = model.pos_embed.device
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)
    running_loss = 0.0
    model.train()
    for step in range(steps):
        if step == steps // 2:
            started = time.perf_counter()
        batch = {name: tensor.to(device) for name, tensor in make_batch(step).items()}
        noisy = diffusion.add_noise(batch["latents"], batch["noise"], batch["timestep"])
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(noisy, batch["timestep"], batch["class_labels"])
        loss = diffusion.loss(output.float(), batch["latents"], batch["noise"], batch["timestep"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].mul_(EMA_DECAY).add_(parameter.data, alpha=1 - EMA_DECAY)
        running_loss += loss.item()
    return (time.perf_counter() - started) / (steps - steps // 2)


def our_loop(model, objective, latents, device, precision, steps):
    """Train as train.py does; returns the seconds a step in the second half of the steps, as its log has them."""
    records = []
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    with tempfile.TemporaryDirectory() as folder, attention_kernel(latents, device):
        fit(model, *objective, accelerator, Path(folder), {}, steps=steps, learning_rate=lambda step: LEARNING_RATE,
            ema_decay=EMA_DECAY, log_every=steps // 2, save_every=steps, report=records.append)
    return records[-1]["seconds_per_step"]


def compare(geometry, batch_size, device, precision, compiled, checkpointing, steps, rounds):
    """Pictures a second of both, in turn, and their ratio."""
    dim, depth, heads, side, batch_on_cpu = geometry
    batch_size = batch_size or batch_on_cpu
    torch.manual_seed(0)
    ours = Transformer2DModel(num_attention_heads=heads, attention_head_dim=dim // heads, num_layers=depth, patch_size=2,
                              sample_size=side, in_channels=4, out_channels=8, num_embeds_ada_norm=10,
                              **NUMERICS["original"])
    for parameter in ours.parameters():  # a new DiT answers 0 to everything, and would hide a difference
        torch.nn.init.normal_(parameter, std=0.02)
    ours.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0  # the objective drops labels itself
    plain = PlainDiT(dim, depth, heads, side)
    plain.load_state_dict(to_original(ours))

    shard = {"mean": torch.randn(2048, 1, 4, side, side), "logvar": torch.full((2048, 1, 4, side, side), -5.0)}
    latents = Latents([shard], torch.arange(2048) % 10, {label: str(label) for label in range(10)}, [])
    diffusion = GaussianDiffusion(linear_betas(), device)
    make_batch, loss_of_batch = denoise(latents, diffusion, 1.0, batch_size)
    batch = make_batch(0)
    with torch.no_grad():
        arguments = batch["latents"], batch["timestep"], batch["class_labels"]
        torch.testing.assert_close(plain(*arguments), ours.eval()(*arguments).sample)
    ours, plain = ours.to(device), plain.to(device)
    if checkpointing:
        ours.enable_gradient_checkpointing()
        plain.gradient_checkpointing = True
    twin = copy.deepcopy(plain)
    if compiled:
        ours.compile_repeated_blocks()
        plain.compile()
        twin.compile()
    times = {}
    for _ in range(rounds):
        turn = {"ours": our_loop(ours, (make_batch, loss_of_batch), latents, device, precision, steps),
                "plain": plain_loop(plain, make_batch, diffusion, precision, steps)}
        with attention_kernel(latents, device):
            turn["plain, same attention"] = plain_loop(twin, make_batch, diffusion, precision, steps)
        for name, seconds in turn.items():
            times.setdefault(name, []).append(seconds)
        print("  " + ", ".join(f"{name} {batch_size / seconds:.1f} pictures/s" for name, seconds in turn.items()),
              flush=True)
    ratios = {name: [other / ours for ours, other in zip(times["ours"], times[name])] for name in times if name != "ours"}
    return {"pictures_per_second": {name: batch_size / statistics.median(seconds) for name, seconds in times.items()},
            "ours_over": {name: statistics.median(numbers) for name, numbers in ratios.items()}, "ratios": ratios,
            "batch_size": batch_size, "tokens": (side // 2) ** 2}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, nargs="+", default=["small", "S/2"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--batch-size", type=int, help="default: small enough for a CPU")
    parser.add_argument("--gradient-checkpointing", choices=("no", "both"), default="no", help="both: without and with")
    parser.add_argument("--steps", type=int, default=24, help="of each turn; the second half counts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device, precision = torch.device(arguments.device), arguments.mixed_precision
    name_of_device = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    results = {"torch": torch.__version__, "machine": name_of_device, "threads": torch.get_num_threads(),
               "mixed_precision": precision}
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # for all; train.py has it
    for name, checkpointing, compiled in itertools.product(
            arguments.geometry, (False, True) if arguments.gradient_checkpointing == "both" else (False,), (False, True)):
        label = f"{name}, {'compiled' if compiled else 'eager'}{', gradient checkpointing' if checkpointing else ''}"
        print(label, flush=True)
        results[label] = compare(GEOMETRIES[name], arguments.batch_size, device, precision, compiled, checkpointing,
                                 arguments.steps, arguments.rounds)
        print(f"  ours over: {results[label]['ours_over']}", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
