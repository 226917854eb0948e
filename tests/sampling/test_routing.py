import pickle

import pytest
import torch
from sampled import Noise
from torch.utils.data import DataLoader, Dataset

from generation.generator import Generator, has_latents
from synthbrain import SynthBrainDataset
from synthbrain.errors import GeneratorError
from synthbrain.sampling import status
from synthbrain.sampling.routing import RoutedGenerator, local_device
from synthbrain.testing import TinyLatentGenerator, check_generator, tiny_manifest

NOISE, LATENTS = "sampled:Noise", "synthbrain.testing:TinyLatentGenerator"


@pytest.fixture
def rows():
    return tiny_manifest(6).table


class Sampled(Dataset):
    """What a generator makes of each row, wherever this is asked for."""

    def __init__(self, generator, rows):
        self.generator, self.rows = generator, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.generator.sample(self.rows.iloc[[index]])[0]


def test_it_keeps_the_contract_and_says_what_its_generator_says():
    routed = RoutedGenerator(NOISE, Noise())
    check_generator(routed)
    assert isinstance(routed, Generator)
    assert not has_latents(routed)
    for promise in ("name", "digest", "honours", "shape", "batch_size", "seconds_per_volume"):
        assert getattr(routed, promise) == getattr(Noise(), promise)
    latent = RoutedGenerator(LATENTS, TinyLatentGenerator())
    check_generator(latent)
    assert has_latents(latent)


class Measured(Noise):
    @property
    def report(self):
        return {"ms_per_volume": 1.0}


def test_it_tells_what_its_generator_took_and_nothing_of_others():
    assert RoutedGenerator(NOISE, Measured()).report == {"ms_per_volume": 1.0}
    assert RoutedGenerator(NOISE, Noise()).report is None
    copy = pickle.loads(pickle.dumps(RoutedGenerator(NOISE, Measured())))
    assert copy.report is None


def test_it_computes_here_and_in_workers_asks_the_service(rows, home):
    routed = RoutedGenerator(NOISE, Noise())
    assert torch.equal(routed.sample(rows), Noise().sample(rows))
    assert not (home / "sampling").exists()
    found = torch.stack(list(DataLoader(Sampled(routed, rows), batch_size=None, num_workers=2)))
    assert torch.equal(found, Noise().sample(rows))
    assert status(routed.shared.spec.folder())["made"] == 6


def test_once_it_shares_all_is_left_to_the_service(rows):
    routed = RoutedGenerator(LATENTS, TinyLatentGenerator())
    routed.share()
    routed = pickle.loads(pickle.dumps(routed))
    here = TinyLatentGenerator()
    latents = routed.sample_latents(rows)
    assert torch.equal(latents, here.sample_latents(rows))
    assert torch.equal(routed.decode(latents.half()), here.decode(latents.half()))
    assert torch.equal(routed.sample(rows), here.sample(rows))
    assert status(routed.shared.spec.folder())["made"] == 18


def test_a_service_with_other_weights_is_refused(rows):
    other = Noise()
    other.digest = "ffeeddccbbaa"
    routed = RoutedGenerator(NOISE, other)
    with pytest.raises(GeneratorError, match="holds noise-00112233, expected ffeeddcc"):
        routed.share()
    assert torch.equal(routed.sample(rows), Noise().sample(rows))


def test_a_copy_never_computes_with_other_weights(rows):
    copy = pickle.loads(pickle.dumps(RoutedGenerator(NOISE, Noise())))
    assert torch.equal(copy.sample(rows), Noise().sample(rows))
    other = Noise()
    other.digest = "ffeeddccbbaa"
    copy = pickle.loads(pickle.dumps(RoutedGenerator(NOISE, other)))
    with pytest.raises(
        GeneratorError, match="sampled:Noise is noise-00112233 here, expected noise-ffee"
    ):
        copy.sample(rows)


def test_where_there_can_be_no_service_it_goes_on_here(rows, home, tmp_path, caplog):
    home.parent.joinpath("home").write_text("a file, where services would lie")
    ds = SynthBrainDataset(tiny_manifest(6), generator=NOISE, store=tmp_path / "store")
    seen = [id for batch in ds.loader(batch_size=2) for id in batch["id"]]
    assert seen == rows.index.tolist()
    assert not ds.missing()
    assert any("no longer made ahead" in record.getMessage() for record in caplog.records)


def test_latents_reach_workers_through_the_service(rows, tmp_path):
    ds = SynthBrainDataset(
        tiny_manifest(6), generator=LATENTS, representation="latent", store=tmp_path / "store"
    )
    found = {}
    for batch in ds.loader(batch_size=2, num_workers=2):
        found |= dict(zip(batch["id"], batch["latent"], strict=True))
    expected = TinyLatentGenerator().sample_latents(rows).half().float()
    assert all(torch.equal(found[id], mine) for id, mine in zip(rows.index, expected, strict=True))
    assert not ds.missing()


@pytest.mark.parametrize(
    ("rank", "devices", "expected"),
    [(None, 4, None), ("1", 0, None), ("0", 1, None), ("1", 4, "cuda:1"), ("5", 4, "cuda:1")],
)
def test_ranks_with_devices_of_their_own_use_them(monkeypatch, rank, devices, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert local_device({} if rank is None else {"LOCAL_RANK": rank}) == expected


def test_a_rank_s_device_is_for_generators_with_weights(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert RoutedGenerator(NOISE, Noise()).shared.spec.device is None
    weights = Noise()
    weights.name = "mine"
    assert RoutedGenerator("mine", weights).shared.spec.device == "cuda:1"
