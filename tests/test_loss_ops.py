"""The fusion loss as torch operators: schemas, fake kernels, autograd, torch.compile, and no hidden waits."""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import os
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
from dense_loss import make_rows
from torch.utils._python_dispatch import TorchDispatchMode

from fusechat.loss import backend, linear_sparse_soft_ce, ops, sparse_soft_ce
from fusechat.loss.options import LossOptions
from fusechat.loss.rows import check_rows

OPTIONS = LossOptions(missing="tail", divergence="jsd")


def test_operators_keep_torchs_rules():
    """Catches a hidden mutation, fake shapes that differ from real ones, and a wrong autograd registration."""
    z, labels, ids, logprobs = make_rows(1, 5, 23, 3)
    rows = check_rows(labels, ids, logprobs, 0.5, None, None, None, shape=(5, 23))
    scalars = OPTIONS.scalars().values()
    for want_grad in (False, True):
        arguments = (z.clone().requires_grad_(want_grad), *rows, *scalars, want_grad)
        torch.library.opcheck(ops.sparse_soft_ce_op, arguments)
    hidden, weight, bias = torch.randn(5, 4), torch.randn(23, 4), torch.randn(23)
    for wanted in ((False, False, False), (True, True, True), (True, False, False)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((hidden, weight, bias), wanted)]
        torch.library.opcheck(ops.linear_sparse_soft_ce_op, (*leaves, None, *rows, *scalars, None, *wanted))
    # A bias whose gradient nobody wants has an empty one, of the same type for both.
    halves = [t.bfloat16().requires_grad_(want) for t, want in zip((hidden, weight, bias), (True, True, False))]
    wanted = (True, True, False)
    torch.library.opcheck(ops.linear_sparse_soft_ce_op, (*halves, None, *rows, *scalars, None, *wanted))


@pytest.mark.slow
def test_compiles_as_one_graph_with_equal_results():
    """Catches a graph break, and a gradient that differs from the eager one."""
    _, labels, ids, logprobs = make_rows(2, 6, 31, 4)
    hidden, weight = torch.randn(6, 5), torch.randn(31, 5)

    def both(hidden, weight):
        by_logits = sparse_soft_ce(hidden @ weight.T, labels, ids, logprobs, hard_weight=0.3, missing="tail")
        by_hidden = linear_sparse_soft_ce(hidden * 2, weight, labels, ids, logprobs, hard_weight=0.3)
        return by_logits.loss * 3 + by_hidden.loss, by_logits.soft

    results = []
    for call in (both, torch.compile(both, fullgraph=True)):
        leaves = [t.clone().requires_grad_(True) for t in (hidden, weight)]
        loss, soft = call(*leaves)
        loss.backward()
        results.append((loss.detach(), soft, *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)


WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "any", "all", "equal", "__bool__"}
NUMBERS = {"bool", "int", "float"}
# Where a wait is meant: indices are checked, and arrays handed over, on the CPU only; `counting` says that it waits.
ON_THE_CPU = {"check_indices", "_check_logprobs", "_refuse", "_plain", "_native_rows", "native_topk", "counting"}
# As asserted below, of a factor on the CPU.
NO_WAIT = ["scale_: bool(factor == 1)"]


def _questions(node: ast.AST) -> list[ast.expr]:
    """Return the expressions whose truth a node asks for."""
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        return [node.test]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.comprehension):
        return node.ifs
    return [node.operand] if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else []


def _asks(question: ast.expr, tensors: set[str]) -> bool:
    """Return whether the truth of an expression is that of a tensor, or of a comparison of one."""
    if isinstance(question, ast.Compare):
        values = any(not isinstance(op, ast.Is | ast.IsNot | ast.In | ast.NotIn) for op in question.ops)
        return values and any(_asks(side, tensors) for side in (question.left, *question.comparators))
    return isinstance(question, ast.Name) and question.id in tensors


def reads_that_wait(source: str) -> list[str]:
    """Return what in a module reads a device's value on the host; of names, parameters declared as tensors."""
    found = []
    for function in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]:
        if function.name in ON_THE_CPU:
            continue
        parameters = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        tensors = {p.arg for p in parameters if p.annotation and ast.unparse(p.annotation).split(" |")[0] == "Tensor"}
        for node in ast.walk(function):
            reads = any(_asks(question, tensors) for question in _questions(node))
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", None)
                on_rows = name in ("any", "all") and node.args
                reads = name in WAITS and not on_rows
                if isinstance(node.func, ast.Name) and node.func.id in NUMBERS:
                    reads = not isinstance(node.args[0], ast.Constant)
            if reads:
                found.append(f"{function.name}: {ast.unparse(node)}")
    return found


def test_nothing_waits_for_a_gpu():
    """Catches a read of a device value, which would stall the queue of kernels."""
    root = Path(backend.__file__).parents[1]
    found = []
    for path in (*(root / "loss").glob("*.py"), *(root / "kernels").glob("*.py"), root / "topk.py"):
        if path.name != "sce.py":  # the merge reads a histogram back between its passes
            found += reads_that_wait(path.read_text())
    assert sorted(found) == NO_WAIT
    assert 'factor.device.type == "cpu" and bool(' in inspect.getsource(ops.scale_)


