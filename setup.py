"""Installs the library `nets`, the commands `dit-predict`, `dit-sample`, `dit-evaluate`, `dit-train`, `dit-convert`."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

setup(
    name="dit-reference",
    version=re.search(r'__version__ = "(.+)"', (HERE / "nets/__init__.py").read_text()).group(1),
    description="Class-conditional Diffusion Transformers (DiT), faithful to diffusers",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The verbs stand at the root of the repository; installed, they are the package dit_verbs, model_data inside it.
    packages=["nets", "dit_verbs"],
    package_dir={"dit_verbs": "."},
    package_data={"dit_verbs": ["model_data/*.json", "model_data/*.md", "model_data/fashion-mnist-32/*.json",
                                "model_data/fashion-mnist-32/*/*", "model_data/fashion-mnist-classifier/*"]},
    install_requires=["torch>=2.6", "diffusers>=0.42,<0.43", "accelerate>=1.0", "safetensors>=0.4", "numpy>=1.26",
                      "pillow>=10"],
    extras_require={"eval": ["transformers>=5.23", "torchmetrics>=1.4"], "inception": ["torch-fidelity"],
                    "train": ["tensorboard", "matplotlib"], "speed": ["torchao>=0.18"]},
    entry_points={"console_scripts": ["dit-predict=dit_verbs.predict:main", "dit-convert=dit_verbs.convert:main",
                                      "dit-sample=dit_verbs.sample:main",
                                      "dit-evaluate=dit_verbs.evaluate:main", "dit-train=dit_verbs.train:main"]},
)
