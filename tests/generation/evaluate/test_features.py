import hashlib
import json

import pytest
import torch
from local_hub import COMMIT, LocalHub

from generation.errors import WeightsError
from generation.evaluate import features
from generation.evaluate.features import load, pull
from generation.evaluate.med3d import ResNet50

NAME = "med3d-resnet50"
REPO = "TencentMedicalNet/MedicalNet-Resnet50"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a repository holds: a checkpoint of the right shapes that takes no room."""
    state = {k: torch.tensor(0.5).expand(t.shape) for k, t in ResNet50().state_dict().items()}
    path = tmp_path_factory.mktemp("published") / "resnet_50.pth"
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, path)
    return {"resnet_50.pth": path.read_bytes()}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """The Hub's real client against a server that speaks the Hub's protocol."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with LocalHub({REPO: dict(files)}).running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "networks"


class TestPull:
    def test_fetches_records_and_loads(self, hub, files, folder):
        path = pull(NAME, folder)
        assert path == folder / NAME / "resnet_50.pth"
        record = json.loads((folder / NAME / "source.json").read_text())
        digest = hashlib.sha256(files["resnet_50.pth"]).hexdigest()
        assert record == {"repo": REPO, "commit": COMMIT, "sha256": digest}
        assert sorted(p.name for p in path.parent.iterdir()) == ["resnet_50.pth", "source.json"]
        network = load(NAME, folder)
        assert (network.name, network.size, network.pretrained) == (NAME, 2048, True)

    def test_what_is_there_is_not_fetched_again(self, hub, folder):
        pull(NAME, folder)
        asked = len(hub.log)
        pull(NAME, folder)
        assert len(hub.log) == asked

    def test_the_first_file_is_pinned(self, hub, folder):
        path = pull(NAME, folder)
        before = path.read_bytes()
        hub.heads[REPO, "main"] = COMMIT[::-1]
        hub.repos[REPO] = {"resnet_50.pth": b"another file"}
        with pytest.raises(WeightsError, match=r"as first fetched.*delete.*if you trust"):
            pull(NAME, folder, force=True)
        assert path.read_bytes() == before

    def test_a_damaged_file_is_found(self, hub, folder):
        path = pull(NAME, folder)
        path.write_bytes(path.read_bytes()[:-1])
        for use in (load, pull):
            with pytest.raises(WeightsError, match="damaged or replaced"):
                use(NAME, folder)

    def test_a_lost_file_is_fetched_again(self, hub, folder):
        path = pull(NAME, folder)
        path.unlink()
        assert pull(NAME, folder).is_file()

    def test_a_damaged_record_is_found(self, hub, folder):
        pull(NAME, folder)
        (folder / NAME / "source.json").write_text("[")
        with pytest.raises(WeightsError, match=r"source.json is damaged .*fetch again"):
            load(NAME, folder)

    def test_without_a_network_says_so_and_leaves_nothing(self, hub, folder, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(WeightsError, match=r"cannot be reached|could not be fetched"):
            pull(NAME, folder)
        assert not folder.exists()


class TestLoad:
    def test_never_downloads(self, hub, folder):
        with pytest.raises(
            WeightsError, match=r"no weights.*fetch them with `synthbrain weights pull med3d"
        ):
            load(NAME, folder)
        assert hub.log == []

    def test_a_file_put_there_by_hand_is_not_trusted(self, files, folder):
        (folder / NAME).mkdir(parents=True)
        (folder / NAME / "resnet_50.pth").write_bytes(files["resnet_50.pth"])
        with pytest.raises(WeightsError, match="no weights"):
            load(NAME, folder)

    def test_random_weights_need_no_file(self, folder):
        network = load("random", folder)
        assert "random" in network.name
        assert not network.pretrained

    @pytest.mark.parametrize("use", [load, pull])
    def test_unknown_names_are_told_what_there_is(self, use, folder):
        with pytest.raises(WeightsError, match=r"unknown feature network 'inception'.*med3d-resn"):
            use("inception", folder)


def test_every_published_network_can_be_loaded(folder):
    for name in features.SOURCES:
        with pytest.raises(WeightsError, match="fetch them with"):
            load(name, folder)
