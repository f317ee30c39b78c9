"""The YAML of an experiment: which values are allowed, what the errors say, and what must agree across machines."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from danaz.options.option import newer_names
from danaz.run.config import Config, ConfigError, LrSchedule, load_config
from danaz.run.folder import write_settings
from danaz.run.rates import lr_at, scaling_factor, warmup_factor

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SHIPPED = [path for path in CONFIGS if "config" not in yaml.safe_load(path.read_text())]  # the others are comparisons
WRITTEN = {"a": 1000.0, "b": 0.5, "c": 1.0, "d": True, "e": "yes"}
MINIMAL = "workload: digits\nbatch_size: 32\nepochs: 4\nlr: 0.1\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


class TestLoading:
    def test_defaults_are_the_papers(self, path: Path) -> None:
        config = load_config(path)
        assert (config.name, config.momentum, config.weight_decay) == ("tiny", 0.9, 0.0)
        assert config.lr_schedule == LrSchedule(milestones=(), factor=0.1, warmup_epochs=5)
        assert (config.lr_correction, config.gap, config.precision) == (True, "on", "fp32")

    @pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
    def test_shipped_configs_are_valid(self, shipped: Path) -> None:
        assert load_config(shipped).name == shipped.stem

    def test_config_cannot_change_after_loading(self, path: Path) -> None:
        with pytest.raises(ValueError, match="frozen"):
            load_config(path).lr = 1.0  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("written", "read"), [("on", "on"), ("off", "off"), ("every:10", "every:10"), ("'off'", "off")]
    )
    def test_gap_takes_yamls_on_and_off(self, path: Path, written: str, read: str) -> None:
        path.write_text(MINIMAL + f"gap: {written}\n")
        assert load_config(path).gap == read
        assert load_config(path, [f"gap={written}"]).gap == read

    @pytest.mark.parametrize(
        ("override", "key", "value"),
        [
            ("weight_decay=1e-4", "weight_decay", 1e-4),  # a word in YAML 1.1
            ("hyperparameters.strength=1e-2", "hyperparameters", {"strength": 1e-2}),
            ("hyperparameters={a: +1E3, b: .5, c: 1., d: true, e: yes}", "hyperparameters", WRITTEN),
            ("batch_size=010", "batch_size", 10),  # 8
            ("batch_size=0x10", "batch_size", 16),
            ("augment=yes", "augment", True),
            ("augment=off", "augment", False),
            ("pipeline=on", "pipeline", True),
        ],
    )
    def test_a_value_is_what_it_looks_like(self, path: Path, override: str, key: str, value: object) -> None:
        assert getattr(load_config(path, [override]), key) == value


class TestOverrides:
    def test_every_field_can_be_set(self, path: Path) -> None:
        other = {
            "name": "other",
            "workload": None,
            "data": "torchvision.FakeData",
            "model": "torchvision.alexnet",
            "data_dir": "/d",
            "augment": True,
            "batch_size": 7,
            "epochs": 9,
            "seed": 3,
            "lr": 0.5,
            "momentum": -0.5,
            "weight_decay": 0.25,
            "lr_schedule": {"milestones": [1.5, 2.0], "factor": 0.5, "warmup_epochs": 0.0},
            "lr_correction": False,
            "algorithm": "ssgd",
            "workers": 12,
            "schedule": "round-robin",
            "sync_period": 2,
            "pipeline": True,
            "hyperparameters": {"strength": 0.5},
            "wire": "topk:0.25",
            "wire_view": "bf16",
            "wire_warmup_epochs": 1.5,
            "gap": "every:5",
            "precision": "bf16",
            "channels_last": True,
            "device": "cpu",
            "num_workers": 2,
            "threads": 2,
        }
        assert set(other) == set(Config.model_fields) - newer_names(Config)
        config = load_config(
            path, [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in other.items()]
        )
        assert config.model_dump(mode="json", exclude=newer_names(Config)) == other

    def test_dotted_key_reaches_into_a_mapping(self, path: Path) -> None:
        assert load_config(path, ["lr_schedule.factor=0.2"]).lr_schedule == LrSchedule(factor=0.2)

    def test_mapping_is_merged_into_the_files(self, path: Path) -> None:
        path.write_text(MINIMAL + "lr_schedule: {milestones: [1], warmup_epochs: 0}\n")
        config = load_config(path, ["lr_schedule={milestones: [2, 3], factor: 0.5}"])
        assert config.lr_schedule == LrSchedule(milestones=(2, 3), factor=0.5, warmup_epochs=0)

    def test_the_last_of_two_wins(self, path: Path) -> None:
        assert load_config(path, ["lr=1", "lr=2"]).lr == 2

    @pytest.mark.parametrize("override", ["lr", "=1", " = 1"])
    def test_override_without_key_or_value(self, path: Path, override: str) -> None:
        assert error_of(path, override) == f"--set {override}: expected key=value, for example --set lr=0.1"

    def test_override_into_a_number(self, path: Path) -> None:
        assert error_of(path, "lr.x=1") == "--set lr.x=1: lr = 0.1 holds no keys, so x cannot be set"

    def test_override_that_is_no_yaml(self, path: Path) -> None:
        assert error_of(path, "lr={").startswith("--set lr={: the value is not valid YAML: ")


class TestErrors:
    def test_unknown_key_suggests_the_nearest(self, path: Path) -> None:
        path.write_text(MINIMAL + "momentun: 0.9\n")
        expected = f"{path}: unknown key 'momentun' (= 0.9); did you mean 'momentum'? Known keys: algorithm, augment, "
        assert error_of(path).startswith(expected)

    def test_unknown_nested_key(self, path: Path) -> None:
        assert error_of(path, "lr_schedule.milestone=[1]") == (
            f"{path}, --set lr_schedule.milestone=[1]: unknown key 'lr_schedule.milestone' (= [1]); "
            "did you mean 'milestones'? Known keys: factor, milestones, warmup_epochs"
        )

    @pytest.mark.parametrize(
        ("override", "why"),
        [
            ("wire=1bit", "no codec '1bit' for pushes; there are fp32, bf16, fp16, onebit and topk:SHARE"),
            ("wire=topk:2", "after topk: write the share that is kept, above 0 and below 1: topk:0.01"),
            ("wire_view=onebit", "no codec 'onebit' for views; there are fp32, bf16, fp16"),
            ("wire_warmup_epochs=-1", "greater than or equal to 0"),
        ],
    )
    def test_codec(self, path: Path, override: str, why: str) -> None:
        assert why in error_of(path, override)

    def test_unknown_choice_suggests_the_nearest(self, path: Path) -> None:
        assert error_of(path, "schedule=roundrobin") == (
            f"{path}, --set schedule=roundrobin: schedule = 'roundrobin' should be one of round-robin, block-random, "
            "gamma, gamma-heterogeneous, constant:SPEED,SPEED,…, trace:RUN; did you mean 'round-robin'? "
            "(order of the workers in a simulation)"
        )

    def test_missing_key(self, path: Path) -> None:
        path.write_text("workload: digits\nbatch_size: 32\nepochs: 4\n")
        assert error_of(path) == f"{path}: the key 'lr' is missing (learning rate, as tuned on one worker)"

    @pytest.mark.parametrize(
        ("override", "complaint"),
        [
            ("workers=0", "workers = 0 should be greater than or equal to 1"),
            ("batch_size=0", "batch_size = 0 should be greater than or equal to 1"),
            ("batch_size=3.5", "batch_size = 3.5 should be a valid integer"),
            ("epochs=0", "epochs = 0 should be greater than or equal to 1"),
            ("epochs=true", "epochs = True should be a number, not true or false"),
            ("epochs=yes", "epochs = 'yes' should be a valid integer"),
            ("epochs=1:30", "epochs = '1:30' should be a valid integer"),
            ("epochs=100000000000", "epochs = 100000000000 should be less than or equal to 2147483647"),
            (
                "seed=18446744073709551616",
                "seed = 18446744073709551616 should be less than or equal to 922337203685477",
            ),
            ("workers=1000000000", "workers = 1000000000 should be less than or equal to 65536"),
            (
                "hyperparameters={alpha: {deep: 1}}",
                "hyperparameters.alpha = {'deep': 1} should be a number, a word, or",
            ),
            ("hyperparameters={alpha: null}", "hyperparameters.alpha = None should be a number, a word, or true or"),
            ("hyperparameters={alpha: .inf}", "hyperparameters.alpha = inf should be a finite number, of 64 bits at"),
            ("hyperparameters={alpha: 1e30}", "hyperparameters.alpha = 1e+30 should be a finite number, of 64 bits"),
            ("hyperparameters={1: 2}", "hyperparameters.1.[key] = 1 should be a valid string"),
            ("hyperparameters={alpha:0.1}", "hyperparameters.alpha:0.1 = None should be a number, a word, or true or"),
            ("hyperparameters=[1]", "hyperparameters = [1] should be a valid dictionary"),
            ("lr_schedule={1: 2}", "lr_schedule.1 = 1 Keys should be strings"),
            ("lr_schedule=1", "lr_schedule = 1 should be a valid dictionary"),
            ("lr_schedule.milestones={a: 1}", "lr_schedule.milestones = {'a': 1} should be a valid tuple"),
            ("augment={a: 1}", "augment = {'a': 1} should be a valid boolean"),
            ("sync_period={a: 1}", "sync_period = {'a': 1} should be a valid integer"),
            ("threads=[]", "threads = [] should be a valid integer"),
            ("device=[]", "device = [] should be 'auto', 'cpu' or 'cuda'"),
            ("wire=[]", "wire = [] should be a valid string"),
            ("gap={}", "gap = {} should be on, off or every:K with K >= 1"),
            ("lr=0", "lr = 0 should be greater than 0"),
            ("lr=.nan", "lr = nan should be a finite number"),
            ("lr=fast", "lr = 'fast' should be a valid number"),
            ("momentum=1", "momentum = 1 should be less than 1"),
            ("momentum=-1", "momentum = -1 should be greater than -1"),
            ("weight_decay=-0.1", "weight_decay = -0.1 should be greater than or equal to 0"),
            ("lr_schedule.milestones=[3, 2]", "lr_schedule.milestones = [3, 2] should be epochs above 0, each larger"),
            ("lr_schedule.milestones=[0, 2]", "lr_schedule.milestones = [0, 2] should be epochs above 0, each larger"),
            ("lr_schedule.milestones=[1, x]", "lr_schedule.milestones.1 = 'x' should be a valid number"),
            ("lr_schedule.factor=0", "lr_schedule.factor = 0 should be greater than 0"),
            ("lr_schedule.warmup_epochs=-1", "lr_schedule.warmup_epochs = -1 should be greater than or equal to 0"),
            ("gap=onn", "gap = 'onn' should be on, off or every:K with K >= 1; did you mean 'on'?"),
            ("gap=every:0", "gap = 'every:0' should be on, off or every:K with K >= 1"),
            ("name=a/b", "name = 'a/b' should match pattern"),
        ],
    )
    def test_bounds(self, path: Path, override: str, complaint: str) -> None:
        assert error_of(path, override).startswith(f"{path}, --set {override}: {complaint}")

    def test_one_error_lists_all_problems(self, path: Path) -> None:
        assert len(error_of(path, "lr=0", "epochs=0").splitlines()) == 2

    @pytest.mark.parametrize(
        ("overrides", "found"),
        [
            (["model=a:b"], "workload = 'digits', model = 'a:b'"),
            (["workload=null", "data=a:b"], "data = 'a:b'"),
            (["workload=null"], "none of the three"),
        ],
    )
    def test_workload_or_data_and_model(self, path: Path, overrides: list[str], found: str) -> None:
        message = f"{path}: give either the key workload, or both data and model; found {found}"
        assert error_of(path, *overrides) == message

    def test_missing_file_suggests_a_neighbour(self, path: Path) -> None:
        wrong = path.with_name("tinny.yaml")
        assert error_of(wrong) == f"{wrong}: no such config file; did you mean '{path}'?"

    @pytest.mark.parametrize(
        "text",
        ["{[1, 2]: 3}", "? {a: 1}\n: 2\n", "lr: " + "[" * 10_000, "!!int x", "lr: !!timestamp x", "lr: " + "9" * 5000],
    )
    def test_yaml_that_makes_no_plain_value(self, path: Path, text: str) -> None:
        path.write_text(text)
        assert error_of(path).startswith(f"{path}: not valid YAML: ")
        assert error_of(path).count("9") < 100

    def test_an_error_shows_a_huge_value_in_one_line(self, path: Path) -> None:
        path.write_text(MINIMAL + f"momentun: {[list(range(100))] * 100}\n")
        assert len(error_of(path)) < 1000

    def test_the_error_for_a_script_says_how_to_start_it(self, path: Path) -> None:
        script = path.with_name("train.py")
        for text in ("import danaz\nfor epoch in danaz.epochs(3):\n    pass\n", "import danaz\n"):
            script.write_text(text)
            assert error_of(script).endswith(f"start it by: danaz launch -- python {script}")

    def test_an_option_is_named_as_it_was_typed(self, path: Path) -> None:
        with pytest.raises(ConfigError, match="--sync-period 0: sync_period = 0 should be greater"):
            load_config(path, options={"sync_period": 0})
        assert load_config(path, ["algorithm=ssgd"], {"algorithm": "on"}).algorithm == "on"

    @pytest.mark.parametrize("text", ["", "- lr\n", "lr\n", "1: 2\n"])
    def test_file_that_is_no_mapping(self, path: Path, text: str) -> None:
        path.write_text(text)
        assert "expected a mapping of keys to values" in error_of(path)

    def test_file_that_is_no_yaml(self, path: Path) -> None:
        path.write_text("lr: [1\n")
        assert error_of(path).startswith(f"{path}: not valid YAML: ")

    def test_key_given_twice(self, path: Path) -> None:
        path.write_text(MINIMAL + "lr: 0.2\n")
        assert error_of(path) == f"{path}: not valid YAML: key 'lr' stands twice, in lines 4 and 5"


class TestDigest:
    def test_order_of_the_keys_does_not_matter(self, path: Path) -> None:
        digest = load_config(path).digest()
        path.write_text("".join(reversed(MINIMAL.splitlines(keepends=True))))
        assert load_config(path).digest() == digest
        assert len(digest) == 64

    @pytest.mark.parametrize("local", ["data_dir=/elsewhere", "num_workers=4", "threads=2", "name=other", "gap=off"])
    def test_blind_to_what_may_differ_between_machines(self, path: Path, local: str) -> None:
        assert load_config(path, [local]).digest() == load_config(path).digest()

    @pytest.mark.parametrize("shared", ["lr=0.2", "seed=1", "workers=2", "algorithm=asgd", "lr_schedule.factor=0.5"])
    def test_sees_what_must_agree(self, path: Path, shared: str) -> None:
        assert load_config(path, [shared]).digest() != load_config(path).digest()


class TestSaving:
    @pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
    def test_round_trip(self, shipped: Path, tmp_path: Path) -> None:
        config = load_config(shipped)
        write_settings(tmp_path, config.model_dump(mode="json"))
        again = load_config(tmp_path / "config.yaml")
        assert again == config
        assert again.digest() == config.digest()


class TestRates:
    def test_steps(self, path: Path) -> None:
        config = load_config(path, ["lr=0.1", "lr_schedule={milestones: [2, 3.5], factor: 0.5}"])
        epochs = [0, 1.999, 2, 3.499, 3.5, 100]
        assert [lr_at(config, epoch) for epoch in epochs] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]

    @pytest.mark.parametrize(
        ("scaling", "of_sgd", "of_adam"), [("auto", 16, 4), ("linear", 16, 16), ("sqrt", 4, 4), ("none", 1, 1)]
    )
    def test_large_batches_scale_the_rate(self, scaling: str, of_sgd: float, of_adam: float) -> None:
        assert scaling_factor(scaling, 16, is_adaptive=False) == of_sgd
        assert scaling_factor(scaling, 16, is_adaptive=True) == of_adam

    def test_warm_up_ends_of_the_ramp(self) -> None:
        assert warmup_factor(0, workers=8, warmup_epochs=5) == 1 / 8
        assert warmup_factor(2.5, workers=8, warmup_epochs=5) == pytest.approx((1 / 8 + 1) / 2)
        assert warmup_factor(5, workers=8, warmup_epochs=5) == 1
        assert warmup_factor(160, workers=8, warmup_epochs=5) == 1

    def test_one_worker_and_no_epochs_have_none(self) -> None:
        assert warmup_factor(0, workers=1, warmup_epochs=5) == 1
        assert warmup_factor(0, workers=8, warmup_epochs=0) == 1

    @given(st.floats(0, 200), st.floats(0, 200), st.integers(1, 256), st.floats(0, 20))
    def test_warm_up_never_falls(self, epoch: float, later: float, workers: int, warmup_epochs: float) -> None:
        epoch, later = sorted((epoch, later))
        factor = warmup_factor(epoch, workers, warmup_epochs)
        assert 1 / workers <= factor <= warmup_factor(later, workers, warmup_epochs) <= 1
