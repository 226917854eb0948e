import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from generation import weights
from generation.generator import Generator
from generation.latent import LatentDiffusion
from generation.pixel import PixelDiffusion
from generation.presets import load_preset
from generation.testing import RandomWeights, narrow, random_network
from synthbrain import Manifest, SynthBrainDataset, generators
from synthbrain.errors import GeneratorError
from synthbrain.generators import (
    GENERATORS,
    StandInWarning,
    geometry_of,
    identity,
    load_generator,
)
from synthbrain.header import Geometry
from synthbrain.testing import TinyGenerator, tiny_manifest


@pytest.fixture(autouse=True)
def embedded(monkeypatch, tmp_path):
    """Only the tiny generator is embedded, no weights are here, and nobody has been warned."""
    monkeypatch.setenv("SYNTHBRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(generators, "GENERATORS", {"tiny": TinyGenerator})
    monkeypatch.setattr(generators, "_warned", set())


def test_a_generator_is_loaded_by_its_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load_generator("tiny"), TinyGenerator)


def test_auto_takes_the_first_and_says_so_once():
    with pytest.warns(StandInWarning, match="synthbrain weights pull ukb-ldm") as caught:
        assert isinstance(load_generator("auto"), TinyGenerator)
    assert "ask for 'tiny' by name" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_generator("auto")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        GeneratorError, match=r"unknown generator 'ukb'; expected one of auto, tiny, ukb-ldm"
    ):
        load_generator("ukb")


def test_identity_is_name_and_digest():
    assert identity(TinyGenerator()) == "tiny-01234567"


def test_the_tiny_generator_is_one():
    assert isinstance(TinyGenerator(), Generator)


def test_the_phantom_is_embedded():
    assert "phantom" in GENERATORS


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Narrow random weights under a published name."""
    monkeypatch.setattr(weights, "load_preset", narrow)
    for name, preset in (("ukb-ldm", "ukb-ldm"), ("medforj-flow", "medforj")):
        files = {}
        for network in narrow(preset).networks:
            files[network] = tmp_path / f"{network}.pt"
            torch.save(random_network(narrow(preset), network).state_dict(), files[network])
        weights.add(name, files, tmp_path / "weights", preset=preset)


@pytest.mark.usefixtures("installed")
class TestWeights:
    def test_auto_prefers_the_published_model_without_a_word(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(load_generator("auto"), LatentDiffusion)

    def test_sampling_is_passed_on(self):
        generator = load_generator("ukb-ldm", solver="ddim", steps=7, decode="slabs")
        assert (generator.options.solver, generator.options.steps) == ("ddim", 7)
        assert generator.decode_mode == "slabs"
        assert isinstance(load_generator("medforj-flow", steps=3), PixelDiffusion)

    @pytest.mark.parametrize(
        ("sampling", "message"),
        [
            ({"solver": "plms"}, "solver must be one of"),
            ({"steps": 5000}, "between 1 and 1000"),
            ({"sampler": "x"}, "unexpected keyword argument 'sampler'"),
        ],
    )
    def test_what_it_cannot_do_is_told(self, sampling, message):
        with pytest.raises(GeneratorError, match=f"ukb-ldm cannot sample like this.*{message}"):
            load_generator("ukb-ldm", **sampling)

    def test_an_unconditional_one_is_refused_for_rows_that_ask(self, tmp_path):
        generator = load_generator("medforj-flow")
        manifest = tiny_manifest(2)
        geometry = geometry_of(generator)
        conditional = manifest.header.model_copy(update={"geometry": geometry})
        unconditional = conditional.model_copy(update={"conditional": False})
        with pytest.raises(GeneratorError, match="ignores age, brain_volume"):
            SynthBrainDataset(
                Manifest.create(conditional, manifest.table), generator=generator, store=tmp_path
            )
        ds = SynthBrainDataset(
            Manifest.create(unconditional, manifest.table), generator=generator, store=tmp_path
        )
        assert ds[0]["image"].shape == (1, 16, 16, 16)

    def test_a_cohort_is_streamed_end_to_end(self, tmp_path):
        generator = load_generator("ukb-ldm", steps=2)
        manifest = tiny_manifest(5)
        header = manifest.header.model_copy(update={"geometry": geometry_of(generator)})
        ds = SynthBrainDataset(
            Manifest.create(header, manifest.table), generator=generator, store=tmp_path / "store"
        )
        seen = [name for batch in DataLoader(ds, batch_size=2) for name in batch["made_by"]]
        assert seen == [identity(generator)] * 5
        assert ds.missing() == []


def test_missing_weights_say_how_to_get_them():
    with pytest.raises(GeneratorError, match="`synthbrain weights pull medforj-flow`"):
        load_generator("medforj-flow")


def test_embedded_generators_take_no_sampling():
    with pytest.raises(GeneratorError, match="'tiny' takes no solver, steps"):
        load_generator("tiny", steps=3, solver="ddim")


def test_geometry_follows_the_generator():
    assert geometry_of(TinyGenerator((160, 224, 160))) == Geometry()
    medforj = PixelDiffusion(RandomWeights(load_preset("medforj")))
    found = geometry_of(medforj)
    assert (found.shape, found.chunks) == ((192, 224, 192), (96, 112, 96))
    assert found.orientation == "LPS"
    assert geometry_of(LatentDiffusion(RandomWeights(load_preset("ukb-ldm")))) == Geometry()


@pytest.mark.parametrize(
    ("name", "sampling", "says"),
    [
        ("synthbrain.testing:TinyGenerator", {"steps": 5}, "cannot be called with steps: got an"),
        ("synthbrain.testing:check_store", {}, "cannot be called without arguments: missing"),
        ("os:sep", {}, "is not a callable object"),
        (".testing:TinyGenerator", {}, "expected 'package.module:callable'"),
        ("synthbrain.testing:Nothing", {}, "expected 'package.module:callable'"),
    ],
)
def test_what_is_imported_must_make_a_generator(name, sampling, says):
    with pytest.raises(GeneratorError, match=says):
        load_generator(name, **sampling)
    assert load_generator("synthbrain.testing:TinyGenerator", batch_size=3).batch_size == 3
