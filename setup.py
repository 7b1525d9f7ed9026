"""Packaging of deltasam_fairseq; the pinned environment is made by ``scripts/setup.sh``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "deltasam_fairseq" / "__init__.py").read_text(), re.M
)
CONVERT = ["transformers", "tokenizers", "safetensors"]
REPORT = ["pandas", "scipy>=1.10", "matplotlib", "jinja2", "markdown"]

setup(
    name="deltasam_fairseq",
    version=VERSION.group(1) if VERSION else "0.0.0",
    description="Sharpness-aware fine-tuning (SAM, delta-SAM) for fairseq and plain PyTorch loops",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.8",
    packages=find_packages(include=["deltasam_fairseq", "deltasam_fairseq.*"]),
    package_data={"deltasam_fairseq": ["py.typed"]},
    # deltasam_fairseq.pytorch, for a plain PyTorch loop, needs no more.
    install_requires=["torch>=1.13", "numpy"],
    extras_require={
        # fairseq-train; scripts/setup.sh installs these in the order that fairseq needs
        "fairseq": [
            "scipy",
            "scikit-learn",
            "sentencepiece",
            "tensorboard",
            # fairseq 0.12.2 cannot be imported on Python 3.11 and later; fairseq-fixed can.
            'fairseq-fixed==0.12.3.1; python_version>="3.11"',
            'fairseq==0.12.2; python_version<"3.11"',
        ],
        "test": ["pytest", "pytest-xdist", "ruff", "mypy", "fairscale", "accelerate", "peft"]
        + ['hydra-submitit-launcher; python_version>="3.11"', *CONVERT, *REPORT],
        # python -m deltasam_fairseq.convert; --bpe wordpiece needs tokenizers alone
        "convert": CONVERT,
        # examples.glue.report, and the curves of the benchmark
        "report": REPORT,
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
