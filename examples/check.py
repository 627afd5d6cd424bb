"""The paper's rules on both gradients of a trained model, against the reference: `python -m examples.check`.

Trains a small Llama on the facts of a world, takes its forget and its retain gradient with one backward pass
each, synthesizes them with each rule of `benchmarks.released` on every backend that the device has, checks
each update against `sago.reference`, and prints one table. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM

import sago
import sago.reference
from benchmarks.released import RULES, released
from examples.grid import Setup
from examples.learn import Batch
from examples.objectives import Objective, grad_diff, nll
from examples.unlearn import answers, answers_before
from examples.world import World, make_world, pairs, teach
from sago.backends.choose import triton_version

Case = str | tuple[str, bool]

ELEMENTWISE = ("sum", "sago", "sago_prefer_retain")
REPORTED = ("cos_forget_retain", "cos_update_retain", "cos_update_forget", "conflict_fraction")
WARMUP = 3
# A rule is timed for LONGEST seconds at most, but with FEWEST calls of each kind at least.
LONGEST, FEWEST = 8.0, 3
# Inner products are summed in another order than in the reference, so cosines, and the coefficients of the
# rules that need inner products, differ in the last bits. REPORT_BOUND holds for |cosine - reference|,
# GRAM_BOUNDS for max |update - reference| / max |reference|. A bf16 result may round the other way: one step,
# 2^-7 of its value.
REPORT_BOUND = 1e-5
GRAM_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.check", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="stop training after this many steps")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the gradients; default: bfloat16 on cuda, else float32"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--people", type=int, default=100, help="a tenth of them is to be forgotten")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=192, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each kind, at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything printed to FILE")
    return parser.parse_args(argv)


def gradients(model: LlamaForCausalLM, batch: Batch, objective: Objective) -> list[Tensor]:
    """The gradients of `objective` on one batch, one tensor a parameter. Leaves no gradient behind."""
    objective(answers(model, batch), lambda: answers_before(model, batch)).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return grads


def both_gradients(setup: Setup, world: World, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of GradDiff: of -NLL on the first forget batch, and of NLL on the first retain batch."""
    forget_batch, retain_batch = next(pairs(setup, world, seed))
    return gradients(world.model, forget_batch, grad_diff), gradients(world.model, retain_batch, nll)


