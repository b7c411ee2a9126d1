"""The optimizers of a stage, AdamW and Muon, each as one ``torch.optim.Optimizer`` with one schedule and state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.model.neo import NEO
from neo_components.recipe.stage import StageConfig
from neo_components.training.lora import lora_parameters


def build_optimizer(model: NEO, stage: StageConfig) -> torch.optim.Optimizer:
    """The stage's optimizer over the trainable parameters of ``model``.

    Weight decay applies to matrices only. With ``muon``, Muon takes the weights of the linear layers, as its authors
    advise, and AdamW everything else: embeddings, the head, norms, biases, and the factors of low-rank adapters, for
    which an orthogonalized step of each factor would not bound the step of their product.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_muon = set(map(id, hidden_matrices(model))) if stage.optimizer == "muon" else set()
    by_muon -= set(map(id, lora_parameters(model)))
    rest = [parameter for parameter in trainable if id(parameter) not in by_muon]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": stage.weight_decay, "name": "adamw"},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "name": "adamw"},
    ]
    adamw = torch.optim.AdamW(groups, lr=stage.lr, betas=(stage.betas[0], stage.betas[1]), eps=stage.eps)
    matrices = [parameter for parameter in trainable if id(parameter) in by_muon]
    if not matrices:
        return adamw
    group = {"params": matrices, "name": "muon"}
    return Joined(torch.optim.Muon([group], lr=stage.muon_lr, weight_decay=stage.weight_decay), adamw)


def hidden_matrices(model: NEO) -> list[Tensor]:
    """Weights of all linear layers except the head."""
    linear = (part for part in model.modules() if isinstance(part, nn.Linear) and part is not model.post_llm.lm_head)
    return [part.weight for part in linear]


class Joined(torch.optim.Optimizer):
    """Several optimizers over different parameters that step together and have one state dict.

    Args:
        parts: the optimizers; their parameter groups become those of this optimizer, in order.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Makes the parts use this optimizer's groups and state, so that schedules and loading apply to them."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores groups and state of all parts."""
        super().load_state_dict(state_dict)
        self._share()
