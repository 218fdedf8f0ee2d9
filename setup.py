"""Where the packages lie; everything else is in pyproject.toml.

`kernels/` is a source root and not a package: a top-level package of that name would shadow Hugging Face's `kernels`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vllm_buddy", "vllm_buddy.*"]), *find_packages("kernels")],
    package_dir={"vllm_buddy_kernels": "kernels/vllm_buddy_kernels"},
)
