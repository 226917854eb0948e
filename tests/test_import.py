import pytest

import synthbrain

HEAVY = ("torch", "monai", "pandas", "pydantic", "nilearn", "zarr", "scipy", "matplotlib")


def test_importing_is_light(python):
    loaded = python("import sys, synthbrain, synthbrain.errors; print(*sys.modules)").split()
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)


def test_importing_creates_nothing(python, tmp_path):
    python("import synthbrain; synthbrain.SynthBrainDataset", HOME=str(tmp_path / "user"))
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "user").exists()


def test_public_names_resolve_and_are_listed():
    for name in synthbrain.__all__:
        assert getattr(synthbrain, name).__name__ == name
    assert set(synthbrain.__all__) <= set(dir(synthbrain))
    assert sorted(synthbrain.__all__) == list(synthbrain.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'synthbrain' has no attribute 'nope'"):
        synthbrain.nope  # noqa: B018
    assert not hasattr(synthbrain, "nope")


def test_the_generation_package_never_imports_synthbrain(python):
    loaded = python(
        """
        import importlib, pkgutil, sys
        import generation
        for module in pkgutil.walk_packages(generation.__path__, "generation."):
            importlib.import_module(module.name)
        print(*sys.modules)
        """
    ).split()
    assert "generation.covariates" in loaded
    assert "synthbrain" not in loaded


def test_the_version_is_there():
    assert synthbrain.__version__[0].isdigit()
