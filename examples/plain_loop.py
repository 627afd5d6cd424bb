"""A training loop in the shape of RMU's, before and after: `python -m examples.plain_loop`.

RMU (arXiv 2403.03218, the WMDP benchmark) trains `down_proj` of three layers so that activations on forget
texts go to a random vector, while those on retain texts stay where the frozen model has them. `before` adds
the two losses; `after` is the same loop with `sago.GradientBuckets`. The model is a small Llama with random
weights; the texts are facts about invented people, of which where and when they were born is to be forgotten.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import sago
from examples.worlds.facts import Collator, encode
from examples.worlds.people import END, build_tokenizer, facts_of, make_people

Batch = dict[str, Tensor]
Batches = Iterable[tuple[Batch, Batch]]

LAYER = 3  # whose input is steered: the three layers ahead of it are trained
STEERING = 4.0  # norm of the control vector, in norms of the activations that it is to replace
ALPHA, LR = 10.0, 3e-3
COLUMNS = (
    "loop",
    "rule",
    "forget distance",
    "retain distance",
    "cos(f,r)",
    "cos(u,r)",
    "cos(u,f)",
    "conflict",
)


def before(
    model: LlamaForCausalLM,
    frozen: LlamaForCausalLM,
    control: Tensor,
    batches: Batches,
    alpha: float = ALPHA,
    lr: float = LR,
) -> None:
    """Trains on the sum of the losses."""
    params = trained(model)
    optimizer = torch.optim.AdamW(params, lr=lr)
    for forget_batch, retain_batch in batches:
        forget_loss = forget_distance(model, control, forget_batch)
        retain_loss = alpha * retain_distance(model, frozen, retain_batch)
        loss = forget_loss + retain_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def after(
    model: LlamaForCausalLM,
    frozen: LlamaForCausalLM,
    control: Tensor,
    batches: Batches,
    alpha: float = ALPHA,
    lr: float = LR,
    rule: str = "sago",
) -> None:
    """Trains on what `rule` makes of the two gradients."""
    params = trained(model)
    optimizer = torch.optim.AdamW(params, lr=lr)
    buckets = sago.GradientBuckets(params)
    for forget_batch, retain_batch in batches:
        forget_loss = forget_distance(model, control, forget_batch)
        retain_loss = alpha * retain_distance(model, frozen, retain_batch)
        with buckets.forget():
            forget_loss.backward()
        with buckets.retain():
            retain_loss.backward()
        buckets.synthesize_(rule)
        optimizer.step()
        buckets.zero_()


def trained(model: LlamaForCausalLM) -> list[Tensor]:
    """`down_proj` of the three layers ahead of `LAYER`; everything else is frozen."""
    model.requires_grad_(False)
    return [layer.mlp.down_proj.weight.requires_grad_() for layer in model.model.layers[LAYER - 3 : LAYER]]


def activations(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """What goes into `LAYER`, `[tokens, hidden]`, without the padding."""
    mask = batch["attention_mask"]
    states = model.model(batch["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states
    return states[LAYER][mask.bool()]


def forget_distance(model: LlamaForCausalLM, control: Tensor, batch: Batch) -> Tensor:
    found = activations(model, batch)
    return mse_loss(found, control.expand_as(found))


def retain_distance(model: LlamaForCausalLM, frozen: LlamaForCausalLM, batch: Batch) -> Tensor:
    with torch.no_grad():
        kept = activations(frozen, batch)
    return mse_loss(activations(model, batch), kept)


class Task(NamedTuple):
    """The frozen model, where forget texts should go, the batches to train on, and all texts of each side."""

    frozen: LlamaForCausalLM
    control: Tensor
    batches: list[tuple[Batch, Batch]]
    everything: tuple[Batch, Batch]


def make_task(steps: int, seed: int = 0, people: int = 40, batch_size: int = 8) -> Task:
    torch.manual_seed(seed)
    facts = facts_of(make_people(people, seed))
    tokenizer = build_tokenizer(facts, 512)
    collator = Collator(tokenizer.pad_token_id)
    born = [" born" in fact.prompt for fact in facts]
    sides = [
        [encode(fact, tokenizer, END) for fact, b in zip(facts, born, strict=True) if b is forget]
        for forget in (True, False)
    ]
    loaders = [DataLoader(side, batch_size, shuffle=True, collate_fn=collator) for side in sides]
    endless = [itertools.chain.from_iterable(itertools.repeat(loader)) for loader in loaders]
    batches = list(itertools.islice(zip(*endless, strict=True), steps))
    everything = tuple(collator(side) for side in sides)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=170,
        num_hidden_layers=LAYER + 1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,  # at the usual 0.02 the layers hardly change what the embedding gives them
        use_cache=False,
    )
    frozen = LlamaForCausalLM(config).requires_grad_(False)
    control = torch.rand(config.hidden_size)
    control *= STEERING * activations(frozen, everything[0]).norm(dim=1).mean() / control.norm()
    return Task(frozen, control, batches, everything)


def train(task: Task, rule: str | None) -> LlamaForCausalLM:
    """A copy of the model after `before` (no rule) or `after`."""
    model = copy.deepcopy(task.frozen)
    batches = tqdm(task.batches, desc=rule or "before", unit="step", file=sys.stderr)
    if rule is None:
        before(model, task.frozen, task.control, batches)
    else:
        after(model, task.frozen, task.control, batches, rule=rule)
    return model


def measure(task: Task, model: LlamaForCausalLM, rule: str) -> dict[str, float]:
    """Both distances over all texts, and the report of the update that `rule` would make there next."""
    model.zero_grad()
    buckets = sago.GradientBuckets(trained(model))
    with buckets.forget():
        forget = forget_distance(model, task.control, task.everything[0])
        forget.backward()
    with buckets.retain():
        retain = retain_distance(model, task.frozen, task.everything[1])
        retain.backward()
    report = buckets.synthesize_(rule, alpha=ALPHA).summary()
    buckets.zero_()
    return {"forget": forget.item(), "retain": retain.item(), **report}


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def line(loop: str, rule: str, seen: dict[str, float]) -> tuple[str, ...]:
    return (
        loop,
        rule,
        f"{seen['forget']:.3f}",
        f"{seen['retain']:.4f}",
        f"{seen['cos_forget_retain']:+.3f}",
        f"{seen['cos_update_retain']:+.3f}",
        f"{seen['cos_update_forget']:+.3f}",
        f"{seen['conflict_fraction']:.1%}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.plain_loop", description=__doc__.split("\n")[0])
    parser.add_argument("--rule", nargs="+", choices=sago.list_rules(), default=["sum", "sago", "pcgrad"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    task = make_task(args.steps, args.seed)
    untrained = forget_distance(task.frozen, task.control, task.everything[0]).item()
    rows = [COLUMNS, line("before", "-", measure(task, train(task, None), "sum"))]
    rows += [line("after", rule, measure(task, train(task, rule), rule)) for rule in args.rule]
    print(
        f"{args.steps} steps; mean squared distances over all texts, untrained {untrained:.3f} and 0\n"
        "f, r, u: forget gradient, retain gradient and update of one more step, over all texts\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
