import logging
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_bayes.callbacks import LaplaceEvidence, SGDNoiseScale
from lightning_bayes.callbacks.trainer.settings import read_configuration
from lightning_bayes.functional import AdamConfiguration, sgd_noise_scale
from tests.refusals import refuses
from tests.scenarios import (
    Classifier,
    Stream,
    plain_sgd,
    shuffled,
    trainer,
    two_classes,
    two_groups,
    with_lambda,
)

# Lightning keeps logged values in float32.
FLOAT32 = 1e-6


class Recorder(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.logged = []

    @property
    def name(self):
        return "recorder"

    @property
    def version(self):
        return 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))

    def values(self, key):
        return [(step, metrics[key]) for step, metrics in self.logged if key in metrics]


def fit(tmp_path, optimizers=None, data=None, callback=None, extra=(), **kwargs):
    recorder = Recorder()
    callback = callback or SGDNoiseScale()
    run = trainer(tmp_path, [*extra, callback], logger=recorder, **kwargs)
    run.fit(Classifier(optimizers), shuffled() if data is None else data)
    return run, recorder


def test_value_by_hand(tmp_path):
    # 0.1 * (100/10 - 1) * (1 - 0.5) / (1 - 0.9) = 4.5
    run, recorder = fit(tmp_path, plain_sgd(momentum=0.9, dampening=0.5), max_epochs=2)
    assert [value for _, value in recorder.values("bayes/noise_scale")] == pytest.approx(
        [4.5, 4.5], rel=FLOAT32
    )
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(4.5, rel=FLOAT32)


def test_dampening_without_momentum_is_ignored_as_torch_does(tmp_path):
    run, _ = fit(tmp_path, plain_sgd(dampening=0.5))
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.9, rel=FLOAT32)


def test_incomplete_last_batch_leaves_n_and_b(tmp_path):
    run, _ = fit(tmp_path, data=shuffled(size=95))
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.1 * 8.5, rel=FLOAT32)


def test_prefix(tmp_path):
    run, _ = fit(tmp_path, callback=SGDNoiseScale(log_key_prefix="x/"))
    assert "x/noise_scale" in run.callback_metrics


@pytest.mark.parametrize("logger", [True, False])
def test_epoch_schedule_reports_the_last_step_of_the_epoch(tmp_path, logger):
    # The schedule moves on before `on_train_epoch_end`: the value must still be the finished epoch's.
    seen = []

    class Collect(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["bayes/noise_scale"]))

    callback = SGDNoiseScale()
    run = trainer(tmp_path, [callback, Collect()], max_epochs=3, logger=Recorder() if logger else False)
    run.fit(Classifier(with_lambda("epoch", lambda epoch: 0.5**epoch)), shuffled())
    assert seen == pytest.approx([0.9, 0.45, 0.225], rel=FLOAT32)


def test_step_schedule_and_step_logging(tmp_path):
    def ramp(step):
        return step / 10

    _, recorder = fit(
        tmp_path,
        with_lambda("step", ramp),
        callback=SGDNoiseScale(logging_interval="step"),
        log_every_n_steps=5,
        max_epochs=2,
    )
    # Steps 4, 9, 14, 19 are due; learning rate 0.1 * step/10 and N/B - 1 = 9. The epoch's value is that of steps
    # 9 and 19, once more.
    expected = [(4, 0.36), (9, 0.81), (9, 0.81), (14, 1.26), (19, 1.71), (19, 1.71)]
    found = recorder.values("bayes/noise_scale")
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=FLOAT32)


def test_warm_up_from_zero_logs_zero(tmp_path):
    _, recorder = fit(
        tmp_path,
        with_lambda("step", lambda step: min(1.0, step / 10)),
        callback=SGDNoiseScale(logging_interval="step"),
    )
    assert recorder.values("bayes/noise_scale")[0] == (0, 0.0)


def test_accumulation(tmp_path):
    run, _ = fit(tmp_path, accumulate_grad_batches=4)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(
        0.1 * (100 / 40 - 1), rel=FLOAT32
    )


def test_accumulation_schedule(tmp_path):
    _, recorder = fit(tmp_path, extra=[GradientAccumulationScheduler({0: 1, 1: 5})], max_epochs=2)
    found = [value for _, value in recorder.values("bayes/noise_scale")]
    assert found == pytest.approx([0.9, 0.1], rel=FLOAT32)


def test_step_logging_under_accumulation_counts_optimizer_steps(tmp_path):
    _, recorder = fit(
        tmp_path,
        callback=SGDNoiseScale(logging_interval="step"),
        accumulate_grad_batches=5,
        log_every_n_steps=1,
    )
    assert [step for step, _ in recorder.values("bayes/noise_scale")] == [0, 1, 1]