def backends_of(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return ["compiled", "reference"]
    return ["triton", "reference"] if triton_version() else ["reference"]


def median_ms(
    calls: Mapping[Case, Callable[[], Any]],
    restore: Callable[[], Any],
    device: torch.device,
    repeats: int,
) -> dict[Case, float]:
    """Median time of each call in ms after a warm-up, the device's work included, `restore` excluded.

    The calls take turns, so that a machine that is busy for a while slows all of them.
    """
    times: dict[Case, list[float]] = {case: [] for case in calls}
    start = time.perf_counter()
    for i in range(WARMUP + repeats):
        if i >= WARMUP + FEWEST and time.perf_counter() - start > LONGEST:
            break
        for case, call in calls.items():
            restore()
            synchronize(device)
            before = time.perf_counter()
            call()
            synchronize(device)
            if i >= WARMUP:
                times[case].append(1e3 * (time.perf_counter() - before))
    return {case: statistics.median(values) for case, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(updates: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max |update - expected| / max |expected| over all tensors; inf where an update is not finite."""
    error = max((u.double() - e.double()).abs().max().item() for u, e in zip(updates, expected, strict=True))
    scale = max(e.double().abs().max().item() for e in expected)
    finite = all(u.isfinite().all().item() for u in updates)
    return error / scale if finite and scale > 0 else math.inf


def check(
    rule: str, updates: Sequence[Tensor], report: Any, expected: Sequence[Tensor], expected_report: Any
) -> tuple[bool, str]:
    """Whether the updates and the report are what the reference gives, and a word about it."""
    seen, right = report.summary(), expected_report.summary()
    if not all(abs(seen[name] - right[name]) <= REPORT_BOUND for name in REPORTED):
        return False, "FAIL report"
    if all(torch.equal(u, e) for u, e in zip(updates, expected, strict=True)):
        return True, "bitwise"
    error = relative_error(updates, expected)
    if rule in ELEMENTWISE or error > GRAM_BOUNDS[updates[0].dtype]:
        return False, f"FAIL {error:.1e}"
    return True, f"{error:.1e}"


def against_reference(
    forget: Sequence[Tensor], retain: Sequence[Tensor], rule: str, backends: Sequence[str]
) -> dict[str, tuple[tuple[bool, str], dict[str, float]]]:
    """For each backend, the result of `check` and the report of the whole model."""
    expected, expected_report = sago.reference.synthesize(forget, retain, rule=rule)
    outcomes = {}
    for backend in backends:
        work = [r.clone() for r in retain]
        report = sago.synthesize_(forget, work, rule=rule, backend=backend)
        outcomes[backend] = check(rule, work, report, expected, expected_report), report.summary()
    return outcomes


def measure(forget: list[Tensor], retain: list[Tensor], repeats: int) -> list[dict[str, Any]]:
    """One row for each rule of the released code and each backend."""
    device = retain[0].device
    work = [torch.empty_like(r) for r in retain]

    def restore() -> None:
        for target, source in zip(work, retain, strict=True):
            target.copy_(source)

    backends = backends_of(device)
    rows = []
    for rule in tqdm(RULES, desc="synthesis", unit="rule", file=sys.stderr):
        outcomes = against_reference(forget, retain, rule, backends)

        calls: dict[Case, Callable[[], Any]] = {"released": partial(released, forget, retain, rule)}
        for case in itertools.product(backends, (False, True)):
            backend, stats = case
            calls[case] = partial(sago.synthesize_, forget, work, rule=rule, stats=stats, backend=backend)
        ms = median_ms(calls, restore, device, repeats)

        for backend, ((passed, verdict), seen) in outcomes.items():
            rows.append(
                {
                    "rule": rule,
                    "backend": backend,
                    "passed": passed,
                    "against_reference": verdict,
                    "ms": ms[backend, False],
                    "released_ms": ms["released"],
                    "ratio": ms["released"] / ms[backend, False],
                    "stats_ms": ms[backend, True],
                    **{name: seen[name] for name in REPORTED},
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        "rule", "backend", "reference", "ms", "released ms", "ratio", "with stats ms",
        "cos(f,r)", "cos(u,r)", "cos(u,f)", "conflict",
    )  # fmt: skip
    lines = [header]
    for row in rows:
        lines.append(
            (
                row["rule"],
                row["backend"],
                row["against_reference"],
                f"{row['ms']:.3f}",
                f"{row['released_ms']:.3f}",
                f"{row['ratio']:.2f}x",
                f"{row['stats_ms']:.3f}",
                f"{row['cos_forget_retain']:+.4f}",
                f"{row['cos_update_retain']:+.4f}",
                f"{row['cos_update_forget']:+.4f}",
                f"{row['conflict_fraction']:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} (CPU, {torch.get_num_threads()} threads)"


def describe(training: dict[str, Any]) -> str:
    lines = [f"trained {training['steps']} steps in {training['seconds']:.0f} s"]
    for name, seen in training["known"].items():
        lines.append(
            f"  {name}: loss {seen['loss']:.3f}, answer tokens right {seen['tokens']:.1%}, "
            f"whole answers right {seen['answers']:.1%}"
        )
    return "\n".join(lines)


def caption(measured: dict[str, Any]) -> str:
    return (
        f"{measured['device']}, {measured['dtype']}, {measured['tensors']} tensors, "
        f"{measured['elements']:,} elements, torch {measured['torch']}\n"
        "f, r, u: forget gradient, retain gradient, update; gamma = alpha = 1\n"
        "reference: the update against sago.reference, bitwise or max |error| / max |update| "
        f"(at most {measured['gram_bound']:.1e})\n"
        f"ms: median of up to {measured['repeats']} warm calls, in place, stats=False; "
        "released: the released code's operations, without statistics too\n"
        "with stats: the same calls with the statistics that fill the columns to the right"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    setup = Setup(
        args.people, vocab=args.vocab, hidden=args.hidden, layers=args.layers, train_steps=args.steps
    )
    setup = replace(setup, batch_size=args.batch_size)
    world = make_world(setup, args.seed)
    world.model.to(device)
    print(
        f"Llama with {sum(p.numel() for p in world.model.parameters()):,} parameters; facts: "
        + ", ".join(f"{len(facts)} {name}" for name, facts in world.facts.items()),
        flush=True,
    )
    start = time.perf_counter()
    steps = teach(setup, world, args.seed)
    # Trained in float32, then used as a checkpoint in `dtype` would be.
    world.model.to(dtype)
    training = {
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "known": world.known(world.model),
    }
    print(describe(training), flush=True)

    forget, retain = both_gradients(setup, world, args.seed)
    rows = measure(forget, retain, args.repeats)
    measured = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(retain),
        "elements": sum(r.numel() for r in retain),
        "torch": torch.__version__,
        "repeats": args.repeats,
        "gram_bound": GRAM_BOUNDS[dtype],
    }
    print(f"\n{caption(measured)}\n\n{table(rows)}")

    failed = [f"{row['rule']} ({row['backend']})" for row in rows if not row["passed"]]
    if args.json:
        result = {"measured": measured, "training": training, "passed": not failed, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if failed:
        print(f"\nDifferent from the reference: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
