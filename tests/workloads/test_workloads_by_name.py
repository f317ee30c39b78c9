"""Data and models that users bring: from torchvision by name, and their own by import path."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from shipped import shipped
from torch.utils.data import DataLoader

from danaz.run.config import ConfigError
from danaz.workloads import Workload, build, collate
from danaz.workloads.images import Augmentation, ImageTensors


def by_name(data: str, model: str, *overrides: str) -> Workload:
    config = shipped("fashion-mnist-mobilenet", f"data={data}", f"model={model}", *overrides)
    return build(config)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write the format of the MNIST family: magic number with type and rank, the sizes, and the bytes."""
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


class TestTorchvisionByName:
    def test_grey_images_in_memory(self, tmp_path: Path) -> None:
        folder = tmp_path / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        for part, size in (("train", 30), ("t10k", 10)):
            write_idx(folder / f"{part}-images-idx3-ubyte", random.integers(0, 256, (size, 28, 28), dtype=np.uint8))
            write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(size, dtype=np.uint8) % 10)
        workload = build(shipped("fashion-mnist-mobilenet", f"data_dir={tmp_path}"))
        images, labels = workload.train.__getitems__(range(30))
        assert images.shape == (30, 3, 28, 28)
        assert torch.equal(images[:, 0], images[:, 2])
        assert labels.tolist() == [index % 10 for index in range(30)]
        assert abs(images.mean().item()) < 1e-4
        assert images.std().item() == pytest.approx(1, abs=1e-3)
        assert len(workload.test) == 10
        assert workload.model.eval()(images[:2]).shape == (2, 10)

    def test_by_name_in_memory(self, cifar10_dir: Path) -> None:
        name = "torchvision.CIFAR10"
        workload = by_name(name, "torchvision.mobilenet_v3_small", f"data_dir={cifar10_dir}", "augment=true")
        assert isinstance(workload.train, ImageTensors)
        assert workload.train.augmentation == Augmentation(padding=4, flip=True)
        images, labels = workload.test.__getitems__(range(100))
        assert workload.model.eval()(images).shape == (100, 10)
        assert workload.classes == 10
        assert images.mean().abs() < 0.2
        assert labels.dtype == torch.int64

    def test_images_read_one_by_one(self) -> None:
        workload = by_name("torchvision.FakeData", "torchvision.squeezenet1_1", "augment=true")
        image, label = workload.train[0]
        assert (tuple(image.shape), image.dtype) == ((3, 224, 224), torch.float32)
        assert 0 <= label < 10
        assert workload.test is None
        with torch.no_grad():
            assert workload.model.eval()(image[None]).shape == (1, 10)

    def test_folders_of_images(self, tmp_path: Path) -> None:
        """torchvision.ImageFolder reads data_dir/train and data_dir/val: a folder per class, any size, grey or RGB."""
        from PIL import Image

        for part in ("train", "val"):
            for label, mode in (("cat", "L"), ("dog", "RGB")):
                (tmp_path / part / label).mkdir(parents=True)
                Image.new(mode, (300, 260)).save(tmp_path / part / label / "0.png")
        workload = by_name("torchvision.ImageFolder", "torchvision.squeezenet1_1", f"data_dir={tmp_path}")
        assert workload.classes == 2
        assert [tuple(image.shape) for image, _ in workload.train] == [(3, 224, 224)] * 2
        assert [label for _, label in workload.test] == [0, 1]

    @pytest.mark.parametrize(
        ("data", "model", "complaint"),
        [
            (
                "torchvision.FashionMNIS",
                "torchvision.alexnet",
                "no data set 'FashionMNIS'; did you mean 'FashionMNIST'?",
            ),
            (
                "torchvision.FakeData",
                "torchvision.resnet1",
                "no classification model 'resnet1'; did you mean 'resnet18'?",
            ),
            ("torchvision.FakeData", "torchvision.googlenet", "googlenet has auxiliary outputs"),
            ("torchvision.EMNIST", "torchvision.alexnet", "torchvision's EMNIST has no plain training and test part"),
            ("torchvision.ImageFolder", "torchvision.alexnet", "ImageFolder was looked for in"),
            ("torchvision.FashionMNIST", "torchvision.alexnet", "D('nowhere', train=True, download=True)"),
        ],
    )
    def test_errors(self, data: str, model: str, complaint: str) -> None:
        with pytest.raises(ConfigError) as caught:
            by_name(data, model, "data_dir=nowhere")
        assert complaint in str(caught.value)


