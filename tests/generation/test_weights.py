import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from local_hub import COMMIT, LocalHub
from safetensors.torch import load_file, save_file

from generation import hub as hub_files
from generation import weights
from generation.checkpoints import fitted
from generation.hub import Published, RemoteFile
from generation.latent import LatentDiffusion
from generation.options import Options
from generation.pixel import PixelDiffusion
from generation.presets import load_preset
from generation.testing import narrow, random_network
from generation.weights import WeightsError

LDM, MEDFORJ = narrow("ukb-ldm"), narrow("medforj")


def old_network(preset, name):
    """The same architecture from the package the published checkpoints were trained with."""
    from generative.networks.nets import AutoencoderKL, DiffusionModelUNet

    spec = dict(preset.networks[name])
    spec["num_channels"] = spec.pop("channels")
    if name == "autoencoder":
        spec["num_res_blocks"] = tuple(spec["num_res_blocks"])
    kind = AutoencoderKL if name == "autoencoder" else DiffusionModelUNet
    return kind(**spec).eval()


def randomised(module, seed=0):
    source = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=source) * 0.1
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def old():
    """Networks in the old layout, with random weights."""
    return {name: randomised(old_network(LDM, name)) for name in LDM.networks}


@pytest.fixture
def files(old, tmp_path):
    """The same as files, as published: plain state dicts."""
    paths = {name: tmp_path / f"{name}.pt" for name in old}
    for name, path in paths.items():
        torch.save(old[name].state_dict(), path)
    return paths


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


def new_state(old, name):
    return fitted(old[name].state_dict(), name, LDM, "x")[0]


