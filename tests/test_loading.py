"""Pipeline folders: what we write, upstream reads, and the other way round."""

import json
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_MODEL, TINY, fill, tiny_unet, tiny_vae, upstream_model
from safetensors import safe_open
from safetensors.torch import save_file

from nets import DiTPipeline, Transformer2DModel
from nets.loading import find_folder
from nets.scheduling import SCHEDULERS


def pictures(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np",
                    **arguments).images


ID2LABEL = {k: f"class {k}, name {k}" for k in range(10)}
LEGACY_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def make_legacy(folder):
    """Turn a folder with `.bin` weights into the form of the published ones: configs, names of classes and keys of 2022."""
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "transformer/config.json").read_text())
    config.update({"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None,
                   "use_linear_projection": False, "only_cross_attention": False})
    (folder / "transformer/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "norm_eps"}))
    config = json.loads((folder / "vae/config.json").read_text())
    assert config.pop("scaling_factor") == 0.18215
    (folder / "vae/config.json").write_text(json.dumps(config))
    weights = torch.load(folder / "vae/diffusion_pytorch_model.bin", weights_only=True)
    for today, legacy in LEGACY_ATTENTION.items():
        for key in [key for key in weights if f".attentions.0.{today}." in key]:
            weights[key.replace(f".{today}.", f".{legacy}.")] = weights.pop(key)
    assert sum("proj_attn" in key for key in weights) == 4
    torch.save(weights, folder / "vae/diffusion_pytorch_model.bin")


FORMATS = {"legacy .bin": dict(safe_serialization=False), "safetensors": {},
           "sharded .bin": dict(safe_serialization=False, max_shard_size="50KB"),
           "sharded": dict(max_shard_size="50KB"),
           "fp16 variant": dict(variant="fp16")}


def save(pipeline, folder, kind):
    """Save either library's pipeline in one of the formats, class names included."""
    pipeline.save_pretrained(folder, **FORMATS[kind])
    index = json.loads((folder / "model_index.json").read_text())
    if "id2label" not in index:  # upstream drops it
        (folder / "model_index.json").write_text(json.dumps({**index, "id2label": ID2LABEL}))
    if kind == "legacy .bin":
        make_legacy(folder)
    return folder


def load(library, folder, kind):
    needed = {"variant": "fp16", "torch_dtype": torch.float16} if kind == "fp16 variant" else {}
    if kind == "sharded .bin" and library is not DiTPipeline:  # upstream does not find them by itself
        needed["use_safetensors"] = False
    return library.from_pretrained(folder, **needed)


def contents(pipeline):
    """All that must survive: each part's config as it is saved, its weights, and the labels."""
    parts = {name: getattr(pipeline, name) for name in ("transformer", "vae")}
    configs = {name: {key: value for key, value in json.loads(part.to_json_string()).items() if key != "_name_or_path"}
               for name, part in parts.items()}
    legacy = ("cross_attention_dim", "num_vector_embeds", "use_linear_projection", "only_cross_attention")
    configs["transformer"] = {key: value for key, value in configs["transformer"].items() if key not in legacy}
    return configs, {name: part.state_dict() for name, part in parts.items()}, pipeline.labels


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("order", ["ours, upstream, ours", "upstream, ours, upstream"])
def test_nothing_is_lost_on_the_way_through_the_other_library(order, kind, tmp_path):
    libraries = [DiTPipeline if name == "ours" else diffusers.DiTPipeline for name in order.split(", ")]
    transformer = fill(Transformer2DModel(**TINY)).eval() if libraries[0] is DiTPipeline else upstream_model(**TINY)
    pipeline = libraries[0](transformer, tiny_vae(), diffusers.DDIMScheduler(clip_sample=False), id2label=ID2LABEL)
    if kind == "fp16 variant":
        pipeline.to(torch.float16)
    seen = []
    for number, library in enumerate(libraries):
        pipeline = load(library, save(pipeline, tmp_path / f"{number}", kind), kind)
        assert type(pipeline.transformer).__module__.startswith("nets" if library is DiTPipeline else "diffusers")
        seen.append((contents(pipeline), pictures(pipeline.to(torch.float32), guidance_scale=1)))
    assert len(list((tmp_path / "1/transformer").iterdir())) == (8 if kind.startswith("sharded") else 2)
    for (configs, weights, labels), picture in seen:
        (first_configs, first_weights, first_labels), first_picture = seen[0]
        assert configs == first_configs and labels == first_labels and len(labels) == 20
        for part in weights:
            assert weights[part].keys() == first_weights[part].keys()
            assert all(torch.equal(tensor, first_weights[part][key]) for key, tensor in weights[part].items())
        assert np.abs(picture - first_picture).max() < 1e-5  # layout of the decoder's convolutions
    assert np.array_equal(seen[2][1], seen[0][1])


def test_loading_bin_weights_complains_of_nothing(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    program = f"from nets import DiTPipeline; DiTPipeline.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "error occurred" not in done.stderr and "unsafe serialization" not in done.stderr  # diffusers' words


def test_a_variant_is_taken_by_the_parts_that_have_it(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors").rename(
        tmp_path / "transformer/diffusion_pytorch_model.fp16.safetensors")
    loaded = DiTPipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(loaded.transformer.proj_out_1.weight, pipeline.transformer.proj_out_1.weight)


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def edit_config(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGE = {
    "truncated transformer": (lambda folder: truncate(folder / "transformer" / WEIGHTS), "transformer"),
    "truncated vae": (lambda folder: truncate(folder / "vae" / WEIGHTS), "vae"),
    "a unet's weights": (lambda folder: save_file(tiny_unet().state_dict(), folder / "transformer" / WEIGHTS),
                         "not the weights of this network: 44 missing: .*; 74 unknown: "),
    "a unet's folder": (lambda folder: tiny_unet().save_pretrained(folder / "transformer"), "_class_name='UNet2DModel'"),
    "a unet as vae": (lambda folder: save_file(tiny_unet().state_dict(), folder / "vae" / WEIGHTS), "not the weights"),
    "more layers than weights": (lambda folder: edit_config(folder / "transformer/config.json", num_layers=3),
                                 "19 missing"),
    "fewer layers than weights": (lambda folder: edit_config(folder / "transformer/config.json", num_layers=1),
                                  "19 unknown"),
    "more classes than weights": (lambda folder: edit_config(folder / "transformer/config.json", num_embeds_ada_norm=11),
                                  r"\(11, 32\) instead of \(12, 32\)"),
    "no transformer": (lambda folder: shutil.rmtree(folder / "transformer"), "has no folder transformer/"),
    "no vae weights": (lambda folder: (folder / "vae" / WEIGHTS).unlink(), "vae has no weights: neither diffusion_pytorch"),
    "no vae config": (lambda folder: (folder / "vae/config.json").unlink(), "config.json"),
    "a broken config": (lambda folder: (folder / "transformer/config.json").write_text("{"), "config"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "has no folder scheduler/"),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
    "no class for the vae": (lambda folder: edit_config(folder / "model_index.json", vae=["diffusers", "utils"]), "utils"),
    "a list for an index": (lambda folder: (folder / "model_index.json").write_text("[]"), "no JSON object"),
    "a wrong type": (lambda folder: edit_config(folder / "transformer/config.json", num_layers="two"), "transformer: "),
    "an unknown vae": (lambda folder: edit_config(folder / "model_index.json", vae=["diffusers", "NoSuch"]), "NoSuch"),
}


@pytest.mark.parametrize("spoil, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_folder_is_refused_in_one_line(spoil, message, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises((OSError, ValueError), match=message) as error:
        DiTPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value).strip()


class RunsCode:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_bin_file_that_would_run_code_is_refused_and_its_code_not_run(part, pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"a": RunsCode()}, tmp_path / part / "diffusion_pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match=part) as error:
        DiTPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value).strip() and "code of the file ran" not in capsys.readouterr().out


@pytest.mark.parametrize("files", [["model_index.json"], None])
def test_without_a_network_a_hub_id_ends_in_one_line_that_says_what_was_tried(files, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"^facebook/DiT-XL-2-256 \(revision refs/pr/1\).*model_data/README\.md") as error:
        find_folder("facebook/DiT-XL-2-256", files, revision="refs/pr/1", cache_dir=tmp_path)
    assert "\n" not in str(error.value)


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
             "DEISMultistepScheduler": (999, 40), "LMSDiscreteScheduler": (999, 0), "PNDMScheduler": (960, 0),
             "DPMSolverSinglestepScheduler": (999, 40), "DPMSolverSDEScheduler": (999, 0),
             "KDPM2DiscreteScheduler": (999, 0), "KDPM2AncestralDiscreteScheduler": (999, 0)}


@pytest.mark.parametrize("resaved", [False, True], ids=["as shipped", "saved again"])
@pytest.mark.parametrize("name", TIMESTEPS)
def test_each_scheduler_keeps_its_own_spacing(name, resaved, small_model, tmp_path):
    folder = SMALL_MODEL
    if resaved:
        DiTPipeline.from_pretrained(SMALL_MODEL).save_pretrained(tmp_path)
        folder = tmp_path
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert "timestep_spacing" not in config and (config["beta_start"], config["beta_end"]) == (1e-4, 0.02)
    assert set(TIMESTEPS) == set(SCHEDULERS.values())
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
