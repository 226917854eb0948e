"""Data for trainers, and runs on cohorts."""

import json
import resource
import signal

import pytest
import torch
import trainers

from generation.errors import TrainingError
from generation.presets import Preset
from generation.train.latents import Latents, encode, fingerprint
from generation.train.settings import read_settings
from synthbrain import SynthBrainDataset
from synthbrain.errors import UsageError, WeightsError
from synthbrain.testing import TinyGenerator, tiny_manifest
from synthbrain.training import Training, Volumes, advance, fitted, open_encoder, open_volumes

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (32, 32, 32)


@pytest.fixture
def cohort(tmp_path):
    """A saved cohort of 40 tiny recipes, of all splits."""
    return str(tiny_manifest(40).save(tmp_path / "tiny"))


@pytest.fixture
def maker(monkeypatch):
    from synthbrain import generators

    monkeypatch.setitem(generators.GENERATORS, "tiny", TinyGenerator)
    return "tiny"


@pytest.fixture
def training(tmp_path, cohort, maker):
    """Makes a training of some kind on tiny volumes."""

    def make(kind, out="run", **options):
        changes = options.pop("changes", {})
        system = Preset.model_validate(
            trainers.tiny("medforj" if kind == "pixel" else "ukb-ldm", shape=SHAPE)
        )
        if kind != "pixel":
            system = system.model_copy(update={"latent_shape": (3, 4, 4, 4)})
        chosen = trainers.chosen(
            kind, system=system.model_dump(mode="json"), steps=3, batch=2, **changes
        )
        options = {"data": cohort, "generator": maker} | options
        return Training(chosen, out=tmp_path / out, **options)

    return make


def test_splits_of_a_cohort_are_trained_and_validated_on(cohort, maker):
    preset = Preset.model_validate(trainers.tiny(shape=SHAPE))
    train, held_out = open_volumes(cohort, preset, generator=maker)
    assert set(train.dataset.table["split"]) == {"train"}
    assert set(held_out.dataset.table["split"]) == {"validation"}
    sample = train[0]
    assert sample["image"].shape == (1, *SHAPE)
    row = train.dataset.table.iloc[0]
    assert sample["condition"].tolist() == pytest.approx(
        [row["sex"], row["age"], row["ventricular_volume"], row["brain_volume"]], abs=1e-6
    )
    assert len(open_volumes(cohort, preset, generator=maker, limit=3)[0]) == 3


def test_what_prepare_wrote_is_opened_with_its_own_store(tmp_path, maker):
    folder = tmp_path / "ready"
    tiny_manifest(12).save(folder / "manifest")
    preset = Preset.model_validate(trainers.tiny(shape=SHAPE))
    train, _ = open_volumes(str(folder), preset)
    assert train.dataset.resolver.generator is None
    assert folder / "store" in train.dataset.resolver.recipes.root.parents


def test_phantoms_are_drawn_by_number():
    preset = Preset.model_validate(trainers.tiny())
    train, held_out = open_volumes("phantoms:50", preset)
    assert len(train) + len(held_out) < 50
    assert train.dataset.resolver.generator.name == "phantom"
    with pytest.raises(UsageError, match="phantoms:500:7; found 'phantoms:many'"):
        open_volumes("phantoms:many", preset)


def test_volumes_are_cut_and_filled_about_their_middle():
    volume = torch.zeros(1, 5, 4, 2)
    volume[0, 2, 2, 1] = 1
    made = fitted(volume, (3, 6, 4))
    assert made.shape == (1, 3, 6, 4)
    assert made[0, 1, 3, 2] == 1
    assert made.sum() == 1
    assert fitted(volume, (5, 4, 2)) is volume


def test_a_model_from_cohort_to_latents_to_denoiser(training, tmp_path):
    run = training("autoencoder", "ae", changes={"crop": None}).start(progress=False)
    lines = list(advance(run))
    assert lines[-1]["step"] == 3
    assert shown_by_tensorboard(tmp_path / "ae") == ({"autoencoder", "kl", "l1"}, [])
    second = training("diffusion", "ldm", autoencoder=str(tmp_path / "ae"))
    run = second.start(progress=False)
    assert run.task.autoencoder == open_encoder(str(tmp_path / "ae")).digest
    kept = sorted((tmp_path / "ldm" / "latents").glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in kept]
    list(advance(run, until=2))
    again = second.start(progress=False)
    assert again.step == 2
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert list(advance(again))[-1]["step"] == 3


