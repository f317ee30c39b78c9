"""The workloads that come with danaz. Models are checked against their papers, and data against what it should hold."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shipped import shipped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from danaz.run.config import ConfigError
from danaz.run.rates import lr_at
from danaz.workloads import Workload, build, collate
from danaz.workloads.cifar10_resnet import Block, ResNet
from danaz.workloads.cifar10_wrn16_4 import WideResNet
from danaz.workloads.digits import split_by_class
from danaz.workloads.images import Augmentation, ImageTensors


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def images() -> ImageTensors:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 3, 8, 6), dtype=torch.uint8, generator=generator)
    return ImageTensors(pixels, torch.arange(20), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


class TestBuilding:
    def test_every_process_builds_the_same_parameters(self) -> None:
        torch.manual_seed(5)
        first, second = build(shipped("digits")), build(shipped("digits"))
        other = build(shipped("digits", "seed=1"))
        assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
        assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))

    def test_unknown_workload_suggests_the_nearest(self) -> None:
        with pytest.raises(ConfigError) as caught:
            build(shipped("digits", "workload=digit"))
        assert str(caught.value) == (
            "workload = 'digit' is unknown; did you mean 'digits'? "
            "Known: charlm, cifar10-resnet20, cifar10-small, cifar10-wrn16-4, digits, digits-mlp, quadratic"
        )


class TestImageTensors:
    def test_a_batch_is_the_stack_of_its_samples(self, images: ImageTensors) -> None:
        indices = [3, 0, 19, 3]
        batch, labels = images.__getitems__(indices)
        samples = [images[index] for index in indices]
        assert torch.equal(batch, torch.stack([image for image, _ in samples]))
        assert labels.tolist() == [int(label) for _, label in samples] == indices

    def test_normalisation(self, images: ImageTensors) -> None:
        batch, _ = images.__getitems__([7])
        pixels = images.images[7].numpy().astype(np.float64)
        mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
        expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
        np.testing.assert_allclose(batch[0].numpy(), expected, atol=1e-5)

    def test_three_means_turn_grey_into_rgb(self) -> None:
        grey = ImageTensors(
            torch.full((2, 1, 4, 4), 51, dtype=torch.uint8), torch.zeros(2), [0.2, 0.0, 0.1], [1, 1, 0.1]
        )
        image, _ = grey[1]
        assert image.shape == (3, 4, 4)
        torch.testing.assert_close(image[:, 0, 0], torch.tensor([0.0, 0.2, 1.0]), atol=1e-6, rtol=0)

    def test_augmentation_crops_and_flips_whole_images(self, images: ImageTensors) -> None:
        """Each result is one of the 25 crops of its own bordered image, mirrored or not, and all kinds occur."""
        pixels = images.images[:1].expand(400, -1, -1, -1)
        torch.manual_seed(0)
        augmented = Augmentation(padding=2, flip=True)(pixels)
        assert augmented.shape == pixels.shape
        assert augmented.dtype == torch.uint8

        def crops(bordered: Tensor) -> Iterator[Tensor]:
            for down in range(5):
                for right in range(5):
                    crop = bordered[:, down : down + 8, right : right + 6]
                    yield from (crop, crop.flip(2))

        possible = {crop.numpy().tobytes() for crop in crops(F.pad(pixels[0], (2, 2, 2, 2)))}
        assert {image.numpy().tobytes() for image in augmented} == possible
        assert len(possible) == 50

    def test_images_of_a_batch_are_augmented_independently_and_repeatably(self, images: ImageTensors) -> None:
        augment = Augmentation(padding=2, flip=True)
        torch.manual_seed(3)
        first = augment(images.images[:1].expand(8, -1, -1, -1))
        torch.manual_seed(3)
        again = augment(images.images[:1].expand(8, -1, -1, -1))
        assert torch.equal(first, again)
        assert len(first.unique(dim=0)) > 1

    def test_augmentation_leaves_the_data_alone(self, images: ImageTensors) -> None:
        before = images.images.clone()
        images.augmentation = Augmentation(padding=1, flip=True)
        images.__getitems__(range(20))
        assert torch.equal(images.images, before)

    def test_data_loader_fetches_batches_at_once(self, images: ImageTensors) -> None:
        calls = []

        class Counting(ImageTensors):
            def __getitems__(self, indices: Any) -> tuple[Tensor, Tensor]:
                calls.append(len(indices))
                return super().__getitems__(indices)

        counting = Counting(images.images, images.labels, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
        loader = DataLoader(Subset(counting, range(10)), batch_size=4, collate_fn=collate)
        shapes = [(tuple(x.shape), y.tolist()) for x, y in loader]
        assert calls == [4, 4, 2]
        assert shapes[-1] == ((2, 3, 8, 6), [8, 9])

    def test_collate_stacks_ordinary_samples(self) -> None:
        x, y = collate([(torch.zeros(3), 1), (torch.ones(3), 2)])
        assert (tuple(x.shape), y.tolist()) == ((2, 3), [1, 2])


class TestDigits:
    def test_split_is_fixed_disjoint_and_stratified(self) -> None:
        first, other = build(shipped("digits")), build(shipped("digits", "seed=9"))
        assert torch.equal(first.test.images, other.test.images)
        assert len(first.train) + len(first.test) == 1797
        assert len(first.test) == 364
        shares = torch.bincount(first.test.labels) / torch.bincount(torch.cat([first.train.labels, first.test.labels]))
        assert ((shares - 0.2).abs() < 0.005).all()

    def test_split_takes_every_fifth_of_each_class(self) -> None:
        labels = torch.tensor([0] * 6 + [1] * 5)
        assert split_by_class(labels).nonzero().flatten().tolist() == [0, 5, 6]

    def test_training_images_are_normalised(self) -> None:
        workload = build(shipped("digits"))
        images, _ = workload.train.__getitems__(range(len(workload.train)))
        assert abs(images.mean().item()) < 0.02
        assert abs(images.std().item() - 1) < 0.02

    def test_it_learns(self) -> None:
        """A few dozen steps of plain Nesterov SGD at the shipped rate bring the test error from 90 % to under 15 %."""
        config = shipped("digits")
        workload = build(config)
        optimizer = torch.optim.SGD(workload.model.parameters(), config.lr, config.momentum, nesterov=True)
        loader = DataLoader(workload.train, config.batch_size, shuffle=True, collate_fn=collate)
        for x, y in loader:
            optimizer.zero_grad()
            workload.loss(workload.model(x), y).backward()
            optimizer.step()
        workload.model.eval()
        x, y = workload.test.__getitems__(range(len(workload.test)))
        error = (workload.model(x).argmax(1) != y).float().mean().item()
        assert error < 0.15


class TestQuadratic:
    def test_value_and_gradient_against_numpy(self) -> None:
        workload = build(shipped("quadratic"))
        curvature = np.logspace(-2, 0, 1000)
        assert curvature[0] == 0.01
        assert curvature[-1] == 1
        theta = np.random.default_rng(0).normal(size=1000)
        workload.model.theta.data = torch.tensor(theta, dtype=torch.float32)
        x, target = next(iter(DataLoader(workload.train, 1, collate_fn=collate)))
        loss = workload.loss(workload.model(x), target)
        loss.backward()
        theta = workload.model.theta.detach().double().numpy()
        assert loss.item() == pytest.approx((curvature * (theta - 1) ** 2).sum() / 2, rel=1e-6)
        np.testing.assert_allclose(workload.model.theta.grad.numpy(), curvature * (theta - 1), rtol=1e-6, atol=1e-9)

    def test_starts_at_zero_and_has_no_buffers(self) -> None:
        model = build(shipped("quadratic", "seed=4")).model
        assert [(name, p.count_nonzero().item()) for name, p in model.named_parameters()] == [("theta", 0)]
        assert list(model.buffers()) == []

    def test_400_updates(self) -> None:
        config = shipped("quadratic")
        assert config.epochs * len(build(config).train) // config.batch_size == 400
        assert (config.lr, config.momentum, config.weight_decay) == (0.05, 0.9, 0)
        assert lr_at(config, 3.99) == 0.05
        assert config.lr_schedule.warmup_epochs == 0


class TestResNet20:
    def test_size_is_the_papers(self) -> None:
        """Table 6 of He et al. 2016 gives 0.27 M. There are 20 weighted layers; the shortcuts have no parameters."""
        model = ResNet()
        assert size_of(model) == 269_722
        assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == 20

    def test_n_blocks_make_6n_plus_2_layers(self) -> None:
        """ResNet-56 has 0.85 M in the same table."""
        assert size_of(ResNet(blocks_per_stage=9)) == pytest.approx(0.85e6, rel=0.01)

    def test_option_a_shortcut_subsamples_and_pads(self) -> None:
        block = Block(2, 4).eval()
        for parameter in block.parameters():
            parameter.data.zero_()  # the residual branch then gives zero
        x = torch.rand(1, 2, 4, 4)
        out = block(x)
        assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
        assert out[:, [0, 3]].count_nonzero() == 0

    def test_images_of_a_stage(self) -> None:
        assert ResNet()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert ResNet().blocks(torch.rand(2, 16, 32, 32)).shape == (2, 64, 8, 8)


class TestWideResNet:
    def test_size_is_the_papers(self) -> None:
        """Zagoruyko and Komodakis 2016: WRN-16-4 has 2.7 M; their table 4 gives WRN-40-4 8.9 M and WRN-16-8 11.0 M."""
        assert size_of(WideResNet()) == 2_748_890
        assert size_of(WideResNet(depth=40)) == pytest.approx(8.9e6, rel=0.01)
        assert size_of(WideResNet(width=8)) == pytest.approx(11.0e6, rel=0.01)

    def test_images_of_a_stage(self) -> None:
        assert WideResNet()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert WideResNet().blocks(torch.rand(2, 16, 32, 32)).shape == (2, 256, 8, 8)


@pytest.fixture(scope="module")
def resnet20(cifar10_dir: Path) -> Workload:
    return build(shipped("cifar10-resnet20", f"data_dir={cifar10_dir}"))


class TestCifar10:
    def test_real_images(self, resnet20: Workload) -> None:
        assert (len(resnet20.train), len(resnet20.test), resnet20.classes) == (50_000, 10_000, 10)
        assert torch.bincount(resnet20.train.labels).tolist() == [5000] * 10
        assert torch.bincount(resnet20.test.labels).tolist() == [1000] * 10
        plain = copy.copy(resnet20.train)
        plain.augmentation = None
        images, _ = plain.__getitems__(range(0, 50_000, 10))
        assert images.mean((0, 2, 3)).abs().max() < 0.05
        assert (images.std((0, 2, 3)) - 1).abs().max() < 0.05

    def test_only_training_images_are_augmented(self, resnet20: Workload) -> None:
        assert resnet20.train.augmentation == Augmentation(padding=4, flip=True)
        assert resnet20.test.augmentation is None

    def test_a_batch_through_the_model(self, resnet20: Workload) -> None:
        x, y = resnet20.train.__getitems__(range(8))
        loss = resnet20.loss(resnet20.model(x), y)
        loss.backward()
        assert loss.item() == pytest.approx(np.log(10), rel=0.5)
        assert all(parameter.grad is not None for parameter in resnet20.model.parameters())

    def test_augment_off_and_wide_resnet(self, cifar10_dir: Path) -> None:
        workload = build(shipped("cifar10-wrn16-4", f"data_dir={cifar10_dir}", "augment=off"))
        assert workload.train.augmentation is None
        assert isinstance(workload.model, WideResNet)

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            build(shipped("cifar10-resnet20", f"data_dir={tmp_path}"))
        assert str(caught.value) == (
            f"data_dir: CIFAR10 was looked for in {tmp_path}: Dataset not found or corrupted. Download it with: "
            f"python -c \"from torchvision.datasets import CIFAR10 as D; D('{tmp_path}', train=True, download=True)\""
        )
        assert list(tmp_path.iterdir()) == []

    def test_no_folder_given(self) -> None:
        with pytest.raises(ConfigError, match=r"^data_dir is not set: give the folder that holds CIFAR10, for"):
            build(shipped("cifar10-resnet20", "data_dir=null"))
