"""Time and memory of the log-prob head against plain `log_softmax`, and how far they differ.

    python benchmarks/logprob_head.py

Time: forward and backward of both paths in one process, alternating; a ratio per pair, and its
median, minimum and maximum. Gradients are dropped between the runs, outside the clock.

Memory: each path runs once in a process of its own, after a small warm-up that loads the
libraries. The kernel's high-water mark of the resident set (VmHWM) is reset just before the run;
extra memory is the mark after it, minus the resident set before it, minus the weight gradient's
size. That counts everything: tensors, the allocator's slack, the matrix library's packing buffers.
Both paths have the weight gradient subtracted, although the plain path's peak lies before that
gradient exists: the ratio is overstated by it, never understated.

Errors: chunked against plain on the same float32 inputs with a random upstream gradient: the
larger of |a - b|_F / |b|_F and max|a - b| / max|b|. The float64 column says how far each is from
a float64 computation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlkit.learner.logprobs import selected_logprobs

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The usual two lines: a [n, V] tensor is kept for the backward pass."""
    logprobs = torch.log_softmax(hidden @ weight.t(), dim=-1)
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """rlkit's, which finds the entropy as well."""
    return selected_logprobs(hidden, weight, targets)[0]


HEADS: dict[str, Head] = {f.__name__: f for f in (plain, chunked)}


def inputs(n: int, size: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, H], weight [V, H], targets [n], upstream gradient [n]; logits have std 2."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, size, generator=generator)
    weight = torch.randn(vocab, size, generator=generator).mul_(2.0 / size**0.5)
    targets = torch.randint(vocab, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, upstream


def status_kib(key: str) -> int:
    """A field of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)


def measure_memory(name: str, n: int, size: int, vocab: int) -> float:
    """Extra peak resident memory of one forward and backward in MiB, weight gradient aside."""
    small = inputs(64, 64, 1000)
    torch.autograd.backward(HEADS[name](*small[:3]), small[3])
    hidden, weight, targets, upstream = inputs(n, size, vocab)
    before = status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    torch.autograd.backward(HEADS[name](hidden, weight, targets), upstream)
    gradient = weight.numel() * weight.element_size() / 2**20
    return (status_kib("VmHWM") - before) / 1024 - gradient


def memory_in_subprocess(name: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--threads", str(args.threads)]
    command += ["--tokens", str(args.tokens), "--hidden", str(args.hidden)]
    command += ["--vocab", str(args.vocab)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return float(done.stdout)


def timed(head: Head, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Seconds of one forward and backward."""
    hidden, weight, targets, upstream = tensors
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    torch.autograd.backward(head(hidden, weight, targets), upstream)
    return time.perf_counter() - start


def results(head: Head, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Log-probs and the gradients of hidden and weight."""
    hidden, weight, targets, upstream = tensors
    logprobs = head(hidden, weight, targets)
    return [logprobs.detach(), *torch.autograd.grad(logprobs, (hidden, weight), upstream)]


def difference(a: Tensor, b: Tensor) -> float:
    delta = a.to(b.dtype) - b
    return max(float(delta.norm() / b.norm()), float(delta.abs().max() / b.abs().max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=sorted(HEADS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args.memory_of, args.tokens, args.hidden, args.vocab))
        return

    print(f"vocabulary {args.vocab}, hidden {args.hidden}, tokens {args.tokens}, float32, "
          f"{args.threads} threads, torch {torch.__version__}")  # fmt: skip
    memory = {name: memory_in_subprocess(name, args) for name in HEADS}
    for name, mib in memory.items():
        ratio = mib / memory["plain"]
        print(f"  extra peak memory  {name:16s} {mib:8.1f} MiB  {ratio:.4f} of plain")

    tensors = inputs(args.tokens, args.hidden, args.vocab)
    for head in HEADS.values():
        timed(head, tensors)
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    for _ in range(args.repeats):
        for name, head in HEADS.items():
            seconds[name].append(timed(head, tensors))
    ratios = {name: [a / b for a, b in zip(times, seconds["plain"], strict=True)] for name, times in seconds.items()}
    for name, times in seconds.items():
        r = ratios[name]
        print(f"  forward + backward {name:16s} {statistics.median(times):8.3f} s    "
              f"{statistics.median(r):.3f} of plain ({min(r):.3f} to {max(r):.3f}, "
              f"{args.repeats} pairs)")  # fmt: skip
    tensors[0].grad = tensors[1].grad = None

    ours, reference = results(chunked, tensors), results(plain, tensors)
    errors = [difference(a, b) for a, b in zip(ours, reference, strict=True)]
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in tensors[:2])
    exact = results(chunked, (hidden, weight, tensors[2], tensors[3].double()))
    for i, name in enumerate(("value", "grad_hidden", "grad_weight")):
        print(f"  error {name:12s} chunked to plain {errors[i]:.2e}; to float64: "
              f"chunked {difference(ours[i], exact[i]):.2e}, "
              f"plain {difference(reference[i], exact[i]):.2e}")  # fmt: skip
    r = ratios["chunked"]
    print(json.dumps({
        "time_ratio": statistics.median(r), "time_ratio_min": min(r), "time_ratio_max": max(r),
        "memory_ratio": memory["chunked"] / memory["plain"], "value_err": errors[0],
        "grad_hidden_err": errors[1], "grad_weight_err": errors[2],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
