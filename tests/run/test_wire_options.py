"""Compressed pushes and views: what server and workers see, and which settings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from danaz.cli.main import app
from danaz.protocol.messages import Parameters, Push
from danaz.run.config import load_config
from danaz.run.fit import UnfitError, check_workers
from danaz.run.settings import Settings
from danaz.simulate.simulator import Simulation, simulate

QUADRATIC = Path(__file__).parents[2] / "configs" / "quadratic.yaml"
SIZE = 1000


def settings_of(*overrides: str, live: bool = False) -> Settings:
    config = load_config(QUADRATIC, overrides)
    return Settings.of(config, schedule="live" if live else config.schedule, collective="none")


def simulation(run: Path, *overrides: str) -> Simulation:
    run.mkdir(exist_ok=True)
    return Simulation(load_config(QUADRATIC, ["workers=3", "epochs=1", "threads=1", *overrides]), run)


def overheard(simulated: Simulation) -> list[Any]:
    """Return a list that collects each message to the server of a simulation, and each view that it sends."""
    heard: list[Any] = []
    handle = simulated.server.handle

    def listen(route: Any, message: Any, now: float) -> Any:
        kept = message.push.clone() if isinstance(message, Push) else None  # the server uses it as scratch
        replies = handle(route, message, now)
        heard.append((message, kept))
        heard.extend((reply, reply.view.clone()) for _, reply in replies if isinstance(reply, Parameters))
        return replies

    simulated.server.handle = listen  # type: ignore[method-assign]
    return heard


class TestSimulated:
    def test_the_server_applies_what_the_bytes_of_a_push_say(self, tmp_path):
        from danaz.vectors.codecs import push_codec

        simulated = simulation(tmp_path, "wire=onebit")
        heard = overheard(simulated)
        simulated.start()
        simulated.advance(20)
        pushes = [(message, push) for message, push in heard if isinstance(message, Push)]
        assert len(pushes) == 20
        for message, push in pushes:
            decoded = torch.empty(SIZE)
            push_codec(message.encoded.codec).decode(message.encoded.chunks[0], decoded)
            assert torch.equal(decoded, push)
            assert len(push.unique()) <= 4, "two means for each of two blocks"

    @pytest.mark.parametrize("codec", ["bf16", "fp16"])
    def test_worker_and_server_know_the_same_view(self, tmp_path, codec):
        """The gap is measured on the view that the worker computes on."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[codec]
        simulated = simulation(tmp_path, f"wire_view={codec}", "algorithm=dana-ga")
        heard = overheard(simulated)
        simulated.start()
        simulated.advance(20)
        views = [(reply, view) for reply, view in heard if isinstance(reply, Parameters)]
        assert any(view.any() for _, view in views)
        for _, view in views:
            assert torch.equal(view, view.to(dtype).float())
        for number, worker in enumerate(simulated.workers):
            kept = simulated.server.members[number].view
            assert kept is not None
            at = torch.empty(SIZE)
            worker.core.compute_on(at)
            assert torch.equal(kept, at)
        master = simulated.server.master.params
        assert not torch.equal(master, master.to(dtype).float()), "the server's own parameters keep all digits"

    def test_bytes_in_the_summary(self, tmp_path):
        for row, push, view in (
            (["wire=fp32"], 4 * SIZE, 4 * SIZE),
            (["wire=bf16", "wire_view=fp16"], 2 * SIZE, 2 * SIZE),
            (["wire=onebit"], 2 * 8 + SIZE // 8, 4 * SIZE),
        ):
            summary = simulation(tmp_path / row[0], *row).run()
            assert summary["push_bytes_per_update"] == push
            # A view for each update, one for each join, and one or two to say that it is over.
            assert view <= summary["view_bytes_per_update"] <= view * (1 + 10 / summary["updates"])

    def test_the_first_epochs_are_not_compressed(self, tmp_path):
        simulated = simulation(tmp_path, "wire=onebit", "epochs=4", "wire_warmup_epochs=2")
        heard = overheard(simulated)
        simulated.run()
        pushes = [message for message, _ in heard if isinstance(message, Push)]
        first = next(number for number, push in enumerate(pushes) if push.encoded)
        assert len(pushes) / 2 <= first <= len(pushes) / 2 + 3, "one more for each worker, whose view is older"
        assert all(push.encoded for push in pushes[first + 2 :])

    def test_the_seed_decides_every_bit(self, tmp_path):
        runs = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            config = load_config(QUADRATIC, ["workers=4", "epochs=1", "threads=1", "wire=topk:0.1", "wire_view=bf16"])
            simulate(config, tmp_path / name)
            runs.append((tmp_path / name / "parameters.safetensors").read_bytes())
        assert runs[0] == runs[1]

    @pytest.mark.parametrize(
        "algorithm", ["dana", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dana-zero", "asgd", "ssgd"))]
    )
    def test_the_loss_falls_as_fast_as_without_compression(self, tmp_path, algorithm):
        """Error feedback: without it, top-k of one in ten would leave most coordinates where they were."""
        losses = {}
        for wire in ("fp32", "bf16", "onebit", "topk:0.1"):
            sets = (f"wire={wire}", f"algorithm={algorithm}", "epochs=10", "lr=0.005", "workers=2")
            losses[wire] = simulation(tmp_path / wire, *sets).run()["final_train_loss"]
        for wire, loss in losses.items():
            assert loss == pytest.approx(losses["fp32"], rel=0.03), wire


class TestRefused:
    @pytest.mark.parametrize("algorithm", ["easgd", "eamsgd", "model-averaging", "bmuf"])
    @pytest.mark.parametrize("override", ["wire=bf16", "wire=onebit", "wire_view=bf16"])
    def test_a_model_is_not_rounded(self, algorithm, override):
        with pytest.raises(UnfitError, match=rf"{algorithm} cannot train with .* its workers push parameters"):
            check_workers(settings_of(f"algorithm={algorithm}", override))

    def test_all_reduce_has_no_server_to_send_to(self):
        with pytest.raises(UnfitError, match="ssgd has no use for wire onebit and wire_view bf16"):
            check_workers(settings_of("algorithm=ssgd", "wire=onebit", "wire_view=bf16", live=True))
        check_workers(settings_of("algorithm=ssgd", "wire=onebit"))  # the simulated one has

    @pytest.mark.parametrize("algorithm", ["dana", "asgd", "dana-ga", "nag-asgd"])
    def test_others_are_not_refused(self, algorithm):
        check_workers(settings_of(f"algorithm={algorithm}", "wire=topk:0.01", "wire_view=bf16", live=True))

    def test_every_algorithm_takes_fp32(self):
        check_workers(settings_of("algorithm=easgd", "wire=fp32", "wire_view=fp32"))


class TestCommand:
    def test_options_of_simulate(self, tmp_path):
        run = tmp_path / "run"
        options = "--wire onebit --wire-view bf16 --sync-period 2 -n 2 --set epochs=1 --set threads=1"
        result = CliRunner().invoke(app, ["simulate", str(QUADRATIC), *options.split(), "--out", str(run)])
        assert result.exit_code == 0, result.output
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config["wire"], config["wire_view"], config["sync_period"]) == ("onebit", "bf16", 2)
        assert len((run / "updates.jsonl").read_text().splitlines()) == 50

    def test_a_codec_that_the_algorithm_cannot_use_ends_the_command(self, tmp_path):
        options = ["-a", "easgd", "--wire", "onebit", "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(app, ["simulate", str(QUADRATIC), *options])
        assert result.exit_code != 0
        assert "its workers push parameters" in " ".join(result.output.split())
        assert not (tmp_path / "run").exists()