class TestOldLayout:
    @torch.inference_mode()
    def test_converted_networks_compute_the_same(self, old, files, folder):
        found = weights.add("ours", files, folder, preset=LDM)
        unet, autoencoder = found.network("unet"), found.network("autoencoder")
        x, context = torch.randn(2, 7, 4, 8, 4), torch.rand(2, 1, 4)
        theirs = old["unet"](x, torch.tensor([30, 700]), context=context)
        ours = unet(x, torch.tensor([30, 700]), context=context)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        z = torch.randn(1, 3, 2, 2, 2)
        theirs = old["autoencoder"].decode(z)
        assert (autoencoder.decode(z) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        volume = torch.rand(1, 1, 16, 16, 16)
        theirs, _ = old["autoencoder"].encode(volume)
        assert (autoencoder.encode(volume)[0] - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    @pytest.mark.parametrize(
        ("name", "keys", "renamed"), [("autoencoder", 162, 6), ("unet", 528, 44)]
    )
    def test_published_checkpoints_at_full_width(self, name, keys, renamed):
        preset = load_preset("ukb-ldm")
        with torch.device("meta"):
            theirs = old_network(preset, name).state_dict()
        found, layout = fitted(theirs, name, preset, "x")
        assert len(found) == keys
        assert len(set(theirs) - set(found)) == renamed
        assert layout == "GenerativeModels (old MONAI)"

    def test_the_whole_generator_runs_on_them(self, files, folder):
        rows = pd.DataFrame(
            {"sex": [1.0], "age": [0.5], "ventricular_volume": [0.2], "brain_volume": [0.4],
             "seed": [1]}
        )  # fmt: skip
        ldm = LatentDiffusion(weights.add("ours", files, folder, preset=LDM), Options(steps=2))
        assert ldm.sample(rows).shape == (1, 1, *LDM.shape)


class TestAdd:
    def test_what_is_recorded(self, files, folder):
        added = weights.add("ours", files, folder, preset=LDM, source={"repo": "somebody/x"})
        found = weights.load("ours", folder)
        assert found == added
        assert (found.name, found.target, found.preset) == ("ours", "epsilon", LDM)
        assert len(found.digest) == 64
        assert found.source["repo"] == "somebody/x"
        assert found.source["unet_layout"] == "GenerativeModels (old MONAI)"
        assert list(weights.installed(folder)) == ["ours"]
        assert pickle.loads(pickle.dumps(found)) == found

    def test_new_layout_wrapped_and_safetensors(self, old, tmp_path, folder):
        unet, autoencoder = new_state(old, "unet"), new_state(old, "autoencoder")
        torch.save({"model": unet, "epoch": 3}, tmp_path / "unet.pth")
        save_file(autoencoder, tmp_path / "autoencoder.safetensors")
        files = {"unet": tmp_path / "unet.pth", "autoencoder": tmp_path / "autoencoder.safetensors"}
        found = weights.add("fine-tuned", files, folder, preset=LDM)
        assert found.source["unet_layout"] == "MONAI"
        for name, state in found.network("unet").state_dict().items():
            assert torch.equal(state, unet[name])

    def test_the_digest_follows_the_weights(self, old, files, tmp_path, folder):
        first = weights.add("a", files, folder, preset=LDM).digest
        assert weights.add("b", files, folder, preset=LDM).digest == first
        state = old["unet"].state_dict()
        key = "conv_in.conv.bias"
        torch.save({**state, key: state[key] + 1}, files["unet"])
        assert weights.add("a", files, folder, preset=LDM).digest != first

    def test_half_takes_half_the_room_and_is_used_as_float32(self, old, files, folder):
        whole, half = (weights.add(n, files, folder, preset=LDM, half=n == "b") for n in "ab")
        sizes = [(w.folder / w.files["unet"]).stat().st_size for w in (whole, half)]
        assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)
        expected = new_state(old, "unet")
        for name, value in half.network("unet").state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name].half().float())

    def test_pixel_systems_need_one_file(self, tmp_path, folder):
        unet = random_network(MEDFORJ, "unet")
        torch.save({"model": unet.state_dict(), "epoch": 1}, tmp_path / "ema.pt")
        files = {"unet": tmp_path / "ema.pt"}
        found = weights.add("pixel", files, folder, preset=MEDFORJ, target="flow")
        assert found.target == "flow"
        volume = PixelDiffusion(found, Options(steps=2)).sample(pd.DataFrame({"seed": [1]}))
        assert volume.shape == (1, 1, *MEDFORJ.shape)

    def test_remove(self, files, folder):
        weights.add("ours", files, folder, preset=LDM)
        weights.remove("ours", folder)
        assert weights.installed(folder) == {}
        with pytest.raises(WeightsError, match="no weights 'ours'"):
            weights.remove("ours", folder)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def spoil(files, how):
    path = files["unet"]
    state = torch.load(path, weights_only=True)
    if how == "missing key":
        del state["conv_in.conv.bias"]
    elif how == "renamed key":
        state["conv_input.bias"] = state.pop("conv_in.conv.bias")
    elif how == "wrong shape":
        state["conv_in.conv.bias"] = torch.zeros(5)
    elif how == "CompVis":
        state = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    elif how == "not a state dict":
        state = {"epoch": 3, "loss": 0.5}
    elif how == "code":
        state["x"] = Evil()
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "text":
        path.write_text("<html>not found</html>")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    else:
        torch.save(state, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing key", r"layout GenerativeModels.*of \d+ keys 1 missing \(conv_in.conv.bias\)$"),
        ("renamed key", r"1 missing \(conv_in.conv.bias\); 1 unexpected \(conv_input.bias\)"),
        ("wrong shape", r"of another shape \(conv_in.conv.bias \(5,\) instead of \(16,\)\)"),
        ("CompVis", "layout CompVis, of 526 keys 526 missing .*; 526 unexpected"),
        ("not a state dict", "holds a dict with epoch, loss, expected a state dict"),
        ("code", "holds more than tensors and is not loaded"),
        ("truncated", "cannot be read .* may be cut short"),
        ("text", "holds more than tensors|cannot be read"),
        ("empty", "cannot be read"),
        ("gone", "cannot be read .*No such file"),
    ],
)
def test_bad_files_are_told_and_harm_nothing(files, folder, how, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = weights.add("ours", files, folder, preset=LDM)
    spoil(files, how)
    with pytest.raises(WeightsError, match=message) as caught:
        weights.add("ours", files, folder, preset=LDM)
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()
    assert weights.load("ours", folder) == good
    good.network("unet")
    assert sorted(p.name for p in folder.iterdir()) == [".ours.lock", "ours"]
    assert len(list((folder / "ours").iterdir())) == 3


def test_a_full_disk_is_told(files, folder, monkeypatch):
    good = weights.add("ours", files, folder, preset=LDM)

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WeightsError, match=r"cannot write .* MB to .*No space left.*make room"):
        weights.add("ours", files, folder, preset=LDM)
    assert weights.load("ours", folder) == good
    assert len(list((folder / "ours").iterdir())) == 3


