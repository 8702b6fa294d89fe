"""Networks as data, each with one thing that breaks a lesser engine.

Each takes the number of outputs and is small enough for a dense Jacobian. `NETWORKS` says what goes in and
where in the output the classes stand.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tests.networks import plain, sequences
from tests.networks.common import VOCABULARY

__all__ = ["NETWORKS", "VOCABULARY", "Network"]


@dataclass(frozen=True)
class Network:
    """A factory, and what goes in and comes out.

    Attributes:
        make: From the number of outputs to the network.
        shape: Of one input.
        tokens: Whether inputs are integers below `VOCABULARY`.
        class_dim: Dimension of the output that holds the classes.
    """

    make: Callable[[int], nn.Module]
    shape: tuple[int, ...] = (5,)
    tokens: bool = False
    class_dim: int = 1


NETWORKS: dict[str, Network] = {
    "linear": Network(plain.linear),
    "mlp": Network(plain.mlp),
    "conv": Network(plain.FunctionalConv, (2, 5, 4)),
    "batch_norm": Network(plain.batch_norm, (2, 4, 4)),
    "residual": Network(plain.Residual),
    "dropout": Network(plain.dropout),
    "shared_weight": Network(plain.SharedWeight),
    "called_twice": Network(plain.CalledTwice),
    "functional_reuse": Network(plain.FunctionalReuse),
    "broadcast": Network(plain.Broadcast),
    "sequence": Network(sequences.Sequence, (3, 4)),
    "mixed_positions": Network(sequences.WithAndWithoutPositions, (3, 4)),
    "unpooled": Network(plain.Unpooled),
    "one_position": Network(plain.one_position, (2, 2, 3)),
    "conv1d": Network(plain.conv1d, (2, 6)),
    "conv3d": Network(plain.conv3d, (2, 3, 3, 2)),
    "transposed": Network(plain.transposed, (2, 3, 3)),
    "output_padding": Network(plain.output_padding, (2, 3)),
    "padded": Network(plain.padded, (2, 4, 4)),
    "layer_norm": Network(plain.layer_norm),
    "group_norm": Network(plain.group_norm, (2, 3, 4)),
    "rms_norm": Network(plain.rms_norm),
    "instance_norm": Network(plain.instance_norm, (2, 3, 5)),
    "embedding": Network(sequences.Embedded, (4,), tokens=True),
    "padded_embedding": Network(sequences.padded_embedding, (4,), tokens=True),
    "lstm": Network(sequences.Recurrent, (3, 4)),
    "gru": Network(sequences.BidirectionalGRU, (3, 4)),
    "cell_in_loop": Network(sequences.CellInLoop, (3, 4)),
    "attention": Network(sequences.Attention, (3, 4)),
    "attention_seq_first": Network(sequences.AttentionSequenceFirst, (3, 4)),
    "tied": Network(sequences.TiedFunctionally, (4,), tokens=True),
    "language_model": Network(sequences.LanguageModel, (3,), tokens=True, class_dim=-1),
    "bare_parameter": Network(sequences.BareParameters, (3, 4)),
    "flattened": Network(sequences.Flattened, (3, 4)),
    "flattened_time_first": Network(sequences.FlattenedTimeFirst, (3, 4)),
    "custom_layer": Network(plain.custom_layer),
    "convnext_block": Network(plain.ConvNeXtBlock, (3, 4, 3)),
    "resnet_block": Network(plain.ResNetBlock, (2, 4, 4)),
    "prelu": Network(plain.prelu),
    "weight_norm": Network(plain.parametrized),
    "sequence_output": Network(sequences.SequenceOutput, (3, 4), class_dim=-1),
    "channels_first": Network(plain.channels_first, (2, 4)),
    "pixels": Network(plain.pixels, (2, 3, 3)),
}
"""Outputs are [N, C], or [N, T, C] where `class_dim` is -1, or [N, C, T] and [N, C, H, W]."""
