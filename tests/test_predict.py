"""predict.py as a user runs it; in this process where that shows the same, in its own where start-up matters."""

import json
import subprocess
import sys
import time

import diffusers
import numpy as np
import pytest
from conftest import ROOT, SMALL_MODEL, tiny_pipeline
from PIL import Image

import command_line
import predict


def run(capsys, *arguments):
    """Exit status, standard output and the last line of standard error of one run, on the CPU unless it says otherwise."""
    try:
        status = predict.main(["--device", "cpu", *(str(argument) for argument in arguments)])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()[-1] if captured.err else ""


def test_names_become_recognisable_pictures(capsys, tmp_path):
    import torch
    from transformers import AutoModelForImageClassification

    names = ["trouser", "bag", "sneaker", "ankle boot", "dress"]
    status, out, _ = run(capsys, *names, "--images-per-class", 4, "--output-dir", tmp_path)
    assert status == 0
    files = [line.split("  ")[0] for line in out.splitlines() if ".png" in line]
    assert len(files) == 20 and "dpm, 25 steps, guidance 4" in out and "seed 42" in out and "cpu" in out
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    classifier = AutoModelForImageClassification.from_pretrained(ROOT / "model_data/fashion-mnist-classifier")
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        found = [classifier.config.id2label[i] for i in classifier.eval()(inputs).logits.argmax(1).tolist()]
    wanted = [name for name in names for _ in range(4)]
    assert sum(a == b for a, b in zip(found, wanted)) >= 18


def test_the_pictures_are_those_of_the_pipeline(capsys, tmp_path, small_model):
    import torch
    from diffusers import DDIMScheduler

    run(capsys, "bag", "coat", "--scheduler", "ddim", "--steps", 5, "--seed", 7, "--guidance-scale", 2,
        "--output-dir", tmp_path)
    small_model.scheduler = DDIMScheduler.from_config(small_model.scheduler.config)
    expected = small_model([8, 4], guidance_scale=2, num_inference_steps=5, generator=torch.manual_seed(7)).images
    for name, picture in zip(("bag", "coat"), expected):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}-seed7.png")), np.asarray(picture))


@pytest.mark.parametrize("scheduler", ["ddpm", "euler"])
def test_like_makes_that_very_picture_again_alone(scheduler, capsys, tmp_path):
    run(capsys, "bag", "coat", "--steps", 3, "--scheduler", scheduler, "--images-per-class", 2, "--seed", 5,
        "--guidance-scale", 1.5, "--output-dir", tmp_path / "first")
    original = tmp_path / "first/coat-seed5-2.png"
    status, _, _ = run(capsys, "--like", original, "--output-dir", tmp_path / "second")
    (again,) = (tmp_path / "second").iterdir()
    assert status == 0
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(original)))
    assert Image.open(again).text == Image.open(original).text


def test_a_picture_says_how_it_was_made(capsys, tmp_path):
    run(capsys, "bag", "coat", "--steps", 2, "--output-dir", tmp_path)
    text = Image.open(tmp_path / "coat-seed42.png").text
    assert json.loads(text["class_ids"]) == [8, 4] and text["index"] == "1" and text["class_name"] == "coat"
    assert (text["model"], text["seed"], text["steps"], text["guidance_scale"], text["scheduler"], text["dtype"]) == (
        "fashion-mnist-32", "42", "2", "4.0", "dpm", "float32")
    assert "torch" in text["versions"] and "diffusers" in text["versions"]


