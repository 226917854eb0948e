import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from generation.errors import EvaluationError
from generation.evaluate.extraction import extract, read, volume_digest
from generation.evaluate.networks import digest_of

SHAPE = (6, 8, 6)


class Moments:
    """A feature network of five numbers a volume that counts what it is given."""

    name, size, pretrained = "moments", 5, True

    def __init__(self, variant="a"):
        self.digest = digest_of("moments", variant, {})
        self.batches = []

    def features(self, volumes):
        self.batches.append(len(volumes))
        flat = volumes.flatten(1)
        return torch.stack([(flat ** (p + 1)).mean(dim=1) for p in range(self.size)], dim=1)


class Volumes(list):
    """Remembers which were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def __getitem__(self, index):
        self.seen.append(index)
        return super().__getitem__(index)


def noise(seed, shape=(1, *SHAPE)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def some(n):
    return Volumes(noise(seed) for seed in range(n)), [f"row-{i}" for i in range(n)]


def kept(folder, network):
    return sorted((folder / network.digest).glob("*.features"))


@pytest.fixture
def network():
    return Moments()


class TestExtract:
    def test_gives_what_the_network_gives_in_the_order_asked(self, network, tmp_path):
        volumes, names = some(7)
        assert list(extract(volumes, names, network, tmp_path, batch=3)) == list(range(7))
        found = read(names[::-1], network, tmp_path)
        assert (found.shape, found.dtype) == ((7, 5), np.float32)
        expected = Moments().features(torch.stack(list(volumes)))
        np.testing.assert_allclose(found[::-1], expected.numpy(), rtol=1e-6)
        assert network.batches == [3, 3, 1]

    def test_one_pass_one_file(self, network, tmp_path):
        volumes, names = some(5)
        list(extract(volumes, names, network, tmp_path, batch=2))
        assert volumes.seen == [0, 1, 2, 3, 4]
        assert len(kept(tmp_path, network)) == 1

    def test_what_is_kept_is_not_looked_at_again(self, network, tmp_path):
        volumes, names = some(5)
        list(extract(volumes, names, network, tmp_path))
        again = Volumes(volumes)
        assert list(extract(again, names, network, tmp_path)) == [0, 1, 2, 3, 4]
        assert again.seen == []
        assert len(kept(tmp_path, network)) == 1

    def test_stopping_early_loses_nothing_that_was_yielded(self, network, tmp_path):
        volumes, names = some(6)
        going = extract(volumes, names, network, tmp_path, batch=2)
        done = [next(going) for _ in range(3)]
        going.close()
        assert read([names[i] for i in done], network, tmp_path).shape == (3, 5)
        rest = Volumes(volumes)
        list(extract(rest, names, network, tmp_path, batch=2))
        assert rest.seen == [4, 5]

    def test_networks_do_not_mix(self, network, tmp_path):
        volumes, names = some(2)
        list(extract(volumes, names, network, tmp_path))
        with pytest.raises(EvaluationError, match=r"lacks moments features of 2 of 2.*'row-0'"):
            read(names, Moments("b"), tmp_path)

    def test_a_folder_says_whose_features_it_holds(self, network, tmp_path):
        list(extract(*some(1), network, tmp_path))
        text = (tmp_path / network.digest / "network.json").read_text()
        assert '"name": "moments"' in text
        assert '"pretrained": true' in text

    def test_a_name_twice_is_computed_once(self, network, tmp_path):
        volume = noise(0)
        assert sorted(extract([volume] * 3, ["a", "b", "a"], network, tmp_path, batch=2)) == [
            0,
            1,
            2,
        ]
        assert network.batches == [2]

    def test_batches_make_no_difference(self, network, tmp_path):
        volumes, names = some(7)
        rows = []
        for batch in (1, 3, 10):
            list(extract(volumes, names, network, tmp_path / str(batch), batch=batch))
            rows.append(read(names, network, tmp_path / str(batch)))
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-6)
        np.testing.assert_allclose(rows[0], rows[2], rtol=1e-6)

    def test_arrays_without_a_channel_do_as_well(self, network, tmp_path):
        volume = noise(0)
        list(extract([volume, volume[0].numpy()], ["a", "b"], network, tmp_path))
        assert np.ptp(read(["a", "b"], network, tmp_path), axis=0).max() == 0

    def test_no_volumes_are_no_features(self, network, tmp_path):
        assert list(extract([], [], network, tmp_path)) == []
        assert read([], network, tmp_path).shape == (0, 5)


class TestDamage:
    """Whatever happens to a file, a row is right or computed again."""

    def test_every_flipped_byte_costs_one_row_and_never_gives_a_wrong_one(self, network, tmp_path):
        volumes, names = some(3)
        list(extract(volumes, names, network, tmp_path))
        (path,) = kept(tmp_path, network)
        whole, truth = path.read_bytes(), read(names, network, tmp_path)
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            hurt = place // (len(whole) // 3)
            others = [i for i in range(3) if i != hurt]
            np.testing.assert_array_equal(
                read([names[i] for i in others], network, tmp_path), truth[others]
            )
            with pytest.raises(EvaluationError, match="lacks"):
                read([names[hurt]], network, tmp_path)

    @pytest.mark.parametrize("cut", [1, 50, 100])
    def test_a_file_cut_short_is_completed_from_another(self, network, tmp_path, cut):
        volumes, names = some(3)
        list(extract(volumes, names, network, tmp_path))
        truth = read(names, network, tmp_path)
        (path,) = kept(tmp_path, network)
        path.write_bytes(path.read_bytes()[:-cut])
        again = Volumes(volumes)
        list(extract(again, names, network, tmp_path))
        np.testing.assert_array_equal(read(names, network, tmp_path), truth)
        assert again.seen == ([2] if cut < 84 else [1, 2])


class TestRefusals:
    def check(self, volume, what, tmp_path):
        with pytest.raises(EvaluationError, match=what):
            list(extract([noise(0), volume], ["a", "b"], Moments(), tmp_path))
        assert read(["a"], Moments(), tmp_path).shape == (1, 5)

    def test_of_intensities_out_of_bounds(self, tmp_path):
        self.check(255 * noise(1), r"expected 'b' to lie in \[0, 1\], found \[.*25", tmp_path)

    def test_of_what_is_not_a_number(self, tmp_path):
        self.check(noise(1) * float("nan"), "'b' to lie in .* found NaN voxels", tmp_path)

    def test_of_integers(self, tmp_path):
        self.check((noise(1) > 0.5).to(torch.uint8), "found torch.uint8; scale it", tmp_path)

    def test_of_another_number_of_axes(self, tmp_path):
        self.check(noise(1, (2, *SHAPE)), r"found \(2, 6, 8, 6\)", tmp_path)

    def test_of_several_shapes_at_once(self, network, tmp_path):
        volumes = [noise(0), noise(1, (1, 8, 8, 8))]
        with pytest.raises(EvaluationError, match=r"several shapes: \(6, 8, 6\), \(8, 8, 8\)"):
            list(extract(volumes, ["a", "b"], network, tmp_path, batch=2))
        assert list(extract(volumes, ["a", "b"], network, tmp_path)) == [0, 1]

    def test_of_too_few_names(self, network, tmp_path):
        with pytest.raises(EvaluationError, match="found 1 for 2"):
            list(extract([noise(0)] * 2, ["a"], network, tmp_path))

    def test_of_features_that_are_not_finite(self, network, tmp_path):
        network.features = lambda volumes: torch.full((len(volumes), 5), float("inf"))
        with pytest.raises(EvaluationError, match="moments features of 'a' are not finite"):
            list(extract([noise(0)], ["a"], network, tmp_path))


def test_the_digest_of_a_volume_is_of_its_values_and_shape():
    volume = noise(0)
    assert (
        volume_digest(volume) == volume_digest(volume[0].numpy()) == volume_digest(volume.double())
    )
    changed = volume.clone()
    changed[0, 0, 0, 0] += 1e-6
    digests = [volume, changed, volume.view(1, 8, 6, 6)]
    assert len({volume_digest(v) for v in digests}) == 3


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_extraction import Moments, some
from generation.evaluate.extraction import extract
volumes, names = some(40)
network = Moments()
slowly = network.features
network.features = lambda volumes: (time.sleep(0.1), slowly(volumes))[1]
for index in extract(volumes, names, network, Path(sys.argv[2]), batch=2):
    print(index, flush=True)
"""


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(folder)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_at_once_one_killed_leave_all_that_was_yielded(network, tmp_path):
    processes = [start(tmp_path), start(tmp_path)]
    said = [processes[0].stdout.readline() for _ in range(11)]
    time.sleep(0.005)
    processes[0].send_signal(signal.SIGKILL)
    said += processes[0].communicate(timeout=60)[0].splitlines()
    done = [int(line) for line in said if line.strip()]
    assert 11 <= len(done) < 40
    volumes, names = some(40)
    assert len(read([names[i] for i in done], network, tmp_path)) == len(done)
    assert processes[1].wait(timeout=60) == 0
    processes[1].communicate()
    expected = Moments().features(torch.stack(list(volumes)))
    np.testing.assert_allclose(read(names, network, tmp_path), expected.numpy(), rtol=1e-6)
