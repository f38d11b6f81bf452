"""Features of pictures, in which two sets are compared: of an image classifier or DINOv2 of transformers, or Inception's.

Frechet distances in DINOv2's features agree with people better than those in Inception's: Stein et al. 2023,
"Exposing flaws of generative model evaluation metrics" (arXiv 2306.04675).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from nets.loading import find_folder, fingerprint, write_tensors
from nets.picture_sets import PictureSet, npz_names, open_pictures

INCEPTION = "inception"


class FeatureExtractor(torch.nn.Module):
    """A network of the transformers library: uint8 pictures -> features, and logits if it is a classifier.

    Features of a classifier are what enters its last linear layer; those of DINOv2 its class token.
    `mark` tells networks and preprocessing apart; `id2label` is a classifier's. Pictures are prepared as the folder's
    `preprocessor_config.json` says, by Pillow, so that they are the same on every machine; but a picture is scaled whole to
    DINOv2's size, not cut, as Stein et al. do. Raises OSError or ValueError, in one line, where that cannot be loaded.
    """

    def __init__(self, folder_or_id: str | Path, device: str = "cpu"):
        super().__init__()
        self.name, self.device = Path(folder_or_id).name, torch.device(device)
        self.processor, self.network = load_network(find_folder(folder_or_id, files=["*.json", "*.safetensors"]))
        self.id2label = None
        if type(self.network).__name__.endswith("ForImageClassification"):
            self.id2label = dict(self.network.config.id2label)
            head = [part for part in self.network.modules() if isinstance(part, torch.nn.Linear)][-1]
            head.register_forward_pre_hook(lambda _, inputs: setattr(self, "features", inputs[0]))
        elif not self.network.config.model_type.startswith("dinov2"):
            raise ValueError(f"{folder_or_id} is a {type(self.network).__name__}; features are those of image classifiers "
                             "and of DINOv2")
        crop = getattr(self.processor, "crop_size", None)
        self.options = {} if self.id2label or not crop else {"size": dict(crop), "do_center_crop": False}
        preprocessing = json.dumps({**self.processor.to_dict(), **self.options}, sort_keys=True)
        self.mark = f"{fingerprint(self.network)} {preprocessing}"
        self.network.to(self.device).eval()

    @torch.inference_mode()
    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, 3, height, width) uint8 -> features (batch, dim), logits (batch, classes) or None; float32 on the CPU."""
        pixels = self.processor(pictures, return_tensors="pt", **self.options)["pixel_values"].to(self.device)
        output = self.network(pixels)
        if self.id2label:
            return self.features.flatten(1).float().cpu(), output.logits.float().cpu()
        return output.pooler_output.float().cpu(), None  # the class token


def load_network(folder: Path):
    """A folder's image processor and network, an image classifier if it is one."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        is_classifier = any(name.endswith("ForImageClassification") for name in config.architectures or ())
        network_class = transformers.AutoModelForImageClassification if is_classifier else transformers.AutoModel
        network, info = network_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # safetensors' errors have no common class but this
        line = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"cannot load the feature network {folder}: {line[0]}; name a folder that transformers' "
                      "save_pretrained wrote, or its hub id") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{folder}: these are not all the weights of a {type(network).__name__}; missing: "
                         f"{', '.join(sorted(map(str, info['missing_keys'] or info['mismatched_keys']))[:3])}")
    return processor, network


class InceptionFeatures(torch.nn.Module):
    """Inception-v3 as FID has it, of the package torch-fidelity: 2048 features and 1008 logits, at 299x299.

    Raises ImportError, in one line, where that package, which needs torchvision, is missing.
    """

    name, id2label = INCEPTION, None
    mark = "torch-fidelity inception-v3-compat 2048 logits_unbiased"

    def __init__(self, device: str = "cpu"):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception features need torch-fidelity, which needs torchvision: pip install "
                              f"torch-fidelity; or take other features ({error})") from error
        self.device = torch.device(device)
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch-fidelity itself would let the file run code
        self.network = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"]).to(self.device).eval()

    @torch.inference_mode()
    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, 3, height, width) uint8 -> features (batch, 2048) and logits (batch, 1008), float32, on the CPU."""
        features, logits = self.network(pictures.to(self.device))
        return features.flatten(1).cpu(), logits.cpu()


@dataclass
class Features:
    """What a network says of a set of pictures: features (n, dim) and logits (n, classes), float32.

    `labels` (n,) are class ids of the set's own `class_names`. Of published statistics there is only the `mean` (dim,) and
    the `covariance` (dim, dim), float64.
    """

    name: str
    mean: torch.Tensor
    covariance: torch.Tensor
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    class_names: dict[int, str] | None = None

    def __len__(self) -> int:
        return 0 if self.features is None else len(self.features)


def make_features(name, features, logits=None, labels=None, class_names=None) -> Features:
    """`Features` with mean and covariance computed in float64."""
    exact = features.double()
    return Features(name, exact.mean(0), exact.T.cov(), features, logits, labels, class_names)


