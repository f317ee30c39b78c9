"""Train on handwritten digits: an ordinary PyTorch script, which trains the same model alone and on a cluster.

python examples/train_digits.py
danaz launch --hosts localhost:2 --algorithm ssgd -- python examples/train_digits.py
danaz launch --hosts localhost:4 --workers-per-host 2 --algorithm dana -- python examples/train_digits.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import danaz.torch as danaz

parser = argparse.ArgumentParser(description="Train a small convolutional net on scikit-learn's digits.")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--save", default="digits.pt", help="file for the trained model")
options = parser.parse_args()

danaz.init()
torch.manual_seed(0)
torch.set_num_threads(1)  # the net is tiny
device = danaz.device()

digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # f32[1797, 1, 8, 8]
train, test = random_split(TensorDataset(images, torch.from_numpy(digits.target)), [0.8, 0.2])
loader = DataLoader(train, batch_size=32, shuffle=True)

first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
second = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32 * 2 * 2, 10)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
optimizer = danaz.DistributedOptimizer(optimizer, model)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)

for epoch in danaz.epochs(options.epochs):
    for x, y in danaz.shard(loader, epoch):
        optimizer.zero_grad()
        loss = cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step(loss=loss)
    scheduler.step()

if danaz.is_main():
    model.eval()
    x, y = next(iter(DataLoader(test, batch_size=len(test))))
    with torch.no_grad():
        accuracy = (model(x.to(device)).argmax(1).cpu() == y).double().mean().item()
    torch.save(model.state_dict(), options.save)
    danaz.report(test_error_percent=100 * (1 - accuracy))
    print(f"test accuracy {accuracy:.2%}; the model is in {options.save}")
