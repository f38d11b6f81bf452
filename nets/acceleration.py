"""Opt-in speed for a loaded pipeline: compiled networks, exact up to rounding, and int8 matrices, which are not.

What each gains in time and costs in quality is measured in docs/speed.md.
"""

import dataclasses
import importlib.util
import warnings

import torch
from diffusers import DiffusionPipeline
from torch import nn

SHAPES = 64  # how many batch and picture sizes may be compiled for before torch.compile refuses the next


def compile_networks(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Compile the transformer and the VAE's decoder, each shape when a call first has it; once, on the pipeline's device.

    On a CPU one graph serves all blocks, so that the first picture comes soon, and with AVX-512 oneDNN multiplies the
    float32 matrices of attention and MLP; blocks of int8 are compiled one by one, with their matrices packed into the
    program. On a GPU network and guidance become one CUDA graph, and the steps outside a guidance interval another.
    The limits on how many shapes torch.compile takes are set higher, for the whole process.
    Raises ValueError for a pipeline with offloading or a cache, whose hooks cannot be compiled; ImportError or OSError
    where there is no compiler. Each in one line and with nothing changed.
    """
    networks = [part for part in (pipeline.transformer, pipeline.vae) if part is not None]
    if any(hasattr(module, "_hf_hook") for part in networks for module in part.modules()):
        raise ValueError("a pipeline with offloading cannot be compiled; leave one of the two")
    if getattr(pipeline.transformer, "is_cache_enabled", False):
        raise ValueError("a transformer with a cache cannot be compiled; call disable_cache() first")
    require_compiler(pipeline.device)
    import torch._dynamo.config

    once = {"fullgraph": True, "dynamic": False}
    blocks = pipeline.transformer.transformer_blocks
    kinds = len(blocks) if is_quantized(pipeline) else 1  # each int8 block is compiled anew for each shape
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), SHAPES * kinds))
    if pipeline.device.type == "cuda":
        pipeline.predict = replayed(torch.compile(pipeline.predict, mode="reduce-overhead", **once))
    else:
        if is_quantized(pipeline):
            pipeline.predict = with_constants(pipeline.predict)
        elif torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available():
            for name, module in blocks.named_modules():
                if is_large_matrix(module, name):
                    module.__class__ = OneDNNLinear
        for block in blocks:
            block.compile(**once)
    if hasattr(pipeline.vae, "decoder"):  # not where there is no VAE, or a consistency decoder
        pipeline.vae.decoder.compile(**once)
    return pipeline


@torch.library.custom_op("dit::onednn_linear", mutates_args=())
def onednn_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of float32 on a CPU by oneDNN, where torch's own takes MKL: (..., in), (out, in), (out,) -> (..., out).

    An operator of our own, because inductor compiles torch's with constant weights alone, which one graph of all blocks
    does not have.
    """
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


@onednn_linear.register_fake
def _(input, weight, bias):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


class OneDNNLinear(nn.Linear):
    """`nn.Linear` by oneDNN for what is float32, on a CPU and without gradients; faster where there is AVX-512."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        if (input.device.type != "cpu" or input.dtype is not torch.float32 or self.weight.dtype is not torch.float32
                or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            return super().forward(input)
        return onednn_linear(input, self.weight, self.bias)


def compile_at_first_call(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Call `compile_networks` at the first step of the first call, on the device where the pipeline is by then.

    Where `compile_networks` refuses, it stays eager, and a warning of one line says why.
    """
    def predict(*arguments, **conditioning):
        del pipeline.predict
        try:
            compile_networks(pipeline)
        except (ImportError, OSError, ValueError) as error:
            warnings.warn(f"not compiled: {error}", stacklevel=2)
        return pipeline.predict(*arguments, **conditioning)

    pipeline.predict = predict
    return pipeline


def replayed(predict):
    """`predict` as a CUDA graph, whose memory the next step writes over; the scale, a tensor, is no part of it."""
    def call(latents, guidance_scale, *arguments, **conditioning):
        torch.compiler.cudagraph_mark_step_begin()
        scale = None if guidance_scale is None else torch.full((), guidance_scale, device=latents.device)
        return predict(latents, scale, *arguments, **conditioning).clone()
    return call


def with_constants(predict):
    """`predict` of blocks that are compiled each with its own weights as constants of the program."""
    import torch._inductor.config

    def call(*arguments, **conditioning):
        with torch._inductor.config.patch(freezing=True):
            return predict(*arguments, **conditioning)
    return call


def require_compiler(device: torch.device):
    """Compile a small function; raises ImportError or OSError, in one line, where that does not work."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    kind = {"cuda": "GPU"}.get(device.type, device.type.upper())
    compiler, variable = ("gcc", "CC") if device.type == "cuda" else ("g++", "CXX")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ImportError("compiling for a GPU needs triton: pip install triton")
    try:
        if device.type == "cpu":
            get_cpp_compiler()
        torch.compile(torch.sin, fullgraph=True)(torch.zeros(1, device=device))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
        raise OSError(f"compiling for a {kind} needs a compiler and Python's headers: install {compiler} and python3-dev, "
                      f"or name a compiler in {variable} ({reason})") from error


def is_large_matrix(module: nn.Module, name: str) -> bool:
    """Whether it is a plain matrix of attention or MLP, where a step's time goes; not of the conditioning or the head."""
    return (".attn1." in name or ".ff." in name) and type(module) is nn.Linear and type(module.weight) is nn.Parameter


def is_quantized(pipeline: DiffusionPipeline) -> bool:
    """Whether `quantize_int8` has changed this pipeline."""
    return getattr(pipeline.transformer, "quantized", False)


def quantize_int8(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Compute the matrices of attention and MLP in int8: weights a scale per row, activations a scale per token and step.

    For a CPU, and fast only with `compile_networks` after it. A CPU without VNNI adds its products in pairs, of 16 bits:
    there weights have 7 bits, so that no pair overflows. `save_pretrained` refuses such a pipeline; a second call changes
    nothing.
    Raises ValueError on another device or for a compiled pipeline, ImportError without torchao.
    Source: torchao `Int8DynamicActivationInt8WeightConfig`; LLM.int8 (arXiv 2208.07339), without its outliers.
    """
    if is_quantized(pipeline):
        return pipeline
    if pipeline._execution_device.type != "cpu":
        raise ValueError(f"int8 is for the CPU, and this pipeline runs on {pipeline._execution_device}; use bfloat16 there")
    if any(block._compiled_call_impl for block in pipeline.transformer.transformer_blocks):
        raise ValueError("a compiled pipeline cannot be put into int8; call quantize_int8 before compile_networks")
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, quantize_
        from torchao.utils import should_reduce_range
    except ImportError as error:
        raise ImportError("int8 needs torchao 0.18 or later: pip install -U torchao") from error
    config = Int8DynamicActivationInt8WeightConfig(reduce_range=should_reduce_range(pipeline._execution_device),
                                                   set_inductor_config=False)  # which would be the whole process's
    quantize_(pipeline.transformer, config, filter_fn=is_large_matrix)
    for parameter in pipeline.transformer.parameters():
        if isinstance(parameter, Int8Tensor):  # narrow weights are enough for no sum to overflow
            parameter.act_quant_kwargs = dataclasses.replace(parameter.act_quant_kwargs, reduce_range=False)
    pipeline.transformer.quantized = True
    return pipeline
