"""A program of a user, which `make dist` runs with the installed distribution and checks with mypy."""

import sys

import torch
from torch.nn.functional import mse_loss

import sago

backend = sys.argv[1] if len(sys.argv) > 1 else None

# Two lists of gradients
forget = [torch.tensor([1.0, -1.0, 2.0]), torch.tensor([3.0])]
retain = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-1.0])]
report = sago.synthesize_(forget, retain, rule="sago", backend=backend)
assert [u.tolist() for u in retain] == [[1.0, 1.0, 2.0], [-1.0]], retain
assert report.summary()["conflict_fraction"] == 0.5

# A training loop
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(8, 4), torch.randn(8, 4)
buckets = sago.GradientBuckets(model, backend=backend)
before = mse_loss(model(y), x).item()
for _ in range(5):
    with buckets.forget():
        (-mse_loss(model(x), y)).backward()
    with buckets.retain():
        mse_loss(model(y), x).backward()
    report = buckets.synthesize_(rule="pcgrad", max_norm=1.0)
    optimizer.step()
    buckets.zero_()
after = mse_loss(model(y), x).item()
assert after < before, (before, after)
print(f"sago {sago.__version__}: rule {report.rule}, retain loss {before:.3f} before, {after:.3f} after")
