"""A LightningModule, which takes its optimization in its own hands for two gradients."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import sago
from examples.recipes import ALPHA, GAMMA, LR, Batch


class Before(lightning.LightningModule):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), LR)

    def training_step(self, batch: tuple[Batch, Batch], index: int) -> Tensor:
        forget_loss = -self.model(**batch[0]).loss
        retain_loss = self.model(**batch[1]).loss
        return GAMMA * forget_loss + ALPHA * retain_loss


class After(lightning.LightningModule):
    def __init__(self, model: LlamaForCausalLM, rule: str = "sago") -> None:
        super().__init__()
        self.model = model
        self.rule = rule
        self.automatic_optimization = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), LR)

    def on_train_start(self) -> None:
        self.buckets = sago.GradientBuckets(self.trainer.strategy.model)

    def training_step(self, batch: tuple[Batch, Batch], index: int) -> None:
        forget_loss = -self.model(**batch[0]).loss
        retain_loss = self.model(**batch[1]).loss
        with self.buckets.forget():
            self.manual_backward(forget_loss)
        with self.buckets.retain():
            self.manual_backward(retain_loss)
        report = self.buckets.synthesize_(self.rule, GAMMA, ALPHA)
        self.log("cosine", report.cos_forget_retain.mean())
        self.optimizers().step()
        self.buckets.zero_()
