"""The optimizers of a stage, AdamW and Muon, each as one ``torch.optim.Optimizer`` with one schedule and state.

Each has the attribute ``found_inf``, a scalar tensor on the device of the weights: where it is 1, a step changes
nothing (the convention of torch's ``GradScaler``). The CPU need not know whether it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    offloads = stage.offload == "optimizer"
    adamw = (OffloadedAdamW if offloads else AdamW)(
        groups, lr=stage.lr, betas=(stage.betas[0], stage.betas[1]), eps=stage.eps
    )
    matrices = [parameter for parameter in trainable if id(parameter) in by_muon]
    if not matrices:
        return adamw
    group = {"params": matrices, "name": "muon"}
    return Joined(Muon([group], lr=stage.muon_lr, weight_decay=stage.weight_decay, offloads=offloads), adamw)


def hidden_matrices(model: NEO) -> list[Tensor]:
    """Weights of all linear layers except the head."""
    linear = (part for part in model.modules() if isinstance(part, nn.Linear) and part is not model.post_llm.lm_head)
    return [part.weight for part in linear]


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` in its fused form: one kernel for all weights, which reads ``found_inf`` on the device."""

    found_inf: Tensor | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, fused=True)
        # A GradScaler is to divide the gradients before they are clipped, not in this step.
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a checkpoint whose optimizer was not fused."""
        super().__setstate__(state)
        for group in self.param_groups:
            group |= {"fused": True, "foreach": None}
            for weight in group["params"]:
                if "step" in self.state.get(weight, ()):  # the kernel counts on the device
                    self.state[weight]["step"] = self.state[weight]["step"].to(weight.device, torch.float32)


class OneByOne(torch.optim.Optimizer):
    """Mixin: steps one weight after the other, so that what a step needs beside them is there for one at a time.

    Attributes:
        offloads: whether the state of a weight lies in the CPU's memory (page-locked beside a GPU) but during its own
            step. Copies keep the order of the device's work, so the CPU waits for none of them.
    """

    offloads = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for group in groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self.param_groups = [group | {"params": [weight]}]
                        with self._state_at(weight):
                            self._step_one(weight)
        finally:
            self.param_groups = groups
        return loss

    def _step_one(self, weight: Tensor) -> None:
        super().step()

    @contextmanager
    def _state_at(self, weight: Tensor) -> Iterator[None]:
        """The weight's state is on its device inside."""
        homes = {name: x for name, x in self._large(weight).items() if x.device != weight.device}
        for name, home in homes.items():
            self.state[weight][name] = home.to(weight.device, non_blocking=True)
        yield
        if self.offloads:
            for name, x in self._large(weight).items():
                self.state[weight][name] = homes[name].copy_(x, non_blocking=True) if name in homes else _home(x)

    def _large(self, weight: Tensor) -> dict[str, Tensor]:
        """The state of a weight that is as large as the weight."""
        return {name: x for name, x in self.state[weight].items() if isinstance(x, Tensor) and x.shape == weight.shape}

    def bring_home(self) -> None:
        """Moves offloaded states to the CPU that a restored checkpoint has put on the device."""
        for weight in self.state if self.offloads else ():
            for name, x in self._large(weight).items():
                self.state[weight][name] = _home(x)

    def arrived(self) -> None:
        """Waits until offloaded states are in the CPU's memory."""
        if self.offloads and torch.cuda.is_available():
            torch.cuda.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """The state, of which all has arrived."""
        self.arrived()
        return super().state_dict()


def _home(x: Tensor) -> Tensor:
    """x in memory of the CPU that a GPU can read and write by itself."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=True)


class OffloadedAdamW(OneByOne, AdamW):
    """AdamW whose two moments lie in the CPU's memory."""

    offloads = True


class Muon(OneByOne, torch.optim.Muon):
    """``torch.optim.Muon`` that heeds ``found_inf``: no second copy of all weights.

    Args:
        offloads: see :class:`OneByOne`.
        others: those of ``torch.optim.Muon``.
    """

    found_inf: Tensor | None = None

    def __init__(self, *others: Any, offloads: bool = False, **options: Any) -> None:
        super().__init__(*others, **options)
        self.offloads = offloads

    def _step_one(self, weight: Tensor) -> None:
        if self.found_inf is None:
            super()._step_one(weight)
            return
        skips = self.found_inf > 0
        momentum = self.state[weight].get("momentum_buffer")
        if momentum is None:
            momentum = torch.zeros_like(weight)
        before, grad = weight.clone(), weight.grad
        weight.grad = torch.where(skips, momentum, grad)  # type: ignore[arg-type] # mixed with itself it stays as it is
        super()._step_one(weight)
        weight.copy_(torch.where(skips, before, weight))
        weight.grad = grad


class Joined(torch.optim.Optimizer):
    """Several optimizers over different parameters that step together and have one state dict.

    Args:
        parts: the optimizers; their parameter groups become those of this optimizer, in order.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @property
    def found_inf(self) -> Tensor | None:
        """Of all parts."""
        return self.parts[0].found_inf  # type: ignore[attr-defined]

    @found_inf.setter
    def found_inf(self, value: Tensor | None) -> None:
        for part in self.parts:
            part.found_inf = value  # type: ignore[attr-defined]

    def _share(self) -> None:
        """Makes the parts use this optimizer's groups and state, so that schedules and loading apply to them."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def bring_home(self) -> None:
        """See :meth:`OneByOne.bring_home`."""
        for part in self.parts:
            if isinstance(part, OneByOne):
                part.bring_home()

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts."""
        for part in self.parts:
            if isinstance(part, OneByOne):
                part.arrived()
        return super().state_dict()

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