def test_accumulation_beyond_the_epoch_is_full_batch(tmp_path):
    with pytest.warns(UserWarning, match="every step is full batch"):
        run, _ = fit(tmp_path, accumulate_grad_batches=16)
    assert float(run.callback_metrics["bayes/noise_scale"]) == 0.0


def test_equal_groups_have_one_key(tmp_path):
    run, _ = fit(tmp_path, two_groups({}, {"weight_decay": 0.1}))
    assert [key for key in run.callback_metrics if "noise" in key] == ["bayes/noise_scale"]


def test_different_groups_have_a_key_each(tmp_path):
    run, _ = fit(tmp_path, two_groups({"lr": 0.2}, {"name": "head"}))
    found = {key: float(value) for key, value in run.callback_metrics.items() if "noise" in key}
    assert found == pytest.approx(
        {"bayes/noise_scale-SGD/pg1": 1.8, "bayes/noise_scale-SGD/head": 0.9}, rel=FLOAT32
    )


def test_groups_that_part_stay_parted(tmp_path):
    def configure(module):
        optimizer = two_groups({}, {})(module)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda e: 1.0, lambda e: 0.5 if e == 1 else 1.0]
        )
        return [optimizer], [schedule]

    _, recorder = fit(tmp_path, configure, max_epochs=3)
    assert len(recorder.values("bayes/noise_scale")) == 1
    found = [value for _, value in recorder.values("bayes/noise_scale-SGD/pg2")]
    assert found == pytest.approx([0.45, 0.9], rel=FLOAT32)


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam]
)
def test_adam_like_optimizers_get_their_own_quantity(tmp_path, kind, caplog):
    with caplog.at_level(logging.INFO):
        run, _ = fit(tmp_path, lambda module: kind(module.parameters(), lr=0.1))
    keys = [key for key in run.callback_metrics if "noise" in key]
    assert keys == ["bayes/adam_noise_scale"]
    assert float(run.callback_metrics["bayes/adam_noise_scale"]) == pytest.approx(0.1 / 10**0.5, rel=FLOAT32)
    said = [record.message for record in caplog.records if "does not describe" in record.message]
    assert len(said) == 1 and kind.__name__ in said[0]


def test_adam_configuration_is_read(tmp_path):
    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.found = read_configuration(trainer).groups

    look = Look()

    def optimizer(module):
        return torch.optim.RMSprop(module.parameters(), lr=0.1, alpha=0.95, momentum=0.9)

    trainer(tmp_path, [look]).fit(Classifier(optimizer), shuffled())
    assert look.found[0].name == "RMSprop"
    assert look.found[0].configuration == AdamConfiguration(0.1, 10, (0.95,), 1e-8, 100)


class PlainDescent(torch.optim.Optimizer):
    def __init__(self, parameters, **defaults):
        super().__init__(parameters, defaults)

    def step(self, closure=None):
        return closure()


def test_unknown_optimizers_are_announced(tmp_path):
    with pytest.warns(UserWarning, match="PlainDescent is not torch.optim.SGD.*without momentum"):
        run, _ = fit(tmp_path, lambda module: PlainDescent(module.parameters(), lr=0.1))
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.9, rel=FLOAT32)
    with pytest.warns(UserWarning, match="taken to be SGD with momentum"):
        run, _ = fit(tmp_path, lambda module: PlainDescent(module.parameters(), lr=0.1, momentum=0.5))
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(1.8, rel=FLOAT32)
    with pytest.warns(UserWarning, match="taken to be Adam-like"):
        run, _ = fit(tmp_path, lambda module: PlainDescent(module.parameters(), lr=0.1, betas=(0.9, 0.99)))
    assert "bayes/adam_noise_scale" in run.callback_metrics


@pytest.mark.parametrize(
    ("optimizers", "subject"),
    [
        (lambda module: torch.optim.LBFGS(module.parameters()), "LBFGS"),
        (lambda module: PlainDescent(module.parameters(), step_length=0.1), "to have an `lr`"),
    ],
)
def test_optimizers_without_a_noise_scale(tmp_path, optimizers, subject):
    with refuses(subject, remedy="emove the callback"):
        fit(tmp_path, optimizers, callback=SGDNoiseScale(on_error="raise"))


def test_several_loaders(tmp_path):
    with refuses("one training dataloader", remedy=("2", "emove the callback")):
        fit(tmp_path, data={"a": shuffled(), "b": shuffled()}, callback=SGDNoiseScale(on_error="raise"))


def test_outside_of_fit():
    with refuses("training dataloader"):
        read_configuration(L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False))


