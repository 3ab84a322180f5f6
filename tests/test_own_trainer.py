"""The README's promise to other trainers: init_process_group of their own, and one line of thinwire."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TRAINER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import thinwire as tw

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(100, 100))
method = tw.allreduce(model, dtype="bf16", timeout_s=20)
for step in range(3):
    model.zero_grad()
    predicted = method.predicted_bytes()
    model(torch.full((4, 100), 1.0 + rank)).square().mean().backward()
assert predicted == {"world": 2 * 10100}, predicted
means = torch.stack([p.grad.double().sum() for p in model.parameters()])
gathered = [torch.empty_like(means) for _ in range(2)]
dist.all_gather(gathered, means)
assert torch.equal(*gathered)
dist.barrier()
if rank == 1:
    sys.exit(0)  # leaves without a word, as a trainer that crashes
try:
    model(torch.ones(4, 100)).square().mean().backward()
except tw.PeerLostError as error:
    open(sys.argv[1], "w").write(f"{error.missing_ranks} {error.operation} {error}")
    sys.exit(0)
sys.exit("no PeerLostError")
"""


def test_one_line_in_a_trainer_with_its_own_process_group(tmp_path: Path) -> None:
    script, verdict = tmp_path / "trainer.py", tmp_path / "verdict"
    script.write_text(TRAINER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(verdict)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert verdict.read_text().startswith("(1,) allreduce/bucket0 ")
    assert "No answer from rank 1" in verdict.read_text()
