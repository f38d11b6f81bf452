"""nets/acceleration.py: compiled, the same pictures up to rounding; in int8, pictures within what the docs say."""

import re

import accelerate
import diffusers
import pytest
import torch
import torch._dynamo.config
from conftest import SMALL_MODEL, tiny_pipeline

from nets import DiTPipeline
from nets.acceleration import OneDNNLinear, compile_networks, quantize_int8, replayed

NO_COMPILER = ("compiling for a CPU needs a compiler and Python's headers: install g++ and python3-dev, or name a compiler "
               "in CXX")


NEEDS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def pictures(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([1, 2, 3], generator=torch.Generator().manual_seed(0),
                    **{"num_inference_steps": 3, "output_type": "pt", **options}).images


def psnr(first, second):
    """Of the worst picture, in dB; pictures in 0..1."""
    return (-10 * (first - second).square().flatten(1).mean(1).log10()).min().item()


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch._dynamo.reset()


@torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1)
def test_compiled_it_makes_the_same_pictures_guided_and_not_and_in_many_shapes(tmp_path):
    eager = tiny_pipeline()
    eager.save_pretrained(tmp_path)
    compiled = DiTPipeline.from_pretrained(tmp_path, compile=True)
    assert compiled.vae.decoder._compiled_call_impl is None  # before it is on its device and called
    for options in ({"guidance_interval": (0.5, 5)}, {"num_images_per_label": 2, "output_type": "latent"}):
        torch.testing.assert_close(pictures(compiled, **options), pictures(eager, **options), atol=2e-5, rtol=0)
    assert all(block._compiled_call_impl for block in compiled.transformer.transformer_blocks)
    assert compiled.vae.decoder._compiled_call_impl


@NEEDS_ONEDNN
@pytest.mark.parametrize("capability, kind", [("AVX2", torch.nn.Linear), ("AVX512", OneDNNLinear)])
def test_with_avx_512_onednn_multiplies_the_matrices_of_attention_and_mlp(monkeypatch, capability, kind):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    eager, compiled = tiny_pipeline(), tiny_pipeline()
    compile_networks(compiled)
    torch.testing.assert_close(pictures(compiled), pictures(eager), atol=2e-5, rtol=0)
    for name, module in compiled.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert type(module) is (kind if ".attn1." in name or ".ff." in name else torch.nn.Linear)
    with torch.profiler.profile() as profile:
        pictures(compiled, num_inference_steps=1, output_type="latent")
    assert ("dit::onednn_linear" in {event.key for event in profile.key_averages()}) == (kind is OneDNNLinear)


@NEEDS_ONEDNN
@pytest.mark.parametrize("bias", [True, False])
def test_onednns_products_are_those_of_float64_and_gradients_are_torchs(bias):
    torch.manual_seed(0)
    layer, tokens = OneDNNLinear(1152, 96, bias=bias), torch.randn(2, 5, 1152)
    with torch.no_grad():
        exact = layer.double()(tokens.double())
        torch.testing.assert_close(layer.float()(tokens).double(), exact, atol=1e-5, rtol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(tokens).dtype is layer(tokens.bfloat16()).dtype is torch.bfloat16
    layer(tokens).sum().backward()
    torch.testing.assert_close(layer.weight.grad, tokens.sum((0, 1)).expand(96, -1))


@NEEDS_ONEDNN
def test_a_linear_layer_that_is_somebody_elses_stays_so(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    pipeline = tiny_pipeline()
    layer = pipeline.transformer.transformer_blocks[0].attn1.to_q
    torch.nn.utils.parametrizations.weight_norm(layer)
    kind = type(layer)
    compile_networks(pipeline)
    assert type(layer) is kind and type(pipeline.transformer.transformer_blocks[0].attn1.to_k) is OneDNNLinear


def test_what_cannot_be_compiled_is_refused_in_one_line():
    cached, offloaded = tiny_pipeline(), tiny_pipeline()
    cached.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"^a transformer with a cache cannot be compiled; call disable_cache\(\) first$"):
        compile_networks(cached)
    accelerate.hooks.add_hook_to_module(offloaded.vae, accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match=r"^a pipeline with offloading cannot be compiled; leave one of the two$"):
        compile_networks(offloaded)


def test_a_compiled_pipeline_is_not_put_into_int8():
    with pytest.raises(ValueError, match=r"^a compiled pipeline cannot be put into int8; call quantize_int8 "):
        quantize_int8(compile_networks(tiny_pipeline()))


def test_int8_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"^int8 weights are not saved; load the pipeline anew and save that$"):
        quantize_int8(quantize_int8(tiny_pipeline())).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_without_a_compiler_it_says_so_and_changes_nothing():
    pipeline = tiny_pipeline()
    with (torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
          pytest.raises(OSError, match=re.escape(NO_COMPILER))):
        compile_networks(pipeline)
    assert pipeline.vae.decoder._compiled_call_impl is None


