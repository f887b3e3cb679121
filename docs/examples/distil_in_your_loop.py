"""K sparse targets in a training loop of your own: no dense target, no second pass over the logits.

python docs/examples/distil_in_your_loop.py
"""

import torch

from fusechat.loss import linear_sparse_soft_ce

ROWS, VOCABULARY, WIDTH, K = 256, 32_000, 128, 10

rng = torch.Generator().manual_seed(0)
hidden = torch.randn(ROWS, WIDTH, generator=rng)  # of a student's backbone
head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
labels = torch.randint(VOCABULARY, (ROWS,), generator=rng)
labels[:32] = -100  # the user's tokens: ignored, and dropped before the matrix product

teacher = (
    torch.randn(ROWS, VOCABULARY, generator=rng).mul_(3).log_softmax(-1).topk(K)
)  # what a store keeps of a teacher
optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
for step in range(5):
    out = linear_sparse_soft_ce(
        hidden, head.weight, labels, teacher.indices, teacher.values, hard_weight=0.5, divergence="kl", missing="tail"
    )
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {out.loss.item():.3f}, right {out.correct.float().mean().item():.1%}")
