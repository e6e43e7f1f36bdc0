"""The LM head that gives a loss in place of logits: a few tokens at a time, so that the logits of all are never there.

A token's logits, their float32 copy and both gradients are 1.7 MiB with a vocabulary of 152,000; what is kept of it here is the
gradient of its hidden state, some KiB, which is computed with the loss.
"""

from copy import copy
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

CHUNK = 256  # tokens whose logits are there at once


class LossHead(nn.Linear):
    """The head itself, frozen, until it is given `labels`."""

    labels: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states (..., H); with labels, one for each state, the summed cross entropy in float32."""
        if self.labels is None:
            return super().forward(hidden)
        return cast(torch.Tensor, _SummedLoss.apply(hidden.flatten(0, -2), self.labels, super().forward))

    @classmethod
    def like(cls, head: nn.Linear) -> "LossHead":
        """Shares the weights of `head`, so state dicts keep their keys and embeddings stay tied."""
        same = copy(head)
        same.__class__ = cls
        return cast(LossHead, same)


def logits_bytes(model: Any) -> int:
    """What the logits of a chunk take for a moment: themselves, their float32 copy, and both gradients."""
    head = model.get_output_embeddings()
    taken: int = CHUNK * head.out_features * 2 * (head.weight.element_size() + 4)
    return taken


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, logits: Any) -> torch.Tensor:
        """Here the head's weights are at hand; where processes share them out, they are not when it comes to going back."""
        wanted = ctx.needs_input_grad[0]
        losses, gradients = list[torch.Tensor](), list[torch.Tensor]()
        for states, of in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True):
            with torch.set_grad_enabled(wanted):
                states = states.detach().requires_grad_(wanted)
                loss = functional.cross_entropy(logits(states).float(), of, reduction="sum")
            losses.append(loss.detach())
            if wanted:
                gradients += torch.autograd.grad(loss, states)
        ctx.save_for_backward(*([torch.cat(gradients)] if wanted else []))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the loss, scaled by what became of it."""
        (gradient,) = ctx.saved_tensors
        return (gradient * scale).to(gradient.dtype), None, None
