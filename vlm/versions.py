"""Versions of the packages that decide a result."""

from importlib.metadata import version

PACKAGES = ("torch", "transformers", "peft", "lightning", "timm", "webdataset", "vlm-recipes")


def versions() -> dict[str, str]:
    """The installed version of each."""
    return {package: version(package) for package in PACKAGES}