@pytest.mark.parametrize(
    "read",
    [
        "x.sum().item()",
        "x.any()",
        "float(x.sum())",
        "bool(x == 1)",
        "1 if x else 2",
        "x > 0 or y",
        "[i for i in y if not x]",
    ],
)
def test_a_read_that_waits_is_seen(read):
    """Catches a reader of sources that is blind to the commonest waits."""
    assert reads_that_wait(f"def f(x: Tensor, y):\n    return {read}")
    harmless = "float('inf') if x is None or x.shape[0] > 1 or y else x.any(1)"
    assert not reads_that_wait(f"def f(x: Tensor | None, y):\n    return {harmless}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_on_a_gpu():
    """Catches what reading cannot: a wait inside an operator."""
    z, labels, ids, logprobs = (t.cuda() for t in make_rows(5, 6, 50, 4))
    hidden, weight = torch.randn(6, 8, device="cuda"), torch.randn(50, 8, device="cuda")
    kept = (labels != -100).nonzero().squeeze(1)
    for _ in range(2):  # the first compiles
        leaves = [t.clone().requires_grad_(True) for t in (z, hidden, weight)]
        out = sparse_soft_ce(leaves[0] * 1, labels, ids, logprobs, hard_weight=0.3, missing="tail")
        by_hidden = linear_sparse_soft_ce(*leaves[1:], labels, ids, logprobs, hard_weight=0.3, kept=kept)
        (out.loss + 2 * by_hidden.loss).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "products"), [(False, 3), (True, 2)])
def test_a_frozen_head_costs_one_product_less_and_scaling_no_pass(frozen, products):
    """Catches dW computed for a frozen lm_head, and a pass over a gradient that nothing scales."""
    _, labels, ids, logprobs = make_rows(6, 8, 31, 4)
    hidden = torch.randn(8, 5, requires_grad=True)
    weight = torch.randn(31, 5, requires_grad=not frozen)
    with Operators() as forward:
        share = torch.full((8,), 1 / 4096)  # of one micro-batch in an accumulated step
        out = linear_sparse_soft_ce(hidden, weight, labels, ids, logprobs, hard_weight=0.3, row_weight=share)
    assert sum(forward.names[name] for name in ("mm", "addmm")) == products
    with Operators() as backward:
        out.loss.backward()
    assert not backward.names.keys() & {"mm", "addmm", "mul", "mul_"}


def shard_worker(rank: int, port: int, results) -> None:
    """Take one step of a sharded model whose loss is ours."""
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    body, head = sharded_model()
    for module in (body, head):
        fully_shard(module, mesh=mesh)
    _, labels, ids, logprobs = make_rows(7, 8, 31, 4)
    half = slice(4 * rank, 4 * rank + 4)
    hidden = body(torch.linspace(-1, 1, 48).view(8, 6)[half])
    out = sparse_soft_ce(
        head(hidden), labels[half], ids[half], logprobs[half], hard_weight=0.3, row_weight=torch.ones(4)
    )
    out.loss.backward()
    results.put((rank, [p.grad.full_tensor().numpy() for m in (body, head) for p in m.parameters()]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def sharded_model() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the same body and head in every process."""
    torch.manual_seed(3)
    return torch.nn.Linear(6, 5), torch.nn.Linear(5, 31, bias=False)


@pytest.mark.slow
def test_a_sharded_model_gets_the_gradient_of_a_whole_one():
    """Catches a gradient in memory that FSDP2 frees or reduces twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=shard_worker, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    body, head = sharded_model()
    _, labels, ids, logprobs = make_rows(7, 8, 31, 4)
    hidden = body(torch.linspace(-1, 1, 48).view(8, 6))
    out = sparse_soft_ce(head(hidden), labels, ids, logprobs, hard_weight=0.3, row_weight=torch.full((8,), 0.5))
    out.loss.backward()
    for i, parameter in enumerate([*body.parameters(), *head.parameters()]):
        for rank in range(2):
            torch.testing.assert_close(torch.from_numpy(found[rank][i]), parameter.grad)


def test_known_rows_save_the_search_and_change_nothing():
    """Catches `kept` taken for a mask, and rows outside it that still count."""
    _, labels, ids, logprobs = make_rows(3, 8, 31, 4)
    hidden, weight = torch.randn(8, 5, requires_grad=True), torch.randn(31, 5)
    kept = (labels != -100).nonzero().squeeze(1)
    outs = [
        linear_sparse_soft_ce(hidden, weight, labels, ids, logprobs, hard_weight=0.3, kept=rows)
        for rows in (None, kept)
    ]
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert torch.equal(outs[0].soft, outs[1].soft)


def test_a_second_backward_is_refused():
    """Catches a gradient handed out twice: it lives in memory that the first backward gave away."""
    z, labels, ids, logprobs = make_rows(4, 3, 11, 2)
    out = sparse_soft_ce(z.requires_grad_(True) * 1, labels, ids, logprobs, hard_weight=0.3)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken twice"):
        out.loss.backward()