def test_nor_with_a_compiler_that_cannot_compile(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\ncase $1 in --version) exec g++ --version;; esac\n"
                        "echo 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    pipeline = tiny_pipeline()
    with (torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}),
          pytest.raises(OSError, match=rf"{re.escape(NO_COMPILER)} \(fatal error: Python.h: No such file")):
        compile_networks(pipeline)
    assert pipeline.vae.decoder._compiled_call_impl is None


def test_loaded_to_be_compiled_but_without_a_compiler_it_warns_once_and_makes_the_picture(tmp_path):
    eager = tiny_pipeline()
    eager.save_pretrained(tmp_path)
    pipeline = DiTPipeline.from_pretrained(tmp_path, compile=True)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.warns(UserWarning) as warned:
        assert torch.equal(pictures(pipeline), pictures(eager))
        pictures(pipeline)
    warning, = warned
    assert str(warning.message).startswith(f"not compiled: {NO_COMPILER} (") and "\n" not in str(warning.message)


@pytest.mark.parametrize("vae", [None, diffusers.ConsistencyDecoderVAE])
def test_what_has_no_decoder_is_compiled_without(vae):
    pipeline = tiny_pipeline()
    pipeline.vae = vae and torch.nn.Module.__new__(vae)  # 620 million weights if it were made
    if vae:
        torch.nn.Module.__init__(pipeline.vae)
        pipeline.vae.decoder_unet = torch.nn.Linear(1, 1)
    compile_networks(pipeline)
    assert all(block._compiled_call_impl for block in pipeline.transformer.transformer_blocks)


def test_network_and_guidance_in_one_graph_as_on_a_gpu_are_the_same_pictures_and_any_scale_has_that_graph():
    eager, whole = tiny_pipeline(), tiny_pipeline()
    whole.predict = replayed(torch.compile(whole.predict, fullgraph=True, dynamic=False, backend="eager"))
    for options in ({}, {"guidance_interval": (0.5, 5)}, {"guidance_channels": 3}):
        torch.testing.assert_close(pictures(whole, **options), pictures(eager, **options), atol=2e-5, rtol=0)
    other = pictures(eager, guidance_scale=2.5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(pictures(whole, guidance_scale=2.5), other, atol=2e-5, rtol=0)


@pytest.mark.cuda
def test_on_a_gpu_the_graphs_make_the_eager_pictures(cuda):
    eager, compiled = tiny_pipeline().to(cuda), compile_networks(tiny_pipeline().to(cuda))
    for options in ({}, {}, {"guidance_interval": (0.5, 5)}, {"guidance_channels": 3}, {"num_images_per_label": 2}):
        torch.testing.assert_close(pictures(compiled, **options), pictures(eager, **options), atol=1e-4, rtol=0)


@torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1)
def test_int8_with_packed_matrices_makes_the_shipped_models_pictures_as_nearly_as_docs_speed_says():
    exact, quantized = (DiTPipeline.from_pretrained(SMALL_MODEL, dtype=torch.float32) for _ in range(2))
    quantize_int8(quantized)
    kinds = {name: type(module.weight).__name__ for name, module in quantized.transformer.named_modules()
             if isinstance(module, torch.nn.Linear)}
    assert {name for name, kind in kinds.items() if kind != "Parameter"} == {
        name for name in kinds if ".attn1." in name or ".ff." in name}
    compile_networks(quantized)  # a packed kernel may overflow where eager int8 does not
    latents = pictures(quantized, num_inference_steps=10, output_type="latent")
    assert 36 < psnr(exact.decode(latents), pictures(exact, num_inference_steps=10)) < 60
    with torch.profiler.profile() as profile:
        pictures(quantized, num_inference_steps=1, output_type="latent")
    called = {event.key for event in profile.key_averages()} & {"aten::_int_mm", "onednn::qlinear_pointwise"}
    with_uint8 = torch.cpu._is_vnni_supported() and not torch.cpu._is_amx_tile_supported()  # torchao's choice
    assert called == {"aten::_int_mm" if with_uint8 else "onednn::qlinear_pointwise"}