def test_like_of_another_file_is_refused_in_one_line(capsys, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("plain.png", "text.png", "missing.png"):
        status, out, error = run(capsys, "--like", tmp_path / name)
        assert status == 2 and out == "" and name in error


def test_no_name_picks_two_classes_of_the_model(capsys, tmp_path):
    status, _, _ = run(capsys, "--steps", 2, "--output-dir", tmp_path)
    made = {Image.open(path).text["class_name"] for path in tmp_path.iterdir()}
    id2label = json.loads((SMALL_MODEL / "model_index.json").read_text())["id2label"]
    known = {names.split(",")[0] for names in id2label.values()}
    assert status == 0 and len(made) == 2 and made <= known


def test_nothing_is_overwritten_and_nothing_unfinished_is_left(capsys, tmp_path):
    for _ in range(2):
        run(capsys, "bag", "--steps", 2, "--images-per-class", 2, "--output-dir", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bag-seed42-2.png", "bag-seed42-3.png", "bag-seed42-4.png", "bag-seed42.png"]


def test_the_grid_shows_every_picture(capsys, tmp_path):
    run(capsys, "bag", "coat", "shirt", "--steps", 2, "--grid", "--output-dir", tmp_path)
    grid = np.asarray(Image.open(tmp_path / "grid-seed42.png"))
    picture = np.asarray(Image.open(tmp_path / "shirt-seed42.png"))
    assert np.array_equal(grid[2:98:3, 202:298:3], picture)


def test_a_misspelt_name_gets_the_nearest_ones_and_status_2(capsys, tmp_path):
    status, out, error = run(capsys, "sneeker", "--output-dir", tmp_path / "none")
    assert status == 2 and out == "" and "'sneeker'" in error and "sneaker" in error
    assert not (tmp_path / "none").exists()


def test_a_name_of_imagenet_gets_the_way_to_its_model(capsys):
    status, _, error = run(capsys, "golden retriever")
    assert status == 2 and "facebook/DiT-XL-2-256" in error and "--model" in error
    assert "facebook" not in run(capsys, "sneeker")[2]


@pytest.mark.parametrize("arguments, named", [
    (["--seed", "-1"], "-1 is not in"), (["--steps", "0"], "0 is not in"), (["--steps", "many"], "many"),
    (["--scheduler", "magic"], "magic"), (["--images-per-class", "0"], "0 is not in"), (["--dtype", "int4"], "int4"),
    (["--model", "no/such/folder"], "no/such/folder"), (["--device", "abacus", "--steps", "2"], "abacus"),
    (["--output-dir", "README.md"], "README.md"), (["--guidance-scale", "nan"], "nan"),
    (["--guidance-interval", "5"], "5 is not LOW,HIGH"), (["--guidance-interval", "3,0"], "3,0 is not LOW,HIGH"),
])
def test_wrong_values_are_named_and_end_with_status_2(arguments, named, capsys):
    status, out, error = run(capsys, "bag", *arguments)
    assert status == 2 and out == "" and named in error


def test_a_wrong_option_gets_one_line():
    done = subprocess.run([sys.executable, "predict.py", "--steps", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "predict.py: argument --steps: 0 is not in 1..1000 (--help has all options)\n"
    assert done.returncode == 2


@pytest.mark.parametrize("changes", [{"scheduler": "magic"}, {"steps": "0"}, {"index": "7"}, {"class_ids": "8"},
                                     {"class_ids": "[8.5]"}, {"guidance_scale": "nan"}], ids=str)
def test_like_of_a_picture_with_a_damaged_recipe_is_refused(changes, capsys, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    text, chunks = {"model": "fashion-mnist-32", "steps": "2", "guidance_scale": "4.0", "seed": "1", "scheduler": "dpm",
                    "dtype": "float32", "class_ids": "[8]", "index": "0"}, PngInfo()
    for key, value in {**text, **changes}.items():
        chunks.add_text(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=chunks)
    status, out, error = run(capsys, "--like", tmp_path / "odd.png", "--output-dir", tmp_path / "out")
    assert status == 2 and out == "" and error and not (tmp_path / "out").exists()


def test_like_refuses_options_that_the_picture_settles(capsys):
    for more, named in ((["bag"], "names"), (["--seed", "42"], "seed"), (["--images-per-class", "2"], "images_per_class")):
        status, _, error = run(capsys, *more, "--like", "any.png")
        assert status == 2 and named in error


def test_a_scheduler_that_cannot_do_so_few_steps_gets_one_line(capsys, tmp_path):
    status, _, error = run(capsys, "bag", "--scheduler", "pndm", "--steps", 2, "--output-dir", tmp_path)
    assert status == 2 and "pndm" in error and list(tmp_path.iterdir()) == []


def test_a_line_of_the_class_list_is_a_name(capsys, tmp_path):
    status, _, _ = run(capsys, "T-shirt, top", "--steps", 2, "--output-dir", tmp_path)
    assert status == 0 and (tmp_path / "t-shirt-seed42.png").is_file()


def test_a_model_without_names_takes_numbers(capsys, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.register_to_config(id2label=None)
    pipeline.save_pretrained(tmp_path / "model")
    status, _, _ = run(capsys, "3", "--model", tmp_path / "model", "--steps", 2, "--output-dir", tmp_path / "out")
    assert status == 0 and (tmp_path / "out/3-seed42.png").is_file()
    status, _, error = run(capsys, "bag", "--model", tmp_path / "model")
    assert status == 2 and "no class names" in error


def test_list_classes_prints_ids_and_names(capsys):
    status, out, _ = run(capsys, "--list-classes", "BOOT")
    assert status == 0 and out.split() == ["9", "ankle", "boot"]
    assert len(run(capsys, "--list-classes")[1].splitlines()) == 10
    assert run(capsys, "--list-classes", "zebra") == (0, "", "no class name of this model has 'zebra' in it")


def test_list_classes_shows_the_spelling_that_picks_each_class(capsys, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.register_to_config(id2label={**{k: f"class {k}" for k in range(8)}, 8: "crane, lifting gear", 9: "crane"})
    pipeline.save_pretrained(tmp_path / "model")
    status, out, _ = run(capsys, "--list-classes", "crane", "--model", tmp_path / "model")
    assert status == 0 and out.splitlines() == ["   8  crane#8, lifting gear", "   9  crane#9"]
    status, _, error = run(capsys, "crane", "--model", tmp_path / "model", "--output-dir", tmp_path / "out")
    assert status == 2 and "'crane#8' or 'lifting gear' or 'crane#9'" in error and not (tmp_path / "out").exists()
    run(capsys, "crane#9", "#8", "10", "--steps", 1, "--model", tmp_path / "model", "--output-dir", tmp_path / "out")
    made = {path.name: json.loads(Image.open(path).text["class_ids"]) for path in (tmp_path / "out").iterdir()}
    assert made == {name: [9, 8, 10] for name in ("crane-seed42.png", "crane-seed42-2.png", "none-seed42.png")}


def test_list_classes_takes_one_text(capsys):
    status, _, error = run(capsys, "--list-classes", "bag", "coat")
    assert status == 2 and "'coat' is too much" in error


def test_a_class_id_that_the_model_lacks_gets_one_line(capsys, tmp_path):
    status, out, error = run(capsys, "11", "--output-dir", tmp_path)
    assert status == 2 and out == "" and "class id 11 is out of range" in error


def test_guidance_channels_change_the_picture_and_are_written_into_it(capsys, tmp_path):
    run(capsys, "bag", "--steps", 3, "--output-dir", tmp_path / "all")
    run(capsys, "bag", "--steps", 3, "--guidance-channels", 3, "--output-dir", tmp_path / "three")
    run(capsys, "--like", tmp_path / "three/bag-seed42.png", "--output-dir", tmp_path / "again")
    every, three, again = (Image.open(tmp_path / folder / "bag-seed42.png") for folder in ("all", "three", "again"))
    assert "guidance_channels" not in every.text and three.text["guidance_channels"] == "3"
    assert not np.array_equal(np.asarray(three), np.asarray(every))
    assert np.array_equal(np.asarray(three), np.asarray(again))
    status, _, error = run(capsys, "bag", "--guidance-channels", 5, "--output-dir", tmp_path)
    assert status == 2 and "guidance_channels=5 is not in 1..4" in error


def test_a_guidance_interval_is_kept_in_the_picture_too(capsys, tmp_path):
    run(capsys, "bag", "--steps", 5, "--guidance-interval", "0.3,5", "--output-dir", tmp_path / "first")
    run(capsys, "--like", tmp_path / "first/bag-seed42.png", "--output-dir", tmp_path / "again")
    first, again = (Image.open(tmp_path / folder / "bag-seed42.png") for folder in ("first", "again"))
    assert np.array_equal(np.asarray(first), np.asarray(again)) and first.text == again.text
    for wrong in ("5,0.3", "1", "a,b"):
        assert run(capsys, "bag", "--guidance-interval", wrong)[0] == 2


def test_the_papers_preset_is_its_options_spelled_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(command_line.PRESETS, "paper", {**command_line.PRESETS["paper"], "num_inference_steps": 5})
    status, out, _ = run(capsys, "bag", "--preset", "paper", "--output-dir", tmp_path / "preset")
    assert status == 0 and "ddpm-learned (linspace), 5 steps, guidance 1.5 on 3 channels" in out
    run(capsys, "bag", "--scheduler", "ddpm-learned", "--steps", 5, "--guidance-scale", 1.5, "--guidance-channels", 3,
        "--output-dir", tmp_path / "spelled")
    run(capsys, "--like", tmp_path / "preset/bag-seed42.png", "--output-dir", tmp_path / "again")
    first, spelled, again = (np.asarray(Image.open(tmp_path / folder / "bag-seed42.png"))
                             for folder in ("preset", "spelled", "again"))
    assert np.array_equal(first, spelled) and np.array_equal(first, again)
    for option, value in (("steps", 25), ("guidance-scale", 4), ("scheduler", "dpm"), ("spacing", "trailing")):
        status, _, error = run(capsys, "bag", "--preset", "paper", f"--{option}", value)
        assert status == 2 and f"--preset paper sets {option.replace('-', '_')}; give the one or the other" in error


@pytest.mark.parametrize("preset", ["reference", "balanced", "fast", "draft"])
def test_a_preset_leaves_the_guidance_scale_to_the_user_and_its_picture_says_all(preset, small_model, capsys, tmp_path):
    steps = command_line.PRESETS[preset]["num_inference_steps"]
    small_model.scheduler = diffusers.DDIMScheduler.from_config(small_model.scheduler.config, timestep_spacing="leading")
    small_model.save_pretrained(tmp_path / "model")  # as upstream saves it: the spacing of one class pinned for all
    assert "timestep_spacing" in (tmp_path / "model/scheduler/scheduler_config.json").read_text()
    status, out, _ = run(capsys, "bag", "--preset", preset, "--guidance-scale", 2, "--output-dir", tmp_path / "first",
                         "--model", tmp_path / "model")
    assert status == 0 and f"{steps} steps, guidance 2" in out
    if preset == "fast":
        assert "dpm (logsnr), 8 steps, guidance 2 at sigma 0 to 3 · seed 42" in out
    run(capsys, "--like", tmp_path / "first/bag-seed42.png", "--output-dir", tmp_path / "again")
    first, again = (np.asarray(Image.open(tmp_path / folder / "bag-seed42.png")) for folder in ("first", "again"))
    assert np.array_equal(first, again)


def test_a_spacing_moves_the_timesteps_and_like_keeps_it(capsys, tmp_path):
    for spacing in ("trailing", "karras"):
        run(capsys, "bag", "--steps", 4, "--spacing", spacing, "--output-dir", tmp_path / spacing)
    run(capsys, "--like", tmp_path / "karras/bag-seed42.png", "--output-dir", tmp_path / "again")
    trailing, karras, again = (np.asarray(Image.open(tmp_path / folder / "bag-seed42.png"))
                               for folder in ("trailing", "karras", "again"))
    assert np.array_equal(karras, again) and not np.array_equal(karras, trailing)
    status, _, error = run(capsys, "bag", "--scheduler", "ddim", "--spacing", "karras", "--output-dir", tmp_path)
    assert status == 2 and "DDIMScheduler has no spacing 'karras'" in error


def test_timings_share_out_the_time_of_the_process(capsys, tmp_path):
    _, out, _ = run(capsys, "bag", "--steps", 2, "--timings", "--output-dir", tmp_path)
    last = out.splitlines()[-1]
    assert [part.split()[0] for part in last.split(" · ")] == ["import", "load", "sampling", "saving", "together"]
    *parts, whole = (float(part.split()[1]) for part in last.split(" · "))
    assert abs(sum(parts) - whole) < 0.03 and min(parts) >= 0


def test_importing_leaves_the_collector_on_and_what_was_imported_out_of_its_way():
    program = ("import gc, command_line\ncommand_line.quiet_diffusers()\nfrozen = gc.get_freeze_count()\n"
               "command_line.quiet_diffusers()\nprint(gc.isenabled(), frozen > 300_000, gc.get_freeze_count() - frozen)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split()[:2] == ["True", "True"] and int(done.stdout.split()[2]) <= 0


def test_compiled_it_makes_the_same_picture(capsys, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    for folder, more in (("plain", ()), ("compiled", ("--compile",))):
        status, _, _ = run(capsys, 1, "--model", tmp_path / "tiny", "--steps", 2, "--output-dir", tmp_path / folder, *more)
        assert status == 0
    plain, compiled = (np.asarray(Image.open(next((tmp_path / folder).glob("*.png")))).astype(int)
                       for folder in ("plain", "compiled"))
    assert abs(compiled - plain).max() <= 1


def test_without_a_compiler_it_says_so_and_makes_the_picture(capsys, tmp_path):
    import torch._inductor.config

    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert predict.main(["bag", "--device", "cpu", "--steps", "2", "--compile", "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "bag-seed42.png").is_file()
    said, = (line for line in capsys.readouterr().err.splitlines() if line.startswith("compiling for a CPU needs"))
    assert said.endswith("; going on without --compile")


def test_nor_is_int8_which_would_be_another_picture_made_without_a_compiler(capsys, monkeypatch, tmp_path):
    def refuse(_):
        raise OSError("compiling needs a compiler")
    monkeypatch.setattr("nets.acceleration.compile_networks", refuse)
    status, _, error = run(capsys, "bag", "--steps", 2, "--quantize", "int8", "--compile", "--output-dir", tmp_path)
    assert status == 2 and "compiling needs a compiler; or leave out --quantize int8" in error
    assert not list(tmp_path.glob("*.png"))


def test_a_picture_in_int8_is_made_again_compiled_if_it_was(capsys, monkeypatch, tmp_path):
    done = []
    for name in ("quantize_int8", "compile_networks"):
        monkeypatch.setattr(f"nets.acceleration.{name}", lambda pipeline, name=name: done.append(name))
    for folder, more in (("compiled", ["--compile"]), ("eager", [])):
        run(capsys, "bag", "--steps", 2, "--quantize", "int8", *more, "--output-dir", tmp_path / folder)
        run(capsys, "--like", tmp_path / folder / "bag-seed42.png", "--output-dir", tmp_path / "again")
    assert done == ["quantize_int8", "compile_networks"] * 2 + ["quantize_int8"] * 2
    status, _, error = run(capsys, "--like", tmp_path / "eager/bag-seed42.png", "--compile", "--output-dir", tmp_path)
    assert status == 2 and "was made in int8 without --compile" in error


def test_without_torchao_int8_is_refused_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    status, _, error = run(capsys, "bag", "--steps", 2, "--quantize", "int8", "--output-dir", tmp_path)
    assert status == 2 and error.endswith("int8 needs torchao 0.18 or later: pip install -U torchao")


def test_a_hub_id_without_a_network_gets_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    status, out, error = run(capsys, "207", "--model", "facebook/DiT-XL-2-256", "--revision", "refs/pr/1")
    assert status == 2 and out == "" and "(revision refs/pr/1)" in error and "model_data/README.md" in error


def test_a_scheduler_whose_package_is_not_there_gets_one_line(capsys, monkeypatch, tmp_path):
    import diffusers

    def needs_more(_):
        raise ImportError("\nit needs the scipy library\n")
    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "from_config", needs_more)
    status, _, error = run(capsys, "bag", "--scheduler", "lms", "--output-dir", tmp_path)
    assert status == 2 and "it needs the scipy library" in error


def test_a_reader_of_the_output_may_stop_early():
    with subprocess.Popen([sys.executable, "predict.py", "--list-classes"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


def test_any_folder_of_the_format_can_be_the_model(capsys, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    status, _, _ = run(capsys, "name 3", "--model", tmp_path / "model", "--steps", 2, "--output-dir", tmp_path / "out")
    assert status == 0 and Image.open(tmp_path / "out/class-3-seed42.png").size == (16, 16)


def test_a_damaged_model_gets_one_line(capsys, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, error = run(capsys, "name 3", "--model", tmp_path)
    assert status == 2 and str(tmp_path) in error
    for damaged in ("{", "[]", '{"id2label": {"a": "b"}}'):
        (tmp_path / "model_index.json").write_text(damaged)
        status, _, error = run(capsys, "name 3", "--model", tmp_path)
        assert status == 2 and str(tmp_path) in error


def test_help_answers_before_anything_heavy_is_imported():
    program = ("import sys, predict\ntry: predict.main(['--help'])\nexcept SystemExit: pass\n"
               "assert not {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "predict.py", "--help"], cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5
