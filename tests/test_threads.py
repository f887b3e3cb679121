"""Threads of the compiled loops: torch's own where torch runs, and none that a forked child could wait for in vain."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the engine starts threads of its own")

STEP = """
import os, time
from pathlib import Path
import torch
from fusechat.loss import sparse_soft_ce

torch.set_num_threads(2)
logits, labels, none = torch.randn(64, 20_000), torch.arange(64), torch.empty(64, 0)

def loss():  # and no operation of torch's on more than one thread, of which a forked child has none
    return sparse_soft_ce(logits, labels, none.long(), none, hard_weight=1.0).loss

def step():
    torch.randn(512, 512) @ torch.randn(512, 512)
    return loss()
"""


def run(script: str) -> str:
    # Passive: a thread that waits sleeps, so what it is seen to use is work.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "FUSECHAT_LOSS": "native"}
    done = subprocess.run(
        [sys.executable, "-c", STEP + script], check=False, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_runs_on_torchs_threads():
    script = """
step()
def used_s():
    fields = {t.name: (t / "stat").read_text().rsplit(")")[-1].split() for t in Path("/proc/self/task").iterdir()}
    return {tid: int(f[11]) / os.sysconf("SC_CLK_TCK") for tid, f in fields.items()}
before, began = used_s(), time.process_time()
while time.process_time() - began < 1:
    loss()
after = used_s()
main = str(os.getpid())
print(sum(after[tid] - before[tid] for tid in before if tid != main))
"""
    assert float(run(script)) > 0.25


def test_a_forked_child_has_threads_too():
    script = """
expected = step()
child = os.fork()
if child == 0:
    os._exit(0 if float(loss()) == float(expected) else 3)
end = time.monotonic() + 60
while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
    if time.monotonic() > end:
        os.kill(child, 9)
        raise SystemExit("the child hangs")
    time.sleep(0.05)
print(os.waitstatus_to_exitcode(status[1]))
"""
    assert run(script) == "0\n"
