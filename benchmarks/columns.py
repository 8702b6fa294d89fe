"""What the evidence of a small transformer costs beside the epoch that it follows: columns in one batched pass.

Run: python -m benchmarks.columns [--seed 0]; for an older version: PYTHONPATH=OLD python benchmarks/columns.py. A
causal language model of 1,604 parameters on 96 sequences of 5 tokens
over 20 words: each sequence has 95 columns, which sequence models pay for one by one in a Python loop.
"""

import argparse
import contextlib
import logging
import time
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bayes import LaplaceEvidence, laplace_evidence

WORDS, LENGTH, SEQUENCES = 20, 5, 96
REPEATS = 5


class Transformer(nn.Module):
    """Two layers of width 8: logits [N, words, positions] of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, 8), nn.Parameter(torch.randn(LENGTH + 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        """From words [N, T] to logits [N, words, T]."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.layers(self.tokens(x) + self.places[: x.shape[1]], mask=mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)


class Module(L.LightningModule):
    """The model, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Transformer()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next word."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.01)


class Clock(L.Callback):
    """Seconds of each epoch up to its end, which other callbacks follow."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self._start)


def main() -> None:
    """Print one line for the function and one for the callback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    torch.manual_seed(parser.parse_args().seed)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x, y = torch.randint(0, WORDS, (2, SEQUENCES, LENGTH))
    module = Module()
    print(f"{sum(p.numel() for p in module.parameters()):,} parameters")
    laplace_evidence(module.net, (x[:4], y[:4]))  # what is imported at the first call
    for batch_size in (SEQUENCES, 32):
        data, seconds = DataLoader(TensorDataset(x, y), batch_size), []
        for _ in range(REPEATS):
            start = time.process_time()
            evidence = laplace_evidence(module.net, data)
            seconds.append(time.process_time() - start)
        print(
            f"laplace_evidence in batches of {batch_size}: {min(seconds):.2f} CPU seconds, "
            f"{evidence.log_evidence:.4f} by {evidence.structure!r}"
        )
    clock, callback = Clock(), LaplaceEvidence()
    with contextlib.redirect_stdout(None):
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=[clock, callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(x, y), 4, shuffle=True))
    took, epoch = min(e.seconds for _, e in callback.history), min(clock.seconds)
    print(f"LaplaceEvidence {took:.2f} s an epoch, training {epoch:.2f} s")


if __name__ == "__main__":
    main()
