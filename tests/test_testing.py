"""The contract tests can fail: each broken promise is noticed, and named."""

import re

import numpy as np
import pytest
import torch

from synthbrain.sources.base import Cost
from synthbrain.store import Store
from synthbrain.testing import (
    TINY,
    TinyGenerator,
    TinyLatentGenerator,
    check_generator,
    check_source,
    check_store,
    tiny_manifest,
)


def broken(base, **members):
    return type("Broken", (base,), members)


def altered(change):
    """A tiny generator whose output goes through ``change``."""
    return broken(TinyGenerator, sample=lambda self, rows: change(TinyGenerator.sample(self, rows)))


def test_a_sound_generator_passes():
    check_generator(TinyGenerator())
    check_generator(TinyGenerator((8, 8, 8), batch_size=1))


@pytest.mark.parametrize(
    ("generator", "says"),
    [
        (altered(lambda x: x[:, 0]), "shape (3, 16, 24, 16)"),
        (altered(lambda x: x[:-1]), "shape (2, 1, 16, 24, 16)"),
        (altered(torch.Tensor.double), "type torch.float64"),
        (altered(lambda x: x * float("nan")), "not all finite"),
        (altered(lambda x: x - 0.5), "is below 0"),
        (altered(lambda x: x + 0.5), "is above 1"),
        (altered(lambda x: x / (1 + len(x))), "differs by"),
        (altered(lambda x: (x + torch.rand_like(x)) / 2), "differs by"),
        (altered(lambda x: x.mean(0, keepdim=True).expand_as(x)), "differs by"),
        (altered(lambda x: x * 0), "another seed gives the same volume"),
        (broken(TinyGenerator, digest="abc"), "fewer than 8 digits"),
        (broken(TinyGenerator, digest="not hex digits"), "not hexadecimal"),
        (broken(TinyGenerator, name=""), "name"),
        (broken(TinyGenerator, name="a/b"), "name"),
        (broken(TinyGenerator, honours=frozenset({"age", "weight"})), "honours"),
        (broken(TinyGenerator, seconds_per_volume=0.0), "seconds_per_volume"),
    ],
)
def test_a_generator_that_breaks_a_promise_is_caught(generator, says):
    with pytest.raises(AssertionError, match=re.escape(says)):
        check_generator(generator())


def test_a_sound_latent_generator_passes():
    check_generator(TinyLatentGenerator())
    check_generator(TinyLatentGenerator((8, 8, 8), batch_size=1))


def other_latents(change):
    """A tiny latent generator that gives other latents than it decodes."""
    return broken(
        TinyLatentGenerator,
        sample=lambda self, rows: DECODE(self, DRAW(self, rows)),
        sample_latents=lambda self, rows: change(DRAW(self, rows)),
    )


def other_volumes(change):
    """A tiny latent generator that decodes into other volumes than it samples."""
    return broken(
        TinyLatentGenerator,
        sample=lambda self, rows: DECODE(self, DRAW(self, rows)),
        decode=lambda self, latents: change(DECODE(self, latents)),
    )


def sensitive(self, latents):
    return DECODE(self, latents) if latents.dtype == torch.float32 else DECODE(self, latents + 1)


DRAW, DECODE = TinyLatentGenerator.sample_latents, TinyLatentGenerator.decode


@pytest.mark.parametrize(
    ("generator", "says"),
    [
        (other_latents(lambda x: x[:, :2]), "latents of shape (3, 2, 2, 3, 2), expected (3, 3,"),
        (other_latents(torch.Tensor.double), "latents of type torch.float64"),
        (other_latents(lambda x: torch.cat((x[:, :1] / 0, x[:, 1:]), 1)), "not all finite"),
        (other_latents(lambda x: torch.cat((x[:, :2], x[:, 2:] - 1e5), 1)), "do not fit float16"),
        (other_latents(lambda x: x * 3 / (2 + len(x))), "the latent of row 1 differs by"),
        (other_volumes(lambda x: x[:, 0]), "decode() gives shape (3, 16, 24, 16)"),
        (other_volumes(torch.Tensor.double), "decode() gives torch.float64"),
        (other_volumes(lambda x: x - 1), "decode() gives -0."),
        (other_volumes(lambda x: x + 1), "above 1"),
        (other_volumes(lambda x: 1 - x), "off sample(rows)"),
        (broken(TinyLatentGenerator, decode=sensitive), "decoded from float16"),
    ],
)
def test_a_latent_generator_that_breaks_a_promise_is_caught(generator, says):
    with pytest.raises(AssertionError, match=re.escape(says)):
        check_generator(generator())


