"""What a Trainer, module, loss or dataset does not allow, callback by callback, each with its way out."""

import inspect
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_bayes import GradientNoiseScale, LaplaceEvidence, ScalingAdvisor, SGDNoiseScale, Stability

LEAVE_OUT = "leave out"
"""The way out of a row that has no other."""
SMALL_ADVISOR = partial(ScalingAdvisor, target_batch_size=16)
EVERY_STEP = partial(GradientNoiseScale, every_n_steps=1)


class Small(lightning.LightningModule):
    """Classification; a step may be given."""

    def __init__(self, step=None, net=None, optimizer=None):
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.step, self.optimizer = step or classify, optimizer or sgd

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return self.optimizer(p for p in self.parameters() if p.requires_grad)


def sgd(parameters, **settings):
    return torch.optim.SGD(parameters, **{"lr": 0.05, "momentum": 0.5, "weight_decay": 0.05} | settings)


class Manual(Small):
    """Steps its optimizer itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(classify(self, batch))
        optimizer.step()


class OwnLearningRate(torch.optim.Optimizer):
    """An optimizer that calls its learning rate something else."""

    def __init__(self, parameters):
        super().__init__(parameters, {"step_size": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["step_size"] * parameter.grad)
        return loss


class OnceOnly(torch.autograd.Function):
    """A tanh whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        result = x.tanh()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (result,) = ctx.saved_tensors
        return gradient * (1 - result**2)


class OnceOnlyTanh(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x)


class Relu6Gate(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3) / 6


class HoldsLock(Small):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class HoldsOriginal(Small):
    def __init__(self):
        super().__init__()
        self.call = lambda x: 1.0 * self.net(x)

    def forward(self, x):
        return self.call(x)


class StoresOnTrainer(Small):
    def training_step(self, batch, batch_idx):
        self.trainer.seen = len(batch[0])
        return classify(self, batch)


