import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from generation.errors import WeightsError
from generation.evaluate.med3d import Med3D, ResNet50, med3d, random_med3d

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def textures(n, shape=(48, 64, 48), seed=0):
    """Smooth volumes with fine grain, in [0, 1]."""
    made = []
    for i in range(n):
        smooth = ndimage.gaussian_filter(noise(seed + i, *shape).numpy(), 3)
        smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
        made.append(torch.from_numpy(0.8 * smooth) + 0.1 * noise(seed + 1000 + i, *shape))
    return torch.stack(made)[:, None]


@pytest.fixture(scope="module")
def narrow():
    return random_med3d(width=8)


def monai_net(widen):
    """MONAI's network patched into MedicalNet's, with lively weights and statistics."""
    from monai.networks.nets import resnet50

    net = resnet50(
        spatial_dims=3, n_input_channels=1, conv1_t_stride=2, feed_forward=False,
        shortcut_type="B", bias_downsample=False, widen_factor=widen,
    )  # fmt: skip
    for layer, dilation in ((net.layer3, 2), (net.layer4, 4)):
        for block in layer:
            block.conv2.dilation = block.conv2.padding = (dilation,) * 3
            block.conv2.stride = (1, 1, 1)
        layer[0].downsample[0].stride = (1, 1, 1)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5, generator=draw)
                for tensor in (module.bias, module.running_mean):
                    tensor.uniform_(-0.2, 0.2, generator=draw)
            elif isinstance(module, torch.nn.Conv3d):
                deviation = module.weight[0].numel() ** -0.5
                module.weight.normal_(0, deviation, generator=draw)
    return net.eval()


def check_parity(network, net):
    volumes = noise(0, 2, 1, 40, 56, 40)
    mean = volumes.mean(dim=(2, 3, 4), keepdim=True)
    spread = volumes.std(dim=(2, 3, 4), keepdim=True, correction=0)
    with torch.no_grad():
        expected = net((volumes - mean) / (spread + 1e-5))
    found = network.features(volumes)
    assert found.shape == expected.shape == (2, network.size)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def as_published(state, path, **changes):
    """A file as MedicalNet publishes them: a prefix, a segmentation head, old PyTorch's keys."""
    kept = {f"module.{k}": t for k, t in state.items() if "num_batches" not in k}
    kept["module.conv_seg.0.weight"] = torch.zeros(2, 2)
    torch.save({"state_dict": kept | changes}, path)
    return path


def shallow(state):
    """Tensors of the same shapes that take no room in a file."""
    return {key: torch.tensor(0.5).expand(tensor.shape) for key, tensor in state.items()}


class TestParity:
    def test_with_monai_given_strides_and_dilations(self):
        net, ours = monai_net(1 / 8), ResNet50(8)
        ours.load_state_dict(net.state_dict(), strict=True)
        check_parity(Med3D(ours, name="x", pretrained=True), net)

    @pytest.mark.slow
    def test_at_full_width_from_a_file(self, tmp_path):
        net = monai_net(1)
        network = med3d(as_published(net.state_dict(), tmp_path / "resnet_50.pth"))
        check_parity(network, net)
        assert (network.size, network.pretrained) == (2048, True)

    def test_features_lie_eight_voxels_apart(self):
        net = ResNet50(8)
        seen = []
        net.layer4.register_forward_hook(lambda module, x, y: seen.append(y.shape))
        net.eval()(noise(0, 1, 1, 64, 80, 96))
        assert seen == [(1, 256, 8, 10, 12)]


