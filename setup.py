from pathlib import Path

from setuptools import find_packages, setup

# the bit fields of AMD's instructions, for the emulator of tests/amd
AMD = ["tinygrad>=0.14,<0.15"]
# what flame.analyze --bits and flame.lm_eval need
EVAL = [
    "hqq>=0.2.8,<0.3",
    "lm_eval>=0.4.13,<0.5",
    # lm_eval's models of transformers import it without declaring it in the base
    "accelerate>=1.0,<1.16",
]

setup(
    name="softpick",
    version="0.1.0",
    description="Softpick attention: Triton kernels next to flash-linear-attention, and a trainer to study them",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # No fla/__init__.py, fla/ops/__init__.py or fla/ops/attn/__init__.py: those folders are upstream's
    # (fla-core), and ours only adds files to them.
    packages=[
        "fla.ops.attn",
        "fla.ops.attn.softpick",
        "fla.ops.attn.softpick.hopper",
        *find_packages(include=["flame", "flame.*"]),
    ],
    install_requires=[
        # no upper bound: pip would replace a newer torch, a ROCm build too, by an older CUDA build in silence;
        # flame/machine/versions.py warns instead
        "torch>=2.11",
        "fla-core==0.6.0",
        # imported by fla-core, not declared by it
        "packaging>=23.2,<27",
        "numpy>=2.0,<2.5",
        "transformers>=5.17,<5.25",
        "torchtitan==0.2.2",
        "datasets>=4.0,<5.3",
        "tensorboard>=2.17.1,<2.22",
        # what transformers and datasets bring, and flame imports too
        "huggingface_hub>=1.5,<3",
        "pyarrow>=21,<27",
        "safetensors>=0.8,<0.9",
        "tokenizers>=0.23.1,<0.24",
    ],
    extras_require={
        # a build of torch for the CPU brings no Triton
        "cpu": ["torch<2.15", "triton>=3.6,<3.10"],
        "eval": EVAL,
        # setuptools builds the wheel that tests/test_packaging.py installs, from 70.1 on without the package wheel
        "test": [
            "pytest>=8,<9.3",
            "pytest-xdist>=3.6.1,<3.9",
            "hypothesis>=6.100,<6.171",
            "ruff>=0.17,<0.18",
            # exactly one: every release finds something else
            "pyright>=1.1.414,<1.1.415",
            "setuptools>=70.1,<85",
            *EVAL,
            *AMD,
        ],
        "amd": AMD,
        "baselines": ["flash-linear-attention==0.6.0"],
        "dev": ["matplotlib>=3.8,<4", "build>=1.2,<2"],
    },
)