class GraphBatch:
    """Somebody's batch, which no collection is."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, non_blocking=False):
        return GraphBatch(self.x.to(device), self.y.to(device))


class OneGraph(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(20, 4, generator=generator), torch.arange(20) % 3


class Endless(IterableDataset):
    """Twelve examples, but it does not say so."""

    def __iter__(self):
        return iter(TensorDataset(*tensors()))


class BatchesWithoutSize:
    """A batch sampler that does not say how large its batches are."""

    def __iter__(self):
        return iter([[0, 1, 2], [3, 4, 5, 6], [7, 8], [9, 10, 11]])

    def __len__(self):
        return 4


def tensors(number=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loader(number=32, batch_size=8, **kwargs):
    return DataLoader(TensorDataset(*tensors(number)), batch_size, **kwargs)


def classify(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def variational(module, batch):
    code = module.net[:2](batch[0])
    return F.mse_loss(module.net[2:](code), batch[0][:, :3]) + 0.1 * code.square().mean()


def quantiles(module, batch):
    error = batch[1].float().unsqueeze(1) - module(batch[0])
    levels = torch.tensor([0.1, 0.5, 0.9])
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def penalised(module, batch):
    return classify(module, batch) + 1e-3 * sum(p.square().sum() for p in module.net.parameters())


def dice(module, batch):
    p, t = module(batch[0]).softmax(1), F.one_hot(batch[1], 3)
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def contrastive(module, batch):
    a, b = (F.normalize(module(x), dim=1) for x in (batch[0], batch[0] * 1.1 + 0.1))
    return F.cross_entropy(a @ b.T / 0.5, torch.arange(len(a)))


def triplets(module, batch):
    return F.triplet_margin_loss(module(batch[0]), module(batch[0] * 1.1), module(batch[0].flip(0)))


def absolute(module, batch):
    return F.l1_loss(module(batch[0]), batch[0][:, :3])


def regression(module, batch):
    return F.mse_loss(module(batch[0]), batch[0][:, :3])


def noise(module, batch):
    return (module(batch[0]) * torch.tensor([1.0, -1.0]).repeat(len(batch[0]) // 2)[:, None]).mean()


class Scheduled(Small):
    """Schedulers that read keys."""

    def __init__(self, step, keys):
        super().__init__(step)
        self.keys = keys

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        schedulers = [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer) for _ in self.keys]
        pairs = zip(schedulers, self.keys, strict=True)
        return [optimizer], [{"scheduler": scheduler, "monitor": key} for scheduler, key in pairs]


def scheduled(step, keys):
    return lambda: Scheduled(step, keys)


def detached(module, batch):
    with torch.no_grad():
        outputs = module(batch[0])
    # The gradient comes from elsewhere.
    return F.cross_entropy(outputs.requires_grad_(), batch[1])


def asserts_training(module, batch):
    assert module.training, "training_step outside training"
    return classify(module, batch)


def fails_in_eval(error):
    def step(module, batch):
        if not module.training:
            raise error
        return classify(module, batch)

    return step


def allocates(at_most, error):
    """A step that fails in eval mode, so on the copy, for more examples than these."""

    def step(module, batch):
        if not module.training and len(batch[0]) > at_most:
            raise error
        return classify(module, batch)

    return step


def nodes(module, batch):
    return F.cross_entropy(module(batch[0])[0], batch[1][0])


def graph(module, batch):
    return F.cross_entropy(module(batch.x), batch.y)


def of_parts(module, batch):
    return classify(module, batch["one"])


def digits_and_letters(module, batch):
    return classify(module, batch["digits"]) + classify(module, batch["letters"])


def both():
    return {"digits": loader(), "letters": loader()}


def graphs():
    return DataLoader(OneGraph(), 1, collate_fn=lambda items: GraphBatch(*items[0]))


def batches_without_size():
    return DataLoader(TensorDataset(*tensors(12)), batch_sampler=BatchesWithoutSize())


def with_net(*layers):
    return lambda: Small(net=nn.Sequential(*layers))


def stepping(step):
    return lambda: Small(step)


def optimized_by(optimizer):
    return lambda: Small(optimizer=optimizer)


def frozen(names):
    def make():
        module = Small()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not name.startswith(names))
        return module

    return make


def outputs_and_targets(module, batch):
    return module(batch[0]), batch[1]


NETWORK = partial(LaplaceEvidence, network="net", likelihood="classification")


@dataclass(frozen=True)
class Row:
    """One thing that is not allowed.

    Attributes:
        name: of the row.
        callback: makes the callback, and takes `on_error`.
        message: the reason, a regular expression.
        way_out_text: words that the end of the warning holds.
        way_out: what changes of this row where the warning is followed, or LEAVE_OUT.
        module: makes the module.
        data: makes what fit() gets.
        trainer: of the Trainer.
    """

    name: str
    callback: Callable[..., Callback]
    message: str
    way_out_text: str
    way_out: Mapping[str, Any] | str = LEAVE_OUT
    module: Callable[[], lightning.LightningModule] = Small
    data: Callable[[], Any] = loader
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def followed(self) -> "Row":
        """This row with the way out taken."""
        assert not isinstance(self.way_out, str)
        return replace(self, **self.way_out)


NAMES = ("LaplaceEvidence", "SGDNoiseScale", "GradientNoiseScale", "Stability", "ScalingAdvisor")
KEYS = {
    LaplaceEvidence: "bayes/log_evidence",
    SGDNoiseScale: "bayes/noise_scale",
    GradientNoiseScale: "bayes/gradient_noise_trace",
    Stability: "bayes/largest_eigenvalue",
}
UNRESTRICTED = {"weights_only": False} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}


def run(tmp_path, row, *callbacks, epochs=1, ckpt_path=None):
    """Fit from one seed; gives the Trainer, the module and our warnings with the step of each."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
        | row.trainer,
    )
    module = row.module()
    ours = []

    def note(message, *args, **kwargs):
        text = str(message)
        if text.startswith(NAMES):
            ours.append((trainer.global_step, text))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        trainer.fit(module, row.data(), ckpt_path=ckpt_path, **UNRESTRICTED)
    return trainer, module, ours


def finite_of(trainer, callback):
    if isinstance(callback, ScalingAdvisor):
        return bool(callback.advice)
    value = trainer.callback_metrics.get(KEYS[type(callback)])
    return value is not None and math.isfinite(value)