def test_iterable_dataset_needs_its_size(tmp_path):
    stream = DataLoader(Stream(two_classes()), batch_size=10)
    with refuses("length", remedy="`dataset_size=`"):
        fit(tmp_path, data=stream, callback=SGDNoiseScale(on_error="raise"))
    run, _ = fit(tmp_path, data=stream, callback=SGDNoiseScale(dataset_size=200))
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.1 * 19, rel=FLOAT32)


def test_batch_size_none_names_the_remedy(tmp_path):
    batches = [two_classes()[:10] for _ in range(10)]
    with refuses("batch_size=None", remedy="Pass `batch_size=` to the DataLoader"):
        fit(tmp_path, data=DataLoader(batches, batch_size=None), callback=SGDNoiseScale(on_error="raise"))


def test_batch_sampler(tmp_path):
    sampler = BatchSampler(RandomSampler(two_classes()), batch_size=20, drop_last=False)
    run, _ = fit(tmp_path, data=DataLoader(two_classes(), batch_sampler=sampler))
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.4, rel=FLOAT32)


def test_batch_sampler_without_batch_size(tmp_path):
    batches = [list(range(start, start + 10)) for start in range(0, 100, 10)]
    with refuses("list without `batch_size`", remedy="batch_size"):
        fit(
            tmp_path,
            data=DataLoader(two_classes(), batch_sampler=batches),
            callback=SGDNoiseScale(on_error="raise"),
        )


def test_subset_sampler_is_the_training_set(tmp_path):
    data = DataLoader(two_classes(), batch_size=10, sampler=SubsetRandomSampler(range(50)))
    run, _ = fit(tmp_path, data=data)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.4, rel=FLOAT32)


def test_sampling_with_replacement_is_announced(tmp_path):
    sampler = WeightedRandomSampler([1.0] * 100, 100)
    with pytest.warns(UserWarning, match="with replacement"):
        fit(tmp_path, data=DataLoader(two_classes(), batch_size=10, sampler=sampler))


def test_own_sampler_of_another_length_is_announced(tmp_path):
    with pytest.warns(
        UserWarning, match="list draws 40 examples an epoch from a dataset of 100, of which 40"
    ):
        run, _ = fit(tmp_path, data=DataLoader(two_classes(), batch_size=10, sampler=list(range(40))))
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.3, rel=FLOAT32)


class Drawn:
    """A sampler of somebody's own: `draws` random examples, from torch's global generator."""

    reads = 0

    def __init__(self, draws, copied=True):
        self.draws, self.copied = draws, copied

    def __len__(self):
        return self.draws

    def __iter__(self):
        Drawn.reads += 1
        return iter(torch.randperm(100)[: self.draws].tolist())

    def __deepcopy__(self, memo):
        if not self.copied:
            raise TypeError("cannot pickle")
        return Drawn(self.draws)


def test_own_sampler_that_cannot_be_copied_has_the_whole_dataset(tmp_path):
    data = DataLoader(two_classes(), batch_size=10, sampler=Drawn(40, copied=False))
    with pytest.warns(UserWarning, match="a dataset of 100, of which 100 are taken as the training set"):
        run, _ = fit(tmp_path, data=data)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.9, rel=FLOAT32)


def test_examples_are_counted_once_per_loader_without_drawing_random_numbers(tmp_path):
    def run(callbacks):
        L.seed_everything(7, verbose=False)
        model, Drawn.reads = Classifier(), 0
        data = DataLoader(two_classes(), batch_size=10, sampler=Drawn(40))
        trainer(tmp_path, callbacks, max_epochs=3).fit(model, data)
        return [*model.state_dict().values(), torch.get_rng_state()], Drawn.reads

    plain, plain_reads = run([])
    with pytest.warns(UserWarning, match="Drawn draws 40"):
        watched, reads = run([SGDNoiseScale()])
    assert reads == plain_reads + 1
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


def test_examples_are_those_that_training_reaches(tmp_path):
    unshuffled = DataLoader(two_classes(), batch_size=10)
    with pytest.warns(UserWarning, match="stops after 2 batches.*the 20 of 100 examples"):
        run, _ = fit(tmp_path, data=unshuffled, limit_train_batches=2)
    # 0.1 * (20/10 - 1)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.1, rel=FLOAT32)
    # The same loader in another Trainer, a loader that shuffles, and a rehearsal: all 100.
    for data, limit in [
        (unshuffled, {}),
        (shuffled(), {"limit_train_batches": 2}),
        (DataLoader(two_classes(), batch_size=10), {"fast_dev_run": True}),
    ]:
        run, _ = fit(tmp_path, data=data, **limit)
        assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.9, rel=FLOAT32)


