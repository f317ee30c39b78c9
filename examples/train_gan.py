"""A GAN: a generator and a critic, each with its own optimizer, which take turns on every batch.

    python examples/train_gan.py                                                          # alone
    danaz launch --hosts localhost:4 --workers-per-host 2 --algorithm dana -- python examples/train_gan.py
    danaz launch --hosts localhost:4 --algorithm ssgd -- python examples/train_gan.py     # synchronous

The data are points around eight places on a circle. A GAN that fails covers only some of them.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import danaz.torch as danaz

NOISE = 8  # numbers that the generator makes a point of


def draw_points(count: int, generator: torch.Generator) -> Tensor:
    """Return points of the data, f32[count, 2]."""
    angles = torch.randint(8, (count,), generator=generator) * (2 * math.pi / 8)
    places = torch.stack([angles.cos(), angles.sin()], dim=1)
    return places + 0.1 * torch.randn(count, 2, generator=generator)


def make_net(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, 64), nn.LeakyReLU(0.2)), *(nn.Linear(64, 64), nn.LeakyReLU(0.2)), nn.Linear(64, outputs)
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return how far two samples are apart: 0 if they come from one distribution (Székely and Rizzo, 2013)."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    danaz.init()
    torch.set_num_threads(1)  # the nets are tiny
    device = danaz.device()

    points = draw_points(6400, torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(points), batch_size=128, shuffle=True)
    torch.manual_seed(0)
    generator, critic = make_net(NOISE, 2).to(device), make_net(2, 1).to(device)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=options.lr, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=options.lr, betas=(0.5, 0.9))
    generator_optimizer = danaz.DistributedOptimizer(generator_optimizer, generator)
    critic_optimizer = danaz.DistributedOptimizer(critic_optimizer, critic)

    test = draw_points(1000, torch.Generator().manual_seed(2)).to(device)
    noise_of_test = torch.randn(1000, NOISE, generator=torch.Generator().manual_seed(3)).to(device)
    torch.manual_seed(100 * danaz.worker_id() + danaz.rank())  # each rank draws noise of its own
    for epoch in danaz.epochs(options.epochs):
        for (real,) in danaz.shard(loader, epoch):
            real = real.to(device)
            made = generator(torch.randn(len(real), NOISE, device=device))

            critic_optimizer.zero_grad()
            critic_loss = softplus(-critic(real)).mean() + softplus(critic(made.detach())).mean()
            critic_loss.backward()
            critic_optimizer.step()

            generator_optimizer.zero_grad()
            generator_loss = softplus(-critic(made)).mean()
            generator_loss.backward()
            generator_optimizer.step(loss=generator_loss)
        if danaz.is_main():
            with torch.no_grad():
                distance = energy_distance(generator(noise_of_test), test)
            print(f"epoch {epoch + 1}: the points made are {distance:.4f} away from the data", flush=True)

    if danaz.is_main():
        with torch.no_grad():
            distance = energy_distance(generator(noise_of_test), test)
        danaz.report(energy_distance=distance)
        print(f"trained: {distance:.4f} away from the data", flush=True)


if __name__ == "__main__":
    main()
