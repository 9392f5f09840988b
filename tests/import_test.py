"""Importing is cheap: names come when asked for, and bring little beyond sbi's own."""

import subprocess
import sys
from importlib import import_module

import pytest

import sbi_slotflow

HEAVY = {
    "arviz",
    "arviz_base",
    "arviz_plots",
    "arviz_stats",
    "dynesty",
    "eryn",
    "h5netcdf",
    "h5py",
    "matplotlib",
    "numba",
    "pandas",
    "scipy",
    "sklearn",
    "torch",
    "xarray",
    "zarr",
}


def loaded(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_imports_nothing_heavy() -> None:
    found = loaded("import sbi_slotflow")
    assert "sbi_slotflow" in found
    assert not found & HEAVY


def test_all_names_bring_nothing_heavy_that_sbi_does_not_bring() -> None:
    found = loaded("from sbi_slotflow import *")
    assert {"torch", "sbi"} <= found
    assert not (found - loaded("import sbi.inference")) & HEAVY


def test_every_public_name_is_there_and_is_the_one_of_its_module() -> None:
    assert list(sbi_slotflow.__all__) == sorted(sbi_slotflow._HOMES)
    for name, home in sbi_slotflow._HOMES.items():
        value = getattr(sbi_slotflow, name)
        if home:
            module = import_module(f"sbi_slotflow.{home}")
            assert value is getattr(module, name)
        else:
            assert value is sys.modules[f"sbi_slotflow.{name}"]
        assert name in dir(sbi_slotflow)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'slotnn'"):
        sbi_slotflow.slotnn  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ImportError, match="cannot import name 'slotnn'"):
        from sbi_slotflow import slotnn  # noqa: F401  # pyright: ignore