def test_overfit_batches_are_the_training_set(tmp_path):
    with pytest.warns(UserWarning, match="stops after 3 batches"):
        run, _ = fit(tmp_path, data=DataLoader(two_classes(), batch_size=10), overfit_batches=3)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.2, rel=FLOAT32)


def test_zero_weights_are_no_training_examples(tmp_path):
    sampler = WeightedRandomSampler([1.0] * 50 + [0.0] * 50, 100)
    with pytest.warns(UserWarning, match="with replacement"):
        run, _ = fit(tmp_path, data=DataLoader(two_classes(), batch_size=10, sampler=sampler))
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.4, rel=FLOAT32)


@pytest.mark.parametrize("shuffle", [True, False])
def test_evidence_and_noise_scale_count_the_same_examples(tmp_path, shuffle):
    evidence, noise = LaplaceEvidence(prior_precision=1.0), SGDNoiseScale()
    data = DataLoader(two_classes(80), batch_size=8, shuffle=shuffle)
    run = trainer(tmp_path, [evidence, noise], limit_train_batches=2)
    with nullcontext() if shuffle else pytest.warns(UserWarning, match="the 16 of 80"):
        run.fit(Classifier(), data)
    examples = evidence.history[0][1].num_examples
    assert examples == (80 if shuffle else 16)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(
        sgd_noise_scale(0.1, 8, examples), rel=FLOAT32
    )


def test_two_with_prefixes_of_their_own(tmp_path):
    run, _ = fit(tmp_path, extra=[SGDNoiseScale(dataset_size=50, log_key_prefix="half/")])
    assert float(run.callback_metrics["half/noise_scale"]) == pytest.approx(0.4, rel=FLOAT32)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(0.9, rel=FLOAT32)


def test_several_adaptive_groups_are_named_together(tmp_path, caplog):
    def optimizer(module):
        groups = [{"params": part.parameters()} for part in (module.first, module.second)]
        return torch.optim.AdamW(groups)

    with caplog.at_level(logging.INFO):
        fit(tmp_path, optimizer)
    assert "by their own size, here AdamW/pg1 and AdamW/pg2. Logging" in caplog.text


def test_replicas_multiply_the_batch(tmp_path, monkeypatch):
    # The strategy's own number, which is not the world size under tensor parallelism.
    class Fake(L.Callback):
        def on_train_start(self, trainer, pl_module):
            monkeypatch.setattr(
                type(trainer.strategy),
                "distributed_sampler_kwargs",
                {"num_replicas": 2, "rank": 0},
                raising=False,
            )

    distributed = torch.utils.data.distributed.DistributedSampler(two_classes(), num_replicas=2, rank=0)
    data = DataLoader(two_classes(), batch_size=10, sampler=distributed)
    run, _ = fit(tmp_path, data=data, extra=[Fake()])
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(
        0.1 * (100 / 20 - 1), rel=FLOAT32
    )


def test_replicas_without_a_distributed_sampler_are_announced():
    module = SimpleNamespace(automatic_optimization=True)
    data = DataLoader(two_classes(), batch_size=10, sampler=SequentialSampler(two_classes()))
    fake = SimpleNamespace(
        lightning_module=module,
        train_dataloader=data,
        accumulate_grad_batches=3,
        num_training_batches=10,
        fast_dev_run=0,
        distributed_sampler_kwargs={"num_replicas": 2, "rank": 0},
        strategy=SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 0}),
        optimizers=[torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)],
    )
    found = read_configuration(fake)
    assert found.groups[0].configuration.batch_size == 60
    assert "without a DistributedSampler" in found.notes[0]


def test_checkpoint_and_early_stopping_can_monitor_it(tmp_path):
    key = "bayes/noise_scale"
    best = ModelCheckpoint(tmp_path, monitor=key, mode="min", save_top_k=1, filename="{epoch}")
    stop = EarlyStopping(monitor=key, mode="min", stopping_threshold=0.3)
    run, _ = fit(
        tmp_path,
        with_lambda("epoch", lambda epoch: 0.5**epoch),
        extra=[stop, best],
        max_epochs=10,
        enable_checkpointing=True,
    )
    # 0.9, 0.45, 0.225: stopped after the third epoch, whose checkpoint is the best.
    assert run.current_epoch == 3
    assert best.best_model_path.endswith("epoch=2.ckpt")


def test_csv_logger(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, [SGDNoiseScale()], logger=logger).fit(Classifier(), shuffled())
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "bayes/noise_scale" in text


def test_noise_scales_follow_the_function(tmp_path):
    run, _ = fit(tmp_path, plain_sgd(lr=0.03, momentum=0.7))
    expected = sgd_noise_scale(0.03, 10, 100, 0.7)
    assert float(run.callback_metrics["bayes/noise_scale"]) == pytest.approx(expected, rel=FLOAT32)
