"""The simulator trains with the optimizer that a config names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danaz.run.config import Config, load_config
from danaz.simulate.simulator import Simulation

QUADRATIC = Path(__file__).parents[2] / "configs" / "quadratic.yaml"


def config_of(*overrides: str) -> Config:
    return load_config(QUADRATIC, ["lr_schedule={warmup_epochs: 0}", *overrides])


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ("adagrad", lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.5)),
        ("adamw", lambda p: torch.optim.AdamW(p, 0.1, betas=(0.0, 0.9), weight_decay=0.1)),
    ],
)
def test_one_worker_equals_torch(optimizer, make, tmp_path):
    options = {"adagrad": "{lr_decay: 0.5}", "adamw": "{betas: [0.0, 0.9]}"}[optimizer]
    decay = 0.1 if optimizer == "adamw" else 0.0
    config = config_of(
        f"optimizer={optimizer}", f"optimizer_options={options}", f"weight_decay={decay}", "workers=1", "lr=0.1"
    )
    ours = Simulation(config, tmp_path / "run")
    model = Simulation(config, tmp_path / "other").model  # the same first parameters, for torch
    theirs, updates = make(model.parameters()), 20
    ours.start()
    ours.advance(updates)
    workload, batches = ours.workload, Simulation(config, tmp_path / "third").batches
    for number in range(updates):
        x, y = batches.take(number)
        theirs.zero_grad()
        workload.loss(model(x), y).backward()
        theirs.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(ours.server.master.params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        ((), 4.0),
        (("optimizer=adam",), 2.0),
        (("optimizer=adam", "lr_scaling=linear"), 4.0),
        (("lr_scaling=none",), 1.0),
    ],
)
def test_ssgd_scales_the_rate_as_asked(overrides, factor, tmp_path):
    simulation = Simulation(config_of("algorithm=ssgd", "workers=4", "lr=0.01", *overrides), tmp_path / "run")
    simulation.start()
    simulation.advance(8)
    assert simulation.server.master.shared_counts.rates == pytest.approx((0.01 * factor,))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("optimizer=adma",), "optimizer = 'adma' should be"),
        (("optimizer=adam", "optimizer_options={momentum: 0.9}"), "adam: .*unexpected keyword argument 'momentum'"),
        (("optimizer=adam", "optimizer_options={betas: [1.5, 0.9]}"), "adam: Invalid beta parameter"),
        (("optimizer=adam", "optimizer_options={lr: 1.0}"), "optimizer_options holds lr, which has a key of its own"),
        (("optimizer_options={nesterov: false}",), "optimizer_options are not for sgd.*set the key momentum"),
        (("optimizer=adam", "algorithm=ssgd-lars"), "ssgd-lars is a rule of SGD and cannot carry out adam"),
    ],
)
def test_what_does_not_fit_is_said(overrides, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        Simulation(config_of(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
