"""What the networks share."""

from torch import nn

VOCABULARY = 6


def perturbed(net: nn.Module) -> nn.Module:
    """Give norms an affine map and running statistics that are not the identity."""
    for module in net.modules():
        if hasattr(module, "eps"):
            for name in ("weight", "bias", "running_mean"):
                if getattr(module, name, None) is not None:
                    nn.init.normal_(getattr(module, name), 0.4, 0.5)
            if getattr(module, "running_var", None) is not None:
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net