def test_a_latent_shape_of_three_axes_is_caught():
    generator = TinyLatentGenerator()
    generator.latent_shape = (3, 2, 3)
    generator.sample_latents = lambda rows: DRAW(TinyLatentGenerator(), rows)
    generator.decode = lambda latents: DECODE(TinyLatentGenerator(), latents)
    with pytest.raises(AssertionError, match=re.escape("latent_shape (3, 2, 3), expected (chan")):
        check_generator(generator)


def test_a_generator_that_takes_no_rows_is_caught():
    generator = TinyGenerator(batch_size=0)
    with pytest.raises(AssertionError, match="batch_size"):
        check_generator(generator)


class ListSource:
    name, made_by = "shelf", "published"
    ids = ("a", "b", "c")

    def holds(self, ids):
        return np.array([id in self.ids for id in ids], dtype=bool)

    def cost(self, ids):
        return Cost(bytes=10 * len(ids), seconds=1.0)

    def fetch(self, ids, geometry):
        for id in ids:
            if id in self.ids:
                yield id, np.zeros(geometry.shape, geometry.dtype)


def test_a_sound_source_passes():
    check_source(ListSource(), ["a", "b"], TINY)


def always(value):
    return lambda self, *_: value


def giving(volume, ids=("a", "b")):
    def fetch(self, asked, geometry):
        yield from ((id, volume) for id in ids)

    return fetch


BLACK = np.zeros(TINY.shape, np.uint8)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"holds": always(np.array([True, False, False]))}, "holds() gives [True, False, False]"),
        ({"holds": always(np.array([1, 1, 0]))}, "expected bool"),
        ({"holds": always([True, True, False])}, "expected a bool array"),
        ({"cost": always(Cost(bytes=0, seconds=1.0))}, "no bytes"),
        ({"cost": always(Cost(bytes=1, seconds=0.0))}, "no seconds"),
        ({"fetch": giving(BLACK, ["a"])}, "fetch() gave ['a']"),
        ({"fetch": giving(BLACK, ["a", "a", "b"])}, "fetch() gave ['a', 'a', 'b']"),
        ({"fetch": giving(BLACK[:-1])}, "a has shape"),
        ({"fetch": giving(BLACK.astype(float))}, "a has type float64"),
        ({"fetch": always([("a", BLACK), ("b", BLACK)])}, "must be a generator"),
    ],
)
def test_a_source_that_breaks_a_promise_is_caught(members, says):
    with pytest.raises(AssertionError, match=re.escape(says)):
        check_source(broken(ListSource, **members)(), ["a", "b"], TINY)


def overwriting(self, position, volume):
    self.path(position).unlink(missing_ok=True)
    return Store.write(self, position, volume)


def dropping_black(self, position, volume):
    return Store.write(self, position, volume) if volume.any() else not self.has(position)


def unchecked(self, position):
    return self.path(position).exists()


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"has": always(True)}, "an empty store has a volume"),
        ({"write": always(False)}, "somebody else was first"),
        ({"write": overwriting}, "replaced a sound volume"),
        ({"write": dropping_black}, "counts as missing"),
        ({"read": lambda self, p, **_: Store.read(self, p) ^ 1}, "came back changed"),
        ({"stored": always(np.array([True, True, True]))}, "stored()"),
        ({"read_patch": lambda self, p, s, n: Store.read_patch(self, p, s, n)[::-1]}, "a patch"),
        ({"has": unchecked}, "cut short counts as present"),
        ({"verify": lambda self: iter([(5, None)])}, "verify() names 0 volumes"),
        ({"quarantine": always(None)}, "quarantined volume counts as present"),
    ],
)
def test_a_store_that_breaks_a_promise_is_caught(tmp_path, members, says):
    with pytest.raises(AssertionError, match=re.escape(says)):
        check_store(broken(Store, **members)(tmp_path, TINY))


def test_tiny_manifests_are_reproducible_and_distinct():
    assert tiny_manifest(5).table.equals(tiny_manifest(5).table)
    assert not tiny_manifest(5).table.equals(tiny_manifest(5, seed=1).table)
    assert len(tiny_manifest(7, name="other").select(ids=["other000006"])) == 1
