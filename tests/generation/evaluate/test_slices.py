import pytest
import torch
from torch import nn

from generation.errors import EvaluationError, WeightsError
from generation.evaluate.slices import SliceNetwork, dinov2, random_dinov2

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (20, 28, 20)


def noise(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Means(nn.Module):
    """Gives the mean of each channel, and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pictures):
        self.seen.append(pictures)
        return pictures.mean(dim=(2, 3))


def sliced(backbone=None, **options):
    options = {
        "width": 3,
        "architecture": "means",
        "name": "means",
        "slices": 4,
        "side": 28,
    } | options
    return SliceNetwork(backbone or Means(), pretrained=False, **options)


def as_pixels(pictures):
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return pictures * deviation.view(3, 1, 1) + mean.view(3, 1, 1)


class TestPictures:
    def test_are_slices_of_the_middle_half_unscaled_and_centred(self):
        backbone, volume = Means(), noise(0, *SHAPE)
        sliced(backbone).features(volume[None, None])
        sagittal, coronal, axial = (as_pixels(pictures) for pictures in backbone.seen)
        places = {0: [6, 8, 11, 13], 1: [8, 12, 15, 19]}
        for pictures, axis in ((sagittal, 0), (coronal, 1), (axial, 2)):
            assert pictures.shape == (4, 3, 28, 28)
            assert torch.equal(pictures[:, 0] - pictures[:, 0], pictures[:, 1] * 0)
            taken = volume.movedim(axis, 0)[places[axis % 2]]
            tall, wide = ((28 - extent) // 2 for extent in taken.shape[1:])
            inner = pictures[:, :, tall : tall + taken.shape[1], wide : wide + taken.shape[2]]
            torch.testing.assert_close(inner, taken[:, None].expand_as(inner))
            assert pictures.sum() == pytest.approx(inner.sum().item(), rel=1e-3)

    def test_are_resized_to_the_side_that_is_wanted(self):
        backbone = Means()
        sliced(backbone, side=14).features(torch.full((1, 1, 28, 28, 28), 0.25))
        for pictures in backbone.seen:
            assert pictures.shape == (4, 3, 14, 14)
            torch.testing.assert_close(as_pixels(pictures), torch.full((4, 3, 14, 14), 0.25))


class TestFeatures:
    def test_are_means_over_slices_axis_after_axis(self):
        volume = torch.zeros(28, 28, 28)
        volume[:, :, 14:] = 1
        found = sliced(slices=2).features(volume[None, None])
        assert found.shape == (1, 9)
        red = found[0, ::3] * 0.229 + 0.485
        torch.testing.assert_close(red, torch.tensor([0.5, 0.5, 0.5]))

    def test_follow_the_axes(self):
        volume = noise(0, 28, 28, 28)
        one = sliced().features(volume[None, None]).view(3, 3)
        turned = sliced().features(volume.permute(2, 0, 1)[None, None]).view(3, 3)
        torch.testing.assert_close(turned, one[[2, 0, 1]])

    def test_are_of_each_volume_alone(self):
        network, volumes = sliced(), noise(1, 3, 1, *SHAPE)
        alone = torch.cat([network.features(volume[None]) for volume in volumes])
        torch.testing.assert_close(network.features(volumes), alone)


def test_the_digest_tells_weights_architecture_and_slices_apart():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 3, 1), Means())
    digests = [
        sliced(backbone).digest,
        sliced(backbone, slices=5).digest,
        sliced(backbone, side=14).digest,
        sliced(backbone, architecture="others").digest,
        sliced(nn.Sequential(nn.Conv2d(3, 3, 1), Means())).digest,
    ]
    assert len(set(digests)) == 5
    assert sliced(backbone, name="renamed").digest == digests[0]


def test_without_timm_dinov2_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(EvaluationError, match=r"needs the package timm.*synthbrain\[dinov2\]"):
        random_dinov2()
    with pytest.raises(EvaluationError, match=r"needs the package timm"):
        dinov2(tmp_path / "none.safetensors")


class TestDinov2:
    """Only where timm is installed."""

    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm")

    @pytest.fixture(scope="class")
    @classmethod
    def file(cls, tmp_path_factory):
        """Weights in the authors' layout, random."""
        timm = pytest.importorskip("timm")
        torch.manual_seed(3)
        net = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith("gamma"):
                    parameter.fill_(1)
                parameter += 0.02 * torch.randn(parameter.shape)
        path = tmp_path_factory.mktemp("dino") / "dinov2_vits14_pretrain.pth"
        torch.save(net.state_dict() | {"mask_token": torch.zeros(1, 384)}, path)
        return path

    def test_features_are_class_tokens(self, file, timm):
        network = dinov2(file, slices=1)
        volume = noise(0, 160, 224, 160)
        found = network.features(volume[None, None])
        assert found.shape == (1, network.size) == (1, 3 * 384)
        assert (network.name, network.pretrained) == ("dinov2-vits14", True)
        net = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
        state = torch.load(file, weights_only=True)
        net.load_state_dict({k: t for k, t in state.items() if k != "mask_token"})
        picture = torch.zeros(224, 224)
        picture[:, 32:192] = volume[80]
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        picture = (picture - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
        with torch.no_grad():
            token = net.eval().forward_features(picture[None])[0, 0]
        torch.testing.assert_close(found[0, :384], token, rtol=1e-3, atol=1e-3)

    def test_random_weights_say_so_and_answer_to_what_they_see(self):
        network = random_dinov2(slices=1)
        assert "random" in network.name
        assert not network.pretrained
        assert network.digest == random_dinov2(slices=1).digest != random_dinov2(seed=1).digest
        features = network.features(noise(0, 2, 1, 56, 56, 56))
        assert features.isfinite().all()
        assert (features[0] - features[1]).norm() > 1e-3 * features[0].norm()

    def test_another_file_is_refused(self, tmp_path):
        torch.save({"cls_token": torch.zeros(1, 1, 768)}, tmp_path / "vitb.pth")
        with pytest.raises(WeightsError, match=r"no DINOv2 ViT-S/14: of 174.*missing.*another sha"):
            dinov2(tmp_path / "vitb.pth")