class TestFiles:
    @pytest.fixture(scope="class")
    @classmethod
    def state(cls):
        return shallow(ResNet50().state_dict())

    def test_published_files_are_read_and_the_digest_is_of_the_weights(self, state, tmp_path):
        network = med3d(as_published(state, tmp_path / "resnet_50.pth"))
        assert (network.name, network.size, network.pretrained) == ("med3d-resnet50", 2048, True)
        torch.save(state, tmp_path / "plain.pth")
        assert med3d(tmp_path / "plain.pth", name="x").digest == network.digest
        changed = {"module.bn1.bias": torch.ones(64)}
        other = as_published(state, tmp_path / "other.pth", **changed)
        assert med3d(other).digest != network.digest

    def test_a_file_of_another_network_is_refused_and_described(self, tmp_path):
        torch.save(ResNet50(8).state_dict(), tmp_path / "narrow.pth")
        with pytest.raises(WeightsError, match=r"narrow.pth is no ResNet-50.*of another shape"):
            med3d(tmp_path / "narrow.pth")

    def test_missing_and_unexpected_tensors_are_named(self, state, tmp_path):
        odd = dict(state)
        odd["module.layer9.weight"] = odd.pop("layer4.2.conv3.weight")
        torch.save(odd, tmp_path / "odd.pth")
        with pytest.raises(WeightsError, match=r"1 missing \(layer4.2.conv3.weight\).*layer9"):
            med3d(tmp_path / "odd.pth")

    def test_a_pickle_that_runs_code_is_refused(self, tmp_path):
        torch.save({"state_dict": {"x": print}}, tmp_path / "bad.pth")
        with pytest.raises(WeightsError, match="more than tensors"):
            med3d(tmp_path / "bad.pth")


class TestFeatures:
    def test_are_of_each_volume_alone(self, narrow):
        volumes = textures(3)
        volumes[1] *= 1e-3
        together = narrow.features(volumes)
        alone = torch.cat([narrow.features(volume[None]) for volume in volumes])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    def test_do_not_depend_on_scale_and_offset(self, narrow):
        volumes = textures(2)
        torch.testing.assert_close(
            narrow.features(0.5 * volumes + 0.2), narrow.features(volumes), rtol=2e-3, atol=1e-3
        )

    def test_of_a_constant_volume_are_finite(self, narrow):
        assert narrow.features(torch.full((1, 1, 48, 64, 48), 0.5)).isfinite().all()

    def test_nothing_is_recorded_for_gradients(self, narrow):
        assert not narrow.features(textures(1)).requires_grad


class TestRandom:
    def test_says_that_it_is(self, narrow):
        assert "random" in narrow.name
        assert (narrow.pretrained, narrow.size) == (False, 256)
        assert random_med3d().size == 512

    def test_weights_are_the_same_on_every_machine(self, narrow):
        assert narrow.digest == random_med3d(width=8).digest == PINNED
        assert narrow.digest != random_med3d(width=8, seed=1).digest

    def test_global_seeds_are_neither_used_nor_moved(self):
        before = torch.get_rng_state()
        assert random_med3d(width=8).digest == PINNED
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.slow
    def test_full_width_keeps_signals_in_bounds(self):
        features = random_med3d(width=64).features(textures(1))
        assert features.isfinite().all()
        assert 0.1 < features.mean() < 30

    def test_blur_and_noise_move_features_further_than_chance(self, narrow):
        volumes = textures(12)
        features = narrow.features(volumes)
        spread = features.std(dim=0).norm()
        assert spread > 0.01 * features.mean(dim=0).norm()
        blurred = functional.avg_pool3d(volumes, 3, stride=1, padding=1)
        noisy = volumes + 0.2 * (noise(9, *volumes.shape) - 0.5)
        for changed in (blurred, noisy):
            shift = (narrow.features(changed) - features).mean(dim=0).norm()
            assert shift > 3 * spread

    def test_two_sets_alike_are_close_and_blurred_ones_far(self, narrow):
        from generation.evaluate.distances import frechet_distance

        real, other = textures(10), textures(10, seed=50)
        blurred = functional.avg_pool3d(other, 3, stride=1, padding=1)
        of = [narrow.features(volumes).numpy() for volumes in (real, other, blurred)]
        assert frechet_distance(of[0], of[2]) > 5 * frechet_distance(of[0], of[1])


def test_a_network_is_frozen_and_evaluating():
    net = ResNet50(8).train()
    network = Med3D(net, name="ours", pretrained=True)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert (network.name, network.pretrained) == ("ours", True)


PINNED = "78592327de63a532d3dd9e4ef1a7b0f3c078f58eb019102ce6b3d4f13e0c3228"