@pytest.mark.parametrize("name", ["Ours", "../x", "", "a b", "x" * 90])
def test_bad_names_are_refused(files, folder, name):
    with pytest.raises(WeightsError, match="cannot be a name"):
        weights.add(name, files, folder, preset=LDM)


def test_missing_networks_are_named(files, folder):
    with pytest.raises(WeightsError, match="expected files of autoencoder, unet, found unet"):
        weights.add("x", {"unet": files["unet"]}, folder, preset=LDM)


def test_damaged_installations_are_told(files, folder):
    found = weights.add("ours", files, folder, preset=LDM)
    path = folder / "ours" / found.files["unet"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError, match="install 'ours' again"):
        found.network("unet")
    (folder / "ours" / "weights.json").write_text("{")
    with pytest.raises(WeightsError, match="is damaged"):
        weights.load("ours", folder)
    assert weights.installed(folder) == {}
    with pytest.raises(WeightsError, match="`synthbrain weights pull ukb-ldm`"):
        weights.load("ukb-ldm", folder)


def test_an_installation_killed_half_way_leaves_the_old_one(files, folder):
    good = weights.add("ours", files, folder, preset=LDM)
    code = (
        "import sys, time, safetensors.torch as st\n"
        "from pathlib import Path\n"
        "from generation import weights\n"
        "from generation.testing import narrow\n"
        "save = st.save_file\n"
        "def slow(*a):\n    save(*a); print('half', flush=True); time.sleep(60)\n"
        "st.save_file = slow\n"
        "a, u, f = map(Path, sys.argv[1:])\n"
        "weights.add('ours', {'autoencoder': a, 'unet': u}, f, preset=narrow('ukb-ldm'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, files["autoencoder"], files["unet"], folder],
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert weights.load("ours", folder) == good
    assert weights.add("ours", files, folder, preset=LDM).digest == good.digest
    assert len(list((folder / "ours").iterdir())) == 3


class TestPull:
    """With the Hub's real client against a server that speaks the Hub's protocol."""

    @pytest.fixture
    def entry(self, files, monkeypatch):
        data = {f"models/{name}.pt": path.read_bytes() for name, path in files.items()}
        import hashlib

        remote = {
            name: RemoteFile(f"models/{name}.pt", hashlib.md5(path.read_bytes()).hexdigest())
            for name, path in files.items()
        }
        published = dataclasses.replace(
            hub_files.PUBLISHED["ukb-ldm"], name="tiny", repo="some/tiny-ldm", files=remote
        )
        monkeypatch.setitem(hub_files.PUBLISHED, "tiny", published)
        monkeypatch.setattr(weights, "load_preset", narrow)
        return published, data

    @pytest.fixture
    def hub(self, entry, tmp_path, monkeypatch):
        import huggingface_hub.constants as constants

        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        with LocalHub({"some/tiny-ldm": entry[1]}).running() as running:
            monkeypatch.setenv("HF_ENDPOINT", running.url)
            yield running

    def test_fetches_checks_and_installs(self, hub, folder):
        found = weights.pull("tiny", folder)
        assert found.source["repo"] == "some/tiny-ldm"
        assert found.source["commit"] == COMMIT
        assert len(found.source["unet_md5"]) == 32
        found.network("autoencoder")
        before = len(hub.log)
        assert weights.pull("tiny", folder) == found
        assert len(hub.log) == before  # installed: nothing is asked

    def test_force_fetches_again(self, hub, folder):
        weights.pull("tiny", folder)
        before = len(hub.log)
        weights.pull("tiny", folder, force=True)
        assert any(method == "GET" and "unet.pt" in path for method, path, _ in hub.log[before:])

    def test_the_token_is_sent(self, hub, folder, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        weights.pull("tiny", folder)
        assert "Bearer hf_secret" in hub.tokens

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (401, "log in with `hf auth login`"),
            (403, "answered 403; you have no access"),
            (404, "not there any more"),
            (429, "slow down"),
            (500, "answered 500; try again later"),
        ],
    )
    def test_refusals_are_one_line_and_a_later_pull_works(self, hub, folder, fault, message):
        hub.fault = fault
        began = time.monotonic()
        with pytest.raises(WeightsError, match=message) as caught:
            weights.pull("tiny", folder)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 60
        assert not (folder / "tiny").exists()
        hub.fault = None
        weights.pull("tiny", folder).network("unet")

    def test_gated(self, hub, folder):
        hub.gated = True
        with pytest.raises(WeightsError, match="gated: accept its terms"):
            weights.pull("tiny", folder)

    def test_a_connection_that_breaks_off(self, hub, folder):
        hub.fault = "break"
        with pytest.raises(WeightsError, match="could not be fetched"):
            weights.pull("tiny", folder)
        assert not (folder / "tiny").exists()
        hub.fault = None
        weights.pull("tiny", folder).network("unet")

    def test_a_wrong_hash(self, hub, folder, tmp_path):
        weights.pull("tiny", folder)
        weights.remove("tiny", folder)
        blobs = [p for p in (tmp_path / "hub").rglob("blobs/*") if p.stat().st_size > 100]
        for blob in blobs:
            blob.write_bytes(blob.read_bytes()[:-1] + b"x")
        with pytest.raises(WeightsError, match=r"has MD5 \w{32}, expected \w{32}.*--force"):
            weights.pull("tiny", folder)
        assert not (folder / "tiny").exists()
        weights.pull("tiny", folder, force=True).network("unet")

    def test_nobody_answers(self, hub, folder, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(WeightsError, match=r"cannot be reached|could not be fetched"):
            weights.pull("tiny", folder)

    def test_offline_uses_the_cache_and_says_when_it_lacks_something(
        self, hub, folder, monkeypatch, tmp_path
    ):
        from huggingface_hub import constants

        weights.pull("tiny", folder)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert weights.pull("tiny", tmp_path / "elsewhere").digest
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        with pytest.raises(WeightsError, match="offline, or HF_HUB_OFFLINE"):
            weights.pull("tiny", tmp_path / "third")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["a/velocity.pt", "a/flow.pt"], None),
            (["a/flow.pt"], "holds 0 checkpoints with 'velocity'.*found a/flow.pt"),
            (["velocity_1.pt", "velocity_2.pt"], "holds 2 checkpoints"),
        ],
    )
    def test_a_file_without_a_known_name_is_looked_for(self, hub, names, message):
        hub.repos["some/medforj"] = dict.fromkeys([*names, "README.md"], b"x")
        entry = dataclasses.replace(hub_files.PUBLISHED["medforj-velocity"], repo="some/medforj")
        if message is None:
            path = hub_files.fetch(entry, entry.files["unet"], force=False)
            assert path.name == "velocity.pt"
        else:
            with pytest.raises(WeightsError, match=message):
                hub_files.fetch(entry, entry.files["unet"], force=False)

    def test_unknown_names(self, folder):
        with pytest.raises(WeightsError, match=r"unknown weights 'nobody'; published are ukb-ldm"):
            weights.pull("nobody", folder)


def test_every_published_entry_is_complete():
    for name, entry in hub_files.PUBLISHED.items():
        assert isinstance(entry, Published)
        assert entry.name == name
        assert set(entry.files) == set(load_preset(entry.preset).networks)
        assert "not for clinical use" in entry.use
        assert entry.licence
        assert entry.citation


def test_records_are_plain_json(files, folder):
    weights.add("ours", files, folder, preset=LDM)
    assert json.loads((folder / "ours" / "weights.json").read_text())["target"] == "epsilon"
    (file,) = (folder / "ours").glob("unet-*.safetensors")
    assert len(load_file(file)) > 100