def shown_by_tensorboard(folder):
    """Some names of scalars, and the steps of sample sheets."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    sheets = [e.step for e in events.Images("samples")] if events.Tags()["images"] else []
    return {"autoencoder", "kl", "l1", "unet"} & set(events.Tags()["scalars"]), sheets


def test_sheets_of_a_latent_model_are_decoded(training, tmp_path):
    from PIL import Image

    list(advance(training("autoencoder", "ae", changes={"crop": None}).start(progress=False)))
    more = {"sheet_every": 3}
    list(advance(training("diffusion", autoencoder=str(tmp_path / "ae"), changes=more)
                 .start(progress=False)))  # fmt: skip
    page = Image.open(tmp_path / "run" / "sheets" / "step-000000003.png")
    assert page.width > 3 * 2 * SHAPE[0]
    assert shown_by_tensorboard(tmp_path / "run") == ({"unet"}, [0, 3])


def test_latents_of_another_autoencoder_are_not_mixed_in(training, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        list(advance(training("autoencoder", name, changes={"seed": seed, "crop": None})
                     .start(progress=False)))  # fmt: skip
    training("diffusion", autoencoder=str(tmp_path / "a")).start(progress=False)
    with pytest.raises(TrainingError, match="holds latents of another autoencoder"):
        training("diffusion", autoencoder=str(tmp_path / "b")).start(progress=False)
    list(advance(training("diffusion", autoencoder=str(tmp_path / "a")).start(progress=False)))
    elsewhere = training("diffusion", autoencoder=str(tmp_path / "b"), latents=tmp_path / "other")
    with pytest.raises(TrainingError, match="began with latents of the autoencoder"):
        elsewhere.start(progress=False)


def test_two_processes_encode_what_one_does(training, tmp_path):
    list(advance(training("autoencoder", "ae", changes={"crop": None}).start(progress=False)))
    options = {"autoencoder": str(tmp_path / "ae")}
    alone = training("diffusion", "alone", **options).start(progress=False)
    together = training("diffusion", "together", **options)
    trainers.both(lambda: together.start(progress=False))
    kept = Latents(tmp_path / "together" / "latents", alone.data.names)
    assert len(kept) == len(alone.data) > 2
    for index, latent in enumerate(kept):
        assert torch.equal(latent["mean"], alone.data[index]["mean"])


def test_a_latent_is_mean_and_spread_of_the_encoder(training, tmp_path):
    run = training("autoencoder", "ae", changes={"crop": None}).start(progress=False)
    list(advance(run))
    encoder = open_encoder(str(tmp_path / "ae"))
    volumes = run.data
    names = volumes.names[:2]
    done = encode(volumes, names, encoder.network, tmp_path / "latents", torch.device("cpu"))
    assert list(done) == names
    mean, spread = encoder.network.encode(volumes[1]["image"][None])
    kept = Latents(tmp_path / "latents", names)[1]
    assert torch.equal(kept["mean"], mean[0])
    assert torch.equal(kept["sigma"], spread[0])
    assert torch.equal(kept["condition"], volumes[1]["condition"])
    (tmp_path / "latents" / f"{names[1]}.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match="delete it and run again"):
        Latents(tmp_path / "latents", names)[1]


def test_latents_of_other_volumes_are_not_taken_for_these(tmp_path):
    kept = []
    for seed in (0, 1):
        dataset = SynthBrainDataset(
            tiny_manifest(2, seed=seed), generator=TinyGenerator(), store=tmp_path
        )
        kept += [Volumes(dataset, SHAPE).names, Volumes(dataset, (8, 8, 8)).names]
    assert len({name for names in kept for name in names}) == 8


def test_a_full_disk_is_told_and_leaves_no_half_latent(tmp_path):
    network = Preset.model_validate(trainers.tiny(shape=SHAPE)).make("autoencoder")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(TrainingError, match="latents before it are kept"):
            list(encode(trainers.Volumes(), ["a"], network, tmp_path, torch.device("cpu")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, kept)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.json"]


def test_names_that_are_paths_are_refused(tmp_path):
    volumes = [{"image": torch.zeros(1, 8, 8, 8)}]
    with pytest.raises(TrainingError, match="cannot name a file"):
        list(encode(volumes, ["../../x"], torch.nn.Linear(1, 1), tmp_path, torch.device("cpu")))


def test_fingerprints_tell_weights_apart():
    state = {"a": torch.zeros(2), "b": torch.tensor(3)}
    assert fingerprint(state) == fingerprint(dict(reversed(list(state.items()))))
    assert fingerprint(state) != fingerprint({**state, "a": torch.tensor([0.0, 1.0])})
    assert fingerprint(state) != fingerprint({**state, "b": torch.tensor(4)})


def test_what_does_not_fit_is_told(training, tmp_path):
    with pytest.raises(UsageError, match="needs --autoencoder"):
        training("diffusion")
    with pytest.raises(UsageError, match="is for kind 'diffusion', found 'pixel'"):
        training("pixel", autoencoder="x")
    with pytest.raises(WeightsError, match="no weights 'nothing'"):
        training("diffusion", autoencoder="nothing").start()
    list(advance(training("pixel", "pixel").start(progress=False)))
    with pytest.raises(TrainingError, match="a run of kind 'pixel', expected 'autoencoder'"):
        training("diffusion", autoencoder=str(tmp_path / "pixel")).start()


def test_settings_of_a_run_can_be_taken_up_from_its_file(training, tmp_path):
    run = training("pixel").start(progress=False)
    path = tmp_path / "run" / "settings.json"
    assert read_settings(path) == run.settings
    assert read_settings(path, ["batch=1"]).batch == 1
    assert json.loads(path.read_text())["kind"] == "pixel"
    path.write_text("[1]")
    with pytest.raises(TrainingError, match="holds no settings"):
        read_settings(path)
