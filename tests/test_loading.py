"""Pipeline folders: what we write, upstream reads, and the other way round."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, TINY, embedder_count, tiny_vae, upstream_model
from safetensors import safe_open

import predict
from nets import DiTPipeline, Transformer2DModel


def pictures(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np",
                    **arguments).images


def test_upstream_loads_the_folder_that_we_save(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    upstream = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(upstream.transformer) is diffusers.DiTTransformer2DModel
    assert np.abs(pictures(upstream, guidance_scale=1) - pictures(pipeline, guidance_scale=1)).max() < 1e-5


@pytest.mark.parametrize("class_on_disk", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_we_load_the_folders_that_upstream_saves_today_and_saved_in_2022(class_on_disk, tmp_path):
    upstream = diffusers.DiTPipeline(upstream_model(**TINY), tiny_vae(), diffusers.DDIMScheduler(clip_sample=False))
    upstream.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["transformer"] = ["diffusers", class_on_disk]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    ours = DiTPipeline.from_pretrained(tmp_path)
    assert type(ours.transformer) is Transformer2DModel and embedder_count(ours.transformer) == 1
    assert np.abs(pictures(ours, guidance_scale=1) - pictures(upstream, guidance_scale=1)).max() < 1e-5


def test_labels_survive_saving_and_loading(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert loaded.labels == pipeline.labels and len(loaded.labels) == 20
    loaded.save_pretrained(tmp_path / "again")
    assert DiTPipeline.from_pretrained(tmp_path / "again").labels == pipeline.labels


def test_loading_honours_the_dtype_of_each_part(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float16)


TIMESTEPS = {"DPMSolverMultistepScheduler": (999, 40), "DDIMScheduler": (960, 0), "DDPMScheduler": (960, 0),
             "EulerDiscreteScheduler": (999, 0), "EulerAncestralDiscreteScheduler": (999, 0),
             "HeunDiscreteScheduler": (999, 0), "UniPCMultistepScheduler": (999, 40),
             "DEISMultistepScheduler": (999, 40), "LMSDiscreteScheduler": (999, 0), "PNDMScheduler": (960, 0)}


@pytest.mark.parametrize("resaved", [False, True], ids=["as shipped", "saved again"])
@pytest.mark.parametrize("name", TIMESTEPS)
def test_each_scheduler_keeps_its_own_spacing(name, resaved, small_model, tmp_path):
    folder = SMALL_MODEL
    if resaved:
        DiTPipeline.from_pretrained(SMALL_MODEL).save_pretrained(tmp_path)
        folder = tmp_path
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert "timestep_spacing" not in config and (config["beta_start"], config["beta_end"]) == (1e-4, 0.02)
    assert set(TIMESTEPS) == set(predict.SCHEDULERS.values())
    scheduler = getattr(diffusers, name).from_config(diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").config)
    scheduler.set_timesteps(25)
    assert (int(scheduler.timesteps[0]), int(scheduler.timesteps[-1])) == TIMESTEPS[name]


def test_the_shipped_folder_is_small_and_has_the_published_format():
    files = {str(path.relative_to(SMALL_MODEL)): path.stat().st_size for path in SMALL_MODEL.rglob("*") if path.is_file()}
    assert set(files) == {"model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
                          "transformer/diffusion_pytorch_model.safetensors", "vae/config.json",
                          "vae/diffusion_pytorch_model.safetensors"}
    assert sum(files.values()) <= 15_000_000
    for part in ("transformer", "vae"):
        with safe_open(SMALL_MODEL / part / "diffusion_pytorch_model.safetensors", "pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert len(json.loads((SMALL_MODEL / "model_index.json").read_text())["id2label"]) == 10


def test_no_config_of_the_shipped_folder_tells_a_path_of_the_machine_that_made_it():
    for path in SMALL_MODEL.rglob("*.json"):
        assert '"/' not in path.read_text(), path


def test_upstream_loads_the_shipped_folder(small_model):
    upstream = diffusers.DiTPipeline.from_pretrained(SMALL_MODEL)
    assert np.abs(pictures(upstream, guidance_scale=1) - pictures(small_model, guidance_scale=1)).max() < 1e-4
