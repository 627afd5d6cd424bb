"""`python -m sago analyze`: where two gradients conflict, from files or from a model and two texts."""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sago.capture.buckets import GradientBuckets
from sago.core.report import SynthesisReport
from sago.monitor.monitor import ConflictMonitor
from sago.monitor.places import places
from sago.rules import list_rules
from sago.synthesis import synthesize


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sago analyze",
        description="Shows where the forget and the retain gradient conflict: prints a table by layer, and "
        "writes one line for each tensor to conflicts.csv, and draws conflicts.png.",
    )
    parser.add_argument(
        "forget",
        type=Path,
        help="the forget gradients: a file of torch.save with a dict of tensors by name, or with a list, "
        "which has no layers; or a .safetensors file; with --model a text file, each line of which is a text "
        "to forget",
    )
    parser.add_argument("retain", type=Path, help="the same for retain")
    parser.add_argument("--model", type=Path, help="a folder of a causal language model of transformers")
    parser.add_argument(
        "--tokens", type=int, default=256, help="the most tokens of a text, at least 2 (default: 256)"
    )
    parser.add_argument("--rule", default="sago", choices=list_rules(), help="default: sago")
    parser.add_argument("--gamma", type=float, default=1.0, help="the weight of forget (default: 1)")
    parser.add_argument("--alpha", type=float, default=1.0, help="the weight of retain (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder of the two files (default: .)")
    args = parser.parse_args(argv)
    if args.tokens < 2:
        parser.error(
            "argument --tokens: should be at least 2, because the loss is that of the next token. Found "
            f"{args.tokens}."
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    options = {"rule": args.rule, "gamma": args.gamma, "alpha": args.alpha}
    try:
        if args.model is None:
            report = of_files(args.forget, args.retain, **options)
        else:
            report = of_model(args.model, args.forget, args.retain, args.tokens, **options)
        by_layer = report.regroup([_layer(place.layer) for place in places(report.groups)])
        _print(by_layer if len(by_layer.groups) > 1 else report)
        args.out.mkdir(parents=True, exist_ok=True)
        monitor = ConflictMonitor()
        monitor.add(report)
        monitor.to_csv(args.out / "conflicts.csv")
        print(f"Written: {args.out / 'conflicts.csv'}")
        report.plot(args.out / "conflicts.png")
        print(f"Written: {args.out / 'conflicts.png'}")
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def of_files(forget: Path, retain: Path, **options: Any) -> SynthesisReport:
    """The report of two files of gradients."""
    f, r = read(forget), read(retain)
    if isinstance(f, dict) and isinstance(r, dict):
        if f.keys() != r.keys():
            other = sorted(f.keys() ^ r.keys())
            raise ValueError(
                f"The files should have gradients of the same names. Found {len(other)} names that are in "
                f"one file only, the first of which is {other[0]!r}."
            )
        names, pairs = list(f), (list(f.values()), [r[name] for name in f])
    elif isinstance(f, list) and isinstance(r, list):
        if len(f) != len(r):
            raise ValueError(
                f"The files should have equally many gradients. Found {len(f)} in {forget} and {len(r)} in "
                f"{retain}."
            )
        names, pairs = [f"[{i}]" for i in range(len(f))], (f, r)
    else:
        raise ValueError(
            f"Both files should have a list, or both a dict. Found a {type(f).__name__} in {forget} and a "
            f"{type(r).__name__} in {retain}. Save the gradients of both losses in the same form."
        )
    _, report = synthesize(*pairs, groups=names, **options)
    return report


def read(path: Path) -> dict[str, Tensor | None] | list[Tensor | None]:
    """The gradients of a file: by their names, or a list if they have no names."""
    if path.suffix == ".safetensors":
        with _installed("safetensors", f"The file {path}", "safetensors"):
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        load: Any = load_file
        errors: Any = SafetensorError
    else:
        load = partial(torch.load, map_location="cpu", weights_only=True)
        errors = (RuntimeError, LookupError, EOFError, pickle.UnpicklingError)
    try:
        found = load(path)
    except FileNotFoundError as error:
        raise ValueError(f"The file {path} should have gradients. Found no such file.") from error
    except errors as error:
        raise ValueError(
            f"The file {path} should have gradients, written by torch.save. Found that it cannot be read "
            f"({type(error).__name__}). For texts, name a model with --model."
        ) from error
    unnamed = isinstance(found, (list, tuple))
    values = found if unnamed else found.values() if isinstance(found, Mapping) else [found]
    other = [g for g in values if not (g is None or isinstance(g, Tensor))]
    if other or not (unnamed or isinstance(found, Mapping)):
        holds = f" that holds {type(other[0]).__name__}" if other and other[0] is not found else ""
        raise TypeError(
            f"The file {path} should have a list or a dict of tensors. Found {type(found).__name__}{holds}."
        )
    return list(found) if unnamed else {str(name): g for name, g in found.items()}


def of_model(folder: Path, forget: Path, retain: Path, tokens: int, **options: Any) -> SynthesisReport:
    """The report of one step of gradient ascent on the forget texts, with the loss of the retain texts.

    The losses are `-NLL` and `NLL`, where `NLL` is the mean of `model(ids, labels=ids).loss` over the texts.
    """
    with _installed("transformers", "`--model`", "'sago-kernels[transformers]'"):
        from transformers import AutoModelForCausalLM, AutoTokenizer
    if not folder.is_dir():
        raise ValueError(f"Parameter `--model` should be a folder with a model. Found no folder {folder}.")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    named = list(model.named_parameters())
    # Without groups, a rule of global scope has one row.
    buckets = GradientBuckets(named, groups=[name for name, _ in named])
    for capture, path, sign in ((buckets.forget, forget, -1.0), (buckets.retain, retain, 1.0)):
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise ValueError(f"The file {path} should have a text on each line. Found none.")
        with capture():
            for text in texts:
                ids = torch.tensor([tokenizer.encode(text)[:tokens]])
                if ids.shape[1] < 2:
                    raise ValueError(
                        "A text should have at least two tokens, because the loss is that of the next token. "
                        f"Found {text!r} in {path}."
                    )
                try:
                    loss = model(input_ids=ids, labels=ids).loss
                except IndexError as error:  # an embedding has no row for a position or for a token
                    raise ValueError(
                        f"The model should accept {ids.shape[1]} tokens, each from 0 to {int(ids.max())}, "
                        f"for a text of {path}. Found an IndexError: {error}. Choose a smaller `--tokens`, "
                        "or a folder in which model and tokenizer belong together."
                    ) from error
                (sign / len(texts) * loss).backward()
    return buckets.synthesize_(**options)


def _layer(layer: int | None) -> str:
    return "no layer" if layer is None else f"layer {layer}"


def _print(report: SynthesisReport) -> None:
    """Prints the table, by rich if it is installed and the output is a terminal."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            pass
        else:
            Console().print(report)
            return
    print(report.table())


@contextmanager
def _installed(name: str, what: str, package: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs {name}. Found none. Run `pip install {package}`.") from error
