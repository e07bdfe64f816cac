"""Maps envs/, agents/ and configs/ into the unified_rl namespace; the list of packages is computed, never kept."""

from setuptools import find_packages, setup

MAPPED = ("envs", "agents", "configs")

packages = find_packages(include=["unified_rl", "unified_rl.*"])
for root in MAPPED:
    packages.append(f"unified_rl.{root}")
    packages += [f"unified_rl.{root}.{name}" for name in find_packages(root)]

setup(
    packages=packages,
    package_dir={"unified_rl": "unified_rl", **{f"unified_rl.{root}": root for root in MAPPED}},
    package_data={
        "unified_rl": ["py.typed"],
        "unified_rl.configs": ["*.yaml", "*/*.yaml"],
        "unified_rl.study.gallery": ["*.yaml"],
    },
)