OWN_MODULE = """
import torch
from torch.utils.data import TensorDataset

class Points(TensorDataset):
    classes = ["near", "far"]

def build(data_dir):
    with open(f"{data_dir}/points") as file:
        points = torch.tensor([float(line) for line in file]).unsqueeze(1)
    return Points(points, (points[:, 0] > 1).long()), None

def unlabelled():
    return TensorDataset(torch.zeros(3, 1)), None

def single():
    return TensorDataset(torch.zeros(3, 1))

class Net(torch.nn.Linear):
    def __init__(self, num_classes):
        super().__init__(1, num_classes)

def fixed():
    return torch.nn.Linear(1, 2)

def number():
    return 3

constant = 3
"""


class TestImportPath:
    @pytest.fixture(autouse=True)
    def own_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "points").write_text("0.5\n1.5\n2.5\n")
        (tmp_path / "danaz_own").mkdir()
        (tmp_path / "danaz_own" / "__init__.py").touch()
        (tmp_path / "danaz_own" / "nets.py").write_text(OWN_MODULE)
        (tmp_path / "danaz_own" / "broken.py").write_text("import no_such_library\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        yield
        for name in [name for name in sys.modules if name.startswith("danaz_own")]:
            del sys.modules[name]

    def test_own_data_and_model(self, tmp_path: Path) -> None:
        workload = by_name("danaz_own.nets:build", "danaz_own.nets:Net", f"data_dir={tmp_path}")
        x, y = next(iter(DataLoader(workload.train, 3, collate_fn=collate)))
        assert (x.flatten().tolist(), y.tolist()) == ([0.5, 1.5, 2.5], [0, 1, 1])
        assert workload.model(x).shape == (3, 2)
        assert (workload.test, workload.classes) == (None, 2)

    def test_callables_take_only_what_they_name(self) -> None:
        assert by_name("torchvision.FakeData", "danaz_own.nets:fixed").model.out_features == 2

    @pytest.mark.parametrize(
        ("data", "model", "complaint"),
        [
            ("nets", "a:b", "data = 'nets': expected torchvision.<name> or package.module:name"),
            (
                "danaz_own.net:build",
                "a:b",
                "data = 'danaz_own.net:build': no module 'danaz_own.net' here or on PYTHONPATH",
            ),
            (
                "danaz_own.nets:biuld",
                "a:b",
                "data = 'danaz_own.nets:biuld': danaz_own.nets has no callable 'biuld'; did you mean 'build'?",
            ),
            ("danaz_own.nets:single", "a:b", "data = 'danaz_own.nets:single' returned TensorDataset, expected a tuple"),
            ("danaz_own.nets:unlabelled", "a:b", "data = 'danaz_own.nets:unlabelled': the training set should have an"),
            ("torchvision.FakeData", "a:b", "model = 'a:b': no module 'a' here or on PYTHONPATH"),
            (
                "torchvision.FakeData",
                "danaz_own.nets:number",
                "model = 'danaz_own.nets:number' returned int, expected a",
            ),
            ("torchvision.FakeData", "danaz_own.nets:constant", "danaz_own.nets has no callable 'constant'"),
        ],
    )
    def test_errors(self, data: str, model: str, complaint: str) -> None:
        with pytest.raises(ConfigError) as caught:
            by_name(data, model)
        assert complaint in str(caught.value)

    def test_a_module_that_fails_to_import_speaks_for_itself(self) -> None:
        with pytest.raises(ConfigError, match=r"broken\.py, line 1, fails .* No module named 'no_such_library'"):
            by_name("torchvision.FakeData", "danaz_own.broken:Net")
