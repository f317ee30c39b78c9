"""The data and the model that a config names: torchvision's (``torchvision.X``), or yours (``package.module:name``).

Your own model is any callable that returns a module. It is given ``num_classes`` if it has such a parameter. Your own
data is a callable that returns ``(train, test)``, which are two map-style data sets; ``test`` may be None. It is given
``data_dir`` if it has such a parameter. The training set names its classes in ``classes``, or their number in
``num_classes``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms import v2

from danaz.files.user_module import UserModuleError, import_user_name
from danaz.run.config import Config, ConfigError, suggest
from danaz.workloads.base import Workload
from danaz.workloads.images import Augmentation, ImageTensors
from danaz.workloads.torchvision_data import load, pixels

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_by_name(config: Config) -> Workload:
    """Build the workload that the keys ``data`` and ``model`` name.

    Raises:
        ConfigError: one of them is unknown, or is not what it should be.
    """
    assert config.data is not None
    assert config.model is not None
    if config.data.startswith("torchvision."):
        train, test, classes = _torchvision_data(config.data.removeprefix("torchvision."), config)
    else:
        train, test, classes = _own_data(config.data, config)
    if config.model.startswith("torchvision."):
        model = _torchvision_model(config.model.removeprefix("torchvision."), classes)
    else:
        model = _own_model(config.model, classes)
    return Workload(model, train, test, F.cross_entropy, classes)


def _torchvision_data(name: str, config: Config) -> tuple[Any, Any | None, int]:
    """Load a data set of torchvision.

    If torchvision holds the images in memory, they stay there as bytes. Other images are read one by one and cropped to
    224 x 224.
    """
    train, test = load(name, config.data_dir)
    classes = _number_of_classes(train, "data = torchvision." + name)
    in_memory = pixels(train)
    if in_memory is None:
        train.transform = _read_image(augment=bool(config.augment))
        if test is not None:
            test.transform = _read_image(augment=False)
        return train, test, classes
    images, labels = in_memory
    mean, std = _channel_statistics(images)
    augmentation = Augmentation(padding=images.shape[2] // 8, flip=True) if config.augment else None
    held_out = pixels(test) if test is not None else None
    return (
        ImageTensors(images, labels, mean, std, augmentation=augmentation),
        ImageTensors(*held_out, mean, std) if held_out else None,
        classes,
    )


def _read_image(augment: bool) -> v2.Compose:
    cut = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()] if augment else [v2.Resize(256), v2.CenterCrop(224)]
    to_tensor = [v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*cut, *to_tensor, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def _channel_statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return means and deviations of three channels, as fractions of white; a grey channel's come three times."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)  # f64[C, 256]: the histogram of each channel
    values = torch.arange(256) / 255
    mean = shares @ values.double()
    std = (shares @ values.double().square() - mean.square()).sqrt()
    return mean.expand(3).tolist(), std.expand(3).tolist()


def _torchvision_model(name: str, classes: int) -> nn.Module:
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"model: torchvision has no classification model {name!r}{suggest(name, known)}")
    if name in ("googlenet", "inception_v3"):
        raise ConfigError(
            f"model: {name} has auxiliary outputs besides the classes; wrap it in a module of your own that "
            "returns the classes alone"
        )
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return model


def _own_data(spec: str, config: Config) -> tuple[Any, Any | None, int]:
    built = _call(_imported(spec, "data"), data_dir=config.data_dir)
    if not isinstance(built, tuple) or len(built) != 2:
        raise ConfigError(f"data = {spec!r} returned {type(built).__name__}, expected a tuple (train, test)")
    train, test = built
    if not (hasattr(train, "__getitem__") and hasattr(train, "__len__")):
        raise ConfigError(
            f"data = {spec!r} returned {type(train).__name__} as the training set, expected a map-style data set with "
            "__len__ and __getitem__"
        )
    return train, test, _number_of_classes(train, f"data = {spec!r}")


def _own_model(spec: str, classes: int) -> nn.Module:
    model = _call(_imported(spec, "model"), num_classes=classes)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model = {spec!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _number_of_classes(dataset: Any, what: str) -> int:
    if hasattr(dataset, "classes"):
        return len(dataset.classes)
    if hasattr(dataset, "num_classes"):
        return int(dataset.num_classes)
    if in_memory := pixels(dataset):
        return int(in_memory[1].max()) + 1
    raise ConfigError(f"{what}: the training set should have an attribute classes (a list) or num_classes (a number)")


def _imported(spec: str, key: str) -> Callable[..., Any]:
    if ":" not in spec:
        raise ConfigError(f"{key} = {spec!r}: expected torchvision.<name> or package.module:name")
    try:
        return import_user_name(spec, f"{key} = {spec!r}")
    except UserModuleError as error:
        raise ConfigError(str(error)) from None


def _call(function: Callable[..., Any], **offered: Any) -> Any:
    """Call ``function`` with only those ``offered`` arguments that it has parameters for."""
    parameters = inspect.signature(function).parameters
    return function(**{name: value for name, value in offered.items() if name in parameters})
