import warnings

import pytest

from generation.generator import Generator
from synthbrain import generators
from synthbrain.errors import GeneratorError
from synthbrain.generators import GENERATORS, StandInWarning, identity, load_generator
from synthbrain.testing import TinyGenerator


@pytest.fixture(autouse=True)
def embedded(monkeypatch):
    """Only the tiny generator is embedded, and nobody has been warned."""
    monkeypatch.setattr(generators, "GENERATORS", {"tiny": TinyGenerator})
    monkeypatch.setattr(generators, "_warned", set())


def test_a_generator_is_loaded_by_its_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load_generator("tiny"), TinyGenerator)


def test_auto_takes_the_first_and_says_so_once():
    with pytest.warns(StandInWarning, match="not part of this release") as caught:
        assert isinstance(load_generator("auto"), TinyGenerator)
    assert "ask for 'tiny' by name" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_generator("auto")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(GeneratorError, match=r"unknown generator 'ukb'; expected auto, tiny"):
        load_generator("ukb")


def test_identity_is_name_and_digest():
    assert identity(TinyGenerator()) == "tiny-01234567"


def test_the_tiny_generator_is_one():
    assert isinstance(TinyGenerator(), Generator)


def test_the_phantom_is_embedded():
    assert "phantom" in GENERATORS
