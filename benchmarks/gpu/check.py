"""Check and measure on a GPU what is only used there, in one call; the last line is JSON.

    python benchmarks/gpu/check.py             # on a machine with a CUDA device
    python benchmarks/gpu/check.py --device cpu    # the same checks without one, to try the script itself

1. The log-prob head in float32 and bfloat16 against `log_softmax` in float64: errors, time and peak memory of forward
   and backward, alternated with the plain path in the same dtype.
2. A short quickstart on the device: seconds a step, engine against learner log-probs, resumed once, bit for bit or not.

Exit status 1 where an error bound is broken: float32 1e-5 relative, bfloat16 2e-2; log-prob difference 1e-4 (float32).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rlkit.learner.logprobs import selected_logprobs

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
SHORT = ["sft.steps=300", "sft.data.source.size=9600", "evaluation.every_steps=0", "telemetry.report=false"]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, targets[:, None]).squeeze(1)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return selected_logprobs(hidden, weight, targets)[0]


def run(path: Any, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> tuple[float, int, list[Tensor]]:
    """Seconds, peak bytes beyond the inputs, and (value, gradient of hidden, gradient of weight)."""
    hidden, weight, targets = (x.detach().clone() for x in inputs)
    hidden.requires_grad_(), weight.requires_grad_()
    cuda = hidden.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    started = time.perf_counter()
    value = path(hidden, weight, targets)
    value.backward(upstream.to(value))
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return seconds, peak, [value.detach(), hidden.grad, weight.grad]


def head(device: str, tokens: int, width: int, vocabulary: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator) * 0.5
    weight = torch.randn(vocabulary, width, generator=generator) * 0.05
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    upstream = torch.randn(tokens, generator=generator).to(device)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = hidden.to(device, dtype), weight.to(device, dtype), targets
        exact = run(plain_double, (inputs[0].double(), inputs[1].double(), targets), upstream)[2]
        times: dict[str, list[float]] = {"plain": [], "chunked": []}
        peaks, errors = {}, {}
        for round_ in range(6):
            for name, path in (("plain", plain), ("chunked", chunked)):
                seconds, peaks[name], values = run(path, inputs, upstream)
                if round_:  # the first one warms up
                    times[name].append(seconds)
                pairs = zip(values, exact, strict=True)
                errors[name] = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        ratios = [a / b for a, b in zip(times["chunked"], times["plain"], strict=True)]
        found[str(dtype).removeprefix("torch.")] = {
            "error": errors["chunked"],
            "plain_error": errors["plain"],
            "time_ratio": statistics.median(ratios),
            "time_ratio_range": [min(ratios), max(ratios)],
            "peak_mb": {name: round(peak / 1e6, 1) for name, peak in peaks.items()},
        }
    return found


def plain_double(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None]).squeeze(1)


def training(device: str, folder: Path) -> dict[str, Any]:
    def train(name: str, steps: int) -> list[dict[str, Any]]:
        places = [f"name={name}", f"output_dir={folder}", f"sft.cache_dir={folder}/cache", f"steps={steps}"]
        settings = [*SHORT, *places, f"learner.device={device}", "learner.deterministic=true"]
        command = [sys.executable, "-m", "rlkit", "train", "recipe=quickstart", *settings]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return [row for line in lines if "time/step" in (row := json.loads(line))]

    whole = train("whole", 12)
    train("parts", 6)
    parts = train("parts", 12)
    same = all(a[k] == b[k] for a, b in zip(whole, parts, strict=True) for k in ("reward/mean", "policy/grad_norm"))
    return {
        "seconds_per_step": statistics.median(row["time/step"] for row in whole[2:]),
        "logprob_absdiff_max": max(row["mismatch/logprob_absdiff/max"] for row in whole),
        "peak_mem_gb": whole[-1]["perf/peak_mem_gb"],
        "resume_equal": same,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible; try the script with --device cpu --tokens 64 --width 32 --vocabulary 512")
        return 2
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "head": head(options.device, options.tokens, options.width, options.vocabulary),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["training"] = training(options.device, Path(folder))
    broken = [name for name, bound in BOUNDS.items() if found["head"][name]["error"] > bound]
    if found["training"]["logprob_absdiff_max"] > 1e-4:
        broken.append("logprob_absdiff")
    print(json.dumps(found | {"broken": broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
