import threading
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import Noise, Picky, Starved

from generation.covariates import NAMES
from synthbrain.sampling.maker import Maker
from synthbrain.testing import tiny_manifest


class Loads:
    """A spec of a generator that is there already."""

    name, device = "noise", None

    def __init__(self, generator):
        self.generator = generator

    def load(self):
        return self.generator


@pytest.fixture
def rows():
    return rows_of(tiny_manifest(12))


def rows_of(manifest):
    table = manifest.table
    columns = [table[name] for name in (*NAMES, "seed")]
    return list(zip(table.index, *(column.tolist() for column in columns), strict=True))


def started(generator, batch=None, *, orders=()):
    """A maker at work, with rows that were there before it."""
    maker = Maker(Loads(generator), batch)
    submitted = [maker.submit("sample", rows) for rows in orders]
    threading.Thread(target=maker.run, daemon=True).start()
    return maker, submitted


def seeds_of(log):
    return [[int(seed) for seed in line.split()] for line in log.read_text().splitlines()]


def test_rows_of_several_clients_are_made_in_batches_the_generator_likes(rows, tmp_path):
    maker, orders = started(Noise(tmp_path / "log"), orders=[[row] for row in rows])
    assert all(maker.collected(order, 10) for order in orders)
    assert list(map(len, seeds_of(tmp_path / "log"))) == [4, 4, 4]
    assert maker.made == 12


def test_a_batch_can_be_larger_or_smaller_than_the_generator_likes(rows, tmp_path):
    maker, (orders,) = started(Noise(tmp_path / "log"), 5, orders=[rows])
    assert maker.collected(orders, 10)
    assert list(map(len, seeds_of(tmp_path / "log"))) == [5, 5, 2]
    assert maker.facts.batch_size == 5


def test_rows_asked_for_twice_are_made_once_and_everybody_gets_them(rows, tmp_path):
    asked = [rows[:6], rows[3:9], rows[3:6] * 2]
    maker, orders = started(Noise(tmp_path / "log"), orders=asked)
    for wanted, given_ in zip(asked, orders, strict=True):
        assert maker.collected(given_, 10)
        assert [order.of for order in given_] == wanted
    assert Counter(chain(*seeds_of(tmp_path / "log"))) == Counter(row[-1] for row in rows[:9])


def test_the_same_seed_with_other_covariates_is_another_row(rows, tmp_path):
    id, _, *others = rows[0]
    maker, (orders,) = started(
        Noise(tmp_path / "log"), orders=[[(id, 0.0, *others), (id, 1.0, *others)]]
    )
    assert maker.collected(orders, 10)
    assert not np.array_equal(orders[0].values, orders[1].values)


def test_rows_nobody_waits_for_any_more_are_not_made(rows, tmp_path):
    maker = Maker(Loads(Noise(tmp_path / "log")))
    left, kept = maker.submit("sample", rows[:8]), maker.submit("sample", rows[6:10])
    maker.forget(left)
    assert maker.queued == 4
    threading.Thread(target=maker.run, daemon=True).start()
    assert maker.collected(kept, 10)
    assert sorted(chain(*seeds_of(tmp_path / "log"))) == sorted(row[-1] for row in rows[6:10])


def test_out_of_memory_halves_the_batch_for_good_and_loses_nothing(rows, tmp_path):
    maker, (orders,) = started(Starved(3, log=tmp_path / "log", batch_size=8), orders=[rows])
    assert maker.collected(orders, 10)
    assert not any(order.error for order in orders)
    assert maker.batch == 2
    assert {len(made) for made in seeds_of(tmp_path / "log")} == {2}


def test_out_of_memory_with_a_single_row_is_an_error(rows):
    maker, (orders,) = started(Starved(0), orders=[rows[:2]])
    assert maker.collected(orders, 10)
    assert all("out of memory" in str(order.error) for order in orders)
    assert maker.batch == 1


def test_a_row_the_generator_refuses_spoils_no_other(rows):
    seeds = [row[-1] for row in rows]
    maker, (orders,) = started(Picky([seeds[2], seeds[7]]), 12, orders=[rows])
    assert maker.collected(orders, 10)
    assert [order.error is not None for order in orders] == [i in (2, 7) for i in range(12)]
    assert maker.batch == 12


def test_a_device_that_is_lost_ends_the_maker_rather_than_fail_every_row(rows):
    class Lost(Noise):
        def sample(self, rows):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    maker = Maker(Loads(Lost()))
    orders = maker.submit("sample", rows[:2])
    with pytest.raises(RuntimeError, match="CUDA error"):
        maker.run()
    assert not any(order.done for order in orders)


def test_volumes_of_another_shape_are_refused(rows):
    class Flat(Noise):
        def sample(self, rows):
            return super().sample(rows)[..., 0]

    maker, (orders,) = started(Flat(), orders=[rows[:1]])
    assert maker.collected(orders, 10)
    assert "gave an array of shape (1, 1, 16, 24)" in str(orders[0].error)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 11), max_size=6), max_size=6), st.integers(1, 5))
def test_whoever_asks_for_whatever_gets_what_the_generator_makes(asked, batch):
    manifest = tiny_manifest(12)
    everything, plain = rows_of(manifest), Noise().sample(manifest.table).numpy()
    maker, orders = started(
        Noise(), batch, orders=[[everything[i] for i in indices] for indices in asked]
    )
    for indices, given_ in zip(asked, orders, strict=True):
        assert maker.collected(given_, 10)
        for index, order in zip(indices, given_, strict=True):
            assert np.array_equal(order.values, plain[index])
    assert maker.made == len({index for indices in asked for index in indices})
    for given_ in orders:
        maker.forget(given_)
    assert not maker._orders
    assert not maker.queued