def extract(extractor, pictures: PictureSet, size: tuple[int, int], progress=iter, batch_size: int = 100) -> Features:
    """Features of all pictures at `size` (width, height). `progress` wraps a list of batches' starts, as `tqdm` does.

    Raises ValueError, in one line, where a GPU's memory is not enough.
    """
    try:
        batches = [extractor(pictures.pixels(range(start, min(start + batch_size, pictures.count)), size))
                   for start in progress(range(0, pictures.count, batch_size))]
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{extractor.device} has too little free memory for {batch_size} pictures at a time in "
                         f"{extractor.name}; take another device") from error
    features, logits = zip(*batches)
    logits = None if logits[0] is None else torch.cat(logits)
    return make_features(pictures.name, torch.cat(features), logits, pictures.labels, pictures.class_names)


def take(features: Features, chosen: torch.Tensor) -> Features:
    """The features of some pictures, `chosen` by number or by a mask."""
    logits, labels = (None if tensor is None else tensor[chosen] for tensor in (features.logits, features.labels))
    return make_features(features.name, features.features[chosen], logits, labels, features.class_names)


def reference_features(path: Path, extractor, size: tuple[int, int], split: str = "test",
                       progress=iter) -> tuple[Features, PictureSet | None, str]:
    """Features of what `path` names: pictures, the file in which their features were kept, or published statistics.

    What is computed is kept beside the data and read from there while pictures, network and size are the same; where an
    npz brings Inception's mean and covariance, as ADM's do, these are taken. Returns the features, the pictures if there
    are any, and how the features were had. Raises OSError or ValueError, in one line.
    """
    mark = {"network": extractor.mark, "size": f"{size[0]}x{size[1]}"}
    if path.suffix == ".safetensors":
        features, found = load_features(path)
        other = [key for key in mark if mark[key] != found.get(key)]
        if other:
            raise ValueError(f"{path} holds features of another {' and '.join(other)}; name the pictures instead")
        return features, None, "kept features"
    published = load_statistics(path) if path.suffix == ".npz" else None
    if published is not None and "arr_0" not in npz_names(path):
        if extractor.name != INCEPTION:
            raise ValueError(f"{path} has statistics only, without saying of which features; they are taken for "
                             f"{INCEPTION}'s, and these are {extractor.name}'s")
        return published, None, "published statistics"
    pictures = open_pictures(path, split)
    mark["pictures"] = pictures.mark
    name = f"{path.resolve().name}.{split}.{extractor.name}-{mark['size']}.safetensors"
    kept = path.resolve().with_name(name)
    features, how = None, f"computed, kept in {kept}"
    if kept.is_file():
        try:
            features, found = load_features(kept)
        except ValueError:  # damaged
            found = None
        if found == mark:
            how = f"kept in {kept}"
        else:
            features, how = None, f"computed again, since pictures, network or size have changed, and kept in {kept}"
    if features is None:
        features = extract(extractor, pictures, size, progress=progress)
        try:
            save_features(kept, features, mark)
        except OSError as error:
            how = f"computed, and not kept: {error}"
    if pictures.picture(0).size != size:
        how += f"; scaled from {'x'.join(map(str, pictures.picture(0).size))}"
    if published is not None and extractor.name == INCEPTION:
        features.mean, features.covariance = published.mean, published.covariance
        how += "; mean and covariance as published"
    return features, pictures, how


def save_features(path: Path, features: Features, mark: dict[str, str]):
    """Write features and what they were made of, `mark`; the file appears whole or not at all. Raises OSError."""
    tensors = {name: tensor.contiguous() for name, tensor in vars(features).items() if isinstance(tensor, torch.Tensor)}
    write_tensors(path, tensors, {**mark, "name": features.name, "class_names": json.dumps(features.class_names)})


def load_features(path: Path) -> tuple[Features, dict[str, str]]:
    """What `save_features` wrote: the features, and their mark. Raises OSError or ValueError, in one line."""
    try:
        with safe_open(path, "pt") as file:
            mark = file.metadata() or {}
            names = json.loads(mark.pop("class_names"))
            return Features(mark.pop("name"), class_names=names and {int(label): name for label, name in names.items()},
                            **{name: file.get_tensor(name) for name in file.keys()}), mark  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # safetensors' own errors have no common class but this
        raise ValueError(f"{path} holds no features that evaluate.py saved ({str(error).splitlines()[0]})") from error


def load_statistics(path: Path) -> Features | None:
    """`mu` and `sigma` of an npz, as ADM's reference files and pytorch-fid's have them; None if it has none."""
    if not {"mu", "sigma"} <= set(npz_names(path)):
        return None
    with np.load(path) as archive:
        mean, covariance = (torch.from_numpy(archive[name]).double() for name in ("mu", "sigma"))
    if covariance.shape != (*mean.shape, *mean.shape):
        raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not belong together")
    return Features(str(path), mean, covariance)
