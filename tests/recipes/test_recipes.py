"""Each recipe: `sum` as the loop before, a rule as the reference by hand, the difference as in the docs."""

from pathlib import Path

import pytest
import torch

import sago.reference
from examples import recipes
from examples.recipes import ALPHA, GAMMA, LR, make_batches, surgery
from tests.support.backends import RULES
from tests.support.differences import counts, difference
from tests.support.oracle import rounding_error

# Raised inside of torch when torch.compile is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

DOCS = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
STEPS = 4


def make_model():
    """In fp64: where a rounding error decides on a sign, `sago` takes another branch."""
    return recipes.make_model().double()


def by_hand(rule, accumulation=1, max_norm=None):
    """The model after steps of SGD on updates of the reference."""
    model = make_model()
    params = list(model.parameters())
    batches = make_batches(STEPS)
    for start in range(0, STEPS, accumulation):
        sides = []
        for side, sign in ((0, -1.0), (1, 1.0)):
            window = batches[start : start + accumulation]
            losses = [sign * model(**batch[side]).loss / accumulation for batch in window]
            sides.append(torch.autograd.grad(sum(losses), params))
        updates, _ = sago.reference.synthesize(*sides, rule, GAMMA, ALPHA)
        for p, update in zip(params, updates, strict=True):
            p.grad = update
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        with torch.no_grad():
            for p in params:
                p -= LR * p.grad
    return model


def assert_same(found, expected):
    """Transformers computes norms and losses in fp32: a step is LR times gradients below 1 that are off by
    some 64 roundings to fp32, one for each term of a sum."""
    atol = STEPS * LR * rounding_error(64, torch.float32)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_differ(first, second):
    """So that agreement is no agreement of models that were hardly trained."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert max((p - q).abs().max().item() for p, q in pairs) > 1e-3


def test_the_batches_conflict():
    model = make_model()
    ((forget, retain),) = make_batches(1)
    sides = [
        torch.autograd.grad(loss, list(model.parameters()))
        for loss in (-model(**forget).loss, model(**retain).loss)
    ]
    _, report = sago.reference.synthesize(*sides, "sago")
    assert report.summary()["cos_forget_retain"] < -0.1


def test_the_rules_end_apart():
    for rule in ("sum", "pcgrad"):
        assert_differ(by_hand("sago"), by_hand(rule))


def test_surgery_by_hand():
    before, after = make_model(), make_model()
    surgery.before(before, make_batches(STEPS))
    surgery.after(after, make_batches(STEPS))
    for p, q in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", RULES)
def test_surgery(rule):
    model = make_model()
    surgery.after(model, make_batches(STEPS), rule)
    assert_same(model, by_hand(rule))


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    def reset():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    reset()  # drops the data loader of an interrupted training, which would make every micro-batch a step
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    reset()


def test_accelerate_before(accelerator):
    from examples.recipes import accelerate_loop

    before, after = make_model(), make_model()
    accelerate_loop.before(accelerator, before, make_batches(STEPS))
    accelerate_loop.after(accelerator, after, make_batches(STEPS), "sum")
    assert_same(after, before)


@pytest.mark.parametrize("rule", ["sago", "pcgrad", "blur"])
def test_accelerate(accelerator, rule):
    from examples.recipes import accelerate_loop

    model = make_model()
    accelerate_loop.after(accelerator, model, make_batches(STEPS), rule)
    assert_same(model, by_hand(rule, accumulation=2, max_norm=1.0))


def fit(kind, *arguments):
    import lightning

    model = make_model()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(kind(model, *arguments), torch.utils.data.DataLoader(make_batches(STEPS), batch_size=None))
    assert trainer.global_step == STEPS
    return model, trainer


# Warnings of Lightning, about its own use of torch and about one worker for the data.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("rule", ["sum", "sago", "pcgrad"])
def test_lightning(rule):
    pytest.importorskip("lightning", reason="needs Lightning")
    from examples.recipes.lightning_module import After, Before

    model, trainer = fit(After, rule)
    assert_same(model, by_hand(rule))
    assert trainer.callback_metrics["cosine"].isfinite()
    if rule == "sum":
        assert_same(model, fit(Before)[0])


@pytest.mark.parametrize(("name", "added", "removed"), [("surgery", 2, 8), ("accelerate_loop", 6, 2)])
def test_the_docs_show_the_difference(name, added, removed):
    module = __import__(f"examples.recipes.{name}", fromlist=[name])
    lines = difference(module.before, module.after)
    assert counts(lines) == (added, removed)
    block = "\n".join(["```diff", *lines, "```"])
    assert block in DOCS, f"docs/recipes.md should hold this block:\n{block}"
    assert f"{added} lines added, {removed} removed" in DOCS


def test_the_docs_show_the_difference_of_lightning():
    pytest.importorskip("lightning", reason="needs Lightning")
    from examples.recipes.lightning_module import After, Before

    lines = difference(Before, After)
    assert counts(lines) == (15, 3)
    block = "\n".join(["```diff", *lines, "```"])
    assert block in DOCS, f"docs/recipes.md should hold this block:\n{block}"
    assert "15 lines added, 3 removed" in DOCS


def test_every_recipe_is_in_the_docs():
    names = {path.stem for path in Path(recipes.__file__).parent.glob("*.py")} - {"__init__"}
    assert names
    for name in names:
        assert f"examples/recipes/{name}.py" in DOCS
